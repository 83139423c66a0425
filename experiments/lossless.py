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
from tqdm.auto import tqdm

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.data.pairs import load_pairs
from llm2slm.loading_llm2slm import load_slm
from llm2slm.utils import machine, versions

WAYS: dict[str, dict] = {"lossless": {}, "fast": {"fast": True}}


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
    parser.add_argument("--draft-dtype", help="of the pair (default: as the LLM's)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="(default: all)")
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
        "draft_dtype": arguments.draft_dtype,
        "dtypes": {name: compare(arguments, name, tokenizer, prompts) for name in arguments.dtypes},
        "machine": machine(),
        "versions": versions(),
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def compare(arguments: argparse.Namespace, dtype: str, tokenizer, prompts: list[str]) -> dict:
    """Both ways on each prompt; figures of all prompts, and of each."""
    model = LLM2SLMForConditionalGeneration.from_pretrained(
        arguments.model, dtype=arguments.draft_dtype or dtype, load_llm=False
    )
    llm = load_llm_with_head(model.config, arguments.llm, arguments.adapter, dtype)
    ends = {"eos_token_id": tokenizer.llm_tokenizer.eos_token_id, "pad_token_id": tokenizer.llm_tokenizer.pad_token_id}
    settings = {"do_sample": False, "max_new_tokens": arguments.max_new_tokens, **ends}
    names = ["llm", *arguments.ways]

    def write(name: str, inputs):
        if name == "llm":
            return llm.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        return model.generate_lossless(**inputs, llm=llm, **WAYS[name], **settings)

    rows = []
    for number, prompt in enumerate(tqdm(prompts, desc=dtype)):
        inputs = tokenizer(prompt, apply_prompt_format=False, return_tensors="pt")
        if number == 0:
            [write(name, inputs) for name in names]  # warm-up, and what has to be compiled
        results, seconds, turn = {}, {}, number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            results[name] = write(name, inputs)
            seconds[name] = time.perf_counter() - start
        row = {"tokens": len(results["llm"]), "llm_seconds": seconds["llm"]}
        for name in arguments.ways:
            output = results[name]
            counts = {count: output[count] for count in ("llm_calls", "draft_tokens", "accepted_tokens")}
            row[name] = {
                "identical": torch.equal(results["llm"], output.sequences[0]),
                "seconds": seconds[name],
                **counts,
            }
        rows.append(row)
    summary = {name: summarize(rows, name) for name in arguments.ways}
    print(dtype, json.dumps(summary))
    return {**summary, "prompts": rows}


def load_llm_with_head(config, folder: str | None, adapter: str | None, dtype: str):
    """The LLM: the one in `folder`, or else that of the checkpoint; an adapter is merged into it."""
    source = {"revision": config.llm_revision, "gguf_file": config.llm_gguf_file} if folder is None else {}
    llm = load_slm(folder or config.llm_name_or_path, dtype=dtype, **source).eval()
    if adapter is None:
        return llm
    from peft import PeftModel

    return PeftModel.from_pretrained(llm, adapter).merge_and_unload().eval()


def summarize(rows: list[dict], name: str) -> dict:
    """One way of drafting, over all prompts."""
    total = {count: sum(row[name][count] for row in rows) for count in rows[0][name]}
    llm_seconds = sum(row["llm_seconds"] for row in rows)
    return {
        **total,
        "acceptance_rate": total["accepted_tokens"] / total["draft_tokens"],
        "tokens_per_llm_call": sum(row["tokens"] for row in rows) / total["llm_calls"],
        "llm_seconds": llm_seconds,
        "speed_up": llm_seconds / total["seconds"],
        "median_speed_up": statistics.median(row["llm_seconds"] / row[name]["seconds"] for row in rows),
    }


if __name__ == "__main__":
    main()
