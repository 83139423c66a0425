"""A training that is killed goes on from its last complete checkpoint, and ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import save_training
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer

from llm2slm.cli import main as cli
from llm2slm.training.run_folder import (
    check_data,
    is_complete,
    last_complete_checkpoint,
    move_to_top,
    remove_incomplete_checkpoints,
)

STEPS, SAVE_STEPS = 45, 5


@pytest.fixture
def recipe(tmp_path):
    """A fresh SLM with dropout-free layers behind a tiny LLM; a step takes some hundredths of a second."""
    pairs = [{"prompt": f"w{i} w{i + 1} w{i // 2}", "completion": "abc"[i % 3] * (1 + i % 5)} for i in range(40)]
    return {
        **save_training(tmp_path, pairs),
        "max_steps": STEPS,
        "eval_steps": SAVE_STEPS,
        "lr_scheduler_type": "constant",  # a step too many would be seen
        "per_device_train_batch_size": 4,
        "cache_dir": str(tmp_path / "features"),
    }


def command(recipe, folder) -> list[str]:
    with open(f"{folder}.yaml", "w") as file:
        yaml.safe_dump({**recipe, "output_dir": str(folder)}, file)
    return ["train", "--config", f"{folder}.yaml"]


def same_weights(folder, other) -> bool:
    weights, others = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


# Imports once, and starts a copy of itself for each command that it reads.
STARTS = """
import json, os, sys
import llm2slm.training.run
from llm2slm.cli.main import main

for line in sys.stdin:
    if (pid := os.fork()) == 0:
        os._exit(main(json.loads(line)) or 0)
    print("started", pid, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def starter():
    """A process that trains in another one for each command written to it; both say all on its stdout."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )
    with process:
        yield process


def test_killed_at_a_random_step_twice_the_weights_are_those_of_one_run(recipe, tmp_path, starter, capfd):
    assert cli.main(command(recipe, tmp_path / "whole")) is None
    folder, first = tmp_path / "killed", 0
    for attempt in range(2):
        # Beyond the next checkpoint, so that each attempt gets further, and before the last one.
        last, steps, resumed = random.randint(SAVE_STEPS + 1, STEPS // 3), 0, None
        print(json.dumps(command(recipe, folder)), file=starter.stdin, flush=True)
        for line in starter.stdout:
            if line.startswith("started"):
                pid = int(line.split()[1])
            elif "resuming from" in line:
                resumed = int(line.rstrip(".\n").rpartition("-")[2])
            elif line.startswith("{'loss'"):
                steps += 1
                if steps == last:
                    os.kill(pid, signal.SIGKILL)
            elif line.startswith("ended"):
                break
        assert line == f"ended {-signal.SIGKILL}\n", f"{steps} steps, and then: {line}"
        assert (resumed is None) == (attempt == 0) and (resumed or 0) == first
        assert not (folder / "run.json").exists()
        first = int(last_complete_checkpoint(folder).name.partition("-")[2])
        assert first > (resumed or 0)

    assert cli.main(command(recipe, folder)) is None
    assert f"resuming from {folder}/checkpoint-{first}." in capfd.readouterr().out
    assert same_weights(folder, tmp_path / "whole")
    for name in ("whole", "killed"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, STEPS + 1))
        seconds = [entry["seconds"] for entry in state["log_history"]]
        assert seconds == sorted(seconds)


class Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_state"])
def test_killed_while_something_is_written_the_weights_are_those_of_one_run(recipe, tmp_path, monkeypatch, method):
    recipe = {**recipe, "max_steps": 15}
    assert cli.main(command(recipe, tmp_path / "whole")) is None
    original, calls = getattr(Seq2SeqTrainer, method), []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == (1 if method == "save_state" else 2):  # at the end, or in the second checkpoint
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(Seq2SeqTrainer, method, killed)
    with pytest.raises(Killed):
        cli.main(command(recipe, tmp_path / "killed"))
    assert not (tmp_path / "killed" / "run.json").exists()
    assert cli.main(command(recipe, tmp_path / "killed")) is None
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


def test_killed_while_the_start_is_made_it_is_made_again(recipe, tmp_path, monkeypatch):
    recipe = {**recipe, "max_steps": 5}
    assert cli.main(command(recipe, tmp_path / "whole")) is None

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr("llm2slm.tokenization_llm2slm.LLM2SLMTokenizer.save_pretrained", killed)
    with pytest.raises(Killed):
        cli.main(command(recipe, tmp_path / "killed"))
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "start").exists()
    assert cli.main(command(recipe, tmp_path / "killed")) is None
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


def test_a_training_goes_on_with_the_pairs_that_it_began_with(recipe, tmp_path, monkeypatch, capsys):
    def killed(*args, **kwargs):
        raise Killed

    recipe, path = {**recipe, "max_steps": 10}, tmp_path / "pairs.jsonl"
    pairs = path.read_text()
    monkeypatch.setattr("llm2slm.training.setup.load_start", killed)  # before the first step: all is made anew
    with pytest.raises(Killed):
        cli.main(command(recipe, tmp_path / "run"))
    path.write_text(pairs.replace("ccc", "abb"))
    monkeypatch.undo()
    monkeypatch.setattr(Seq2SeqTrainer, "save_state", killed)
    with pytest.raises(Killed):
        cli.main(command(recipe, tmp_path / "run"))
    monkeypatch.undo()
    for changed, split in ((pairs, "train"), (path.read_text().replace("w39", "w3"), "validation")):
        kept = path.read_text()
        path.write_text(changed)
        assert cli.main(command(recipe, tmp_path / "run"))
        assert f"holds a training whose {split} pairs were others" in capsys.readouterr().err
        path.write_text(kept)
    assert cli.main(command(recipe, tmp_path / "run")) is None
    assert cli.main(command(recipe, tmp_path / "whole")) is None
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert not (tmp_path / "run" / "data.json").exists()


def test_a_folder_moved_before_its_end_still_gives_its_best_checkpoint(recipe, tmp_path, monkeypatch):
    def training_step(trainer, model, *args, **kwargs):
        if trainer.state.global_step > 6:  # from here on it gets worse
            with torch.no_grad():
                model.slm.get_input_embeddings().weight.mul_(3.0)
        return original(trainer, model, *args, **kwargs)

    def killed(*args, **kwargs):
        raise Killed

    recipe, original = {**recipe, "max_steps": 15}, Seq2SeqTrainer.training_step
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", training_step)
    monkeypatch.setattr(Seq2SeqTrainer, "save_state", killed)
    with pytest.raises(Killed):
        cli.main(command(recipe, tmp_path / "here"))
    monkeypatch.undo()
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert cli.main(command(recipe, tmp_path / "there")) is None
    assert same_weights(tmp_path / "there", tmp_path / "there" / "checkpoint-5")


# -------------------------------------------------------------------------------------------------------- the folder
def checkpoint(folder, step, state=None, ranks=()):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}) if state is None else state)
    for rank in ranks:
        torch.save({}, path / f"rng_state_{rank}.pth")
    return path


def test_only_what_was_written_to_its_end_is_resumed_from(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    complete = [checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)]
    (tmp_path / "checkpoint-11").mkdir()
    checkpoint(tmp_path, 12, state='{"global_step": 1')
    checkpoint(tmp_path, 13, state='{"global_step": 10}')
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == complete[1]
    remove_incomplete_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9", "checkpoint-best"]


def test_each_process_must_have_written_its_part(tmp_path):
    assert is_complete(checkpoint(tmp_path, 1, ranks=(0, 1)), world_size=2)
    assert not is_complete(checkpoint(tmp_path, 2, ranks=(0,)), world_size=2)
    cut_off = checkpoint(tmp_path, 3, ranks=(0, 1)) / "rng_state_1.pth"
    cut_off.write_bytes(cut_off.read_bytes()[:-10])
    assert not is_complete(cut_off.parent, world_size=2)


def test_a_training_goes_on_with_as_many_processes_as_it_began_with(tmp_path):
    check_data(tmp_path, {"train": "a"}, world_size=2)
    check_data(tmp_path, {"train": "a"}, world_size=1)  # before the first step, nothing is lost
    checkpoint(tmp_path, 1)
    check_data(tmp_path, {"train": "a"}, world_size=1)
    with pytest.raises(ValueError, match=r"a training of 1 process\(es\), here are 2"):
        check_data(tmp_path, {"train": "a"}, world_size=2)


def test_a_result_takes_the_place_of_an_older_one(tmp_path):
    for folder, text in ((tmp_path / "run", "old"), (tmp_path / "aside", "new")):
        (folder / "llm_tokenizer").mkdir(parents=True)
        (folder / "llm_tokenizer" / "tokenizer.json").write_text(text)
        (folder / "config.json").write_text(text)
    (tmp_path / "run" / "recipe.yaml").write_text("kept")
    (tmp_path / "run" / "llm_tokenizer" / "gone.json").write_text("old")
    move_to_top(tmp_path / "aside", tmp_path / "run")
    files = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"run/llm_tokenizer/tokenizer.json": "new", "run/config.json": "new", "run/recipe.yaml": "kept"}
