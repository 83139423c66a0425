"""`llm2slm label`: what the LLM writes becomes the completions, once, whatever interrupts it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import EOS, PAD, build_llm, build_llm_tokenizer, build_slm, build_slm_tokenizer
from datasets import Dataset, DatasetDict, load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TopKLogitsWarper

from llm2slm import LLM2SLMTokenizer, language_models
from llm2slm.cli import main as cli
from llm2slm.data.collator import tokenize_pairs
from llm2slm.data.pairs import load_pairs, load_rows
from llm2slm.evaluation import labelling as label

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w3 w3 w7", "w2 w1", "w20 w21 w22", "w9 w8 w7 w6 w5 w4 w3"]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Language models: with a chat template, without, an encoder-decoder, and a fine-tuned adapter."""
    root = tmp_path_factory.mktemp("models")
    llm, tokenizer = build_llm("llama"), build_llm_tokenizer()
    llm.save_pretrained(root / "chat")
    tokenizer.save_pretrained(root / "chat")
    llm.save_pretrained(root / "plain")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(root / "plain")
    build_slm("t5").save_pretrained(root / "seq2seq")
    build_slm_tokenizer().save_pretrained(root / "seq2seq")
    torch.manual_seed(7)
    adapted = get_peft_model(llm, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(root / "adapter")
    build_llm_tokenizer().save_pretrained(root / "adapter")
    run = {"arm": "llm", "llm": {"name_or_path": str(root / "chat")}, "data": {"prompt_format": "{prompt} w0"}}
    (root / "adapter" / "run.json").write_text(json.dumps(run))
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def data(tmp_path) -> str:
    train = Dataset.from_dict({"prompt": PROMPTS, "source": [f"s{i}" for i in range(len(PROMPTS))]})
    test = Dataset.from_dict({"prompt": PROMPTS[:2], "source": ["t0", "t1"]})
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "data")
    return str(tmp_path / "data")


def run(*options) -> int | None:
    return cli.main(["label", "--batch-size", "3", "--max-new-tokens", str(NEW_TOKENS), *map(str, options)])


def labels(*options, output) -> DatasetDict:
    assert run(*options, "--output", output) is None
    return load_from_disk(str(output))


def written_by(model, tokenizer, ids: list[int]) -> str:
    """What a plain `generate` writes to one prompt."""
    written = model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
    )[0]
    written = written[1:] if model.config.is_encoder_decoder else written[len(ids) :]
    return tokenizer.decode(written, skip_special_tokens=True).strip()


# ----------------------------------------------------------------------------------------------------- what is written
@pytest.mark.parametrize("kind", ["plain", "seq2seq"])
def test_completions_are_what_the_llm_writes_to_each_prompt(folders, data, tmp_path, kind):
    auto_class = AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM
    model = auto_class.from_pretrained(folders[kind]).eval()
    tokenizer = build_slm_tokenizer() if kind == "seq2seq" else build_llm_tokenizer()
    rows = labels("--llm", folders[kind], "--data", data, output=tmp_path / "labelled")["train"]
    written = [written_by(model, tokenizer, tokenizer(text)["input_ids"]) for text in PROMPTS]
    assert rows.to_list() == [
        {"prompt": PROMPTS[i], "source": f"s{i}", "completion": text} for i, text in enumerate(written) if text
    ]
    assert len(set(rows["completion"])) > 2


def test_a_chat_template_is_used_with_its_generation_prompt(folders, data, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders["chat"]).eval(), build_llm_tokenizer()
    rows = labels("--llm", folders["chat"], "--data", data, "--instruction", "w30 w31", output=tmp_path / "labelled")[
        "train"
    ]
    chats = [f"user w30 w31 {text} assistant" for text in PROMPTS]
    expected = [written_by(model, tokenizer, tokenizer(chat, add_special_tokens=False)["input_ids"]) for chat in chats]
    assert rows["completion"][:] == expected
    assert rows["prompt"][:] == PROMPTS
    plain = labels("--llm", folders["chat"], "--data", data, "--no-chat-template", output=tmp_path / "plain")["train"]
    assert plain["completion"][:] == [written_by(model, tokenizer, tokenizer(t)["input_ids"]) for t in PROMPTS]


def test_examples_are_shown_and_left_out(folders, tmp_path):
    pairs = Dataset.from_dict({"prompt": PROMPTS, "completion": [f"w{40 + i}" for i in range(len(PROMPTS))]})
    pairs.save_to_disk(tmp_path / "data")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders["chat"]).eval(), build_llm_tokenizer()
    options = ["--llm", folders["chat"], "--data", tmp_path / "data", "--few-shot", 2]
    rows = labels(*options, output=tmp_path / "labelled")["train"]
    assert rows["prompt"][:] == [*PROMPTS[1:3], *PROMPTS[4:]]  # the examples are evenly spaced
    shown = f"user {PROMPTS[0]} assistant w40 user {PROMPTS[3]} assistant w43"
    chats = [f"{shown} user {text} assistant" for text in rows["prompt"]]
    expected = [written_by(model, tokenizer, tokenizer(chat, add_special_tokens=False)["input_ids"]) for chat in chats]
    assert rows["completion"][:] == expected


def test_a_fine_tuned_llm_reads_prompts_as_it_was_trained_to(folders, data, tmp_path):
    rows = labels("--llm", folders["adapter"], "--data", data, output=tmp_path / "labelled")["train"]
    model, tokenizer = language_models.load_model(folders["adapter"], device="cpu", trained_llm=folders["chat"])
    expected = [written_by(model, build_llm_tokenizer(), tokenizer(f"{text} w0")["input_ids"]) for text in PROMPTS]
    assert rows["completion"][:] == expected
    assert rows["prompt"][:] == PROMPTS  # as they were: a training's own prompt_format applies to them again


def test_a_form_of_the_tokenizers_is_put_around_prompts_that_lack_it():
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer(), "{prompt} w0")
    expected = build_llm_tokenizer()(["w1 w0"])["input_ids"]
    assert label.encode(["w1"], tokenizer, "train", in_format=False) == expected
    assert label.encode(["w1 w0"], tokenizer, "train", in_format=True) == expected


def test_chats_are_answered_with_a_message(folders, tmp_path):
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    Dataset.from_dict({"prompt": chats}).save_to_disk(tmp_path / "data")
    rows = labels("--llm", folders["chat"], "--data", tmp_path / "data", output=tmp_path / "labelled")["train"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders["chat"]).eval(), build_llm_tokenizer()
    ids = tokenizer(f"user {PROMPTS[0]} assistant", add_special_tokens=False)["input_ids"]
    assert rows[0]["completion"] == [{"role": "assistant", "content": written_by(model, tokenizer, ids)}]
    assert rows["prompt"][:] == chats


def test_a_file_is_labelled_by_its_parts_or_whole(folders, tmp_path, capsys):
    path = tmp_path / "prompts.csv"
    Dataset.from_dict({"question": [f"w{i}" for i in range(20)]}).to_csv(path)
    options = ["--llm", folders["plain"], "--data", path, "--prompt-format", "{question}"]
    labelled = labels(*options, "--split", "train", "test", output=tmp_path / "parts")
    assert "is one file: a hash of each prompt chooses" in capsys.readouterr().out
    for part in labelled:
        assert set(labelled[part]["question"]) <= set(load_rows(path, part, prompt_format="{question}")["question"])
    whole = labels(*options, "--split", "all", output=tmp_path / "whole")
    assert list(whole) == ["train"] and len(whole["train"]) == 20  # as `train --more-data` takes it


def test_slices_of_one_split_are_one_split(folders, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    slices = ["train[:3]", "train[3:]"]
    labelled = labels("--llm", folders["plain"], "--data", path, "--split", *slices, output=tmp_path / "labelled")
    assert list(labelled) == ["train"] and labelled["train"]["prompt"][:] == PROMPTS


def test_an_llm_that_was_trained_on_cut_prompts_reads_cut_ones(folders, data, tmp_path):
    llm = shutil.copytree(folders["adapter"], tmp_path / "llm")
    run = json.loads((llm / "run.json").read_text())
    run["recipe"] = {"truncate": True, "prompt_max_length": 3}
    (llm / "run.json").write_text(json.dumps(run))
    rows = labels("--llm", llm, "--data", data, output=tmp_path / "labelled")["train"]
    model, tokenizer = language_models.load_model(str(llm), device="cpu", trained_llm=folders["chat"])
    ids = tokenizer([f"{text} w0" for text in PROMPTS], truncation=True, max_length=3)["input_ids"]
    assert rows["completion"][:] == [written_by(model, build_llm_tokenizer(), cut) for cut in ids]


def test_samples_are_drawn_from_all_tokens(folders, data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(language_models, "write_responses", lambda model, *_: drawn.append(model) or (["x"], [1]))
    options = ["--llm", folders["plain"], "--data", data, "--do-sample", "--batch-size", 1]
    labels(*options, output=tmp_path / "labelled")
    warpers = drawn[0]._get_logits_processor(drawn[0].generation_config, input_ids_seq_length=1)
    assert not [warper for warper in warpers if isinstance(warper, TopKLogitsWarper)]


def test_the_result_is_what_a_training_takes(folders, data, tmp_path):
    labels("--llm", folders["chat"], "--data", data, "--split", "train", "test", output=tmp_path / "labelled")
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    for split, size in (("train", len(PROMPTS)), ("test", 2)):
        pairs = load_pairs(tmp_path / "labelled", split)
        assert len(tokenize_pairs(pairs, tokenizer, 32, 64)) == len(pairs) == size


def test_prompts_without_a_response_are_left_out_and_counted():
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"], "n": [0, 1, 2]})
    responses = [{"text": "A", "tokens": 2}, {"text": "", "tokens": 1}, {"text": "C", "tokens": 2}]
    labelled, counts = label.join(rows, ["a", "b", "c"], responses)
    assert labelled.to_list() == [
        {"prompt": "a", "n": 0, "completion": "A"},
        {"prompt": "c", "n": 2, "completion": "C"},
    ]
    assert counts == {"pairs": 2, "without_response": 1}
    with pytest.raises(ValueError, match="wrote nothing to any prompt"):
        label.join(rows, ["a", "b", "c"], [{"text": "", "tokens": 1}] * 3)


def test_the_settings_and_counts_are_recorded(folders, data, tmp_path, capsys):
    labels(
        "--llm", folders["chat"], "--data", data, "--do-sample", "--temperature", 0.7, "--seed", 3,
        output=tmp_path / "labelled",
    )  # fmt: skip
    record = json.loads((tmp_path / "labelled" / "label.json").read_text())
    assert record["llm"] == folders["chat"] and record["data"] == data and record["split"] == ["train"]
    assert (record["do_sample"], record["temperature"], record["seed"]) == (True, 0.7, 3)
    assert record["max_new_tokens"] == NEW_TOKENS and len(record["fingerprint"]) == 64
    assert record["counts"]["train"]["pairs"] == len(PROMPTS)
    assert record["versions"]["torch"] == torch.__version__
    assert f"train: {len(PROMPTS)} pairs in {tmp_path / 'labelled'}" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- interruptions and determinism
def interrupt_after(monkeypatch, batches: int) -> list:
    """Ctrl-C while the next batch is written."""
    write, done = language_models.write_responses, []

    def interrupted(*args):
        if len(done) == batches:
            raise KeyboardInterrupt
        done.append(1)
        return write(*args)

    monkeypatch.setattr(language_models, "write_responses", interrupted)
    return done


def test_samples_depend_on_the_seed_and_not_on_interruptions(folders, data, tmp_path, monkeypatch):
    options = ["--llm", folders["chat"], "--data", data, "--do-sample", "--temperature", 3.0]
    whole = labels(*options, output=tmp_path / "whole")["train"]["completion"][:]
    torch.rand(7)  # what this process drew before makes no difference
    with monkeypatch.context() as patch:
        interrupt_after(patch, batches=1)
        assert run(*options, "--output", tmp_path / "parts") == 130
    assert not (tmp_path / "parts").exists()
    (tmp_path / "parts.part" / "train-000000006.part").write_text("[{")  # a kill while it was written
    with monkeypatch.context() as patch:
        done = interrupt_after(patch, batches=99)
        assert labels(*options, output=tmp_path / "parts")["train"]["completion"][:] == whole
        assert len(done) == 2  # of three batches one was there
    assert not Path(f"{tmp_path / 'parts'}.part").exists()
    other = labels(*options, "--seed", 1, output=tmp_path / "other")["train"]["completion"][:]
    assert other != whole


def test_what_was_begun_with_other_settings_or_data_is_refused(folders, data, tmp_path, monkeypatch, capsys):
    output = ["--output", tmp_path / "labelled"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, batches=1)
        assert run("--llm", folders["chat"], "--data", data, *output) == 130
        assert "goes on from what is in" in capsys.readouterr().err
    assert run("--llm", folders["chat"], "--data", data, *output, "--batch-size", 2) == 2
    assert "`batch_size` was 3, and is 2" in capsys.readouterr().err
    Dataset.from_dict({"prompt": PROMPTS[:-1]}).save_to_disk(tmp_path / "data" / "train")
    assert run("--llm", folders["chat"], "--data", data, *output) == 2
    assert "`fingerprint` was" in capsys.readouterr().err


def test_what_an_llm_began_its_retrained_self_does_not_end(folders, data, tmp_path, monkeypatch, capsys):
    llm = shutil.copytree(folders["plain"], tmp_path / "llm")
    options = ["--llm", llm, "--data", data, "--output", tmp_path / "labelled"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, batches=1)
        assert run(*options) == 130
    model = AutoModelForCausalLM.from_pretrained(llm)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(llm)
    assert run(*options) == 2
    assert "`weights` was" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "0.5"], "add --do-sample"),
        (["--split", "dev"], "no split 'dev', only"),
        (["--prompt-format", "{text}"], "has no column 'text' for the prompt"),
        (["--few-shot", "2"], "has no column 'completion' for the completion"),
        (["--chat-template", "--llm", "plain"], "has none"),
        (
            ["--max-new-tokens", "60"],
            "2 of 7 prompts are too long, the longest has 8 tokens: the LLM has 64 positions",
        ),
        (["--llm", "./nowhere"], "There is no folder './nowhere'"),
    ],
)
def test_bad_options_are_one_line(folders, data, tmp_path, capsys, options, message):
    options = [folders.get(option, option) for option in options]
    llm = folders["plain"] if "60" in options else folders["chat"]
    assert run("--llm", llm, "--data", data, "--output", tmp_path / "labelled", *options) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]  # nothing is left of it


def test_an_output_that_exists_is_refused_before_anything_is_read(folders, data, tmp_path, capsys):
    (tmp_path / "labelled").mkdir()
    assert run("--llm", "./nowhere", "--data", data, "--output", f"{tmp_path / 'labelled'}/") == 2
    assert "labelled exists; delete it or choose another name" in capsys.readouterr().err


def test_an_empty_prompt_is_refused(folders, tmp_path, capsys):
    Dataset.from_dict({"prompt": ["w1", " "]}).save_to_disk(tmp_path / "data")
    assert run("--llm", folders["chat"], "--data", tmp_path / "data", "--output", tmp_path / "labelled") == 2
    assert "row 1: the prompt is empty" in capsys.readouterr().err


def test_instructions_and_chats_do_not_mix(folders, tmp_path, capsys):
    Dataset.from_dict({"prompt": [[{"role": "user", "content": "w1"}]]}).save_to_disk(tmp_path / "data")
    options = ["--data", tmp_path / "data", "--output", tmp_path / "labelled"]
    assert run("--llm", folders["chat"], *options, "--instruction", "w2") == 2
    assert "for prompts that are strings, not chats" in capsys.readouterr().err
    assert run("--llm", folders["plain"], *options) == 2
    assert "there is no chat template to read them with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["w1", "w2"], "Row 0: the `prompt` must be text or a list of messages"),
        ([{"role": "user", "content": None}], "a message of the `prompt` lacks a `role` or text"),
        ([{"role": "user", "content": ""}], "row 0: the prompt is empty"),
    ],
)
def test_chats_that_are_none_are_refused(prompt, message, folders, tmp_path, capsys):
    Dataset.from_dict({"prompt": [prompt]}).save_to_disk(tmp_path / "data")
    assert run("--llm", folders["chat"], "--data", tmp_path / "data", "--output", tmp_path / "labelled") == 2
    assert message in capsys.readouterr().err


def test_rows_are_labelled_once(folders, data, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    options = ["--llm", folders["chat"], "--output", tmp_path / "labelled"]
    for source, splits in ((data, ["train", "train"]), (file, ["all", "train"])):
        assert run(*options, "--data", source, "--split", *splits) == 2
        assert f"rows of {', '.join(splits)} would be labelled twice" in capsys.readouterr().err
