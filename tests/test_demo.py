"""The demo's own rules: what it refuses, how it spares a busy machine, and what it says at the end."""

import json
import os
import subprocess
from pathlib import Path

import demo
import pytest
import torch
from conftest import build_llm, build_llm_tokenizer, build_model, build_slm_tokenizer

from llm2slm import LLM2SLMTokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def restored(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_a_blank_text_is_refused(text, tmp_path):
    with pytest.raises(SystemExit, match="The text is empty"):
        demo.main(["--text", text, "--output", str(tmp_path / "demo")])
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    "given, passed", [([], []), (["TEXT=  "], ["--text="]), (['TEXT=a $b `c` "d"'], ['--text=a $b `c` "d"'])]
)
def test_make_hands_on_the_text_as_typed_a_blank_one_too(given, passed, tmp_path):
    # A stand-in for the environment's Python: it says what it was called with.
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("TEXT", "MAKEFLAGS")}
    for name in ("pyproject.toml", "requirements-real.txt", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv" / ".installed").touch()
    command = ["make", "-s", "-f", str(ROOT / "Makefile"), "demo", *given]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["training/demo.py", *passed], result.stderr


@pytest.mark.parametrize("load, threads, busy", [(0.1, 4, False), (2.6, 1, True), (9.0, 1, True)])
def test_a_busy_machine_gets_the_threads_that_are_free(load, threads, busy, restored, monkeypatch):
    torch.set_num_threads(4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert demo.spare_threads() == busy
    assert torch.get_num_threads() == threads and os.environ["OMP_NUM_THREADS"] == str(threads)


def test_the_race_streams_both_and_says_how_much_faster_or_what_was_recorded(tmp_path, monkeypatch, capsys):
    build_llm("llama").save_pretrained(tmp_path / "llm")
    tokenizer = build_llm_tokenizer()
    tokenizer.save_pretrained(tmp_path / "llm")
    build_model("llama", "llama").save_pretrained(tmp_path / "pair", include_llm=True)
    LLM2SLMTokenizer.from_tokenizers(tokenizer, build_slm_tokenizer()).save_pretrained(tmp_path / "pair")
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(demo, "FEWEST_TOKENS", 1)
    assert " times faster: " in demo.race(tmp_path / "pair", str(tmp_path / "llm"), "w1 w2")
    shown = capsys.readouterr().out
    assert shown.index("LLM:") < shown.index("LLM-to-SLM:") and shown.count(" tokens in ") == 2
    monkeypatch.setattr(demo, "FEWEST_TOKENS", 100)  # as where the LLM's time was up
    recorded = json.loads(demo.RECORDED.read_text())["ratios"]["end_to_end_llm_to_llm2slm"]["median"]
    said = demo.race(tmp_path / "pair", str(tmp_path / "llm"), "w1 w2")
    assert (
        "too busy a machine" in said
        and f"recorded run (results/simplify/benchmark.json), LLM-to-SLM is {recorded:.1f}" in said
    )
