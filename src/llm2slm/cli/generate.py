"""Write responses to prompts with an LLM-to-SLM checkpoint.

```bash
llm2slm generate --model user/checkpoint --prompt "And God said, Let there be light."
llm2slm generate --model ./checkpoint --llm ./llm --stream --do-sample --temperature 0.7 --seed 1 --prompt "..."
llm2slm generate --model ./checkpoint --input prompts.txt --output responses.jsonl --batch-size 16
cat prompts.txt | llm2slm generate --model ./checkpoint
```
"""

import argparse
import io
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..utils import decode_text, read_text
from .main import add_loading_arguments, check_new_file, load_checkpoint, main, positive_int, write_aside

MAX_NEW_TOKENS = 128  # of a checkpoint whose generation config says no length


def make_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `llm2slm generate`."""
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="LLM-to-SLM checkpoint: folder, or name on the Hub"
    )
    add_loading_arguments(parser, dtype="auto")

    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    prompts.add_argument(
        "--input",
        metavar="FILE",
        help="text, one prompt a line, or .jsonl with the column `prompt` (default: lines of standard input)",
    )
    parser.add_argument(
        "--prompt-max-length", type=positive_int, metavar="N", help="cut prompts to this many tokens of the LLM"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="new .jsonl file: each prompt's columns and its `response`; FILE.part until it is complete "
        "(default: responses to standard output)",
    )

    parser.add_argument("--batch-size", type=positive_int, default=8, help="prompts at a time (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        help=f"tokens of a response at most (default: as the checkpoint says, {MAX_NEW_TOKENS} if it says nothing)",
    )
    parser.add_argument(
        "--num-beams",
        type=positive_int,
        help="beam search with this many beams (default: as the checkpoint says; 1 with --stream or --do-sample)",
    )
    parser.add_argument(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        help="sample, or take the likeliest (default: as the checkpoint says)",
    )
    parser.add_argument("--temperature", type=float, help="of sampling; below 1 is more cautious")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this total probability")
    parser.add_argument("--seed", type=int, help="same seed, same samples")
    parser.add_argument("--stream", action="store_true", help="show each response while it is written, one at a time")


def run(args: argparse.Namespace) -> None:
    """
    Writes a response to each prompt, in the prompts' order.

    Raises:
        OSError: if a file is missing, or the output exists.
        ValueError: if options disagree, or a prompt is empty or of the wrong type.
    """
    if (args.temperature is not None or args.top_p is not None) and not args.do_sample:
        raise ValueError("--temperature and --top-p are about sampling: add --do-sample.")
    if args.stream and args.num_beams not in (None, 1):
        raise ValueError("--stream cannot show beam search, which chooses among whole responses at the end.")
    check_new_file(args.output)
    rows = read_prompts(args)

    from tqdm.auto import tqdm
    from transformers import GenerationConfig, TextStreamer, set_seed

    model, tokenizer = load_checkpoint(args)
    names = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p")
    generate_kwargs: dict[str, Any] = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    own, default = model.generation_config, GenerationConfig()
    if own.max_new_tokens is None and own.max_length == default.max_length:
        generate_kwargs.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    if args.stream or args.do_sample:
        generate_kwargs.setdefault("num_beams", 1)
    if args.stream:
        # An encoder-decoder SLM's first token is its start token.
        skip_start = model.config.slm_config.is_encoder_decoder
        generate_kwargs["streamer"] = TextStreamer(tokenizer, skip_prompt=skip_start, skip_special_tokens=True)
    if args.seed is not None:
        set_seed(args.seed)

    size = 1 if args.stream else args.batch_size
    progress = tqdm(total=len(rows), unit="prompt", desc="Generating", disable=args.stream or len(rows) <= size)
    with write_aside(args.output) if args.output else nullcontext() as file, progress:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            responses = generate_batch(
                model, tokenizer, [row["prompt"] for row in batch], args.prompt_max_length, **generate_kwargs
            )
            for row, response in zip(batch, responses, strict=True):
                if file is not None:
                    file.write(json.dumps({**row, "response": response}, ensure_ascii=False) + "\n")
                elif not args.stream:
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


def read_prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts that `args` names, as rows with the column `prompt` and whatever other columns the input has."""
    if args.prompt:
        source, rows = "--prompt", [{"prompt": text} for text in args.prompt]
    elif args.input is not None and not Path(args.input).is_file():
        raise FileNotFoundError(f"There is no file {args.input!r}.")
    elif args.input is not None and Path(args.input).suffix.lower() == ".jsonl":
        source, rows = args.input, read_jsonl(args.input)
    else:
        source = args.input or "standard input"
        text = read_text(args.input) if args.input else decode_text(sys.stdin.buffer.read(), source)
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


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """
    The rows of a JSON Lines file.

    Raises:
        ValueError: if the file is not UTF-8, or a line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(io.StringIO(read_text(path)), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, row {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} must be an object with columns, got {line.strip()[:40]!r}.")
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
