"""The published checkpoints: they carry this code, they are small, and their cards' lines run as printed."""

import json
import os
import re
from difflib import SequenceMatcher
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import run_fresh
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
CODE = sorted((ROOT / "src" / "llm2slm").glob("*_llm2slm.py"))
CHECKPOINTS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))


@pytest.fixture(params=CHECKPOINTS, ids=[folder.name for folder in CHECKPOINTS])
def checkpoint(request):
    return request.param


def test_there_are_published_checkpoints():
    assert CHECKPOINTS


def test_their_code_is_a_link_to_the_librarys(checkpoint):
    assert {path.name for path in checkpoint.glob("*.py")} == {path.name for path in CODE}
    for path in CODE:
        link = checkpoint / path.name
        assert link.is_symlink() and link.readlink() == Path("../../src/llm2slm") / path.name


def test_they_are_slim_and_in_bfloat16(checkpoint):
    assert sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) < 40e6
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} <= {"BF16", "I32", "I64"}  # noqa: SIM118
        assert not any(name.startswith("llm.") for name in weights.keys())  # noqa: SIM118


def llm_package(checkpoint: Path) -> str:
    return json.loads((checkpoint / "config.json").read_text())["llm_name_or_path"].removeprefix("package:")


def python_of(checkpoint: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (checkpoint / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return code


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the lines of each card print, and their error: all in one fresh process, which imports once."""
    codes = {folder.name: python_of(folder) for folder in CHECKPOINTS if find_spec(llm_package(folder))}
    home = str(tmp_path_factory.mktemp("home"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    return run_fresh(codes, "import quick_gguf", cwd=ROOT, env=environment)


@pytest.mark.xdist_group("model_cards")  # each worker would run them anew
def test_a_card_says_where_its_llm_is_and_its_lines_run_as_printed(checkpoint, printed):
    package = llm_package(checkpoint)
    if find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert f"`{package}`" in card
    text, _, error = printed[checkpoint.name]
    assert error is None, error
    quoted = re.search(r"In the evaluation it wrote:\n\n> (.*)", card)[1]
    # Another machine's roundings may turn a word, not the sentence.
    assert SequenceMatcher(None, text.split(), quoted.split()).ratio() > 0.7, text
