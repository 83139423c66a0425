"""
Splits a data set into train, validation and test without near-duplicates across them, and saves it whole.

The splits are fixed by the text, not by a seed: two rows that share a run of eight words on either side belong to one
group, and a group goes to one split, chosen by the hash of its text.
"""

import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, DatasetInfo, load_from_disk

from llm2slm.data.hash_split import normalize, position

SIDES = ("prompt", "completion")
RUN = 8  # words. In the Bible runs of 7 chain 8,800 of the 30,800 verses into one group, runs of 8 3,700, of 9 1,800.
MAX_GROUP = 100  # Larger groups, held together by formulas ("did evil in the sight of the LORD"), always train.
SHORT_RUN = 4  # words. Two prompts are near-identical if one prompt has half of the other's runs of this length.


def runs(text: str, length: int) -> list[tuple[str, ...]]:
    """Returns the runs of `length` words of a text; a text shorter than that has only the run it is."""
    words = normalize(text)
    return [tuple(words[start : start + length]) for start in range(max(1, len(words) - length + 1))]


def drop_near_identical(rows: list[dict[str, str]], beside: Iterable[str] = ()) -> list[dict[str, str]]:
    """
    Drops the rows whose prompt has at least half of its runs of `SHORT_RUN` words in one prompt kept before it, or in
    one text of `beside`.
    """
    kept, kept_with, number = [], defaultdict(list), 0
    for number, text in enumerate(beside, start=1):
        for run in set(runs(text, SHORT_RUN)):
            kept_with[run].append(number)
    for row in rows:
        found = set(runs(row["prompt"], SHORT_RUN))
        shared = Counter(i for run in found for i in kept_with.get(run, ()))
        if max(shared.values(), default=0) < len(found) / 2:
            number += 1
            for run in found:
                kept_with[run].append(number)
            kept.append(row)
    return kept


def row_runs(row: dict[str, str]) -> set[tuple[str, ...]]:
    """The runs of `RUN` words of a row's prompt and, if it has one, its completion."""
    return {run for side in SIDES if side in row for run in runs(row[side], RUN)}


def drop_sharing(rows: list[dict[str, str]], texts: Iterable[str]) -> list[dict[str, str]]:
    """Drops the rows of which a side shares a run of `RUN` words with one of the texts."""
    found = [row_runs(row) for row in rows]
    asked = set().union(*found)  # of the rows, as the texts may be many
    shared = {run for text in texts for run in runs(text, RUN) if run in asked}
    return [row for row, own in zip(rows, found, strict=True) if shared.isdisjoint(own)]


def texts_of(splits: Iterable[Dataset]) -> list[str]:
    """All prompts and completions of some splits."""
    return [text for split in splits for side in SIDES if side in split.column_names for text in split[side]]


def group_near_duplicates(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """
    Groups rows that share, prompt with prompt or completion with completion, a run of `RUN` words. Groups are the
    connected components, so rows of two groups never share a run.
    """
    parents = list(range(len(rows)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    for side in SIDES:
        first_with = {}
        for i, row in enumerate(rows):
            for run in runs(row[side], RUN):
                parents[root(i)] = root(first_with.setdefault(run, i))

    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[root(i)].append(row)
    return list(groups.values())


def choose_split(group: list[dict[str, str]], test_share: float, validation_share: float) -> str:
    """
    Chooses the split of a group by the SHA-256 of its alphabetically first prompt, whatever else is in the data.

    Args:
        group (`list[dict[str, str]]`):
            Rows that belong together. More than `MAX_GROUP` of them train.
        test_share, validation_share (`float`):
            Shares of the groups up to that size, between 0 and 1.
    """
    if len(group) > MAX_GROUP:
        return "train"
    place = position(min(" ".join(normalize(row["prompt"])) for row in group))
    if place < test_share:
        return "test"
    return "validation" if place < test_share + validation_share else "train"


def split_rows(
    rows: list[dict[str, str]], test_share: float, validation_share: float, info: DatasetInfo | None = None
) -> tuple[DatasetDict, list[int]]:
    """
    Splits rows by the groups of near-duplicates among them.

    Returns:
        The splits `train`, `validation` and `test`, each in the order of `rows`, and the sizes of the groups, largest
        first.
    """
    groups = group_near_duplicates(rows)
    split_of = {id(row): choose_split(group, test_share, validation_share) for group in groups for row in group}
    data = DatasetDict(
        {
            # A copy, as the columns' types are written into it.
            split: Dataset.from_list([row for row in rows if split_of[id(row)] == split], info=info and info.copy())
            for split in ("train", "validation", "test")
        }
    )
    return data, sorted(map(len, groups), reverse=True)


def print_counts(header: str, total: str, rows: list, dropped: Counter, groups: list[int], data: DatasetDict) -> None:
    """Prints what was dropped and kept, as a Markdown table; `header` names the rows, `total` all there were."""
    print(f"| {header} | number |\n|---|---|")
    print(f"| {total} | {len(rows) + dropped.total():,} |")
    for reason, count in dropped.most_common():
        print(f"| dropped: {reason} | {count:,} |")
    print(f"| kept, in {len(groups):,} groups, the largest of {groups[0]:,} | {len(rows):,} |")
    for split, dataset in data.items():
        print(f"| {split} | {len(dataset):,} |")


def save(data: DatasetDict, output: Path) -> None:
    """
    Writes the data set aside and renames it, so that `output` is whole or absent. The same data set already there is
    left as it is.

    Raises:
        FileExistsError: if `output` holds anything else.
    """
    if output.exists():
        try:
            saved = load_from_disk(str(output))
            same = {split: saved[split][:] for split in saved} == {split: data[split][:] for split in data}
        except (OSError, ValueError, TypeError, KeyError):  # no data set, a cut-off one, or one without splits
            same = False
        if not same:
            raise FileExistsError(f"--output {output} exists and is not this data set. Remove it, or name another.")
        print(f"{output} already holds this data set.")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        data.save_to_disk(str(aside / "data"))
        (aside / "data").rename(output)
    finally:
        shutil.rmtree(aside)
    print(f"Wrote {output}.")
