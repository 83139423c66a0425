"""Upload a trained model to the Hub: weights, tokenizer, code, card and pictures, in one commit.

```bash
llm2slm card --run runs/simplify --report simplify.json --model-id user/simplify
llm2slm push --run runs/simplify --repo-id user/simplify --private
llm2slm push --run runs/local --repo-id user/simplify --llm-name HuggingFaceTB/SmolLM2-135M-Instruct
```

The token is that of `hf auth login`, or `HF_TOKEN`.
"""

import argparse
import json
import sys
from pathlib import Path

from ..cli.main import main
from .card import hub_name
from .card_sections import read_json

CARD, CONFIG, ADAPTER_CONFIG, LLM_TOKENIZER = "README.md", "config.json", "adapter_config.json", "llm_tokenizer"
# What a checkpoint is made of, by the ends of its files' names; a training's other files are its own affair.
SUFFIXES = (".safetensors", ".safetensors.index.json", ".py", ".jinja", ".png", ".model")
NAMES = (
    CARD,
    ADAPTER_CONFIG,
    "added_tokens.json",
    CONFIG,
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# What stands in cards that tell nothing: save_pretrained's, the Trainer's and PEFT's.
UNWRITTEN = ('model="<this repository>"', "has been automatically generated", "[More Information Needed]")


def make_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `llm2slm push`."""
    parser.add_argument("--run", required=True, metavar="FOLDER", help="folder of the model, with its card")
    parser.add_argument(
        "--repo-id", required=True, metavar="NAME", help="where to: user/name; made if it is not there"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--message", default="Upload model", help="of the commit (default: %(default)s)")
    parser.add_argument(
        "--llm-name",
        metavar="NAME",
        help="the LLM's name on the Hub, if the model names it by a place on this machine",
    )
    parser.add_argument("--llm-revision", metavar="COMMIT", help="with --llm-name: the commit of the LLM's repository")


def run(args: argparse.Namespace) -> None:
    """
    Uploads a model.

    Raises:
        OSError: if a file is missing, or the Hub refuses.
        ValueError: if nobody wrote the card, or the LLM would be found on this machine only.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder, api = Path(args.run), HfApi()
    operations = []
    for name in find_files(folder):
        content: str | bytes = str(folder / name)
        if name in (CONFIG, ADAPTER_CONFIG):
            content = point_to_hub(folder / name, args)
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
    if args.revision is not None:
        api.create_branch(args.repo_id, branch=args.revision, exist_ok=True)
    commit = api.create_commit(
        args.repo_id, operations=operations, commit_message=args.message, revision=args.revision
    )
    print(f"{len(operations)} files, {commit.oid}: {commit.commit_url}")


def find_files(folder: Path) -> list[str]:
    """
    The files of a model, by their path in its folder. Nothing of the training: no checkpoints, no optimizer states.

    Raises:
        OSError: if there is no model.
        ValueError: if nobody wrote the card.
    """
    files = [path.name for path in folder.glob("*") if path.is_file() and is_models(path.name)]
    if not any(name.endswith(".safetensors") for name in files):
        raise FileNotFoundError(f"{str(folder)!r} is not the folder of a model: it has no weights (.safetensors).")
    card = folder / CARD
    if not card.is_file() or any(mark in card.read_text(encoding="utf-8") for mark in UNWRITTEN):
        raise ValueError(f"{folder} has no card of this model: write one with `llm2slm card --run {folder}`.")
    llm_tokenizer = [path for path in (folder / LLM_TOKENIZER).glob("*") if path.is_file() and is_models(path.name)]
    return sorted([*files, *(f"{LLM_TOKENIZER}/{path.name}" for path in llm_tokenizer)])


def is_models(name: str) -> bool:
    """Whether a file belongs to a model."""
    return name in NAMES or name.endswith(SUFFIXES)


def point_to_hub(path: Path, args: argparse.Namespace) -> bytes:
    """
    The configuration with names on the Hub, or of a package, only: an LLM elsewhere is one that nobody else has.

    Raises:
        ValueError: if the LLM's is needed and not given.
    """
    from ..loading_llm2slm import is_package

    config = read_json(str(path))
    field = "base_model_name_or_path" if path.name == ADAPTER_CONFIG else "llm_name_or_path"
    if config.get(field) is not None and not config.get("include_llm", False):
        if args.llm_name is not None or not is_package(config[field]):
            config[field] = hub_name(args.llm_name or config[field], "--llm-name")
        if args.llm_name is not None and field == "llm_name_or_path":
            config["llm_revision"] = args.llm_revision
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
