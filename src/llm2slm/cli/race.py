"""A page where the LLM and LLM-to-SLM write to the same prompt, one after another, and each is timed.

```bash
llm2slm race user/checkpoint
llm2slm race ./checkpoint --adapter ./llm-lora --systems llm llm2slm lossless --port 9000
```

With an adapter the LLM does the same task; without one it writes what it writes, or what --instruction tells it.
`llm2slm push --space` pushes the same page to the Hub.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from ..utils import check_installed
from .options import DEVICE_HELP, DTYPES, option

SYSTEMS = {
    "llm": "the LLM",
    "llm2slm": "LLM-to-SLM",
    "fast": "the same with fast decode",
    "lossless": "the LLM's own words, drafted by LLM-to-SLM",
}


@dataclass
class RaceOptions:
    """What a race is, here and in a Space."""

    adapter: str | None = option("PEFT adapter of the LLM for the same task", None, metavar="NAME")
    instruction: str | None = option("what the LLM is told before each prompt", None)
    dtype: DTYPES = option("number format of all weights; auto: as the checkpoint's are stored", "auto")
    systems: list[str] = option(
        "the columns, in the order in which they start. "
        + "; ".join(f"{name}: {what}" for name, what in SYSTEMS.items()),
        ["llm", "llm2slm", "fast"],
        metavar="SYSTEM",
        choices=[*SYSTEMS],
    )
    max_new_tokens: int | None = option(
        "tokens of a response at most; as the checkpoint says if omitted", None, at_least=2
    )


@dataclass
class Options(RaceOptions):
    """The options of `llm2slm race`."""

    llm: str | None = option("where the frozen LLM is, if not where the checkpoint says", None, metavar="NAME")
    revision: str | None = option("branch, tag or commit of the checkpoint's repository on the Hub", None)
    device: str | None = option(DEVICE_HELP, None, metavar="NAME")

    host: str = option("address to listen at; 0.0.0.0 for all, which others can reach", "127.0.0.1", metavar="ADDRESS")
    port: int = option("0 for the first that is free from 7860 on", 7860, at_least=0, at_most=65535)


def add_more_options(parser: argparse.ArgumentParser, help_only: bool) -> None:
    """Adds the checkpoint, which is no option."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="LLM-to-SLM checkpoint: folder, or name on the Hub")


def run(options: Options, checkpoint: str) -> None:
    """
    Loads what races, and serves the page until Ctrl-C.

    Raises:
        ImportError: if Gradio is not installed.
        OSError: if there is no such checkpoint, LLM or adapter, or it cannot listen there.
        ValueError: if one of them is another kind of model, or options disagree.
    """
    check_installed("`llm2slm race`", "gradio", install="pip install 'llm-to-slm[race]'")
    from ..serving.checkpoint_card import read_card
    from ..serving.race import load_race
    from ..serving.race_page import build_page, launch

    card = read_card(checkpoint, options.revision)
    if "fast" in options.systems or "lossless" in options.systems:
        print("Fast decode is compiled first: a minute or two on a CPU.", file=sys.stderr)
    race = load_race(
        checkpoint,
        options.systems,
        options.llm,
        options.adapter,
        options.instruction,
        options.revision,
        options.dtype,
        options.device,
        options.max_new_tokens,
    )
    name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint
    launch(build_page(race, name, card), options.host, options.port)
