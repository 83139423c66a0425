"""What one types after a training, to be printed at its end."""

import os
import shlex
from pathlib import Path
from typing import Any

from ..data.pairs import has_parts, load_pairs
from ..training.options import TrainOptions
from .card import find_places, is_hub_name, is_slice_of_llm, read_finished_run
from .card_sections import without_format


def next_commands(options: TrainOptions, folder: Path) -> list[str]:
    """
    What one types after a training: the commands that write with the model, evaluate it on rows that it did not learn
    from, if there are any, and write its card. Names that nobody knows here stand in capitals.
    """
    commands, report = [], folder / "report.json"
    if options.arm == "llm2slm":
        commands.append(["generate", "--model", folder, "--prompt", _example(options, folder)])
    card: list[Any] = ["card", "--run", folder]
    has_test = has_parts(options.data, options.train_split) or os.path.isdir(Path(options.data) / "test")
    if has_test or options.validation_split != "none":
        split = [] if has_test else ["--split", options.validation_split]
        commands.append(["evaluate", "--model", folder, "--data", options.data, *split, "--output", report])
        card += ["--report", report]
    trained = read_finished_run(folder)
    for role, place in find_places(trained).items():
        if not is_hub_name(place) and not (role == "slm" and options.arm == "llm2slm" and is_slice_of_llm(trained)):
            card += [f"--{role}-name", f"USER/{role.upper()}"]
    return [shlex.join(map(str, ["llm2slm", *command])) for command in [*commands, card]]


def _example(options: TrainOptions, folder: Path) -> str:
    """A short prompt of the data, as the tokenizer takes it."""
    split = options.train_split if options.validation_split == "none" else options.validation_split
    formats = options.prompt_format, options.completion_format
    prompts = load_pairs(options.data, split, *formats, 20, options.skip_empty)["prompt"]
    texts = [without_format(prompt, folder).strip() for prompt in prompts if isinstance(prompt, str)]
    lines = [text for text in texts if text and not text.startswith("-") and len(text.splitlines()) == 1]
    return min(lines, key=len, default="Your text.")
