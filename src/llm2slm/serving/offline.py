"""Responses to many prompts, batch after batch, in a file from which an interrupted run goes on.

What writes is a [`Writer`]: the model itself ([`model_writer`]) or vLLM (vllm_offline.py).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import StoppingCriteriaList, set_seed

from ..language_models import EndAtString, TooLong, end_tokens, find_too_long, own_stop_strings
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..tokenization_llm2slm import LLM2SLMTokenizer
from ..utils import check_new_file, write_json
from .prompt_files import Prompts, Row, parquet_schema, write_parquet
from .response_text import ResponseText


class Answer(NamedTuple):
    """A response, why it ended (`"stop"`, `"length"` at its limit, `None` without a prompt), and its tokens."""

    response: str
    finish_reason: str | None
    num_tokens: int


OWN_COLUMNS = ("response", "finish_reason")  # of the output, besides those of the prompts
NO_ANSWER = Answer("", None, 0)  # to an empty prompt

# Takes prompts, the number of each one's row, and what is told of the tokens of each response when it is written.
Writer = Callable[[list[str], list[int], Callable[[int], None]], list[Answer]]


class Output:
    r"""
    A file of responses, JSON Lines, or Parquet for a name that ends so: FILE.part, JSON Lines, until it is complete.

    Args:
        path (`str`): The file.
        prompts ([`Prompts`]): What it answers.
        settings (`dict`): What the responses depend on. They are kept beside the unfinished file.
        batch_size (`int`): Prompts that are answered at a time.

    Raises:
        ValueError: if the columns do not go into Parquet, or one has a name of the output's own.
    """

    def __init__(self, path: str, prompts: Prompts, settings: dict[str, Any], batch_size: int):
        self.path, self.settings, self.batch_size = path, settings, batch_size
        self.schema = None
        if taken := [name for name in OWN_COLUMNS if name in prompts.columns]:
            raise ValueError(
                f"The prompts have a column `{taken[0]}`, where the output has its own: give it another name."
            )
        if path.lower().endswith(".parquet"):
            texts = dict.fromkeys(OWN_COLUMNS, "")
            self.schema = parquet_schema(({**row, **texts} for row in prompts.rows()), path)

    @contextmanager
    def opened(self) -> Iterator[tuple[TextIO, int]]:
        """
        Opens what is unfinished behind its last complete batch; gives it with the number of prompts answered in it,
        and puts it in its place at the end.

        Raises:
            OSError: if the file is there by then, or another process writes it.
        """
        lock = FileLock(f"{self.path}.part.lock")
        try:
            held = lock.acquire(blocking=False)
        except Timeout as error:
            raise FileExistsError(
                f"Another process writes {self.path}: wait for it, or choose another name."
            ) from error
        with held:
            yield from self._opened()
            Path(lock.lock_file).unlink(missing_ok=True)

    def _opened(self) -> Iterator[tuple[TextIO, int]]:
        part, begun, answered = Path(f"{self.path}.part"), Path(f"{self.path}.part.json"), 0
        if part.exists() and begun.exists():
            answered = _keep_complete_batches(part, self.batch_size)
            print(f"Going on with {part}: {answered} prompts are answered.", file=sys.stderr)
        else:  # what stands there without its settings is no one's
            part.unlink(missing_ok=True)
            write_json(begun, self.settings, replace=True)
        try:
            with open(part, "a", encoding="utf-8") as file:
                yield file, answered
        except KeyboardInterrupt:
            print(f"\nStopped. The same command goes on from {part}.", file=sys.stderr)
            raise
        check_new_file(self.path)
        if self.schema is None:
            os.replace(part, self.path)
        else:
            write_parquet(part, f"{self.path}.whole", self.schema)
            os.replace(f"{self.path}.whole", self.path)
            part.unlink()
        begun.unlink()


def check_lengths(
    prompts: Prompts, tokenizer: LLM2SLMTokenizer, config, max_new_tokens: int, prompt_max_length: int | None = None
) -> None:
    r"""
    Checks that all prompts fit, before the first is answered.

    Args:
        prompts ([`Prompts`]): The prompts.
        tokenizer ([`LLM2SLMTokenizer`]): The checkpoint's.
        config ([`LLM2SLMConfig`]): The checkpoint's.
        max_new_tokens (`int`): Tokens of a response at most.
        prompt_max_length (`int`, *optional*): Prompts are cut to this many tokens of the LLM.

    Raises:
        ValueError: if some do not: how many, and which is the first.
    """
    found: list[tuple[int, TooLong]] = []
    rows, start = prompts.rows(), 0
    while batch := list(islice(rows, 1000)):
        for number, ids in enumerate(tokenizer([row["prompt"] for row in batch], verbose=False)["input_ids"], start):
            length = len(ids) if prompt_max_length is None else min(len(ids), prompt_max_length)
            found += [(number, too_long) for too_long in find_too_long(config, [(length, max_new_tokens)])]
        start += len(batch)
    if found:
        number, (part, needed, limit) = found[0]
        raise ValueError(
            f"{len(found)} of {prompts.number} prompts are too long, the first is number {number + 1}: with a "
            f"response of up to {max_new_tokens} tokens it needs {needed} positions, and {part} has {limit}. Cut "
            "prompts with --prompt-max-length, allow shorter responses with --max-new-tokens, or leave them out."
        )


def _keep_complete_batches(part: Path, batch_size: int) -> int:
    """Cuts off what was not written whole; returns how many lines remain."""
    ends, size = [0], 0  # of each batch
    with open(part, "rb") as file:
        for number, line in enumerate(file, start=1):
            size += len(line)
            if line.endswith(b"\n") and number % batch_size == 0:
                ends.append(size)
    os.truncate(part, ends[-1])
    return (len(ends) - 1) * batch_size


def write_all(
    prompts: Prompts,
    write: Writer,
    batch_size: int,
    output: Output | None = None,
    show: Callable[[Answer], object] | None = None,
    show_progress: bool = True,
) -> None:
    r"""
    Writes a response to each prompt, in their order. What is told of it goes to standard error.

    Args:
        prompts ([`Prompts`]): The prompts.
        write ([`Writer`]): Writes those of a batch that are not empty.
        batch_size (`int`): Prompts at a time: as many are in memory.
        output ([`Output`], *optional*): Where each prompt's columns, its `response` and its `finish_reason` go.
        show (`Callable`, *optional*): Called with each [`Answer`].
        show_progress (`bool`, *optional*, defaults to `True`): Whether there is a progress bar.
    """
    opened = nullcontext((None, 0)) if output is None else output.opened()
    progress = tqdm(total=prompts.number, unit="prompt", desc="Generating", disable=not show_progress)
    cut = tokens = 0
    with opened as (file, answered), progress:
        progress.update(answered)
        rows, started = islice(prompts.rows(), answered, None), time.perf_counter()

        def tell(num_tokens: int) -> None:
            nonlocal tokens
            tokens += num_tokens
            rate = tokens / (time.perf_counter() - started)
            progress.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            progress.update()

        for start in range(answered, prompts.number, batch_size):
            batch = list(islice(rows, batch_size))
            numbers = [number for number, row in enumerate(batch, start=start) if row["prompt"].strip()]
            texts = [batch[number - start]["prompt"] for number in numbers]
            answers = dict(zip(numbers, write(texts, numbers, tell) if texts else [], strict=True))
            progress.update(len(batch) - len(numbers))
            for number, row in enumerate(batch, start=start):
                answer = answers.get(number, NO_ANSWER)
                cut += answer.finish_reason == "length"
                if file is not None:
                    file.write(_line(row, answer))
                if show is not None:
                    show(answer)
            if file is not None:
                file.flush()
        seconds = time.perf_counter() - started
    written = prompts.number - answered
    if output is not None and written:
        print(
            f"{written:,} responses of {tokens:,} tokens in {seconds:,.1f} s: {written / seconds:,.1f} prompts/s, "
            f"{tokens / seconds:,.0f} tokens/s.",
            file=sys.stderr,
        )
    if cut:
        print(f"{cut} of {written} responses were cut at their limit: see --max-new-tokens.", file=sys.stderr)


def _line(row: Row, answer: Answer) -> str:
    columns = row | dict(zip(OWN_COLUMNS, (answer.response, answer.finish_reason), strict=True))
    return json.dumps(columns, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------------------ written by the model
def model_writer(
    model: LLM2SLMForConditionalGeneration,
    tokenizer: LLM2SLMTokenizer,
    prompt_max_length: int | None = None,
    seed: int | None = None,
    **generate_kwargs,
) -> Writer:
    r"""
    The model as a [`Writer`]: its own `generate`.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): With its LLM loaded.
        tokenizer ([`LLM2SLMTokenizer`]): The checkpoint's, which puts prompts into its `prompt_format`.
        prompt_max_length (`int`, *optional*): Cuts prompts to this many tokens of the LLM.
        seed (`int`, *optional*): Of samples. Each batch has its own: the same samples after an interruption.
        generate_kwargs: Arguments of `model.generate`.
    """

    def write(prompts: list[str], rows: list[int], tell: Callable[[int], None]) -> list[Answer]:
        if seed is not None:
            set_seed(seed + rows[0])
        answers = generate_batch(model, tokenizer, prompts, prompt_max_length, **generate_kwargs)
        for answer in answers:
            tell(answer.num_tokens)
        return answers

    return write


def generate_batch(
    model: LLM2SLMForConditionalGeneration,
    tokenizer: LLM2SLMTokenizer,
    prompts: list[str],
    prompt_max_length: int | None = None,
    **generate_kwargs,
) -> list[Answer]:
    """
    Writes one response to each prompt, in one batch; arguments are those of [`model_writer`].

    Raises:
        ValueError: if a prompt is longer than the LLM or the SLM takes.
    """
    truncation = {"truncation": True, "max_length": prompt_max_length} if prompt_max_length else {}
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", **truncation).to(model.device)
    # As the server does: one response to each prompt, in whose text the stop strings are looked for.
    one: dict[str, Any] = {"stop_strings": None, "num_return_sequences": 1, "return_dict_in_generate": False}
    ends, stop = end_tokens(model), own_stop_strings(model.generation_config)
    if stop:
        one["stopping_criteria"] = StoppingCriteriaList([EndAtString(tokenizer, stop)])
    ids = model.generate(**inputs, **one, **generate_kwargs)
    if model.config.slm_config.is_encoder_decoder:
        ids = ids[:, 1:]  # the start token, which may be the end token too
    return [_answer(row, tokenizer, ends, stop) for row in ids.tolist()]


def _answer(ids: list[int], tokenizer: LLM2SLMTokenizer, ends: list[int], stop: list[str]) -> Answer:
    """What a row of `generate`'s says until its end token or a stop string, of which nothing is shown."""
    text = ResponseText(tokenizer, stop, streamed=False)
    for token in ids:
        text.add(token)
        if token in ends or text.stopped:
            break
    text.end()
    return Answer(text.take(), "stop" if text.stopped or token in ends else "length", len(text.ids))
