"""Cached prompt features: the LLM runs once per distinct prompt, and training on the cache is training on the LLM."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import LLM_VOCAB, build_llm, build_model, build_prompts
from datasets import Dataset, load_from_disk
from filelock import FileLock
from torch.utils.data import DataLoader

from llm2slm import LLM2SLMForConditionalGeneration
from llm2slm.data.collator import DataCollatorForLLM2SLM, tokenize_pairs
from llm2slm.data.prompt_features import cache_prompt_features

LENGTHS = (5, 9, 3, 9, 1)


@pytest.fixture
def model():
    return build_model("llama", "t5", llm_layer=[0, -1])


@pytest.fixture
def prompts():
    return Dataset.from_dict({"input_ids": [ids.tolist() for ids in build_prompts(LENGTHS)]})


def prompts_read(model) -> list[int]:
    """Grows by the rows of each forward of the LLM from now on."""
    rows: list = []
    model.llm.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


# -------------------------------------------------------------------------------------------------------- what is kept
@pytest.mark.parametrize("kind", ["llama", "t5", "bert", "gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 1e-2)])
def test_cached_states_are_the_llms_in_the_rows_order(prompts, tmp_path, kind, dtype, tolerance):
    model = build_model(kind, "t5", llm_layer=[0, -1])
    cached = cache_prompt_features(prompts, model, tmp_path, dtype=dtype)
    for row in cached:
        live = model.encode_hidden_states(torch.tensor([row["input_ids"]]))[0]
        assert row["prompt_hidden_states"].dtype == getattr(torch, dtype)
        torch.testing.assert_close(row["prompt_hidden_states"].float(), live, atol=tolerance, rtol=tolerance)


def test_the_llm_reads_each_distinct_prompt_once(model, tmp_path):
    rows = prompts_read(model)
    ids = [[5, 6, 7], [8, 9], [5, 6, 7], [5, 6, 7], [8, 9, 10]]
    cached = cache_prompt_features(Dataset.from_dict({"input_ids": ids}), model, tmp_path)
    assert sum(rows) == 3
    assert [len(states) for states in cached["prompt_hidden_states"]] == [3, 2, 3, 3, 3]
    torch.testing.assert_close(cached[2]["prompt_hidden_states"], cached[0]["prompt_hidden_states"], atol=0, rtol=0)


def test_prompts_of_one_length_share_a_batch(model, tmp_path):
    rows = prompts_read(model)
    ids = [ids.tolist() for ids in build_prompts((3, 60, 3, 60, 3, 60, 3, 60) * 4)]
    cache_prompt_features(Dataset.from_dict({"input_ids": ids}), model, tmp_path)
    assert rows == [8, 8, 16]  # 512 tokens a batch


def test_states_survive_what_a_data_set_goes_through(model, prompts, tmp_path):
    cached = cache_prompt_features(prompts.add_column("row", range(5)), model, tmp_path / "cache")
    expected = [states.clone() for states in cached["prompt_hidden_states"]]
    cached.shuffle(seed=1).save_to_disk(tmp_path / "saved")
    again = load_from_disk(tmp_path / "saved").map(lambda row: {"next": row["row"] + 1}).filter(lambda row: row["row"])
    assert len(again) == 4
    for row in again:
        torch.testing.assert_close(row["prompt_hidden_states"], expected[row["row"]], atol=0, rtol=0)


def test_rows_are_read_in_worker_processes(model, prompts, tmp_path):
    cached = cache_prompt_features(prompts, model, tmp_path)
    loader = DataLoader(cached, batch_size=2, num_workers=2, collate_fn=lambda rows: rows)
    lengths = [len(row["prompt_hidden_states"]) for rows in loader for row in rows]
    assert lengths == list(LENGTHS)


def test_a_row_takes_no_more_memory_than_its_own(tmp_path):
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the memory of a process is read the Linux way")

    def anonymous_kib() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1])

    model = build_model("llama", "t5", llm_layer=[0, 1, 2] * 16)
    ids = torch.randint(4, LLM_VOCAB, (250, 40), generator=torch.Generator().manual_seed(0)).tolist()
    cached = cache_prompt_features(Dataset.from_dict({"input_ids": ids}), model, tmp_path)
    on_disk_kib = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) / 2**10
    before = anonymous_kib()
    total = sum(float(row["prompt_hidden_states"][0, 0]) for row in cached.select_columns("prompt_hidden_states"))
    assert total != 0
    assert anonymous_kib() - before < on_disk_kib / 2 and on_disk_kib > 20 * 1000


# --------------------------------------------------------------------------------------------------------------- reuse
def test_the_same_prompts_and_llm_find_their_cache_again(model, prompts, tmp_path):
    first = cache_prompt_features(prompts, model, tmp_path)
    rows = prompts_read(model)
    again = cache_prompt_features(prompts, model, tmp_path)
    assert not rows
    assert again.features == first.features and again["prompt_hidden_states"][1].shape == (9, 48)
    assert cache_prompt_features(again, model, tmp_path) is again


def test_only_new_prompts_are_run(model, prompts, tmp_path):
    cache_prompt_features(prompts.select([0, 1, 2]), model, tmp_path)
    rows = prompts_read(model)
    whole = cache_prompt_features(prompts.select([4, 3, 2, 1, 0]), model, tmp_path)
    assert sum(rows) == 2
    assert [len(states) for states in whole["prompt_hidden_states"]] == [1, 9, 3, 9, 5]


@pytest.mark.parametrize("change", ["weights", "projections", "layer", "dtype", "llm_dtype", "revision"])
def test_another_llm_revision_layer_or_number_format_shares_nothing(prompts, tmp_path, change):
    cache_prompt_features(prompts, build_model("llama", "t5"), tmp_path)
    other, dtype = build_model("llama", "t5"), "float16"
    if change == "weights":
        other = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(build_llm("llama", seed=5), other.slm)
    elif change == "projections":  # as an adapter changes them
        llm = build_llm("llama")
        for layer in llm.model.layers:
            torch.nn.init.normal_(layer.mlp.down_proj.weight)
        other = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, other.slm)
    elif change == "layer":
        other = build_model("llama", "t5", llm_layer=1)
    elif change == "dtype":
        dtype = "bfloat16"
    elif change == "llm_dtype":
        other.llm.to(torch.bfloat16)
    else:
        other.config.llm_revision = "0" * 40
    rows = prompts_read(other)
    cache_prompt_features(prompts, other, tmp_path, dtype=dtype)
    assert sum(rows) == len(prompts)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", ["llama", "t5", "t5gemma", "bart", "bert", "gemma3", "gpt2"])
def test_a_complete_cache_needs_no_llm(prompts, tmp_path, kind):
    build_llm(kind).save_pretrained(tmp_path / "llm")
    model = build_model(str(tmp_path / "llm"), "t5", llm_layer=[0, 1])
    cached = cache_prompt_features(prompts, model, tmp_path / "cache")
    model.save_pretrained(tmp_path / "slim")
    slim = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "slim", load_llm=False)
    again = cache_prompt_features(prompts, slim, tmp_path / "cache")
    assert slim.llm is None
    assert again.features == cached.features


def test_a_slim_models_llm_is_loaded_for_what_is_missing(prompts, llm_folder, tmp_path):
    model = build_model(str(llm_folder), "t5")
    cache_prompt_features(prompts.select([0]), model, tmp_path / "cache")
    model.save_pretrained(tmp_path / "slim")
    llm_folder.rename(tmp_path / "elsewhere")
    slim = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "slim", load_llm=False)
    with pytest.raises(OSError, match="frozen LLM could not be loaded"):
        cache_prompt_features(prompts, slim, tmp_path / "cache")
    rest = {"llm_kwargs": {"llm_name_or_path": tmp_path / "elsewhere"}}
    assert len(cache_prompt_features(prompts, slim, tmp_path / "cache", **rest)) == len(prompts)
    assert slim.llm is not None and len(list((tmp_path / "cache").iterdir())) == 1


# ------------------------------------------------------------------------------------------------------- interruptions
# One process imports, and starts a copy of itself for each that caches. The limit on a file's size is the full disk.
PROCESSES = """
import os, resource, signal, sys
from pathlib import Path
from datasets import Dataset
from conftest import build_model, build_prompts
from llm2slm.data import prompt_features as features

features.SHARD_BYTES = 20 * 48 * 2  # 20 tokens

def start(name, die_at=None, most_bytes=resource.RLIM_INFINITY):
    if pid := os.fork():
        return pid
    model, reads = build_model("llama", "t5", llm_layer=[0, -1]), []
    def read(*_):
        reads.append(1)
        if len(reads) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    model.llm.register_forward_pre_hook(read)
    prompts = Dataset.from_dict({"input_ids": [ids.tolist() for ids in build_prompts((10,) * 12)]})
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        cached = features.cache_prompt_features(prompts, model, Path(sys.argv[1], name))
        print(f"{name} {len(reads)} {len(cached)}\\n", end="", flush=True)
    except OSError as error:
        print(name, error, flush=True)
    finally:
        os._exit(0)

status = os.waitpid(start("killed", die_at=4), 0)[1]
print("killed", os.waitstatus_to_exitcode(status), flush=True)
for pid in [start("shared"), start("shared"), start("full", most_bytes=1000)]:
    os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The folder of the processes' caches, each by its name, and what each process said, in order."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", PROCESSES, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said: dict[str, list[str]] = {}
    for line in result.stdout.splitlines():
        name, _, text = line.partition(" ")
        said.setdefault(name, []).append(text)
    return folder, said


one_process = pytest.mark.xdist_group("features_processes")


@one_process
def test_a_killed_run_goes_on_where_it_was(processes, model, tmp_path, monkeypatch):
    assert processes[1]["killed"] == [str(-signal.SIGKILL)]
    (folder,) = (processes[0] / "killed").iterdir()
    (folder / "left.part").write_text("by a kill while it was written")
    monkeypatch.setattr("llm2slm.data.prompt_features.SHARD_BYTES", 20 * 48 * 2)
    prompts = Dataset.from_dict({"input_ids": [ids.tolist() for ids in build_prompts((10,) * 12)]})
    rows = prompts_read(model)
    resumed = cache_prompt_features(prompts, model, processes[0] / "killed")
    assert rows == [2, 2, 2] and not list(folder.glob("*.part"))
    uninterrupted = cache_prompt_features(prompts, model, tmp_path / "whole")
    for ours, expected in zip(resumed, uninterrupted, strict=True):
        assert torch.equal(ours["prompt_hidden_states"], expected["prompt_hidden_states"])


@one_process
def test_two_processes_share_the_work_of_one(processes):
    assert sorted(processes[1]["shared"]) == ["0 12", "6 12"]


def test_waiting_for_another_process_is_said(model, prompts, tmp_path, caplog):
    cache_prompt_features(prompts, model, tmp_path)
    (folder,) = tmp_path.iterdir()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert not caplog.text
    cached = []
    with FileLock(folder / "lock"):
        thread = threading.Thread(target=lambda: cached.append(cache_prompt_features(prompts, model, tmp_path)))
        thread.start()
        for _ in range(1200):  # a minute at most
            if not caplog.text:
                thread.join(timeout=0.05)
        assert f"Another process writes prompt features to {folder}: waiting" in caplog.text and not cached
    thread.join()
    assert len(cached[0]) == len(prompts)


# ----------------------------------------------------------------------------------------------------------- bad input
def test_the_size_is_told_before_it_starts(model, prompts, tmp_path, capsys):
    cache_prompt_features(prompts, model, tmp_path)
    told = capsys.readouterr().err
    assert re.search(r"Caching prompt features: 5 prompts, 0\.00 GiB in .*" + str(tmp_path), told)
    cache_prompt_features(prompts, model, tmp_path)
    assert "Caching" not in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_told_before_anything_runs(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    rows = prompts_read(model)
    with pytest.raises(OSError, match="The prompt features need .* GiB, but .* has 0.00 GiB free"):
        cache_prompt_features(prompts, model, tmp_path)
    assert not rows


@one_process
def test_a_disk_that_fills_up_meanwhile_leaves_no_half_shard(processes):
    (said,) = processes[1]["full"]
    assert said.startswith("The prompt features cannot be written to"), said
    assert [path.name for path in processes[0].glob("full/*/*")] == ["lock"]


def test_states_that_the_number_format_cannot_hold_are_refused(model, prompts, tmp_path):
    model.llm.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] * 1e6, *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(ValueError, match="not finite in float16: choose another `llm_layer`, or `dtype='bfloat16'`"):
        cache_prompt_features(prompts, model, tmp_path)
    assert not list(tmp_path.glob("*/*.safetensors"))
    cached = cache_prompt_features(prompts, model, tmp_path, dtype="bfloat16")
    assert all(torch.isfinite(states).all() for states in cached["prompt_hidden_states"])


def test_features_of_another_llm_are_refused(model, prompts, tmp_path):
    other = cache_prompt_features(prompts, build_model("llama", "t5", llm_layer=[1, -1]), tmp_path)
    with pytest.raises(ValueError, match="already has `prompt_hidden_states` that are not those of"):
        cache_prompt_features(other, model, tmp_path)


def test_a_cache_that_was_deleted_is_told(model, prompts, tmp_path):
    cached = cache_prompt_features(prompts, model, tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="are gone: run `cache_prompt_features` again"):
        cached[0]


def test_an_invalid_prompt_or_option_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="The prompt of row 1 is empty"):
        cache_prompt_features(Dataset.from_dict({"input_ids": [[4], []]}), model, tmp_path)
    with pytest.raises(ValueError, match=r"no column `input_ids`, only \['text'\]"):
        cache_prompt_features(Dataset.from_dict({"text": ["a"]}), model, tmp_path)
    with pytest.raises(ValueError, match="`dtype` must be one of 'float16', 'bfloat16', got 'int8'"):
        cache_prompt_features(Dataset.from_dict({"input_ids": [[4]]}), model, tmp_path, dtype="int8")
    rows = prompts_read(model)
    with pytest.raises(ValueError, match="The prompt has 65 tokens, but the LLM .* has 64 positions"):
        cache_prompt_features(Dataset.from_dict({"input_ids": [[4], [5] * 65]}), model, tmp_path)
    assert not rows


# ------------------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_batch_of_cached_features_gives_the_loss_of_the_live_llm(model, tokenizer, tmp_path, padding_side, dtype):
    tokenizer.llm_tokenizer.padding_side = padding_side
    pairs = Dataset.from_dict({"prompt": ["w1 w2 w3", "w4", "w5 w6"], "completion": ["ab", "cde", "f"]})
    pairs = tokenize_pairs(pairs, tokenizer, prompt_max_length=16, response_max_length=16)
    cached = cache_prompt_features(pairs, model, tmp_path, dtype=dtype)
    collate = DataCollatorForLLM2SLM(tokenizer)
    live = model(**collate([pairs[i] for i in range(3)]))
    model.llm = None
    from_cache = model(**collate([cached[i] for i in range(3)]))
    tolerance = 1e-3 if dtype == "float16" else 1e-2
    torch.testing.assert_close(from_cache.loss, live.loss, atol=tolerance, rtol=tolerance)
