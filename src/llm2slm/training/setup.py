"""What a training starts from: its pairs, its models and tokenizers, and the examples made of the pairs.

The arms learn from the same pairs:
- `llm2slm`: projector and SLM, behind the frozen LLM or its cached states.
- `slm`: the SLM alone. `llm`: the LLM alone, with LoRA. A decoder-only one reads prompt and response as one sequence
  and learns the response; an encoder-decoder reads the one and writes the other.
"""

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..building.initialization import fit_head, standardize_states, start_at_zero, start_from_states
from ..building.slm import make_slm, slice_lm
from ..building.tokenizers import limit_tokenizer, token_map, train_tokenizer, trim_tokenizer
from ..configuration_llm2slm import LLM2SLMConfig
from ..data.collator import DataCollatorForLLM2SLM, tokenize_pairs
from ..data.pairs import format_of_text, has_parts, load_pairs, part_sizes, spaced, without_empty
from ..data.prompt_features import cache_prompt_features
from ..language_models import check_positions, gguf_argument, read_states_in_one_piece
from ..loading_llm2slm import load_slm, load_tokenizer, max_positions, split_gguf
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..tokenization_llm2slm import LLM2SLMTokenizer
from .options import TrainOptions
from .sources import add_sources
from .teacher import Teacher, load_taught_pairs
from .trainer import LENGTH

FRESH_VOCAB_SIZE = 8192
MAX_TEXTS = 1024  # read for a start from the LLM's states
PAD_TO_MULTIPLE_OF = 8  # fewer different sizes: freed memory fits the next batch, and a GPU's matrix units are used


# --------------------------------------------------------------------------------------------------- pairs to examples
def load_splits(options: TrainOptions, teacher: Teacher | None = None) -> tuple[dict[str, Dataset], dict[str, int]]:
    """The pairs of `train` and, unless there is no evaluation, `validation`; and how many `more_data` adds."""
    train = load_taught_pairs(options, teacher, options.data, options.train_split, options.max_train_pairs)
    splits = {"train": train}
    if options.validation_split != "none":
        formats = options.prompt_format, options.completion_format
        splits["validation"] = load_pairs(
            options.data, options.validation_split, *formats, options.max_validation_pairs, options.skip_empty
        )
    more: dict[str, int] = {}
    if options.more_data:
        splits["train"], more = add_sources(options, teacher, splits["train"])
    return {name: without_empty(rows, name, options.skip_empty) for name, rows in splits.items()}, more


def find_parts(options: TrainOptions) -> dict[str, int] | None:
    """
    The sizes of the parts that a file is split into for this training, if it is. See [`part_sizes`].

    Raises:
        ValueError: if only one of both splits is such a part: the other may have rows of it.
    """
    splits = [split for split in (options.train_split, options.validation_split) if split != "none"]
    are_parts = {has_parts(options.data, split) for split in splits}
    if are_parts == {True, False}:
        raise ValueError(
            f"`train_split` {splits[0]!r} and `validation_split` {splits[1]!r} of one file may have rows in common: "
            "one is chosen by a hash of each prompt, the other is not. Choose both alike, or `validation_split: none`."
        )
    return part_sizes(options.data, options.prompt_format) if are_parts == {True} else None


def make_examples(options: TrainOptions, pairs: dict[str, Dataset], model, tokenizer) -> dict[str, Dataset]:
    r"""
    Tokenizes the pairs as the arm reads them, and checks that they fit the models.

    Returns:
        `dict[str, Dataset]`: for each split the pairs that are used, with `input_ids`, `labels` and
        `length`, the number of both.

    Raises:
        ValueError: if no pair of a split is within the limits, or one needs more positions than a model has.
    """
    two_sided = tokenizer
    if options.arm != "llm2slm":
        two_sided = LLM2SLMTokenizer.from_tokenizers(tokenizer, tokenizer)
    limits = {"prompt_max_length": options.prompt_max_length, "response_max_length": options.response_max_length}
    examples = {}
    for split, rows in pairs.items():
        # The pairs were put into `prompt_format` when they were read: only there are all columns of it.
        examples[split] = tokenize_pairs(
            rows, two_sided, **limits, truncate=options.truncate, apply_prompt_format=False
        )
        examples[split] = examples[split].map(_count, desc="Counting")
        check_positions(
            model.config,
            zip(map(len, examples[split]["input_ids"]), map(len, examples[split]["labels"]), strict=True),
            f"A {split} pair",
            "lower `prompt_max_length` or `response_max_length`",
        )
    if not model.config.is_encoder_decoder:
        examples = {split: rows.map(_join, desc="Joining") for split, rows in examples.items()}
    return examples


def _count(row: dict[str, Any]) -> dict[str, int]:
    return {LENGTH: len(row["input_ids"]) + len(row["labels"])}


def _join(row: dict[str, Any]) -> dict[str, list[int]]:
    prompt, response = row["input_ids"], row["labels"]
    return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}


def make_collator(options: TrainOptions, model, tokenizer):
    """What makes batches of the arm's examples; with the shifted labels, which a Trainer that smooths them needs."""
    if options.arm == "llm2slm":
        return DataCollatorForLLM2SLM(tokenizer, model=model, pad_to_multiple_of=PAD_TO_MULTIPLE_OF)
    tokenizer.padding_side = "right"  # positions are counted from the first token
    collate = DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=-100, pad_to_multiple_of=PAD_TO_MULTIPLE_OF)
    keeps_some = not model.config.is_encoder_decoder and "logits_to_keep" in signature(model.forward).parameters

    def collate_rows(rows):
        batch = collate([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        if keeps_some:  # no logits where all rows are prompt: they would be most of the memory
            first = (batch["labels"] != -100).any(dim=0).int().argmax().item()
            batch["labels"] = batch["labels"][:, max(first - 1, 0) :]  # the position before predicts the first label
            batch["logits_to_keep"] = batch["labels"].shape[1]
        return batch

    return collate_rows


def cache_features(options: TrainOptions, examples: dict[str, Dataset], model) -> dict[str, Dataset]:
    """The examples with the LLM's states of their prompts. The LLM is loaded only if some are missing."""
    llm_kwargs = {"dtype": options.llm_dtype}
    return {
        split: cache_prompt_features(rows, model, options.cache_dir, options.features_dtype, llm_kwargs)
        for split, rows in examples.items()
    }


# --------------------------------------------------------------------------------------------------- models: the start
def write_start(options: TrainOptions, pairs: dict[str, Dataset], device: torch.device, folder: Path) -> None:
    """
    Writes model and tokenizer as they are before the first step; caches the features while the LLM is loaded. An SLM
    alone that is to start from the LLM's states gets what it would have behind the LLM, and leaves the LLM then.
    """
    llm_tokenizer = None if not options.llm else load_tokenizer(options.llm)
    slm, slm_tokenizer, token_ids = build_slm(options, llm_tokenizer, pairs["train"])
    if options.arm == "slm" and options.start != "states":
        slm.save_pretrained(folder)
        slm_tokenizer.save_pretrained(folder)
        return
    if options.llm_tokenizer == "trimmed":
        llm_tokenizer = limit_tokenizer(llm_tokenizer, slm_tokenizer)
    prompt_format = format_of_text(options.prompt_format)
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer, prompt_format)
    model = compose(options, slm, token_ids, prompt_format)
    if options.start == "zero":
        start_at_zero(model)
    alone = options.arm == "slm"
    if options.cache_features:
        examples = make_examples(replace(options, arm="llm2slm"), pairs, model, tokenizer)
        model.llm.to(device)
        if not alone:
            examples = cache_features(options, examples, model)
            if options.projector_norm == "standardize":
                standardize_states(model, examples["train"])
        if options.start == "states":
            texts = cache_texts(options, examples["train"], model, token_ids)
            start_from_states(model, texts)
            if options.slm == "slice" and options.slice_of in ("", options.llm) and not slm.config.is_encoder_decoder:
                whole = load_slm(options.llm, dtype=options.llm_dtype).to(device)
                fit_head(model, whole, texts)
        model.llm.to("cpu")
    (model.slm if alone else model).save_pretrained(folder)
    (slm_tokenizer if alone else tokenizer).save_pretrained(folder)


def cache_texts(options: TrainOptions, examples: Dataset, model, token_ids: list[int] | None) -> Dataset:
    """
    Prompts with their responses behind them, as a decoder-only LLM reads them, with its states: what the SLM is to
    write is in them, and may be in another language than the prompts. Prompts alone for an encoder-decoder.
    """
    if token_ids is None or model.config.llm_text_config.is_encoder_decoder:
        return cache_features(options, {"train": examples}, model)["train"]
    rows = spaced(examples, MAX_TEXTS)
    longest = max_positions(model.config.llm_text_config)

    def join(row: dict[str, Any]) -> dict[str, list[int]]:
        return {"input_ids": (row["input_ids"] + [token_ids[i] for i in row["labels"]])[:longest]}

    texts = rows.select_columns(["input_ids", "labels"]).map(join, remove_columns="labels", desc="Joining")
    return cache_features(options, {"train": texts}, model)["train"]


def load_start(options: TrainOptions, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that `write_start` wrote, without the LLM if its features are cached; or the LLM."""
    if options.arm == "llm":
        return load_slm(options.llm, dtype=options.llm_dtype), load_tokenizer(options.llm)
    if options.arm == "slm":
        return load_slm(str(folder), dtype="float32"), AutoTokenizer.from_pretrained(folder)
    model = LLM2SLMForConditionalGeneration.from_pretrained(
        folder, dtype="float32", load_llm=not options.cache_features, llm_kwargs={"dtype": options.llm_dtype}
    )
    return model, LLM2SLMTokenizer.from_pretrained(folder)


def set_generation(model: LLM2SLMForConditionalGeneration, max_new_tokens: int, num_beams: int) -> None:
    """
    Makes beam search, greedy with one beam, the way in which the checkpoint writes unless told otherwise. The length
    is kept as `max_length`, which both `max_length` and `max_new_tokens` of a call override.
    """
    config, default = model.generation_config, GenerationConfig()
    start_tokens = 1 if model.config.slm_config.is_encoder_decoder else 0  # `max_length` counts it
    config.update(
        max_length=max_new_tokens + start_tokens,
        max_new_tokens=None,
        num_beams=num_beams,
        do_sample=False,
        **{name: getattr(default, name) for name in ("temperature", "top_p", "top_k")},
    )
    config._from_model_config = False


def compose(options: TrainOptions, slm: PreTrainedModel, token_ids: list[int] | None, prompt_format: str | None):
    """LLM, projector and SLM; `token_ids` are the LLM's ids of the SLM's tokens if the two share a tokenizer."""
    token_mapping: dict[str, Any] = {}
    if token_ids is not None:
        name, gguf_file = split_gguf(options.llm, None)
        config = LLM2SLMConfig.from_sub_configs(
            AutoConfig.from_pretrained(name, **gguf_argument(gguf_file)), slm.config, shared_tokenizer=True
        )
        token_mapping["shared_tokenizer"] = True
        if config.maps_prompt_tokens:
            token_mapping["prompt_token_map"] = token_map(config.llm_text_config.vocab_size, token_ids)
    return LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        options.llm,
        slm,
        fusion=options.fusion,
        llm_kwargs={"dtype": options.llm_dtype},
        llm_layer=options.llm_layer if len(options.llm_layer) > 1 else options.llm_layer[0],
        projector_type=options.projector_type,
        projector_hidden_size=options.projector_hidden_size,
        projector_norm=None if options.projector_norm == "none" else options.projector_norm,
        prompt_format=prompt_format,
        **token_mapping,
    )


def build_slm(options: TrainOptions, llm_tokenizer, pairs: Dataset) -> tuple[Any, Any, list[int] | None]:
    """The SLM, its tokenizer, and the LLM's ids of its tokens if that is the LLM's tokenizer, maybe trimmed."""
    source = options.slm
    if source == "slice":
        source = options.slice_of or options.llm
    is_trimmed = options.slm_tokenizer == "trimmed"
    if is_trimmed or (source == "fresh" and options.slm_tokenizer == "own"):
        # Its tokens are those it writes and, where it or the LLM reads in its tokens, those of the prompts.
        adds_own = options.fusion == "add" and is_trimmed
        reads = options.arm == "slm" or adds_own or options.llm_tokenizer == "trimmed"
        texts = texts_of(pairs, llm_tokenizer, reads)
        if is_trimmed:
            tokenizer, token_ids = trim_tokenizer(llm_tokenizer, texts, options.vocab_size)
        else:
            tokenizer, token_ids = train_tokenizer(texts, options.vocab_size or FRESH_VOCAB_SIZE), None
            tokenizer.chat_template = llm_tokenizer and llm_tokenizer.chat_template  # both read the same text
    else:
        tokenizer = llm_tokenizer if source in ("fresh", options.llm) else load_tokenizer(source)
        shared = llm_tokenizer is not None and tokenizer.get_vocab() == llm_tokenizer.get_vocab()
        token_ids = list(range(len(tokenizer))) if shared else None

    if source == "fresh":
        positions = max(2048, options.prompt_max_length + options.response_max_length)
        slm = make_slm(tokenizer, options.hidden_size, options.num_hidden_layers, max_position_embeddings=positions)
    else:
        slm = load_slm(source, dtype="float32")
        if options.slm == "slice":
            slm = slice_lm(slm, options.slm_layers or [], token_ids if is_trimmed else None)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                # The labels end in the tokenizer's end token, whatever the source said (Transformers 4 misreads GGUF).
                setattr(slm.config, name, getattr(tokenizer, name))
                setattr(slm.generation_config, name, getattr(tokenizer, name))
    return slm, tokenizer, token_ids


def texts_of(pairs: Dataset, tokenizer, prompts: bool) -> list[str]:
    """All completions and, if asked for, all prompts, in the chat template of `tokenizer` if there is one."""

    def prompt_text(prompt) -> str:
        if isinstance(prompt, str) or tokenizer is None:
            return contents(prompt)
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)

    def contents(text) -> str:
        return text if isinstance(text, str) else "\n".join(message["content"] for message in text)

    read = map(prompt_text, pairs["prompt"]) if prompts else []
    return [*read, *map(contents, pairs["completion"])]


# ---------------------------------------------------------------------------------------------------------------- LoRA
def with_lora(options: TrainOptions, model: PreTrainedModel):
    """The model with LoRA on what the arm trains, every linear layer but the head; the projector is trained whole."""
    from peft import LoraConfig, get_peft_model

    arguments: dict[str, Any] = {
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": "all-linear",
    }
    if options.arm == "llm2slm":
        arguments |= {"exclude_modules": r"(llm|projector)\..*", "modules_to_save": ["projector"]}
    else:
        arguments["task_type"] = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    read_states_in_one_piece(model)
    return get_peft_model(model, LoraConfig(**arguments))
