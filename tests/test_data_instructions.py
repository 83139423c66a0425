"""The data set of instructions that `training/build_instructions.py` builds, here of made-up single tasks."""

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import build_instructions  # noqa: E402
from build_instructions import HELD_OUT, PHRASINGS  # noqa: E402

TASKS = list(PHRASINGS)
SIZES = {"train": 300, "validation": 20, "test": 30}


def sentence(generator, length=9):
    return " ".join(f"word{generator.randrange(1000)}" for _ in range(length))


def rows(generator, number):
    return [{"prompt": sentence(generator), "completion": sentence(generator), "verse": "x"} for _ in range(number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of which `translate-en-fr` is the smallest, and shares texts with held-out ones of other tasks."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)
    splits = {task: {split: rows(generator, number) for split, number in SIZES.items()} for task in TASKS}
    french, summaries = splits["translate-en-fr"], splits["summarize"]
    del french["train"][250:]
    shared = summaries["test"][0]["prompt"].split()[1:]  # eight words
    french["train"][0]["prompt"] = " ".join(["An", *shared]).title() + "!"
    french["train"][1]["completion"] = summaries["validation"][0]["completion"]
    french["train"][2]["prompt"] = " ".join([*shared[1:], "end", "of", "it"])  # seven
    french["validation"][0]["completion"] = summaries["test"][1]["prompt"]
    french["test"][0]["prompt"] = summaries["test"][2]["prompt"]
    for task, own in splits.items():
        DatasetDict({split: Dataset.from_list(texts) for split, texts in own.items()}).save_to_disk(folder / task)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return build_instructions.build(folder)


def source(folder, task, split):
    return load_from_disk(str(folder / task))[split]


def texts_of(rows):
    """The texts that were asked about, without what asks."""
    asked = zip(rows["prompt"], rows["phrasing"], strict=True)
    found = []
    for prompt, phrasing in asked:
        before, after = phrasing.split("{text}")
        assert prompt.startswith(before) and prompt.endswith(after)
        found.append(prompt[len(before) : len(prompt) - len(after)])
    return found


def of_task(rows, task):
    return rows.filter(lambda row: row["task"] == task)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_five_phrasings_and_two_others_held_out(task):
    learned, held_out = set(PHRASINGS[task]), set(HELD_OUT[task])
    assert len(learned) >= 5 and len(held_out) >= 2 and not learned & held_out
    for phrasing in learned | held_out:
        assert phrasing.count("{text}") == 1 and "{language}" not in phrasing
        words = phrasing.lower().replace("{text}", "")
        named = [language for language in ("italian", "french") if language in words]
        assert named == {"translate-en-it": ["italian"], "translate-en-fr": ["french"]}.get(task, [])


def test_no_phrasing_asks_for_two_tasks():
    phrasings = [phrasing for group in (PHRASINGS, HELD_OUT) for own in group.values() for phrasing in own]
    assert len(phrasings) == len(set(phrasings))


def test_columns_and_sizes(data):
    assert {split: dataset.column_names for split, dataset in data.items()} == {
        split: ["prompt", "completion", "task", "phrasing"]
        for split in ("train", "validation", "test", "test_known_phrasings")
    }
    assert Counter(data["train"]["task"]) == dict.fromkeys(TASKS, 248)  # two of the smallest share a held-out text
    assert Counter(data["validation"]["task"]) == dict.fromkeys(TASKS, 19)
    assert Counter(data["test"]["task"]) == dict.fromkeys(TASKS, 30)


@pytest.mark.parametrize("split", ["test", "test_known_phrasings"])
@pytest.mark.parametrize("task", TASKS)
def test_test_pairs_are_those_of_the_task_in_its_order(task, split, data, folder):
    own, test = of_task(data[split], task), source(folder, task, "test")
    assert texts_of(own) == test["prompt"][:]
    assert own["completion"][:] == test["completion"][:]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("task", TASKS)
def test_pairs_stay_in_their_split(task, split, data, folder):
    own, pairs = of_task(data[split], task), source(folder, task, split)
    known = set(zip(pairs["prompt"], pairs["completion"], strict=True))
    assert known >= set(zip(texts_of(own), own["completion"], strict=True))


def test_texts_that_are_held_out_for_another_task_are_not_learned_from(data, folder):
    for split, dropped, kept in (("train", [0, 1], 2), ("validation", [0], 1)):
        texts = texts_of(of_task(data[split], "translate-en-fr"))
        pairs = source(folder, "translate-en-fr", split)["prompt"][:]
        assert not {pairs[i] for i in dropped} & set(texts)
        assert pairs[kept] in texts


def test_each_split_is_asked_for_in_its_own_phrasings(data):
    for split, phrasings in (
        ("train", PHRASINGS),
        ("validation", PHRASINGS),
        ("test", HELD_OUT),
        ("test_known_phrasings", PHRASINGS),
    ):
        for task in TASKS:
            assert set(of_task(data[split], task)["phrasing"]) <= set(phrasings[task])
    for task in TASKS:
        times = Counter(of_task(data["train"], task)["phrasing"])
        assert times.keys() == set(PHRASINGS[task]) and min(times.values()) > 248 / len(times) / 2


def test_a_texts_phrasing_depends_on_nothing_but_task_and_text(data, folder):
    smaller = build_instructions.build(folder, pairs_per_task=60)
    assert Counter(smaller["train"]["task"]) == dict.fromkeys(TASKS, 60)
    assert smaller["test"][:] == data["test"][:]
    for task in TASKS:
        one = source(folder, task, "train").select([7])
        (alone,) = build_instructions.ask(one, task, PHRASINGS[task])
        (beside,) = [
            row
            for row in build_instructions.ask(source(folder, task, "train"), task, PHRASINGS[task])
            if one["prompt"][0] in row["prompt"]
        ]
        assert alone == beside


def test_main_writes_the_data_set_and_says_its_sizes(data, folder, tmp_path, capsys):
    build_instructions.main(["--data", str(folder), "--output", str(tmp_path / "instruct")])
    assert "| translate-en-fr | 250 > 248 > 248 | 20 > 19 > 19 | 30 > 30 > 30 |" in capsys.readouterr().out
    saved = load_from_disk(str(tmp_path / "instruct"))
    assert {split: saved[split][:] for split in saved} == {split: data[split][:] for split in data}


@pytest.mark.parametrize("number", ["0", "249"])
def test_more_pairs_than_there_are_are_refused(number, folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_instructions.main(
            ["--data", str(folder), "--output", str(tmp_path / "instruct"), "--pairs-per-task", number]
        )
    assert f"--pairs-per-task must be from 1 to 248, got {number}" in capsys.readouterr().err
    assert not (tmp_path / "instruct").exists()


def test_a_missing_task_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_instructions.main(["--data", str(tmp_path), "--output", str(tmp_path / "instruct")])
    assert f"There is no {tmp_path / 'simplify'}: build it first" in capsys.readouterr().err
