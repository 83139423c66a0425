"""Prompts are the LLM's tokenizer's, responses and special tokens the SLM's."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import BOS, CHAT_TEMPLATE, EOS, PAD, build_llm, build_llm_tokenizer, build_model, build_slm_tokenizer
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from llm2slm import LLM2SLMConfig, LLM2SLMTokenizer

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
    whole = tokenizer("w1 w2", text_target=RESPONSES, padding="max_length", max_length=2)["labels"]
    assert whole == tokenizer(text_target=RESPONSES, padding="max_length", max_length=2)["input_ids"]
    assert [len(row) for row in whole] == lengths


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


# --------------------------------------------------------------------------------------------- the form of the prompts
FORM = "w9 {prompt} {{}} w8"  # as a text: w9 ... {} w8


@pytest.fixture
def formed(llm_tokenizer, slm_tokenizer):
    return LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer, prompt_format=FORM)


def in_form(text):
    return f"w9 {text} {{}} w8"


@pytest.mark.parametrize("texts", ["w1 w2 w3", "{w1}", PROMPTS, tuple(PROMPTS)])
def test_texts_are_put_into_the_form_once(formed, llm_tokenizer, texts):
    expected = in_form(texts) if isinstance(texts, str) else [in_form(text) for text in texts]
    assert formed(texts)["input_ids"] == llm_tokenizer(expected)["input_ids"]
    assert formed(texts, apply_prompt_format=False)["input_ids"] == llm_tokenizer(texts)["input_ids"]


def test_every_way_to_a_single_prompts_tokens_has_the_form(formed, llm_tokenizer):
    whole, bare = in_form("w1"), "w1"
    assert formed.encode("w1") == llm_tokenizer.encode(whole)
    assert formed.encode("w1", apply_prompt_format=False) == llm_tokenizer.encode(bare)
    assert formed.tokenize("w1", add_special_tokens=True) == [*llm_tokenizer.tokenize(whole), "[END]"]
    assert formed.tokenize("w1", apply_prompt_format=True) == llm_tokenizer.tokenize(whole)
    cut = formed("w1 w2 w3", truncation=True, max_length=3)["input_ids"]
    assert cut == llm_tokenizer("w9 w1", truncation=True, max_length=3)["input_ids"]


def test_what_needs_no_special_tokens_needs_no_form(formed, llm_tokenizer):
    assert formed.tokenize("w1") == ["w1"]  # by default without either
    assert formed("w1", add_special_tokens=False)["input_ids"] == llm_tokenizer.encode("w1", add_special_tokens=False)
    assert formed.encode("w1", add_special_tokens=False) == llm_tokenizer.encode("w1", add_special_tokens=False)
    both = formed.encode("w1", add_special_tokens=False, apply_prompt_format=True)
    assert both == llm_tokenizer.encode(in_form("w1"), add_special_tokens=False)


def test_responses_have_no_form(formed, tokenizer):
    assert formed(text_target=RESPONSES) == tokenizer(text_target=RESPONSES)
    both = formed(PROMPTS, text_target=RESPONSES)
    assert both["labels"] == tokenizer(text_target=RESPONSES)["input_ids"]
    assert both["input_ids"] == formed(PROMPTS)["input_ids"]
    padded = {"input_ids": [[7], [8, 9]]}
    assert formed.pad(padded) == tokenizer.pad(padded)


def test_chats_have_their_template_and_no_form(formed, llm_tokenizer):
    chat = [{"role": "user", "content": "w1 w2"}]
    options = {"add_generation_prompt": True, "return_dict": False}
    expected = llm_tokenizer.apply_chat_template(chat, **options)
    assert formed.apply_chat_template(chat, **options) == expected
    rendered = formed.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert formed(rendered, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize(
    "arguments",
    [{"text": ["w1", "w2"], "is_split_into_words": True}, {"text": [["w1", "w2"]]}],
)
def test_what_is_not_one_text_has_no_place_in_the_form(formed, llm_tokenizer, arguments):
    with pytest.raises(ValueError, match="form of one text: words.*apply_prompt_format=False"):
        formed(**arguments)
    if not isinstance(arguments["text"][0], list):
        found = formed(**arguments, apply_prompt_format=False)["input_ids"]
        assert found == llm_tokenizer(**arguments)["input_ids"]


def test_the_form_can_be_set_and_taken_away(tokenizer):
    bare = tokenizer.encode("w1")
    assert tokenizer.prompt_format is None
    tokenizer.prompt_format = "{prompt} w9"
    assert tokenizer.encode("w1") == tokenizer.encode("w1 w9", apply_prompt_format=False) != bare
    tokenizer.prompt_format = None
    assert tokenizer.encode("w1") == bare


@pytest.mark.parametrize("wrong", ["Say it.", "{text}", "{prompt} {other}", "{prompt", "{} {prompt}"])
def test_a_form_must_have_a_place_for_the_prompt_and_nothing_else(tokenizer, wrong, tmp_path):
    message = r"`prompt_format` must have {prompt} in it, and no other braces, got"
    with pytest.raises(ValueError, match=message):
        tokenizer.prompt_format = wrong
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        LLM2SLMTokenizer.from_pretrained(tmp_path, prompt_format=wrong)
    with pytest.raises(ValueError, match=message):
        LLM2SLMConfig(prompt_format=wrong)


LOAD = """
import json, sys
from transformers import AutoTokenizer
found = []
for folder, arguments in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **arguments)
    found.append([tokenizer.prompt_format, tokenizer.encode("w1")])
assert "llm2slm" not in sys.modules
print(json.dumps(found))
"""


def test_the_form_is_loaded_without_the_package_and_from_old_checkpoints(formed, tokenizer, tmp_path):
    formed.save_pretrained(tmp_path / "new")
    tokenizer.save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old" / "sub")
    (tmp_path / "old" / "config.json").write_text(json.dumps({"model_type": "llm2slm", "prompt_format": FORM}))
    tokenizer.save_pretrained(tmp_path / "bare")
    tokenizer.prompt_format = None  # said, so that config.json is not asked
    tokenizer.save_pretrained(tmp_path / "off")
    (tmp_path / "off" / "config.json").write_text(json.dumps({"model_type": "llm2slm", "prompt_format": FORM}))
    folders = [("new", {}), ("old", {}), ("old", {"subfolder": "sub"}), ("bare", {}), ("off", {})]
    folders += [("new", {"prompt_format": None}), ("bare", {"prompt_format": FORM})]
    without, within = [None, tokenizer.encode("w1")], [FORM, tokenizer.encode(in_form("w1"))]
    asked = json.dumps([(str(tmp_path / name), arguments) for name, arguments in folders])
    run = subprocess.run([sys.executable, "-c", LOAD, asked], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    expected = [within, within, without, without, without, without, within]
    assert json.loads(run.stdout.splitlines()[-1]) == expected


def test_prompts_are_decoded_by_the_llms_tokenizer(formed, slm_tokenizer):
    ids = formed("w1 w2")["input_ids"]
    assert formed.decode_prompt(ids, skip_special_tokens=True) == "w9 w1 w2 w8"
    assert formed.decode_prompt(torch.tensor(ids)).endswith("[END]")
    assert formed.decode(ids) == slm_tokenizer.decode(ids) != formed.decode_prompt(ids)


# -------------------------------------------------------------------------------------------------- by name and folder
@pytest.fixture
def package(llm_tokenizer, tmp_path, monkeypatch):
    """A Python package that holds an LLM."""
    llm_tokenizer.save_pretrained(tmp_path / "packages" / "llm_in_a_package")
    build_llm().save_pretrained(tmp_path / "packages" / "llm_in_a_package")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return "package:llm_in_a_package"


def test_tokenizers_are_joined_by_name_folder_or_package(package, slm_tokenizer, tokenizer, tmp_path):
    slm_tokenizer.save_pretrained(tmp_path / "slm")
    joined = LLM2SLMTokenizer.from_tokenizers(package, tmp_path / "slm", prompt_format=FORM)
    assert joined(PROMPTS, text_target=RESPONSES, apply_prompt_format=False) == tokenizer(
        PROMPTS, text_target=RESPONSES
    )
    assert joined.prompt_format == FORM
    with pytest.raises(OSError, match="There is no tokenizer in '.*nowhere'"):
        LLM2SLMTokenizer.from_tokenizers(str(tmp_path / "nowhere"), slm_tokenizer)
    with pytest.raises(OSError, match="No Python package 'not_there' is installed"):
        LLM2SLMTokenizer.from_tokenizers("package:not_there", slm_tokenizer)


def test_a_package_of_one_model_is_no_checkpoint(package):
    with pytest.raises(ValueError, match="'package:llm_in_a_package' names one model.*from_tokenizers"):
        LLM2SLMTokenizer.from_pretrained(package)


# ------------------------------------------------------------------------------------------------------- save and load
def behaviour(tokenizer):
    return (
        tokenizer.prompt_format,
        tokenizer(PROMPTS, text_target=RESPONSES, padding=True).data,
        tokenizer.decode([7, 8, 30, EOS]),
        tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False),
        (tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length, len(tokenizer)),
        (tokenizer.llm_tokenizer.pad_token, tokenizer.llm_tokenizer.padding_side),
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("loader", ["class", "auto"])
def test_a_saved_tokenizer_loads_with_the_same_behaviour(slm_tokenizer, tmp_path, side, loader):
    llm_tokenizer = build_llm_tokenizer(padding_side=side)
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer, FORM if side == "left" else None)
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
    tokenizer.prompt_format = FORM
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
