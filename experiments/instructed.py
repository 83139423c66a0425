"""
A Markdown table of a checkpoint's reports, one a task, on the instruction data set: does it do what it was asked for?

    PYTHONPATH=training python experiments/instructed.py results/instruct/instruct-{simplify,summarize}.json

"In the language" counts the responses in the language of the task, by the commonest words of English, Italian and
French; a response with none of them counts as neither. "With a word of the instruction" counts the responses that have
a word of five or more letters which stands in the instruction, but neither in its text nor in the reference.
"""

import re
import sys
from collections import Counter
from pathlib import Path

from build_instructions import HELD_OUT, PHRASINGS

from llm2slm.evaluation.reports import read_report, read_texts

LANGUAGES = {"translate-en-it": "Italian", "translate-en-fr": "French"}
COMMON = {
    "English": "the of and is to a in this for with".split(),
    "Italian": "il la di che è per e un una con gli le del della questo".split(),
    "French": "la les des est et un une pour de du ce cette avec dans".split(),
}


def main(paths: list[str]):
    if not paths:
        raise SystemExit(__doc__.strip())
    print("| Report | Responses | In the language | In another | With a word of the instruction, by phrasing |")
    print("|---|---:|---:|---:|---|")
    for path in paths:
        report = read_report(path)
        task = report["data"]["by"]["task"]
        rows = read_texts(path, report["data"]["examples"])
        languages = Counter(language(row["response"]) for row in rows)
        own = languages.pop(LANGUAGES.get(task, "English"), 0)
        languages.pop(None, None)
        numbers, leaks = Counter(), Counter()
        for row in rows:
            phrasing, text = taken_apart(row["prompt"], (*PHRASINGS[task], *HELD_OUT[task]))
            numbers[phrasing] += 1
            leaks[phrasing] += bool(
                long_words(phrasing) & long_words(row["response"]) - long_words(text + row["completion"])
            )
        shares = "; ".join(
            f"{leaks[phrasing]} of {numbers[phrasing]}: {' '.join(phrasing.split())}" for phrasing in numbers
        )
        print(f"| `{Path(path).stem}` | {len(rows)} | {own} | {languages.total()} | {shares} |")


def language(text: str) -> str | None:
    words = re.findall(r"\w+", text.lower())
    counts = {name: sum(word in common for word in words) for name, common in COMMON.items()}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else None


def taken_apart(prompt: str, phrasings: tuple[str, ...]) -> tuple[str, str]:
    """The phrasing of a prompt in the recipe's format, and the text in it."""
    for phrasing in phrasings:
        before, after = phrasing.split("{text}")
        if found := re.fullmatch(
            f".*?\\n{re.escape(before)}(.*){re.escape(after)}<end_of_turn>\\n.*", prompt, re.DOTALL
        ):
            return phrasing, found[1]
    raise ValueError(f"This prompt is in none of the phrasings: {prompt!r}")


def long_words(text: str) -> set[str]:
    return set(re.findall(r"\w{5,}", text.lower()))


if __name__ == "__main__":
    main(sys.argv[1:])
