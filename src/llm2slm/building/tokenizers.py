"""An SLM's tokenizer: trained on the text, or the LLM's trimmed to the text.

    from llm2slm.building import slice_lm, token_map, trim_tokenizer

    tokenizer, token_ids = trim_tokenizer(llm_tokenizer, texts)
    slm = slice_lm(llm, layers=[0, 1, 28, 29], token_ids=token_ids)
    prompt_token_map = token_map(llm.config.vocab_size, token_ids)

A choice made here:
- *Trimming keeps what a token is merged from.* A BPE joins, again and again, the adjacent pair of the lowest rank. If
  the merges that a text does not use are taken away, each step on it stays the same; and the steps inside of a token
  are those of the token's own text. A Unigram model takes the best of all segmentations, which is the best of fewer.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..tokenization_llm2slm import SPECIAL_TOKENS

TEXTS_PER_BATCH = 1000  # what is encoded at a time
INPUT_NAMES = ["input_ids", "attention_mask"]  # Transformers 4 would add token_type_ids, which no such model takes


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
        texts (`Iterable[str]`):
            What is to be encoded into the same tokens as before, with the line breaks and marks of its prompt format.
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
    ids = torch.tensor(check_token_ids(token_ids, llm_vocab_size))
    new_ids = torch.full((llm_vocab_size,), -1)
    new_ids[ids] = torch.arange(len(ids))
    return new_ids


def find_token_ids(tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase) -> list[int] | None:
    r"""
    For each id of `trimmed` the id that `tokenizer` has for the token, if the one was trimmed from the other, or the
    two are the same; `None` if they are neither.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The whole one.
        trimmed (`PreTrainedTokenizerBase`): Maybe from [`trim_tokenizer`] of it.
    """
    old_ids, new_ids = tokenizer.get_vocab(), trimmed.get_vocab()
    token_ids = [old_ids.get(token) for token in sorted(new_ids, key=new_ids.__getitem__)]
    if old_ids == new_ids:
        return token_ids
    if None in token_ids or sorted(new_ids.values()) != list(range(len(new_ids))):
        return None
    if not (getattr(tokenizer, "is_fast", False) and getattr(trimmed, "is_fast", False)):
        return None
    fields, trimmed_fields = _fields_of(tokenizer), _fields_of(trimmed)
    if any(fields[name] != trimmed_fields[name] for name in ("normalizer", "pre_tokenizer")):
        return None
    model, trimmed_model = fields["model"], trimmed_fields["model"]
    if model["type"] != trimmed_model["type"] or model["type"] not in ("BPE", "Unigram"):
        return None
    kept = new_ids.keys()
    if model["type"] == "BPE":
        merges = [pair for pair in model["merges"] if kept >= {*pair, "".join(pair)}]
        return token_ids if merges == trimmed_model["merges"] else None
    pieces = [entry for entry in model["vocab"] if entry[0] in kept]
    return token_ids if pieces == trimmed_model["vocab"] else None


def first_pieces(tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase) -> torch.Tensor | None:
    r"""
    For each id of a tokenizer that of the first token in which one that was trimmed from it writes the token: the
    token itself if it has that, and -1 for added tokens that it lacks.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The whole one.
        trimmed (`PreTrainedTokenizerBase`): From [`trim_tokenizer`] of it, or the same.

    Returns:
        `torch.LongTensor` of shape `(vocab_size,)`, or `None` if [`find_token_ids`] finds them not to be related.
    """
    token_ids = find_token_ids(tokenizer, trimmed)
    if token_ids is None:
        return None
    vocab = tokenizer.get_vocab()
    pieces = token_map(max(vocab.values()) + 1, token_ids)
    lacking = [token for token, i in vocab.items() if pieces[i] < 0]
    if lacking:
        added, model = tokenizer.get_added_vocab(), trimmed.backend_tokenizer.model
        unknown = trimmed.unk_token_id
        for token in lacking:
            written = [] if token in added else model.tokenize(token)
            if written and written[0].id != unknown:
                pieces[vocab[token]] = written[0].id
    return pieces


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """The ids as a list; a ValueError if one comes twice or is outside the vocabulary."""
    ids = [int(i) for i in token_ids]
    if not ids or min(ids) < 0 or max(ids) >= vocab_size or len(set(ids)) < len(ids):
        raise ValueError(
            f"`token_ids` must be different ids from 0 to {vocab_size - 1}, got {len(ids)} ids, {len(set(ids))} of "
            f"them different{f', from {min(ids)} to {max(ids)}' if ids else ''}."
        )
    return ids


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
