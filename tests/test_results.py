"""The pages of recorded runs: what they link to and what their commands read is there, and the records are whole."""

import re
from pathlib import Path

import pytest

from llm2slm.evaluation.reports import PACKED_TEXTS, read_packed_texts, read_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGES = sorted(RESULTS.rglob("*.md"))
WRITTEN = ("--output", "--output-dir", "--plot", "--quality-plot")  # what a command writes need not be there


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(RESULTS)) for page in pages]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """Indented, fenced and inline code, each command on one line."""
    blocks = re.findall(r"^ {4,}(.*(?:\n {4,}.*)*)", text, re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", text)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [" ".join(command.partition("  # ")[0].split()) for command in [*lines, *inline]]


def braces(word: str) -> list[str]:
    """`a{b,c}.json` as the shell reads it."""
    if found := re.fullmatch(r"(.*)\{(.*)\}(.*)", word):
        return [found[1] + part + found[3] for part in found[2].split(",")]
    return [word]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_and_pictures_of_a_page_exist(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_scripts_and_records_that_the_commands_read_exist(page):
    for command in commands(page.read_text(encoding="utf-8")):
        words = [word for word in command.split() if not word.startswith("#")]
        if not re.match(r"(\w+=\S+ )?(llm2slm|python) ", command):
            continue
        for before, word in zip(["", *words], words, strict=False):
            if before not in WRITTEN and re.search(r"\.(py|json|yaml)\b", word):
                for path in braces(word.rpartition("=")[2]):
                    assert (ROOT / path).exists() or (page.parent / path).exists(), command


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_options_are_spelled_with_dashes(page):
    assert not re.findall(r"--[a-z]+_[a-z_]+", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", ["instruct", "outside", "simplify", "summarize", "translate"])
def test_each_report_of_a_task_has_its_texts(folder):
    pytest.importorskip("pyarrow", reason="in the extra `train`")
    import pyarrow.parquet

    packed = RESULTS / folder / PACKED_TEXTS
    counted = pyarrow.parquet.read_table(packed, columns=["report"])["report"].value_counts().to_pylist()
    assert counted
    for count in counted:
        report = read_report(str(packed.with_name(count["values"] + ".json")))
        assert count["counts"] == report["data"]["examples"]
    assert read_packed_texts(str(packed), counted[0]["values"])[0].keys() == {"prompt", "completion", "response"}


def test_results_hold_records_pages_and_pictures_alone():
    assert {path.suffix for path in RESULTS.rglob("*") if path.is_file()} == {".json", ".md", ".parquet", ".png"}
