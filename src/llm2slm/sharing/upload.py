"""The upload of a trained model to the Hub: weights, tokenizer, code, card and pictures, in one commit."""

import json
from pathlib import Path

from ..utils import read_json
from .card import UNWRITTEN, hub_name, is_hub_name

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
# What stands in cards that tell nothing: those of programs, and PEFT's.
NOT_TOLD = (*UNWRITTEN, "[More Information Needed]")


def push(
    run: str,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model",
    llm_name: str | None = None,
    llm_revision: str | None = None,
) -> str:
    r"""
    Uploads a trained model: weights, tokenizer, code, card and pictures, in one commit.

    Args:
        run (`str`): The folder of the model, with its card.
        repo_id (`str`): Where to, `user/name`; made if it is not there.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.
        revision (`str`, *optional*): The branch; made if it is not there. The main one if omitted.
        message (`str`, *optional*): Of the commit.
        llm_name (`str`, *optional*): The LLM's name on the Hub, if the model names it by a place on this machine.
        llm_revision (`str`, *optional*): The commit of that repository.

    Returns:
        `str`: the commit's address.

    Raises:
        OSError: if a file is missing, or the Hub refuses.
        ValueError: if nobody wrote the card, or the LLM would be found on this machine only.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from ..checkpoint_llm2slm import matches, weight_files

    folder, api = Path(run), HfApi()
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    names = find_files(folder)
    for name in names:
        content: str | bytes = str(folder / name)
        if name in (CONFIG, ADAPTER_CONFIG):
            content = point_to_hub(folder / name, llm_name, llm_revision)
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    for name in api.list_repo_files(repo_id, revision=revision):
        if name not in names and matches(name, weight_files(names)[1]):  # another save's: could be loaded instead
            operations.append(CommitOperationDelete(path_in_repo=name))
    commit = api.create_commit(repo_id, operations=operations, commit_message=message, revision=revision)
    print(f"{len(names)} files, {commit.oid}: {commit.commit_url}")
    return commit.commit_url


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
    if not card.is_file() or any(mark in card.read_text(encoding="utf-8") for mark in NOT_TOLD):
        raise ValueError(f"{folder} has no card of this model: write one with `llm2slm card --run {folder}`.")
    llm_tokenizer = [path for path in (folder / LLM_TOKENIZER).glob("*") if path.is_file() and is_models(path.name)]
    return sorted([*files, *(f"{LLM_TOKENIZER}/{path.name}" for path in llm_tokenizer)])


def is_models(name: str) -> bool:
    """Whether a file belongs to a model."""
    return name in NAMES or name.endswith(SUFFIXES)


def point_to_hub(path: Path, llm_name: str | None, llm_revision: str | None) -> bytes:
    """
    The configuration with names on the Hub, or of a package, only: an LLM elsewhere is one that nobody else has.

    Raises:
        ValueError: if the LLM's is needed and not given.
    """
    from ..loading_llm2slm import is_package

    config = read_json(str(path))
    field = "base_model_name_or_path" if path.name == ADAPTER_CONFIG else "llm_name_or_path"
    if config.get(field) is not None and not config.get("include_llm", False):
        if llm_name is not None or not is_package(config[field]):
            config[field] = hub_name(llm_name or config[field], "--llm-name")
        if llm_name is not None and field == "llm_name_or_path":
            config["llm_revision"] = llm_revision
    if alternatives := config.get("llm_alternatives"):
        names = [place["llm_name_or_path"] for place in alternatives]
        config["llm_alternatives"] = [
            place for name, place in zip(names, alternatives, strict=True) if is_package(name) or is_hub_name(name)
        ]
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
