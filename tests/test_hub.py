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
import json
import torch
from conftest import build_llm, build_llm_tokenizer, build_slm, build_slm_tokenizer, jitter
from huggingface_hub import ModelCard, create_branch, create_tag, list_repo_files
from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer

build_llm("llama").push_to_hub("tester/llm")
build = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained
model = build("tester/llm", build_slm("llama"), llm_layer=[0, 1])
with_t5 = build("tester/llm", build_slm("t5"), llm_layer=[0, 1])
build_llm("llama", seed=9).push_to_hub("tester/llm")  # the LLM's repository goes on: the checkpoint stays pinned
tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())

def answers(model):
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
    expected[revision] = answers(model)
    if revision == "main":
        create_tag("tester/pair", tag="v1")
        expected["v1"] = expected[commit.oid] = expected["main"]
        commits = [commit.oid]
for name, pair, options in (("whole", model, {"include_llm": True}), ("t5", with_t5, {})):
    jitter(pair.projector)
    pair.push_to_hub(f"tester/{name}", **options)
    tokenizer.push_to_hub(f"tester/{name}")
    expected[name] = answers(pair)
card = ModelCard.load("tester/t5")
found = {"files": sorted(list_repo_files("tester/t5")), "data": card.data.to_dict(), "text": card.text}
print(json.dumps({"expected": expected, "llm_revision": model.config.llm_revision, "commits": commits, **found}))
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


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What one process pushed: pairs with an SLM of each kind, one of them in several revisions and whole."""
    folder = tmp_path_factory.mktemp("pushed")
    with HubServer(folder / "hub") as hub:
        yield hub, run(hub, folder / "push", PUSH)


@pytest.mark.xdist_group("hub")  # each worker would push anew
@pytest.mark.parametrize("python", PYTHONS, ids=["this version", "the other version"][: len(PYTHONS)])
def test_pushed_checkpoint_generates_the_same_in_a_fresh_process_without_the_package(python, pushed, tmp_path):
    hub, found = pushed
    expected, (commit,), llm_revision = found["expected"], found["commits"], found["llm_revision"]
    assert any("info/lfs" in request.path for request in hub.requests)
    wanted = [("tester/pair", revision, revision) for revision in ("main", "dev", "v1")]
    # The model's commit is older than the tokenizer's, which was pushed after it.
    wanted += [("tester/pair", commit, "main"), ("tester/t5", "main", "main"), ("tester/whole", "main", "main")]
    loaded = run(hub, tmp_path / "load", LOAD, json.dumps(wanted), python=python, cwd=tmp_path)
    for repository, revision, _ in wanted:
        key = revision if repository == "tester/pair" else repository.removeprefix("tester/")
        assert loaded[f"{repository}@{revision}"] == [expected[key], llm_revision]
    assert expected["main"] != expected["dev"]


@pytest.mark.xdist_group("hub")
def test_a_pushed_repository_is_complete(pushed):
    _, found = pushed
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
import contextlib
import json
from unittest import mock
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
with mock.patch("huggingface_hub.upload_folder", side_effect=ConnectionError), contextlib.suppress(ConnectionError):
    build_model("llama", "t5").save_pretrained("kept", push_to_hub=True, repo_id="tester/forms")
    raise AssertionError
LLM2SLMForConditionalGeneration.from_pretrained("kept")
print(json.dumps(files))
"""


def test_a_repository_holds_the_weights_of_the_last_push_alone_and_a_failed_one_leaves_them_on_disk(tmp_path):
    with HubServer(tmp_path / "hub", lfs=False) as hub:
        shards, one, shards_again, saved = run(hub, tmp_path / "push", PUSH_FORMS, cwd=tmp_path)
        assert not any("info/lfs" in request.path for request in hub.requests)
    others = {".gitattributes", "README.md", "config.json", "generation_config.json"}
    assert set(one) == others | {"model.safetensors", "notes.txt"} == set(saved)
    assert set(shards_again) == set(shards) | {"notes.txt"}
    assert {name for name in shards if not name.startswith("model-")} == others | {"model.safetensors.index.json"}
