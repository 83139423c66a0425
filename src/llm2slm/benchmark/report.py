"""The report of a benchmark: its figures, its tables, its pictures. Without torch, so that `--help` stays quick."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..utils import check_installed, read_json

# What can be measured; those behind `llm` have to be asked for.
SYSTEMS = {
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
DEFAULT_SYSTEMS = ["slm", "llm2slm", "llm"]

# Of a busy machine: how many times as long as the fastest tenth of some calls the middle one takes, and the share of its
# time that a call has a processor. A quiet one has 1.1 and 1.0; two others on both cores made it 8.9 and 0.4.
WIDE_SPREAD, LITTLE_RUNNING = 1.5, 0.8

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
    The measured runs of a system.

    Args:
        token_s (`list[list[float]]`): For each run, the seconds from its start to each token.
        end_to_end_s (`list[float]`): Seconds of each run.
        peak_bytes (`int`, *optional*): The most memory a run took beside what was there before it.
    """

    token_s: list[list[float]] = field(default_factory=list)
    end_to_end_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


# ------------------------------------------------------------------------------------------------------------- figures
def figures_of(measured: Runs, response_length: int, batch_size: int) -> dict[str, list[float]]:
    """The figures of each run of a system."""
    first = [1000 * moments[0] for moments in measured.token_s]
    total, length = measured.end_to_end_s, response_length
    return {
        "first_token_ms": first,
        "per_token_ms": [(1000 * t - f) / (length - 1) for f, t in zip(first, total, strict=True)],
        "tokens_per_second": [batch_size * length / t for t in total],
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


def ratios_of(raw: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """The `RATIOS` of the systems that were measured, from the figures of each run."""
    return {
        name: summary([a / b for a, b in zip(raw[above][figure], raw[below][figure], strict=True)])
        for name, (figure, above, below) in RATIOS.items()
        if above in raw and below in raw
    }


# -------------------------------------------------------------------------------------------------------------- tables
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
            f"This machine: {probed['bandwidth'] / 1e9:.1f} GB/s of weights, "
            f"{probed['flops'] / 1e9:.0f} GFLOP/s. A token's limit is its bytes at that bandwidth."
        )
        lines += describe_busy(probed)
    return "\n".join(lines)


def is_busy(spread: float, running: float) -> bool:
    """Whether others used the machine while calls were timed: see [`~llm2slm.benchmark.machine_speed.MachineSpeed`]."""
    return spread > WIDE_SPREAD or running < LITTLE_RUNNING


def describe_busy(speed: dict[str, Any]) -> list[str]:
    """What is to be said of a measured speed: nothing, unless the machine was busy."""
    spread, running = speed.get("spread", 1.0), speed.get("running", 1.0)  # older reports have neither
    if not is_busy(spread, running):
        return []
    return [
        f"Measured while the machine was busy: repeat when quiet. (The middle call took up to {spread:.1f} times as "
        f"long as the fastest tenth, and waited up to {1 - running:.0%} of its time for a processor.)"
    ]


def spread(figure: dict[str, float]) -> str:
    """A figure with its range, to three digits."""

    def short(value: float) -> str:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

    return f"{short(figure['median'])} ({short(figure['min'])}-{short(figure['max'])})"


# ------------------------------------------------------------------------------------------------------------ pictures
def plot_latencies(report: dict[str, Any], path: str) -> None:
    """Draws how long each system takes to write so many tokens, and where LLM-to-SLM overtakes the LLM, as a PNG."""
    check_installed("A picture", "matplotlib")
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


def read_quality(pairs: Iterable[str], metric: str) -> list[tuple[str, str, dict[str, float]]]:
    """
    Reads the scores of `SYSTEM=REPORT` pairs: a measured system, and the evaluation report that has its score.

    Returns:
        `list[tuple[str, str, dict[str, float]]]`: for each pair the measured system, what the report calls the system,
        and its score: `score`, and the 95% interval `low` and `high`.

    Raises:
        OSError: if a report is missing.
        ValueError: if a pair is not written so, or a file is not such a report or lacks the score.
    """
    quality = []
    for pair in pairs:
        system, _, path = pair.partition("=")
        if not path:
            raise ValueError(f"Quality is given as SYSTEM=REPORT.json, got {pair!r}.")
        evaluation = read_json(path, "system", "scores")
        if metric not in evaluation["scores"]:
            raise ValueError(f"{path} has no score {metric!r}, only {sorted(evaluation['scores'])}.")
        quality.append((system, evaluation["system"], evaluation["scores"][metric]))
    return quality


def plot_quality(
    report: dict[str, Any], quality: Iterable[tuple[str, str, dict[str, float]]], metric: str, path: str
) -> None:
    r"""
    Draws scores against seconds, as a PNG.

    Args:
        report (`dict[str, Any]`): A benchmark's report, which has the seconds of each system.
        quality (`Iterable[tuple[str, str, dict[str, float]]]`):
            As [`read_quality`] returns it. A system that was not measured is left out.
        metric (`str`): The score's name.
        path (`str`): The file.
    """
    check_installed("A picture", "matplotlib")
    from matplotlib.figure import Figure

    seconds = {system["name"]: system["end_to_end_s"]["median"] for system in report["systems"]}
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for system, name, score in quality:
        if system in seconds:
            interval = [[score["score"] - score["low"]], [score["high"] - score["score"]]]
            label = name if name == system else f"{name} ({system})"
            axes.errorbar(seconds[system], score["score"], yerr=interval, fmt="o", capsize=4, label=label)
    sizes = report["arguments"]
    axes.set(
        xlabel=f"seconds for {sizes['response_length']} tokens after {sizes['prompt_length']}, {sizes['dtype']}",
        ylabel=f"{metric}, 95% interval",
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
