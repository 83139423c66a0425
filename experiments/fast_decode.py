"""
Fast decode beside the plain path, and beside what else was tried: milliseconds per token of one SLM.

    python experiments/fast_decode.py --output results/fast_decode.json
    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) python experiments/fast_decode.py --systems fast  # first_call_s: no cache

All systems write the same tokens in one process and take turns; ratios are taken within a repeat. `bytes` is the time
in which memory gives as many bytes as the SLM's weights have, `linear` that of the SLM's matrix products alone through
`torch.nn.functional.linear`: no way of calling that can be faster.
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, CompileConfig, GenerationConfig

from llm2slm import decoding_llm2slm
from llm2slm.benchmark.random_models import SIZES
from llm2slm.utils import cpu_model

SYSTEMS = {
    "plain": "slm.generate",
    "transformers_compiled": "slm.generate(cache_implementation='static', compile_config=...)",
    "compiled": "fast decode, linear layers through the matrix library",
    "fast": "fast decode",
}


class TokenTimes:
    def __init__(self, now):
        self.now, self.times = now, []

    def put(self, value):
        self.times.append(self.now())

    def end(self):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slm", choices=SIZES, default="llama-15m")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--response-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread's CPU time, least of a run: a busy machine"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)
    runs = [measure(arguments, dtype, size) for dtype in arguments.dtypes for size in arguments.batch_sizes]
    report = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "machine": {"cpu": cpu_model(), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "systems": SYSTEMS,
        "runs": runs,
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


def measure(arguments, dtype, batch_size):
    now = time.thread_time if arguments.cpu_time else time.perf_counter
    typical = min if arguments.cpu_time else statistics.median
    slm = build(arguments.slm, getattr(torch, dtype))
    weights = [parameter.detach() for parameter in slm.parameters() if parameter.ndim == 2]
    other = torch.randn(sum(parameter.nbytes for parameter in slm.parameters()) // 4)
    inputs = [torch.randn(batch_size, weight.shape[1], dtype=weight.dtype) for weight in weights]
    probes = {
        "bytes": lambda: other.sum(),
        "linear": lambda: [torch.nn.functional.linear(x, w) for x, w in zip(inputs, weights, strict=True)],
    }
    # A copy for each: what is compiled belongs to one SLM.
    systems = {name: make_generate(name, copy.deepcopy(slm), arguments, batch_size) for name in arguments.systems}
    first_call, tokens = {}, {}
    for name, generate in systems.items():
        start = time.perf_counter()
        tokens[name] = generate(TokenTimes(now))
        first_call[name] = time.perf_counter() - start
    times = {name: [] for name in [*probes, *systems]}
    for repeat in range(arguments.repeats):
        for name, probe in probes.items():
            times[name].append(1000 * typical(timed(probe, now) for _ in range(50)))
        for name, generate in list(systems.items())[:: 1 if repeat % 2 == 0 else -1]:
            written = TokenTimes(now)
            generate(written)
            put = written.times[-arguments.response_length :]
            steps = [after - before for before, after in itertools.pairwise(put)]
            times[name].append(1000 * typical(steps))
    reference = tokens[arguments.systems[0]]
    return {
        "dtype": dtype,
        "batch_size": batch_size,
        "weights_mb": other.nbytes / 1e6,
        "per_token_ms": {name: statistics.median(values) for name, values in times.items()},
        "first_call_s": first_call,
        "same_tokens": {name: (ids == reference).float().mean().item() for name, ids in tokens.items()},
        "ratios": {
            f"{above}/{below}": statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))
            for above, below in [(name, base) for name in systems for base in ("plain", "bytes") if base in times]
        },
        "runs_ms": times,
    }


def timed(function, now):
    start = now()
    function()
    return now() - start


def build(shape, dtype):
    model_type, sizes = SIZES[shape]
    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_config(config).to(dtype).eval()


def make_generate(name, slm, arguments, batch_size):
    torch.manual_seed(1)
    width = slm.get_input_embeddings().embedding_dim
    embeds = torch.randn(batch_size, arguments.prompt_length, width, dtype=slm.dtype)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    length = arguments.response_length
    start = slm.generation_config.decoder_start_token_id
    config = GenerationConfig(
        max_new_tokens=length, min_new_tokens=length, eos_token_id=0, pad_token_id=0, decoder_start_token_id=start
    )
    if name == "transformers_compiled":
        config.cache_implementation, config.compile_config = "static", CompileConfig(mode="default", fullgraph=True)
    elif name == "compiled":
        compiled = decoding_llm2slm._compile(decoding_llm2slm._logits, "cpu")
        decoding_llm2slm._compiled[slm] = {batch_size: compiled}

    def generate(streamer):
        if name in ("plain", "transformers_compiled"):
            return slm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config, streamer=streamer)
        return decoding_llm2slm.generate_fast(slm, embeds, mask, config, streamer=streamer)

    return generate


if __name__ == "__main__":
    main()
