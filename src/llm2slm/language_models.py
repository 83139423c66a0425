"""A model of any kind as a system under evaluation: how it is loaded, reads pairs, scores responses, writes them.

The kinds: an LLM-to-SLM checkpoint, a causal language model, an encoder-decoder, and a PEFT adapter of any of these.
All get the two-sided tokenizer, so that one collator and one way to end a response serve all of them.
"""

import argparse
import copy
import inspect
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.generation import StoppingCriteriaList, StopStringCriteria
from transformers.utils.peft_utils import find_adapter_config_file

from .cli.main import device, load_checkpoint
from .loading_llm2slm import load_slm, max_positions, split_gguf
from .tokenization_llm2slm import LLM2SLMTokenizer
from .training.frozen_head import read_states_in_one_piece

SHOT_SEPARATOR = "\n\n"  # between the examples shown to a model without a chat template; ends its response


# ---------------------------------------------------------------------------------------------------------------- load
def load_system(args: argparse.Namespace, trained_llm: str | None) -> tuple[PreTrainedModel, LLM2SLMTokenizer]:
    r"""
    Loads a model and its tokenizer.

    Args:
        args (`argparse.Namespace`):
            `model`, `revision`, `dtype`, `device`, and `llm`: where the frozen LLM of an LLM-to-SLM checkpoint, or the
            base model of an adapter is, if not where they say.
        trained_llm (`str`, *optional*): What the training of an adapter called its base model.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is not a language model, or `args.llm` is given for one that needs no other.
    """
    model, tokenizer = _load_any(args, trained_llm)
    if model.config.model_type != "llm2slm":  # which takes padding on either side
        tokenizer.llm_tokenizer.padding_side = "right" if model.config.is_encoder_decoder else "left"
    return model, tokenizer


def _load_any(args, trained_llm):
    _check_folder(args.model)
    is_gguf = split_gguf(args.model, None)[1] is not None
    if not is_gguf and find_adapter_config_file(args.model, revision=args.revision) is not None:
        return _load_adapter(args, trained_llm)
    if _model_type(args.model, args.revision) == "llm2slm":
        return load_checkpoint(args)
    if args.llm is not None:
        raise ValueError(f"{args.model!r} needs no other model: --llm is for LLM-to-SLM checkpoints and adapters.")
    return _load_language_model(args.model, args), _load_tokenizer(args.model, args.revision)


def _load_adapter(args, trained_llm):
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(args.model, revision=args.revision).base_model_name_or_path
    base_args = copy.copy(args)
    base_args.revision = None
    has_tokenizer = not os.path.isdir(args.model) or os.path.exists(os.path.join(args.model, "tokenizer_config.json"))
    try:
        is_llm2slm = base is not None and _model_type(base, None) == "llm2slm"
    except OSError:  # not there any more: --llm or the training may say where it is
        is_llm2slm = False
    if is_llm2slm:
        base_args.model = base
        model, tokenizer = load_checkpoint(base_args)
        if has_tokenizer:
            tokenizer = LLM2SLMTokenizer.from_pretrained(args.model, revision=args.revision)
    else:
        base = args.llm or trained_llm or base
        if base is None:
            raise ValueError(f"The adapter {args.model!r} does not name its base model: say where it is with --llm.")
        tokenizer = _load_tokenizer(args.model, args.revision) if has_tokenizer else _load_tokenizer(base, None)
        model = _load_language_model(base, base_args)
    # Merged, as one would deploy it: without the adapter's own matrix products in each step.
    merged = PeftModel.from_pretrained(model, args.model, revision=args.revision).merge_and_unload().eval()
    read_states_in_one_piece(merged)  # PEFT leaves all but the adapter frozen
    return merged, tokenizer


def _load_language_model(name, args):
    _model_type(name, args.revision)  # a model that is not there, said plainly
    model = load_slm(name, revision=args.revision, dtype=args.dtype, trust_remote_code=False)
    return model.to(device(args)).eval()


def _load_tokenizer(name, revision):
    folder, gguf_file = split_gguf(name, None)
    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False, **gguf)
    except (OSError, ValueError) as error:
        raise OSError(f"There is no tokenizer in {name!r}: {error}") from error
    return LLM2SLMTokenizer.from_tokenizers(tokenizer, tokenizer)


def _model_type(name, revision):
    _check_folder(name)
    if split_gguf(name, None)[1] is not None:  # reading the configuration out of a GGUF file takes seconds
        return None
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        raise OSError(f"There is no model {name!r}: {error}") from error


def _check_folder(name):
    looks_like_a_folder = name.startswith((".", "~", os.sep)) or name.endswith(os.sep)
    if looks_like_a_folder and not os.path.exists(name):
        raise OSError(f"There is no folder {name!r}.")


# ------------------------------------------------------------------------------------------------------------- prompts
def few_shot_prompts(prompts: list[str], shots: list[dict[str, str]], instruction: str | None, tokenizer) -> list:
    r"""
    Puts an instruction and solved examples before each prompt: as a chat if the tokenizer has a template, which then
    says the instruction before each prompt of it, else as text.

    Args:
        prompts (`list[str]`): The prompts.
        shots (`list[dict[str, str]]`): The examples, each with `prompt` and `completion`.
        instruction (`str`, *optional*): What is to be done.
        tokenizer ([`LLM2SLMTokenizer`]): The model's.

    Returns:
        `list`: for each prompt a string or a list of messages.
    """
    if tokenizer.chat_template is None:
        parts = [instruction] if instruction else []
        parts += [f"{shot['prompt'].strip()}\n{shot['completion'].strip()}" for shot in shots]
        return [SHOT_SEPARATOR.join([*parts, f"{prompt.strip()}\n"]) for prompt in prompts]

    def user(prompt):
        text = f"{instruction}\n\n{prompt.strip()}" if instruction else prompt.strip()
        return {"role": "user", "content": text}

    turns = []
    for shot in shots:
        turns += [user(shot["prompt"]), {"role": "assistant", "content": shot["completion"].strip()}]
    return [[*turns, user(prompt)] for prompt in prompts]


def check_positions(model, rows: list[dict], max_new_tokens: int) -> None:
    """
    Checks that each prompt, with the reference and with `max_new_tokens`, fits the positions of what writes.

    Raises:
        ValueError: if one does not.
    """
    config = model.config.slm_config if model.config.model_type == "llm2slm" else model.config
    positions = max_positions(config.get_text_config())
    lengths = [(len(row["input_ids"]), max(len(row["labels"]), max_new_tokens)) for row in rows]
    longest = max(max(pair) if config.is_encoder_decoder else sum(pair) for pair in lengths)
    if positions is not None and longest > positions:
        raise ValueError(
            f"The longest prompt and its response need {longest} positions, but the model has {positions}: lower "
            "--prompt-max-length, which cuts prompts, or --max-new-tokens."
        )


# -------------------------------------------------------------------------------------------------- loss and responses
@torch.no_grad()
def response_loss(model, batch: dict[str, torch.Tensor]) -> float:
    r"""
    The sum of the negative log-likelihoods (nats) of a batch's response tokens.

    Args:
        model: Any of this module's.
        batch (`dict[str, torch.Tensor]`):
            `input_ids`, `attention_mask` and `labels`, and for LLM-to-SLM maybe `prompt_hidden_states`. Prompts of a
            decoder-only model are padded on the left.
    """
    logits = model(**batch).logits if model.config.is_encoder_decoder else _decoder_only_logits(model, batch)
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch["labels"].to(logits.device).flatten(), ignore_index=-100, reduction="sum"
    )
    return loss.item()


def _decoder_only_logits(model, batch):
    """Of shape `(batch_size, response_length, vocab_size)`: the prompt's last position predicts the first label."""
    labels = batch["labels"]
    fed = labels[:, :-1]
    ids = torch.cat([batch["input_ids"], fed.clamp(min=0)], dim=1)  # (batch_size, prompt + response - 1)
    mask = torch.cat([batch["attention_mask"], (fed != -100).long()], dim=1)
    arguments = inspect.signature(model.forward).parameters
    optional: dict[str, Any] = {}
    if "position_ids" in arguments:
        optional["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in arguments:  # no head for the prompt's positions
        optional["logits_to_keep"] = labels.shape[1]
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **optional).logits[:, -labels.shape[1] :]


def set_generation(model, tokenizer, max_new_tokens: int, num_beams: int) -> None:
    """Makes the model's generation configuration greedy or, with `num_beams`, beam search; its tokens remain."""
    config = model.generation_config
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.update(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        max_length=None,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted({tokenizer.eos_token_id, *eos} - {None}),
        pad_token_id=tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id,
    )


@torch.no_grad()
def write_responses(model, tokenizer, batch: dict[str, torch.Tensor], stop: str | None) -> tuple[list[str], list[int]]:
    r"""
    Writes a response to each prompt of a batch.

    Args:
        model: Any of this module's.
        tokenizer ([`LLM2SLMTokenizer`]): The model's.
        batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`.
        stop (`str`, *optional*): Ends a response besides the end-of-sequence token, and is no part of it.

    Returns:
        `tuple[list[str], list[int]]`: the responses, and how many tokens each has, its end included.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    stopping = {}
    if stop is not None:
        criteria = StopStringCriteria(tokenizer.slm_tokenizer, [stop])
        stopping["stopping_criteria"] = StoppingCriteriaList([criteria])
    ids = model.generate(**inputs, **stopping)
    is_llm2slm = model.config.model_type == "llm2slm"
    writer = model.config.slm_config if is_llm2slm else model.config
    if writer.is_encoder_decoder:
        ids = ids[:, 1:]  # the start token
    elif not is_llm2slm:
        ids = ids[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text if stop is None else text.partition(stop)[0] for text in texts], _count_tokens(ids, model)


def _count_tokens(ids, model):
    """Each row's tokens before the padding, the end-of-sequence token included; it may be the padding too."""
    config = model.generation_config
    ended = torch.isin(ids, torch.tensor(config.eos_token_id, device=ids.device))
    with_end = ended.int().argmax(dim=1) + 1
    without_end = ids.shape[1] - (ids.flip(1) != config.pad_token_id).int().argmax(dim=1)
    return torch.where(ended.any(dim=1), with_end, without_end).tolist()
