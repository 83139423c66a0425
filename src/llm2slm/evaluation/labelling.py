"""Let an LLM write the responses of a data set: labels to train on, as the paper does.

```bash
llm2slm label --llm ./llm --data ./simplify --instruction "Say it in simple English." --few-shot 3 --output ./labelled
llm2slm label --llm runs/fine-tuned-llm --data ./simplify --split train validation --output ./labelled
llm2slm train --config recipe.yaml --data ./labelled --output_dir runs/on-labels
```

The result is a data set with the rows and columns of `--data`, whose `completion` is what the LLM wrote; how it came
about is in its `label.json`. The same command again goes on with an interrupted labelling, and its result is the same
as an uninterrupted one's.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from ..cli.main import check_new_file, main, positive_int, write_aside

SETTINGS, RECORD = "settings.json", "label.json"


def make_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `llm2slm label`."""
    parser.add_argument(
        "--llm", required=True, metavar="NAME", help="what writes: folder, GGUF file, adapter, or name on the Hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit of its repository on the Hub")
    parser.add_argument("--base", metavar="NAME", help="where an adapter's base model is, if not where it says")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="number format of the weights; auto: as they are stored (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")

    parser.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="prompts: a folder written by save_to_disk, a .json, .jsonl, .csv or .parquet file (its split is "
        "`train`), or a data set on the Hub (`name` or `name:configuration`)",
    )
    parser.add_argument("--split", nargs="+", default=["train"], help="one or more parts of it (default: train)")
    parser.add_argument(
        "--prompt-format",
        metavar="TEXT",
        help="how a prompt is made of a row's columns, such as '{prompt}' (default: as the LLM was trained, by the "
        "run.json in its folder; else the column `prompt`)",
    )
    parser.add_argument("--completion-format", metavar="TEXT", help="likewise the completions of --few-shot examples")
    parser.add_argument(
        "--max-examples", type=positive_int, metavar="N", help="this many of each split, evenly spaced (default: all)"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the data set")

    parser.add_argument("--instruction", metavar="TEXT", help="what to do, said before each prompt")
    parser.add_argument(
        "--few-shot",
        type=positive_int,
        metavar="N",
        help="put N pairs of the first split before each prompt; they are themselves left out",
    )
    parser.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="put prompts into the LLM's chat template (default: if it has one, and `llm2slm train` did not train it)",
    )

    parser.add_argument("--batch-size", type=positive_int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=128, help="tokens of a response at most (default: %(default)s)"
    )
    parser.add_argument("--do-sample", action="store_true", help="sample (default: the likeliest token, always)")
    parser.add_argument("--temperature", type=float, help="of sampling; below 1 is more cautious")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this total probability")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same samples (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """
    Labels a data set, or goes on with an interrupted labelling.

    Raises:
        OSError: if the LLM or the data are missing, or the output exists.
        ValueError: if options disagree, a prompt is empty or too long, or what was begun had other settings.
        ImportError: if a package is missing.
    """
    if (args.temperature is not None or args.top_p is not None) and not args.do_sample:
        raise ValueError("--temperature and --top-p are about sampling: add --do-sample.")
    args.output = args.output.rstrip(os.sep)
    check_new_file(args.output)
    try:
        from datasets import DatasetDict
    except ImportError as error:
        raise ImportError(f"{error}. Labelling needs: pip install 'llm-to-slm[train]'") from error
    from ..training.record import machine, versions
    from ..training.run_folder import read_run

    trained = read_run(args.llm)
    rows, prompts, shots = read_data(args, trained["data"].get("prompt_format"))
    work = Path(f"{args.output}.part")
    settings = describe(args, prompts, shots)
    check_work_folder(work, settings)

    model, tokenizer = load_llm(args, trained)
    texts, stop = add_examples(args, tokenizer, prompts, shots, was_trained=bool(trained["data"]))
    ids = {split: encode(texts[split], tokenizer, split) for split in texts}
    check_positions(model, ids, args.max_new_tokens)
    open_work_folder(work, settings)
    try:
        responses = {split: write_split(args, model, tokenizer, ids[split], stop, work, split) for split in ids}
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from what is in {work}.", file=sys.stderr)
        raise

    labelled, counts = {}, {}
    for split in rows:
        labelled[split.partition("[")[0]], counts[split] = join(rows[split], prompts[split], responses[split])
        counts[split]["of_max_new_tokens"] = sum(r["tokens"] >= args.max_new_tokens for r in responses[split])
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    DatasetDict(labelled).save_to_disk(result)
    record = {**settings, "counts": counts, "versions": versions(), "machine": machine()}
    (result / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    check_new_file(args.output)
    result.rename(args.output)
    shutil.rmtree(work)
    for split, count in counts.items():
        print(f"{split}: {count['pairs']:,} pairs in {args.output}")
        if count["without_response"]:
            print(f"  {count['without_response']:,} prompts are left out: the LLM wrote nothing to them")
        if count["of_max_new_tokens"]:
            print(f"  {count['of_max_new_tokens']:,} responses may be cut off: they have {args.max_new_tokens} tokens")


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
def read_data(args: argparse.Namespace, trained_format: str | None):
    """
    Of each split the rows that are labelled and their prompts, and the examples shown to the LLM.

    Raises:
        OSError: if there is no such data set.
        ValueError: if it lacks a split or a column, or a prompt is empty or not what the options are for.
    """
    from ..data.pairs import load_pairs, load_rows, make_texts

    prompt_format = args.prompt_format if args.prompt_format is not None else trained_format
    shots: list[dict[str, str]] = []
    if args.few_shot:
        shots = load_pairs(args.data, args.split[0], prompt_format, args.completion_format, args.few_shot).to_list()
    shown = [shot["prompt"] for shot in shots]
    rows, prompts = {}, {}
    for split in args.split:
        where = f"{args.data!r}, split {split!r}"
        dataset = load_rows(args.data, split, args.max_examples)
        texts = make_texts(dataset, {"prompt": prompt_format}, where)["prompt"][:]
        for number, text in enumerate(texts):
            if not (text if isinstance(text, list) else text.strip()):
                raise ValueError(f"{where}, row {number}: the prompt is empty.")
        if (args.instruction or shots) and not all(isinstance(text, str) for text in texts):
            raise ValueError("--instruction and --few-shot are for prompts that are strings, not chats.")
        others = [number for number, text in enumerate(texts) if text not in shown]
        if not others:
            raise ValueError(f"{where} has no prompts besides the {len(shots)} shown as examples.")
        rows[split] = dataset.select(others)
        prompts[split] = [texts[number] for number in others]
    return rows, prompts, shots


def load_llm(args: argparse.Namespace, trained: dict[str, Any]):
    """Any language model, and its tokenizer for both sides."""
    from ..language_models import load_system, set_generation

    where = argparse.Namespace(
        model=args.llm, llm=args.base, revision=args.revision, dtype=args.dtype, device=args.device
    )
    model, tokenizer = load_system(where, (trained["llm"] or {}).get("name_or_path"))
    set_generation(model, tokenizer, args.max_new_tokens, num_beams=1)
    if args.do_sample:
        model.generation_config.update(do_sample=True, temperature=args.temperature, top_p=args.top_p)
    return model, tokenizer


def add_examples(args: argparse.Namespace, tokenizer, prompts: dict[str, list], shots: list[dict], was_trained: bool):
    """
    The prompts as the LLM reads them, strings or chats, and what ends a response besides its end-of-sequence token.

    Raises:
        ValueError: if a chat template is asked for that there is not.
    """
    from ..language_models import SHOT_SEPARATOR, few_shot_prompts

    if args.chat_template and tokenizer.chat_template is None:
        raise ValueError(f"--chat-template: {args.llm!r} has none.")
    are_strings = isinstance(next(iter(prompts.values()))[0], str)
    if args.chat_template is False or (args.chat_template is None and was_trained and are_strings):
        tokenizer.chat_template = None
    if not are_strings and tokenizer.chat_template is None:
        raise ValueError("The prompts are chats, but there is no chat template to read them with.")
    if not (shots or args.instruction) and (tokenizer.chat_template is None or not are_strings):
        return prompts, None
    texts = {split: few_shot_prompts(rows, shots, args.instruction, tokenizer) for split, rows in prompts.items()}
    return texts, SHOT_SEPARATOR if tokenizer.chat_template is None else None


def encode(texts: list, tokenizer, split: str) -> list[list[int]]:
    """
    The ids of prompts that are strings or chats.

    Raises:
        ValueError: if the tokenizer makes no token of one.
    """
    are_strings = isinstance(texts[0], str)
    if not are_strings:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in texts]
    rows = tokenizer(texts, add_special_tokens=are_strings, verbose=False)["input_ids"]
    if empty := [number for number, ids in enumerate(rows) if not ids]:
        raise ValueError(f"The LLM's tokenizer makes no token of prompt {empty[0]} of the split {split!r}.")
    return rows


def check_positions(model, ids: dict[str, list[list[int]]], max_new_tokens: int) -> None:
    """
    Checks that each prompt and its response fit the LLM's positions.

    Raises:
        ValueError: if some do not: how many, and how long the longest is.
    """
    from ..loading_llm2slm import max_positions

    positions = max_positions(model.config.get_text_config())
    if positions is None:
        return
    limit = positions if model.config.is_encoder_decoder else positions - max_new_tokens
    lengths = [len(row) for rows in ids.values() for row in rows]
    if too_long := [length for length in lengths if length > limit]:
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} prompts are too long, the longest has {max(too_long)} tokens: the LLM "
            f"has {positions} positions, and --max-new-tokens is {max_new_tokens}. Leave them out of the data."
        )


# ----------------------------------------------------------------------------------------------------------- responses
def describe(args: argparse.Namespace, prompts: dict[str, list], shots: list[dict]) -> dict[str, Any]:
    """All that the result depends on."""
    unsaid = ("command", "config", "traceback", "output", "device")
    settings = {name: value for name, value in vars(args).items() if name not in unsaid}
    texts = json.dumps([prompts, shots], ensure_ascii=False)
    return {**settings, "fingerprint": hashlib.sha256(texts.encode()).hexdigest()}


def check_work_folder(work: Path, settings: dict[str, Any]) -> None:
    """
    Checks that what was begun, if anything was, is this labelling.

    Raises:
        ValueError: if it is another one.
    """
    if not (work / SETTINGS).exists():
        return
    begun = json.loads((work / SETTINGS).read_text(encoding="utf-8"))
    if other := [name for name in settings if begun.get(name) != settings[name]]:
        raise ValueError(
            f"{work} was begun with other settings: `{other[0]}` was {begun.get(other[0])!r}, and is "
            f"{settings[other[0]]!r}. Say the same, choose another --output, or delete the folder."
        )


def open_work_folder(work: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of an unfinished labelling."""
    work.mkdir(exist_ok=True)
    if not (work / SETTINGS).exists():
        with write_aside(str(work / SETTINGS)) as file:
            file.write(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def write_split(
    args: argparse.Namespace, model, tokenizer, ids: list[list[int]], stop: str | None, work: Path, split: str
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
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            path = work / f"{split}-{start:09d}.json"
            if not path.exists():
                # A batch's own seed: its samples are the same whatever was written before it in this process.
                set_seed(int.from_bytes(hashlib.sha256(f"{args.seed} {split} {start}".encode()).digest()[:4], "big"))
                tensors = {
                    name: t.to(model.device) for name, t in collate([{"input_ids": ids[i]} for i in batch]).items()
                }
                texts, tokens = write_responses(model, tokenizer, tensors, stop)
                written = [{"text": text.strip(), "tokens": n} for text, n in zip(texts, tokens, strict=True)]
                path.with_suffix(".part").write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
                path.with_suffix(".part").rename(path)
            for i, response in zip(batch, json.loads(path.read_text(encoding="utf-8")), strict=True):
                responses[i] = response
            progress.update(len(batch))
    return responses


if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
