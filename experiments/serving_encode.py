"""
What it takes vLLM's engine to encode prompts, on one core: seconds for one, for eight of a length and for a mix.

    python experiments/serving_encode.py --checkpoint model_cards/simplify-smollm2-135m \\
        --output results/serving_encode.json

It runs where vLLM and the plugin are installed. `packed` is how the plugin runs the linear layers of the LLM on a CPU:
as vLLM runs those of its own models, with their weights laid out beforehand.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import llm2slm  # noqa: F401  (registers the configuration)
from llm2slm.serving.vllm_encoder import PromptEncoder
from llm2slm.utils import check_new_file, machine, versions, write_json

LENGTHS = {"one of 32 tokens": [32], "eight of 32": [32] * 8, "20, 30, 40 and 58": [20, 30, 40, 58]}


def measure(encoder: PromptEncoder, repeats: int) -> dict[str, float]:
    """Milliseconds for each batch of prompts: the least of the repeats."""
    milliseconds = {}
    for name, lengths in LENGTHS.items():
        prompts = [torch.randint(5, 4000, (length,)) for length in lengths]
        encoder(prompts)
        took = []
        for _ in range(repeats):
            started = time.perf_counter()
            encoder(prompts)
            took.append(1000 * (time.perf_counter() - started))
        milliseconds[name] = min(took)
    return milliseconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a pair")
    parser.add_argument("--repeats", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()
    check_new_file(arguments.output)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config, rows = AutoConfig.from_pretrained(arguments.checkpoint), []
    weights = load_file(Path(arguments.checkpoint) / "model.safetensors")
    for dtype in ("bfloat16", "float32"):
        encoder = PromptEncoder(config, getattr(torch, dtype), torch.device("cpu"))
        encoder.load({place: weights[name] for name in weights if (place := encoder.place_of(name)) is not None})
        rows.append({"dtype": dtype, "linear": "as it is", **measure(encoder, arguments.repeats)})
        encoder.pack()
        rows.append({"dtype": dtype, "linear": "packed", **measure(encoder, arguments.repeats)})
    report = {"checkpoint": arguments.checkpoint, "machine": machine(), "versions": versions()}
    write_json(arguments.output, {**report, "milliseconds": rows})


if __name__ == "__main__":
    main()
