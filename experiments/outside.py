"""
A Markdown table of reports of `llm2slm evaluate`, of whatever data: what is scored by the texts alone.

    python experiments/outside.py results/translate/add.json results/outside/translate-en-it.json

Scores are computed anew from each report's texts, so older reports have the newer ones too.
"""

import sys
from pathlib import Path

from llm2slm.evaluation.metrics import score_texts
from llm2slm.evaluation.reports import METRICS, read_report, read_texts

NAMES = ("bleu", "chrf", "rougeL", "copied_words", "repeating")


def main(paths: list[str]):
    if not paths:
        raise SystemExit(__doc__.strip())
    print("| Report | Data | Examples | " + " | ".join(METRICS[name] for name in NAMES) + " |")
    print("|---|---|" + "---:|" * (1 + len(NAMES)))
    for path in paths:
        report = read_report(path)
        rows = read_texts(path, report["data"]["examples"])
        responses, references, prompts = ([row[part] for row in rows] for part in ("response", "completion", "prompt"))
        scores = [score_texts(name, responses, references, prompts) for name in NAMES]
        cells = [f"{score['score']:.1f} [{score['low']:.1f}, {score['high']:.1f}]" for score in scores]
        print(
            f"| `{Path(path).stem}` | `{Path(report['data']['source']).name}` | {len(rows):,} | {' | '.join(cells)} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
