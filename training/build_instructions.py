"""
Builds the instruction data set: simplify a verse, translate into Italian or French, write the one-line summary, each
task asked for in several phrasings.

    pip install '.[train]'
    python training/build_instructions.py --data data --output data/instruct

    >>> from datasets import load_from_disk
    >>> load_from_disk("data/instruct")["train"][0]

It is made of the data sets `simplify`, `summarize`, `translate-en-it` and `translate-en-fr` in the folder `--data`,
which `build_simplify.py` and `build_descriptions.py` build.

Choices made here:

- *Phrasings.* Seven a task to learn from, three others in the test split: a test prompt is new in its text and in how
  it is asked. `test_known_phrasings` has the same pairs in phrasings learned from: the difference is what a new
  phrasing costs. Which phrasing a text gets is chosen by its hash. Both languages have the same phrasings, so that one
  word says which is meant.
- *Splits.* A pair stays in the split that its own data set has it in. The tasks share texts (a paragraph that is
  translated may be a part of a description): what shares a run of eight words with a test text of any task is left out
  of training and validation, and what does with a validation text, out of training.
- *Balance.* Each task has as many training pairs, and as many validation pairs, as the one with the fewest. The test
  split has all, in the order of the tasks' own data sets: a report on one task's examples can be compared with one on
  its own data set.
"""

import argparse
from pathlib import Path

from datasets import Dataset, DatasetDict, load_from_disk
from splits import row_runs, save

from llm2slm.data.hash_split import position
from llm2slm.data.pairs import spaced

SPLITS = ("train", "validation", "test")

TRANSLATE = (
    "Translate into {language}: {text}",
    "Translate the following text into {language}.\n{text}",
    "Please translate this to {language}:\n\n{text}",
    "{text}\n\nTranslate the text above into {language}.",
    "How do you say this in {language}? {text}",
    "Write this in {language}: {text}",
    "What is the {language} translation of this text?\n{text}",
)
TRANSLATE_HELD_OUT = (
    "Give me the {language} version of this: {text}",
    "Could you put this into {language}?\n{text}",
    "{text}\nI need this in {language}, please.",
)


def in_language(phrasings: tuple[str, ...], language: str) -> tuple[str, ...]:
    """The phrasings with the name of the language, and still with `{text}`."""
    return tuple(phrasing.replace("{language}", language) for phrasing in phrasings)


# What each task, by the name of its data set, is asked for with: in training, and in the test split.
PHRASINGS = {
    "simplify": (
        "Simplify this verse: {text}",
        "Rewrite this Bible verse in simple English.\n{text}",
        "Put the following verse into plain English:\n\n{text}",
        "{text}\n\nSay the verse above in simple words.",
        "What does this verse say in everyday English? {text}",
        "Please make this old text easy to read.\n{text}",
        "Say this in Basic English: {text}",
    ),
    "summarize": (
        "Summarize in one line: {text}",
        "Write a one-line summary of this package.\n{text}",
        "Please sum up the following description in one phrase:\n\n{text}",
        "{text}\n\nSay in one short line what the text above is about.",
        "What is this software, in a few words? {text}",
        "Describe this program briefly: {text}",
        "Give a short title to this description.\n{text}",
    ),
    "translate-en-it": in_language(TRANSLATE, "Italian"),
    "translate-en-fr": in_language(TRANSLATE, "French"),
}
HELD_OUT = {
    "simplify": (
        "Turn this verse into simple English: {text}",
        "Could you rephrase this verse so that a child understands it?\n{text}",
        "{text}\nHow would you say this in easy words?",
    ),
    "summarize": (
        "In one line, what is this? {text}",
        "Could you shorten this description to a single line?\n{text}",
        "{text}\nTell me in a few words what this is.",
    ),
    "translate-en-it": in_language(TRANSLATE_HELD_OUT, "Italian"),
    "translate-en-fr": in_language(TRANSLATE_HELD_OUT, "French"),
}


def read_tasks(folder: Path) -> dict[str, DatasetDict]:
    """
    Reads the tasks' own data sets.

    Raises:
        FileNotFoundError: if one is missing, with what builds it.
    """
    tasks = {}
    for task in PHRASINGS:
        if not (folder / task).is_dir():
            raise FileNotFoundError(f"There is no {folder / task}: build it first, as training/README.md says.")
        tasks[task] = load_from_disk(str(folder / task))
    return tasks


def drop_held_out(tasks: dict[str, DatasetDict]) -> dict[str, DatasetDict]:
    """Leaves out of each split what shares a run of `RUN` words with a text of those before it: test, validation."""
    kept: dict[str, DatasetDict] = {task: DatasetDict() for task in tasks}
    seen: set[tuple[str, ...]] = set()
    for split in reversed(SPLITS):
        found = {task: [row_runs(row) for row in data[split]] for task, data in tasks.items()}
        for task, data in tasks.items():
            kept[task][split] = data[split].select(
                [row for row, own in enumerate(found[task]) if split == "test" or seen.isdisjoint(own)]
            )
        seen.update(*(own for rows in found.values() for own in rows))
    return kept


def ask(rows: Dataset, task: str, phrasings: tuple[str, ...]) -> list[dict[str, str]]:
    """The pairs of a task with each prompt in one of the phrasings, chosen by the hash of its text."""
    asked = []
    for text, completion in zip(rows["prompt"], rows["completion"], strict=True):
        phrasing = phrasings[int(position(f"{task}: {text}") * len(phrasings))]
        prompt = phrasing.replace("{text}", text)
        asked.append({"prompt": prompt, "completion": completion, "task": task, "phrasing": phrasing})
    return asked


def build(folder: Path, pairs_per_task: int | None = None, verbose: bool = False) -> DatasetDict:
    """
    Builds the data set in memory, in about half a minute.

    Args:
        folder (`Path`):
            Where the tasks' data sets are, each in a folder of its name.
        pairs_per_task (`int`, *optional*):
            Training pairs of each task; as many as the task with the fewest has if omitted.
        verbose (`bool`, *optional*, defaults to `False`):
            Whether to print how many pairs there are of each task, as a Markdown table.

    Returns:
        `DatasetDict` with the splits `train`, `validation`, `test` and `test_known_phrasings`, and the columns
        `prompt`, `completion`, `task` and `phrasing`, all strings. Each split has one task behind the other.

    Raises:
        FileNotFoundError: if one of the tasks' data sets is missing.
        ValueError: if a task has fewer than `pairs_per_task`.
    """
    tasks = read_tasks(folder)
    kept = drop_held_out(tasks)
    least = {split: min(len(data[split]) for data in kept.values()) for split in ("train", "validation")}
    if pairs_per_task is not None:
        if not 1 <= pairs_per_task <= least["train"]:
            raise ValueError(f"--pairs-per-task must be from 1 to {least['train']:,}, got {pairs_per_task:,}.")
        least["train"] = pairs_per_task
    rows: dict[str, list] = {"train": [], "validation": [], "test": [], "test_known_phrasings": []}
    for task, data in kept.items():
        for split, number in least.items():
            rows[split] += ask(spaced(data[split], number), task, PHRASINGS[task])
        rows["test"] += ask(data["test"], task, HELD_OUT[task])
        rows["test_known_phrasings"] += ask(data["test"], task, PHRASINGS[task])
    built = DatasetDict({split: Dataset.from_list(texts) for split, texts in rows.items()})
    if verbose:
        print_sizes(tasks, kept, built)
    return built


def print_sizes(tasks: dict[str, DatasetDict], kept: dict[str, DatasetDict], built: DatasetDict) -> None:
    """Prints of each task's splits how many pairs there were, without those held out elsewhere, and in the result."""
    print(f"| task | {' | '.join(SPLITS)} |")
    print(f"|---|{'---|' * len(SPLITS)}")
    for task in tasks:
        cells = [
            f"{len(tasks[task][split]):,} > {len(kept[task][split]):,} > {built[split]['task'][:].count(task):,}"
            for split in SPLITS
        ]
        print(f"| {task} | {' | '.join(cells)} |")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Build the data set of instructions from those of the single tasks.")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), metavar="FOLDER", help="where the tasks' data sets are (data)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where to write the data set")
    parser.add_argument(
        "--pairs-per-task",
        type=int,
        metavar="N",
        help="training pairs of each task; as many as the task with the fewest has if omitted",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        save(build(arguments.data, arguments.pairs_per_task, verbose=True), arguments.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
