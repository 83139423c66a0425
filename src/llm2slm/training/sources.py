"""Further data sets beside the one that is evaluated on, such as prompts that an LLM has labelled.

Choices made here:
- No pair of theirs is evaluated on, and none has a prompt that may be: those of the first data set's validation and
  test split are left out, all of them, unless the first data set's own pairs teach them too. Prompts of the same words
  are the same prompt, as where a file is split.
- A weight is what each of their tokens counts in the loss beside one of the first data set. Weights are divided by
  their mean over the tokens of all sources, so that the learning rate means the same with them.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pyarrow
import torch
from datasets import Dataset, Features, concatenate_datasets

from ..data.hash_split import words_of
from ..data.pairs import MissingSplitError, load_rows, make_texts, plain_text, read_label_record
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
    held_out = _held_out_prompts(options) - set(map(_key, pairs["prompt"]))
    sources, counts = [pairs.add_column(WEIGHT, [1.0] * len(pairs))], {}
    for name in options.more_data:
        split = "all" if os.path.isfile(name) else "train"
        rows = _in_form_of(pairs, load_taught_pairs(options, teacher, name, split))
        if rows is None:
            raise ValueError(f"{name!r} and {options.data!r} must both have texts, or both chats.")
        kept = [number for number, prompt in enumerate(rows["prompt"]) if _key(prompt) not in held_out]
        if not kept:
            raise ValueError(f"Every prompt of {name!r} is one that {options.data!r} is evaluated on.")
        if len(kept) < len(rows):
            print(f"{name}: {len(rows) - len(kept):,} of {len(rows):,} prompts are evaluated on, and are left out.")
        sources.append(rows.select(kept).add_column(WEIGHT, [options.more_data_weight] * len(kept)))
        counts[name] = len(kept)
    return concatenate_datasets(sources), counts


def _in_form_of(first: Dataset, rows: Dataset) -> Dataset | None:
    """
    The rows with texts and messages as `first` has them, so that both can be joined: messages have the same keys, and
    a completion is a text where those of `first` are. `None` if prompts are texts here and chats there.
    """
    for column in ("prompt", "completion"):
        here, there = (dataset.data.schema.field(column).type for dataset in (rows, first))
        if here == there:
            continue
        is_chat = pyarrow.types.is_list(there)
        if column == "prompt" and is_chat != pyarrow.types.is_list(here):
            return None
        keys = [field.name for field in there.value_type] if is_chat else []
        feature = first.features[column]
        made = rows.select_columns(column).map(
            lambda row, column, keys: {column: _messages(row[column], keys) if keys else plain_text(row[column])},
            fn_kwargs={"column": column, "keys": keys},
            features=Features({column: feature}),
            desc="Reading texts",
        )
        rows = rows.remove_columns(column).add_column(column, made[column][:], feature=feature)
    return rows


def _messages(value: str | list[dict[str, Any]], keys: list[str]) -> list[dict[str, Any]]:
    messages = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    return [{key: message.get(key) for key in keys} for message in messages]


def _held_out_prompts(options: TrainOptions) -> set[str]:
    prompts: set[str] = set()
    for split in dict.fromkeys([options.validation_split, *HELD_OUT]):
        with contextlib.suppress(MissingSplitError):
            if split == "none":
                continue
            rows = load_rows(options.data, split, prompt_format=options.prompt_format)
            where = f"{options.data!r}, split {split!r}"
            texts = make_texts(rows, {"prompt": options.prompt_format}, where, options.skip_empty)
            prompts |= {_key(prompt) for prompt in texts["prompt"]}
    return prompts


def _key(prompt: Any) -> str:
    return words_of(plain_text(prompt))


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
