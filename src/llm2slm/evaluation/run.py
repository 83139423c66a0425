"""Scores of a model's responses, its loss, its speed, and whether LLM-to-SLM uses its LLM."""

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..utils import check_installed, check_new_file, machine, versions, write_json, write_whole
from .metrics import score_texts
from .reports import METRICS, texts_path


def evaluate(
    model: str,
    data: str,
    output: str,
    revision: str | None = None,
    llm: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    split: str = "test",
    prompt_format: str | None = None,
    completion_format: str | None = None,
    max_examples: int | None = None,
    by: str | None = None,
    prompt_max_length: int | None = None,
    few_shot: int | None = None,
    few_shot_split: str = "train",
    instruction: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    metrics: Sequence[str] = tuple(METRICS),
) -> list[dict[str, Any]]:
    r"""
    Evaluates a model, and writes the report and, beside it, the texts; or a report for each value of a column.

    Args:
        model (`str`):
            What is evaluated, as [`~llm2slm.language_models.load_model`] takes it, with `revision`, `llm`, `dtype` and
            `device`.
        data (`str`): The pairs, as [`~llm2slm.data.pairs.load_pairs`] takes them, with `split`, the formats and
            `max_examples`. Formats that are omitted are those that the model was trained with, by its `run.json`.
        output (`str`): New `.json` file for the report; the texts go into `.jsonl` beside it.
        by (`str`, *optional*):
            A column. The pairs of each of its values are evaluated by themselves, `max_examples` and examples shown
            being those of the value; its report goes into a file whose name ends in the value, `report-value.json`.
        prompt_max_length (`int`, *optional*):
            Cuts prompts to this many tokens. As the model was trained if omitted, if its training cut them.
        few_shot (`int`, *optional*): Puts this many solved examples, of `few_shot_split`, before each prompt.
        instruction (`str`, *optional*): What to do, said before each prompt.
        batch_size (`int`, *optional*, defaults to 16): Prompts at a time.
        max_new_tokens (`int`, *optional*, defaults to 128): Tokens of a response at most.
        num_beams (`int`, *optional*, defaults to 1): Beam search with this many; greedy with one.
        metrics (`Sequence[str]`, *optional*): Names of [`~llm2slm.evaluation.reports.METRICS`].

    Returns:
        `list[dict[str, Any]]`: the report or, with `by`, those of the values.

    Raises:
        OSError: if a model or a data set is missing, or an output exists.
        ValueError: if arguments disagree, pairs are empty or too long, or there is no column `by`.
        ImportError: if a package is missing.
    """
    if Path(output).suffix != ".json":
        raise ValueError(f"--output must end in .json (the texts go beside it, into .jsonl), got {output!r}.")
    check_outputs([output])
    check_installed("Evaluation", "datasets", "rouge_score", "sacrebleu")
    from ..data import pairs
    from ..language_models import choose_device, load_model, set_generation
    from ..training.run_folder import prompt_limit, read_run

    choose_device(device)  # one that is not there is said before anything is read
    trained = read_run(model)
    if prompt_max_length is None and not (few_shot or instruction):
        prompt_max_length = prompt_limit(trained["recipe"])
    formats = {"prompt_format": prompt_format, "completion_format": completion_format}
    formats = {name: trained["data"].get(name) if text is None else text for name, text in formats.items()}

    skip_empty = trained["recipe"].get("skip_empty", False)

    def load(part: str, number: int | None) -> dict[str, Any]:
        options = {**formats, "max_examples": number, "missing_is_empty": skip_empty}
        if by is None:
            found = {"": pairs.load_pairs(data, part, **options)}
        else:
            found = pairs.load_groups(data, part, by, **options)
        if skip_empty:  # as the training did
            found = {value: pairs.without_empty(rows, part, skip=True) for value, rows in found.items()}
        return found

    groups = load(split, max_examples)
    outputs = {value: value_path(output, value) for value in groups} if by else {"": output}
    check_outputs(list(outputs.values()))
    parts = None
    if pairs.has_parts(data, split) or (few_shot and pairs.has_parts(data, few_shot_split)):
        check_held_out(trained["data"], model, data, split, formats["prompt_format"])
        parts = pairs.part_sizes(data, formats["prompt_format"])
        print(pairs.describe_parts(data, parts))
    if labels := pairs.describe_labels(data, formats["completion_format"]):
        print(labels)
    shots = load(few_shot_split, few_shot) if few_shot else {}
    if few_shot and (missing := [value for value in groups if value not in shots]):
        raise ValueError(f"--few-shot: the split {few_shot_split!r} has no pair whose {by} is {missing[0]!r}.")
    if few_shot:
        check_not_shown(groups, shots)

    trained_llm = (trained["llm"] or {}).get("name_or_path")
    loaded, tokenizer = load_model(model, revision, llm, dtype, device, trained_llm)
    # A format that is given, or recorded, is the whole of it; without one the tokenizer's own is put around prompts.
    in_format = formats["prompt_format"] is not None
    rows = {
        value: make_rows(
            loaded,
            tokenizer,
            dataset,
            shots[value].to_list() if few_shot else [],
            instruction,
            prompt_max_length,
            max_new_tokens,
            in_format,
        )
        for value, dataset in groups.items()
    }
    own_stop = set_generation(loaded, tokenizer, max_new_tokens, num_beams)
    reports = []
    for value, dataset in groups.items():
        if by:
            print(f"{by} {value}: {len(dataset):,} pairs")
        references = [text if isinstance(text, str) else text[0]["content"] for text in dataset["completion"]]
        examples, stop = rows[value]
        responses, measured = measure(loaded, tokenizer, examples, [*stop, *own_stop], batch_size, num_beams)
        report = {
            "system": system_name(model, few_shot, num_beams) + (f", {value}" if by else ""),
            "model": model,
            "data": {
                "source": pairs.recorded_source(data),
                "split": split,
                "fingerprint": pairs.hash_texts(dataset),
                "examples": len(dataset),
                "parts": parts,  # of a file that was split by a hash of its prompts
                **({"by": {by: value}} if by else {}),
                **formats,
            },
            "scores": {name: score_texts(name, responses, references, dataset["prompt"][:]) for name in metrics},
            **measured,
            "generation": {
                "max_new_tokens": max_new_tokens,
                "num_beams": num_beams,
                "prompt_max_length": prompt_max_length,
                "few_shot": few_shot,
                "instruction": instruction,
                "dtype": str(loaded.dtype).removeprefix("torch."),
            },
            "versions": versions() | {name: metadata.version(name) for name in ("rouge_score", "sacrebleu")},
            "machine": machine() | ({"gpu": None} if loaded.device.type == "cpu" else {}),
        }
        write_texts(outputs[value], dataset["prompt"], references, responses)
        write_json(outputs[value], report)
        reports.append(report)
    return reports


def value_path(output: str, value: str) -> str:
    """Where the report on a column's value goes: its name without what is no letter, digit, dot, `_` or `-`."""
    name = re.sub(r"[^\w.-]+", "-", value)
    return str(Path(output).with_suffix("")) + f"-{name}.json"


def check_outputs(outputs: list[str]) -> None:
    """
    Checks that reports and their texts go into new files, each into its own.

    Raises:
        OSError: if a file exists.
        ValueError: if two reports would be one file.
    """
    for path in outputs:
        if outputs.count(path) > 1:
            raise ValueError(f"--by: two values of the column would be written to {path}.")
        check_new_file(path)
        check_new_file(texts_path(path))


def write_texts(output: str, prompts: Sequence, references: list[str], responses: list[str]) -> None:
    """Writes a report's texts beside it."""
    with write_whole(texts_path(output)) as file:
        for prompt, completion, response in zip(prompts, references, responses, strict=True):
            line = {"prompt": prompt, "completion": completion, "response": response}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


# --------------------------------------------------------------------------------------------------- what is evaluated
def check_not_shown(groups: dict[str, Any], shots: dict[str, Any]) -> None:
    """
    Checks that no pair that is evaluated is shown, solved, before prompts.

    Raises:
        ValueError: if some are.
    """
    for value, rows in groups.items():
        asked = rows["prompt"][:]
        if shown := [prompt for prompt in shots[value]["prompt"] if prompt in asked]:
            raise ValueError(
                f"--few-shot: {len(shown)} of the {len(shots[value])} solved examples are among the pairs that are "
                f"evaluated, such as {shown[0]!r}. Take them from another split, --few-shot-split."
            )


def check_held_out(trained: dict[str, Any], model: str, data: str, split: str, prompt_format: str | None) -> None:
    """
    Checks that a part of a file was held out when the model was trained on that file.

    Raises:
        ValueError: if the training chose its rows of the file otherwise, or learned from all of them.
    """
    from ..data.pairs import fields_of

    if split == "train":
        return

    def is_data(source: str) -> bool:
        return os.path.exists(source) and os.path.samefile(source, data)

    if any(is_data(source) for source in trained.get("more") or {}):
        raise ValueError(f"{model!r} learned from all of {data} (`more_data`): its {split!r} is not held out.")
    if not is_data(trained.get("source", "")):
        return
    if trained.get("parts"):
        before, now = (fields_of(text) for text in (trained.get("prompt_format"), prompt_format))
        if before == now:
            return
        raise ValueError(
            f"{model!r} was trained on the part 'train' of {data} by a hash of {', '.join(before)}; a --prompt-format "
            f"of {', '.join(now)} splits it otherwise, and {split!r} may have rows that were learned from. Use a "
            "format of the same columns, or a file of other rows."
        )
    raise ValueError(
        f"{model!r} was trained on rows of {data} that are not its part 'train': it may have learned from rows of "
        f"{split!r}. Name the rows with --split, such as 'train[90%:]' or 'all'."
    )


def system_name(model: str, few_shot: int | None, num_beams: int) -> str:
    """What the report calls the model: its folder's name, or its name on the Hub; how many shots, how many beams."""
    name = Path(model).resolve().name if os.path.exists(model) else model
    name += f", {few_shot}-shot" if few_shot else ""
    return name + (f", {num_beams} beams" if num_beams > 1 else "")


def make_rows(
    model,
    tokenizer,
    dataset,
    shots: list[dict],
    instruction: str | None,
    prompt_max_length: int | None,
    max_new_tokens: int,
    in_format: bool,
) -> tuple[list[dict[str, list[int]]], list[str]]:
    """
    The pairs as `input_ids` and `labels`, and what ends a response besides the end-of-sequence token. `in_format`:
    whether the prompts already have the form that the model reads.

    Raises:
        ValueError: if a side is empty or too long for the model, or has no place for an instruction and examples.
    """
    from datasets import Dataset

    from ..data.collator import tokenize_pairs
    from ..language_models import SHOT_SEPARATOR, check_positions, few_shot_prompts

    stop: list[str] = []
    if shots or instruction:
        if model.config.model_type == "llm2slm":
            raise ValueError("--few-shot and --instruction are for a model by itself, not for LLM-to-SLM.")
        if prompt_max_length:
            raise ValueError("--prompt-max-length would cut off the prompt, which is behind instruction and examples.")
        if not all(isinstance(text, str) for row in (dataset[0], *shots) for text in row.values()):
            raise ValueError("--few-shot and --instruction are for prompts that are strings, not chats.")
        prompts = few_shot_prompts(dataset["prompt"][:], shots, instruction, tokenizer)
        dataset = Dataset.from_dict({"prompt": prompts, "completion": dataset["completion"][:]})
        stop = [SHOT_SEPARATOR] if tokenizer.chat_template is None else []
    cut = prompt_max_length or sys.maxsize
    rows = tokenize_pairs(dataset, tokenizer, cut, sys.maxsize, truncate=True, apply_prompt_format=not in_format)
    rows = rows.select_columns(["input_ids", "labels"]).to_list()
    check_positions(
        model.config,
        [(len(row["input_ids"]), max(len(row["labels"]), max_new_tokens)) for row in rows],
        "The longest prompt with its response",
        "lower --prompt-max-length, which cuts prompts, or --max-new-tokens",
    )
    return rows, stop


# ---------------------------------------------------------------------------------------------------- what is measured
def measure(model, tokenizer, rows: list[dict], stop: list[str], batch_size: int, num_beams: int):
    """The responses, and the report's `loss`, `speed`, `costs` and, for LLM-to-SLM, `shuffled_states`."""
    from .shuffled_states import shuffle_among_like

    # Prompts of like length share a batch; the longest first, so that what does not fit fails at once.
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["input_ids"]), -len(rows[i]["labels"])))
    measured: dict[str, Any] = {"loss": held_out_loss(model, tokenizer, rows, order, batch_size)}
    if model.config.model_type == "llm2slm" and len(rows) > 1:
        donors = shuffle_among_like([len(row["input_ids"]) for row in rows])
        loss, shuffled = measured["loss"], held_out_loss(model, tokenizer, rows, order, batch_size, donors)
        increase = shuffled / loss - 1 if loss else None
        measured["shuffled_states"] = {"loss": loss, "shuffled_loss": shuffled, "increase": increase}
    responses, measured["speed"] = write_all_responses(model, tokenizer, rows, order, batch_size, stop)
    measured["costs"] = count_costs(model.config, rows, measured["speed"], num_beams)
    return responses, measured


def batches(order: list[int], batch_size: int, description: str):
    """Parts of `order`, with a progress bar."""
    from tqdm.auto import tqdm

    with tqdm(total=len(order), unit="example", desc=description) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            yield batch
            progress.update(len(batch))


def held_out_loss(
    model, tokenizer, rows: list[dict], order: list[int], batch_size: int, donors: list[int] | None = None
) -> float:
    r"""
    The mean negative log-likelihood (nats) of the references' tokens, ends included.

    Args:
        model: Any that [`~llm2slm.language_models.load_model`] gives.
        tokenizer ([`LLM2SLMTokenizer`]): The model's.
        rows (`list[dict]`): The examples, with `input_ids` and `labels`.
        order (`list[int]`): The order in which they are read.
        batch_size (`int`): How many at a time.
        donors (`list[int]`, *optional*): For each example of LLM-to-SLM the one whose LLM states it is given.
    """
    from ..data.collator import DataCollatorForLLM2SLM
    from ..language_models import response_loss
    from .shuffled_states import states_of_others

    collate = DataCollatorForLLM2SLM(tokenizer)
    total = 0.0
    for batch in batches(order, batch_size, "Loss" if donors is None else "Loss with shuffled states"):
        tensors = {name: tensor.to(model.device) for name, tensor in collate([rows[i] for i in batch]).items()}
        if donors is not None:
            others = collate([rows[donors[i]] for i in batch])
            tensors["prompt_hidden_states"] = states_of_others(model, tensors, others)
        total += response_loss(model, tensors)
    return total / sum(len(row["labels"]) for row in rows)


def write_all_responses(model, tokenizer, rows: list[dict], order: list[int], batch_size: int, stop: list[str]):
    """The responses in the order of `rows`, and the speed as the report has it."""
    from ..data.collator import DataCollatorForLLM2SLM
    from ..language_models import write_responses

    collate = DataCollatorForLLM2SLM(tokenizer)
    responses = [""] * len(rows)
    num_tokens, seconds = 0, 0.0
    for batch in batches(order, batch_size, "Writing responses"):
        tensors = {name: tensor.to(model.device) for name, tensor in collate([rows[i] for i in batch]).items()}
        start = time.perf_counter()
        texts, written = write_responses(model, tokenizer, tensors, stop)
        seconds += time.perf_counter() - start
        num_tokens += sum(written)
        for i, text in zip(batch, texts, strict=True):
            responses[i] = text
    return responses, {
        "seconds": seconds,
        "examples_per_second": len(rows) / seconds,
        "tokens_per_second": num_tokens / seconds,
        "batch_size": batch_size,
    }


def count_costs(config, rows: list[dict], speed: dict[str, Any], num_beams: int) -> dict[str, float]:
    """What the system has and, for prompts and responses of the mean length, computes for one example."""
    from ..benchmark.costs import costs_of

    costs = costs_of(config)
    prompt_length = sum(len(row["input_ids"]) for row in rows) / len(rows)
    response_length = speed["tokens_per_second"] / speed["examples_per_second"]
    flops = costs.prompt_flops(prompt_length, 1)
    flops += num_beams * (response_length - 1) * costs.token_flops(prompt_length + response_length / 2, 1)
    return {"parameters": costs.parameters, "gflop_per_example": flops / 1e9}
