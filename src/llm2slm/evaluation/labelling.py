"""Labels to train on, as the paper does: an LLM writes the responses of a data set.

The result is a data set with the rows and columns of the source, whose `completion` is what the LLM wrote; how it came
about is in its `label.json`. Labelling again goes on with an interrupted one, and the result is that of an
uninterrupted one.
"""

import hashlib
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils import check_installed, check_new_file, check_settings, machine, versions, write_json

SETTINGS = "settings.json"


def label(
    llm: str,
    data: str,
    output: str,
    revision: str | None = None,
    base: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    split: Sequence[str] = ("train",),
    prompt_format: str | None = None,
    completion_format: str | None = None,
    max_examples: int | None = None,
    instruction: str | None = None,
    few_shot: int | None = None,
    chat_template: bool | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    r"""
    Labels a data set, or goes on with an interrupted labelling.

    Args:
        llm (`str`):
            What writes: any model that [`~llm2slm.language_models.load_model`] loads, with `revision`, `dtype` and
            `device`; `base` is where an adapter's base model is, if not where it says.
        data (`str`):
            The prompts, as [`~llm2slm.data.pairs.load_pairs`] takes them, with `split` (one or more), the formats and
            `max_examples` of each. `prompt_format` is that of the LLM's training if omitted, by its `run.json`; long
            prompts are cut if its training cut them, and nothing is put before them.
        output (`str`):
            New folder for the data set. Slices of one split are one split there; all of a file is `train`.
        instruction (`str`, *optional*): What to do, said before each prompt.
        few_shot (`int`, *optional*): Puts this many pairs of the first split before each prompt; they are left out.
        chat_template (`bool`, *optional*):
            Whether prompts go through the LLM's chat template. If omitted: if it has one, and `llm2slm train` did not
            train it.
        batch_size (`int`, *optional*, defaults to 16): Prompts at a time.
        max_new_tokens (`int`, *optional*, defaults to 128): Tokens of a response at most.
        do_sample, temperature, top_p, seed:
            Sampling, from all tokens unless `top_p` says otherwise; the likeliest token, always, if not asked for.

    Raises:
        OSError: if the LLM or the data are missing, or the output exists.
        ValueError: if arguments disagree, a prompt is empty or too long, or what was begun had other settings,
            another LLM or other data.
        ImportError: if a package is missing.
    """
    settings = {
        "llm": llm,
        "revision": revision,
        "base": base,
        "dtype": dtype,
        "data": data,
        "split": list(split),
        "prompt_format": prompt_format,
        "completion_format": completion_format,
        "max_examples": max_examples,
        "instruction": instruction,
        "few_shot": few_shot,
        "chat_template": chat_template,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    if len(set(split)) < len(split) or ("all" in split and len(split) > 1 and os.path.isfile(data)):
        raise ValueError(f"--split: rows of {', '.join(split)} would be labelled twice.")
    if (temperature is not None or top_p is not None) and not do_sample:
        raise ValueError("--temperature and --top-p are about sampling: add --do-sample.")
    output = output.rstrip(os.sep)
    check_new_file(output)
    check_installed("Labelling", "datasets")
    from datasets import DatasetDict, concatenate_datasets

    from ..data.pairs import LABEL_RECORD
    from ..language_models import choose_device, identify, load_model, set_generation
    from ..training.run_folder import prompt_limit, read_run

    choose_device(device)  # one that is not there is said before anything is read
    trained = read_run(llm)
    # A format that is given, or recorded, is the whole of it; without one the tokenizer's own, if any, is put around.
    if prompt_format is None:
        prompt_format = trained["data"].get("prompt_format")
    shots = []
    if few_shot:
        shots = load_shots(data, split[0], prompt_format, completion_format, few_shot)
    rows, prompts = read_prompts(data, split, prompt_format, max_examples, shots, instruction)
    work = Path(f"{output}.part")
    settings["fingerprint"] = hash_prompts(prompts, shots)
    longest_prompt = None if instruction or shots else prompt_limit(trained["recipe"])
    settings["prompt_max_length"] = longest_prompt
    check_settings(work / SETTINGS, settings, work)

    model, tokenizer = load_model(llm, revision, base, dtype, device, (trained["llm"] or {}).get("name_or_path"))
    settings["weights"] = identify(model)  # a folder's may be others than when this was begun
    check_settings(work / SETTINGS, settings, work)
    own_stop = set_generation(model, tokenizer, max_new_tokens, num_beams=1)
    if do_sample:
        model.generation_config.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    if chat_template and tokenizer.chat_template is None:
        raise ValueError(f"--chat-template: {llm!r} has none.")
    texts, stop = add_examples(tokenizer, prompts, shots, instruction, chat_template, bool(trained["data"]))
    ids = {
        part: encode(texts[part], tokenizer, part, in_format=prompt_format is not None, limit=longest_prompt)
        for part in texts
    }
    check_lengths(model.config, ids, max_new_tokens)
    open_work_folder(work, settings)
    try:
        responses = {
            part: write_split(model, tokenizer, ids[part], [*own_stop, *stop], work, part, batch_size, seed)
            for part in ids
        }
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from what is in {work}.", file=sys.stderr)
        raise

    labelled, counts = defaultdict(list), {}
    for part in rows:
        joined, counts[part] = join(rows[part], prompts[part], responses[part])
        counts[part]["of_max_new_tokens"] = sum(r["tokens"] >= max_new_tokens for r in responses[part])
        name = part.partition("[")[0]
        labelled["train" if name == "all" else name].append(joined)
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    DatasetDict({name: concatenate_datasets(parts) for name, parts in labelled.items()}).save_to_disk(result)
    record = {
        **settings,
        "labelled_by_a_pair": model.config.model_type == "llm2slm",
        "counts": counts,
        "versions": versions(),
        "machine": machine(),
    }
    write_json(result / LABEL_RECORD, record)
    check_new_file(output)
    result.rename(output)
    shutil.rmtree(work)
    for part, count in counts.items():
        print(f"{part}: {count['pairs']:,} pairs in {output}")
        if count["without_response"]:
            print(f"  {count['without_response']:,} prompts are left out: the LLM wrote nothing to them")
        if count["of_max_new_tokens"]:
            print(f"  {count['of_max_new_tokens']:,} responses may be cut off: they have {max_new_tokens} tokens")


def join(rows, prompts: list, responses: list[dict]):
    """The rows with their responses as `completion`, without those that got none, and how many that are."""
    kept = [i for i, response in enumerate(responses) if response["text"]]
    if not kept:
        raise ValueError("The LLM wrote nothing to any prompt.")
    completions: list[Any] = [responses[i]["text"] for i in kept]
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    rows = rows.select(kept).remove_columns([name for name in ["completion"] if name in rows.column_names])
    counts = {"pairs": len(kept), "without_response": len(responses) - len(kept)}
    return rows.add_column("completion", completions), counts


# ------------------------------------------------------------------------------------------------------------- prompts
def load_shots(
    data: str, split: str, prompt_format: str | None, completion_format: str | None, number: int
) -> list[dict[str, str]]:
    """The examples shown to the LLM; arguments and errors are those of [`~llm2slm.data.pairs.load_pairs`]."""
    from ..data.pairs import load_pairs

    return load_pairs(data, split, prompt_format, completion_format, number).to_list()


def read_prompts(
    data: str,
    splits: Sequence[str],
    prompt_format: str | None,
    max_examples: int | None,
    shots: list[dict[str, str]],
    instruction: str | None,
):
    """
    Of each split the rows that are labelled and their prompts.

    Raises:
        OSError: if there is no such data set.
        ValueError: if it lacks a split or a column, or a prompt is empty or not what the options are for.
    """
    from ..data.collator import check_messages
    from ..data.pairs import describe_parts, has_parts, load_rows, make_texts, part_sizes, plain_text

    if any(has_parts(data, split) for split in splits):
        print(describe_parts(data, part_sizes(data, prompt_format)))
    shown = [shot["prompt"] for shot in shots]
    rows, prompts = {}, {}
    for split in splits:
        where = f"{data!r}, split {split!r}"
        dataset = load_rows(data, split, max_examples, prompt_format)
        texts = make_texts(dataset, {"prompt": prompt_format}, where)["prompt"][:]
        for number, text in enumerate(texts):
            if isinstance(text, list):
                check_messages("prompt", text, f"{where}: Row {number}")
            if not plain_text(text).strip():
                raise ValueError(f"{where}, row {number}: the prompt is empty.")
        if (instruction or shots) and not all(isinstance(text, str) for text in texts):
            raise ValueError("--instruction and --few-shot are for prompts that are strings, not chats.")
        others = [number for number, text in enumerate(texts) if text not in shown]
        if not others:
            raise ValueError(f"{where} has no prompts besides the {len(shots)} shown as examples.")
        rows[split] = dataset.select(others)
        prompts[split] = [texts[number] for number in others]
    return rows, prompts


def add_examples(
    tokenizer,
    prompts: dict[str, list],
    shots: list[dict],
    instruction: str | None,
    chat_template: bool | None,
    was_trained: bool,
):
    """
    The prompts as the LLM reads them, strings or chats, and what ends a response besides its end-of-sequence token.

    Raises:
        ValueError: if the prompts are chats and there is no chat template.
    """
    from ..language_models import SHOT_SEPARATOR, few_shot_prompts

    are_strings = isinstance(next(iter(prompts.values()))[0], str)
    if chat_template is False or (chat_template is None and was_trained and are_strings):
        tokenizer.chat_template = None
    if not are_strings and tokenizer.chat_template is None:
        raise ValueError("The prompts are chats, but there is no chat template to read them with.")
    if not (shots or instruction) and (tokenizer.chat_template is None or not are_strings):
        return prompts, []
    texts = {split: few_shot_prompts(rows, shots, instruction, tokenizer) for split, rows in prompts.items()}
    return texts, [SHOT_SEPARATOR] if tokenizer.chat_template is None else []


def encode(texts: list, tokenizer, split: str, in_format: bool, limit: int | None = None) -> list[list[int]]:
    """
    The ids of prompts that are strings or chats, `limit` at most. `in_format`: whether they already have the form that
    the LLM reads.

    Raises:
        ValueError: if the tokenizer makes no token of one.
    """
    are_strings = isinstance(texts[0], str)
    if not are_strings:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in texts]
    apply_prompt_format = are_strings and not in_format
    rows = tokenizer(
        texts,
        add_special_tokens=are_strings,
        apply_prompt_format=apply_prompt_format,
        truncation=limit is not None,
        max_length=limit,
        verbose=False,
    )["input_ids"]
    if empty := [number for number, ids in enumerate(rows) if not ids]:
        raise ValueError(f"The LLM's tokenizer makes no token of prompt {empty[0]} of the split {split!r}.")
    return rows


def check_lengths(config, ids: dict[str, list[list[int]]], max_new_tokens: int) -> None:
    """
    Checks that each prompt and its response fit the LLM's positions.

    Raises:
        ValueError: if some do not: how many, and how long the longest is.
    """
    from ..language_models import find_too_long

    lengths = [len(row) for rows in ids.values() for row in rows]
    if too_long := [length for length in lengths if find_too_long(config, [(length, max_new_tokens)])]:
        limit = find_too_long(config, [(max(too_long), max_new_tokens)])[0].limit
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} prompts are too long, the longest has {max(too_long)} tokens: the LLM "
            f"has {limit} positions, and --max-new-tokens is {max_new_tokens}. Leave them out of the data."
        )


# ----------------------------------------------------------------------------------------------------------- responses
def hash_prompts(prompts: dict[str, list], shots: list[dict]) -> str:
    """The SHA-256 of what the LLM reads, by which an interrupted labelling is recognised."""
    return hashlib.sha256(json.dumps([prompts, shots], ensure_ascii=False).encode()).hexdigest()


def open_work_folder(work: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of an unfinished labelling."""
    work.mkdir(exist_ok=True)
    if not (work / SETTINGS).exists():
        write_json(work / SETTINGS, settings)


def write_split(
    model,
    tokenizer,
    ids: list[list[int]],
    stop: list[str],
    work: Path,
    split: str,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The response to each prompt, with `text` and number of `tokens`; each batch is kept in a file of its own."""
    from tqdm.auto import tqdm
    from transformers import set_seed

    from ..data.collator import DataCollatorForLLM2SLM
    from ..language_models import write_responses

    # Prompts of like length share a batch; the longest first, so that what does not fit fails at once.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    collate = DataCollatorForLLM2SLM(tokenizer)
    responses: list[dict[str, Any]] = [{} for _ in ids]
    with tqdm(total=len(ids), unit="prompt", desc=f"Labelling {split}") as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            path = work / f"{split}-{start:09d}.json"
            if not path.exists():
                # A batch's own seed: its samples are the same whatever was written before it in this process.
                set_seed(int.from_bytes(hashlib.sha256(f"{seed} {split} {start}".encode()).digest()[:4], "big"))
                tensors = {
                    name: t.to(model.device) for name, t in collate([{"input_ids": ids[i]} for i in batch]).items()
                }
                texts, tokens = write_responses(model, tokenizer, tensors, stop)
                written = [{"text": text.strip(), "tokens": n} for text, n in zip(texts, tokens, strict=True)]
                write_json(path, written)
            for i, response in zip(batch, json.loads(path.read_text(encoding="utf-8")), strict=True):
                responses[i] = response
            progress.update(len(batch))
    return responses
