"""What a checkpoint's model card offers to show: prompts to try, and the scores that were measured."""

import contextlib
import json
import re
from dataclasses import dataclass

from transformers.utils import cached_file

from ..language_models import check_folder

CARD = "README.md"
PROMPT_OF_THE_SNIPPET = re.compile(r'^prompt = (".*")$', re.MULTILINE)  # as `llm2slm card` writes it


@dataclass(frozen=True)
class Figure:
    """A score in a card's metadata."""

    dataset: str
    metric: str
    value: str


@dataclass(frozen=True)
class CheckpointCard:
    """The prompts and the scores of a model card; none where it has none."""

    prompts: list[str]
    figures: list[Figure]


def read_card(checkpoint: str, revision: str | None = None) -> CheckpointCard:
    r"""
    Reads the card of a checkpoint: prompts of its `widget`, or that of the lines that `llm2slm card` writes; scores of
    its `model-index`.

    Args:
        checkpoint (`str`): A folder, or a name on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of its repository.

    Raises:
        OSError: if there is no such folder.
    """
    from huggingface_hub import ModelCard

    check_folder(checkpoint)
    path = cached_file(
        checkpoint,
        CARD,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return CheckpointCard([], [])
    card = ModelCard.load(path, ignore_metadata_errors=True)
    widget = card.data.to_dict().get("widget")
    prompts = [one["text"] for one in widget or [] if isinstance(one, dict) and isinstance(one.get("text"), str)]
    if not prompts:
        for found in PROMPT_OF_THE_SNIPPET.findall(card.text):
            with contextlib.suppress(ValueError):  # a line that a person has changed
                prompts.append(json.loads(found))
    figures = [
        Figure(
            f"{result.dataset_name}, {result.dataset_split}" if result.dataset_split else result.dataset_name,
            result.metric_name or result.metric_type,
            str(result.metric_value),
        )
        for result in card.data.eval_results or []
    ]
    return CheckpointCard(list(dict.fromkeys(prompts)), figures)
