"""What LLM-to-SLM would gain for a pair of models on this machine, before any training and without their weights.

```bash
llm2slm estimate --llm google-t5/t5-large --slm google-t5/t5-small
llm2slm estimate --llm smollm2-135m --slm llama-15m --prompt-length 200 --response-length 60 --dtype bfloat16
llm2slm estimate --llm ./llm.gguf --slm ./slm --output estimate.json
```

The machine is probed for about ten seconds. A prompt phase takes as long as its floating-point operations at the
measured rate or, if longer, reading its weights; a token as long as reading its weights and cache; each layer and each
token has an overhead besides, which adds up on a CPU and overlaps on a GPU. `llm2slm benchmark` prints these
predictions beside what it measures.
"""

import argparse
import dataclasses
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from ..cli.main import check_new_file, device, main, positive_int, write_aside
from .random_models import SHAPES, load_config

if TYPE_CHECKING:  # torch and transformers are imported when it runs: `--help` is quick
    from .costs import Costs
    from .machine_speed import Machine


def make_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `llm2slm estimate`."""
    for name in ("llm", "slm"):
        parser.add_argument(
            f"--{name}",
            required=True,
            metavar="NAME",
            help=f"the {name.upper()}: name on the Hub or folder, of which the configuration is read, or sizes: "
            + ", ".join(SHAPES),
        )
    parser.add_argument("--llm-layer", type=int, nargs="+", default=[-1], help="layers read (default: the last)")
    parser.add_argument("--prompt-length", type=positive_int, default=64, help="tokens (default: %(default)s)")
    parser.add_argument("--response-length", type=positive_int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=1, help="prompts at a time (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--threads", type=positive_int, help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument("--output", metavar="FILE", help="new .json file: what was counted, probed and predicted")


def run(args: argparse.Namespace) -> None:
    """
    Probes the machine, predicts, and prints a Markdown table.

    Raises:
        OSError: if a configuration is missing, or the output exists.
        ValueError: if a layer is not one of the LLM's.
    """
    import torch

    from ..configuration_llm2slm import LLM2SLMConfig
    from .costs import costs_of
    from .machine_speed import probe

    check_new_file(args.output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    llm, slm = load_config(args.llm), load_config(args.slm)
    layer = args.llm_layer if len(args.llm_layer) > 1 else args.llm_layer[0]
    pair = LLM2SLMConfig.from_sub_configs(llm, slm, llm_layer=layer)
    costs = {"llm": costs_of(llm), "slm": costs_of(slm), "llm2slm": costs_of(pair)}
    machine = probe(
        args.batch_size * args.prompt_length,
        getattr(torch, args.dtype),
        device(args),
        encoder_decoder=costs["llm"].encoder_decoder,
    )
    report = make_report(args, costs, machine, getattr(torch, args.dtype).itemsize)
    print(to_markdown(report))
    if args.output:
        with write_aside(args.output) as file:
            json.dump(report, file, indent=2)
            file.write("\n")


def predict(
    costs: "Costs", machine: "Machine", lengths: tuple[int, int], batch_size: int, bytes_per_number: float
) -> dict[str, float]:
    r"""
    Predicts the latencies of a system.

    Args:
        costs ([`~llm2slm.benchmark.costs.Costs`]): What the system computes and reads.
        machine ([`~llm2slm.benchmark.machine_speed.Machine`]): What it runs on.
        lengths (`tuple[int, int]`): Tokens of prompt and response.
        batch_size (`int`): Prompts at a time.
        bytes_per_number (`float`): Of a weight, and of a number in the cache.

    Returns:
        `dict[str, float]`: `first_token_ms`, `per_token_ms` and `end_to_end_s`; what they are made of:
        `prompt_gflop`, `token_gflop` and `token_mb`; and `token_limit_ms`, the time that a token's bytes or operations
        take at least.
    """
    prompt_length, response_length = lengths
    context = prompt_length + response_length // 2  # a token's, on the average
    first = machine.token_s
    for stage in [*costs.prompt, costs.head]:
        positions = 1 if stage is costs.head else prompt_length
        compute = batch_size * stage.flops(positions, prompt_length) / machine.flops
        read = stage.weights * bytes_per_number / machine.bandwidth
        first += _together(machine, max(compute, read), stage.layers * machine.layer_s)
    token_bytes = costs.token_bytes(context, batch_size, bytes_per_number)
    limit = token_bytes / machine.bandwidth
    if batch_size > 1:  # one row is a matrix-vector product, whose rate is the bandwidth's
        limit = max(limit, costs.token_flops(context, batch_size) / machine.flops)
    token = _together(machine, limit, costs.token.layers * machine.layer_s + machine.token_s)
    return {
        "first_token_ms": 1e3 * first,
        "per_token_ms": 1e3 * token,
        "end_to_end_s": first + (response_length - 1) * token,
        "prompt_gflop": costs.prompt_flops(prompt_length, batch_size) / 1e9,
        "token_gflop": costs.token_flops(context, batch_size) / 1e9,
        "token_mb": token_bytes / 1e6,
        "token_limit_ms": 1e3 * limit,
    }


def _together(machine: "Machine", work: float, overhead: float) -> float:
    return max(work, overhead) if machine.overlaps else work + overhead


def break_even(ours: dict[str, float], other: dict[str, float]) -> int | None:
    """The response length, in tokens, from which the first system ends before the other; `None` if it never does."""
    start = ours["first_token_ms"] - other["first_token_ms"]
    gain = other["per_token_ms"] - ours["per_token_ms"]
    if start <= 0:
        return 1 if gain >= 0 else None
    return None if gain <= 0 else math.floor(start / gain) + 2


def make_report(args, costs: "dict[str, Costs]", machine: "Machine", bytes_per_number: float) -> dict[str, Any]:
    """What was counted, probed and predicted, as plain data."""
    lengths = (args.prompt_length, args.response_length)
    predictions = {
        name: predict(part, machine, lengths, args.batch_size, bytes_per_number) for name, part in costs.items()
    }
    ours, llm = predictions["llm2slm"], predictions["llm"]
    return {
        "arguments": {name: value for name, value in vars(args).items() if name not in ("command", "traceback")},
        "machine": dataclasses.asdict(machine),
        "systems": {name: {"parameters": costs[name].parameters, **predictions[name]} for name in predictions},
        "speed_up": llm["end_to_end_s"] / ours["end_to_end_s"],
        "speed_up_per_token": llm["per_token_ms"] / ours["per_token_ms"],
        "break_even_tokens": break_even(ours, llm),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table and a sentence."""
    arguments, machine = report["arguments"], report["machine"]
    lines = [
        "| System | Parameters | Prompt GFLOP | Token GFLOP | Token MB | First token ms | Per token ms "
        "| End to end s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["systems"].items():
        figures = ("prompt_gflop", "token_gflop", "token_mb", "first_token_ms", "per_token_ms", "end_to_end_s")
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.1f}M | " + " | ".join(f"{row[f]:.3g}" for f in figures) + " |"
        )
    length = report["break_even_tokens"]
    when = "never before the LLM" if length is None else f"before the LLM for responses from {length} tokens on"
    lines += [
        "",
        f"Predicted: {report['speed_up']:.1f}x as fast end to end ({arguments['response_length']} tokens), "
        f"{report['speed_up_per_token']:.1f}x per token; LLM-to-SLM ends {when}.",
        f"Probed: {machine['bandwidth'] / 1e9:.1f} GB/s, {machine['flops'] / 1e9:.0f} GFLOP/s, "
        f"{1e3 * machine['layer_s']:.2f} ms a layer and {1e3 * machine['token_s']:.2f} ms a token besides.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(["estimate", *sys.argv[1:]]))
