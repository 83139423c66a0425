"""
The frozen LLM in other number formats: the time of the prompt phase, its weights, and what the SLM loses by it.

    pip install torchao
    python experiments/llm_formats.py --model model_cards/simplify-smollm2-135m --llm SMOLLM2 --data data/simplify \
        --output results/llm_formats.json

SMOLLM2 is SmolLM2-135M-Instruct as safetensors: Transformers does not quantize what it reads from a GGUF file.
"""

import argparse
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.data.collator import DataCollatorForLLM2SLM, tokenize_pairs
from llm2slm.data.pairs import load_pairs
from llm2slm.utils import machine, versions

FORMATS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8 weights": ("bfloat16", Int8WeightOnlyConfig),
    "int8 weights and activations, bfloat16": ("bfloat16", Int8DynamicActivationInt8WeightConfig),
    "int8 weights and activations, float32": ("float32", Int8DynamicActivationInt8WeightConfig),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="LLM-to-SLM checkpoint")
    parser.add_argument("--llm", required=True, help="its LLM, a folder with safetensors")
    parser.add_argument("--data", required=True, help="data set with the pairs whose loss is measured")
    parser.add_argument("--examples", type=int, default=400, help="of its test split (default: %(default)s)")
    parser.add_argument("--prompt-length", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()

    tokenizer = LLM2SLMTokenizer.from_pretrained(arguments.model)
    pairs = load_pairs(arguments.data, "test", "{prompt}\n", None, arguments.examples)
    rows = tokenize_pairs(pairs, tokenizer, prompt_max_length=256, response_max_length=256)
    models = {name: load(arguments, *number_format) for name, number_format in FORMATS.items()}
    prompt_ms = {n: interleaved_ms(models, n, arguments) for n in (1, 16)}
    formats = {}
    for name, model in models.items():
        formats[name] = {
            "weight_mib": sum(map(stored_bytes, model.llm.parameters())) / 2**20,
            "prompt_ms": {n: times[name] for n, times in prompt_ms.items()},
            "loss": loss(model, rows, DataCollatorForLLM2SLM(tokenizer)),
        }
        print(name, formats[name])
    report = {
        "examples": len(rows),
        "prompt_length": arguments.prompt_length,
        "formats": formats,
        "machine": machine(),
        "versions": versions() | {"torchao": version("torchao")},
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def load(arguments: argparse.Namespace, dtype: str, quantization):
    """The checkpoint with a float32 SLM and the LLM in another format."""
    model = LLM2SLMForConditionalGeneration.from_pretrained(arguments.model, dtype="float32", load_llm=False)
    quantized = {} if quantization is None else {"quantization_config": TorchAoConfig(quantization())}
    return model.load_llm(arguments.llm, dtype=dtype, check=not quantized, **quantized).eval()


def stored_bytes(weight: torch.Tensor) -> int:
    """Of a plain weight, or of the tensors that a quantized one consists of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])


def interleaved_ms(models: dict, batch_size: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Of the prompt phase in each format, the medians of runs in turns, the first left out."""
    ids = torch.randint(0, 1000, (batch_size, arguments.prompt_length), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model.encode_prompt(ids)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


@torch.no_grad()
def loss(model, rows, collator) -> float:
    """Of a response token, the mean over all of them."""
    total, count = 0.0, 0
    for start in range(0, len(rows), 16):
        batch = collator([rows[i] for i in range(start, min(start + 16, len(rows)))])
        tokens = int((batch["labels"] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return total / count


if __name__ == "__main__":
    main()
