"""Train LLM-to-SLM, or on the same data the SLM alone or the LLM alone.

```bash
llm2slm train --config training/recipes/simplify.yaml --output-dir runs/simplify
llm2slm train --config training/recipes/simplify.yaml --output-dir runs/slm --arm slm --max-steps 500
llm2slm train --llm google-t5/t5-large --slm google-t5/t5-small --data pairs.csv --learning-rate 1e-4 \
    --output-dir runs/t5
torchrun --nproc-per-node 2 --no-python llm2slm train --config recipe.yaml --output-dir runs/two  # DDP
```

The same command again resumes an interrupted training from its last complete checkpoint. The result is in
`--output-dir`: the model of the lowest evaluation loss, its tokenizer, `run.json` and `loss.png`. What to type next is
printed at the end.
"""

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from ..training.options import TrainerDefaults
from ..training.options import TrainOptions as Options
from .options import add_options

MORE_HELP = """\
Every other option of transformers.Seq2SeqTrainingArguments is one of this command too, such as --learning-rate,
--num-train-epochs, --per-device-train-batch-size and --seed. To list them, which takes some seconds:
llm2slm train --help-trainer
"""


def add_more_options(parser: argparse.ArgumentParser, help_only: bool) -> None:
    """
    Adds the Trainer's options.

    Args:
        parser (`argparse.ArgumentParser`): The command's.
        help_only (`bool`): Whether only the help is wanted, for which the Trainer is not imported.
    """
    if help_only:
        parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, MORE_HELP
        add_options(
            parser.add_argument_group("the Trainer's options with other defaults than its own"), TrainerDefaults
        )
        return
    trainer_parser = _trainer_parser()
    trainer_parser.add_argument("--help-trainer", action="help", help="show all options, the Trainer's too")
    parser._add_container_actions(trainer_parser)  # what `parents=` of a new parser does


def _trainer_parser() -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    from ..training.trainer import TrainerOptions

    return HfArgumentParser(TrainerOptions, add_help=False)


def run(options: Options, **trainer_options: Any) -> None:
    """Trains, or goes on with an interrupted training; errors are those of [`~llm2slm.training.run.train`]."""
    from ..training.run import train
    from ..training.trainer import TrainerOptions

    if options.validation_split == "none":
        trainer_options["eval_strategy"] = "no"
    # A parser turns some defaults into other types: what was not asked for is left to the dataclass.
    defaults = vars(_trainer_parser().parse_args([]))
    given = {name: value for name, value in trainer_options.items() if value != defaults[name]}
    training = TrainerOptions(**given)
    train(options, training)
    if training.process_index == 0:
        print("Next:", *next_commands(options, Path(training.output_dir)), sep="\n  ")


def next_commands(options: Options, folder: Path) -> list[str]:
    """
    What one types after a training: the commands that write with the model, evaluate it on rows that it did not learn
    from, if there are any, and write its card. Names that nobody knows here stand in capitals.
    """
    from ..data.pairs import has_parts
    from ..sharing.card import find_places, is_hub_name, is_slice_of_llm, read_finished_run

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


def _example(options: Options, folder: Path) -> str:
    """A short prompt of the data, as the tokenizer takes it."""
    from ..data.pairs import load_pairs
    from ..sharing.card_sections import without_format

    split = options.train_split if options.validation_split == "none" else options.validation_split
    prompts = load_pairs(options.data, split, options.prompt_format, options.completion_format, 20)["prompt"]
    texts = [without_format(prompt, folder).strip() for prompt in prompts if isinstance(prompt, str)]
    lines = [text for text in texts if text and not text.startswith("-") and len(text.splitlines()) == 1]
    return min(lines, key=len, default="Your text.")
