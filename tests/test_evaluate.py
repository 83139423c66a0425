"""`llm2slm evaluate` on each kind of model, the probe of shuffled states, tables of reports, and bad input."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pack_texts
import pytest
import torch
from conftest import build_llm, build_llm_tokenizer, build_model, build_slm, build_slm_tokenizer
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.cli import main as cli
from llm2slm.data.collator import DataCollatorForLLM2SLM
from llm2slm.data.pairs import hash_texts, load_pairs, part_sizes
from llm2slm.evaluation.reports import describe_increase, read_report, score_table
from llm2slm.evaluation.shuffled_states import shuffle_among_like, states_of_others
from llm2slm.language_models import EndAtString, cut_at, few_shot_prompts, load_model
from llm2slm.loading_llm2slm import load_slm

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w3 w3 w7", "w2 w1", "w20 w21 w22"]
COMPLETIONS = ["w3 w2", "a b c", "w9", "w3 w7 w7", "w1 w2", "w22"]
KINDS = ["llm2slm_llama", "llm2slm_t5", "causal", "seq2seq", "adapter"]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    test = Dataset.from_dict({"prompt": PROMPTS, "completion": COMPLETIONS})
    train = Dataset.from_dict({"prompt": ["w10 w11", "w12", "w13 w14"], "completion": ["w11", "w12 w12", "w14 w13"]})
    folder = tmp_path_factory.mktemp("data") / "pairs"
    DatasetDict({"train": train, "test": test}).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """One model of each kind, and the LLM they are made of."""
    root = tmp_path_factory.mktemp("models")
    llm, llm_tokenizer, slm_tokenizer = build_llm("llama"), build_llm_tokenizer(), build_slm_tokenizer()
    llm.generation_config.update(do_sample=True, temperature=0.3, top_k=5)  # a checkpoint may say so; it is not asked
    llm.save_pretrained(root / "llm")
    llm_tokenizer.save_pretrained(root / "llm")
    for kind, slm in (("causal", "llama"), ("seq2seq", "t5")):
        build_slm(slm).save_pretrained(root / kind)
        slm_tokenizer.save_pretrained(root / kind)
        model = build_model(str(root / "llm"), slm)
        model.save_pretrained(root / f"llm2slm_{slm}")
        LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer).save_pretrained(root / f"llm2slm_{slm}")
    save_adapter(load_slm(str(root / "llm")), root / "adapter", target_modules="all-linear", task_type="CAUSAL_LM")
    llm_tokenizer.save_pretrained(root / "adapter")
    return {path.name: str(path) for path in root.iterdir()}


def save_adapter(model, folder, **kwargs):
    torch.manual_seed(7)
    adapted = get_peft_model(model, LoraConfig(r=4, **kwargs))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(folder)


def evaluate(*options) -> None:
    assert cli.main(["evaluate", "--batch-size", "4", "--max-new-tokens", str(NEW_TOKENS), *map(str, options)]) is None


def read(path: Path) -> tuple[dict, list[dict]]:
    lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(path.read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def assert_one_line_error(capsys, options: list, *fragments: str):
    code = cli.main(["evaluate", *map(str, options)])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and "Traceback" not in captured.err
    *_, last = captured.err.rstrip("\n").split("\n")
    assert last.startswith("llm2slm evaluate: error: "), captured.err
    for fragment in fragments:
        assert fragment in last


# ----------------------------------------------------------------------------------------- what must come out, by hand
def load_by_hand(kind, folders):
    """The model as its users load it, and what tokenizes prompts and responses."""
    if kind.startswith("llm2slm"):
        tokenizer = LLM2SLMTokenizer.from_pretrained(folders[kind])
        return LLM2SLMForConditionalGeneration.from_pretrained(folders[kind]), tokenizer.llm_tokenizer, tokenizer
    if kind == "adapter":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["llm"]), folders["adapter"])
        return model.eval(), build_llm_tokenizer(), build_llm_tokenizer()
    return load_slm(folders[kind]).eval(), build_slm_tokenizer(), build_slm_tokenizer()


def labels_of(text, kind, tokenizer) -> list[int]:
    if kind.startswith("llm2slm"):
        return tokenizer(text_target=text)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


@torch.no_grad()
def expected_loss(kind, folders) -> float:
    """One pair at a time, with the model's own loss."""
    model, prompt_tokenizer, tokenizer = load_by_hand(kind, folders)
    total, count = 0.0, 0
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids, labels = prompt_tokenizer(prompt)["input_ids"], labels_of(completion, kind, tokenizer)
        count += len(labels)
        if kind in ("causal", "adapter"):
            labels_after_prompt = torch.tensor([[-100] * len(ids) + labels])
            loss = model(input_ids=torch.tensor([ids + labels]), labels=labels_after_prompt).loss
        else:
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total += loss.item() * len(labels)
    return total / count


def expected_responses(kind, folders, **kwargs) -> tuple[list[str], int]:
    """One prompt at a time, and the number of tokens."""
    model, prompt_tokenizer, tokenizer = load_by_hand(kind, folders)
    texts, num_tokens = [], 0
    for prompt in PROMPTS:
        ids = torch.tensor([prompt_tokenizer(prompt)["input_ids"]])
        arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False}
        output = model.generate(input_ids=ids, **{**arguments, **kwargs})[0].tolist()
        if kind in ("causal", "adapter"):
            output = output[ids.shape[1] :]
        elif kind != "llm2slm_llama":
            output = output[1:]
        texts.append(tokenizer.decode(output, skip_special_tokens=True))
        num_tokens += len(output)
    return texts, num_tokens


# -------------------------------------------------------------------------------------------------- each kind's report
@pytest.mark.parametrize("kind", KINDS)
def test_report_of_each_kind_of_model(kind, folders, data, tmp_path, capsys):
    path = tmp_path / "report.json"
    evaluate("--model", folders[kind], "--data", data, "--output", path)
    report, texts = read(path)
    responses, num_tokens = expected_responses(kind, folders)
    assert texts == [
        {"prompt": prompt, "completion": completion, "response": response}
        for prompt, completion, response in zip(PROMPTS, COMPLETIONS, responses, strict=True)
    ]
    assert len(set(responses)) > 1  # a model that always writes the same would prove little
    assert report["loss"] == pytest.approx(expected_loss(kind, folders), rel=1e-4)
    assert report["system"] == kind and report["model"] == folders[kind]
    assert report["data"]["fingerprint"] == hash_texts(load_pairs(data, "test"))
    assert (report["data"]["source"], report["data"]["split"], report["data"]["examples"]) == (data, "test", 6)
    quality = ["bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"]
    assert list(report["scores"]) == [*quality, "copied_words", "repeating"]
    for score in report["scores"].values():
        assert score["low"] <= score["score"] <= score["high"] and score["signature"]
    speed = report["speed"]
    assert speed["examples_per_second"] * speed["seconds"] == pytest.approx(6) and speed["batch_size"] == 4
    assert speed["tokens_per_second"] * speed["seconds"] == pytest.approx(num_tokens)
    costs = report["costs"]  # at least the weights that are read for each token, and no more than all for all tokens
    most = 2 * costs["parameters"] * (num_tokens / 6 + max(len(prompt) for prompt in PROMPTS)) / 1e9
    assert 0 < costs["gflop_per_example"] < most
    assert {"transformers", "sacrebleu", "rouge_score"} <= set(report["versions"])
    assert {"cpu", "threads", "gpu"} <= set(report["machine"])
    if kind.startswith("llm2slm"):
        probe = report["shuffled_states"]
        assert probe["loss"] == report["loss"] != pytest.approx(probe["shuffled_loss"], rel=1e-3)
        assert probe["increase"] == pytest.approx(probe["shuffled_loss"] / probe["loss"] - 1)
    else:
        assert "shuffled_states" not in report
    table = capsys.readouterr().out
    assert f"| {kind} |" in table and f"{report['loss']:.3f}" in table


@pytest.fixture
def tasks(tmp_path) -> str:
    """Pairs of two tasks, in turn, and those of the second by themselves."""
    columns = {"prompt": PROMPTS, "completion": COMPLETIONS, "task": ["copy", "turn/it"] * 3}
    shots = {"prompt": ["w10", "w12", "w14"], "completion": ["w11", "w13", "w15"], "task": ["copy", "turn/it", "copy"]}
    test, train = Dataset.from_dict(columns), Dataset.from_dict(shots)
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "tasks")
    one = {"train": train.select([1]), "test": test.select([1, 3, 5])}
    DatasetDict(one).save_to_disk(tmp_path / "one")
    return str(tmp_path / "tasks")


@pytest.mark.parametrize("options", [[], ["--max-examples", 2]], ids=["all", "some"])
def test_each_value_of_a_column_gets_the_report_of_its_own_data_set(options, folders, tasks, tmp_path, capsys):
    model = ("--model", folders["llm2slm_llama"], *options)
    evaluate(*model, "--data", tasks, "--by", "task", "--output", tmp_path / "by.json")
    table = capsys.readouterr().out
    evaluate(*model, "--data", tmp_path / "one", "--output", tmp_path / "alone.json")
    assert sorted(path.name for path in tmp_path.glob("by*.json")) == ["by-copy.json", "by-turn-it.json"]
    (by, by_texts), (alone, alone_texts) = read(tmp_path / "by-turn-it.json"), read(tmp_path / "alone.json")
    assert by_texts == alone_texts and len(alone_texts) == (2 if options else 3)
    assert {name: by[name] for name in ("scores", "loss", "shuffled_states")} == {
        name: alone[name] for name in ("scores", "loss", "shuffled_states")
    }
    assert by["data"]["by"] == {"task": "turn/it"} and "by" not in alone["data"]
    assert by["data"]["fingerprint"] == alone["data"]["fingerprint"]
    assert "| llm2slm_llama, copy |" in table and "| llm2slm_llama, turn/it |" in table

    reports = [str(tmp_path / name) for name in ("by-turn-it.json", "alone.json")]
    assert cli.main(["evaluate", "--compare", *reports]) is None
    assert "| llm2slm_llama | +0.0 [+0.0, +0.0], p = 1.000 |" in capsys.readouterr().out


def test_stop_strings_of_the_model_end_the_responses_to_each_value(folders, tasks, tmp_path):
    def responses(model) -> list[list[str]]:
        evaluate("--model", model, "--data", tasks, "--by", "task", "--output", tmp_path / f"{Path(model).name}.json")
        texts = [read(tmp_path / f"{Path(model).name}-{value}.json")[1] for value in ("copy", "turn-it")]
        return [[row["response"] for row in rows] for rows in texts]

    whole = responses(folders["llm2slm_llama"])
    stop = sorted({max(text.split(), key=len) for texts in whole for text in texts if text})
    model = LLM2SLMForConditionalGeneration.from_pretrained(folders["llm2slm_llama"])
    model.generation_config.stop_strings = stop
    shutil.copytree(folders["llm2slm_llama"], tmp_path / "stops")
    model.generation_config.save_pretrained(tmp_path / "stops")
    ended = responses(tmp_path / "stops")
    assert ended == [[cut_at(text, stop) for text in texts] for texts in whole]
    assert all(cut != texts for cut, texts in zip(ended, whole, strict=True))


def test_each_value_of_a_column_is_shown_its_own_examples(folders, tasks, tmp_path):
    model = ("--model", folders["llm"], "--few-shot", 1)
    evaluate(*model, "--data", tasks, "--by", "task", "--output", tmp_path / "by.json")
    evaluate(*model, "--data", tmp_path / "one", "--output", tmp_path / "alone.json")
    (by, by_texts), (alone, alone_texts) = read(tmp_path / "by-turn-it.json"), read(tmp_path / "alone.json")
    assert by_texts == alone_texts and by["loss"] == alone["loss"]
    assert by["system"] == "llm, 1-shot, turn/it"


def test_columns_that_give_no_reports_are_refused(folders, tasks, tmp_path, capsys):
    options = ["--model", folders["llm"], "--data", tasks, "--output", tmp_path / "report.json", "--by"]
    assert_one_line_error(capsys, [*options, "tsk"], "no column 'tsk'", "'task'")
    (tmp_path / "report-turn-it.json").write_text("{}")
    assert_one_line_error(capsys, [*options, "task"], "report-turn-it.json exists")
    alike = Dataset.from_dict({"prompt": PROMPTS[:2], "completion": COMPLETIONS[:2], "task": ["a b", "a/b"]})
    DatasetDict({"test": alike, "train": alike.select([0])}).save_to_disk(tmp_path / "alike")
    options[3] = tmp_path / "alike"
    assert_one_line_error(capsys, [*options, "task"], "two values", "report-a-b.json")
    shown = [*options, "completion", "--few-shot", 1]
    assert_one_line_error(capsys, shown, "'train' has no pair whose completion is 'a b c'")
    assert not list(tmp_path.glob("report*.jsonl"))


@pytest.mark.parametrize("kind", ["llm2slm_t5", "causal"])
def test_beams_part_of_the_data_and_some_metrics(kind, folders, data, tmp_path):
    path = tmp_path / "report.json"
    options = ["--num-beams", 3, "--max-examples", 3, "--metrics", "chrf", "exact_match"]
    evaluate("--model", folders[kind], "--data", data, "--output", path, *options)
    report, texts = read(path)
    responses, _ = expected_responses(kind, folders, num_beams=3)
    assert [row["prompt"] for row in texts] == PROMPTS[::2]
    assert [row["response"] for row in texts] == responses[::2]
    assert list(report["scores"]) == ["chrf", "exact_match"] and report["generation"]["num_beams"] == 3
    assert report["system"] == f"{kind}, 3 beams"


def test_an_adapter_of_an_llm2slm_checkpoint(folders, data, tmp_path):
    model = LLM2SLMForConditionalGeneration.from_pretrained(folders["llm2slm_llama"])
    save_adapter(model, tmp_path / "lora", target_modules=r"slm\..*\.(q|v)_proj", modules_to_save=["projector"])
    for name, options in (("base", folders["llm2slm_llama"]), ("lora", tmp_path / "lora")):
        evaluate("--model", options, "--data", data, "--output", tmp_path / f"{name}.json")
    (base, _), (lora, _) = read(tmp_path / "base.json"), read(tmp_path / "lora.json")
    assert lora["loss"] != pytest.approx(base["loss"], rel=1e-3) and "shuffled_states" in lora


def test_an_adapters_base_is_where_the_options_or_the_training_say(folders, data, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(load_slm(folders["llm"]), adapter, target_modules="all-linear", task_type="CAUSAL_LM")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    evaluate("--model", adapter, "--llm", folders["llm"], "--data", data, "--output", tmp_path / "option.json")
    run = {"data": {"prompt_format": None}, "llm": {"name_or_path": folders["llm"], "revision": None}}
    (adapter / "run.json").write_text(json.dumps(run))
    evaluate("--model", adapter, "--data", data, "--output", tmp_path / "training.json")
    (option, texts), (training, same_texts) = read(tmp_path / "option.json"), read(tmp_path / "training.json")
    assert option["loss"] == training["loss"] == pytest.approx(expected_loss("adapter", folders), rel=1e-4)
    assert texts == same_texts


def test_an_adapters_frozen_head_multiplies_all_rows_at_once(folders):
    model, _ = load_model(folders["adapter"], device="cpu")
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda head, states: seen.extend(states))
    model(input_ids=torch.arange(2, 14).view(2, 6), logits_to_keep=4)
    assert seen[0].is_contiguous() and not model.get_output_embeddings().weight.requires_grad


def test_a_model_may_be_that_of_a_python_package(folders, data, tmp_path, monkeypatch):
    shutil.copytree(folders["causal"], tmp_path / "packages" / "causal_in_a_package")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for model in (folders["causal"], "package:causal_in_a_package"):
        evaluate("--model", model, "--data", data, "--output", tmp_path / f"{len(model)}.json")
    (one, texts), (other, same_texts) = (read(path) for path in sorted(tmp_path.glob("*.json")))
    assert one["loss"] == other["loss"] and texts == same_texts


def test_formats_are_those_of_the_training_unless_the_options_say_others(folders, data, tmp_path):
    model = load_slm(folders["causal"])
    model.save_pretrained(tmp_path / "slm")
    build_slm_tokenizer().save_pretrained(tmp_path / "slm")
    formats = {"prompt_format": "{prompt} so", "completion_format": None}
    (tmp_path / "slm" / "run.json").write_text(json.dumps({"data": formats, "llm": None}))
    evaluate("--model", tmp_path / "slm", "--data", data, "--output", tmp_path / "a.json")
    evaluate(
        *("--model", tmp_path / "slm", "--data", data, "--output", tmp_path / "b.json"),
        *("--prompt-format", "{completion}", "--completion-format", "{prompt}"),
    )
    (a, a_texts), (b, b_texts) = read(tmp_path / "a.json"), read(tmp_path / "b.json")
    assert a["data"]["prompt_format"] == "{prompt} so" and a_texts[0]["prompt"] == "w1 w2 w3 so"
    assert (b_texts[0]["prompt"], b_texts[0]["completion"]) == ("w3 w2", "w1 w2 w3")
    assert a["data"]["fingerprint"] != b["data"]["fingerprint"]


def test_a_checkpoint_reads_prompts_in_its_form_once_whoever_brings_them_into_it(folders, data, tmp_path):
    found = {}
    for name in ("plain", "formed", "recorded"):
        shutil.copytree(folders["llm2slm_llama"], tmp_path / name)
        tokenizer = LLM2SLMTokenizer.from_pretrained(tmp_path / name)
        tokenizer.prompt_format = None if name == "plain" else "{prompt} w0"
        tokenizer.save_pretrained(tmp_path / name)
    formats = {"prompt_format": "{prompt} w0", "completion_format": None}
    (tmp_path / "recorded" / "run.json").write_text(json.dumps({"data": formats, "llm": None}))
    for name, options in (
        ("plain", ["--prompt-format", "{prompt} w0"]),
        ("formed", []),
        ("formed", ["--prompt-format", "{prompt} w0"]),
        ("recorded", []),
    ):
        output = tmp_path / f"{len(found)}.json"
        evaluate("--model", tmp_path / name, "--data", data, "--output", output, *options)
        report, texts = read(output)
        found[output] = (report["loss"], [text["response"] for text in texts])
    plain, *others = found.values()
    assert others == [plain] * 3


def test_formats_of_a_checkpoint_amid_a_training_are_those_of_the_recipe_beside_it(folders, data, tmp_path):
    run = tmp_path / "run"
    load_slm(folders["causal"]).save_pretrained(run / "checkpoint-2")
    build_slm_tokenizer().save_pretrained(run / "checkpoint-2")
    shutil.copytree(run / "checkpoint-2", run / "other")
    (run / "recipe.yaml").write_text('prompt_format: "{prompt} so"\nprompt_max_length: 3\ntruncate: true\n')
    for name, prompt, limit in (("checkpoint-2", "w1 w2 w3 so", 3), ("other", "w1 w2 w3", None)):
        output = tmp_path / f"{name}.json"
        evaluate("--model", run / name, "--data", data, "--output", output)
        report, texts = read(output)
        assert texts[0]["prompt"] == prompt and report["generation"]["prompt_max_length"] == limit


def test_prompts_are_cut_only_when_asked_for(folders, data, tmp_path):
    evaluate("--model", folders["causal"], "--data", data, "--output", tmp_path / "all.json")
    evaluate(
        *("--model", folders["causal"], "--data", data, "--output", tmp_path / "cut.json", "--prompt-max-length", 2)
    )
    (whole, _), (cut, texts) = read(tmp_path / "all.json"), read(tmp_path / "cut.json")
    model, tokenizer = load_slm(folders["causal"]).eval(), build_slm_tokenizer()
    ids = torch.tensor([tokenizer(PROMPTS[2])["input_ids"][:2]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert texts[2]["response"] == tokenizer.decode(output[0, 2:], skip_special_tokens=True)
    assert cut["loss"] != whole["loss"] and cut["generation"]["prompt_max_length"] == 2


def test_prompts_are_cut_as_in_the_training(folders, data, tmp_path):
    shutil.copytree(folders["causal"], tmp_path / "slm")
    for recipe, limit in (({"prompt_max_length": 2, "truncate": True}, 2), ({"prompt_max_length": 2}, None)):
        (tmp_path / "slm" / "run.json").write_text(json.dumps({"recipe": recipe, "data": {}, "llm": None}))
        output = tmp_path / f"{limit}.json"
        evaluate("--model", tmp_path / "slm", "--data", data, "--output", output)
        assert read(output)[0]["generation"]["prompt_max_length"] == limit


def test_a_part_of_a_file_is_refused_to_a_model_that_learned_from_other_rows_of_it(folders, tmp_path, capsys):
    shutil.copytree(folders["causal"], tmp_path / "slm")
    path = tmp_path / "pairs.csv"
    Dataset.from_list([{"prompt": f"w{i}", "completion": "a b"} for i in range(40)]).to_csv(path)
    options = ["--model", tmp_path / "slm", "--data", path]
    trained = {"recipe": {}, "data": {"source": str(path)}, "llm": None}
    (tmp_path / "slm" / "run.json").write_text(json.dumps(trained))
    test = [*options, "--output", tmp_path / "test.json"]
    assert_one_line_error(capsys, test, "are not its part 'train'", "Name the rows with --split")
    trained["data"]["more"] = {str(path): 40}  # `--more-data` takes all rows of a file
    (tmp_path / "slm" / "run.json").write_text(json.dumps({**trained, "data": {"source": "x", **trained["data"]}}))
    assert_one_line_error(capsys, test, f"learned from all of {path}", "'test' is not held out")
    del trained["data"]["more"]
    evaluate(*options, "--split", "train[:4]", "--output", tmp_path / "named.json")
    assert read(tmp_path / "named.json")[0]["data"]["parts"] is None
    trained["data"]["parts"] = sizes = part_sizes(path)
    (tmp_path / "slm" / "run.json").write_text(json.dumps(trained))
    evaluate(*test)
    report, texts = read(tmp_path / "test.json")
    assert report["data"]["parts"] == sizes and report["data"]["examples"] == sizes["test"]
    assert {row["prompt"] for row in texts} == set(load_pairs(path, "test")["prompt"])
    assert f"{sizes['test']} to test" in capsys.readouterr().out
    evaluate(*options, "--prompt-format", "Say {prompt}", "--output", tmp_path / "same.json")  # of the same column
    other = [*options, "--output", tmp_path / "other.json", "--prompt-format"]
    capsys.readouterr()
    assert_one_line_error(capsys, [*other, "{prompt} {completion}"], "by a hash of prompt;", "of completion, prompt")


@pytest.mark.parametrize(
    ("loss", "shuffled", "percent"),
    [
        (2.0, 2.5, " (+25.0%)"),
        (2.0, 1.9, " (-5.0%)"),
        (1e-6, 0.943, ""),
        (0.0, 1.0, ""),
        (1e-7, 1.5e-7, ""),
        (0.02, 8, ""),
    ],
)
def test_no_percentage_of_next_to_nothing_is_printed(loss, shuffled, percent, reports):
    assert describe_increase(loss, shuffled) == percent
    report = read_report(reports[0])
    report["shuffled_states"] = {"loss": loss, "shuffled_loss": shuffled, "increase": None}
    assert f"| {shuffled:.3f}{percent} |" in score_table([report])


def test_chats_are_read_through_the_template(folders, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "chats")
    path = tmp_path / "report.json"
    evaluate("--model", folders["llm"], "--data", tmp_path / "chats", "--split", "train", "--output", path)
    _, texts = read(path)
    model, tokenizer = load_slm(folders["llm"]).eval(), build_llm_tokenizer()
    ids = torch.tensor([tokenizer(f"user {PROMPTS[0]} assistant", add_special_tokens=False)["input_ids"]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert texts[0]["response"] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert texts[0]["prompt"] == rows[0]["prompt"] and texts[0]["completion"] == COMPLETIONS[0]


# ------------------------------------------------------------------------------------------------------------ few-shot
SHOTS = [{"prompt": "w10\n", "completion": "w11"}, {"prompt": "w12\n", "completion": "w13"}]


def test_examples_and_instruction_become_turns_of_a_chat():
    chats = few_shot_prompts(["w1\n", "w2\n"], SHOTS[:1], "Say it.", build_llm_tokenizer())
    user, assistant = (lambda text: {"role": "user", "content": text}), {"role": "assistant", "content": "w11"}
    assert chats[1] == [user("Say it.\n\nw10"), assistant, user("Say it.\n\nw2")]
    assert few_shot_prompts(["w1"], [], "Say it.", build_llm_tokenizer()) == [[user("Say it.\n\nw1")]]


def test_examples_and_instruction_become_text_without_a_chat_template():
    prompts = few_shot_prompts(["w1\n"], SHOTS, "Say it.", build_slm_tokenizer())
    assert prompts == ["Say it.\n\nw10\nw11\n\nw12\nw13\n\nw1\n"]
    assert few_shot_prompts(["w1"], SHOTS[:1], None, build_slm_tokenizer()) == ["w10\nw11\n\nw1\n"]


def test_a_pair_that_is_evaluated_is_not_shown_solved(folders, data, tmp_path, capsys):
    options = ["--model", folders["llm"], "--data", data, "--few-shot", 2, "--output", tmp_path / "report.json"]
    assert_one_line_error(capsys, [*options, "--split", "train"], "2 of the 2 solved examples", "--few-shot-split")
    assert not list(tmp_path.iterdir())


def test_few_shot_prompts_are_what_the_model_reads(folders, data, tmp_path):
    path = tmp_path / "report.json"
    evaluate("--model", folders["llm"], "--data", data, "--few-shot", 2, "--instruction", "w50", "--output", path)
    report, texts = read(path)
    assert report["system"] == "llm, 2-shot" and report["generation"]["instruction"] == "w50"
    assert texts[0]["prompt"] == PROMPTS[0]  # what is shown before is not the prompt
    model, tokenizer = load_slm(folders["llm"]).eval(), build_llm_tokenizer()
    shots = load_pairs(data, "train", max_examples=2).to_list()
    chat = few_shot_prompts(PROMPTS[:1], shots, "w50", tokenizer)[0]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert texts[0]["response"] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_without_a_chat_template_a_blank_line_ends_the_response(tmp_path):
    vocab = {token: i for i, token in enumerate(["<eos>", *pre_tokenizers.ByteLevel.alphabet(), "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "bigram")
    # A model that looks at the last token only: a line's end is followed by y, that by z, that by an empty line.
    shape = {"hidden_size": len(vocab), "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), eos_token_id=0, pad_token_id=0, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(len(vocab)))
        for token, following in (("Ċ", "y"), ("y", "z"), ("z", "ĊĊ"), ("ĊĊ", "x"), ("x", "y")):
            model.lm_head.weight[vocab[following], vocab[token]] = 1.0
    model.save_pretrained(tmp_path / "bigram")
    pairs = Dataset.from_list([{"prompt": "ab", "completion": "y"}, {"prompt": "c", "completion": "z"}])
    pairs.save_to_disk(tmp_path / "data")
    common = ["--model", tmp_path / "bigram", "--data", tmp_path / "data", "--split", "train"]
    evaluate(*common, "--instruction", "x", "--output", tmp_path / "report.json")
    report, texts = read(tmp_path / "report.json")
    assert [row["response"] for row in texts] == ["yz", "yz"]
    assert report["speed"]["tokens_per_second"] * report["speed"]["seconds"] == pytest.approx(6)  # the ends count
    # The prompt's last line end and the response's first are no empty line of the response.
    ids = torch.tensor([[vocab["x"], vocab["Ċ"], vocab["Ċ"]]])
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path / "bigram")
    assert [bool(EndAtString(fast, ["\n\n"], length)(ids, None)) for length in (1, 2)] == [True, False]


# ----------------------------------------------------------------------------------------------------- shuffled states
@pytest.mark.parametrize(
    "lengths", [[3, 3], [3, 9], [5, 5, 5], [4, 7, 4, 9, 7, 7, 2], [1, 2, 3], [8, 8, 2], [2, 3, 3, 3, 4], [*range(9)]]
)
def test_each_example_gets_anothers_states_and_each_is_given_once(lengths):
    donors = shuffle_among_like(lengths)
    assert sorted(donors) == list(range(len(lengths)))
    assert all(donor != i for i, donor in enumerate(donors))


def test_states_are_of_the_same_length_where_there_is_another():
    lengths = [4, 7, 4, 9, 7, 7, 4]
    donors = shuffle_among_like(lengths)
    assert [lengths[donors[i]] for i in (0, 2, 6)] == [4, 4, 4]
    assert sorted(lengths[donors[i]] for i in (1, 3, 4, 5)) == [7, 7, 7, 9]  # 9 is alone


def collated(prompts):
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    return DataCollatorForLLM2SLM(tokenizer)([{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts])


def test_states_of_others_are_cut_or_repeated_to_the_prompts_length():
    model = build_model("llama", "llama")
    batch, others = collated(["w1 w2 w3", "w4", "w5 w6"]), collated(["w7", "w8 w9", "w10 w11"])
    states = states_of_others(model, batch, others)
    alone = [model.encode_hidden_states(**collated([prompt]))[0] for prompt in ("w7", "w8 w9", "w10 w11")]
    torch.testing.assert_close(states[0, :4], alone[0].repeat(2, 1))  # 2 states, the end token's too, for 4 places
    torch.testing.assert_close(states[1, :2], alone[1][:2])
    torch.testing.assert_close(states[2, :3], alone[2])
    assert (states[batch["attention_mask"] == 0] == 0).all()


def test_with_add_the_llms_input_embeddings_stay_the_prompts_own():
    model = build_model("llama", "llama", fusion="add", llm_layer=[1, 2])
    batch, others = collated(["w1 w2 w3", "w4 w5 w6"]), collated(["w7 w8 w9", "w1 w1 w1"])
    own, given = model.encode_hidden_states(**batch), model.encode_hidden_states(**others)
    states, width = states_of_others(model, batch, others), model.config.llm_hidden_size
    assert model.config.prompt_layers == [1, 2, 0]
    torch.testing.assert_close(states[..., : 2 * width], given[..., : 2 * width])
    torch.testing.assert_close(states[..., 2 * width :], own[..., 2 * width :])


@pytest.mark.parametrize("shared_tokenizer", [True, False])
def test_the_probe_finds_nothing_in_a_model_that_does_not_use_its_llm(shared_tokenizer, folders, data, tmp_path):
    model = build_model(folders["llm"], "llama", fusion="add", shared_tokenizer=shared_tokenizer)
    LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer()).save_pretrained(tmp_path / "unused")
    used = copy.deepcopy(model.projector.out.weight.data)
    for name, weight in (("unused", torch.zeros_like(used)), ("used", used)):
        model.projector.out.weight.data = weight
        model.save_pretrained(tmp_path / name)
        LLM2SLMTokenizer.from_pretrained(tmp_path / "unused").save_pretrained(tmp_path / name)
        evaluate("--model", tmp_path / name, "--data", data, "--output", tmp_path / f"{name}.json")
    assert read(tmp_path / "unused.json")[0]["shuffled_states"]["increase"] == pytest.approx(0, abs=1e-6)
    assert abs(read(tmp_path / "used.json")[0]["shuffled_states"]["increase"]) > 1e-3


def test_one_example_has_no_probe(folders, data, tmp_path):
    path = tmp_path / "report.json"
    evaluate("--model", folders["llm2slm_t5"], "--data", data, "--max-examples", 1, "--output", path)
    assert "shuffled_states" not in read(path)[0]


# -------------------------------------------------------------------------------------------------------------- tables
@pytest.fixture
def reports(tmp_path) -> list[str]:
    """A bad system, a good one, and the bad one again, on 60 examples."""
    references = [f"the cat number {i} sat on mat {i % 7} today" for i in range(60)]
    responses = {
        "bad": [text.replace("cat", "dog").replace("sat on", "at") for text in references],
        "good": [text if i % 3 else text.replace("cat", "dog") for i, text in enumerate(references)],
        "same": [text.replace("cat", "dog").replace("sat on", "at") for text in references],
    }
    for system, texts in responses.items():
        scores = {name: {"score": 50.0, "low": 45.0, "high": 55.25, "signature": ""} for name in ("chrf", "bleu")}
        report = {
            "system": system,
            "data": {"fingerprint": "f", "examples": 60},
            "scores": scores,
            "loss": 1.5,
            "speed": {"examples_per_second": 12.5, "tokens_per_second": 250.0},
        }
        if system == "good":
            report["costs"] = {"parameters": 12_345_678, "gflop_per_example": 3.14159}
        (tmp_path / f"{system}.json").write_text(json.dumps(report))
        rows = [{"prompt": "p", "completion": a, "response": b} for a, b in zip(references, texts, strict=True)]
        (tmp_path / f"{system}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / f"{system}.json") for system in responses]


COSTS = ["Parameters", "GFLOP an example"]


def test_comparison_tables_have_scores_and_tests_against_the_first(reports, tmp_path, capsys):
    assert cli.main(["evaluate", "--compare", *reports, "--output", str(tmp_path / "table.md")]) is None
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == table
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["System", "BLEU", "chrF", "Loss per token", "Examples/s", "Tokens/s", *COSTS]
    assert lines[2] == ["bad", "50.0 [45.0, 55.2]", "50.0 [45.0, 55.2]", "1.500", "12.5", "250", "", ""]
    assert lines[3][-2:] == ["12.3M", "3.14"]
    assert lines[5] == ["Minus bad", "BLEU", "chrF"]
    better, same = lines[7], lines[8]
    assert better[0] == "good" and all(cell.startswith("+") and cell.endswith("p = 0.001") for cell in better[1:])
    assert same == ["same", *["+0.0 [+0.0, +0.0], p = 1.000"] * 2]


def test_one_report_is_a_table_too(reports, capsys):
    assert cli.main(["evaluate", "--compare", reports[0]]) is None
    output = capsys.readouterr().out
    assert "| bad |" in output and "Minus" not in output


def test_prompts_in_other_forms_are_still_the_same_data(reports, capsys):
    second = Path(reports[1])
    report = json.loads(second.read_text())
    second.write_text(json.dumps({**report, "data": {**report["data"], "fingerprint": "of other prompts"}}))
    assert cli.main(["evaluate", "--compare", *reports[:2]]) is None
    assert "Minus" in capsys.readouterr().out


def test_reports_that_cannot_be_compared_are_refused(reports, tmp_path, capsys):
    first, second = Path(reports[0]), Path(reports[1])
    output = tmp_path / "table.md"
    output.write_text("mine")
    assert_one_line_error(capsys, ["--compare", first, "--output", output], "table.md exists")
    assert output.read_text() == "mine"
    assert_one_line_error(capsys, ["--compare", first, "--model", "x"], "without --model")
    assert_one_line_error(capsys, ["--compare", first, tmp_path / "none.json"], "There is no file", "none.json")
    texts = second.with_suffix(".jsonl").read_text()
    second.with_suffix(".jsonl").write_text(texts.partition("\n")[2])
    assert_one_line_error(capsys, ["--compare", first, second], "59 texts", "60 examples")
    second.with_suffix(".jsonl").write_text(texts.replace("response", "answer"))
    assert_one_line_error(capsys, ["--compare", first, second], "row 1 has no response")
    second.with_suffix(".jsonl").unlink()
    assert_one_line_error(capsys, ["--compare", first, second], "no", "good.jsonl", "texts.parquet")
    rows = [json.loads(line) for line in texts.splitlines()]
    rows[7]["completion"] = "another"
    second.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_one_line_error(capsys, ["--compare", first, second], "different data")
    second.write_text(json.dumps({"systems": []}))
    assert_one_line_error(capsys, ["--compare", first, second], "not a report", "system, data")
    second.write_text("[1, 2")
    assert_one_line_error(capsys, ["--compare", first, second], "not a report")


# ---------------------------------------------------------------------------------------- packed texts, and plain text
@pytest.fixture
def packed(reports, tmp_path) -> list[str]:
    """The same reports, with their texts in the folder's Parquet file alone."""
    pack_texts.main([str(tmp_path), "--delete"])
    assert not [*tmp_path.glob("*.jsonl")]
    return reports


def test_packed_texts_come_back_byte_for_byte(reports, tmp_path):
    first = Path(reports[0]).with_suffix(".jsonl")
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    rows[3]["response"] = 'two\nlines, "quoted" \u2028 \\ \u00e9\U0001f600'
    first.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    before = {path.stem: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    pack_texts.main([str(tmp_path)])
    texts = pack_texts.read_packed(tmp_path / "texts.parquet")
    assert {name: pack_texts.to_json_lines(rows) for name, rows in texts.items()} == before
    assert {path.stem: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before


def test_packing_again_keeps_what_is_packed_and_replaces_what_is_new(packed, tmp_path):
    row = {"prompt": "p", "completion": "a", "response": "new"}
    Path(packed[1]).with_suffix(".jsonl").write_text(json.dumps(row) + "\n")
    before = pack_texts.read_packed(tmp_path / "texts.parquet")
    pack_texts.main([str(tmp_path)])
    assert pack_texts.read_packed(tmp_path / "texts.parquet") == before | {"good": [row]}


def test_what_would_not_come_back_byte_for_byte_is_not_packed(reports, tmp_path):
    path = Path(reports[0]).with_suffix(".jsonl")
    path.write_text(path.read_text().replace(": ", ":"))
    with pytest.raises(SystemExit, match="bad.jsonl would not come back"):
        pack_texts.main([str(tmp_path), "--delete"])
    assert path.exists() and not [*tmp_path.glob("texts.*")]


def test_packed_texts_compare_as_the_texts_beside_the_reports_do(reports, tmp_path, capsys):
    assert cli.main(["evaluate", "--compare", *reports]) is None
    table = capsys.readouterr().out
    pack_texts.main([str(tmp_path), "--delete"])
    capsys.readouterr()
    assert cli.main(["evaluate", "--compare", *reports]) is None
    assert capsys.readouterr().out == table and "Minus bad" in table


def test_texts_beside_a_report_come_before_the_packed_ones(packed, capsys):
    rows = [{"prompt": "p", "completion": f"c{i}", "response": "written later"} for i in range(60)]
    Path(packed[0]).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["evaluate", "--show", packed[0], "--max-examples", "1"]) is None
    assert "written later" in capsys.readouterr().out


def test_a_packed_file_that_lacks_a_report_is_said(packed, tmp_path, capsys):
    other = tmp_path / "other.json"
    shutil.copy(packed[0], other)
    assert_one_line_error(capsys, ["--compare", packed[0], other], "texts.parquet has no texts of", "'other'")
    (tmp_path / "texts.parquet").write_text("no Parquet")
    assert_one_line_error(capsys, ["--compare", *packed], "texts.parquet is not a Parquet file")


@pytest.mark.parametrize("missing, option", [("pyarrow", "--show"), ("sacrebleu", "--compare")])
def test_a_missing_extra_is_said_with_the_line_that_installs_it(missing, option, packed, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert_one_line_error(capsys, [option, *packed], "pip install 'llm-to-slm[train]'")


def test_texts_are_shown_one_system_below_another(reports, tmp_path, capsys):
    path = Path(reports[1]).with_suffix(".jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"response": "two\nlines\n"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "texts.txt"
    options = ["--show", *reports[:2], "--max-examples", "2", "--output", str(output)]
    assert cli.main(["evaluate", *options]) is None
    text = output.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    first, second = text.rstrip("\n").split("\n\n")
    bad = json.loads(Path(reports[0]).with_suffix(".jsonl").read_text().splitlines()[0])
    assert first.splitlines() == [
        "Example 1 of 60",
        "prompt     p",
        f"reference  {bad['completion']}",
        f"bad        {bad['response']}",
        "good       two",
        "           lines",
    ]
    assert second.startswith("Example 31 of 60\n")
    assert cli.main(["evaluate", "--show", reports[0]]) is None
    assert capsys.readouterr().out.count("Example ") == 60


def test_options_that_do_not_go_with_show_are_said(reports, capsys):
    assert_one_line_error(capsys, ["--show", reports[0], "--model", "x"], "--show", "without --model")
    assert_one_line_error(capsys, ["--compare", *reports, "--max-examples", 5], "--compare", "without --max-examples")
    assert_one_line_error(capsys, ["--show", reports[0], "--metrics", "chrf"], "--show", "without --metrics")
    assert_one_line_error(capsys, ["--show", reports[0], "--compare", reports[0]], "--compare and --show")


# ----------------------------------------------------------------------------------------------------------- bad input
def test_an_existing_report_is_refused_before_any_work(tmp_path, capsys):
    for name in ("report.json", "report.jsonl"):
        (tmp_path / name).write_text("mine")
        options = ["--model", "./none", "--data", "./none", "--output", tmp_path / "report.json"]
        assert_one_line_error(capsys, options, f"{name} exists")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_missing_and_contradictory_options_are_said(folders, data, tmp_path, capsys):
    output = ["--output", tmp_path / "report.json"]
    assert_one_line_error(capsys, ["--model", folders["causal"]], "Say --data and --output")
    common = ["--data", data, "--output"]
    assert_one_line_error(capsys, ["--model", folders["causal"], *common, tmp_path / "r.txt"], "end in .json")
    common = ["--data", data, *output]
    for kind, options, fragments in (
        ("causal", ["--llm", folders["llm"]], ["needs no other model"]),
        ("llm2slm_t5", ["--few-shot", 1], ["not for LLM-to-SLM"]),
        ("causal", ["--few-shot", 1, "--prompt-max-length", 3], ["would cut off the prompt"]),
        ("causal", ["--split", "validation"], ["no split 'validation'", "'test'"]),
        ("causal", ["--few-shot", 1, "--few-shot-split", "dev"], ["no split 'dev'"]),
        ("causal", ["--prompt-format", "{text}"], ["no column 'text'"]),
        ("causal", ["--max-new-tokens", 60], ["the model (", ") has 64", "--max-new-tokens"]),
        ("llm2slm_llama", ["--max-new-tokens", 60], ["the SLM (llama) has 64", "--prompt-max-length"]),
    ):
        assert_one_line_error(capsys, ["--model", folders[kind], *common, *options], *fragments)
    assert not [*tmp_path.iterdir()]


def test_what_is_no_model_is_said(folders, data, tmp_path, capsys):
    common = ["--data", data, "--output", tmp_path / "report.json"]
    assert_one_line_error(capsys, ["--model", "./none", *common], "no folder './none'")
    (tmp_path / "empty").mkdir()
    assert_one_line_error(capsys, ["--model", tmp_path / "empty", *common], "empty")
    load_slm(folders["causal"]).save_pretrained(tmp_path / "bare")
    assert_one_line_error(capsys, ["--model", tmp_path / "bare", *common], "no tokenizer", "bare")
    (tmp_path / "bare" / "run.json").write_text("{}")
    assert_one_line_error(capsys, ["--model", tmp_path / "bare", *common], "run.json is not what")


@pytest.mark.parametrize("side", ["prompt", "completion"])
def test_an_empty_side_is_refused(side, folders, tmp_path, capsys):
    rows = {"prompt": ["w1", "w2"], "completion": ["w1", "w2"]}
    rows[side][1] = " "
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    options = ["--data", tmp_path / "data", "--split", "train", "--output", tmp_path / "report.json"]
    assert_one_line_error(capsys, ["--model", folders["causal"], *options], "Row 1", side, "is empty")
