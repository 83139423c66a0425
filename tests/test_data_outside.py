"""The test sets that `training/build_outside.py` builds of other text, here of made-up packages."""

import shutil
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import build_outside  # noqa: E402
from splits import RUN, runs  # noqa: E402

WORDNET = """\
  1 This software and database is being provided to you, "he saw it in the licence of the thing"
00001740 29 v 01 breathe 0 000 | draw air in; "I can breathe better when the air is clean"; "a budget deficit"
00001741 29 v 01 ask 0 000 | put a question; "Who will pay for all of this bread?"; "milk in a heavy lidded mug"
00001742 29 v 01 say 0 000 | express; "They said so to the man from Florence."; "He ran"
"""
PAGE = """\
<page xmlns="http://projectmallard.org/1.0/" xmlns:its="http://www.w3.org/2005/11/its" id="tea">
  <info><credit><name>Somebody who wrote all of this.</name></credit><desc>{desc}</desc></info>
  <title>{title}</title>
  <p>{first}</p>
  <media its:translate="no"><p>{picture}</p></media>
  <steps><item><p>{step}</p></item><item><p>See <link xref="cup"/> for cups of all kinds.</p></item></steps>
</page>
"""
ENGLISH = {
    "desc": "Set the kettle so that it rings.",
    "title": "Why does my kettle not ring?",
    "first": "Your kettle rings when the water boils, unless it was told\n to be silent at all hours of the night.",
    "picture": "This is a picture of a kettle.",
    "step": "Press <keyseq><key>Ctrl</key><key>K</key></keyseq> or choose "
    "<guiseq><gui>Tea</gui><gui>Ring</gui></guiseq>.",
}
ITALIAN = {
    "desc": "Set the kettle so that it rings.",  # not translated
    "title": "Perché il mio bollitore non suona mai?",
    "first": "Il bollitore suona quando l’acqua bolle, se di notte non deve stare in silenzio.",
    "picture": "Questa è una figura di un bollitore.",
    "step": "Premere <keyseq><key>Ctrl</key><key>K</key></keyseq> o scegliere "
    "<guiseq><gui>Tè</gui><gui>Suona</gui></guiseq>.",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The unpacked packages, which `build` finds."""
    folder = tmp_path / "unpacked"
    wordnet, pages = folder / "usr/share/wordnet", folder / "usr/share/help"
    wordnet.mkdir(parents=True)
    (wordnet / "data.verb").write_text(WORDNET)
    for language, texts in (("C", ENGLISH), ("it", ITALIAN)):
        (pages / language / "help").mkdir(parents=True)
        (pages / language / "help" / "tea.page").write_text(PAGE.format(**texts), encoding="utf-8")

    def unpack(packages, names, output):
        shutil.copytree(folder, output, dirs_exist_ok=True)
        return [f"{name} 1" for name in names]

    monkeypatch.setattr(build_outside, "unpack", unpack)
    return folder


def save(path: Path, **splits) -> Path:
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(str(path))
    return path


def test_examples_that_begin_as_sentences_become_sentences(packages):
    assert [row["prompt"] for row in build_outside.read_sentences(packages)] == [
        "I can breathe better when the air is clean.",
        "Who will pay for all of this bread?",
        "They said so to the man from Florence.",
    ]


def test_texts_stand_beside_their_translations_if_they_have_one(packages):
    assert build_outside.translation_pairs(packages, "it") == [
        {
            "prompt": ENGLISH["title"],
            "completion": ITALIAN["title"],
            "page": "help/tea.page",
        },
        {
            "prompt": " ".join(ENGLISH["first"].split()),
            "completion": "Il bollitore suona quando l'acqua bolle, se di notte non deve stare in silenzio.",
            "page": "help/tea.page",
        },
        {
            "prompt": "Press Ctrl+K or choose Tea > Ring.",
            "completion": "Premere Ctrl+K o scegliere Tè > Suona.",
            "page": "help/tea.page",
        },
    ]


def test_a_page_stands_beside_the_line_that_is_said_of_it(packages):
    (row,) = build_outside.summary_pairs(packages)
    assert row["completion"] == "Set the kettle so that it rings"
    assert row["prompt"].startswith("Your kettle rings") and row["prompt"].endswith("choose Tea > Ring.")
    assert "picture" not in row["prompt"] and "cups" not in row["prompt"]


def test_no_text_shares_eight_words_in_a_row_with_what_is_learned_from(packages, tmp_path):
    one, other = build_outside.translation_pairs(packages, "it")[1:]
    shares = {"prompt": "Nothing alike.", "completion": "so " + " ".join(one["completion"].split()[-8:])}
    learned = save(tmp_path / "learned", train=[{"prompt": "One.", "completion": "Uno."}], validation=[shares])
    found = build_outside.build(tmp_path, "translate", "it", [learned])["test"]["prompt"][:]
    assert one["prompt"] not in found and other["prompt"] in found


def test_paragraphs_that_are_not_tested_are_prompts_to_label(packages, tmp_path):
    learned = save(tmp_path / "learned", train=[{"prompt": "One.", "completion": "Uno."}])
    data = build_outside.build(tmp_path, "translate", "it", [learned])
    assert data["train"].column_names == ["prompt"]
    assert data["train"]["prompt"][:] == [ENGLISH["desc"]]  # all others are tested
    text = ENGLISH["desc"].replace("rings", "sings")  # near-identical to what is tested now
    for language, texts, desc in (("C", ENGLISH, text), ("it", ITALIAN, "Così il bollitore canta molto forte.")):
        path = packages / "usr/share/help" / language / "help" / "more.page"
        path.write_text(PAGE.format(**texts | {"desc": desc}), encoding="utf-8")
    data = build_outside.build(tmp_path, "translate", "it", [learned])
    assert text in data["test"]["prompt"][:] and len(data["train"]) == 0


def test_sentences_that_are_not_tested_share_no_run_with_those_that_are(monkeypatch):
    monkeypatch.setattr(build_outside, "NUM_QUESTIONS", 3)
    monkeypatch.setattr(build_outside, "NUM_STATEMENTS", 4)
    rows = [{"prompt": f"{w} is the {w} of a {w} and no other thing{end}"} for w in "abcdefghij" for end in ".?"]
    data = build_outside.split_sentences(rows)
    tested = data["test"]["prompt"][:]
    assert [text[-1] for text in tested] == ["?"] * 3 + ["."] * 4
    known = {run for text in tested for run in runs(text, RUN)}
    assert len(data["train"]) == sum(row["prompt"][0] not in {text[0] for text in tested} for row in rows)
    assert not any(run in known for text in data["train"]["prompt"] for run in runs(text, RUN))


def test_the_command_writes_prompts_without_responses(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(build_outside, "NUM_STATEMENTS", 1)
    monkeypatch.setattr(build_outside, "download", lambda folder, names: None)
    learned = save(tmp_path / "learned", train=[{"prompt": "One.", "completion": "Uno."}])
    output = tmp_path / "sentences"
    build_outside.main(["--task", "sentences", "--apart-from", str(learned), "--output", str(output)])
    data = load_from_disk(str(output))
    assert data["test"].column_names == ["prompt"] and (len(data["train"]), len(data["test"])) == (1, 2)
    assert "wordnet-base 1" in data["test"].info.description


def test_without_apt_get_the_error_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    learned = save(tmp_path / "learned", train=[{"prompt": "One.", "completion": "Uno."}])
    options = ["--task", "summarize", "--apart-from", str(learned), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        build_outside.main(options)
    assert "container (image `debian`)" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_language_is_for_translations_alone(tmp_path, capsys):
    for options in (["--task", "translate"], ["--task", "sentences", "--language", "it"]):
        with pytest.raises(SystemExit):
            build_outside.main([*options, "--apart-from", "x", "--output", str(tmp_path / "out")])
        assert "--language is required for --task translate" in capsys.readouterr().err
