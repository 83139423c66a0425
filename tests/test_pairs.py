"""Where pairs come from, how their texts are made, and what is said of data that will not do."""

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict

from llm2slm.data.pairs import format_of_text, hash_texts, load_pairs, recorded_source

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}", "name": {"de": f"n{i}"}} for i in range(10)]


@pytest.fixture
def folder(tmp_path):
    data = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])})
    data.save_to_disk(tmp_path / "data")
    return str(tmp_path / "data")


def test_a_split_of_a_folder_is_read_as_it_is(folder):
    pairs = load_pairs(folder, "test")
    assert pairs.to_list() == [{"prompt": "p0", "completion": "c0"}, {"prompt": "p1", "completion": "c1"}]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_a_file_is_the_split_train(suffix, tmp_path):
    flat, path = Dataset.from_list(ROWS).remove_columns("name"), tmp_path / f"pairs.{suffix}"
    {"csv": flat.to_csv, "parquet": flat.to_parquet}.get(suffix, flat.to_json)(path)
    assert load_pairs(path, "train").to_list() == flat.to_list()
    assert load_pairs(path, "train[:3]").to_list() == flat.to_list()[:3]
    with pytest.raises(ValueError, match="split.*test"):
        load_pairs(path, "test")


def test_a_folder_of_one_data_set_is_the_split_train(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert len(load_pairs(tmp_path / "one", "train")) == 10
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        load_pairs(tmp_path / "one", "test")


def test_formats_make_texts_of_columns(folder):
    pairs = load_pairs(folder, "test", "{prompt} to {name[de]}:\n", "{completion}.")
    assert pairs[1] == {"prompt": "p1 to n1:\n", "completion": "c1."}


def test_a_part_is_evenly_spaced_over_the_split(folder):
    assert load_pairs(folder, "train", max_examples=4)["prompt"][:] == ["p0", "p2", "p5", "p7"]
    assert len(load_pairs(folder, "train", max_examples=99)) == 10


def test_chats_are_kept(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "hello"}],
    }
    Dataset.from_list([row]).save_to_disk(tmp_path / "chats")
    assert load_pairs(tmp_path / "chats", "train").to_list() == [row]
    with pytest.raises(ValueError, match="takes text from the column 'prompt'"):
        load_pairs(tmp_path / "chats", "train", prompt_format="{prompt}")


def test_the_fingerprint_depends_on_the_texts_and_nothing_else(folder, tmp_path):
    pairs = load_pairs(folder, "train")
    assert hash_texts(pairs) == hash_texts(Dataset.from_list(pairs.to_list()))
    assert hash_texts(pairs) != hash_texts(pairs.select(range(9)))
    assert hash_texts(pairs) != hash_texts(pairs.select([1, 0, *range(2, 10)]))
    assert hash_texts(pairs) != hash_texts(load_pairs(folder, "train", "{prompt}\n"))
    moved = Dataset.from_dict({"prompt": ["ab"], "completion": ["c"]})
    assert hash_texts(moved) != hash_texts(Dataset.from_dict({"prompt": ["a"], "completion": ["bc"]}))
    assert len(hash_texts(pairs)) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, r"no split 'valid', only \['train', 'test'\]"),
        ({"prompt_format": "{text}"}, "no column 'text' for the prompt, only"),
        ({"completion_format": "{name[fr]}"}, "row 0: `completion_format` is .* there is no 'fr'"),
        ({"prompt_format": "Say it."}, "must name columns in braces"),
        ({"prompt_format": "{}"}, "must name columns in braces"),
        ({"prompt_format": "{prompt"}, "`prompt_format` is '{prompt'"),
    ],
)
def test_what_the_data_lacks_is_said(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(folder, **{"split": "test", **arguments})


@pytest.mark.parametrize("value", [None, 3])
def test_what_is_no_text_is_refused(value, tmp_path):
    Dataset.from_dict({"prompt": ["a", "b"], "completion": [value, value]}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=f"row 0: the column 'completion' must be a string .* got {value}"):
        load_pairs(tmp_path / "data", "train")


def test_a_missing_value_is_not_the_text_none(tmp_path):
    Dataset.from_dict({"prompt": ["a"], "completion": [None]}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="takes text from the column 'completion', got None"):
        load_pairs(tmp_path / "data", "train", completion_format="{completion}!")


def test_no_rows_are_refused(tmp_path):
    none = Dataset.from_list(ROWS).filter(lambda row: False)
    DatasetDict({"train": none}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="'train' of '.*data' has no rows"):
        load_pairs(tmp_path / "data", "train")
    (tmp_path / "none.csv").write_text("prompt,completion\n", encoding="utf-8")
    with pytest.raises(ValueError, match="none.csv', split 'train': .*no data"):
        load_pairs(tmp_path / "none.csv", "train")


def test_what_is_no_data_set_is_said(tmp_path, monkeypatch):
    (tmp_path / "cut.jsonl").write_text('{"prompt": "a", "comp', encoding="utf-8")
    (tmp_path / "notes.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match="cut.jsonl' cannot be read"):
        load_pairs(tmp_path / "cut.jsonl", "train")
    with pytest.raises(ValueError, match="must end in one of .json"):
        load_pairs(tmp_path / "notes.txt", "train")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_pairs(tmp_path / "none.json", "train")
    with pytest.raises(FileNotFoundError, match="not one that `save_to_disk` wrote"):
        load_pairs(tmp_path, "train")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="no data set on the Hub of the name 'user/none:de'"):
        load_pairs("user/none:de", "train")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("{prompt}", None),
        ("{prompt}\n", "{prompt}\n"),
        ("summarize: {article}", "summarize: {prompt}"),
        ("{translation[en]}", None),
        ("{instruction} {input}", None),
        ("{text!r}", None),
        ("{{json}}: {text} {{}}", "{{json}}: {prompt} {{}}"),
    ],
)
def test_a_format_of_one_column_is_one_of_a_text(given, expected):
    assert format_of_text(given) == expected


def test_a_place_is_recorded_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    assert recorded_source("data/mine") == "./data/mine"
    assert recorded_source("./data/mine") == "./data/mine"
    assert recorded_source(str(tmp_path)) == str(tmp_path)
    assert recorded_source("someone/theirs") == "someone/theirs"
