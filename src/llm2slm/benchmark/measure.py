"""Latency of LLM-to-SLM beside the SLM alone and the LLM, in one run.

```bash
llm2slm benchmark --model ./checkpoint --output report.json                # a trained checkpoint
llm2slm benchmark --llm google-t5/t5-large --slm google-t5/t5-small        # two pretrained models, projector at random
llm2slm benchmark --llm t5-large --slm t5-small --threads 2                # their sizes, all weights at random
llm2slm benchmark --llm smollm2-135m --slm llama-5m --systems slm llm2slm --repeats 50  # tiny: many short runs
llm2slm benchmark --llm t5-large --slm t5-small --systems slm llm2slm fast llm ctranslate2 --plot latency.png
llm2slm benchmark --model ./checkpoint --systems llm2slm llm lossless llama.cpp --gguf ./llm.gguf
```

How it is made fair:
- All systems read prompts of one length and write responses of one length: end-of-sequence is ruled out until then.
  The SLM alone reads as many tokens through its own embeddings, so it attends to as many positions.
- All take one generation configuration (greedy but for the systems with beam search, default cache), whatever their
  checkpoints say.
- All run in one process, warmed up, and take turns in each repeat, so a busy machine slows all of them. The garbage
  collector waits between the runs. Ratios are taken within a repeat, then summarised.
- Time to first token and the rest come from one run: a streamer notes when each token is there. Two runs would put the
  noise of the LLM's prompt phase into the SLM's time per token. Beam search has a token when it has scored it.
- Beside what was measured stands what `llm2slm estimate` predicts from a probe of this machine, and a token's limit:
  the time its bytes take at the measured bandwidth.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.main import add_loading_arguments, check_new_file, device, main, positive_int, write_aside
from ..utils import cpu_model, reset_peak, resident_bytes
from .random_models import SHAPES

if TYPE_CHECKING:  # torch and transformers are imported when it runs: `--help` is quick
    from .runners import Contender

# What can be measured; those behind `llm` have to be asked for.
NAMES = {
    "slm": "the SLM alone, on its own embeddings of as many tokens",
    "llm2slm": "LLM-to-SLM",
    "llm": "the LLM",
    "fast": "LLM-to-SLM with fast decode",
    "beams": "LLM-to-SLM with beam search (--num-beams)",
    "fast_beams": "the same with fast decode",
    "reuse": "LLM-to-SLM with the prompt's embeddings kept: another question on one document",
    "assisted": "the LLM with --assistant as its assistant (assisted generation)",
    "lossless": "the LLM's own tokens, drafted by LLM-to-SLM (one tokenizer)",
    "ctranslate2": "an encoder-decoder LLM in CTranslate2, int8 (pip install ctranslate2)",
    "llama.cpp": "a GGUF LLM in llama.cpp, as quantized (pip install llama-cpp-python)",
}
DEFAULT_NAMES = ["slm", "llm2slm", "llm"]


# Name of a ratio: the figure it is about, numerator, denominator.
RATIOS = {
    "per_token_llm2slm_to_slm": ("per_token_ms", "llm2slm", "slm"),
    "per_token_llm2slm_to_fast": ("per_token_ms", "llm2slm", "fast"),
    "end_to_end_llm_to_llm2slm": ("end_to_end_s", "llm", "llm2slm"),
    "end_to_end_llm_to_fast": ("end_to_end_s", "llm", "fast"),
    "end_to_end_llm_to_beams": ("end_to_end_s", "llm", "beams"),
    "end_to_end_llm_to_fast_beams": ("end_to_end_s", "llm", "fast_beams"),
    "end_to_end_llm_to_assisted": ("end_to_end_s", "llm", "assisted"),
    "end_to_end_llm_to_lossless": ("end_to_end_s", "llm", "lossless"),
    "end_to_end_llm2slm_to_reuse": ("end_to_end_s", "llm2slm", "reuse"),
    "end_to_end_ctranslate2_to_llm2slm": ("end_to_end_s", "ctranslate2", "llm2slm"),
    "end_to_end_ctranslate2_to_fast": ("end_to_end_s", "ctranslate2", "fast"),
    "end_to_end_llama.cpp_to_llm2slm": ("end_to_end_s", "llama.cpp", "llm2slm"),
    "end_to_end_llama.cpp_to_fast": ("end_to_end_s", "llama.cpp", "fast"),
}


@dataclass
class Runs:
    """
    The measured runs of a contender.

    Args:
        token_s (`list[list[float]]`): For each run, the seconds from its start to each token.
        end_to_end_s (`list[float]`): Seconds of each run.
        peak_bytes (`int`, *optional*): The most memory a run took beside what was there before it.
    """

    token_s: list[list[float]] = field(default_factory=list)
    end_to_end_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


def make_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `llm2slm benchmark`."""
    parser.add_argument("--model", metavar="NAME", help="LLM-to-SLM checkpoint: folder, or name on the Hub")
    parser.add_argument(
        "--slm",
        metavar="NAME",
        help="without --model: the SLM, and --llm the LLM, each a folder, a name on the Hub, or sizes with random "
        "weights: " + ", ".join(SHAPES),
    )
    add_loading_arguments(parser, dtype="float32")
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=list(NAMES),
        default=DEFAULT_NAMES,
        metavar="SYSTEM",
        help="what to measure (default: "
        + " ".join(DEFAULT_NAMES)
        + "). "
        + "; ".join(f"{name}: {what}" for name, what in NAMES.items()),
    )
    parser.add_argument(
        "--num-beams", type=positive_int, default=4, help="of the systems with beam search (default: %(default)s)"
    )
    parser.add_argument("--assistant", metavar="NAME", help="language model that drafts for the system 'assisted'")
    parser.add_argument("--gguf", metavar="FILE", help="the LLM as the system 'llama.cpp' runs it")
    parser.add_argument(
        "--prompt-length", type=positive_int, default=64, metavar="N", help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--response-length",
        type=positive_int,
        default=128,
        metavar="N",
        help="tokens, at least 2 (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=positive_int, default=1, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--threads", type=positive_int, help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument(
        "--repeats", type=positive_int, default=5, help="measured runs of each system (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="new .json file: every figure, timing and the machine")
    parser.add_argument("--plot", metavar="FILE", help="new .png file: latency against the response's length")
    parser.add_argument(
        "--quality",
        nargs="+",
        metavar="SYSTEM=REPORT",
        help="evaluation reports of these systems, for --quality-plot",
    )
    parser.add_argument("--metric", default="chrf", help="the score in them that is drawn (default: %(default)s)")
    parser.add_argument("--quality-plot", metavar="FILE", help="new .png file: score against seconds")


def run(args: argparse.Namespace) -> None:
    """
    Measures, and prints a Markdown table.

    Raises:
        OSError: if a model is missing, or an output exists.
        ValueError: if options disagree, or the lengths are more than a model takes.
        ImportError: if the package of a system is missing.
    """
    if args.model is None and (args.llm is None or args.slm is None):
        raise ValueError("Say what to measure: --model CHECKPOINT, or both --llm and --slm.")
    if args.model is not None and args.slm is not None:
        raise ValueError("--model brings its own SLM: leave out --slm.")
    if args.response_length < 2:
        raise ValueError("--response-length must be at least 2: the time per token is taken from the second on.")
    quality = read_quality(args.quality, args.metric)
    for path in (args.output, args.plot, args.quality_plot):
        check_new_file(path)

    import torch
    from tqdm.auto import tqdm

    from .runners import load_contenders

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    machine = describe_machine(args)  # with the load before this run adds to it
    contenders = load_contenders(args)
    predictions = predict_latencies(contenders, args)
    runs = {contender.name: Runs() for contender in contenders}
    with tqdm(total=(args.repeats + 1) * len(contenders), unit="run", desc="Measuring") as progress:
        for contender in contenders:
            runs[contender.name].peak_bytes = measure_memory(contender, args)  # which warms it up
            progress.update()
        for repeat in range(args.repeats):
            # Back and forth: nobody always comes after the same one, and a slow drift cancels out.
            for contender in contenders if repeat % 2 == 0 else contenders[::-1]:
                token_s, end_to_end_s = measure(contender, args.response_length)
                runs[contender.name].token_s.append(token_s)
                runs[contender.name].end_to_end_s.append(end_to_end_s)
                progress.update()

    report = make_report(args, machine, contenders, runs, predictions)
    print(to_markdown(report))
    if args.output:
        with write_aside(args.output) as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    if args.plot:
        plot_latencies(report, args.plot)
    if args.quality_plot:
        plot_quality(report, quality, args.metric, args.quality_plot)


def read_quality(pairs: list[str] | None, metric: str) -> dict[str, dict[str, float]]:
    """
    Reads the scores of `SYSTEM=REPORT` pairs, evaluation reports.

    Raises:
        OSError: if a report is missing.
        ValueError: if one has no such score, or a pair is not written so.
    """
    scores = {}
    for pair in pairs or []:
        name, _, path = pair.partition("=")
        if not path:
            raise ValueError(f"--quality takes SYSTEM=REPORT.json, got {pair!r}.")
        found = json.loads(Path(path).read_text(encoding="utf-8")).get("scores", {})
        if metric not in found:
            raise ValueError(f"{path} has no score {metric!r}, only {sorted(found)}.")
        scores[name] = found[metric]
    return scores


# -------------------------------------------------------------------------------------------------------- predictions
def predict_latencies(contenders: "list[Contender]", args: argparse.Namespace) -> dict[str, Any]:
    """What `llm2slm estimate` says of those whose costs can be counted, by name, and the machine as it was probed."""
    import torch

    from .costs import costs_of
    from .estimate import predict
    from .machine_speed import probe

    counted = {c.name: costs_of(c.config) for c in contenders if c.name in ("slm", "llm2slm", "llm")}
    if not counted:
        return {"machine": None, "systems": {}}
    dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    machine = probe(
        args.batch_size * args.prompt_length, dtype, device(args), any(c.encoder_decoder for c in counted.values())
    )
    lengths = (args.prompt_length, args.response_length)
    return {
        "machine": dataclasses.asdict(machine),
        "systems": {
            name: predict(costs, machine, lengths, args.batch_size, dtype.itemsize) for name, costs in counted.items()
        },
    }


# -------------------------------------------------------------------------------------------------------- measuring
class Clock:
    """A streamer that notes the time, in seconds, at which each token is there."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        """Called with each new token."""
        self.times.append(time.perf_counter())

    def end(self):
        """Called after the last one."""


def measure(contender: "Contender", num_tokens: int) -> tuple[list[float], float]:
    """
    Runs a contender once.

    Returns:
        `tuple[list[float], float]`: seconds until each token, and until the end.
    """
    import torch

    clock = Clock()
    gc.collect()
    gc.disable()
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        written = contender.generate(num_tokens, clock)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end = time.perf_counter()
    finally:
        gc.enable()
    # `generate` may put the prompt first, but each new token once.
    if written < num_tokens or len(clock.times) < num_tokens:
        raise RuntimeError(f"{contender.name} wrote {written} tokens, not {num_tokens}.")
    return [moment - start for moment in clock.times[-num_tokens:]], end - start


def measure_memory(contender: "Contender", args: argparse.Namespace) -> int | None:
    """The most bytes that a run takes beside what was there before: caches and activations. `None` if unknown."""
    import torch

    chosen = device(args)
    if chosen.type == "cuda":
        torch.cuda.reset_peak_memory_stats(chosen)
        before = torch.cuda.memory_allocated(chosen)
        measure(contender, args.response_length)
        return torch.cuda.max_memory_allocated(chosen) - before
    can_tell, before_bytes = reset_peak(), resident_bytes("VmRSS")
    measure(contender, args.response_length)
    peak_bytes = resident_bytes("VmHWM")
    return peak_bytes - before_bytes if can_tell and peak_bytes is not None and before_bytes is not None else None


# ------------------------------------------------------------------------------------------------------------ report
def make_report(
    args: argparse.Namespace,
    machine: dict[str, Any],
    contenders: "list[Contender]",
    runs: dict[str, Runs],
    predictions: dict[str, Any],
) -> dict[str, Any]:
    """Everything measured, as plain data: milliseconds and seconds, each a median with least and most."""
    raw = {name: figures_of(measured, args) for name, measured in runs.items()}
    return {
        "arguments": {name: value for name, value in vars(args).items() if name not in ("command", "traceback")},
        "machine": machine,
        "probe": predictions["machine"],
        "systems": [
            {
                "name": contender.name,
                "parameters": contender.parameters,
                "weight_mib": contender.weight_bytes / 2**20,
                "run_mib": _mib(runs[contender.name].peak_bytes),
                **{figure: summary(values) for figure, values in raw[contender.name].items()},
                **contender.facts,
                "predicted": predictions["systems"].get(contender.name),
                "token_s": [round(statistics.median(t), 6) for t in zip(*runs[contender.name].token_s, strict=True)],
                "runs": raw[contender.name],
            }
            for contender in contenders
        ],
        "ratios": {
            name: summary([a / b for a, b in zip(raw[above][figure], raw[below][figure], strict=True)])
            for name, (figure, above, below) in RATIOS.items()
            if above in raw and below in raw
        },
        "break_even_tokens": break_even_of(runs),
    }


def figures_of(measured: Runs, args: argparse.Namespace) -> dict[str, list[float]]:
    """The figures of each run of a contender."""
    first = [1000 * moments[0] for moments in measured.token_s]
    total, length = measured.end_to_end_s, args.response_length
    return {
        "first_token_ms": first,
        "per_token_ms": [(1000 * t - f) / (length - 1) for f, t in zip(first, total, strict=True)],
        "tokens_per_second": [args.batch_size * length / t for t in total],
        "end_to_end_s": total,
    }


def break_even_of(runs: dict[str, Runs]) -> int | None:
    """The first token that LLM-to-SLM has written before the LLM has, by the medians; `None` if there is none."""
    if not {"llm2slm", "llm"} <= set(runs):
        return None
    ours, llm = ([statistics.median(t) for t in zip(*runs[name].token_s, strict=True)] for name in ("llm2slm", "llm"))
    return next((i + 1 for i, (a, b) in enumerate(zip(ours, llm, strict=True)) if a < b), None)


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on besides the models."""
    import torch
    import transformers

    chosen = device(args)
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0]
        if hasattr(os, "getloadavg")
        else None,  # of the last minute, before the run
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type,
        "dtype": args.dtype,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table, median (least-most), and a line on how it was measured."""
    arguments, machine = report["arguments"], report["machine"]
    lines = [
        "| System | Parameters | First token ms | Per token ms | Tokens/s | End to end s | Memory MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in report["systems"]:
        figures = [
            spread(system[figure])
            for figure in ("first_token_ms", "per_token_ms", "tokens_per_second", "end_to_end_s")
        ]
        run_mib = "?" if system["run_mib"] is None else f"{system['run_mib']:.0f}"
        lines.append(
            f"| {system['name']} | {system['parameters'] / 1e6:.1f}M | {' | '.join(figures)} "
            f"| {system['weight_mib']:.0f} + {run_mib} |"
        )
    lines.append("")
    for name, ratio in report["ratios"].items():
        figure, above, below = RATIOS[name]
        lines.append(f"- {figure.rsplit('_', 1)[0].replace('_', ' ')}, {above} / {below}: **{spread(ratio)}**")
    if report["break_even_tokens"] is not None:
        lines.append(f"- LLM-to-SLM is ahead of the LLM from token {report['break_even_tokens']} on.")
    for system in report["systems"]:
        if "acceptance_rate" in system:
            lines.append(
                f"- {system['name']}: {system['llm_calls']} calls of the LLM, "
                f"{100 * system['acceptance_rate']:.0f}% of the draft accepted."
            )
    predicted = [system for system in report["systems"] if system["predicted"]]
    if predicted:
        lines += [
            "",
            "| System | Prompt GFLOP | Token GFLOP | Token MB | First token ms: predicted, measured "
            "| Per token ms: limit, predicted, measured |",
            "|---|---|---|---|---|---|",
        ]
    for system in predicted:
        p = system["predicted"]
        lines.append(
            f"| {system['name']} | {p['prompt_gflop']:.3g} | {p['token_gflop']:.3g} | {p['token_mb']:.3g} "
            f"| {p['first_token_ms']:.3g}, {system['first_token_ms']['median']:.3g} "
            f"| {p['token_limit_ms']:.3g}, {p['per_token_ms']:.3g}, {system['per_token_ms']['median']:.3g} |"
        )
    models = arguments["model"] or f"LLM {arguments['llm']}, SLM {arguments['slm']}"
    lines += [
        "",
        f"{models}; prompt {arguments['prompt_length']}, response {arguments['response_length']} tokens, batch "
        f"{arguments['batch_size']}, {machine['dtype']}, {machine['device']}; {machine['cpu']}, {machine['cores']} "
        f"cores, {machine['threads']} threads; torch {machine['torch']}, transformers {machine['transformers']}. "
        f"Median (least-most) of {arguments['repeats']} runs.",
    ]
    if report["probe"] is not None:
        probed = report["probe"]
        lines.append(
            f"The machine, probed: {probed['bandwidth'] / 1e9:.1f} GB/s of weights, "
            f"{probed['flops'] / 1e9:.0f} GFLOP/s. A token's limit is its bytes at that bandwidth."
        )
    return "\n".join(lines)


def spread(figure: dict[str, float]) -> str:
    """A figure with its range, to three digits."""

    def short(value: float) -> str:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

    return f"{short(figure['median'])} ({short(figure['min'])}-{short(figure['max'])})"


# ---------------------------------------------------------------------------------------------------------- pictures
def plot_latencies(report: dict[str, Any], path: str) -> None:
    """Draws how long each system takes to write so many tokens, and where LLM-to-SLM overtakes the LLM, as a PNG."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for system in report["systems"]:
        axes.plot(range(1, len(system["token_s"]) + 1), system["token_s"], label=system["name"])
    even = report["break_even_tokens"]
    if even is not None:
        axes.axvline(even, color="grey", linestyle=":", label=f"llm2slm ahead of llm: token {even}")
    arguments, machine = report["arguments"], report["machine"]
    axes.set(
        title=f"{arguments['model'] or arguments['llm'] + ', ' + arguments['slm']}: prompt of "
        f"{arguments['prompt_length']} tokens, batch {arguments['batch_size']}, {machine['dtype']}",
        xlabel="tokens of the response",
        ylabel="seconds from the prompt (median)",
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")


def plot_quality(report: dict[str, Any], quality: dict[str, dict[str, float]], metric: str, path: str) -> None:
    """Draws each system's score, with its interval, against its end-to-end seconds, as a PNG."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for system in report["systems"]:
        if system["name"] in quality:
            score, seconds = quality[system["name"]], system["end_to_end_s"]["median"]
            interval = [[score["score"] - score["low"]], [score["high"] - score["score"]]]
            axes.errorbar(seconds, score["score"], yerr=interval, fmt="o", capsize=4, label=system["name"])
    arguments = report["arguments"]
    axes.set(
        title="Speed and quality",
        xlabel=f"seconds for {arguments['response_length']} tokens, end to end (log)",
        ylabel=f"{metric}, 95% interval",
        xscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")


if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
