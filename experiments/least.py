"""
What a model has to beat on each data set: the score of the prompt copied, or of its first sentence (summaries).

    python experiments/least.py data/simplify data/summarize data/translate-en-it --output results/least.json
"""

import argparse
import json
import re
from pathlib import Path

from llm2slm.data.pairs import hash_texts, load_pairs
from llm2slm.evaluation.metrics import compute_statistics, interval
from llm2slm.evaluation.reports import METRICS
from llm2slm.utils import versions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="data set folders")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()
    report = {"data": {path.name: least(path) for path in arguments.data}, "versions": versions()}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def least(path: Path) -> dict:
    pairs = load_pairs(str(path), "test")
    summarizes = path.name == "summarize"
    answers = [first_sentence(prompt) if summarizes else prompt for prompt in pairs["prompt"]]
    scores = {}
    for name in METRICS:
        statistics = compute_statistics(name, answers, pairs["completion"], pairs["prompt"][:])
        low, high = interval(statistics)
        scores[name] = {"score": statistics.score, "low": low, "high": high, "signature": statistics.signature}
    return {
        "answer": "the first sentence" if summarizes else "the prompt, copied",
        "examples": len(pairs),
        "fingerprint": hash_texts(pairs),
        "scores": scores,
    }


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


if __name__ == "__main__":
    main()
