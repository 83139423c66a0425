"""How fast this machine is, from ten seconds of measuring: what a prediction of latencies needs.

A speed is that of the fastest tenth of many calls: others who use the machine only ever add to a call's time. Where the
other calls took much longer, or the calls had to wait for a processor, it is measured again. If that did not help, what
is printed says so: two threads on busy cores are slow in every call, as each waits for the other.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from .report import is_busy

SECONDS_EACH = 1.5
MAX_ROUNDS = 4  # of so many seconds, as long as the machine is busy
# More than any cache holds: 128 MiB in bfloat16.
READ_SHAPE = (8192, 8192)


@dataclass
class MachineSpeed:
    """
    What was measured, in the dtype and on the device asked for.

    Args:
        bandwidth (`float`): Bytes of weights a second that a matrix-vector product reads.
        flops (`float`): Floating-point operations a second of a matrix product with as many rows as the prompt.
        layer_s (`float`): Seconds that a layer of a decoder takes when it has nearly nothing to compute.
        token_s (`float`): Seconds that `generate` takes besides, for each token.
        overlaps (`bool`): Whether these pass while the device computes (on a GPU) rather than in turn (on a CPU).
        spread (`float`, *optional*, defaults to 1.0):
            How many times as long as the fastest tenth of the calls the middle one took, at most.
        running (`float`, *optional*, defaults to 1.0): The share of its time that a call had a processor, at least.
    """

    bandwidth: float
    flops: float
    layer_s: float
    token_s: float
    overlaps: bool
    spread: float = 1.0
    running: float = 1.0


class Timing(NamedTuple):
    """Seconds of the fastest tenth of some calls, and how busy the machine was: see [`MachineSpeed`]."""

    seconds: float
    spread: float
    running: float


def measure_machine_speed(
    rows: int, dtype: torch.dtype, device: torch.device, encoder_decoder: bool = False
) -> MachineSpeed:
    r"""
    Measures this machine.

    Args:
        rows (`int`): Positions in a prompt phase: batch size times prompt length.
        dtype (`torch.dtype`): Of the weights.
        device (`torch.device`): Where they are.
        encoder_decoder (`bool`, *optional*, defaults to `False`): Whether the layers are T5's rather than Llama's.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    with torch.inference_mode():
        weight, row = random(*READ_SHAPE), random(1, READ_SHAPE[1])
        read = time_calls(lambda: nn.functional.linear(row, weight), device)
        del weight
        weight, many = random(1024, 1024), random(rows, 1024)
        product = time_calls(lambda: nn.functional.linear(many, weight), device)
        shallow, deep = (_time_token(layers, dtype, device, encoder_decoder) for layers in (2, 10))
    layer_s = max(deep.seconds - shallow.seconds, 0.0) / 8
    timings = (read, product, shallow, deep)
    return MachineSpeed(
        bandwidth=READ_SHAPE[0] * READ_SHAPE[1] * dtype.itemsize / read.seconds,
        flops=2 * rows * 1024 * 1024 / product.seconds,
        layer_s=layer_s,
        token_s=max(shallow.seconds - 2 * layer_s, 0.0),
        overlaps=device.type != "cpu",
        spread=max(timing.spread for timing in timings),
        running=min(timing.running for timing in timings),
    )


def time_calls(
    call: Callable[[], Any],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    processor_clock: Callable[[], float] = time.thread_time,
) -> Timing:
    r"""
    The time of a call on a quiet machine.

    Args:
        call (`Callable`): What is timed, for `SECONDS_EACH`, and up to `MAX_ROUNDS` times that if the machine is busy.
        device (`torch.device`): Where it computes.
        clock (`Callable`, *optional*): What tells the time, in seconds.
        processor_clock (`Callable`, *optional*): What tells the time, in seconds, that this thread had a processor.
    """
    call()
    times: list[float] = []
    had_processor = 0.0
    for _ in range(MAX_ROUNDS):
        end, wanted = clock() + SECONDS_EACH, len(times) + 5
        while clock() < end or len(times) < wanted:
            start, processor_start = clock(), processor_clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            had_processor += processor_clock() - processor_start
            times.append(clock() - start)
        fastest = statistics.median(sorted(times)[: math.ceil(len(times) / 10)])
        # Where another device computes, the thread may sleep meanwhile.
        running = had_processor / sum(times) if device.type == "cpu" else 1.0
        timing = Timing(fastest, statistics.median(times) / fastest, min(running, 1.0))
        if not is_busy(timing.spread, timing.running):
            break
    return timing


def _time_token(layers: int, dtype: torch.dtype, device: torch.device, encoder_decoder: bool) -> Timing:
    """The time of a token of a tiny model, where weights and arithmetic count for nothing."""
    if encoder_decoder:
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": layers}
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    else:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))
    model = model.to(device, dtype).eval()
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
    ids = torch.full((1, 4), 5, device=device)
    num_tokens = 24

    def write():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
        )

    timing = time_calls(write, device)
    return timing._replace(seconds=timing.seconds / num_tokens)
