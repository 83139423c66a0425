"""Further data sets beside the one that is evaluated on, such as prompts that an LLM has labelled.

Choices made here:
- No pair of theirs is evaluated on, and none has a prompt that may be: those of the first data set's validation and
  test split are left out, all of them.
- A weight is what each of their tokens counts in the loss beside one of the first data set. Weights are divided by
  their mean over the tokens of all sources, so that the learning rate means the same with them.
"""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from ..data.pairs import MissingSplitError, load_rows, make_texts, read_label_record
from .options import TrainOptions
from .teacher import Teacher, load_taught_pairs

WEIGHT = "token_weight"  # the column: what each token of a pair's response counts
WEIGHTS = "token_weights"  # of a batch
HELD_OUT = "validation", "test"  # splits


def check_sources(options: TrainOptions) -> None:
    """
    Refuses data that a pair has labelled: it would learn the faults of a small model.

    Raises:
        ValueError: if there is such data, by its `label.json`.
    """
    for source in [options.data, *options.more_data]:
        if (read_label_record(source) or {}).get("labelled_by_a_pair"):
            raise ValueError(
                f"The responses in {source!r} were written by an LLM-to-SLM pair: a student would learn its faults. "
                "Label the prompts with an LLM, `llm2slm label --llm LLM`."
            )


def add_sources(options: TrainOptions, teacher: Teacher | None, pairs: Dataset) -> tuple[Dataset, dict[str, int]]:
    r"""
    The pairs of `train` and, behind them, those of `options.more_data`, with the column `token_weight`.

    Args:
        options ([`TrainOptions`]): `data`, `more_data` and what goes with them.
        teacher ([`Teacher`], *optional*): Who teaches.
        pairs (`datasets.Dataset`): The pairs of `data` that are learned from.

    Returns:
        The pairs of all sources, and how many each of `more_data` has.

    Raises:
        OSError: if there is no such data set.
        ValueError: if one has chats where another has texts, or no pair that is not evaluated on.
    """
    held_out = _held_out_prompts(options)
    sources, counts = [pairs.add_column(WEIGHT, [1.0] * len(pairs))], {}
    for name in options.more_data:
        split = "all" if os.path.isfile(name) else "train"
        rows = load_taught_pairs(options, teacher, name, split)
        if rows.features["prompt"] != pairs.features["prompt"]:
            raise ValueError(f"{name!r} and {options.data!r} must both have texts, or both chats.")
        kept = [number for number, prompt in enumerate(rows["prompt"]) if _key(prompt) not in held_out]
        if not kept:
            raise ValueError(f"Every prompt of {name!r} is one that {options.data!r} is evaluated on.")
        if len(kept) < len(rows):
            print(f"{name}: {len(rows) - len(kept):,} of {len(rows):,} prompts are evaluated on, and are left out.")
        sources.append(rows.select(kept).add_column(WEIGHT, [options.more_data_weight] * len(kept)))
        counts[name] = len(kept)
    return concatenate_datasets(sources), counts


def _held_out_prompts(options: TrainOptions) -> set[str]:
    prompts: set[str] = set()
    for split in dict.fromkeys([options.validation_split, *HELD_OUT]):
        with contextlib.suppress(MissingSplitError):
            if split == "none":
                continue
            rows = load_rows(options.data, split, prompt_format=options.prompt_format)
            texts = make_texts(rows, {"prompt": options.prompt_format}, f"{options.data!r}, split {split!r}")
            prompts |= {_key(prompt) for prompt in texts["prompt"]}
    return prompts


def _key(prompt: Any) -> str:
    return " ".join((prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)).split())


def scale_weights(examples: Dataset) -> Dataset:
    """The examples with weights whose mean over the tokens of the responses is 1."""
    weights = torch.tensor(examples[WEIGHT][:], dtype=torch.float64)
    tokens = torch.tensor([_count(labels) for labels in examples["labels"]], dtype=torch.float64)
    scaled = weights * tokens.sum() / (weights * tokens).sum()
    return examples.remove_columns(WEIGHT).add_column(WEIGHT, scaled.tolist())


def _count(labels: list[int]) -> int:
    return sum(label != -100 for label in labels)


class WeighingCollator:
    r"""
    Makes batches as another collator does, and adds `token_weights` of shape `(tokens,)`: one for each label that is
    not -100, in the order of the labels.

    Args:
        collate (`Callable`): The other collator.
    """

    def __init__(self, collate: Callable[[list[dict]], dict[str, torch.Tensor]]):
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The examples as one batch of tensors; without weights if they have none, as those that are evaluated on."""
        batch = self.collate(rows)
        if WEIGHT not in rows[0]:
            return batch
        weights = torch.tensor([row[WEIGHT] for row in rows])
        tokens = torch.tensor([_count(list(row["labels"])) for row in rows])
        return {**batch, WEIGHTS: weights.repeat_interleave(tokens)}
