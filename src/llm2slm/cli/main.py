"""The command line: `llm2slm COMMAND`, each command a module of this package.

```bash
llm2slm --help
llm2slm generate --help
python -m llm2slm.cli benchmark --help
```

Every option of a command can stand in a YAML recipe; what is on the command line overrides it. Options are written
with dashes; underscores do too, here and in recipes:

```bash
llm2slm generate --config recipe.yaml --max-new-tokens 64
```

A command's module holds its options, the dataclass `Options`, and `run(options)`, which calls a function of the
library. Only the module of the command that is called is imported, and it imports the library when it runs: `--help`
needs neither torch nor transformers.
"""

import argparse
import dataclasses
import importlib
import os
import sys
from importlib import metadata

from .options import add_options, read_recipe, with_dashes

# A new command is a module of this name and a line here.
COMMANDS = {
    "train": "train LLM-to-SLM, the SLM alone or the LLM on prompt/completion pairs",
    "generate": "write responses to prompts",
    "serve": "answer requests on this machine, as OpenAI's API does",
    "race": "show the LLM and LLM-to-SLM side by side on a page, each timed",
    "evaluate": "score a model's responses, or compare such reports",
    "label": "let an LLM write the responses of a data set",
    "estimate": "predict what a pair of models would gain on this machine, without weights",
    "benchmark": "measure latency beside the SLM alone, the LLM and what else one might use",
    "card": "write a model card of what a training and its evaluation recorded",
    "export": "write the small model by itself: as a Hugging Face folder, or as ONNX with a page for the browser",
    "push": "upload model, tokenizer, card and pictures to the Hub, in one commit, and a Space that races it",
}


def main(argv: list[str] | None = None) -> int | None:
    """
    Runs a command.

    Args:
        argv (`list[str]`, *optional*): The arguments behind `llm2slm`; those of the process if omitted.

    Returns:
        `int`, *optional*: the exit code: `None` or 0 if all went well, 2 after bad input (one line on stderr says
        what was wrong), 130 after Ctrl-C, 1 if nobody reads the output any more.

    Raises:
        SystemExit: with code 2 for a bad option, with code 0 after `--help` and `--version`.
    """
    argv = with_dashes(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="llm2slm", description="A frozen LLM reads the prompt once, a small language model writes the response."
    )
    parser.add_argument("--version", action="version", version=_versions())
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from, in full")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    own_parser: argparse.ArgumentParser | None = None
    for name, summary in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        subparser = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
        if name == command:
            subparser.add_argument("--config", metavar="FILE", help="YAML recipe with any of these options")
            module, own_parser = importlib.import_module(f"llm2slm.cli.{name}"), subparser
            add_options(subparser, module.Options)
            if hasattr(module, "add_more_options"):
                module.add_more_options(subparser, help_only=not {"-h", "--help"}.isdisjoint(argv))
    error: Exception
    try:
        if command is not None and own_parser is not None:
            argv = _with_recipe(argv, command, own_parser)
        values = vars(parser.parse_args(argv))
        names = [field.name for field in dataclasses.fields(module.Options) if field.init]
        options = module.Options(**{name: values.pop(name) for name in names})
        for name in ("command", "config", "traceback"):
            del values[name]
        return module.run(options, **values)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `llm2slm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
        return 1
    except (OSError, ValueError, ImportError) as caught:  # what the user can mend; anything else is our bug
        if "--traceback" in argv:
            raise
        error = caught
    print(f"llm2slm {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _versions() -> str:
    versions = {}
    for name in ("llm-to-slm", "transformers", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout
            versions[name] = "(not installed)"
    return f"llm2slm {versions.pop('llm-to-slm')}, " + ", ".join(f"{name} {v}" for name, v in versions.items())


def _with_recipe(argv: list[str], command: str, parser: argparse.ArgumentParser) -> list[str]:
    """Puts a recipe's options between the command and its own: the last of two equal options wins."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    paths = finder.parse_known_args(argv)[0].config
    if not paths:
        return argv
    if len(paths) > 1:
        raise ValueError(f"--config takes one recipe, and there are {len(paths)}: {', '.join(paths)}.")
    place = argv.index(command) + 1
    # An option behind the recipe's ends a list in it, which would take the checkpoint that follows.
    return [*argv[:place], *read_recipe(paths[0], command, parser), "--config", paths[0], *argv[place:]]
