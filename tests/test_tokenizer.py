"""Prompts are the LLM's tokenizer's, responses and special tokens the SLM's."""

import copy
import pickle

import pytest
import torch
from conftest import BOS, CHAT_TEMPLATE, EOS, PAD, build_llm_tokenizer, build_model, build_slm_tokenizer
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from llm2slm import LLM2SLMTokenizer

PROMPTS = ["w1 w2 w3", "w4"]
RESPONSES = ["a cat", "dog eats"]


def test_prompts_are_tokenized_by_the_llms_tokenizer(tokenizer, llm_tokenizer):
    for text in ("w1 w2", PROMPTS):
        found = tokenizer(text)
        assert dict(found) == {k: v for k, v in llm_tokenizer(text).items() if k != "token_type_ids"}
    assert tokenizer.encode("w1 w2") == llm_tokenizer.encode("w1 w2")
    assert tokenizer.tokenize("w1 w2") == ["w1", "w2"]
    tensors = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert tensors["input_ids"].shape == tensors["attention_mask"].shape == (2, 4)
    assert tensors["attention_mask"].sum(dim=1).tolist() == [4, 2]
    assert tokenizer(PROMPTS, truncation=True, max_length=2)["input_ids"] == [
        llm_tokenizer.encode("w1 w2", add_special_tokens=False)[:1] + [EOS],
        llm_tokenizer.encode("w4"),
    ]


def test_responses_and_special_tokens_are_the_slms(tokenizer, slm_tokenizer):
    ids = slm_tokenizer.encode("a cat")
    assert ids != tokenizer.encode("a cat")
    assert tokenizer(text_target="a cat")["input_ids"] == [*ids, EOS]
    assert tokenizer.decode([*ids, EOS, PAD], skip_special_tokens=True) == "a cat"
    assert tokenizer.batch_decode([ids, ids]) == ["a cat", "a cat"]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "</s>", "<s>")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (PAD, EOS, BOS)
    assert len(tokenizer) == tokenizer.vocab_size == len(slm_tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == slm_tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.slm_tokenizer.encode("a cat") == ids


def test_prompts_and_responses_together_are_a_training_example(tokenizer):
    both = tokenizer(PROMPTS, text_target=RESPONSES)
    assert set(both) == {"input_ids", "attention_mask", "labels"}
    assert both["input_ids"] == tokenizer(PROMPTS)["input_ids"]
    assert both["labels"] == tokenizer(text_target=RESPONSES)["input_ids"]
    one = tokenizer(PROMPTS[0], text_target=RESPONSES[0])
    assert one["labels"] == both["labels"][0]
    tensors = tokenizer(PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt")
    assert tensors["labels"].shape == (2, max(map(len, both["labels"])))


@pytest.mark.parametrize("template", ["$A", "$A </s>", "<s> $A", "<s> $A </s>"])
def test_one_end_token_is_put_behind_a_response_whatever_the_slms_tokenizer_adds(template, llm_tokenizer):
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, build_slm_tokenizer(template))
    ids = tokenizer(text_target="a cat")["input_ids"]
    assert ids.count(EOS) == 1 and ids[-1] == EOS
    # A start token without an end token is a decoder-only model's, whose response follows the prompt.
    assert (ids[0] == BOS) == (template == "<s> $A </s>")
    assert tokenizer(text_target=["a cat"])["input_ids"] == [ids]
    assert tokenizer(text_target="a cat</s>")["input_ids"].count(EOS) == 1
    assert tokenizer(text_target="")["input_ids"][-1] == EOS


@pytest.mark.parametrize("template", ["$A", "$A </s>", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("max_length", [3, 5, 8])
def test_a_response_is_cut_with_room_for_its_end_token(template, max_length, llm_tokenizer):
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, build_slm_tokenizer(template))
    whole = tokenizer(text_target="a cat eats a dog")["input_ids"]
    cut = tokenizer(text_target="a cat eats a dog", truncation=True, max_length=max_length)["input_ids"]
    assert len(cut) <= max_length < len(whole)
    assert cut == [*whole[: len(cut) - 1], EOS]
    short = tokenizer(text_target="a", truncation=True, max_length=8)["input_ids"]
    assert short == tokenizer(text_target="a")["input_ids"]


def test_responses_are_padded_with_the_slms_padding_token(tokenizer):
    padded = tokenizer(text_target=RESPONSES, padding=True, return_tensors="pt")
    lengths = [len(row) for row in tokenizer(text_target=RESPONSES)["input_ids"]]
    assert padded["attention_mask"].sum(dim=1).tolist() == lengths
    assert (padded["input_ids"][padded["attention_mask"] == 0] == PAD).all()
    fixed = tokenizer(text_target=RESPONSES, padding="max_length", max_length=20, truncation=True)
    assert {len(row) for row in fixed["input_ids"]} == {20}


def test_chat_templates_are_the_llms(tokenizer, llm_tokenizer):
    chat = [{"role": "user", "content": "w1 w2"}]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "user w1 w2 assistant"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == llm_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    tokenizer.chat_template = "changed"
    assert tokenizer.llm_tokenizer.chat_template == "changed"


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(llm_tokenizer, slm_tokenizer):
    llm_tokenizer.pad_token = slm_tokenizer.pad_token = None
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer)
    assert tokenizer.pad_token == "</s>" and tokenizer.llm_tokenizer.pad_token == "[END]"
    assert tokenizer(PROMPTS, padding=True)["attention_mask"][1] == [1, 1, 0, 0]
    assert llm_tokenizer.pad_token is None and slm_tokenizer.pad_token is None  # they were copied


def test_the_two_tokenizers_are_copied(llm_tokenizer, slm_tokenizer):
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer)
    tokenizer.add_tokens(["newword"])
    tokenizer.llm_tokenizer.padding_side = "left"
    tokenizer.chat_template = "changed"
    assert (len(slm_tokenizer), llm_tokenizer.padding_side) == (64, "right")
    assert llm_tokenizer.chat_template == CHAT_TEMPLATE


def behaviour(tokenizer):
    return (
        tokenizer(PROMPTS, text_target=RESPONSES, padding=True).data,
        tokenizer.decode([7, 8, 30, EOS]),
        tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False),
        (tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length, len(tokenizer)),
        (tokenizer.llm_tokenizer.pad_token, tokenizer.llm_tokenizer.padding_side),
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("loader", ["class", "auto"])
def test_a_saved_tokenizer_loads_with_the_same_behaviour(slm_tokenizer, tmp_path, side, loader):
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(padding_side=side), slm_tokenizer)
    folder = tmp_path / "checkpoint"
    files = tokenizer.save_pretrained(folder)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.json")} >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "llm_tokenizer/tokenizer.json",
        "llm_tokenizer/tokenizer_config.json",
    }
    assert len(files) >= 4
    assert "\n" not in (folder / "llm_tokenizer" / "tokenizer.json").read_text()  # as small as can be
    expected = behaviour(tokenizer)  # saving left it as it was
    if loader == "class":
        loaded = LLM2SLMTokenizer.from_pretrained(folder)
    else:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__name__ == "LLM2SLMTokenizer"
    assert behaviour(loaded) == expected
    loaded.save_pretrained(tmp_path / "again")
    assert behaviour(LLM2SLMTokenizer.from_pretrained(tmp_path / "again")) == expected


def test_tokens_added_to_the_slms_side_are_saved(tokenizer, tmp_path):
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(tmp_path)
    loaded = LLM2SLMTokenizer.from_pretrained(tmp_path)
    assert loaded(text_target="newword")["input_ids"][-2:] == [64, EOS]
    assert loaded.encode("newword") == tokenizer.encode("newword")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_a_copy_behaves_the_same(tokenizer, copied):
    other = copied(tokenizer)
    assert behaviour(other) == behaviour(tokenizer)
    assert other.llm_tokenizer is not tokenizer.llm_tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_seq2seq_collator_pads_prompts_and_labels(tokenizer, side):
    tokenizer.llm_tokenizer.padding_side = side
    model = build_model()
    rows = [dict(tokenizer(p, text_target=r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)([dict(row) for row in rows])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "decoder_input_ids"}
    for i, row in enumerate(rows):
        assert batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist() == row["input_ids"]
        assert batch["labels"][i][batch["labels"][i] != -100].tolist() == row["labels"]
        assert batch["labels"][i][: len(row["labels"])].tolist() == row["labels"]
    assert batch["attention_mask"][1, 0 if side == "left" else -1] == 0
    with torch.no_grad():
        loss = model(**batch).loss
        batch.pop("decoder_input_ids")
        assert model(**batch).loss.equal(loss)


def test_neither_prompts_nor_responses_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"`text` \(prompts\), `text_target` \(responses\)"):
        tokenizer()


def test_tokenizers_that_cannot_be_joined_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="`llm_tokenizer` must be a fast tokenizer, got Slow"):
        LLM2SLMTokenizer.from_tokenizers(Slow(), build_slm_tokenizer())
    with pytest.raises(ValueError, match="`slm_tokenizer` must be a fast tokenizer, got Slow"):
        LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), Slow())
    endless = build_slm_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"`slm_tokenizer` has no `eos_token`"):
        LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), endless)
