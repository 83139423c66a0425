"""The folder of one training: which training's it is, where that can be resumed, and results that are whole or absent.

- `recipe.yaml` is written first: the options that differ from the defaults. A folder with another one is refused.
- `data.json` has a hash of the pairs and the number of processes: a training goes on with those that it began with.
- `start/` is the model before the first step, and `teacher/` says what its teacher is.
- `checkpoint-N/` are the Trainer's, which writes them in place: one is complete once its last file is.
- The result is written aside and moved to the top; `run.json` says that the training is finished. Then `data.json`,
  `start/` and `teacher/` go.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils import read_json, write_json, write_whole
from .options import TrainOptions

RECIPE, DATA, START, TEACHER, REPORT = "recipe.yaml", "data.json", "start", "teacher", "run.json"
PROCESSES = "processes"  # their number, in `data.json`
# What may differ when a training is resumed: it changes nothing of the result.
ELSEWHERE = (
    "output_dir",
    "cache_dir",
    "disable_tqdm",
    "log_level",
    "dataloader_num_workers",
    "ddp_timeout",
    "save_total_limit",
)


def open_run_folder(folder: Path, recipe: dict[str, Any]) -> None:
    r"""
    Makes the folder of a training, or makes sure that it is this training's.

    Args:
        folder (`Path`): New, empty, the folder of a training with the same recipe, or of one that never took a step.
        recipe (`dict[str, Any]`): The options that differ from the defaults.

    Raises:
        OSError: if it is a file, or holds something else than a training.
        ValueError: if it is another training's.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"`output_dir` {str(folder)!r} is a file.")
    path, text = folder / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    if path.is_file():
        there, here = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text)
        names = sorted((there.keys() | here.keys()) - set(ELSEWHERE))
        different = [name for name in names if there.get(name) != here.get(name)]
        if not different:
            return
        if _has_begun(folder):
            raise ValueError(
                f"`output_dir` {str(folder)!r} holds another training: its `{different[0]}` is "
                f"{_said(there, different[0])}, here it is {_said(here, different[0])}. Choose another folder, or "
                "remove it."
            )
        remove_made_first(folder)
    elif folder.is_dir() and set(folder.iterdir()) - {folder / f"{RECIPE}.part"}:
        raise FileExistsError(
            f"`output_dir` {str(folder)!r} holds other things than a training: choose a new folder, or empty it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with write_whole(path, replace=True) as file:
        file.write(text)


def check_data(folder: Path, hashes: dict[str, str], world_size: int = 1) -> None:
    """
    Notes what a training learns from or, of one that goes on, makes sure that it is what it began with.

    Args:
        folder (`Path`): The training's.
        hashes (`dict[str, str]`): Of each split, from [`~llm2slm.data.pairs.hash_texts`].
        world_size (`int`, *optional*, defaults to 1): Processes, which share the pairs of a step.

    Raises:
        ValueError: if the pairs or the number of processes are others than those of the steps that were taken.
    """
    path = folder / DATA
    here = {**hashes, PROCESSES: world_size}
    if path.is_file():
        there = {PROCESSES: world_size, **read_json(path)}  # older trainings do not say
        if there == here:
            return
        if _has_begun(folder):
            if there[PROCESSES] != world_size:
                raise ValueError(
                    f"`output_dir` {str(folder)!r} holds a training of {there[PROCESSES]} process(es), here are "
                    f"{world_size}: its steps would be others. Take as many, choose another folder, or remove it."
                )
            changed = next(split for split in hashes if there.get(split) != hashes[split])
            raise ValueError(
                f"`output_dir` {str(folder)!r} holds a training whose {changed} pairs were others than they are now. "
                "Give it the same data, choose another folder, or remove it."
            )
        remove_made_first(folder)
    write_json(path, here, replace=True)


def remove_made_first(folder: Path) -> None:
    """Removes what a training made before its first step."""
    (folder / DATA).unlink(missing_ok=True)
    for made in (START, TEACHER):
        shutil.rmtree(folder / made, ignore_errors=True)


def _has_begun(folder: Path) -> bool:
    before = {RECIPE, DATA, START, TEACHER}
    return any(path.name.removesuffix(".part") not in before for path in folder.iterdir())


def _said(recipe: dict[str, Any], name: str) -> str:
    return repr(recipe[name]) if name in recipe else "the default"


def read_run(model: str) -> dict[str, Any]:
    r"""
    What the folder of a model says of its training.

    Args:
        model (`str`): A training's folder, one of its `checkpoint-N`, or another model: a folder or a name.

    Returns:
        `dict[str, Any]`: `recipe`, `data` (with the formats of prompt and completion) and `llm`; of a `checkpoint-N`
        what the recipe beside it says, and empty for a model that `llm2slm train` did not write.

    Raises:
        ValueError: if `run.json` is something else.
    """
    path, beside = Path(model) / REPORT, Path(model).absolute().parent / RECIPE
    if path.is_file():
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            return {"recipe": dict(run.get("recipe", {})), "data": dict(run["data"]), "llm": run["llm"]}
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is not what `llm2slm train` writes: {error!r}.") from error
    if Path(model).name.startswith(PREFIX_CHECKPOINT_DIR) and beside.is_file():
        recipe = yaml.safe_load(beside.read_text(encoding="utf-8"))
        formats = {name: recipe.get(name) for name in ("prompt_format", "completion_format")}
        return {"recipe": recipe, "data": formats, "llm": {"name_or_path": recipe["llm"]} if "llm" in recipe else None}
    return {"recipe": {}, "data": {}, "llm": None}


def prompt_limit(recipe: dict[str, Any]) -> int | None:
    """The tokens that a training cut prompts to; `None` if it cut none. A recipe says what is not the default."""
    return recipe.get("prompt_max_length", TrainOptions.prompt_max_length) if recipe.get("truncate") else None


def move_to_top(aside: Path, folder: Path) -> None:
    """Moves everything in `aside` into `folder`, each file or folder at once, in place of what has its name."""
    for path in sorted(aside.iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    aside.rmdir()


def last_complete_checkpoint(folder: Path, world_size: int = 1) -> Path | None:
    """The Trainer's checkpoint of the most steps that a kill did not leave incomplete, if there is one."""
    complete = [path for path in _checkpoints(folder) if is_complete(path, world_size)]
    return max(complete, key=_steps, default=None)


def is_complete(checkpoint: Path, world_size: int = 1) -> bool:
    """
    Whether a checkpoint was written to its end: the Trainer's first process writes `trainer_state.json` last, and the
    others may still have been at their state of the random numbers.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut off
        return False
    ranks = range(world_size) if world_size > 1 else []
    return state["global_step"] == _steps(checkpoint) and all(
        zipfile.is_zipfile(checkpoint / f"rng_state_{rank}.pth") for rank in ranks
    )


def remove_incomplete_checkpoints(folder: Path, world_size: int = 1) -> None:
    """Removes what a kill left of a checkpoint: the Trainer would write the next one on top of it."""
    for path in _checkpoints(folder):
        if not is_complete(path, world_size):
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[1].isdecimal()]


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
