"""The LLM runs once per prompt, ever: its hidden states, cached on disk next to a tokenized data set.

The cache is a folder of shards, each a memory-mapped `datasets` folder written aside and then renamed: whatever is
there is complete, and an interrupted run goes on with the next shard. The folder's name is a hash of all that the
states depend on: the LLM's weights, its layers, the dtype and the prompts' ids.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, concatenate_datasets, load_from_disk
from tqdm.auto import tqdm

ROWS_PER_SHARD = 512
# Tokens, padding included, of one forward of the LLM: SmolLM2-135M gains nothing from more on two cores.
TOKENS_PER_BATCH = 1024


def cache_prompt_features(dataset: Dataset, model, cache_dir: str | Path) -> Dataset:
    r"""
    Adds the column `prompt_hidden_states`, an array of shape `(prompt_length, prompt_hidden_size)` in float16 for each
    row: what the frozen LLM makes of the prompt. Training on it neither runs nor loads the LLM.

    Args:
        dataset (`datasets.Dataset`): With the column `input_ids`: prompts, tokenized by the LLM's tokenizer.
        model ([`LLM2SLMForConditionalGeneration`]): With its LLM loaded.
        cache_dir (`str` or `Path`):
            Folder of all caches. The same LLM, layers and prompts find their cache again; anything else makes its own.

    Returns:
        `datasets.Dataset`: the rows of `dataset` in their order, memory-mapped.

    Raises:
        ValueError: if a state is too large for float16, the data set has no `input_ids` or a prompt is empty.
        OSError: before anything is run, if the disk cannot hold the cache.
    """
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"The data set has no column `input_ids`, only {dataset.column_names}: tokenize it first.")
    prompts: list[list[int]] = [list(ids) for ids in dataset["input_ids"]]
    lengths = np.array([len(ids) for ids in prompts])
    if (lengths == 0).any():
        raise ValueError(f"The prompt of row {int((lengths == 0).argmax())} is empty.")
    folder = Path(cache_dir) / _cache_name(model.config, prompts)
    order = np.argsort(lengths, kind="stable")  # rows of like length share a batch, so little is padding
    shards = [order[start : start + ROWS_PER_SHARD] for start in range(0, len(order), ROWS_PER_SHARD)]
    missing = [index for index in range(len(shards)) if not _shard(folder, index).exists()]
    _check_disk(folder, model.config.prompt_hidden_size * 2 * sum(int(lengths[shards[i]].sum()) for i in missing))
    with tqdm(total=int(lengths.sum()), unit="tok", desc="Caching prompt features", disable=not missing) as progress:
        progress.update(int(sum(lengths[rows].sum() for i, rows in enumerate(shards) if i not in set(missing))))
        for index in missing:
            _write_shard(_shard(folder, index), [prompts[row] for row in shards[index]], model, progress)
    states = concatenate_datasets([load_from_disk(str(_shard(folder, index))) for index in range(len(shards))])
    states = states.select(np.argsort(order, kind="stable"))
    joined = concatenate_datasets([dataset, states], axis=1)
    return joined.with_format("numpy", columns=["prompt_hidden_states"], output_all_columns=True)


def _cache_name(config, prompts) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps([config.llm_fingerprint, config.llm_text_config.to_dict()], default=str).encode())
    digest.update(json.dumps(config.prompt_layers).encode())
    for ids in prompts:
        digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()[:16]


def _shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}"


def _check_disk(folder: Path, needed_bytes: int):
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise OSError(
            f"The prompt features need {needed_bytes / 2**30:.2f} GiB, but {existing} has {free / 2**30:.2f} GiB free."
        )


def _write_shard(path: Path, prompts: list[list[int]], model, progress):
    rows: list[np.ndarray] = []
    while len(rows) < len(prompts):  # sorted by length: the last of a batch is the longest
        size = 1
        while len(rows) + size < len(prompts) and (size + 1) * len(prompts[len(rows) + size]) <= TOKENS_PER_BATCH:
            size += 1
        rows += _states(prompts[len(rows) : len(rows) + size], model)
        progress.update(sum(map(len, prompts[len(rows) - size : len(rows)])))
    width = model.config.prompt_hidden_size
    features = Features({"prompt_hidden_states": Array2D(shape=(None, width), dtype="float16")})
    aside = path.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)
    Dataset.from_dict({"prompt_hidden_states": rows}, features=features).save_to_disk(str(aside), num_shards=1)
    aside.rename(path)


def _states(prompts: list[list[int]], model) -> list[np.ndarray]:
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    states = model.encode_hidden_states(ids, mask).to(torch.float16).cpu()
    if not torch.isfinite(states[mask.bool()]).all():
        raise ValueError("The LLM's states are too large for float16, or not finite: choose another `llm_layer`.")
    return [states[row, : len(prompt)].numpy() for row, prompt in enumerate(prompts)]
