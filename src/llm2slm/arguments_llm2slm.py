"""What a call of `generate` asks for: read, refused where it cannot be had, and put in the SLM's terms.

Choices made here:
- `slm.generate` gets the prompt as embeddings. It has no ids of the prompt's tokens, and a decoder-only SLM's response
  begins at its position 0, with no start token. Each option that reads ids or counts positions is looked at below.
- An option that cannot be honoured is refused before the LLM runs, in words that say what to use in its place. None is
  dropped silently. docs/generation.md lists all of them, each with the test that shows it.

One of the files copied into every checkpoint: it imports nothing but torch and transformers, and works on
Transformers 4.x and 5.x.
"""

import copy
import inspect
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
)

from .inputs_llm2slm import CACHE, CACHE_NAMES, check_tensor

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

_NO_PROMPT_IDS = "it needs the prompt as ids of the SLM, which reads embeddings of the LLM's tokens"
_ENCODER_PENALTY = (
    f"{_NO_PROMPT_IDS}; with a shared tokenizer pass `{{}}`, which takes the prompt's ids, as a `logits_processor`"
)
_GUIDANCE = f"{_NO_PROMPT_IDS}, and there is no second prompt to compare with"
_NO_DRAFTER = (
    "a drafter cannot read this model's prompts; `fast=True` makes the SLM's own steps faster, and "
    "`generate_lossless` drafts for the LLM"
)
_PROMPT_PHASE = "the LLM reads the whole prompt at once, and the SLM all of its projection"
_POSITIONS = "positions follow from `attention_mask`"
_ON_THE_HUB = (
    "Transformers keeps it on the Hub: pass `custom_generate='transformers-community/{}'` and `trust_remote_code=True`"
)
# Arguments that this model has no use for: the values that switch them off, and why the others are refused.
_REFUSED: dict[str, tuple[tuple, str]] = {
    "encoder_repetition_penalty": ((1,), _ENCODER_PENALTY.format("EncoderRepetitionPenaltyLogitsProcessor")),
    "encoder_no_repeat_ngram_size": ((0,), _ENCODER_PENALTY.format("EncoderNoRepeatNGramLogitsProcessor")),
    "guidance_scale": ((1,), _GUIDANCE),
    "negative_prompt_ids": ((), _GUIDANCE),
    "negative_prompt_attention_mask": ((), _GUIDANCE),
    "token_healing": ((False,), "it rewrites the prompt's last token, and the SLM has none"),
    "prefill_chunk_size": ((), _PROMPT_PHASE),
    "continuous_batching_config": ((), f"continuous batching takes lists of ids, and {_NO_PROMPT_IDS}"),
    "assistant_model": ((), _NO_DRAFTER),
    "assistant_tokenizer": ((), _NO_DRAFTER),
    "assistant_early_exit": ((), _NO_DRAFTER),
    "assistant_ensemble_weight": ((), _NO_DRAFTER),
    "use_mtp": ((False,), _NO_DRAFTER),
    "speculation_type": ((), _NO_DRAFTER),
    "is_assistant": ((False,), "this model drafts in `generate_lossless`, and with an `llm`"),
    "encoder_outputs": ((), "pass an encoded prompt as `prompt_embeds`, from `encode_prompt`"),
    "decoder_inputs_embeds": ((), "pass the beginning of the response as `decoder_input_ids`"),
    "position_ids": ((), _POSITIONS),
    "decoder_position_ids": ((), _POSITIONS),
    "cache_position": ((), _POSITIONS),
}
# Decoding modes that have left Transformers; 4.57 stops at them with an AttributeError.
_MOVED: dict[str, tuple[tuple, str]] = {
    "penalty_alpha": ((0,), _ON_THE_HUB.format("contrastive-search")),
    "dola_layers": ((), _ON_THE_HUB.format("dola")),
    "num_beam_groups": ((1,), _ON_THE_HUB.format("group-beam-search")),
    "diversity_penalty": ((0,), _ON_THE_HUB.format("group-beam-search")),
    "constraints": ((), _ON_THE_HUB.format("constrained-beam-search")),
    "force_words_ids": ((), _ON_THE_HUB.format("constrained-beam-search")),
}


def only_special_tokens(config: GenerationConfig) -> GenerationConfig:
    """Of a generation config its special tokens, and nothing of how to generate."""
    return GenerationConfig(**{name: getattr(config, name) for name in SPECIAL_TOKENS})


def stop_at_strings(strings: str | list[str], tokenizer, criteria=None) -> StoppingCriteriaList:
    """`criteria`, and one that ends a response behind any of `strings`, as `tokenizer` writes them."""
    return StoppingCriteriaList([*(criteria or []), StopStringCriteria(tokenizer, strings)])


# ------------------------------------------------------------------------------------------------- reading, refusing
def read_arguments(
    own: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    r"""
    Makes one generation config of the call's arguments, the given config and the model's own, in this order.

    Args:
        own (`GenerationConfig`):
            The model's.
        given (`GenerationConfig`, *optional*):
            The call's. What it leaves at the default is the model's own.
        kwargs (`dict[str, Any]`):
            The call's further arguments.

    Returns:
        `tuple[GenerationConfig, dict[str, Any]]`: a new config, and the arguments that are no part of it.
    """
    kwargs = dict(kwargs)
    use_model_defaults = True
    if "use_model_defaults" in inspect.signature(GenerationMixin.generate).parameters:  # Transformers 4
        use_model_defaults = kwargs.pop("use_model_defaults", None) is not False
    config, changes = copy.deepcopy(own), dict[str, Any]()
    if given is not None:
        config = config if use_model_defaults else only_special_tokens(own)
        defaults = vars(GenerationConfig())
        for name, value in vars(given).items():
            if not name.startswith("_") and name != "transformers_version" and value != defaults.get(name):
                changes[name] = copy.deepcopy(value)
        for name, value in changes.items():
            setattr(config, name, value)
    others = config.update(**kwargs)
    # Of two lengths the call's is meant, or else the given config's; a call that gives both is warned by Transformers.
    asked = next((said for said in (kwargs, changes) if said.get("max_length") or said.get("max_new_tokens")), {})
    if asked.get("max_length") and not asked.get("max_new_tokens"):
        config.max_new_tokens = None
    elif config.max_new_tokens is not None and not asked.get("max_length"):
        config.max_length = None
    # `slm.generate` fills what the config leaves open, unless it is told of it.
    others |= {name: None for name in SPECIAL_TOKENS if name in kwargs and kwargs[name] is None}
    return config, others


def take_beginning(
    kwargs: dict[str, Any], start_token: int | list[int] | None, vocab_size: int
) -> torch.Tensor | None:
    r"""
    Takes the beginning of the response, and what a trainer passes along with a batch, out of a call's arguments.

    Args:
        kwargs (`dict[str, Any]`):
            The call's arguments. With `labels` they are a trainer's batch, and `decoder_input_ids` of their shape were
            made from them; `Seq2SeqTrainer` tells the two apart in the same way.
        start_token (`int` or `list[int]`, *optional*):
            What an encoder-decoder SLM's responses begin with, or one for each row.
        vocab_size (`int`):
            The SLM's.

    Returns:
        `torch.LongTensor` of shape `(batch_size, length)`, or `None` if none is given.

    Raises:
        ValueError: if it is no batch of ids of the SLM's tokenizer, if rows are of different lengths, or if one begins
            with the start token and another does not.
    """
    labels, ids = kwargs.pop("labels", None), kwargs.pop("decoder_input_ids", None)
    mask = kwargs.pop("decoder_attention_mask", None)
    if labels is not None:
        kwargs.pop("shift_labels", None)
        if ids is None or ids.shape == labels.shape:
            return None
    if ids is None:
        if mask is not None:
            raise ValueError("`decoder_attention_mask` is the mask of `decoder_input_ids`: pass both or neither.")
        return None
    check_tensor("decoder_input_ids", ids)
    if ids.ndim != 2 or ids.shape[1] == 0 or ids.is_floating_point():
        raise ValueError(
            "`decoder_input_ids` must be integers of shape (batch_size, length), the beginning of each response, got "
            f"{ids.dtype} of shape {tuple(ids.shape)}."
        )
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`decoder_input_ids` must be ids of the SLM's tokenizer, from 0 to {vocab_size - 1}; found "
            f"{lowest if lowest < 0 else highest}."
        )
    if mask is not None and (mask.shape != ids.shape or not mask.all()):
        raise ValueError(
            "`decoder_attention_mask` must be ones of the shape of `decoder_input_ids`: not every SLM's positions "
            "leave out padding in a response. Continue beginnings of one length together, others in calls of their "
            "own."
        )
    starts = None if start_token is None else _begins_with(ids, start_token)
    if starts is not None and starts.any() and not starts.all():
        raise ValueError(
            f"All rows of `decoder_input_ids` must begin with the start token, {start_token}, or none, but row "
            f"{int(starts.long().argmax())} does and row {int(starts.long().argmin())} does not."
        )
    return ids


def without_start(ids: torch.Tensor, start_token: int) -> torch.Tensor:
    """
    A beginning as a decoder-only SLM reads it, of shape `(batch_size, length)`, or one shorter: a token that all rows
    begin with, and that fills the place of a start token in `decoder_input_ids` made from labels, is left out.
    """
    return ids[:, 1:] if _begins_with(ids, start_token).all() else ids


def _begins_with(ids, start_token):
    return ids[:, 0] == torch.as_tensor(start_token, device=ids.device)


def refuse_what_cannot_be_had(
    config: GenerationConfig, kwargs: dict[str, Any], slm: PreTrainedModel, start_token: int | None
) -> None:
    r"""
    Refuses what this model cannot honour, and what no model knows; takes arguments that are `None` out of `kwargs`.

    Args:
        config (`GenerationConfig`), kwargs (`dict[str, Any]`):
            What is asked for, from [`read_arguments`].
        slm (`PreTrainedModel`):
            The model that writes.
        start_token (`int`, *optional*):
            The start token of the model's configuration, which fills a place and is not read by a decoder-only SLM.

    Raises:
        ValueError: with the name of the argument, why it is refused, and what to use in its place.
    """
    custom_generate = kwargs.get("custom_generate")
    asked = vars(config) | kwargs
    for name, (off, reason) in (_REFUSED if custom_generate is not None else _REFUSED | _MOVED).items():
        value = asked.get(name)
        if value is not None and not any(value == switched_off for switched_off in off):
            raise ValueError(f"`generate` of an LLM-to-SLM model takes no `{name}`: {reason}.")
        if name in kwargs and value is None:
            del kwargs[name]
    if not slm.config.is_encoder_decoder:
        if config.prompt_lookup_num_tokens is not None:
            raise ValueError(f"A decoder-only SLM takes no `prompt_lookup_num_tokens`: {_NO_PROMPT_IDS}.")
        if config.decoder_start_token_id not in (None, start_token):
            raise ValueError(
                "A decoder-only SLM takes no `decoder_start_token_id`: its response begins right behind the prompt. "
                "To begin it with a token, pass `decoder_input_ids` or `forced_bos_token_id`."
            )
    if config.cache_implementation == "paged":
        raise ValueError(f"`cache_implementation='paged'` is for continuous batching, but {_NO_PROMPT_IDS}.")
    given = [kwargs.pop(name, None) for name in CACHE_NAMES]
    cache = next((cache for cache in given if cache is not None), None)
    if cache is not None:
        kwargs[CACHE] = cache
    if cache is not None and (not isinstance(cache, Cache) or cache.get_seq_length() > 0):
        raise ValueError(
            f"`{CACHE}` must be an empty `Cache`: one that is filled belongs to a prompt read before. To go on "
            "with a response pass it as `decoder_input_ids`; to reuse an encoded prompt pass `prompt_embeds`."
        )
    if custom_generate is None:  # it may have arguments of its own; the SLM checks them
        handled = {"trust_remote_code", *SPECIAL_TOKENS, *inspect.signature(GenerationMixin.generate).parameters}
        slm._validate_model_kwargs({name: value for name, value in kwargs.items() if name not in handled})


# --------------------------------------------------------------------------------------- in a decoder-only SLM's terms
def count_from_the_response(
    config: GenerationConfig, kwargs: dict[str, Any], num_begun: int, max_length: int | None, device: torch.device
) -> None:
    r"""
    Rewrites in place what a decoder-only `generate` with `inputs_embeds` would count from the prompt, or from a start
    token: lengths, the forced first token, the repetition penalty.

    Args:
        config (`GenerationConfig`), kwargs (`dict[str, Any]`):
            What is asked for.
        num_begun (`int`):
            Tokens of the response that are given.
        max_length (`int`, *optional*):
            `max_length` of the call itself. A default of a config means new tokens, as in Transformers.
        device (`torch.device`):
            Where scores are.

    Raises:
        ValueError: if `max_length` leaves no room behind what is given.
    """
    if config.max_new_tokens is None and config.max_length is not None:
        by_default = max_length is None and config.max_length == GenerationConfig().max_length
        config.max_new_tokens = config.max_length - (0 if by_default else num_begun)
        if config.max_new_tokens <= 0:
            raise ValueError(
                f"`max_length={config.max_length}` leaves no room: `decoder_input_ids` have {num_begun} tokens, which "
                "count. Raise it, or set `max_new_tokens`."
            )
        config.max_length = None
    if config.min_new_tokens is None and config.min_length:
        config.min_new_tokens, config.min_length = max(config.min_length - num_begun, 0), None

    processors: list[LogitsProcessor] = []
    if config.repetition_penalty not in (None, 1.0):
        # Transformers 5 would spare as many tokens of the response as there is padding before the prompt.
        if config.sequence_bias is not None:  # it comes before the penalty
            processors.append(SequenceBiasLogitsProcessor(config.sequence_bias))
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        config.sequence_bias = config.repetition_penalty = None
    if config.forced_bos_token_id is not None:
        if num_begun == 0:
            processors.append(_FirstToken(config.forced_bos_token_id))
            if config.begin_suppress_tokens is not None:  # they mean the token behind the forced one
                processors.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, 1, str(device)))
                config.begin_suppress_tokens = None
        config.forced_bos_token_id = None
    if processors:
        kwargs["logits_processor"] = LogitsProcessorList([*processors, *(kwargs.get("logits_processor") or [])])


class _FirstToken(LogitsProcessor):
    """Forces the first token of a response that has no start token."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 0:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0
        return forced
