"""`llm2slm push`: what belongs to a model goes to the Hub, in one commit, and works from there."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import build_llm, build_llm_tokenizer, build_model, build_slm_tokenizer, save_training
from datasets import Dataset
from hub_server import HubServer

from llm2slm import LLM2SLMTokenizer
from llm2slm.cli import main as cli
from llm2slm.sharing.upload import point_to_hub

CARD = "---\nlicense: mit\n---\n# A pair\n"
LEFT_OUT = (
    "run.json",
    "recipe.yaml",
    "train_results.json",
    "trainer_state.json",
    "report.json",
    "report.jsonl",
    "training_args.bin",
    "optimizer.pt",
    "README.md.part",
    "checkpoint-4/model.safetensors",
    "checkpoint-4/optimizer.pt",
    "start/model.safetensors",
)
# Pushes the LLM, and repositories with options and token; says what the command wrote, and what is there then.
PUSH = """
import contextlib, io, json, os, sys
from huggingface_hub import HfApi, hf_hub_download
from llm2slm.cli.main import main

llm, pushes = json.loads(sys.argv[1])
api, right, found = HfApi(), os.environ["HF_TOKEN"], []
api.create_repo("tester/llm")
api.upload_folder(repo_id="tester/llm", folder_path=llm)
for repository, options, token in pushes:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        os.environ["HF_TOKEN"] = token or right
        code = main(["push", "--repo-id", repository, *options])
        os.environ["HF_TOKEN"] = right
    there = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    if code is None:
        branches = [ref.name for ref in api.list_repo_refs(repository).branches]
        config = hf_hub_download(repository, "config.json", revision="dev" if "dev" in branches else "main")
        there |= {"private": api.repo_info(repository).private, "config": open(config).read()}
        for branch in branches:
            commits = api.list_repo_commits(repository, revision=branch)
            there[branch] = {"commits": [[commit.title, commit.commit_id] for commit in commits]}
            there[branch]["files"] = api.list_repo_files(repository, revision=branch)
    found.append(there)
print(json.dumps(found))
"""
LOAD = """
import sys
from transformers import pipeline
for name in sys.argv[1:]:
    generate = pipeline("text2text-generation", model=name, trust_remote_code=True)
    print(generate("w1 w2 w3", max_new_tokens=8, do_sample=False)[0]["generated_text"])
"""


def make_run(root):
    """A training's folder: a slim checkpoint whose LLM is on this machine, its card and picture, and much else."""
    build_llm("llama").save_pretrained(root / "llm")
    model = build_model(str(root / "llm"), "t5")
    model.save_pretrained(root / "pair")
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    tokenizer.save_pretrained(root / "pair")
    (root / "pair" / "README.md").write_text(CARD)
    (root / "pair" / "loss.png").write_bytes(b"\x89PNG")
    for name in LEFT_OUT:
        (root / "pair" / name).parent.mkdir(exist_ok=True)
        (root / "pair" / name).write_text("{}")
    return root / "pair"


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path)


def run(hub, home, *arguments) -> str:
    """What a fresh process with a Hub cache of its own prints."""
    environment, command = {**os.environ, **hub.environment(home)}, [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def push(hub, home, llm, *pushes, more="") -> list[dict]:
    """Of each repository, options and token: what the command wrote, and what is on the Hub behind it."""
    pushes = [(repository, list(map(str, options)), token) for repository, options, token in pushes]
    return json.loads(run(hub, home, "-c", PUSH + more, json.dumps([str(llm), pushes])).splitlines()[0])


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """
    A training's folder, what was said and is on the Hub after it was pushed in three ways, and what another process
    wrote with the checkpoint from the Hub and with the one here.
    """
    root = tmp_path_factory.mktemp("pushed")
    folder, options = make_run(root), ["--run", root / "pair", "--llm-name", "tester/llm"]
    branch = [*options, "--private", "--revision", "dev", "--message", "Second try"]
    with HubServer(root / "hub") as hub:
        pushes = [("tester/pair", options, None), ("tester/branch", branch, None), ("tester/pair", options, "wrong")]
        found = push(hub, root / "home", root / "llm", *pushes)
        written = run(hub, root / "fresh", "-c", LOAD, "tester/pair", folder).splitlines()
    return folder, found, written


one_push = pytest.mark.xdist_group("push")


def test_alternatives_of_the_llm_that_only_this_machine_has_are_not_pushed(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    names = ["user/llm", str(folder), "package:llm"]
    config["llm_alternatives"] = [{"llm_name_or_path": name} for name in names]
    (tmp_path / "config.json").write_text(json.dumps(config))
    pushed = json.loads(point_to_hub(tmp_path / "config.json", "tester/llm", None))
    assert [place["llm_name_or_path"] for place in pushed["llm_alternatives"]] == ["user/llm", "package:llm"]


@one_push
def test_a_model_is_pushed_in_one_commit_and_works_from_the_hub(pushed):
    folder, (found, *_), (from_the_hub, here) = pushed
    files = set(found["main"]["files"]) - {".gitattributes"}
    expected = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == expected - set(LEFT_OUT)
    assert {"README.md", "loss.png", "model.safetensors", "llm_tokenizer/tokenizer.json"} <= files
    (title, commit), *others = found["main"]["commits"]
    assert title == "Upload model" and commit in found["out"]
    assert [title.lower() for title, _ in others] == ["initial commit"]  # the Hub's own, of a new repository
    assert json.loads(found["config"])["llm_name_or_path"] == "tester/llm"
    assert str(folder.parent) not in found["config"]
    assert from_the_hub == here != ""


@one_push
def test_a_private_repository_and_a_branch(pushed):
    _, (_, found, _), _ = pushed
    assert found["private"] is True
    assert "config.json" in found["dev"]["files"] and "config.json" not in found["main"]["files"]
    assert found["dev"]["commits"][0][0] == "Second try"


@one_push
def test_a_refusal_of_the_hub_is_one_line(pushed):
    _, (*_, refused), _ = pushed
    assert refused["code"] == 2 and "Traceback" not in refused["err"]
    assert refused["err"].splitlines()[-1].startswith("llm2slm push: error: ")


def test_a_csv_file_of_ones_own_becomes_a_model_on_the_hub(tmp_path, capsys):
    """From `train` on, by nothing but the commands that it prints at its end."""
    recipe = save_training(tmp_path, [])
    del recipe["train_split"], recipe["validation_split"]
    rows = [{"question": f"w{i % 54} w{i // 54} w{i % 7}", "answer": "abc"[i % 3]} for i in range(200)]
    Dataset.from_list(rows).to_csv(tmp_path / "pairs.csv")
    run_folder = tmp_path / "my run"
    recipe |= {"data": str(tmp_path / "pairs.csv"), "output_dir": str(run_folder), "max_steps": 3}
    recipe |= {"cache_dir": str(tmp_path / "features"), "response_max_length": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train = ["train", "--config", str(tmp_path / "recipe.yaml")]
    assert cli.main(train) == 2
    formats = re.search("columns: (.*) \\(", capsys.readouterr().err)[1]
    assert cli.main([*train, *shlex.split(formats)]) is None
    out = capsys.readouterr().out
    parts = json.loads((run_folder / "run.json").read_text())["data"]["parts"]
    assert f"chooses {parts['train']} rows to train, {parts['validation']} to validate and {parts['test']}" in out
    commands = [shlex.split(line) for line in out.partition("Next:\n")[2].splitlines()]
    assert [command[1] for command in commands] == ["generate", "evaluate", "card"]
    commands[2] = [{"USER/LLM": "tester/llm"}.get(word, word) for word in commands[2]]
    for command in [commands[0], commands[1], [*commands[2], "--llm-license", "mit"]]:
        assert cli.main(command[1:]) is None, command
    assert json.loads((run_folder / "report.json").read_text())["data"]["examples"] == parts["test"]
    capsys.readouterr()
    assert cli.main(train + shlex.split(formats)) is None  # finished: what comes next is said again
    assert shlex.join(commands[0]) in capsys.readouterr().out
    with HubServer(tmp_path / "hub") as hub:
        options = ["--run", run_folder, "--llm-name", "tester/llm"]
        load = 'sys.argv[1:] = ["tester/pair"]' + LOAD
        (found,) = push(hub, tmp_path / "me", tmp_path / "llm", ("tester/pair", options, None), more=load)
    assert found["code"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("local_llm", "is no name on the Hub, such as `user/name`: say it with --llm-name"),
        ("no_card", "has no card of this model: write one with `llm2slm card"),
        ("saved_card", "has no card of this model"),
        ("no_weights", "is not the folder of a model: it has no weights"),
        ("no_folder", "is not the folder of a model"),
    ],
)
def test_what_is_not_ready_is_refused_before_anything_is_sent(folder, capsys, change, message):
    options = ["--run", folder, "--repo-id", "tester/pair"]
    if change == "no_card":
        (folder / "README.md").unlink()
    elif change == "saved_card":
        (folder / "README.md").write_text('generate = pipeline(model="<this repository>")')
    elif change == "no_weights":
        (folder / "model.safetensors").unlink()
    elif change == "no_folder":
        options[1] = folder / "nowhere"
    assert cli.main(["push", *map(str, options)]) == 2
    assert message in capsys.readouterr().err
