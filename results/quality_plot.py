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

from matplotlib.figure import Figure

from llm2slm.evaluation.reports import METRICS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", metavar="SYSTEM=REPORT", help="evaluation reports")
    parser.add_argument("--benchmark", type=Path, required=True, help="the report of `llm2slm benchmark`")
    parser.add_argument("--metric", default="chrf", choices=METRICS, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the picture, PNG")
    arguments = parser.parse_args()

    benchmark = json.loads(arguments.benchmark.read_text())
    seconds = {system["name"]: system["end_to_end_s"]["median"] for system in benchmark["systems"]}
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for place in arguments.reports:
        system, _, path = place.partition("=")
        report = json.loads(Path(path).read_text())
        score = report["scores"][arguments.metric]
        interval = [[score["score"] - score["low"]], [score["high"] - score["score"]]]
        label = f"{report['system']} (at the speed of {system})"
        axes.errorbar(seconds[system], score["score"], yerr=interval, fmt="o", capsize=4, label=label)
    sizes = benchmark["arguments"]
    axes.set(
        xlabel=f"seconds for {sizes['response_length']} tokens after {sizes['prompt_length']}, end to end, "
        f"{sizes['dtype']}",
        ylabel=f"{METRICS[arguments.metric]}, 95% interval",
        xlim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(arguments.output, dpi=120)


if __name__ == "__main__":
    main()
