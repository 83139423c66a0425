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
    from ..sharing.next_commands import next_commands
    from ..training.run import train
    from ..training.trainer import TrainerOptions
    from ..utils import shown

    if options.validation_split == "none":
        trainer_options["eval_strategy"] = "no"
    # A parser turns some defaults into other types: what was not asked for is left to the dataclass.
    defaults = vars(_trainer_parser().parse_args([]))
    given = {name: value for name, value in trainer_options.items() if value != defaults[name]}
    training = TrainerOptions(**given)
    train(options, training)
    if training.process_index == 0:
        print("Next:", *next_commands(options, shown(training.output_dir)), sep="\n  ")
