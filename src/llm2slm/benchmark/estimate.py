"""What LLM-to-SLM would gain for a pair of models on this machine, before any training and without their weights.

The machine's speed is measured for about ten seconds, longer while others use it. A prompt phase takes as long as its
floating-point operations at the measured rate or, if longer, reading its weights; a token as long as reading its
weights and cache; each layer and each token has an overhead besides, which adds up on a CPU and overlaps on a GPU.
`llm2slm benchmark` prints these predictions beside what it measures.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..configuration_llm2slm import LLM2SLMConfig
from ..language_models import choose_device
from ..utils import check_new_file, write_json
from .costs import Costs, costs_of
from .machine_speed import MachineSpeed, measure_machine_speed
from .random_models import load_config
from .report import describe_busy


def estimate(
    llm: str,
    slm: str,
    llm_layer: Sequence[int] = (-1,),
    prompt_length: int = 64,
    response_length: int = 128,
    batch_size: int = 1,
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    r"""
    Measures the machine's speed, and predicts.

    Args:
        llm, slm (`str`):
            Names on the Hub or folders, of which the configurations are read, or names of
            [`~llm2slm.benchmark.random_models.SIZES`].
        llm_layer (`Sequence[int]`, *optional*): The layers that are read; the last one if omitted.
        prompt_length, response_length (`int`, *optional*, default to 64 and 128): In tokens.
        batch_size (`int`, *optional*, defaults to 1): Prompts at a time.
        dtype (`str`, *optional*, defaults to `"float32"`): Number format of the weights.
        device (`str`, *optional*): Where they would be; see [`~llm2slm.language_models.choose_device`].
        threads (`int`, *optional*): CPU threads of torch; its own choice if omitted.
        output (`str`, *optional*): New `.json` file for the report.

    Returns:
        `dict[str, Any]`: what was counted, measured and predicted.

    Raises:
        OSError: if a configuration is missing, or the output exists.
        ValueError: if a layer is not one of the LLM's.
    """
    arguments = dict(locals())
    check_new_file(output)
    if threads is not None:
        torch.set_num_threads(threads)
    llm_config, slm_config = load_config(llm), load_config(slm)
    layer = list(llm_layer) if len(llm_layer) > 1 else llm_layer[0]
    pair = LLM2SLMConfig.from_sub_configs(llm_config, slm_config, llm_layer=layer)
    costs = {"llm": costs_of(llm_config), "slm": costs_of(slm_config), "llm2slm": costs_of(pair)}
    number_format = getattr(torch, dtype)
    speed = measure_machine_speed(
        batch_size * prompt_length, number_format, choose_device(device), costs["llm"].encoder_decoder
    )
    report = make_report(arguments, costs, speed, number_format.itemsize)
    if output:
        write_json(output, report)
    return report


def predict(
    costs: Costs, speed: MachineSpeed, lengths: tuple[int, int], batch_size: int, bytes_per_number: float
) -> dict[str, float]:
    r"""
    Predicts the latencies of a system.

    Args:
        costs ([`~llm2slm.benchmark.costs.Costs`]): What the system computes and reads.
        speed ([`~llm2slm.benchmark.machine_speed.MachineSpeed`]): Of what it runs on.
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
    first = speed.token_s
    for stage in [*costs.prompt, costs.head]:
        positions = 1 if stage is costs.head else prompt_length
        compute = batch_size * stage.flops(positions, prompt_length) / speed.flops
        read = stage.weights * bytes_per_number / speed.bandwidth
        first += _together(speed, max(compute, read), stage.layers * speed.layer_s)
    token_bytes = costs.token_bytes(context, batch_size, bytes_per_number)
    limit = token_bytes / speed.bandwidth
    if batch_size > 1:  # one row is a matrix-vector product, whose rate is the bandwidth's
        limit = max(limit, costs.token_flops(context, batch_size) / speed.flops)
    token = _together(speed, limit, costs.token.layers * speed.layer_s + speed.token_s)
    return {
        "first_token_ms": 1e3 * first,
        "per_token_ms": 1e3 * token,
        "end_to_end_s": first + (response_length - 1) * token,
        "prompt_gflop": costs.prompt_flops(prompt_length, batch_size) / 1e9,
        "token_gflop": costs.token_flops(context, batch_size) / 1e9,
        "token_mb": token_bytes / 1e6,
        "token_limit_ms": 1e3 * limit,
    }


def _together(speed: MachineSpeed, work: float, overhead: float) -> float:
    return max(work, overhead) if speed.overlaps else work + overhead


def break_even(ours: dict[str, float], other: dict[str, float]) -> int | None:
    """The response length, in tokens, from which the first system ends before the other; `None` if it never does."""
    start = ours["first_token_ms"] - other["first_token_ms"]
    gain = other["per_token_ms"] - ours["per_token_ms"]
    if start <= 0:
        return 1 if gain >= 0 else None
    return None if gain <= 0 else math.floor(start / gain) + 2


def make_report(
    arguments: dict[str, Any], costs: dict[str, Costs], speed: MachineSpeed, bytes_per_number: float
) -> dict[str, Any]:
    """What was counted, measured and predicted, as plain data."""
    lengths = (arguments["prompt_length"], arguments["response_length"])
    predictions = {
        name: predict(part, speed, lengths, arguments["batch_size"], bytes_per_number) for name, part in costs.items()
    }
    ours, llm = predictions["llm2slm"], predictions["llm"]
    return {
        "arguments": arguments,
        "machine": dataclasses.asdict(speed),
        "systems": {name: {"parameters": costs[name].parameters, **predictions[name]} for name in predictions},
        "speed_up": llm["end_to_end_s"] / ours["end_to_end_s"],
        "speed_up_per_token": llm["per_token_ms"] / ours["per_token_ms"],
        "break_even_tokens": break_even(ours, llm),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table and a sentence."""
    arguments, speed = report["arguments"], report["machine"]
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
        f"This machine: {speed['bandwidth'] / 1e9:.1f} GB/s, {speed['flops'] / 1e9:.0f} GFLOP/s, "
        f"{1e3 * speed['layer_s']:.2f} ms a layer and {1e3 * speed['token_s']:.2f} ms a token besides.",
        *describe_busy(speed),
    ]
    return "\n".join(lines)
