"""
A Markdown table of reports of `llm2slm evaluate`: which words of the references the systems write.

    python experiments/copied_words.py data/summarize results/summarize/{layer-16,layer-16-slm}.json

Words of a reference that stand in its prompt too, and are rare or frequent in the responses that were learned from;
and words that do not stand in the prompt. Each cell is the share of them that the response has.
"""

import sys
from collections import Counter

from datasets import load_from_disk

from llm2slm.evaluation.metrics import words
from llm2slm.evaluation.reports import read_reports

RARE, FREQUENT = 5, 50  # responses of the training split


def main(paths: list[str]):
    if len(paths) < 2:
        raise SystemExit(__doc__.strip())
    seen = Counter(word for text in load_from_disk(paths[0])["train"]["completion"] for word in words(text))
    kinds = {
        f"in the prompt, in fewer than {RARE} learned": lambda word, prompt: word in prompt and seen[word] < RARE,
        f"in the prompt, in {FREQUENT} or more": lambda word, prompt: word in prompt and seen[word] >= FREQUENT,
        "not in the prompt": lambda word, prompt: word not in prompt,
    }
    print("| System | " + " | ".join(kinds) + " |")
    print("|---|" + "---:|" * len(kinds))
    for report, rows in zip(*read_reports(paths[1:]), strict=True):
        print(f"| {report['system']} | " + " | ".join(written(rows, kind) for kind in kinds.values()) + " |")


def written(rows: list[dict[str, str]], kind) -> str:
    hits = []
    for row in rows:
        prompt, reference, response = (words(row[name]) for name in ("prompt", "completion", "response"))
        hits += [word in response for word in reference if kind(word, prompt)]
    return f"{100 * sum(hits) / len(hits):.1f}% of {len(hits):,}"


if __name__ == "__main__":
    main(sys.argv[1:])
