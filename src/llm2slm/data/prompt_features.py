"""The LLM runs once per prompt, ever: its hidden states, kept on disk next to a tokenized data set.

A cache is a folder of shards (see [`~llm2slm.data.shards`]), named by a hash of all that the states depend on besides
the prompt: the LLM's weights, revision and layers, and the number formats.

Choices made here:
- Prompts are looked up one by one, so another data set, or a part of one, finds the prompts it shares with an earlier.
- The data set's new column holds where in the cache a prompt's states are, and reads them when a row is read (as the
  images of a data set are). An Arrow column of the states themselves would be copied, all of it, whenever `datasets`
  joins, reorders or saves rows; it would be read through Python's numbers, unless each reader asks for tensors; and
  Arrow has no bfloat16. The price is a column type of our own, which `import llm2slm` registers.
"""

import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import torch
from datasets import Dataset
from datasets.features.features import register_feature

from ..loading_llm2slm import architecture_of, fingerprint
from .collator import check_dataset
from .shards import TOKENS_PER_BATCH, fill_cache, hash_ids, in_groups, read_place

COLUMN = "prompt_hidden_states"
# All that `datasets` says of a type it does not know is the name: it names what to import.
FEATURE_TYPE = "llm2slm.PromptHiddenStates"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# What a kill loses at most is the work on one shard: half a minute to a minute of SmolLM2-135M on two cores.
SHARD_BYTES = 32 * 2**20


def cache_prompt_features(
    dataset: Dataset,
    model,
    cache_dir: str | os.PathLike,
    dtype: str = "float16",
    llm_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    r"""
    Adds the column `prompt_hidden_states`: what the frozen LLM makes of each row's prompt, a `torch.Tensor` of shape
    `(prompt_length, prompt_hidden_size)`. Training on it neither runs nor loads the LLM.

    Args:
        dataset (`datasets.Dataset`): With the column `input_ids`: prompts, tokenized by the LLM's tokenizer.
        model ([`LLM2SLMForConditionalGeneration`]):
            The LLM is run for the prompts that the cache lacks, and is loaded first if the model is a slim one without
            it; a complete cache needs no LLM.
        cache_dir (`str` or `os.PathLike`):
            Folder of all caches. The same LLM, revision, layers and number formats find their cache again, and in it
            the same prompts; anything else is run anew.
        dtype (`str`, *optional*, defaults to `"float16"`): `"float16"`, or `"bfloat16"` for states beyond its range.
        llm_kwargs (`dict`, *optional*): Arguments of `model.load_llm`, if the LLM is needed and not loaded.

    Returns:
        `datasets.Dataset`: the same rows, with states that are read from the memory-mapped cache row by row.

    Raises:
        TypeError: if `dataset` is no `datasets.Dataset`.
        ValueError: if the data set has no `input_ids` or already has states of another LLM, if a prompt is empty or
            too long, or if a state is not finite in `dtype`.
        OSError: if the disk cannot hold the cache (before anything is run), or there is no LLM.
    """
    check_dataset(dataset)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}.")
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"The data set has no column `input_ids`, only {dataset.column_names}: tokenize it first.")
    folder = Path(cache_dir).absolute() / _cache_name(model, dtype, llm_kwargs or {})
    if COLUMN in dataset.column_names:
        if dataset.features[COLUMN] == PromptHiddenStates(str(folder)):
            return dataset
        raise ValueError(
            f"The data set already has `{COLUMN}` that are not those of {folder}: another LLM, revision, layer or "
            f"number format wrote them. Remove the column to cache this LLM's."
        )
    prompts, llm_kwargs = _prompts(dataset), llm_kwargs or {}
    token_bytes = model.config.prompt_hidden_size * DTYPES[dtype].itemsize

    def compute(shard, progress):
        if model.llm is None:
            model.load_llm(**llm_kwargs)
        return {"states": _states(dataset, shard, model, DTYPES[dtype], progress)}

    places = fill_cache(folder, prompts, compute, token_bytes, SHARD_BYTES, ("prompt features", "prompts"))
    return dataset.add_column(COLUMN, [places[key] for key, _ in prompts], feature=PromptHiddenStates(str(folder)))


@dataclass
class PromptHiddenStates:
    """
    A column's type for `datasets`: each row says where in a cache the prompt's states are, and gives them when read.

    Args:
        folder (`str`): The cache.
    """

    folder: str
    dtype: ClassVar[str] = "torch.Tensor"
    pa_type: ClassVar[Any] = pyarrow.string()
    _type: str = field(default=FEATURE_TYPE, init=False, repr=False)

    def __call__(self):
        """How `datasets` asks for the type of what is stored."""
        return self.pa_type

    def encode_example(self, value: str) -> str:
        """What is stored for a row: the place of its states, as `shard:start:length`."""
        if not isinstance(value, str):
            raise ValueError(
                f"`{COLUMN}` cannot be written by `map`: let the function return only the columns it changes."
            )
        return value

    def decode_example(self, value: str, token_per_repo_id=None) -> torch.Tensor:
        """The states at a place, of shape `(prompt_length, prompt_hidden_size)`."""
        return read_place(self.folder, value, "prompt features", "run `cache_prompt_features` again")["states"]


with warnings.catch_warnings():  # it says that it is experimental
    warnings.simplefilter("ignore")
    register_feature(PromptHiddenStates, FEATURE_TYPE)


def _cache_name(model, dtype: str, llm_kwargs: dict) -> str:
    config, llm = model.config, model.llm
    # What an LLM that is not loaded would be loaded as.
    llm_dtype = llm.dtype if llm is not None else llm_kwargs.get("dtype", model.dtype)
    if isinstance(llm_dtype, str) and llm_dtype != "auto":
        llm_dtype = getattr(torch, llm_dtype)
    quantization = (
        llm_kwargs.get("quantization_config") if llm is None else llm.config.to_dict().get("quantization_config")
    )
    identity = [
        config.llm_fingerprint or (llm is not None and fingerprint(llm)),
        architecture_of(config.llm_text_config),
        config.llm_revision,
        config.prompt_layers,
        dtype,
        str(llm_dtype),
        str(quantization),
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _prompts(dataset: Dataset) -> list[tuple[bytes, int]]:
    """Each row's key, a hash of its ids, and length."""
    prompts: list[tuple[bytes, int]] = []
    for batch in dataset.with_format("numpy", columns=["input_ids"]).iter(batch_size=1000):
        for ids in batch["input_ids"]:
            if len(ids) == 0:
                raise ValueError(f"The prompt of row {len(prompts)} is empty.")
            prompts.append((hash_ids(ids), len(ids)))
    return prompts


def _states(dataset, prompts: list[tuple[int, int, bytes]], model, dtype: torch.dtype, progress) -> torch.Tensor:
    """The states of a shard's prompts, one behind the other."""
    states = torch.empty(sum(length for length, *_ in prompts), model.config.prompt_hidden_size, dtype=dtype)
    tokens_per_batch = TOKENS_PER_BATCH.get(model.llm.device.type, TOKENS_PER_BATCH["other"])
    ids = dataset.select_columns(["input_ids"]).with_format(None)
    start = 0
    for batch in in_groups(prompts, tokens_per_batch):
        batch_states = _run_llm(model, ids[[row for _, row, _ in batch]]["input_ids"]).to(dtype).cpu()
        if not torch.isfinite(batch_states).all():
            raise ValueError(
                f"The LLM's states are not finite in {str(dtype).removeprefix('torch.')}: choose another `llm_layer`"
                + (", or `dtype='bfloat16'`." if dtype == torch.float16 else ".")
            )
        states[start : start + len(batch_states)] = batch_states
        start += len(batch_states)
        progress.update(len(batch_states))
    return states


def _run_llm(model, prompts: list[list[int]]) -> torch.Tensor:
    """The states of all tokens of the prompts, one behind the other, of shape `(tokens, prompt_hidden_size)`."""
    longest = len(prompts[0])
    if len(prompts[-1]) == longest:
        return model.encode_hidden_states(torch.tensor(prompts)).flatten(0, 1)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    states = model.encode_hidden_states(ids, mask)
    return states[mask.bool().to(states.device)]
