"""
Lossless mode on real prompts: is each response the LLM's own, how many drafts are accepted, how much faster is it.

    python experiments/lossless.py --model runs/simplify-tuned --data data/simplify --output results/lossless.json

For each prompt the LLM writes greedily by itself, with LLM-to-SLM's drafts, and with drafts of the compiled step, in
an order that turns with the prompts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.data.pairs import load_pairs
from llm2slm.loading_llm2slm import load_slm
from llm2slm.utils import machine, versions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="LLM-to-SLM checkpoint with the LLM's tokenizer, maybe trimmed")
    parser.add_argument("--llm", help="folder of a fine-tuned LLM (default: the one it was trained behind)")
    parser.add_argument("--adapter", help="folder of a LoRA adapter of the LLM, which is merged")
    parser.add_argument("--data", required=True, help="data set whose prompts are read")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--prompt-format", default="{prompt}\n", help="(default: the prompt and a line break)")
    parser.add_argument("--examples", type=int, default=200, help="prompts, evenly spaced (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()

    tokenizer = LLM2SLMTokenizer.from_pretrained(arguments.model)
    prompts = load_pairs(arguments.data, arguments.split, arguments.prompt_format, None, arguments.examples)["prompt"]
    report = {
        "examples": len(prompts),
        "max_new_tokens": arguments.max_new_tokens,
        "prompt_format": arguments.prompt_format,
        "llm": arguments.llm,
        "adapter": arguments.adapter,
        "dtypes": {name: compare(arguments, name, tokenizer, prompts) for name in arguments.dtypes},
        "machine": machine(),
        "versions": versions(),
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def compare(arguments: argparse.Namespace, dtype: str, tokenizer, prompts: list[str]) -> dict:
    """Both ways on each prompt; figures of all prompts, and of each."""
    model = LLM2SLMForConditionalGeneration.from_pretrained(arguments.model, dtype=dtype, load_llm=False)
    name, source = arguments.llm, {}
    if name is None:
        name = model.config.llm_name_or_path
        source = {"revision": model.config.llm_revision, "gguf_file": model.config.llm_gguf_file}
    llm = load_slm(name, dtype=dtype, **source).eval()
    if arguments.adapter is not None:
        llm = PeftModel.from_pretrained(llm, arguments.adapter).merge_and_unload().eval()
    ends = {"eos_token_id": tokenizer.llm_tokenizer.eos_token_id, "pad_token_id": tokenizer.llm_tokenizer.pad_token_id}
    settings = {"do_sample": False, "max_new_tokens": arguments.max_new_tokens, **ends}
    rows = []
    for number, prompt in enumerate(tqdm(prompts, desc=dtype)):
        inputs = tokenizer(prompt, apply_prompt_format=False, return_tensors="pt")
        ways = {
            "llm": lambda inputs=inputs: llm.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :],
            "lossless": lambda inputs=inputs: model.generate_lossless(**inputs, llm=llm, **settings),
            "fast": lambda inputs=inputs: model.generate_lossless(**inputs, llm=llm, fast=True, **settings),
        }
        if number == 0:
            [way() for way in ways.values()]  # warm-up, and what has to be compiled
        results, seconds = {}, {}
        names = list(ways)
        for name in names[number % 3 :] + names[: number % 3]:
            start = time.perf_counter()
            results[name] = ways[name]()
            seconds[name] = time.perf_counter() - start
        output = results["lossless"]
        rows.append(
            {
                "identical": {name: torch.equal(results["llm"], results[name].sequences[0]) for name in names[1:]},
                "tokens": output.sequences.shape[1],
                "seconds": seconds,
                **{name: output[name] for name in ("llm_calls", "draft_tokens", "accepted_tokens")},
            }
        )
    total = {name: sum(row["seconds"][name] for row in rows) for name in names}
    summary = {
        "identical": {name: sum(row["identical"][name] for row in rows) for name in names[1:]},
        "acceptance_rate": sum(row["accepted_tokens"] for row in rows) / sum(row["draft_tokens"] for row in rows),
        "tokens_per_llm_call": sum(row["tokens"] for row in rows) / sum(row["llm_calls"] for row in rows),
        "seconds": total,
        "speed_up": {name: total["llm"] / total[name] for name in names[1:]},
        "median_speed_up": {
            name: statistics.median(row["seconds"]["llm"] / row["seconds"][name] for row in rows) for name in names[1:]
        },
    }
    print(dtype, json.dumps(summary))
    return {**summary, "prompts": rows}


if __name__ == "__main__":
    main()
