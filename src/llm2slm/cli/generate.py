"""Write responses to prompts with an LLM-to-SLM checkpoint.

```bash
llm2slm generate --model user/checkpoint --prompt "And God said, Let there be light."
llm2slm generate --model ./checkpoint --llm ./llm --stream --do-sample --temperature 0.7 --seed 1 --prompt "..."
llm2slm generate --model ./checkpoint --input prompts.txt --output responses.jsonl --batch-size 16
cat prompts.txt | llm2slm generate --model ./checkpoint
llm2slm generate --engine vllm --model ./checkpoint --input prompts.parquet --output responses.parquet
```

With `--output` each line is a JSON object: the prompt's columns, its `response`, and a `finish_reason`, `"stop"`, or
`"length"` of a response that was cut at its limit (`null` where there was no prompt). A name that ends in `.parquet`
gets the same as Parquet. An interrupted run leaves FILE.part; the same command again goes on from there, and ends with
what an uninterrupted one writes.
"""

import os
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..serving.prompt_files import Prompts, check_parquet, read_prompts
from ..utils import MAX_NEW_TOKENS, check_installed, check_new_file, check_settings
from .options import DEVICE_HELP, DTYPES, option

BATCH_SIZES = {"model": 8, "vllm": 1024}


@dataclass
class Options:
    """The options of `llm2slm generate`."""

    model: str = option("LLM-to-SLM checkpoint: folder, or name on the Hub", metavar="NAME")
    llm: str | None = option("where the frozen LLM is, if not where the checkpoint says", None, metavar="NAME")
    revision: str | None = option("branch, tag or commit of the checkpoint's repository on the Hub", None)
    dtype: DTYPES = option("number format of the weights; auto: as they are stored", "auto")
    device: str | None = option(DEVICE_HELP, None, metavar="NAME")

    engine: Literal["model", "vllm"] = option(
        "what writes: the model's own generate, or vLLM, for many prompts: no beams, no T5-like SLMs", "model"
    )

    prompt: list[str] | None = option("one or more prompts", None)
    input: str | None = option(
        "text, one prompt a line, or .jsonl, .csv or .parquet with the column `prompt`; lines of standard input if "
        "there is no prompt",
        None,
        metavar="FILE",
    )
    prompt_max_length: int | None = option("cut prompts to this many tokens of the LLM", None, at_least=1)
    output: str | None = option(
        "new .jsonl or .parquet file: each prompt's columns, its `response` and `finish_reason`; FILE.part until it "
        "is complete, from which the same command goes on; responses go to standard output if omitted",
        None,
        metavar="FILE",
    )

    batch_size: int | None = option(
        f"prompts at a time; {BATCH_SIZES['model']}, or with vLLM {BATCH_SIZES['vllm']}, if omitted", None, at_least=1
    )
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
        ImportError: if vLLM, or what reads and writes Parquet, is asked for and missing.
        OSError: if a file is missing, or the output exists.
        ValueError: if options disagree, a prompt is of the wrong type or too long, or an unfinished output had other
            settings.
    """
    check_options(options)
    check_new_file(options.output)
    prompts = read_prompts(options.prompt, options.input)
    size = 1 if options.stream else options.batch_size or BATCH_SIZES[options.engine]
    settings = settings_of(options, prompts, size)
    if options.output is not None:
        from ..language_models import weights_id

        settings["weights"] = weights_id(options.model, options.revision)  # a folder's may be others by now
    if options.output is not None and os.path.exists(f"{options.output}.part"):
        check_settings(f"{options.output}.part.json", settings, f"{options.output}.part")

    from tqdm.auto import tqdm

    from ..serving.offline import Answer, Output, write_all

    output = None if options.output is None else Output(options.output, prompts, settings, size)

    def show(answer: Answer) -> None:
        if not options.stream or answer.finish_reason is None:  # else it has been shown
            tqdm.write(answer.response, file=sys.stdout)  # keeps the bar below what is written

    write = vllm_writer_of(options, prompts) if options.engine == "vllm" else model_writer_of(options, prompts)
    at_once = 1 if options.engine == "vllm" else size  # vLLM tells of each response when it is written
    has_progress = not options.stream and prompts.number > at_once
    write_all(prompts, write, size, output, show if output is None or options.stream else None, has_progress)


def check_options(options: Options) -> None:
    """
    Checks, before anything is read, that the options go together.

    Raises:
        ImportError: if they need a package that is missing.
        ValueError: if they do not.
    """
    if options.prompt and options.input is not None:
        raise ValueError("--prompt and --input both say what the prompts are: leave out one.")
    if (options.temperature is not None or options.top_p is not None) and not options.do_sample:
        raise ValueError("--temperature and --top-p are about sampling: add --do-sample.")
    if options.stream and options.num_beams not in (None, 1):
        raise ValueError("--stream cannot show beam search, which chooses among whole responses at the end.")
    if options.output is not None and options.output.lower().endswith(".parquet"):
        check_parquet()
    if options.engine == "vllm":
        if options.stream:
            raise ValueError("--stream shows one response at a time, and vLLM writes many: leave out --engine.")
        if options.num_beams not in (None, 1):
            raise ValueError("vLLM's beams are not those of --num-beams: leave out --engine for beam search.")
        if options.device is not None:
            raise ValueError("vLLM chooses the device when it is installed: leave out --device.")
        check_installed("--engine vllm", "vllm", install="pip install 'llm-to-slm[vllm]'")


def settings_of(options: Options, prompts: Prompts, batch_size: int) -> dict[str, Any]:
    """What the responses depend on: whoever goes on with an unfinished output must say the same."""
    elsewhere = ("prompt", "input", "output", "device", "stream", "batch_size")
    settings = {name: value for name, value in asdict(options).items() if name not in elsewhere}
    return {"prompts": prompts.sha256, "batch_size": batch_size, **settings}


def model_writer_of(options: Options, prompts: Prompts):
    """Loads the checkpoint, which writes by itself."""
    from ..language_models import load_checkpoint, own_stop_strings, response_limit, says_no_length
    from ..serving.offline import check_lengths, model_writer
    from ..serving.response_text import PrintedResponse

    model, tokenizer = load_checkpoint(options.model, options.revision, options.llm, options.dtype, options.device)
    names = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p")
    kwargs: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if says_no_length(model.generation_config):
        kwargs.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    starts = model.config.slm_config.is_encoder_decoder  # with a token that is no part of the response
    length = kwargs.get("max_new_tokens") or response_limit(model.generation_config, starts)
    check_lengths(prompts, tokenizer, model.config, length, options.prompt_max_length)
    if options.stream or options.do_sample:
        kwargs.setdefault("num_beams", 1)
    if options.stream:
        kwargs["streamer"] = PrintedResponse(tokenizer, own_stop_strings(model.generation_config), skips_first=starts)
    return model_writer(model, tokenizer, options.prompt_max_length, options.seed, **kwargs)


def vllm_writer_of(options: Options, prompts: Prompts):
    """Starts vLLM with the checkpoint."""
    from ..serving.vllm_offline import Choice, vllm_writer

    names = ("max_new_tokens", "do_sample", "temperature", "top_p", "seed")
    choice = Choice(**{name: getattr(options, name) for name in names})
    place = options.revision, options.llm, options.dtype
    return vllm_writer(options.model, prompts, choice, *place, options.prompt_max_length)
