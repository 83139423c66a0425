"""A model card of what a training and its evaluation recorded.

```bash
llm2slm card --run runs/simplify --report simplify.json slm-alone.json few-shot.json
llm2slm card --run runs/simplify --report simplify.json --benchmark speed.json --model-id user/simplify
llm2slm card --run runs/local --llm-name HuggingFaceTB/SmolLM2-135M-Instruct
```

It says what the records say, and nothing else: `run.json` of `llm2slm train`, the reports of `llm2slm evaluate` and
`llm2slm benchmark`. The card is `README.md` in the training's folder, where `llm2slm push` takes it from.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..cli.main import main
from ..evaluation.reports import METRICS, read_report
from .card_sections import (
    as_code,
    data_hub_name,
    data_name,
    describe_licence,
    describe_limits,
    describe_results,
    describe_speed,
    describe_training,
    describe_use,
    read_json,
    summarize,
)

TEMPLATE = Path(__file__).with_name("card_template.md")
# What stands in cards that nobody wrote: this command's own, save_pretrained's, the Trainer's and PEFT's.
REPLACEABLE = (
    "<!-- Written by `llm2slm card`",
    'model="<this repository>"',
    "automatically",
    "Model Card for Model ID",
)
SHOWN_ELSEWHERE = ("arm", "data", "llm", "slm", "slice_of", "slm_layers", "prompt_format", "completion_format")


def make_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `llm2slm card`."""
    parser.add_argument("--run", required=True, metavar="FOLDER", help="folder of a training, with its run.json")
    parser.add_argument(
        "--report",
        nargs="+",
        default=[],
        metavar="FILE",
        help="reports of llm2slm evaluate: of this model, and of others on the same data to stand beside it",
    )
    parser.add_argument("--benchmark", metavar="FILE", help="report of llm2slm benchmark")
    parser.add_argument(
        "--model-id", metavar="NAME", help="name on the Hub, or folder, that the card uses (default: --run)"
    )
    parser.add_argument(
        "--llm-name", metavar="NAME", help="the LLM's name on the Hub, if the training had it elsewhere"
    )
    parser.add_argument("--slm-name", metavar="NAME", help="likewise that of a pretrained SLM")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="the checkpoint's licence, such as apache-2.0 (default: that of its base models)",
    )
    parser.add_argument(
        "--llm-license", metavar="ID", help="the LLM's licence (default: as its own card or file says)"
    )
    parser.add_argument("--language", nargs="+", metavar="CODE", help="languages of prompts and responses, such as en")
    parser.add_argument("--output", metavar="FILE", help="where to write it (default: README.md in --run)")


def run(args: argparse.Namespace) -> None:
    """
    Writes the card.

    Raises:
        OSError: if a file is missing, or the output is a card that someone wrote.
        ValueError: if a file is something else, a name is not one on the Hub, or the licence is not known.
    """
    from huggingface_hub import ModelCard

    folder = Path(args.run)
    trained = read_finished_run(folder)
    output = Path(args.output) if args.output else folder / "README.md"
    check_replaceable(output)
    reports, own = order_reports(args.report, folder)
    benchmark = None if args.benchmark is None else read_json(args.benchmark, "systems", "ratios")
    bases = find_bases(args, trained)
    licences = find_licences(args, trained, bases)
    task = find_task(trained, folder)

    card = ModelCard.from_template(
        make_metadata(args, trained, own, bases, licences["checkpoint"], task),
        template_path=str(TEMPLATE),
        title=model_name(args),
        summary=summarize(trained, folder, bases),
        **describe_use(args, trained, folder, bases, reports, own, task),
        **describe_results(model_name(args), reports, own),
        benchmark=None if benchmark is None else describe_speed(benchmark),
        training=describe_training(trained),
        options=[(name, as_code(value)) for name, value in trained["recipe"].items() if name not in SHOWN_ELSEWHERE],
        has_loss_curve=(output.parent / "loss.png").exists(),
        limits=describe_limits(trained, folder, bases, own),
        licence=describe_licence(trained, bases, licences),
    )
    ModelCard(str(card))  # what is not valid metadata raises a ValueError
    part = output.with_name(f"{output.name}.part")
    part.write_text(str(card).rstrip() + "\n", encoding="utf-8")
    part.replace(output)
    print(f"Written: {output}")


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


def order_reports(paths: list[str], folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """
    The reports' paths, that of this model first, and its content.

    Raises:
        ValueError: if none is of this model.
    """
    reports = {path: read_report(path) for path in paths}
    own = [path for path, report in reports.items() if Path(report["model"]).name == folder.resolve().name]
    if paths and not own:
        found = ", ".join(sorted({report["model"] for report in reports.values()}))
        raise ValueError(f"No report is of {str(folder)!r}: they are of {found}.")
    ordered = own[:1] + [path for path in paths if path not in own[:1]]
    return ordered, reports[own[0]] if own else None


def find_bases(args: argparse.Namespace, trained: dict[str, Any]) -> dict[str, str]:
    """
    The names on the Hub of the models that this one is made of: `llm`, and `slm` unless that began at random.

    Raises:
        ValueError: if a name is a place on this machine, or given for a model that there is not.
    """
    given = {"llm": args.llm_name, "slm": args.slm_name}
    places = {role: trained[role]["name_or_path"] for role in ("llm", "slm") if trained[role] is not None}
    if places.get("slm") == places.get("llm"):  # a slice of the LLM
        given["slm"] = given["slm"] or given["llm"]
    if trained["arm"] == "slm":  # what it has of an LLM is the tokenizer
        places.pop("llm", None)
    if places.get("slm") == "fresh":
        del places["slm"]
    for role in ("llm", "slm"):
        if vars(args)[f"{role}_name"] and role not in places and trained["arm"] != "slm":
            raise ValueError(f"--{role}-name: this model has no pretrained {role.upper()}.")
    return {role: hub_name(given[role] or place, f"--{role}-name") for role, place in places.items()}


def hub_name(name: str, option: str) -> str:
    """
    The name, if it is one on the Hub.

    Raises:
        ValueError: if it is not.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        is_name = False
    else:
        is_name = not os.path.exists(name)
    if not is_name:
        raise ValueError(f"{name!r} is no name on the Hub, such as `user/name`: say it with {option}.")
    return name


def find_licences(args: argparse.Namespace, trained: dict[str, Any], bases: dict[str, str]) -> dict[str, str]:
    """
    The licences of the `llm`, if there is one, and of the `checkpoint`.

    Raises:
        ValueError: if one is not known.
    """
    licences = {}
    for role, name in bases.items():
        if role == "slm" and (args.license or bases.get("llm") == name):
            continue
        found = args.llm_license if role == "llm" else None
        found = found or read_licence(trained[role]["name_or_path"], name)
        if found is not None:
            licences[role] = found
        elif role == "llm":
            raise ValueError(f"The licence of the LLM {name!r} is not known here: say it with --llm-license.")
    if args.license is None and len(set(licences.values())) != 1:
        known = ", ".join(f"that of {bases[role]!r} is {licence}" for role, licence in licences.items())
        raise ValueError(f"Say the checkpoint's licence with --license; {known or 'its base models say none'}.")
    return {**licences, "checkpoint": args.license or next(iter(licences.values()))}


def read_licence(place: str, name: str) -> str | None:
    """What a model's own card or GGUF file says, on this machine or else on the Hub; `None` if neither can be read."""
    from ..loading_llm2slm import split_gguf

    folder, gguf_file = split_gguf(place, None)
    found = licence_of_card(os.path.join(folder, "README.md")) if os.path.isdir(folder) else None
    if found is None and gguf_file is not None:
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
def model_name(args: argparse.Namespace) -> str:
    """The last part of the model's name."""
    return Path(args.model_id or args.run).resolve().name


def make_metadata(args, trained: dict, own: dict | None, bases: dict[str, str], licence: str, task: str):
    """The card's YAML."""
    from huggingface_hub import ModelCardData

    is_adapter = trained["arm"] == "llm"
    metadata = {
        "language": args.language,
        "license": licence,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": task,
        "tags": ["llm2slm", "custom_code"] if trained["arm"] == "llm2slm" else ["llm2slm"],
        "base_model": list(dict.fromkeys(bases.values())) or None,
        "datasets": [name] if (name := data_hub_name(trained["data"]["source"])) else None,
    }
    if bases:  # what began at random needs the LLM beside it, as an adapter does; the rest are its descendants
        metadata["base_model_relation"] = "finetune" if "slm" in bases else "adapter"
    if own is not None:
        metadata["metrics"] = list(dict.fromkeys(metric_type(name) for name in own["scores"]))
        metadata["eval_results"] = evaluation_results(own, task)
        metadata["model_name"] = model_name(args)
    return ModelCardData(**metadata)


def evaluation_results(own: dict[str, Any], task: str) -> list:
    """The scores for the Hub's `model-index`."""
    from huggingface_hub import EvalResult

    source = own["data"]["source"]
    return [
        EvalResult(
            task_type=task,
            dataset_type=data_hub_name(source) or data_name(source),
            dataset_name=data_name(source),
            dataset_split=own["data"]["split"],
            metric_type=metric_type(name),
            metric_name=METRICS[name],
            metric_value=round(score["score"], 2),
        )
        for name, score in own["scores"].items()
    ]


def metric_type(name: str) -> str:
    """What the Hub calls a metric."""
    return "rouge" if name.startswith("rouge") else name


if __name__ == "__main__":
    sys.exit(main(["card", *sys.argv[1:]]))
