"""Latency of LLM-to-SLM beside the SLM alone and the LLM, in one run.

```bash
llm2slm benchmark --model ./checkpoint --output report.json                # a trained checkpoint
llm2slm benchmark --llm google-t5/t5-large --slm google-t5/t5-small        # two pretrained models, projector at random
llm2slm benchmark --llm t5-large --slm t5-small --threads 2                # their sizes, all weights at random
llm2slm benchmark --llm smollm2-135m --slm llama-5m --systems slm llm2slm --repeats 50  # tiny: many short runs
```

How it is made fair:
- All systems read prompts of one length and write responses of one length: end-of-sequence is ruled out until then.
  The SLM alone reads as many tokens through its own embeddings, so it attends to as many positions.
- All take one generation configuration (greedy, default cache), whatever their checkpoints say.
- All run in one process, warmed up, and take turns in each repeat, so a busy machine slows all of them. The garbage
  collector waits between the runs. Ratios are taken within a repeat, then summarised.
- Time to first token and the rest come from one run: a streamer notes when each token is there. Two runs would put the
  noise of the LLM's prompt phase into the SLM's time per token.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .cli import add_loading_arguments, check_new_file, device, load_checkpoint, main, positive_int, write_aside

# Sizes of real models, to be filled with random weights: type of the configuration and its fields.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-large": (
        "t5",
        {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "decoder_start_token_id": 0},
    ),
    "t5-small": (
        "t5",
        {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "decoder_start_token_id": 0},
    ),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "llama-15m": (
        "llama",
        {
            "vocab_size": 8192,
            "hidden_size": 384,
            "intermediate_size": 1152,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "tie_word_embeddings": True,
        },
    ),
    "llama-5m": (
        "llama",
        {
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
}
SYSTEMS = ["slm", "llm2slm", "llm"]
# Name of a ratio: the figure it is about, numerator, denominator.
RATIOS = {
    "per_token_llm2slm_to_slm": ("per_token_ms", "llm2slm", "slm"),
    "end_to_end_llm_to_llm2slm": ("end_to_end_s", "llm", "llm2slm"),
}


@dataclass
class System:
    """
    Something that writes responses.

    Args:
        name (`str`): What it is called in the report.
        parameters (`int`): Its number of weights.
        generate (`Callable`):
            Writes `num_tokens` tokens for each prompt of the batch: `generate(num_tokens, streamer)`, where
            `streamer.put` is called once for each.
        first_token_ms (`list[float]`): Milliseconds until the first token, a run each.
        end_to_end_s (`list[float]`): Seconds of each run.
    """

    name: str
    parameters: int
    generate: Callable[[int, Any], Any]
    first_token_ms: list[float] = field(default_factory=list)
    end_to_end_s: list[float] = field(default_factory=list)


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
        "--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="what to measure (default: all of them)"
    )
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


def run(args: argparse.Namespace) -> None:
    """
    Measures, and prints a Markdown table.

    Raises:
        OSError: if a model is missing, or the output exists.
        ValueError: if options disagree, or the lengths are more than a model takes.
    """
    if args.model is None and (args.llm is None or args.slm is None):
        raise ValueError("Say what to measure: --model CHECKPOINT, or both --llm and --slm.")
    if args.model is not None and args.slm is not None:
        raise ValueError("--model brings its own SLM: leave out --slm.")
    if args.response_length < 2:
        raise ValueError("--response-length must be at least 2: the time per token is taken from the second on.")
    check_new_file(args.output)

    import torch
    from tqdm.auto import tqdm

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    machine = describe_machine(args)  # with the load before this run adds to it
    systems = load_systems(args)
    # Each system's first run is its warm-up.
    progress = tqdm(total=(args.repeats + 1) * len(systems), unit="run", desc="Measuring")
    with progress:
        for system in systems:
            measure(system, args.response_length)
            progress.update()
        for repeat in range(args.repeats):
            # Back and forth: nobody always comes after the same one, and a slow drift cancels out.
            for system in systems if repeat % 2 == 0 else systems[::-1]:
                first_token_s, end_to_end_s = measure(system, args.response_length)
                system.first_token_ms.append(1000 * first_token_s)
                system.end_to_end_s.append(end_to_end_s)
                progress.update()

    report = make_report(args, machine, systems)
    print(to_markdown(report))
    if args.output:
        with write_aside(args.output) as file:
            json.dump(report, file, indent=2)
            file.write("\n")


# ------------------------------------------------------------------------------------------------------- the systems
def load_systems(args: argparse.Namespace) -> list[System]:
    """The systems that `args.systems` names, in its order, each with a batch of random prompts."""
    llm, slm, llm2slm = load_models(args)
    models = {"slm": slm, "llm2slm": llm2slm, "llm": llm}
    for model in models.values():  # LLM-to-SLM reads the SLM's too
        if model is not None:
            forget_generation_settings(model)
    systems = []
    for name in dict.fromkeys(args.systems):
        model = models[name]
        if model is None:
            print(
                "Left out: llm. The checkpoint holds what reads the prompt; name the LLM with --llm.", file=sys.stderr
            )
            continue
        check_lengths(name, model.config.slm_config if name == "llm2slm" else model.config, args)
        systems.append(System(name, count_parameters(model), make_generate(model, args)))
    return systems


def load_models(args: argparse.Namespace):
    """LLM (`None` if it cannot write by itself), SLM and LLM-to-SLM; the last shares what it can with the others."""
    import torch

    from . import LLM2SLMForConditionalGeneration
    from .loading_llm2slm import load_slm

    def load(name: str, **kwargs):
        if name in SHAPES:
            return load_shape(name, args)
        # Whatever writes by itself is loaded in one way, LLM or SLM.
        return load_slm(name, dtype=args.dtype, **kwargs).to(device(args)).eval()

    torch.manual_seed(0)
    if args.model is None:
        llm, slm = load(args.llm), load(args.slm)
        llm2slm = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm)
        return llm, slm, llm2slm
    llm2slm, _ = load_checkpoint(args)
    config, llm = llm2slm.config, None
    if "llm" in args.systems and args.llm is not None:
        llm = load(args.llm)
    elif "llm" in args.systems and config.llm_name_or_path is not None:
        llm = load(config.llm_name_or_path, revision=config.llm_revision, gguf_file=config.llm_gguf_file)
    return llm, llm2slm.slm, llm2slm


def load_shape(name: str, args: argparse.Namespace):
    """A model of one of `SHAPES`, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model_type, sizes = SHAPES[name]
    config = AutoConfig.for_model(model_type, **sizes)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    return auto_class.from_config(config).to(device(args), dtype).eval()


def make_generate(model, args: argparse.Namespace) -> Callable[[int, Any], Any]:
    """`model.generate` on a batch of random prompts, greedy and of exactly the length asked for."""
    import torch

    # Those who read with the LLM take its ids; LLM-to-SLM says which configuration that is.
    config = model.config.llm_text_config if model.config.model_type == "llm2slm" else model.config.get_text_config()
    shape, generator = (args.batch_size, args.prompt_length), torch.Generator().manual_seed(0)
    input_ids = torch.randint(config.vocab_size // 2, config.vocab_size, shape, generator=generator).to(model.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def generate(num_tokens: int, streamer):
        return model.generate(
            **inputs,
            streamer=streamer,
            do_sample=False,
            num_beams=1,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
        )

    return generate


def forget_generation_settings(model) -> None:
    """Leaves nothing but the special tokens of a checkpoint's generation configuration."""
    from transformers import GenerationConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    special = {name: getattr(model.generation_config, name) for name in names}
    if special["eos_token_id"] is None:  # some token has to be the one that is ruled out
        special["eos_token_id"] = 0
    if special["pad_token_id"] is None:
        eos = special["eos_token_id"]
        special["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    model.generation_config = GenerationConfig(**special)


def count_parameters(model) -> int:
    """Number of weights, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_lengths(name: str, config, args: argparse.Namespace) -> None:
    """
    Checks that prompt and response fit a model's positions.

    Raises:
        ValueError: if they do not.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)  # T5 has no such limit
    lengths = (args.prompt_length, args.response_length)
    longest = max(lengths) if config.is_encoder_decoder else sum(lengths)
    if positions is not None and longest > positions:
        raise ValueError(
            f"--prompt-length {args.prompt_length} and --response-length {args.response_length} need {longest} "
            f"positions, but {name} has {positions}."
        )


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


def measure(system: System, num_tokens: int) -> tuple[float, float]:
    """
    Runs a system once.

    Returns:
        `tuple[float, float]`: seconds until the first token, and until the last.
    """
    import torch

    clock = Clock()
    gc.collect()
    gc.disable()
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        ids = system.generate(num_tokens, clock)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end = time.perf_counter()
    finally:
        gc.enable()
    # `generate` may put the prompt first, but each new token once.
    if ids.shape[1] < num_tokens or len(clock.times) < num_tokens:
        raise RuntimeError(f"{system.name} wrote {ids.shape[1]} tokens, not {num_tokens}.")
    return clock.times[-num_tokens] - start, end - start


def make_report(args: argparse.Namespace, machine: dict[str, Any], systems: list[System]) -> dict[str, Any]:
    """Everything measured, as plain data: milliseconds and seconds, each a median with least and most."""
    raw = {system.name: runs_of(system, args) for system in systems}
    return {
        "arguments": {name: value for name, value in vars(args).items() if name not in ("command", "traceback")},
        "machine": machine,
        "systems": [
            {
                "name": system.name,
                "parameters": system.parameters,
                **{figure: summary(runs) for figure, runs in raw[system.name].items()},
                "runs": raw[system.name],
            }
            for system in systems
        ],
        "ratios": {
            name: summary([a / b for a, b in zip(raw[above][figure], raw[below][figure], strict=True)])
            for name, (figure, above, below) in RATIOS.items()
            if above in raw and below in raw
        },
    }


def runs_of(system: System, args: argparse.Namespace) -> dict[str, list[float]]:
    """The figures of each run of a system."""
    first, total, length = system.first_token_ms, system.end_to_end_s, args.response_length
    return {
        "first_token_ms": first,
        "per_token_ms": [(1000 * t - f) / (length - 1) for f, t in zip(first, total, strict=True)],
        "tokens_per_second": [args.batch_size * length / t for t in total],
        "end_to_end_s": total,
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


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


def cpu_model() -> str:
    """The processor's name."""
    if os.path.exists("/proc/cpuinfo"):  # Linux, where platform.processor() is empty
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table, median (least-most), and a line on how it was measured."""
    arguments, machine = report["arguments"], report["machine"]
    lines = [
        "| System | Parameters | First token ms | Per token ms | Tokens/s | End to end s |",
        "|---|---|---|---|---|---|",
    ]
    for system in report["systems"]:
        figures = [
            spread(system[figure])
            for figure in ("first_token_ms", "per_token_ms", "tokens_per_second", "end_to_end_s")
        ]
        lines.append(f"| {system['name']} | {system['parameters'] / 1e6:.1f}M | {' | '.join(figures)} |")
    lines.append("")
    for name, ratio in report["ratios"].items():
        figure, above, below = RATIOS[name]
        lines.append(f"- {figure.rsplit('_', 1)[0].replace('_', ' ')}, {above} / {below}: **{spread(ratio)}**")
    models = arguments["model"] or f"LLM {arguments['llm']}, SLM {arguments['slm']}"
    lines += [
        "",
        f"{models}; prompt {arguments['prompt_length']}, response {arguments['response_length']} tokens, batch "
        f"{arguments['batch_size']}, {machine['dtype']}, {machine['device']}; {machine['cpu']}, {machine['cores']} "
        f"cores, {machine['threads']} threads; torch {machine['torch']}, transformers {machine['transformers']}. "
        f"Median (least-most) of {arguments['repeats']} runs.",
    ]
    return "\n".join(lines)


def spread(figure: dict[str, float]) -> str:
    """A figure with its range, to three digits."""

    def short(value: float) -> str:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

    return f"{short(figure['median'])} ({short(figure['min'])}-{short(figure['max'])})"


if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
