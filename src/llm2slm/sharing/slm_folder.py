"""A checkpoint's SLM by itself: a plain Hugging Face folder, for whatever takes the embeddings of a prompt."""

import copy
import json
import os
from pathlib import Path

from ..language_models import end_tokens
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..tokenization_llm2slm import LLM2SLMTokenizer
from ..utils import check_new_file, write_folder


def export_slm(model: LLM2SLMForConditionalGeneration, tokenizer: LLM2SLMTokenizer, folder: str | os.PathLike) -> Path:
    r"""
    Writes the SLM with its own tokenizer and how the checkpoint generates. Its prompts are what `model.encode_prompt`
    returns: with those of `fusion="add"` too, nothing is to be added.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): The LLM need not be loaded.
        tokenizer ([`LLM2SLMTokenizer`]): The checkpoint's.
        folder (`str` or `os.PathLike`): A new folder.

    Returns:
        `Path`: the folder.

    Raises:
        OSError: if the folder exists, or cannot be written.
    """
    folder = Path(folder)
    check_new_file(folder)
    write_folder(folder, lambda part: _write(model, tokenizer, part))
    return folder


def _write(model: LLM2SLMForConditionalGeneration, tokenizer: LLM2SLMTokenizer, folder: Path) -> None:
    own, model.slm.generation_config = model.slm.generation_config, _generation_config(model)
    try:
        model.slm.save_pretrained(folder)
    finally:
        model.slm.generation_config = own
    tokenizer.slm_tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that both major versions of Transformers know
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation_config(model: LLM2SLMForConditionalGeneration):
    """The checkpoint's, whose length is the response's; a decoder-only SLM would count the prompt in `max_length`."""
    config = copy.deepcopy(model.generation_config)
    if config.eos_token_id is None:
        config.eos_token_id = end_tokens(model) or None
    if not model.config.slm_config.is_encoder_decoder:
        config.decoder_start_token_id = None
        if config.max_new_tokens is None:
            config.max_new_tokens = config.max_length
        config.max_length = None
    return config
