"""Where pairs come from, how their texts are made, and what is said of data that will not do."""

import random

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict

from llm2slm.data.hash_split import PARTS, normalize, split_by_position
from llm2slm.data.pairs import format_of_text, hash_texts, load_pairs, load_rows, part_sizes, recorded_source

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
def test_a_file_is_read_whole_or_in_slices(suffix, tmp_path):
    flat, path = Dataset.from_list(ROWS).remove_columns("name"), tmp_path / f"pairs.{suffix}"
    {"csv": flat.to_csv, "parquet": flat.to_parquet}.get(suffix, flat.to_json)(path)
    assert load_pairs(path, "all").to_list() == flat.to_list()
    assert load_pairs(path, "train[:3]").to_list() == flat.to_list()[:3]
    with pytest.raises(ValueError, match="no split 'dev': a file has train, validation, test and all"):
        load_pairs(path, "dev")


# ----------------------------------------------------------------------------------------------- the parts of one file
def write_csv(path, rows):
    Dataset.from_list(rows).to_csv(path)
    return str(path)


def prompts_of(path, *arguments) -> dict[str, set[str]]:
    return {part: set(load_pairs(path, part, *arguments)["prompt"]) for part in PARTS}


@pytest.fixture
def rows():
    return [{"prompt": f"What is {i} times {i}?", "completion": str(i * i) + "."} for i in range(200)]


def test_a_files_rows_are_in_one_part_each_whatever_their_order(rows, tmp_path):
    parts = prompts_of(write_csv(tmp_path / "pairs.csv", rows))
    assert set.union(*parts.values()) == {row["prompt"] for row in rows}
    assert sum(map(len, parts.values())) == 200  # no row in two
    assert min(len(parts["validation"]), len(parts["test"])) >= 10 and len(parts["train"]) >= 150
    shuffled = random.Random(0).sample(rows, len(rows))
    assert prompts_of(write_csv(tmp_path / "other.csv", shuffled)) == parts
    assert part_sizes(tmp_path / "pairs.csv") == {part: len(found) for part, found in parts.items()}


def test_prompts_of_the_same_words_are_in_one_part(rows, tmp_path):
    again = [{"prompt": row["prompt"].upper().replace("?", " ?!"), "completion": "Another."} for row in rows]
    parts = prompts_of(write_csv(tmp_path / "pairs.csv", rows + again))
    words = {part: {" ".join(normalize(prompt)) for prompt in found} for part, found in parts.items()}
    assert sum(map(len, words.values())) == 200
    assert sum(map(len, parts.values())) == 400


def test_the_parts_do_not_depend_on_the_form_of_the_prompts(rows, tmp_path):
    path = write_csv(tmp_path / "pairs.csv", [{"question": r["prompt"], "answer": r["completion"]} for r in rows])
    plain = prompts_of(path, "{question}", "{answer}")
    form = prompts_of(path, "Answer: {question}\n", "{answer}")
    assert form == {part: {f"Answer: {prompt}\n" for prompt in found} for part, found in plain.items()}
    labelled = load_rows(path, "test", prompt_format="{question}")
    assert set(labelled["question"]) == plain["test"] and labelled.column_names == ["question", "answer"]


def test_a_file_that_grows_tests_on_nothing_that_was_learned_before(tmp_path):
    rows = [{"prompt": f"w{i}", "completion": "c"} for i in range(3000)]
    sizes, learned = [], set()
    for number in (100, 300, 1000, 3000):
        parts = prompts_of(write_csv(tmp_path / f"{number}.csv", rows[:number]))
        assert not learned & parts["test"]
        learned |= parts["train"]
        sizes.append(len(parts["test"]) / number)
    assert sizes[0] == pytest.approx(0.1, abs=0.05) and sizes[-1] == pytest.approx(0.05, abs=0.02)


def test_a_prompt_of_too_many_rows_is_learned_and_three_prompts_make_three_parts():
    often = split_by_position([0.01] * 50 + [0.5 + i / 1000 for i in range(100)])
    assert set(range(50)) <= set(often["train"])
    assert {name: len(rows) for name, rows in split_by_position([0.7, 0.8, 0.9]).items()} == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }


def test_a_part_without_rows_is_refused(tmp_path):
    path = write_csv(tmp_path / "two.csv", [{"prompt": f"p{i}", "completion": "c"} for i in range(2)])
    with pytest.raises(ValueError, match=r"too few different prompts \(2 rows\) for a part 'train'"):
        load_pairs(path, "train")


def test_errors_name_the_row_of_the_file(tmp_path):
    lines = [
        f'{{"prompt": "p{i}", "completion": {"null" if i == 150 else chr(34) + "c" + chr(34)}}}' for i in range(200)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for part in PARTS:
        with pytest.raises(ValueError, match="row 150: the column 'completion'"):
            load_pairs(tmp_path / "pairs.jsonl", part)


def test_cells_of_a_csv_file_are_texts(tmp_path):
    (tmp_path / "pairs.csv").write_text("\ufeffprompt,completion\n1,None\n2,NA\n3,\n4,007\n", encoding="utf-8")
    pairs = load_pairs(tmp_path / "pairs.csv", "all")
    assert pairs["prompt"][:] == ["1", "2", "3", "4"] and pairs["completion"][:] == ["None", "NA", "", "007"]


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (["question", "answer"], "--prompt-format '{question}' --completion-format '{answer}'"),
        (["target", "id", "source"], "--prompt-format '{source}' --completion-format '{target}'"),
        (["Input", "Output", "note"], "--prompt-format '{Input}' --completion-format '{Output}'"),
        (["text", "summary", "title"], "--prompt-format '{text}' --completion-format '{summary}'"),
        (["id", "en", "it", "note"], "--prompt-format '{en}' --completion-format '{it}'"),
        (["King James", "Basic English"], "--prompt-format '{King James}' --completion-format '{Basic English}'"),
        (["prompt", "reply"], "--completion-format '{reply}'"),
        (["a", "b", "c"], "--prompt-format '{COLUMN}' --completion-format '{COLUMN}'"),
    ],
)
def test_columns_of_other_names_are_guessed(columns, options, tmp_path):
    path = write_csv(tmp_path / "pairs.csv", [dict.fromkeys(columns, "text")] * 3)
    with pytest.raises(ValueError, match="no column 'prompt|no column 'completion") as caught:
        load_pairs(path, "train")
    assert str(columns) in str(caught.value) and f"columns: {options} (" in str(caught.value)


def test_a_file_with_other_separators_is_told(tmp_path):
    (tmp_path / "pairs.csv").write_text("prompt;completion\na;b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="seem to stand between ';': in a CSV file it must be commas"):
        load_pairs(tmp_path / "pairs.csv", "train")


def test_a_translation_is_a_column_of_several_texts(tmp_path):
    Dataset.from_list([{"translation": {"de": "Tag", "en": "day"}}]).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"--prompt-format '\{translation\[de\]\}' --completion-format"):
        load_pairs(tmp_path / "data", "train")


# -------------------------------------------------------------------------------------------------------------- splits


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
    with pytest.raises(ValueError, match="takes text from 'prompt'"):
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


def test_what_is_no_text_is_refused(tmp_path):
    Dataset.from_dict({"prompt": ["a", "b"], "completion": [3, 3]}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="row 0: the column 'completion' must be a string .* got 3"):
        load_pairs(tmp_path / "data", "train")


@pytest.mark.parametrize("text_format", [None, "{completion}!", "{name[de]}!", "{missing[de]}", "{name[de]} {prompt}"])
def test_a_missing_value_is_refused_or_an_empty_text_and_not_the_text_none(text_format, tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "name": {"de": "c"}, "missing": {"de": "d"}},
        {"prompt": "a", "completion": None, "name": {"de": None}, "missing": None},
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    arguments = {"source": tmp_path / "data", "split": "train", "completion_format": text_format}
    with pytest.raises(ValueError, match="row 1: .*got None"):
        load_pairs(**arguments)
    there, missing = load_pairs(**arguments, missing_is_empty=True)["completion"][:]
    assert there and missing == ""


def test_a_missing_chat_has_no_messages(tmp_path):
    chat = [{"role": "user", "content": "a"}]
    Dataset.from_dict({"prompt": [chat, None], "completion": ["b", "c"]}).save_to_disk(tmp_path / "data")
    assert load_pairs(tmp_path / "data", "train", missing_is_empty=True)["prompt"][:] == [chat, []]


@pytest.mark.parametrize("first", ["Hello, world,Salve mondo", "a,b,c,d", "a,b,"])
def test_a_csv_whose_first_row_has_more_cells_than_names_is_refused(first, tmp_path):
    """Pandas would take the first cells as names of the rows, and move all texts."""
    (tmp_path / "pairs.csv").write_text(f"prompt,completion\n{first}\nBye,Addio\n")
    with pytest.raises(ValueError, match="more cells than the first line has names.*between double quotes"):
        load_pairs(tmp_path / "pairs.csv", "all")


def test_no_rows_are_refused(tmp_path):
    none = Dataset.from_list(ROWS).filter(lambda row: False)
    DatasetDict({"train": none}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="'train' of '.*data' has no rows"):
        load_pairs(tmp_path / "data", "train")
    (tmp_path / "none.csv").write_text("prompt,completion\n", encoding="utf-8")
    with pytest.raises(ValueError, match="none.csv', split 'all': .*no data"):
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


def test_a_data_set_that_needs_a_script_is_refused(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found old.py")

    monkeypatch.setattr("llm2slm.data.pairs.load_dataset", refuse)
    with pytest.raises(ValueError, match="'user/old': Dataset scripts are no longer supported"):
        load_pairs("user/old", "train")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("{prompt}", None),
        ("{prompt}\n", "{prompt}\n"),
        ("summarize: {article}", "summarize: {prompt}"),
        ("{translation[en]}", None),
        ("translate: {translation[en]}", "translate: {prompt}"),
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
