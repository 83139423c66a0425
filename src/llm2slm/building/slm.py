"""An SLM's model: fresh, or made of chosen layers of a pretrained one.

A choice made here:
- *A slice is a new model of a smaller configuration*, filled with the chosen layers' weights: layer numbers, attention
  windows and tied weights are right by construction, whatever the architecture.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .tokenizers import check_token_ids


def make_slm(
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 2048,
    **config,
) -> LlamaForCausalLM:
    r"""
    A small Llama with random weights, embeddings tied to the head, and the tokenizer's vocabulary and special tokens.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The SLM's; its `eos_token` is needed.
        hidden_size (`int`): Width.
        num_hidden_layers (`int`): Depth.
        num_attention_heads (`int`, *optional*, defaults to `hidden_size // 64`): Heads, at least one.
        intermediate_size (`int`, *optional*, defaults to `4 * hidden_size`): Width inside the feed-forward layers.
        max_position_embeddings (`int`, *optional*, defaults to 2048): The longest prompt and response together.
        config: Further fields of `LlamaConfig`.

    Raises:
        ValueError: if the heads do not divide the width, or the tokenizer has no `eos_token`.
    """
    num_attention_heads = num_attention_heads or max(hidden_size // 64, 1)
    if hidden_size % (2 * num_attention_heads):
        raise ValueError(
            f"`hidden_size` must be a multiple of twice `num_attention_heads`, got {hidden_size} for "
            f"{num_attention_heads} heads."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no `eos_token`: a response could not end.")
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**fields | config)).eval()


def slice_lm(lm: PreTrainedModel, layers: Sequence[int], token_ids: Sequence[int] | None = None) -> PreTrainedModel:
    r"""
    A smaller language model made of chosen layers of a pretrained one, which is left as it is.

    Args:
        lm (`PreTrainedModel`): With its head; decoder-only, or encoder-decoder, of which both stacks are sliced.
        layers (`Sequence[int]`): The layers that are copied, from 0, in their new order.
        token_ids (`Sequence[int]`, *optional*):
            The tokens whose embeddings are copied, in their new order, from [`trim_tokenizer`]. All if omitted.

    Returns:
        A model of the same class, dtype and device. Special ids in its configurations are the new ones, `None` for
        tokens it lacks.

    Raises:
        ValueError: for a layer or token that `lm` does not have, all tokens in another order, weights that are not
            dense, a model that reads more than text, has no list of its layers or layers that are not alike, and if an
            encoder-decoder would lack the decoder's start token.
    """
    if not lm.can_generate():
        raise ValueError(f"`lm` must be a model that generates (with a language model head), got {type(lm).__name__}.")
    if packed := next((name for name, p in lm.named_parameters() if not p.is_floating_point()), None):
        raise ValueError(f"`lm` must have dense weights to be sliced, but its parameter {packed!r} is quantized.")
    if not lm.config.is_encoder_decoder and lm.config.get_text_config() is not lm.config:
        raise ValueError(f"`lm` must be a model of text alone to be sliced, got {type(lm).__name__}.")
    config, generation_config = copy.deepcopy(lm.config), copy.deepcopy(lm.generation_config)
    stacks = _find_stacks(lm, config)
    depth = min(getattr(part, fields[0]) for part, fields, _ in stacks)
    if not layers or any(not isinstance(layer, int) or not 0 <= layer < depth for layer in layers):
        raise ValueError(
            f"`layers` must name at least one layer, each from 0 to {depth - 1} in this {type(lm).__name__}, got "
            f"{list(layers)}."
        )
    for part, fields, _ in stacks:
        _slice_config(part, fields, layers)
    if token_ids is not None:
        token_ids, vocab_size = check_token_ids(token_ids, lm.config.vocab_size), lm.config.vocab_size
        if len(token_ids) == vocab_size and token_ids != sorted(token_ids):
            raise ValueError(f"`token_ids` name all {vocab_size} tokens: leave some out, or do not reorder them.")
        start = lm.generation_config.decoder_start_token_id
        if start is not None and start not in token_ids:
            raise ValueError(f"`token_ids` lack {start}, the decoder's start token.")
        _trim_config(config, generation_config, vocab_size, token_ids)
    sliced = type(lm)(config)
    weights = _sliced_weights(lm, sliced, [name for *_, name in stacks], layers, token_ids)
    sliced.load_state_dict(weights, assign=True)  # in the dtype they have
    sliced.tie_weights()
    sliced.generation_config = generation_config
    return sliced.to(lm.device).train(lm.training)


def _find_stacks(lm: PreTrainedModel, config: PretrainedConfig) -> list[tuple[PretrainedConfig, list[str], str]]:
    """Of each stack of layers: the configuration it has in `config`, the fields with its depth, its list's name."""
    if not config.is_encoder_decoder:
        return [(config, ["num_hidden_layers"], _list_name(lm, lm, config.num_hidden_layers))]
    stacks = []
    for side, stack, flat_fields in (
        ("encoder", lm.get_encoder(), ["num_hidden_layers", "encoder_layers"]),
        ("decoder", lm.get_decoder(), ["num_decoder_layers", "decoder_layers"]),
    ):
        part, fields = getattr(config, side, None), ["num_hidden_layers"]
        if not isinstance(part, PretrainedConfig):  # T5Gemma nests one for each side, T5 and BART are flat
            part, fields = config, [field for field in flat_fields if hasattr(config, field)]
        stacks.append((part, fields, _list_name(lm, stack, getattr(part, fields[0]))))
    return stacks


def _list_name(lm: PreTrainedModel, stack: nn.Module, depth: int) -> str:
    lists = (module for module in stack.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    if (layers := next(lists, None)) is None:
        raise ValueError(f"{type(stack).__name__} has no list of its {depth} layers: it cannot be sliced.")
    return next(name for name, module in lm.named_modules() if module is layers)


def _slice_config(config: PretrainedConfig, fields: list[str], layers: Sequence[int]):
    depth = getattr(config, fields[0])
    for name, value in list(vars(config).items()):
        # What has an entry for each layer, such as `layer_types`; in a flat configuration they are the encoder's.
        per_layer = isinstance(value, (list, tuple)) and len(value) == depth and "num_hidden_layers" in fields
        if per_layer and name != "architectures" and not name.endswith("_token_id"):
            setattr(config, name, [value[layer] for layer in layers])
    for field in fields:
        setattr(config, field, len(layers))


def _trim_config(config: PretrainedConfig, generation_config: GenerationConfig, vocab_size: int, token_ids: list[int]):
    """Sets the size of the vocabulary and the ids of the special tokens, wherever they are said."""
    new_ids = {token_id: i for i, token_id in enumerate(token_ids)}

    def renumber(value):
        if isinstance(value, (list, tuple)):
            return [new_ids[token] for token in value if token in new_ids] or None
        return new_ids.get(value)

    parts = [part for part in vars(config).values() if isinstance(part, PretrainedConfig)]
    for part in [config, *parts, generation_config]:
        for name, value in list(vars(part).items()):
            if name.endswith("_token_id") or name in ("suppress_tokens", "begin_suppress_tokens"):
                setattr(part, name, renumber(value))
            elif name == "bad_words_ids" and value is not None:
                words = [word for word in value if set(word) <= set(new_ids)]
                setattr(part, name, [renumber(word) for word in words] or None)
            elif "vocab_size" in name and value == vocab_size:
                setattr(part, name, len(token_ids))


def _sliced_weights(
    lm: PreTrainedModel, sliced: PreTrainedModel, lists: list[str], layers: Sequence[int], token_ids: list[int] | None
) -> dict[str, torch.Tensor]:
    """The weights of `sliced`, copied from `lm`: of the chosen layers of each list, and of the chosen tokens."""
    source, vocab_size = lm.state_dict(), lm.config.vocab_size
    weights = {}
    for name, target in sliced.state_dict().items():
        weight = source.get(_source_name(name, lists, layers))
        if weight is None:  # T5's layers share the relative positions that its first one has
            weight = source.get(_source_name(name, lists, [0, *layers[1:]]))
        if weight is not None and token_ids is not None:
            for dim, size in enumerate(target.shape):
                if (weight.shape[dim], size) == (vocab_size, len(token_ids)) and size < vocab_size:
                    weight = weight.index_select(dim, torch.tensor(token_ids, device=weight.device))
        if weight is None or weight.shape != target.shape:
            raise ValueError(
                f"The layers of {type(lm).__name__} are not alike: {name!r} of the slice needs a tensor of shape "
                f"{tuple(target.shape)}, but there is {'none' if weight is None else tuple(weight.shape)}."
            )
        weights[name] = weight.clone()
    return weights


def _source_name(name: str, lists: list[str], layers: Sequence[int]) -> str:
    for prefix in lists:
        if name.startswith(f"{prefix}."):
            layer, rest = name[len(prefix) + 1 :].split(".", 1)
            return f"{prefix}.{layers[int(layer)]}.{rest}"
    return name
