"""
Prompts of different lengths in one batch: the LLM's time with all of them in one run, padded to the longest, and in
runs of similar lengths; and what a run costs besides its tokens.

    python experiments/mixed_lengths.py --model model_cards/simplify-smollm2-135m --data data/simplify data/summarize \
        --output results/mixed_lengths.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer, modeling_llm2slm
from llm2slm.data.pairs import load_pairs
from llm2slm.utils import machine, versions

TOKENS = [8, 16, 32, 64, 128, 256]  # of one prompt, for the time of a run
ONE_RUN = 10**9  # what a run would have to save


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="LLM-to-SLM checkpoint")
    parser.add_argument("--data", nargs="+", required=True, help="data sets whose prompts are read")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, default=6, help="of each data set (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()

    report = {"batch_size": arguments.batch_size, "machine": machine(), "versions": versions(), "dtypes": {}}
    tokenizer = LLM2SLMTokenizer.from_pretrained(arguments.model)
    for dtype in ("float32", "bfloat16"):
        model = LLM2SLMForConditionalGeneration.from_pretrained(arguments.model, dtype=dtype).eval()
        found = {"run": time_of_a_run(model, arguments.repeats)}
        for data in arguments.data:
            prompts = load_pairs(data, "test", None, None, arguments.batch_size * arguments.batches)["prompt"]
            found[Path(data).name] = compare(model, tokenizer, prompts, arguments)
        report["dtypes"][dtype] = found
        print(dtype, json.dumps(found))
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_of_a_run(model, repeats: int) -> dict:
    """Milliseconds of prompts of several lengths, and the line nearest to them (least squares of the ratios)."""
    times = {n: [] for n in TOKENS}
    for _ in range(repeats + 1):
        for n in TOKENS:
            ids = torch.randint(0, 1000, (1, n))
            times[n].append(1e3 * seconds(lambda ids=ids: model.encode_hidden_states(ids)))
    found = {n: statistics.median(time[1:]) for n, time in times.items()}
    lines = torch.tensor([[1 / found[n], n / found[n]] for n in TOKENS])  # (a + b n) / time should be 1
    run_ms, token_ms = torch.linalg.lstsq(lines, torch.ones(len(TOKENS), 1)).solution.flatten().tolist()
    return {"ms": found, "run_ms": run_ms, "token_ms": token_ms, "run_tokens": run_ms / token_ms}


def compare(model, tokenizer, prompts: list[str], arguments: argparse.Namespace) -> dict:
    """Both ways on each batch, in turns: medians, summed over the batches."""
    totals, padding, texts = {"one run": 0.0, "runs": 0.0}, 0, 0
    run_tokens = modeling_llm2slm.RUN_TOKENS
    for start in range(0, len(prompts), arguments.batch_size):
        batch = tokenizer(prompts[start : start + arguments.batch_size], padding=True, return_tensors="pt")
        padding, texts = padding + batch["attention_mask"].numel(), texts + int(batch["attention_mask"].sum())
        times: dict[str, list[float]] = {way: [] for way in totals}
        for _ in range(arguments.repeats):
            for way in totals:
                modeling_llm2slm.RUN_TOKENS = ONE_RUN if way == "one run" else run_tokens
                times[way].append(
                    seconds(lambda batch=batch: model.encode_prompt(batch["input_ids"], batch["attention_mask"]))
                )
        for way in totals:
            totals[way] += statistics.median(times[way])
    modeling_llm2slm.RUN_TOKENS = run_tokens
    return {"padded": padding / texts, "seconds": totals, "speed_up": totals["one run"] / totals["runs"]}


if __name__ == "__main__":
    main()
