"""A checkpoint on the Hub: pushed by one process, loaded by fresh ones that do not have the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

import llm2slm

PROMPTS = ["w1 w2 w3", "w4 w5 w6 w7"]

PUSH = """
import json, sys
import torch
from conftest import build_llm, build_llm_tokenizer, build_slm, build_slm_tokenizer, jitter
from huggingface_hub import create_branch, create_tag
from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer

slm_kind = sys.argv[1]
build_llm("llama").push_to_hub("tester/llm")
model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained("tester/llm", build_slm(slm_kind), llm_layer=[0, 1])
build_llm("llama", seed=9).push_to_hub("tester/llm")  # the LLM's repository goes on: the checkpoint stays pinned
tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())

def answers():
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    return model.generate(**batch, max_new_tokens=8, do_sample=False).tolist()

torch.manual_seed(2)
expected = {}
for revision in ("main", "dev"):
    jitter(model.projector)
    if revision != "main":
        create_branch("tester/pair", branch=revision)
    commit = model.push_to_hub("tester/pair", revision=revision)
    tokenizer.push_to_hub("tester/pair", revision=revision)
    expected[revision] = answers()
    if revision == "main":
        create_tag("tester/pair", tag="v1")
        expected["v1"] = expected[commit.oid] = expected["main"]
        commits = [commit.oid]
model.push_to_hub("tester/whole", include_llm=True)
tokenizer.push_to_hub("tester/whole")
expected["whole"] = answers()
print(json.dumps({"expected": expected, "llm_revision": model.config.llm_revision, "commits": commits}))
"""

LOAD = """
import json, sys
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

found = {}
for repository, revision, tokenizer_revision in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(repository, revision=tokenizer_revision, trust_remote_code=True)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    rows = []
    for auto_class in (AutoModel, AutoModelForSeq2SeqLM):
        model = auto_class.from_pretrained(repository, revision=revision, trust_remote_code=True)
        rows.append(model.generate(**batch, max_new_tokens=8, do_sample=False).tolist())
    assert rows[0] == rows[1]
    if revision == tokenizer_revision:
        write = pipeline("text2text-generation", model=repository, revision=revision, trust_remote_code=True)
        texts = write(PROMPTS, max_new_tokens=8, do_sample=False, batch_size=2)
        assert [text["generated_text"] for text in texts] == tokenizer.batch_decode(rows[0], skip_special_tokens=True)
    found[f"{repository}@{revision}"] = [rows[0], model.config.llm_revision]
# What remote code saves is a checkpoint again.
model.save_pretrained("saved")
tokenizer.save_pretrained("saved")
model = AutoModelForSeq2SeqLM.from_pretrained("saved", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("saved", trust_remote_code=True)
batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
assert model.generate(**batch, max_new_tokens=8, do_sample=False).tolist() == rows[0]
assert "llm2slm" not in sys.modules
print(json.dumps(found))
"""


def run(hub, home, code, *arguments, python=sys.executable, cwd=None) -> dict:
    """A fresh process with a Hub cache of its own."""
    environment = {**os.environ, **hub.environment(home), "PYTHONPATH": os.path.dirname(__file__)}
    command = [python, "-c", f"PROMPTS = {PROMPTS}\n{code}", *arguments]
    result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


# The other major version of transformers, if there is an environment of it: what one saves the other loads.
PYTHONS = [sys.executable, *filter(None, [os.environ.get("LLM2SLM_OTHER_PYTHON")])]


@pytest.mark.parametrize(("lfs", "slm"), [(True, "llama"), (False, "t5")])
def test_pushed_checkpoint_generates_the_same_in_a_fresh_process_without_the_package(tmp_path, lfs, slm):
    with HubServer(tmp_path / "hub", lfs=lfs) as hub:
        pushed = run(hub, tmp_path / "push", PUSH, slm)
        assert any("info/lfs" in request.path for request in hub.requests) == lfs
        expected, (commit,), llm_revision = pushed["expected"], pushed["commits"], pushed["llm_revision"]
        wanted = [("tester/pair", revision, revision) for revision in ("main", "dev", "v1")]
        # The model's commit is older than the tokenizer's, which was pushed after it.
        wanted += [("tester/pair", commit, "main"), ("tester/whole", "main", "main")]
        for number, python in enumerate(PYTHONS):
            loaded = run(hub, tmp_path / f"load-{number}", LOAD, json.dumps(wanted), python=python, cwd=tmp_path)
            for repository, revision, _ in wanted:
                key = "whole" if repository == "tester/whole" else revision
                assert loaded[f"{repository}@{revision}"] == [expected[key], llm_revision]
        assert expected["main"] != expected["dev"]


FILES = """
import json
from huggingface_hub import ModelCard, list_repo_files
card = ModelCard.load("tester/pair")
print(json.dumps({"files": sorted(list_repo_files("tester/pair")), "data": card.data.to_dict(), "text": card.text}))
"""


def test_a_pushed_repository_is_complete(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        run(hub, tmp_path / "push", PUSH, "t5")
        found = run(hub, tmp_path / "push", FILES)
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "llm_tokenizer/tokenizer.json",
        "llm_tokenizer/tokenizer_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        *(path.name for path in Path(llm2slm.__file__).parent.glob("*_llm2slm.py")),
    } <= set(found["files"])
    assert found["data"]["base_model"] == "tester/llm"
    assert found["data"]["pipeline_tag"] == "text2text-generation"
    assert "tester/llm" in found["text"]
    assert "automatically generated" not in found["text"]


PUSH_FORMS = """
import json
from conftest import build_model
from huggingface_hub import list_repo_files, upload_file
from llm2slm import LLM2SLMForConditionalGeneration

upload = dict(repo_id="tester/forms", path_or_fileobj=b"{}")
files = []
for size in ("20KB", "1GB", "20KB"):
    build_model("llama", "t5").push_to_hub("tester/forms", max_shard_size=size)
    files.append(sorted(name for name in list_repo_files("tester/forms") if not name.endswith(".py")))
    LLM2SLMForConditionalGeneration.from_pretrained("tester/forms")
    upload_file(path_in_repo="adapter_config.json", **upload)
    upload_file(path_in_repo="notes.txt", **upload)
build_model("llama", "t5").save_pretrained("forms", push_to_hub=True, repo_id="tester/forms")
files.append(sorted(name for name in list_repo_files("tester/forms") if not name.endswith(".py")))
print(json.dumps(files))
"""


def test_a_repository_holds_the_weights_of_the_last_push_alone(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        shards, one, shards_again, saved = run(hub, tmp_path / "push", PUSH_FORMS, cwd=tmp_path)
    others = {".gitattributes", "README.md", "config.json", "generation_config.json"}
    assert set(one) == others | {"model.safetensors", "notes.txt"} == set(saved)
    assert set(shards_again) == set(shards) | {"notes.txt"}
    assert {name for name in shards if not name.startswith("model-")} == others | {"model.safetensors.index.json"}
