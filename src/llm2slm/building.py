"""Building an SLM: its tokenizer (trained on the text, or the LLM's trimmed to the text) and its model (fresh, or made
of chosen layers of a pretrained one).

    from llm2slm.building import slice_lm, token_map, trim_tokenizer

    tokenizer, token_ids = trim_tokenizer(llm_tokenizer, texts)
    slm = slice_lm(llm, layers=[0, 1, 28, 29], token_ids=token_ids)
    prompt_token_map = token_map(llm.config.vocab_size, token_ids)

Choices made here:
- *Trimming keeps what a token is merged from.* A BPE joins, again and again, the adjacent pair of the lowest rank. If
  the merges that a text does not use are taken away, each step on it stays the same; and the steps inside of a token
  are those of the token's own text. A Unigram model takes the best of all segmentations, which is the best of fewer.
- *A slice is a new model of a smaller configuration*, filled with the chosen layers' weights: layer numbers, attention
  windows and tied weights are right by construction, whatever the architecture.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .tokenization_llm2slm import SPECIAL_TOKENS

TEXTS_PER_BATCH = 1000  # what is encoded at a time
INPUT_NAMES = ["input_ids", "attention_mask"]  # Transformers 4 would add token_type_ids, which no such model takes


# ---------------------------------------------------------------------------------------------------------- tokenizers
def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    r"""
    Trains a byte-level BPE, which encodes any text without loss, with the special tokens `<eos>` and `<pad>`.

    Args:
        texts (`Iterable[str]`): What the tokens are learned from.
        vocab_size (`int`): Number of tokens, at most: few texts give fewer.

    Raises:
        ValueError: if `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    special_tokens, alphabet = ["<eos>", "<pad>"], pre_tokenizers.ByteLevel.alphabet()
    smallest = len(special_tokens) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(f"`vocab_size` must be at least {smallest} (each byte is a token), got {vocab_size}.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>", model_input_names=INPUT_NAMES
    )


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], vocab_size: int | None = None
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    r"""
    Trims a tokenizer to the tokens that texts use. Kept besides are the tokens these are merged from, the bytes (or,
    without bytes, the single characters) and the special tokens, so that any text can still be encoded as well as
    before; other added tokens (a chat's markers) only if a text has them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast one whose model is a BPE or Unigram. It is left as it is.
        texts (`Iterable[str]`): What is to be encoded into the same tokens as before.
        vocab_size (`int`, *optional*):
            Number of tokens, at most, where the bytes, special and added ones leave that room: the most used are kept,
            and a text with others becomes more tokens than before. All that the texts use if omitted.

    Returns:
        The trimmed tokenizer and, for each of its ids, the id that `tokenizer` has for the token.

    Raises:
        ValueError: if it is not a fast tokenizer, its algorithm is not supported, or there is no text.
    """
    fields = _fields_of(tokenizer)
    model, post_processor = fields["model"], fields["post_processor"]
    marks = [mark for name in ("continuing_subword_prefix", "end_of_word_suffix") if (mark := model.get(name))]
    if model["type"] not in ("BPE", "Unigram") or marks:
        raise ValueError(
            f"Only a tokenizer whose model is BPE or Unigram, without marks for parts of words, can be trimmed; got "
            f"{model['type']}{f' with {marks}' if marks else ''}."
        )
    texts = list(texts)
    if not texts:
        raise ValueError("`texts` must hold at least one text, got none.")
    source = Tokenizer.from_str(json.dumps(fields))
    old_ids = source.get_vocab(with_added_tokens=True)
    names = {old_id: token for token, old_id in old_ids.items()}

    # 1. What is kept.
    own = set(model["vocab"] if model["type"] == "BPE" else (piece for piece, _ in model["vocab"]))
    ranks = {tuple(pair): rank for rank, pair in enumerate(model.get("merges", ()))}
    always = [*_special_tokens(tokenizer).values(), *_post_processor_tokens(post_processor)]
    used = Counter(names[i] for ids in _encode(source, texts) for i in ids)
    kept = _any_text_needs(model)
    for token in [*always, *(token for token, _ in used.most_common())]:
        more = {token} | (_parts(token, ranks) if token in own else set())
        if vocab_size is None or token in always or token not in own or len(kept) + len(more - kept) <= vocab_size:
            kept |= more
    # 2. New ids, in the old order; added tokens outside of the model's own vocabulary come behind it, as ever.
    tokens = sorted(kept, key=lambda token: (token not in own, old_ids[token]))
    new_ids = {token: new_id for new_id, token in enumerate(tokens)}
    # 3. The tokenizer without the rest.
    if model["type"] == "BPE":
        model["vocab"] = {token: new_ids[token] for token in model["vocab"] if token in kept}
        model["merges"] = [pair for pair in model["merges"] if kept.issuperset((*pair, "".join(pair)))]
    else:
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in kept]
        model["unk_id"] = None if model["unk_id"] is None else new_ids[names[model["unk_id"]]]
    fields["added_tokens"] = [
        token | {"id": new_ids[token["content"]]} for token in fields["added_tokens"] if token["content"] in kept
    ]
    _renumber_post_processor(post_processor, new_ids)
    trimmed = Tokenizer.from_str(json.dumps(fields))

    token_ids = [old_ids[token] for token in tokens]
    for before, after in zip(_encode(source, texts), _encode(trimmed, texts), strict=True):
        if before != [token_ids[i] for i in after] and kept.issuperset(names[i] for i in before):
            raise ValueError(f"{type(tokenizer).__name__} cannot be trimmed: a text would become other tokens.")
    return _with_settings_of(tokenizer, trimmed), token_ids


def limit_tokenizer(tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    r"""
    The tokenizer that cuts texts as one that was trimmed from it, but into its own ids: an LLM then reads in the very
    pieces that a small vocabulary writes. Its tokens and merges become those of `trimmed`, as they were numbered;
    letters that `trimmed` has only as bytes stay letters.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast one whose model is a BPE. It is left as it is.
        trimmed (`PreTrainedTokenizerBase`): From [`trim_tokenizer`] of it.

    Raises:
        ValueError: if it is not a fast tokenizer whose model is a BPE.
    """
    fields = _fields_of(tokenizer)
    model = fields["model"]
    if model["type"] != "BPE":
        raise ValueError(
            "Only a tokenizer whose model is a BPE can be limited, got "
            f"{type(tokenizer).__name__} with {model['type']}."
        )
    kept = trimmed.get_vocab()
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] in kept]
    # Added tokens too: those outside of the model's own vocabulary would be numbered anew.
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token in kept or len(token) == 1} | {
        token["content"]: token["id"] for token in fields["added_tokens"]
    }
    model["merges"] = _fields_of(trimmed)["model"]["merges"]
    return _with_settings_of(tokenizer, Tokenizer.from_str(json.dumps(fields)))


def token_map(llm_vocab_size: int, token_ids: Sequence[int]) -> torch.Tensor:
    r"""
    The id in a trimmed tokenizer of each id of the LLM's, -1 for tokens it lacks: the `prompt_token_map` of
    [`~llm2slm.LLM2SLMForConditionalGeneration.from_llm_slm_pretrained`].

    Args:
        llm_vocab_size (`int`): Number of the LLM's embeddings, which may be more than its tokenizer has tokens.
        token_ids (`Sequence[int]`): From [`trim_tokenizer`].

    Returns:
        `torch.LongTensor` of shape `(llm_vocab_size,)`.

    Raises:
        ValueError: if `token_ids` has ids twice, or outside the LLM's vocabulary.
    """
    ids = torch.tensor(_check_token_ids(token_ids, llm_vocab_size))
    new_ids = torch.full((llm_vocab_size,), -1)
    new_ids[ids] = torch.arange(len(ids))
    return new_ids


def _fields_of(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What its tokenizer.json says, without how the last call cut and padded."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"`tokenizer` must be a fast tokenizer, got {type(tokenizer).__name__}.")
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {name: str(getattr(tokenizer, name)) for name in SPECIAL_TOKENS if getattr(tokenizer, name) is not None}


def _with_settings_of(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        model_input_names=INPUT_NAMES,
        chat_template=tokenizer.chat_template,
        **_special_tokens(tokenizer),
    )


def _encode(tokenizer: Tokenizer, texts: list[str]):
    for start in range(0, len(texts), TEXTS_PER_BATCH):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + TEXTS_PER_BATCH]):
            yield encoding.ids


def _parts(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """
    The tokens that a BPE makes on its way from the characters of `token` to it; none if it never gets there, as the
    pieces of a Unigram, which has no ranks.
    """
    symbols = list(token)
    parts = set(symbols)
    while len(symbols) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):  # an added token, a byte's, or one that is only ever a whole word (`ignore_merges`)
            return set()
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
        parts.add(symbols[place])
    return parts


def _any_text_needs(model: dict) -> set[str]:
    """The tokens that any text can be written in."""
    if model["type"] == "BPE":
        return _base_tokens(model["vocab"], model) | ({model["unk_token"]} - {None})
    pieces = [piece for piece, _ in model["vocab"]]
    # An unknown character scores 10 less than the worst piece: without that one, another segmentation might win.
    worst, _ = min(model["vocab"], key=lambda entry: entry[1])
    unknown = set() if model["unk_id"] is None else {pieces[model["unk_id"]]}
    return _base_tokens(pieces, model) | {worst} | unknown


def _base_tokens(vocab: Iterable[str], model: dict) -> set[str]:
    """The bytes; for a model without them the single characters (which are the bytes of a byte-level BPE)."""
    tokens, all_bytes = set(vocab), {f"<0x{byte:02X}>" for byte in range(256)}
    if model["byte_fallback"] and all_bytes <= tokens:
        return all_bytes | ({"▁"} & tokens)  # a space, which bytes would give back as this mark
    return {token for token in tokens if len(token) == 1}


def _processors(processor: dict | None) -> list[dict]:
    if processor is None:
        return []
    if processor["type"] == "Sequence":
        return [inner for outer in processor["processors"] for inner in _processors(outer)]
    return [processor]


def _post_processor_tokens(processor: dict | None) -> list[str]:
    """The tokens that a tokenizer puts around each text."""
    tokens = []
    for inner in _processors(processor):
        for special in inner.get("special_tokens", {}).values():  # TemplateProcessing
            tokens += special["tokens"]
        tokens += [inner[name][0] for name in ("sep", "cls") if name in inner]  # BertProcessing, RobertaProcessing
    return tokens


def _renumber_post_processor(processor: dict | None, new_ids: dict[str, int]):
    for inner in _processors(processor):
        for special in inner.get("special_tokens", {}).values():
            special["ids"] = [new_ids[token] for token in special["tokens"]]
        for name in {"sep", "cls"} & set(inner):
            inner[name][1] = new_ids[inner[name][0]]


# -------------------------------------------------------------------------------------------------------------- models
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
        token_ids, vocab_size = _check_token_ids(token_ids, lm.config.vocab_size), lm.config.vocab_size
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


def _check_token_ids(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in token_ids]
    if not ids or min(ids) < 0 or max(ids) >= vocab_size or len(set(ids)) < len(ids):
        raise ValueError(
            f"`token_ids` must be different ids from 0 to {vocab_size - 1}, got {len(ids)} ids, {len(set(ids))} of "
            f"them different{f', from {min(ids)} to {max(ids)}' if ids else ''}."
        )
    return ids


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
