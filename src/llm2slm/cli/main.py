"""The command line; each command is a module of this package with `make_parser(parser)` and `run(args)`.

```bash
llm2slm --help
llm2slm generate --help
python -m llm2slm.cli benchmark --help
```

Every option of a command can stand in a YAML recipe; what is on the command line overrides it:

```bash
llm2slm generate --config recipe.yaml --max-new-tokens 64
```
"""

import argparse
import contextlib
import difflib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from ..utils import read_text

# A new command is a module of this name and a line here. Only the one that is called is imported.
COMMANDS = {
    "train": "train LLM-to-SLM, the SLM alone or the LLM on prompt/completion pairs",
    "generate": "write responses to prompts",
    "evaluate": "score a model's responses, or compare such reports",
    "label": "let an LLM write the responses of a data set",
    "estimate": "predict what a pair of models would gain on this machine, without weights",
    "benchmark": "measure latency beside the SLM alone, the LLM and what else one might use",
    "card": "write a model card of what a training and its evaluation recorded",
    "push": "upload model, tokenizer, card and pictures to the Hub, in one commit",
}

MODULES = {
    "train": "training.run",
    "generate": "cli.generate",
    "evaluate": "evaluation.run",
    "label": "evaluation.labelling",
    "estimate": "benchmark.estimate",
    "benchmark": "benchmark.measure",
    "card": "sharing.card",
    "push": "sharing.upload",
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
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="llm2slm", description="A frozen LLM reads the prompt once, a small language model writes the response."
    )
    parser.add_argument("--version", action="version", version=_versions())
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from, in full")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    recipe_for: argparse.ArgumentParser | None = None
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == command:
            subparser.add_argument("--config", metavar="FILE", help="YAML recipe with any of these options")
            module = importlib.import_module(f"llm2slm.{MODULES.get(name, name)}")
            module.make_parser(subparser)
            recipe_for = subparser
    error: Exception
    try:
        if command is not None and recipe_for is not None:
            argv = _with_recipe(argv, command, recipe_for)
        args = parser.parse_args(argv)
        return module.run(args)
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
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return argv
    import yaml  # Transformers needs it, so it is there

    try:
        recipe = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold options, one `name: value` a line.")
    known = {option: action for action in parser._actions for option in action.option_strings}
    options = []
    for name, value in recipe.items():
        option = "--" + str(name).replace("_", "-")
        if option not in known or option in ("--config", "--help"):
            nearest = difflib.get_close_matches(option, known, 1, cutoff=0)[0].strip("-").replace("-", "_")
            raise ValueError(f"{path}: {command} has no option {str(name)!r}; the nearest is {nearest!r}.")
        options += _as_options(option, value, known)
    place = argv.index(command) + 1
    return argv[:place] + options + argv[place:]


def _as_options(option: str, value: Any, known: dict[str, argparse.Action]) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool) and known[option].nargs == 0:
        return [option] if value else [no for no in [option.replace("--", "--no-", 1)] if no in known]
    if isinstance(value, bool):
        return [f"{option}={'yes' if value else 'no'}"]  # `no` without quotes is a boolean in YAML
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [f"{option}={json.dumps(value) if isinstance(value, dict) else value}"]


# --------------------------------------------------------------------------------------- what several commands share
def add_loading_arguments(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Adds the options that say how models are loaded; `dtype` is their default."""
    parser.add_argument("--llm", metavar="NAME", help="where the frozen LLM is, if not where the checkpoint says")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint's repository on the Hub")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default=dtype,
        help="number format of the weights; auto: as they are stored (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")


def load_checkpoint(args: argparse.Namespace):
    """
    Loads the model and the tokenizer of `args.model` with this package's classes. A checkpoint's own copy of the code
    is never run, so there is nothing to trust.

    Raises:
        OSError: if there is no such checkpoint, or not its LLM.
        ValueError: if it is another kind of model, or its LLM is not the one it was trained with.
    """
    from transformers import AutoConfig

    from .. import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer

    looks_like_a_folder = args.model.startswith((".", "~", os.sep)) or args.model.endswith(os.sep)
    if looks_like_a_folder and not os.path.isdir(args.model):
        raise OSError(f"There is no folder {args.model!r}.")
    # The checkpoint's `auto_map` names code of its own; False says that the code registered here is the one to run.
    try:
        config = AutoConfig.from_pretrained(args.model, revision=args.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:  # which does not always say what it was looking for
        raise OSError(f"There is no checkpoint {args.model!r}: {error}") from error
    if config.model_type != "llm2slm":
        raise ValueError(f"{args.model!r} is a {config.model_type} model, not an LLM-to-SLM checkpoint.")
    # The tokenizer first: it is loaded in no time, and what is wrong with it shows before the models are read.
    tokenizer = LLM2SLMTokenizer.from_pretrained(args.model, revision=args.revision)
    model = LLM2SLMForConditionalGeneration.from_pretrained(
        args.model, revision=args.revision, llm_name_or_path=args.llm, dtype=args.dtype
    )
    return model.to(device(args)), tokenizer


def device(args: argparse.Namespace):
    """The `torch.device` asked for; CUDA if none is and there is one."""
    import torch

    try:
        chosen = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a name or a device it does not have
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    return chosen


def check_new_file(path: str | None) -> None:
    """
    Checks, before any long work, that a result can be written.

    Raises:
        OSError: if the file exists, or its folder does not.
    """
    if path is None:
        return
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; delete it or choose another name.")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(Path(path).parent)!r} to write {Path(path).name} into.")


@contextlib.contextmanager
def write_aside(path: str) -> Iterator[TextIO]:
    """Opens `path` + ".part" to write text, and renames it to `path` at the end: what stands there is complete."""
    with open(path + ".part", "w", encoding="utf-8") as file:
        yield file
    check_new_file(path)
    os.rename(path + ".part", path)


def positive_int(text: str) -> int:
    """An argument that is a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
