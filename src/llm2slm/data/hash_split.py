"""
Train, validation and test of rows that have no splits of their own, chosen by the hash of each prompt.

No seed and no order of rows: a prompt lands where its words put it, in every process that reads the file, and all rows
of the same words land together. When a file grows, shares only shrink: the new test part has no row of the old
training part, except those of a prompt that was in more rows than a part should have, and no longer is.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence

PARTS = ("train", "validation", "test")
SHARE = 0.05  # of all rows, for validation and for test
FEW, LARGER_SHARE = 20, 0.1  # Of a small file more: this many rows, as long as they are no more than this share.


def normalize(text: str) -> list[str]:
    """Returns the lower-case words of a text, without punctuation: what near-duplicates are compared by."""
    return re.findall(r"[\w']+", text.lower())


def position(text: str) -> float:
    """Where the SHA-256 of a text puts it, uniform in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") / 2**256


def words_of(prompt: str) -> str:
    """What tells a prompt from others: its normalized words, or its characters if it has no words."""
    return " ".join(normalize(prompt)) or prompt


def prompt_position(prompt: str) -> float:
    """The position of a prompt by its words."""
    return position(words_of(prompt))


def split_by_position(positions: Sequence[float]) -> dict[str, list[int]]:
    """
    Which rows are whose.

    Args:
        positions (`Sequence[float]`): Of each row's prompt, from [`prompt_position`].

    Returns:
        `dict[str, list[int]]`: the rows of each of `PARTS`, in their order. More rows with one prompt than a part
        should have always train. Each part has a row, if there are three prompts.
    """
    groups = defaultdict(list)
    for row, place in enumerate(positions):
        groups[place].append(row)
    share = max(SHARE, min(FEW / max(1, len(positions)), LARGER_SHARE))
    parts: dict[str, list[int]] = {name: [] for name in PARTS}
    for place, rows in sorted(groups.items()):
        if len(rows) > max(1, share * len(positions)):
            name = "train"
        elif place < share or not parts["test"]:
            name = "test"
        elif place < 2 * share or not parts["validation"]:
            name = "validation"
        else:
            name = "train"
        parts[name] += rows
    return {name: sorted(rows) for name, rows in parts.items()}
