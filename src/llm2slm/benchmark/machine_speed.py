"""How fast this machine is, from ten seconds of measuring: what a prediction of latencies needs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

SECONDS_EACH = 1.5
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
    """

    bandwidth: float
    flops: float
    layer_s: float
    token_s: float
    overlaps: bool


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
        read_s = _seconds(lambda: nn.functional.linear(row, weight), device)
        del weight
        weight, many = random(1024, 1024), random(rows, 1024)
        product_s = _seconds(lambda: nn.functional.linear(many, weight), device)
        shallow, deep = (_step_seconds(layers, dtype, device, encoder_decoder) for layers in (2, 10))
    layer_s = max(deep - shallow, 0.0) / 8
    return MachineSpeed(
        bandwidth=READ_SHAPE[0] * READ_SHAPE[1] * dtype.itemsize / read_s,
        flops=2 * rows * 1024 * 1024 / product_s,
        layer_s=layer_s,
        token_s=max(shallow - 2 * layer_s, 0.0),
        overlaps=device.type != "cpu",
    )


def _seconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """The median time of a call."""
    call()
    times: list[float] = []
    end = time.perf_counter() + SECONDS_EACH
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _step_seconds(layers: int, dtype: torch.dtype, device: torch.device, encoder_decoder: bool) -> float:
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

    return _seconds(write, device) / num_tokens
