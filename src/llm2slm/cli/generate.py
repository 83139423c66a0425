"""Write responses to prompts with an LLM-to-SLM checkpoint.

```bash
llm2slm generate --model user/checkpoint --prompt "And God said, Let there be light."
llm2slm generate --model ./checkpoint --llm ./llm --stream --do-sample --temperature 0.7 --seed 1 --prompt "..."
llm2slm generate --model ./checkpoint --input prompts.txt --output responses.jsonl --batch-size 16
cat prompts.txt | llm2slm generate --model ./checkpoint
```

With `--output` each line is a JSON object: the prompt's columns, its `response`, and a `finish_reason`, `"stop"`, or
`"length"` of a response that was cut at its limit (`null` where there was no prompt). An interrupted run leaves
FILE.part; the same command again goes on from there, and ends with what an uninterrupted one writes.
"""

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ..utils import MAX_NEW_TOKENS, check_new_file, check_settings, decode_text, read_json_lines, read_text, write_json
from .options import DEVICE_HELP, DTYPES, option

NO_RESPONSE = {"response": "", "finish_reason": None}  # to an empty prompt
OTHER_FORMATS = (".json", ".parquet", ".tsv", ".xlsx", ".arrow")  # their lines would be taken for prompts


@dataclass
class Options:
    """The options of `llm2slm generate`."""

    model: str = option("LLM-to-SLM checkpoint: folder, or name on the Hub", metavar="NAME")
    llm: str | None = option("where the frozen LLM is, if not where the checkpoint says", None, metavar="NAME")
    revision: str | None = option("branch, tag or commit of the checkpoint's repository on the Hub", None)
    dtype: DTYPES = option("number format of the weights; auto: as they are stored", "auto")
    device: str | None = option(DEVICE_HELP, None, metavar="NAME")

    prompt: list[str] | None = option("one or more prompts", None)
    input: str | None = option(
        "text, one prompt a line, or .jsonl or .csv with the column `prompt`; lines of standard input if there is no "
        "prompt",
        None,
        metavar="FILE",
    )
    prompt_max_length: int | None = option("cut prompts to this many tokens of the LLM", None, at_least=1)
    output: str | None = option(
        "new .jsonl file: each prompt's columns, its `response` and `finish_reason`; FILE.part until it is complete, "
        "from which the same command goes on; responses go to standard output if omitted",
        None,
        metavar="FILE",
    )

    batch_size: int = option("prompts at a time", 8, at_least=1)
    max_new_tokens: int | None = option(
        f"tokens of a response at most; as the checkpoint says, {MAX_NEW_TOKENS} if it says nothing", None, at_least=1
    )
    num_beams: int | None = option(
        "beam search with this many beams; as the checkpoint says if omitted, 1 with --stream or --do-sample",
        None,
        at_least=1,
    )
    do_sample: bool | None = option("sample, or take the likeliest; as the checkpoint says if omitted", None)
    temperature: float | None = option("of sampling; below 1 is more cautious", None)
    top_p: float | None = option("sample from the likeliest tokens of this total probability", None)
    seed: int | None = option("same seed, same samples", None)
    stream: bool = option("show each response while it is written, one at a time", False)


def run(options: Options) -> None:
    """
    Writes a response to each prompt, in the prompts' order.

    Raises:
        OSError: if a file is missing, or the output exists.
        ValueError: if options disagree, a prompt is of the wrong type, or an unfinished output had other settings.
    """
    if options.prompt and options.input is not None:
        raise ValueError("--prompt and --input both say what the prompts are: leave out one.")
    if (options.temperature is not None or options.top_p is not None) and not options.do_sample:
        raise ValueError("--temperature and --top-p are about sampling: add --do-sample.")
    if options.stream and options.num_beams not in (None, 1):
        raise ValueError("--stream cannot show beam search, which chooses among whole responses at the end.")
    check_new_file(options.output)
    rows = read_prompts(options.prompt, options.input)
    size = 1 if options.stream else options.batch_size
    settings = settings_of(options, rows, size)
    if options.output is not None and os.path.exists(f"{options.output}.part"):
        check_settings(f"{options.output}.part.json", settings, f"{options.output}.part")

    from tqdm.auto import tqdm
    from transformers import TextStreamer, set_seed

    from ..language_models import load_checkpoint, says_no_length

    model, tokenizer = load_checkpoint(options.model, options.revision, options.llm, options.dtype, options.device)
    names = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p")
    generate_kwargs: dict[str, Any] = {
        name: getattr(options, name) for name in names if getattr(options, name) is not None
    }
    if says_no_length(model.generation_config):
        generate_kwargs.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    if options.stream or options.do_sample:
        generate_kwargs.setdefault("num_beams", 1)
    if options.stream:
        # An encoder-decoder SLM's first token is its start token.
        skip_start = model.config.slm_config.is_encoder_decoder
        generate_kwargs["streamer"] = TextStreamer(tokenizer, skip_prompt=skip_start, skip_special_tokens=True)
    opened = nullcontext((None, 0)) if options.output is None else resumed(options.output, settings, size)
    progress = tqdm(total=len(rows), unit="prompt", desc="Generating", disable=options.stream or len(rows) <= size)
    cut = 0
    with opened as (file, answered), progress:
        progress.update(answered)
        for start in range(answered, len(rows), size):
            if options.seed is not None:  # of each batch its own: the same samples after an interruption
                set_seed(options.seed + start)
            batch = rows[start : start + size]
            prompts = [row["prompt"] for row in batch if row["prompt"].strip()]
            written = iter(
                generate_batch(model, tokenizer, prompts, options.prompt_max_length, **generate_kwargs)
                if prompts
                else []
            )
            for row in batch:
                answer = next(written) if row["prompt"].strip() else NO_RESPONSE
                cut += answer["finish_reason"] == "length"
                if file is not None:
                    file.write(json.dumps({**row, **answer}, ensure_ascii=False) + "\n")
                elif not options.stream or answer is NO_RESPONSE:  # else it has been shown
                    tqdm.write(answer["response"], file=sys.stdout)  # keeps the bar below what is written
            if file is not None:
                file.flush()
            progress.update(len(batch))
    if cut:
        print(f"{cut} of {len(rows)} responses were cut at their limit: see --max-new-tokens.", file=sys.stderr)


# ------------------------------------------------------------------------------------------- an output that is resumed
def settings_of(options: Options, rows: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """What the responses depend on: whoever goes on with an unfinished output must say the same."""
    elsewhere = ("prompt", "input", "output", "device", "stream", "batch_size")
    settings = {name: value for name, value in asdict(options).items() if name not in elsewhere}
    text = json.dumps(rows, ensure_ascii=False)
    return {"prompts": hashlib.sha256(text.encode()).hexdigest(), "batch_size": batch_size, **settings}


@contextmanager
def resumed(output: str, settings: dict[str, Any], batch_size: int) -> Iterator[tuple[TextIO, int]]:
    """
    Opens `output` + ".part", whose settings were checked, behind its last complete batch; gives it with the number of
    prompts answered in it, and renames it to `output` at the end. Its settings are beside it, in `.part.json`.
    """
    part, begun, answered = Path(f"{output}.part"), Path(f"{output}.part.json"), 0
    if part.exists() and begun.exists():
        lines = part.read_bytes().splitlines(keepends=True)
        complete = sum(line.endswith(b"\n") for line in lines)
        answered = complete - complete % batch_size
        os.truncate(part, sum(map(len, lines[:answered])))
        print(f"Going on with {part}: {answered} prompts are answered.", file=sys.stderr)
    else:  # what stands there without its settings is no one's
        part.unlink(missing_ok=True)
        write_json(begun, settings, replace=True)
    try:
        with open(part, "a", encoding="utf-8") as file:
            yield file, answered
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from {part}.", file=sys.stderr)
        raise
    check_new_file(output)
    os.replace(part, output)
    begun.unlink()


# ----------------------------------------------------------------------------------------------- prompts and responses
def generate_batch(
    model, tokenizer, prompts: list[str], prompt_max_length: int | None = None, **generate_kwargs
) -> list[dict[str, str]]:
    r"""
    Writes one response to each prompt, in one batch.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): With its LLM loaded.
        tokenizer ([`LLM2SLMTokenizer`]): The checkpoint's.
        prompts (`list[str]`): The prompts, which the tokenizer puts into its `prompt_format`.
        prompt_max_length (`int`, *optional*): Cuts prompts to this many tokens of the LLM.
        generate_kwargs: Arguments of `model.generate`.

    Returns:
        `list[dict[str, str]]`: of each prompt the `response`, and its `finish_reason`: `"stop"`, or `"length"` if it
        was cut at its limit.

    Raises:
        ValueError: if a prompt is longer than the LLM or the SLM takes.
    """
    import torch

    truncation = {"truncation": True, "max_length": prompt_max_length} if prompt_max_length else {}
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", **truncation).to(model.device)
    ids = model.generate(**inputs, **generate_kwargs)  # (batch_size, response_length)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if model.config.slm_config.is_encoder_decoder:
        ids = ids[:, 1:]  # the start token, which may be the end token too
    ends = model.generation_config.eos_token_id
    ended = torch.isin(ids, torch.tensor([] if ends is None else ends, device=ids.device)).any(dim=1).tolist()
    return [
        {"response": text, "finish_reason": "stop" if end else "length"}
        for text, end in zip(texts, ended, strict=True)
    ]


def read_prompts(prompts: list[str] | None, path: str | None) -> list[dict[str, Any]]:
    """
    The prompts, or those in a file or standard input, as rows with the column `prompt` and whatever other columns the
    file has. Empty ones in a file stay where they are, with a note.

    Raises:
        OSError: if there is no such file.
        ValueError: if it has another format, no column `prompt`, or no prompts, or `prompts` has an empty one.
    """
    if prompts:
        source, rows = "--prompt", [{"prompt": text} for text in prompts]
    elif path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path!r}.")
    elif path is not None and Path(path).suffix.lower() == ".jsonl":
        source, rows = path, read_json_lines(path)
    elif path is not None and Path(path).suffix.lower() == ".csv":
        source, rows = path, read_csv(path)
    elif path is not None and Path(path).suffix.lower() in OTHER_FORMATS:
        raise ValueError(f"{path} must be text, one prompt a line, or .jsonl or .csv with the column `prompt`.")
    else:
        source = path or "standard input"
        text = read_text(path) if path else decode_text(sys.stdin.buffer.read(), source)
        rows = [{"prompt": line} for line in text.split("\n")]
        if rows[-1]["prompt"] == "":  # the last line's end
            rows.pop()
    if not rows:
        raise ValueError(f"{source} has no prompts.")
    for number, row in enumerate(rows, start=1):
        if "prompt" not in row:
            raise ValueError(f"{source}, row {number} has no column `prompt`, only {sorted(row)}.")
        if not isinstance(row["prompt"], str):
            raise ValueError(f"{source}, row {number}: the prompt must be a string, got {row['prompt']!r}.")
    empty = [number for number, row in enumerate(rows, start=1) if not row["prompt"].strip()]
    if empty and (prompts or len(empty) == len(rows)):
        raise ValueError(f"{source}, row {empty[0]}: the prompt is empty.")
    if empty:
        first = f"{len(empty)} of {len(rows)} prompts, the first in row {empty[0]}"
        print(f"{source}: {first}, are empty, and so are their responses.", file=sys.stderr)
    return rows


def read_csv(path: str) -> list[dict[str, Any]]:
    """
    The rows of a CSV file, by the columns that its first line names.

    Raises:
        ValueError: if the file is not UTF-8 or lacks the column `prompt`, or a row has more cells than columns.
    """
    reader = csv.DictReader(io.StringIO(read_text(path)), restval="")
    try:
        if "prompt" not in (names := reader.fieldnames or []):
            raise ValueError(f"{path} has no column `prompt`, only {list(names)}.")
        rows = []
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise ValueError(f"{path}, row {number} has more cells than the {len(names)} columns {list(names)}.")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}.") from error
    return rows
