"""
Draws score against speed from records: evaluation reports, each at the seconds that a benchmark measured.

    python experiments/quality_plot.py --benchmark results/simplify/benchmark-three-layers.json --metric chrf \
        --output quality.png slm=results/simplify/q-slm.json llm2slm=results/simplify/q-replace.json \
        llm=results/simplify/q-llm-lora.json

The word before each report is the benchmarked system whose speed it has. `llm2slm benchmark --quality-plot` draws the
same picture of what it has just measured.
"""

import argparse

from llm2slm.benchmark.report import plot_quality, read_quality
from llm2slm.evaluation.reports import METRICS
from llm2slm.utils import check_new_file, read_json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", metavar="SYSTEM=REPORT", help="evaluation reports")
    parser.add_argument("--benchmark", required=True, help="the report of `llm2slm benchmark`")
    parser.add_argument("--metric", default="chrf", choices=METRICS, help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="new .png file")
    arguments = parser.parse_args()
    check_new_file(arguments.output)
    benchmark = read_json(arguments.benchmark, "systems", "arguments")
    plot_quality(benchmark, read_quality(arguments.reports, arguments.metric), arguments.metric, arguments.output)


if __name__ == "__main__":
    main()
