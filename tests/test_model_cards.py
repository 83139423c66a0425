"""The published checkpoints: they carry this code, they are small, and their cards' lines run as printed."""

import json
import os
import re
import subprocess
import sys
from difflib import SequenceMatcher
from importlib.util import find_spec
from pathlib import Path

import pytest
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


def test_a_card_says_where_its_llm_is_and_its_lines_run_as_printed(checkpoint, tmp_path):
    package = json.loads((checkpoint / "config.json").read_text())["llm_name_or_path"].removeprefix("package:")
    if find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert f"`{package}`" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    quoted = re.search(r"In the evaluation it wrote:\n\n> (.*)", card)[1]
    # Another machine's roundings may turn a word, not the sentence.
    assert SequenceMatcher(None, run.stdout.split(), quoted.split()).ratio() > 0.7, run.stdout
