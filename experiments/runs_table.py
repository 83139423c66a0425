"""
A Markdown table of trainings, from the `run.json` that each wrote.

    python experiments/runs_table.py results/simplify/runs/*.json

The second column says in what a training's options differ from those of the first one named.
"""

import json
import sys
from pathlib import Path

# Said in columns of their own, or of no effect on the result.
ELSEWHERE = (
    "max_train_pairs max_validation_pairs warmup_steps eval_steps save_steps logging_steps use_cpu disable_tqdm"
).split()
COLUMNS = ("Training", "Differs in", "Pairs", "Epochs", "Trained parameters", "Minutes", "Peak GiB", "Validation loss")


def main(paths: list[str]):
    runs = {Path(path).stem: json.loads(Path(path).read_text()) for path in paths}
    if not runs:
        raise SystemExit(__doc__.strip())
    first = next(iter(runs.values()))["recipe"]
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---|---|" + "---:|" * (len(COLUMNS) - 2))
    for name, run in runs.items():
        train = run["train"]
        cells = [
            f"`{name}`",
            differences(first, run["recipe"]),
            f"{run['data']['train_pairs']:,}",
            f"{train['epochs']:g}",
            f"{run['parameters']['trained'] / 1e6:.1f}M",
            f"{train['seconds'] / 60:.0f}",
            f"{train['peak_memory_gib']:.1f}",
            f"{train['eval_loss']:.3f}",
        ]
        print("| " + " | ".join(cells) + " |")


def differences(first: dict, recipe: dict) -> str:
    names = [name for name in {**first, **recipe} if first.get(name) != recipe.get(name) and name not in ELSEWHERE]
    return ", ".join(f"`{name}: {recipe[name]}`" if name in recipe else f"no `{name}`" for name in names) or "-"


if __name__ == "__main__":
    main(sys.argv[1:])
