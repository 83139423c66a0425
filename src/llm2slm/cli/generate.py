"""Write responses to prompts with an LLM-to-SLM checkpoint.

```bash
llm2slm generate --model user/checkpoint --prompt "And God said, Let there be light."
llm2slm generate --model ./checkpoint --llm ./llm --stream --do-sample --temperature 0.7 --seed 1 --prompt "..."
llm2slm generate --model ./checkpoint --input prompts.txt --output responses.jsonl --batch-size 16
cat prompts.txt | llm2slm generate --model ./checkpoint
```
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils import check_new_file, decode_text, read_json_lines, read_text, write_whole
from .options import DEVICE_HELP, DTYPES, option

MAX_NEW_TOKENS = 128  # of a checkpoint whose generation config says no length


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
        "text, one prompt a line, or .jsonl with the column `prompt`; lines of standard input if there is no prompt",
        None,
        metavar="FILE",
    )
    prompt_max_length: int | None = option("cut prompts to this many tokens of the LLM", None, at_least=1)
    output: str | None = option(
        "new .jsonl file: each prompt's columns and its `response`; FILE.part until it is complete; responses go to "
        "standard output if omitted",
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
        ValueError: if options disagree, or a prompt is empty or of the wrong type.
    """
    if options.prompt and options.input is not None:
        raise ValueError("--prompt and --input both say what the prompts are: leave out one.")
    if (options.temperature is not None or options.top_p is not None) and not options.do_sample:
        raise ValueError("--temperature and --top-p are about sampling: add --do-sample.")
    if options.stream and options.num_beams not in (None, 1):
        raise ValueError("--stream cannot show beam search, which chooses among whole responses at the end.")
    check_new_file(options.output)
    rows = read_prompts(options.prompt, options.input)

    from tqdm.auto import tqdm
    from transformers import GenerationConfig, TextStreamer, set_seed

    from ..language_models import load_checkpoint

    model, tokenizer = load_checkpoint(options.model, options.revision, options.llm, options.dtype, options.device)
    names = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p")
    generate_kwargs: dict[str, Any] = {
        name: getattr(options, name) for name in names if getattr(options, name) is not None
    }
    own, default = model.generation_config, GenerationConfig()
    if own.max_new_tokens is None and own.max_length == default.max_length:
        generate_kwargs.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    if options.stream or options.do_sample:
        generate_kwargs.setdefault("num_beams", 1)
    if options.stream:
        # An encoder-decoder SLM's first token is its start token.
        skip_start = model.config.slm_config.is_encoder_decoder
        generate_kwargs["streamer"] = TextStreamer(tokenizer, skip_prompt=skip_start, skip_special_tokens=True)
    if options.seed is not None:
        set_seed(options.seed)

    size = 1 if options.stream else options.batch_size
    progress = tqdm(total=len(rows), unit="prompt", desc="Generating", disable=options.stream or len(rows) <= size)
    with write_whole(options.output) if options.output else nullcontext() as file, progress:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            responses = generate_batch(
                model, tokenizer, [row["prompt"] for row in batch], options.prompt_max_length, **generate_kwargs
            )
            for row, response in zip(batch, responses, strict=True):
                if file is not None:
                    file.write(json.dumps({**row, "response": response}, ensure_ascii=False) + "\n")
                elif not options.stream:
                    tqdm.write(response, file=sys.stdout)  # keeps the bar below what is written
            progress.update(len(batch))


def generate_batch(
    model, tokenizer, prompts: list[str], prompt_max_length: int | None = None, **generate_kwargs
) -> list[str]:
    r"""
    Writes one response to each prompt, in one batch.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): With its LLM loaded.
        tokenizer ([`LLM2SLMTokenizer`]): The checkpoint's.
        prompts (`list[str]`): The prompts, which the tokenizer puts into its `prompt_format`.
        prompt_max_length (`int`, *optional*): Cuts prompts to this many tokens of the LLM.
        generate_kwargs: Arguments of `model.generate`.

    Raises:
        ValueError: if a prompt is longer than the LLM or the SLM takes.
    """
    truncation = {"truncation": True, "max_length": prompt_max_length} if prompt_max_length else {}
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", **truncation).to(model.device)
    ids = model.generate(**inputs, **generate_kwargs)  # (batch_size, response_length)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def read_prompts(prompts: list[str] | None, path: str | None) -> list[dict[str, Any]]:
    """
    The prompts, or those in a file or standard input, as rows with the column `prompt` and whatever other columns the
    file has.
    """
    if prompts:
        source, rows = "--prompt", [{"prompt": text} for text in prompts]
    elif path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path!r}.")
    elif path is not None and Path(path).suffix.lower() == ".jsonl":
        source, rows = path, read_json_lines(path)
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
        if not row["prompt"].strip():
            raise ValueError(f"{source}, row {number}: the prompt is empty.")
    return rows
