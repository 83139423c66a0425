"""The data sets that `training/build_descriptions.py` builds from package descriptions, here of a made-up archive."""

import hashlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import build_descriptions  # noqa: E402
from splits import drop_near_identical  # noqa: E402

RELEASE = "mirror.example_debian_dists_gadget"
PRINTS_WARNING = "#!/bin/sh\necho 'W: Could not reach mirror.example' >&2\n"

# One package a stanza: synopsis, and paragraphs of lines. `de` translates some.
ENGLISH = {
    "kettle": (
        "tea timer for the desktop",
        "Kettle is a timer for tea on the desktop. It rings a bell\nwhen the leaves have steeped, and its colour-\n"
        "coded clock shows which pot is ready.\n\nIt knows green, black and white tea, and\nlearns others from you."
        "\n\nFeatures:\n * rings\n * blinks\n\nThis package contains the bell.\n\n"
        "See https://kettle.example for more teas.",
    ),
    "kettle-doc": (
        "tea timer for the desktop (documentation)",
        "Kettle is a timer for tea on the desktop. It rings a bell\nwhen the leaves have steeped, and its colour-\n"
        "coded clock shows which pot is ready.\n\nThis package contains the documentation.",
    ),
    "libkettle-dev": (
        "development files for tea timers",
        "This package contains the header files that tea timers\nwritten in other languages need to be compiled.",
    ),
    "ladder": (
        "climbs trees of folders",
        "Goes up and down through the branches, one rung after the other, and\ntells you what it has seen.",
    ),
    "list-only": ("list of many things, by kind", "This has:\n * one thing\n * another thing\n * and a third"),
    "short": ("something very short indeed", "This is something very short indeed."),
    "transition": (
        "compass for the desktop - transitional package",
        "This is a transitional package for the compass, which now lives in\nanother one. It can safely be removed.",
    ),
    "lantern-it": (
        "lantern for reading in the dark, Italian edition",
        "Lantern lights the page for you when it is too dark to read, and it turns\nthe light off when you fall "
        "asleep. This is the edition for Italian readers.",
    ),
    "lantern-sv": (
        "lantern for reading in the dark, Swedish edition",
        "Lantern lights the page for you when it is too dark to read, and it turns\nthe light off when you fall "
        "asleep. This is the edition for Swedish readers.",
    ),
}
GERMAN = {
    "kettle": (
        "Teeuhr",
        "Kettle ist eine Uhr für Tee auf dem Schreibtisch. Sie läutet, wenn die\nBlätter gezogen haben, und ihr "
        "farbiges Ziffer-\nblatt zeigt, welche Kanne fertig ist.\n\n"
        "Sie kennt Grün-\nund Schwarztee und lernt andere von Ihnen.\n\n"
        "Merkmale:\n * läutet\n * blinkt\n\nDieses Paket enthält die Glocke.\n\n"
        "Siehe https://kettle.example für mehr.",
    ),
    "ladder": (  # one paragraph more
        "klettert in Ordnern",
        "Steigt durch die Zweige hinauf und hinab, eine Sprosse nach der anderen.\n\nSagt, was es gesehen hat.",
    ),
    "lantern-it": (  # left in English
        "Laterne",
        "Lantern lights the page for you when it is too dark to read, and it turns\nthe light off when you fall "
        "asleep. This is the edition for Italian readers.",
    ),
}
WORDS = (
    "amber barrel canvas dagger ember fennel garnet harbour ivory juniper kernel lattice marble nectar orchard pebble "
    "quiver ribbon saddle thicket umbrella velvet walnut yarrow zephyr anchor beacon copper drizzle falcon"
).split()


def made_up(number):
    """A description unlike every other, with its synopsis and its translation."""
    words = random.Random(number).choices(WORDS, k=24)
    text = f"Turns {' '.join(words[:12])}\ninto {' '.join(words[12:])}."
    german = "Macht " + " ".join(f"{word}en" for word in words[:12]) + " zu " + " ".join(f"{w}er" for w in words[12:])
    return (f"turns {' '.join(words[:4])} into {words[12]}", text), ("Wandler", f"{german}.")


def stanza(package, language, synopsis, text):
    english = ENGLISH[package][1] if package in ENGLISH else made_up(int(package.removeprefix("tool")))[0][1]
    lines = [f" {line or '.'}" for line in text.split("\n")]
    md5 = hashlib.md5(english.encode()).hexdigest()
    return "\n".join(
        [f"Package: {package}", f"Description-md5: {md5}", f"Description-{language}: {synopsis}", *lines, ""]
    )


def write_lists(folder, number=300):
    """Writes what apt would download: a release, its main section in two languages, and files that are not read."""
    folder.mkdir(parents=True, exist_ok=True)
    tools = {f"tool{i}": made_up(i) for i in range(number)}
    for language, own, side in (("en", ENGLISH, 0), ("de", GERMAN, 1)):
        descriptions = own | {package: texts[side] for package, texts in tools.items()}
        (folder / f"{RELEASE}_main_i18n_Translation-{language}").write_text(
            "\n".join(stanza(package, language, *description) for package, description in descriptions.items())
        )
    (folder / f"{RELEASE}_InRelease").write_text(
        "Hash: SHA256\n\nOrigin: Gadgetlinux\nVersion: 7.1\nCodename: gadget\nDate: Sat, 03 Oct 2026 10:00:00 UTC\n"
    )
    for other in ("-updates_main", "_contrib"):
        (folder / f"{RELEASE}{other}_i18n_Translation-en").write_text(
            stanza("kettle", "en", "not to be read", "Not to be read.")
        )
    return folder


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    return write_lists(tmp_path_factory.mktemp("archive") / "lists")


@pytest.fixture(scope="module")
def summaries(lists):
    return build_descriptions.build(lists, "summarize")


@pytest.fixture(scope="module")
def translations(lists):
    return build_descriptions.build(lists, "translate", "de")


def rows_of(data, package):
    return [row for split in data.values() for row in split if row["package"] == package]


@pytest.fixture
def apt_get(tmp_path, monkeypatch):
    """Puts a made-up apt-get, and it alone, on the path; returns a function that sets what it does."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def set_script(script):
        (folder / "apt-get").write_text(script)
        (folder / "apt-get").chmod(0o755)

    monkeypatch.setenv("PATH", str(folder))
    return set_script


def test_columns_splits_and_order(summaries, translations):
    for data in (summaries, translations):
        assert {split: dataset.column_names for split, dataset in data.items()} == {
            split: ["prompt", "completion", "package"] for split in ("train", "validation", "test")
        }
        assert all(list(dataset["package"]) == sorted(dataset["package"]) for dataset in data.values())
        assert len(data["train"]) > len(data["test"]) > 0


def test_a_summary_is_of_the_prose_that_is_the_programs_own(summaries):
    assert rows_of(summaries, "kettle") == [
        {
            "prompt": "Kettle is a timer for tea on the desktop. It rings a bell when the leaves have steeped, and "
            "its colour-coded clock shows which pot is ready. It knows green, black and white tea, and learns others "
            "from you.",
            "completion": "tea timer for the desktop",
            "package": "kettle",
        }
    ]


@pytest.mark.parametrize("package", [package for package in ENGLISH if package not in ("kettle", "lantern-it")])
def test_a_description_without_a_summary_of_its_own_is_dropped(summaries, package):
    assert rows_of(summaries, package) == []


def test_of_near_identical_descriptions_the_first_is_kept(summaries):
    assert len(rows_of(summaries, "lantern-it")) == 1
    row = {"prompt": "one two three four five six seven"}
    near, far = {"prompt": "one two three four five six eight"}, {"prompt": "one two three four nine ten eleven"}
    assert drop_near_identical([row, near, far]) == [row, far]


def test_paragraphs_of_many_packages_are_dropped():
    common = ["This framework does many things, and these words are in each package made for it."]
    english = {
        (f"plugin{i}", str(i)): (made_up(i)[0][0], [common, made_up(i)[0][1].split("\n")])
        for i in range(build_descriptions.COMMON)
    }
    rows, _ = build_descriptions.summary_pairs(english)
    assert len(rows) == build_descriptions.COMMON
    assert not any("framework" in row["prompt"] for row in rows)
    english.popitem()
    rows, _ = build_descriptions.summary_pairs(english)
    assert all(row["prompt"].startswith("This framework") for row in rows)


def test_a_long_description_is_cut_between_paragraphs():
    paragraphs = [[f"Kettle has {n} clocks, " + f"clock{n} " * 70 + "too."] for n in ("one", "two", "three")]
    (row,), _ = build_descriptions.summary_pairs({("kettle", "0"): ("kettle has clocks", paragraphs)})
    assert len(row["prompt"].split()) == 2 * 75
    rows, dropped = build_descriptions.summary_pairs(
        {("kettle", "0"): ("kettle has clocks", [["Kettle has clocks, " + "many " * 160 + "too."]])}
    )
    assert rows == [] and dropped.total() == 1


@pytest.mark.parametrize(
    "synopsis, stripped",
    [
        ("library for X (development files)", "library for X"),
        ("library for X - Python 3.x bindings", "library for X"),
        ("tea timer, runtime library (shared)", "tea timer"),
        ("tea timer - now with bells", "tea timer - now with bells"),
        ("game: the data", "game"),
        ("documentation", "documentation"),
    ],
)
def test_the_part_of_a_family_is_stripped_from_a_synopsis(synopsis, stripped):
    assert build_descriptions.strip_part(synopsis) == stripped


def test_paragraphs_are_aligned_with_their_translations(translations):
    pairs = {row["prompt"]: row["completion"] for row in rows_of(translations, "kettle")}
    assert pairs == {
        "Kettle is a timer for tea on the desktop. It rings a bell when the leaves have steeped, and its colour-coded "
        "clock shows which pot is ready.": "Kettle ist eine Uhr für Tee auf dem Schreibtisch. Sie läutet, wenn die "
        "Blätter gezogen haben, und ihr farbiges Ziffer-blatt zeigt, welche Kanne fertig ist.",
        "It knows green, black and white tea, and learns others from you.": "Sie kennt Grün- und Schwarztee und lernt "
        "andere von Ihnen.",
    }


@pytest.mark.parametrize("package", ["ladder", "lantern-it"])
def test_unaligned_and_untranslated_descriptions_are_dropped(translations, package):
    assert rows_of(translations, package) == []


@pytest.mark.parametrize(
    "german, reason",
    [
        ("Dieses Gerät zählt bis 8 und hört dann wieder auf.", "the numbers differ"),
        ("Bis 7.", "one side is much longer"),
        ("This device counts until 7 and then stops gleich.", "more than half of it is copied"),
        ("Dieses Gerät zählt bis 7, siehe www.gadget.example und anderes.", "one side is a list, no sentence"),
        ("Dieses Gerät zählt bis 7 und hört dann wieder auf", "one side is a list, no sentence"),
        ("* Dieses Gerät zählt bis 7 und hört dann wieder auf.", "one side is a list, no sentence"),
    ],
)
def test_bad_translations_are_dropped_for_a_reason(german, reason):
    english = {("counter", "0"): ("counter", [["This device counts to 7 and then stops."]])}
    good = {("counter", "0"): ("Zähler", [["Dieses Gerät zählt bis 7 und hört dann wieder auf."]])}
    assert len(build_descriptions.translation_pairs(english, good)[0]) == 1
    rows, dropped = build_descriptions.translation_pairs(english, {("counter", "0"): ("Zähler", [[german]])})
    assert rows == []
    assert [key for key, count in dropped.items() if count and key.startswith(reason)]


def test_the_most_frequent_translation_of_a_paragraph_is_kept():
    english = {(name, "0"): ("counter", [["This device counts to 7 and then stops."]]) for name in "abc"}
    texts = {
        "a": "Das Gerät zählt bis 7 und ruht.",
        "b": "Dieses Gerät zählt bis 7.",
        "c": "Dieses Gerät zählt bis 7.",
    }
    rows, dropped = build_descriptions.translation_pairs(
        english, {(name, "0"): ("Zähler", [[text]]) for name, text in texts.items()}
    )
    assert rows == [{"prompt": english["a", "0"][1][0][0], "completion": "Dieses Gerät zählt bis 7.", "package": "a"}]
    assert dropped["the same English came before"] == 2


@pytest.mark.parametrize("side", ["prompt", "completion"])
def test_two_splits_share_no_eight_words_in_a_row(summaries, translations, side):
    for data in (summaries, translations):
        train, validation, test = (
            {
                tuple(words[k : k + 8])
                for text in data[split][side]
                for words in [re.findall(r"[\w']+", text.lower())]
                for k in range(len(words) - 7)
            }
            for split in data
        )
        assert not train & validation and not train & test and not validation & test


def prompts_of(dataset):
    return {row["package"]: row["prompt"] for row in dataset}


def test_more_prompts_are_what_has_no_translation(lists, translations):
    more = build_descriptions.build_more_prompts(lists, "translate", translations)
    assert {split: dataset.column_names for split, dataset in more.items()} == {"train": ["prompt", "package"]}
    found = prompts_of(more["train"])
    assert {"ladder", "lantern-it", "short"} <= set(found)
    assert found["ladder"].endswith("one rung after the other, and tells you what it has seen.")
    assert not {"kettle", "list-only", "tool0"} & set(found)  # translated, or no prose
    assert "lantern-sv" not in found  # near-identical to lantern-it


def test_more_prompts_are_descriptions_whose_synopsis_is_no_good(lists, summaries):
    found = prompts_of(build_descriptions.build_more_prompts(lists, "summarize", summaries)["train"])
    assert not {row["prompt"] for split in summaries.values() for row in split} & set(found.values())
    assert "kettle-doc" not in found and "transition" not in found  # near-identical to a pair's; of a part
    assert set(found) == {"ladder"}  # its synopsis has too few of its words


@pytest.mark.parametrize("side", ["prompt", "completion"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_further_prompt_shares_eight_words_in_a_row_with_what_is_held_out(lists, translations, split, side):
    ladder = prompts_of(build_descriptions.build_more_prompts(lists, "translate", translations)["train"])["ladder"]
    row = {"prompt": "Nothing.", "completion": "Nichts.", "package": "x"}
    for number, is_there in ((7, True), (8, False)):
        leak = Dataset.from_list([row | {side: "a " + " ".join(ladder.split()[-number:]).upper()}])
        data = DatasetDict(translations | {split: leak})
        more = prompts_of(build_descriptions.build_more_prompts(lists, "translate", data)["train"])
        assert ("ladder" in more) == is_there


def test_the_sources_stand_in_the_saved_data_set(lists, summaries, tmp_path):
    summaries.save_to_disk(str(tmp_path / "data"))
    info = load_from_disk(str(tmp_path / "data"))["test"].info
    path = lists / f"{RELEASE}_main_i18n_Translation-en"
    assert info.description.startswith("Made by build_descriptions.py --task summarize from\n")
    assert f"{path.name}: Gadgetlinux 7.1 (gadget), release file of Sat, 03 Oct 2026 10:00:00 UTC" in info.description
    assert hashlib.sha256(path.read_bytes()).hexdigest() in info.description
    assert "free software" in info.license


def test_building_twice_gives_the_same_data(lists, translations):
    again = build_descriptions.build(lists, "translate", "de")
    assert {split: dataset[:] for split, dataset in again.items()} == {
        split: dataset[:] for split, dataset in translations.items()
    }


def test_too_few_pairs_are_said(tmp_path):
    with pytest.raises(ValueError, match="2 pairs found in .*, too few: no pair falls to"):
        build_descriptions.build(write_lists(tmp_path / "lists", number=0), "summarize")


def test_apt_get_downloads_into_a_folder_of_its_own(apt_get, lists, tmp_path, capsys):
    apt_get(
        "#!/bin/sh\n"
        f'/bin/cat "$3" > {tmp_path}/config\n'
        f'folder=$(/bin/sed -n \'s/^Dir::State::Lists "\\(.*\\)";/\\1/p\' "$3")\n'
        f'/bin/cp {lists}/* "$folder"\n'
    )
    kept, output = tmp_path / "kept", tmp_path / "data"
    command = ["--task", "translate", "--language", "de", "--output", str(output), "--lists", str(kept)]
    build_descriptions.main(command)
    report = capsys.readouterr().out
    assert "| dropped: more than half of it is copied | 1 |" in report
    assert re.search(r"\| test \| \d+ \|", report)
    config = (tmp_path / "config").read_text()
    assert 'Acquire::Languages "en,de";' in config
    folders = re.findall(r'^Dir::.* "(.*)";$', config, flags=re.MULTILINE)
    assert len(folders) == 2 and folders[0] == str(kept) and not folders[1].startswith("/var")

    apt_get("#!/bin/sh\nexit 1\n")  # not run again: what is kept is read
    build_descriptions.main(command)
    assert f"{output} already holds this data set" in capsys.readouterr().out


@pytest.mark.parametrize("script", [PRINTS_WARNING, PRINTS_WARNING + "exit 100\n"])
def test_a_download_that_brings_nothing_is_said_with_apts_own_words(apt_get, script, tmp_path, capsys):
    apt_get(script)
    with pytest.raises(SystemExit, match="2"):
        build_descriptions.main(["--task", "summarize", "--output", str(tmp_path / "data")])
    error = capsys.readouterr().err
    assert "brought no package descriptions in en" in error
    assert "W: Could not reach mirror.example" in error
    assert not (tmp_path / "data").exists()


def test_a_missing_apt_get_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        build_descriptions.main(["--task", "summarize", "--output", str(tmp_path / "data")])
    assert "apt-get, which downloads the descriptions, was not found" in capsys.readouterr().err


@pytest.mark.parametrize("task", [["translate"], ["summarize", "--language", "it"]])
def test_a_language_is_asked_for_translation_alone(task, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_descriptions.main(["--output", str(tmp_path / "data"), "--task", *task])
    assert "--language is required for --task translate, and for no other task" in capsys.readouterr().err


def test_an_output_that_is_something_else_is_refused(lists, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_descriptions.main(["--task", "summarize", "--lists", str(lists), "--output", str(tmp_path)])
    assert "exists and is not this data set" in capsys.readouterr().err


def test_the_script_runs_by_its_command(lists, tmp_path):
    script = Path(build_descriptions.__file__)
    command = [sys.executable, str(script), "--task", "summarize", "--lists", str(lists), "--output", "data"]
    command += ["--more-prompts", "more"]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"PATH": "/nonexistent"})
    assert len(load_from_disk(str(tmp_path / "data"))) == 3
    assert list(load_from_disk(str(tmp_path / "more"))) == ["train"]
