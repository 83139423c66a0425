"""Latency of LLM-to-SLM beside the SLM alone and the LLM, in one run.

How it is made fair:
- All systems read prompts of one length and write responses of one length: end-of-sequence is ruled out until then.
  The SLM alone reads as many tokens through its own embeddings, so it attends to as many positions.
- All take one generation configuration (greedy but for the systems with beam search, default cache), whatever their
  checkpoints say.
- All run in one process, warmed up, and take turns in each repeat, so a busy machine slows all of them. The garbage
  collector waits between the runs. Ratios are taken within a repeat, then summarised.
- Time to first token and the rest come from one run: a streamer notes when each token is there. Two runs would put the
  noise of the LLM's prompt phase into the SLM's time per token. Beam search has a token when it has scored it.
- Beside what was measured stands what `llm2slm estimate` predicts from this machine's speed, and a token's limit:
  the time its bytes take at the measured bandwidth.
"""

import dataclasses
import gc
import os
import platform
import statistics
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from ..language_models import choose_device
from ..utils import check_installed, check_new_file, cpu_model, reset_peak, resident_bytes, write_json
from .costs import costs_of
from .estimate import predict
from .machine_speed import measure_machine_speed
from .report import (
    DEFAULT_SYSTEMS,
    Runs,
    break_even_of,
    figures_of,
    plot_latencies,
    plot_quality,
    ratios_of,
    read_quality,
    summary,
)
from .runners import Runner, Workload, load_runners


def benchmark(
    model: str | None = None,
    llm: str | None = None,
    slm: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    systems: Sequence[str] = tuple(DEFAULT_SYSTEMS),
    num_beams: int = 4,
    assistant: str | None = None,
    gguf: str | None = None,
    prompt_length: int = 64,
    response_length: int = 128,
    batch_size: int = 1,
    threads: int | None = None,
    repeats: int = 5,
    output: str | None = None,
    plot: str | None = None,
    quality: Sequence[str] = (),
    metric: str = "chrf",
    quality_plot: str | None = None,
) -> dict[str, Any]:
    r"""
    Measures systems side by side.

    Args:
        model (`str`, *optional*):
            An LLM-to-SLM checkpoint, with `revision`, and `llm` where its LLM is, if not where it says. Without one
            `llm` and `slm` are the pair: a folder, a name on the Hub, or one of
            [`~llm2slm.benchmark.random_models.SIZES`].
        dtype (`str`, *optional*, defaults to `"float32"`): Number format of the weights.
        device (`str`, *optional*): Where they are; see [`~llm2slm.language_models.choose_device`].
        systems (`Sequence[str]`, *optional*): Names of [`~llm2slm.benchmark.report.SYSTEMS`].
        num_beams (`int`, *optional*, defaults to 4): Of the systems with beam search.
        assistant (`str`, *optional*): The language model that drafts for the system `"assisted"`.
        gguf (`str`, *optional*): The LLM as the system `"llama.cpp"` runs it.
        prompt_length, response_length (`int`, *optional*, default to 64 and 128): In tokens.
        batch_size (`int`, *optional*, defaults to 1): Prompts at a time.
        threads (`int`, *optional*): CPU threads of torch; its own choice if omitted.
        repeats (`int`, *optional*, defaults to 5): Measured runs of each system.
        output (`str`, *optional*): New `.json` file for the report.
        plot (`str`, *optional*): New `.png` file: latency against the response's length.
        quality (`Sequence[str]`, *optional*): `SYSTEM=REPORT`, evaluation reports of the systems, for `quality_plot`.
        metric (`str`, *optional*, defaults to `"chrf"`): The score in them that is drawn.
        quality_plot (`str`, *optional*): New `.png` file: score against seconds.

    Returns:
        `dict[str, Any]`: the report.

    Raises:
        OSError: if a model is missing, or an output exists.
        ValueError: if arguments disagree, or the lengths are more than a model takes.
        ImportError: if the package of a system, or what draws pictures, is missing.
    """
    arguments = dict(locals())
    if model is None and (llm is None or slm is None):
        raise ValueError("Say what to measure: --model CHECKPOINT, or both --llm and --slm.")
    if model is not None and slm is not None:
        raise ValueError("--model brings its own SLM: leave out --slm.")
    if response_length < 2:
        raise ValueError("--response-length must be at least 2: the time per token is taken from the second on.")
    if plot or quality_plot:
        check_installed("A picture", "matplotlib")
    scores = read_quality(quality, metric)
    for path in (output, plot, quality_plot):
        check_new_file(path)
    if threads is not None:
        torch.set_num_threads(threads)
    work = Workload(prompt_length, response_length, batch_size, num_beams, dtype, choose_device(device))
    machine = describe_machine(work.device, dtype)  # with the load before this run adds to it
    runners = load_runners(systems, work, model, llm, slm, revision, assistant, gguf)
    predictions = predict_latencies(runners, work)
    runs = {runner.name: Runs() for runner in runners}
    with tqdm(total=(repeats + 1) * len(runners), unit="run", desc="Measuring") as progress:
        for runner in runners:  # which warms it up
            runs[runner.name].peak_bytes = measure_memory(runner, response_length, work.device)
            progress.update()
        for repeat in range(repeats):
            # Back and forth: nobody always comes after the same one, and a slow drift cancels out.
            for runner in runners if repeat % 2 == 0 else runners[::-1]:
                token_s, end_to_end_s = measure(runner, response_length)
                runs[runner.name].token_s.append(token_s)
                runs[runner.name].end_to_end_s.append(end_to_end_s)
                progress.update()

    report = make_report(arguments, machine, runners, runs, predictions)
    if output:
        write_json(output, report)
    if plot:
        plot_latencies(report, plot)
    if quality_plot:
        plot_quality(report, scores, metric, quality_plot)
    return report


# -------------------------------------------------------------------------------------------------------- predictions
def predict_latencies(runners: list[Runner], work: Workload) -> dict[str, Any]:
    """What `llm2slm estimate` says of those whose costs can be counted, by name, and the machine's speed."""
    counted = {r.name: costs_of(r.config) for r in runners if r.name in ("slm", "llm2slm", "llm")}
    if not counted:
        return {"machine": None, "systems": {}}
    stored = next((r.config.dtype for r in runners if r.name in counted and r.config.dtype is not None), "float32")
    dtype = getattr(torch, str(stored).removeprefix("torch.") if work.dtype == "auto" else work.dtype)
    encoder_decoder = any(costs.encoder_decoder for costs in counted.values())
    speed = measure_machine_speed(work.batch_size * work.prompt_length, dtype, work.device, encoder_decoder)
    lengths = (work.prompt_length, work.response_length)
    return {
        "machine": dataclasses.asdict(speed),
        "systems": {
            name: predict(costs, speed, lengths, work.batch_size, dtype.itemsize) for name, costs in counted.items()
        },
    }


# ----------------------------------------------------------------------------------------------------------- measuring
class TokenTimes:
    """A streamer that notes the time, in seconds, at which each token is there."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        """Called with each new token."""
        self.times.append(time.perf_counter())

    def end(self):
        """Called after the last one."""


def measure(runner: Runner, num_tokens: int) -> tuple[list[float], float]:
    """
    Runs a system once.

    Returns:
        `tuple[list[float], float]`: seconds until each token, and until the end.
    """
    token_times = TokenTimes()
    gc.collect()
    gc.disable()
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        written = runner.generate(num_tokens, token_times)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end = time.perf_counter()
    finally:
        gc.enable()
    # `generate` may put the prompt first, but each new token once.
    if written < num_tokens or len(token_times.times) < num_tokens:
        raise RuntimeError(f"{runner.name} wrote {written} tokens, not {num_tokens}.")
    return [moment - start for moment in token_times.times[-num_tokens:]], end - start


def measure_memory(runner: Runner, num_tokens: int, device: torch.device) -> int | None:
    """The most bytes that a run takes beside what was there before: caches and activations. `None` if unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        measure(runner, num_tokens)
        return torch.cuda.max_memory_allocated(device) - before
    can_tell, before_bytes = reset_peak(), resident_bytes("VmRSS")
    measure(runner, num_tokens)
    peak_bytes = resident_bytes("VmHWM")
    return peak_bytes - before_bytes if can_tell and peak_bytes is not None and before_bytes is not None else None


# -------------------------------------------------------------------------------------------------------------- report
def make_report(
    arguments: dict[str, Any],
    machine: dict[str, Any],
    runners: list[Runner],
    runs: dict[str, Runs],
    predictions: dict[str, Any],
) -> dict[str, Any]:
    """Everything measured, as plain data: milliseconds and seconds, each a median with least and most."""
    raw = {
        name: figures_of(measured, arguments["response_length"], arguments["batch_size"])
        for name, measured in runs.items()
    }
    return {
        "arguments": arguments,
        "machine": machine,
        "probe": predictions["machine"],  # its speeds, as `llm2slm estimate` measures them
        "systems": [
            {
                "name": runner.name,
                "parameters": runner.parameters,
                "weight_mib": runner.weight_bytes / 2**20,
                "run_mib": _mib(runs[runner.name].peak_bytes),
                **{figure: summary(values) for figure, values in raw[runner.name].items()},
                **runner.facts,
                "predicted": predictions["systems"].get(runner.name),
                "token_s": [round(statistics.median(t), 6) for t in zip(*runs[runner.name].token_s, strict=True)],
                "runs": raw[runner.name],
            }
            for runner in runners
        ],
        "ratios": ratios_of(raw),
        "break_even_tokens": break_even_of(runs),
    }


def describe_machine(device: torch.device, dtype: str) -> dict[str, Any]:
    """What the figures depend on besides the models."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0]
        if hasattr(os, "getloadavg")
        else None,  # of the last minute, before the run
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": dtype,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20
