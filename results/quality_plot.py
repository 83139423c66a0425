"""
Score against speed: evaluation reports, each at the seconds that a benchmark measured for a model of its kind.

    python results/quality_plot.py --benchmark results/simplify/benchmark-three-layers.json --metric chrf \
        --output quality.png slm=results/simplify/q-slm.json llm2slm=results/simplify/q-replace.json \
        llm=results/simplify/q-llm-lora.json

The word before each report is the benchmarked system whose speed it has.
"""

import argparse
import json
from pathlib import Path

from llm2slm.benchmark.report import plot_quality
from llm2slm.evaluation.reports import METRICS, read_report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", metavar="SYSTEM=REPORT", help="evaluation reports")
    parser.add_argument("--benchmark", type=Path, required=True, help="the report of `llm2slm benchmark`")
    parser.add_argument("--metric", default="chrf", choices=METRICS, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the picture, PNG")
    arguments = parser.parse_args()

    benchmark = json.loads(arguments.benchmark.read_text())
    seconds = {system["name"]: system["end_to_end_s"]["median"] for system in benchmark["systems"]}
    points = []
    for place in arguments.reports:
        system, _, path = place.partition("=")
        report = read_report(path)
        label = f"{report['system']} (at the speed of {system})"
        points.append((label, seconds[system], report["scores"][arguments.metric]))
    sizes = benchmark["arguments"]
    xlabel = (
        f"seconds for {sizes['response_length']} tokens after {sizes['prompt_length']}, end to end, {sizes['dtype']}"
    )
    plot_quality(points, xlabel, f"{METRICS[arguments.metric]}, 95% interval", arguments.output)


if __name__ == "__main__":
    main()
