"""
A Markdown table of reports of `llm2slm evaluate` by the length of the reference: does a system hold up on long ones?

    python experiments/by_length.py results/simplify/q-replace.json results/simplify/q-slm.json

The examples are put into thirds by the reference's words; each cell has BLEU and chrF of a third. The last column
counts the responses of more words than one and a half times the reference's and ten: those that go on and on.
"""

import sys

from llm2slm.evaluation.metrics import score_texts
from llm2slm.evaluation.reports import read_reports

METRICS = ("bleu", "chrf")


def main(paths: list[str]):
    if not paths:
        raise SystemExit(__doc__.strip())
    reports, texts = read_reports(paths)
    lengths = [len(row["completion"].split()) for row in texts[0]]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    thirds = [order[len(order) * k // 3 : len(order) * (k + 1) // 3] for k in range(3)]
    spans = [f"{lengths[third[0]]} to {lengths[third[-1]]} words" for third in thirds]
    print("| System | " + " | ".join(spans) + " | go on and on |")
    print("|---|" + "---:|" * (len(spans) + 1))
    for report, rows in zip(reports, texts, strict=True):
        cells = [scores([rows[i] for i in third]) for third in thirds]
        too_long = sum(len(row["response"].split()) > 1.5 * n + 10 for row, n in zip(rows, lengths, strict=True))
        print(f"| {report['system']} | " + " | ".join(cells) + f" | {too_long} |")


def scores(rows: list[dict[str, str]]) -> str:
    sides = {"predictions": [row["response"] for row in rows], "references": [row["completion"] for row in rows]}
    return ", ".join(f"{score_texts(name, **sides)['score']:.1f}" for name in METRICS)


if __name__ == "__main__":
    main(sys.argv[1:])
