"""What a model is given: checks that say what was required and what was found, masks, and the order of positions.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_outputs import Seq2SeqLMOutput

from .loading_llm2slm import max_positions

PROMPT_AND_RESPONSE = "prompt and the response have"
# What models call the cache that they are given and return; its old name goes with Transformers 6.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"


def check_tensor(name: str, value) -> None:
    """Raises a `TypeError` that says what to do, unless `value` is a tensor or `None`."""
    if value is None or isinstance(value, torch.Tensor):
        return
    advice = "convert it with `torch.tensor`"
    if isinstance(value, Mapping):  # what a tokenizer or `encode_prompt` returns
        advice = "pass what it holds by name, as in `generate(**batch)`"
    elif isinstance(value, str) or (isinstance(value, (list, tuple)) and value and isinstance(value[0], str)):
        advice = 'tokenize the text, as in `generate(**tokenizer(text, return_tensors="pt"))`'
    raise TypeError(f"`{name}` must be a `torch.Tensor`, got {type(value).__name__}: {advice}.")


def as_ids(name: str, ids: Any) -> Any:
    """Token ids of any integer type as int64; raises a `TypeError` for anything else."""
    check_tensor(name, ids)
    if ids is None:
        return None
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"`{name}` must be token ids, integers, got {ids.dtype}.")
    return ids.long()


def check_prompt_kwargs(kwargs: dict) -> None:
    """Takes `token_type_ids` of one segment out of `kwargs`; raises a `ValueError` for others and `inputs_embeds`."""
    # A tokenizer's ids of segments say nothing where there is one, and a prompt is one; the SLM must not get them.
    token_type_ids = kwargs.pop("token_type_ids", None)
    check_tensor("token_type_ids", token_type_ids)
    if token_type_ids is not None and token_type_ids.any():
        raise ValueError("A prompt is one segment: `token_type_ids` must all be 0. Leave them out.")
    if kwargs.pop("inputs_embeds", None) is not None:
        raise ValueError(
            "The LLM reads `input_ids`, not `inputs_embeds`. A prompt that is already encoded, for the SLM, is "
            "`prompt_embeds` (from `encode_prompt`)."
        )


def check_attention_mask(attention_mask: torch.Tensor | None, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """
    The mask of the prompt `tensor`, whose first dimensions are `(batch_size, prompt_length)`, as int64: ones if it is
    `None`. Raises a `ValueError` for another shape, other values than 0 and 1, and a row without a token.
    """
    check_tensor("attention_mask", attention_mask)
    if attention_mask is None:
        return torch.ones(tensor.shape[:2], dtype=torch.long, device=tensor.device)
    if attention_mask.shape != tensor.shape[:2]:
        raise ValueError(
            f"`attention_mask` must have shape {tuple(tensor.shape[:2])} like `{name}`, got "
            f"{tuple(attention_mask.shape)}."
        )
    tokens = attention_mask != 0
    if (strange := tokens != attention_mask).any():
        raise ValueError(
            f"`attention_mask` must be 1 for tokens and 0 for padding; found {attention_mask[strange][0].item():g}."
        )
    empty = tokens.sum(dim=1) == 0
    if empty.any():
        raise ValueError(f"Row {int(empty.long().argmax())} of `attention_mask` has no token: its prompt is empty.")
    return attention_mask.long()


def response_mask(labels: torch.Tensor) -> torch.Tensor:
    """The `decoder_attention_mask` of `labels`: position i is fed label i - 1, the first the start token."""
    return torch.cat([torch.ones_like(labels[:, :1]), (labels[:, :-1] != -100).long()], dim=1)


def longest_row(mask: torch.Tensor) -> int:
    """Tokens of the longest row."""
    return int(mask.sum(dim=1).max())


def fill_masked(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zero at masked positions. They may hold anything, NaN too: the SLM masks them, but 0 * NaN is NaN."""
    return states.masked_fill(mask[:, :, None].to(states.device) == 0, 0.0)


def padding_order(mask: torch.Tensor, side: str) -> torch.Tensor:
    """The order of positions that moves padding to `side` and keeps the tokens' own order."""
    return torch.argsort((mask != 0).long(), dim=1, stable=True, descending=side == "right")


def reordered(tensor: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The positions of `tensor`, `(batch_size, length)` or `(batch_size, length, width)`, in this order."""
    if order is None:
        return tensor
    return tensor.gather(1, order if tensor.ndim == 2 else order[:, :, None].expand(-1, -1, tensor.shape[-1]))


def with_prompt_positions(output, mask, order, is_encoder_decoder) -> Seq2SeqLMOutput:
    """
    The outputs that have the prompt's positions in `order`, with these where `mask` has the prompt's tokens, and with
    0 where it has padding.
    """

    def restored(tensor, dim):
        in_order, rest = tensor.split([order.shape[1], tensor.shape[dim] - order.shape[1]], dim=dim)
        shape = [len(order), *(order.shape[1] if i == dim else 1 for i in range(1, tensor.ndim))]
        index, is_token = (t.to(tensor.device).view(shape) for t in (order, mask.gather(1, order) != 0))
        zeros = tensor.new_zeros(*tensor.shape[:dim], mask.shape[1], *tensor.shape[dim + 1 :])
        placed = zeros.scatter(dim, index.expand_as(in_order), in_order.masked_fill(~is_token, 0.0))
        return torch.cat([placed, rest], dim=dim)

    # Which dimensions of each are the prompt's: attentions are (batch_size, num_heads, queries, keys).
    dims = {"encoder_last_hidden_state": (1,), "encoder_hidden_states": (1,), "encoder_attentions": (2, 3)}
    dims["cross_attentions" if is_encoder_decoder else "decoder_attentions"] = (3,)
    for name, prompt_dims in dims.items():
        for dim in prompt_dims:
            if isinstance(output.get(name), tuple):
                output[name] = tuple(states if states is None else restored(states, dim) for states in output[name])
            elif output.get(name) is not None:
                output[name] = restored(output[name], dim)
    return output


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """`position_ids` that count the tokens of each row from 0, whichever side is padded."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def check_prompt_ids(config, input_ids, attention_mask) -> tuple[Any, Any]:
    """
    The prompt's ids, with 0 for padding, and its mask. Raises a `ValueError` for no ids, a wrong shape, ids that the
    LLM does not have, and more tokens than one of the two models has positions.
    """
    input_ids = as_ids("input_ids", input_ids)
    if input_ids is None:
        raise ValueError("Pass the prompt: `input_ids`, `prompt_hidden_states` or `prompt_embeds`.")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"`input_ids` must have shape (batch_size, prompt_length) with at least one token, got "
            f"{tuple(input_ids.shape)}."
        )
    attention_mask = check_attention_mask(attention_mask, "input_ids", input_ids)
    # What pads the prompts may be unknown to the LLM (a pipeline pads with the SLM's token).
    input_ids = input_ids.masked_fill(attention_mask.to(input_ids.device) == 0, 0)
    llm_config = config.llm_text_config
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= llm_config.vocab_size:
        raise ValueError(
            f"`input_ids` must be ids of the LLM's tokenizer, from 0 to {llm_config.vocab_size - 1}; found "
            f"{lowest if lowest < 0 else highest}."
        )
    check_positions("LLM", llm_config, longest_row(attention_mask))
    check_positions("SLM", config.slm_config.get_text_config(), longest_row(attention_mask))
    return input_ids, attention_mask


def check_ids_of_states(config, input_ids, prompt_hidden_states, attention_mask, needed: bool) -> None:
    """Raises a `ValueError` if ids are of another shape than the states beside them, or are needed and missing."""
    if input_ids is None:
        if not needed:
            return
        raise ValueError(
            "`fusion='add'` with a shared tokenizer adds to the SLM's own embeddings of the prompt: pass "
            "`input_ids` with `prompt_hidden_states`."
        )
    if input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"`input_ids` {tuple(input_ids.shape)} and `prompt_hidden_states` "
            f"{tuple(prompt_hidden_states.shape)} must be of one batch size and prompt length."
        )
    if needed:
        check_prompt_ids(config, input_ids, attention_mask)


def check_prompt_states(config, name: str, states, width: int, attention_mask) -> tuple[Any, Any]:
    """
    States of shape `(batch_size, prompt_length, width)`, with 0 for padding, and their mask. Raises a `ValueError` for
    another shape, for NaN and infinite values, and for more tokens than the SLM has positions.
    """
    check_tensor(name, states)
    if not states.is_floating_point():
        raise TypeError(f"`{name}` must be floating point, got {states.dtype}.")
    if states.ndim != 3 or states.shape[-1] != width or states.numel() == 0:
        raise ValueError(f"`{name}` must have shape (batch_size, prompt_length, {width}), got {tuple(states.shape)}.")
    attention_mask = check_attention_mask(attention_mask, name, states)
    states = fill_masked(states, attention_mask)
    if not torch.isfinite(states).all():
        raise ValueError(f"`{name}` has NaN or infinite values at positions that are not masked.")
    check_positions("SLM", config.slm_config.get_text_config(), longest_row(attention_mask))
    return states, attention_mask


def check_positions(model_name: str, config, length: int, what: str = "prompt has") -> None:
    """Raises a `ValueError` if a model of this configuration cannot tell `length` tokens apart by position."""
    limit = max_positions(config)
    if limit is not None and length > limit:
        raise ValueError(
            f"The {what} {length} tokens, but the {model_name} ({config.model_type}) has {limit} positions. "
            f"Tokenize with `truncation=True, max_length=...`, or choose a model with more positions."
        )


def check_labels(config, labels: torch.Tensor) -> None:
    """Raises a `ValueError` if there is nothing to learn from, or an id that the SLM does not have."""
    highest, lowest = int(labels.max()), int(labels.masked_fill(labels == -100, 0).min())
    if highest == -100:
        raise ValueError("All `labels` are -100: there is no response to learn from.")
    if highest >= config.vocab_size or lowest < 0:
        raise ValueError(
            f"`labels` must be ids of the SLM's tokenizer, from 0 to {config.vocab_size - 1}, or -100; found "
            f"{lowest if lowest < 0 else highest}."
        )


def given_once(inputs: torch.LongTensor | None, input_ids: torch.LongTensor | None) -> torch.LongTensor | None:
    """The prompt's ids, which `generate` takes by two names."""
    if inputs is not None and input_ids is not None:
        raise ValueError("`inputs` and `input_ids` are one argument, the prompt's ids: pass it once.")
    return inputs if input_ids is None else input_ids


def num_prompts(*prompts) -> int | None:
    """The batch size of the first prompt that is given."""
    return next((len(prompt) for prompt in prompts if prompt is not None), None)


def check_response(name: str, ids: torch.Tensor | None, num_prompts: int | None) -> None:
    """Raises a `ValueError` unless `ids` are of shape `(num_prompts, response_length)`."""
    if ids is None:
        raise ValueError(
            "Pass the response: `labels` or `decoder_input_ids`. To write one, call `generate`. A trainer that keeps "
            "`labels` for a loss of its own (`label_smoothing_factor`, `compute_loss_func`) needs "
            "`data_collator=DataCollatorForLLM2SLM(tokenizer, model=model)`."
        )
    if ids.ndim != 2 or ids.shape[1] == 0 or (num_prompts is not None and len(ids) != num_prompts):
        batch_size = "batch_size" if num_prompts is None else num_prompts
        raise ValueError(
            f"`{name}` must have shape ({batch_size}, response_length), one row for each prompt, got "
            f"{tuple(ids.shape)}."
        )
