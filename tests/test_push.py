"""`llm2slm push`: what belongs to a model goes to the Hub, in one commit, and works from there."""

import json
import os
import subprocess
import sys

import pytest
from conftest import build_llm, build_llm_tokenizer, build_model, build_slm_tokenizer
from hub_server import HubServer
from huggingface_hub import HfApi

from llm2slm import LLM2SLMTokenizer, cli

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
PUSH_LLM = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("tester/llm")
HfApi().upload_folder(repo_id="tester/llm", folder_path=sys.argv[1])
"""
LOAD = """
from transformers import pipeline
generate = pipeline("text2text-generation", model="tester/pair", trust_remote_code=True)
print(generate("w1 w2 w3", max_new_tokens=8, do_sample=False)[0]["generated_text"])
"""


@pytest.fixture
def folder(tmp_path):
    """A training's folder: a slim checkpoint whose LLM is on this machine, its card and picture, and much else."""
    build_llm("llama").save_pretrained(tmp_path / "llm")
    model = build_model(str(tmp_path / "llm"), "t5")
    model.save_pretrained(tmp_path / "pair")
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    tokenizer.save_pretrained(tmp_path / "pair")
    (tmp_path / "pair" / "README.md").write_text(CARD)
    (tmp_path / "pair" / "loss.png").write_bytes(b"\x89PNG")
    for name in LEFT_OUT:
        (tmp_path / "pair" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pair" / name).write_text("{}")
    return tmp_path / "pair"


def run(hub, home, *arguments, **environment) -> subprocess.CompletedProcess:
    """A fresh process with a Hub cache of its own."""
    environment = {**os.environ, **hub.environment(home), **environment}
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


def push(hub, home, *options, **environment) -> subprocess.CompletedProcess:
    return run(hub, home, "-m", "llm2slm.cli", "push", "--repo-id", "tester/pair", *options, **environment)


def test_a_model_is_pushed_in_one_commit_and_works_from_the_hub(folder, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        assert run(hub, tmp_path / "home", "-c", PUSH_LLM, folder.parent / "llm").returncode == 0
        pushed = push(hub, tmp_path / "home", "--run", folder, "--llm-name", "tester/llm")
        assert pushed.returncode == 0, pushed.stderr
        files = set(api.list_repo_files("tester/pair")) - {".gitattributes"}
        expected = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert files == expected - set(LEFT_OUT)
        assert {"README.md", "loss.png", "model.safetensors", "llm_tokenizer/tokenizer.json"} <= files
        first, *others = api.list_repo_commits("tester/pair")
        assert first.title == "Upload model" and first.commit_id in pushed.stdout
        assert [commit.title.lower() for commit in others] == ["initial commit"]  # the Hub's own, of a new repository

        config = json.loads(open(api.hf_hub_download("tester/pair", "config.json", cache_dir=tmp_path / "c")).read())
        assert config["llm_name_or_path"] == "tester/llm" and str(tmp_path) not in json.dumps(config)
        loaded = run(hub, tmp_path / "fresh", "-c", LOAD)
        assert loaded.returncode == 0, loaded.stderr[-2000:]
        here = run(hub, tmp_path / "here", "-c", LOAD.replace("tester/pair", str(folder)))
    assert loaded.stdout == here.stdout != ""


def test_a_private_repository_and_a_branch(folder, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        options = ["--run", folder, "--llm-name", "tester/llm", "--private"]
        pushed = push(hub, tmp_path / "home", *options, "--revision", "dev", "--message", "Second try")
        assert pushed.returncode == 0, pushed.stderr
        assert api.repo_info("tester/pair").private is True
        assert "config.json" in api.list_repo_files("tester/pair", revision="dev")
        assert "config.json" not in api.list_repo_files("tester/pair")
        assert api.list_repo_commits("tester/pair", revision="dev")[0].title == "Second try"


def test_a_refusal_of_the_hub_is_one_line(folder, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        options = ["--run", folder, "--llm-name", "tester/llm"]
        pushed = push(hub, tmp_path / "home", *options, HF_TOKEN="wrong")
    assert pushed.returncode == 2 and "Traceback" not in pushed.stderr
    assert pushed.stderr.splitlines()[-1].startswith("llm2slm push: error: ")


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
