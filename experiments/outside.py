"""
A Markdown table of reports of `llm2slm evaluate`, of whatever data: what is scored by the texts alone.

    python experiments/outside.py results/translate/add.json results/outside/translate-en-it.json
    python experiments/outside.py --against LLM.json PAIR.json  # the LLM's responses to the same prompts as references

Scores are computed anew from each report's texts, so older reports have the newer ones too.
"""

import argparse
from pathlib import Path

from llm2slm.evaluation.metrics import score_texts
from llm2slm.evaluation.reports import METRICS, read_report, read_texts

NAMES = ("bleu", "chrf", "rougeL", "copied_words", "repeating")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="with their texts beside them, packed or not")
    parser.add_argument("--against", metavar="REPORT", help="whose responses are the references (default: gold)")
    arguments = parser.parse_args()
    others = {}
    if arguments.against is not None:
        _, rows = read_rows(arguments.against)
        others = {row["prompt"]: row["response"] for row in rows}
    print("| Report | Data | Examples | " + " | ".join(METRICS[name] for name in NAMES) + " |")
    print("|---|---|" + "---:|" * (1 + len(NAMES)))
    for path in arguments.reports:
        report, rows = read_rows(path)
        responses, references, prompts = ([row[part] for row in rows] for part in ("response", "completion", "prompt"))
        if others:
            references = [others[prompt] for prompt in prompts]
        scores = [score_texts(name, responses, references, prompts) for name in NAMES]
        cells = [f"{score['score']:.1f} [{score['low']:.1f}, {score['high']:.1f}]" for score in scores]
        print(
            f"| `{Path(path).stem}` | `{Path(report['data']['source']).name}` | {len(rows):,} | {' | '.join(cells)} |"
        )


def read_rows(path: str) -> tuple[dict, list[dict]]:
    """A report and its texts."""
    report = read_report(path)
    return report, read_texts(path, report["data"]["examples"])


if __name__ == "__main__":
    main()
