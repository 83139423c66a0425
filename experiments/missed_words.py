"""
A Markdown table of reports of `llm2slm evaluate`: how the words that had to be copied were missed.

    python experiments/missed_words.py results/translate/{add,fr}.json

These are the words of the metric "Copied words". A missed one is misspelt if the response has a word much like it that
does not stand in the prompt; else it is translated, or left out.
"""

import difflib
import sys
from collections import Counter
from pathlib import Path

from llm2slm.evaluation.metrics import words, words_to_copy
from llm2slm.evaluation.reports import read_report, read_texts

ALIKE = 0.6  # of `difflib.SequenceMatcher`, from 0 to 1: "nobody" and "nbody" are, "alphabet" and "alfabeto" too


def main(paths: list[str]):
    if not paths:
        raise SystemExit(__doc__.strip())
    print("| Report | Words to copy | Copied | Misspelt | Translated or left out |")
    print("|---|---:|---:|---:|---:|")
    for path in paths:
        kinds = count(read_texts(path, read_report(path)["data"]["examples"]))
        total = sum(kinds.values())
        shares = " | ".join(f"{100 * kinds[kind] / total:.1f}%" for kind in ("copied", "misspelt", "not there"))
        print(f"| `{Path(path).stem}` | {total:,} | {shares} |")


def count(rows: list[dict[str, str]]) -> Counter:
    """What became of each word to copy."""
    wanted = words_to_copy([row["completion"] for row in rows], [row["prompt"] for row in rows])
    kinds: Counter = Counter()
    for row, to_copy in zip(rows, wanted, strict=True):
        response = words(row["response"])
        new_words = response - words(row["prompt"])
        kinds.update("copied" if word in response else kind_of_miss(word, new_words) for word in to_copy)
    return kinds


def kind_of_miss(word: str, new_words: set[str]) -> str:
    alike = any(difflib.SequenceMatcher(None, new, word).ratio() >= ALIKE for new in new_words)
    return "misspelt" if alike else "not there"


if __name__ == "__main__":
    main(sys.argv[1:])
