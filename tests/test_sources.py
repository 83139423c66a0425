"""Further data sets beside the one that is evaluated on."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import build_llm, build_llm_tokenizer, build_slm, build_slm_tokenizer
from datasets import Dataset, DatasetDict, Features, Value

from llm2slm.cli import main as cli
from llm2slm.data.pairs import load_pairs
from llm2slm.training.options import TrainOptions
from llm2slm.training.sources import WeighingCollator, add_sources, scale_weights

GOLD = [{"prompt": f"gold {i % 5} {'abc'[i % 3]}", "completion": "abcdefgh"[: 2 + i]} for i in range(6)]
LABELLED = [{"prompt": f"more {i}", "completion": "hgfedcba"[: 1 + i]} for i in range(4)]


def write(path: Path, pairs: list[dict]) -> str:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    build_llm("llama").save_pretrained(folder / "llm")
    build_llm_tokenizer().save_pretrained(folder / "llm")
    build_slm("llama").save_pretrained(folder / "slm")
    build_slm_tokenizer().save_pretrained(folder / "slm")
    write(folder / "gold.jsonl", GOLD)
    write(folder / "labelled.jsonl", LABELLED)
    return folder


@pytest.fixture
def train(files, tmp_path):
    """Does one step on all pairs at once; returns the report of the training, whose loss is that before the step."""

    def run(name: str, **changes) -> dict:
        recipe = {
            "data": str(files / "gold.jsonl"),
            "train_split": "all",
            "validation_split": "none",
            "eval_strategy": "no",
            "llm": str(files / "llm"),
            "slm": str(files / "slm"),
            "max_steps": 1,
            "logging_steps": 1,
            "per_device_train_batch_size": 16,
            "use_cpu": True,
            "disable_tqdm": True,
            "cache_dir": str(tmp_path / "features"),
            "output_dir": str(tmp_path / name),
            **changes,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert not cli.main(["train", "--config", str(tmp_path / "recipe.yaml")])
        return json.loads((tmp_path / name / "run.json").read_text())

    return run


@pytest.mark.parametrize("arm", ["llm2slm", "slm"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_each_token_counts_as_its_source_says(train, files, weight, arm):
    labelled = str(files / "labelled.jsonl")
    gold, more = train("gold", arm=arm), train("labelled", arm=arm, data=labelled)
    both = train("both", arm=arm, more_data=[labelled], **({"more_data_weight": weight} if weight != 1 else {}))
    # Each letter is a token, and so is the end.
    tokens = [sum(len(pair["completion"]) + 1 for pair in pairs) for pairs in (GOLD, LABELLED)]
    losses = [report["train"]["final_loss"] for report in (gold, more)]
    shares = tokens[0], weight * tokens[1]
    expected = sum(share * loss for share, loss in zip(shares, losses, strict=True)) / sum(shares)
    assert both["train"]["final_loss"] == pytest.approx(expected, rel=1e-4)
    assert both["train"]["final_loss"] != pytest.approx(losses[0], rel=1e-4)
    assert both["data"]["train_pairs"] == len(GOLD) + len(LABELLED)
    assert list(both["data"]["more"].values()) == [len(LABELLED)]


def test_prompts_that_are_evaluated_on_are_left_out(train, files, tmp_path, capsys):
    same = [f"  {GOLD[4]['prompt'].upper()}. ", GOLD[5]["prompt"]]  # the same words, and the same
    more = write(tmp_path / "more.jsonl", [*LABELLED, *({"prompt": prompt, "completion": "x"} for prompt in same)])
    splits = {"train_split": "train[:4]", "validation_split": "train[4:]", "eval_strategy": "steps", "eval_steps": 1}
    report = train("run", **splits, more_data=[more])
    assert "2 of 6 prompts are evaluated on, and are left out" in capsys.readouterr().out
    assert list(report["data"]["more"].values()) == [4] and report["data"]["train_pairs"] == 8


def test_a_test_split_that_cannot_be_read_stops_the_training(tmp_path):
    rows = Dataset.from_list(GOLD)
    DatasetDict({"train": rows, "test": rows.rename_column("prompt", "other")}).save_to_disk(tmp_path / "data")
    more = write(tmp_path / "more.jsonl", LABELLED)
    options = TrainOptions(data=str(tmp_path / "data"), llm="llm", slm="slm", more_data=[more])
    with pytest.raises(ValueError, match=r"split 'test'.*prompt"):
        add_sources(options, None, rows)
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "without")
    options = TrainOptions(data=str(tmp_path / "without"), llm="llm", slm="slm", more_data=[more])
    assert len(add_sources(options, None, rows)[0]) == len(GOLD) + len(LABELLED)


@pytest.mark.parametrize("chosen", [{"max_validation_pairs": 1}, {"validation_split": "none", "eval_strategy": "no"}])
def test_held_out_prompts_are_never_learned_however_few_are_evaluated_on(train, tmp_path, chosen):
    rows = Dataset.from_list(GOLD)
    splits = {"train": rows.select([0, 1]), "validation": rows.select([2, 3]), "test": rows.select([4])}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    more = write(tmp_path / "more.jsonl", [*LABELLED, *GOLD[2:5]])
    changes = {"validation_split": "validation", "eval_strategy": "steps", "eval_steps": 1, **chosen}
    report = train("run", data=str(tmp_path / "data"), train_split="train", **changes, more_data=[more])
    assert list(report["data"]["more"].values()) == [len(LABELLED)]


def test_labels_are_read_whatever_the_format_of_the_responses(train, files, tmp_path, capsys):
    def labelled(name: str, pairs: list[dict]) -> str:
        Dataset.from_list([{"answer": "zzz", **pair} for pair in pairs]).save_to_disk(tmp_path / name)
        (tmp_path / name / "label.json").write_text('{"labelled_by_a_pair": false}')
        return str(tmp_path / name)

    first, more = labelled("first", GOLD), labelled("more", LABELLED)
    formats = {"completion_format": "{answer}"}
    ours = train("run", data=first, train_split="train", more_data=[more], **formats)
    assert f"{more}: `llm2slm label` wrote its responses" in capsys.readouterr().out
    expected = train("expected", more_data=[str(files / "labelled.jsonl")])
    assert ours["train"]["final_loss"] == pytest.approx(expected["train"]["final_loss"], rel=1e-5)
    assert load_pairs(first, "train", completion_format="{answer}")["completion"][:] == [p["completion"] for p in GOLD]


def test_texts_of_another_width_are_learned_beside_each_other(train, tmp_path):
    wide = Features(dict.fromkeys(["prompt", "completion"], Value("large_string")))
    Dataset.from_list(LABELLED, features=wide).to_parquet(tmp_path / "more.parquet")
    report = train("run", more_data=[str(tmp_path / "more.parquet")])
    assert report["data"]["train_pairs"] == len(GOLD) + len(LABELLED)


def test_prompts_that_its_own_pairs_teach_are_kept(train, tmp_path, capsys):
    gold = write(tmp_path / "gold.jsonl", [{"prompt": f"gold {i}", "completion": "a"} for i in range(40)])
    more = write(tmp_path / "more.jsonl", [{"prompt": f"gold {i}", "completion": "b"} for i in range(40)])
    report = train("run", data=gold, more_data=[more])  # all rows are learned from: nothing is held out
    assert report["data"]["train_pairs"] == 80 and "left out" not in capsys.readouterr().out


def test_chats_of_other_keys_and_texts_as_answers_are_learned_beside_each_other(tmp_path):
    def chat(number: int, **more) -> list[dict]:
        return [{"role": "user", "content": f"w{number}", **more}]

    first = [{"prompt": chat(i), "completion": "a"} for i in range(3)]
    more = [{"prompt": chat(9, name="x"), "completion": [{"role": "assistant", "content": "b"}]}]
    for name, own, others in (("one", first, more), ("two", more, first)):
        for part, rows in (("own", own), ("others", others)):
            Dataset.from_list(rows).save_to_disk(tmp_path / name / part)
        sources = {"data": str(tmp_path / name / "own"), "more_data": [str(tmp_path / name / "others")]}
        options = TrainOptions(llm="llm", slm="slm", **sources)
        pairs, _ = add_sources(options, None, load_pairs(options.data, "train"))
        assert pairs.to_list()[: len(own)] == [{**row, "token_weight": 1.0} for row in own]
        *_, last = pairs.to_list()
        assert last["prompt"][0]["content"] == others[-1]["prompt"][0]["content"]
        assert last["completion"] == ("b" if name == "one" else [{"role": "assistant", "content": "a"}])


def test_a_teacher_reads_both_sources(train, files):
    own = {"llm": str(files / "slm"), "teacher": str(files / "slm"), "teacher_top_k": 3}
    report = train("run", **own, slm="fresh", slm_tokenizer="llm", hidden_size=32, num_hidden_layers=1,
                   more_data=[str(files / "labelled.jsonl")])  # fmt: skip
    assert report["teacher"]["responses"] == len(GOLD) + len(LABELLED)


def test_weights_have_the_mean_one_over_tokens_and_follow_the_labels():
    rows = Dataset.from_dict({"labels": [[1, 2, 3], [-100, 4]], "token_weight": [1.0, 0.2], "n": [0, 1]})
    weights = scale_weights(rows)["token_weight"][:]
    assert 3 * weights[0] + weights[1] == pytest.approx(4) and weights[1] == pytest.approx(0.2 * weights[0])
    batch = WeighingCollator(lambda rows: {})([{"labels": [1, 2, 3], "token_weight": 2.0}, rows[1]])
    assert batch["token_weights"].tolist() == pytest.approx([2, 2, 2, 0.2])
    assert WeighingCollator(lambda rows: {})([{"labels": [1]}]) == {}


def test_what_does_not_go_together_is_refused(train, files, tmp_path, capsys):
    chats = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}]
    Dataset.from_list(LABELLED).save_to_disk(tmp_path / "labelled")
    (tmp_path / "labelled" / "label.json").write_text('{"labelled_by_a_pair": true}')
    recipe = {"data": str(files / "gold.jsonl"), "llm": str(files / "llm"), "slm": str(files / "slm")}
    for more, message in [
        (write(tmp_path / "chats.jsonl", chats), "must both have texts, or both chats"),
        (str(tmp_path / "labelled"), "were written by an LLM-to-SLM pair"),
        (str(tmp_path / "nothing.jsonl"), "nothing.jsonl"),
    ]:
        options = {**recipe, "train_split": "all", "validation_split": "none", "more_data": [more]}
        options |= {"output_dir": str(tmp_path / "run"), "eval_strategy": "no", "use_cpu": True}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
        assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml")])
        assert message in capsys.readouterr().err
    more = str(files / "labelled.jsonl")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**options, "more_data": [more]}))
    assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml"), "--label-smoothing-factor", "0.1"])
    assert "leave out `label_smoothing_factor`" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`more_data_weight` must be positive, got 0"):
        TrainOptions(**recipe, more_data=["b"], more_data_weight=0.0)
    with pytest.raises(ValueError, match="say which, `more_data`"):
        TrainOptions(**recipe, more_data_weight=0.5)
