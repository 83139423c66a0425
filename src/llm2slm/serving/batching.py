"""Prompts that wait, and batches of them that the model answers: one thread, one batch after another.

Choices made here:
- A batch is one call of the product's `generate`. A stopping criterion sees each token as it is written: by it each
  response ends at its own limit, stop string or caller's leaving, and streams. Nothing is generated that `generate`
  would not generate alone.
- Sampling is a logits processor: a token's probability divided by exponential noise, of which the greatest is taken,
  is a draw of the same distribution (Gumbel's trick). The noise is each response's own, so that requests of all
  temperatures share a batch, and the same seed gives the same response in whatever company.
- The next batch takes all that wait. When a batch ends its callers come again at the same time: it waits a moment
  until they are as many as before.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..decoding_llm2slm import is_compiled
from ..language_models import end_tokens, find_too_long
from ..loading_llm2slm import max_positions
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from .response_text import ResponseText

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-5  # below it the likeliest is taken: scores divided by less may be infinite
GATHER_SECONDS = 0.02  # for one more prompt, until as many wait as the last batch had
# Responses at a time that have a compiled step: where it pays on every kind of CPU (results/fast_decode.json). Each
# takes some 20 seconds to compile, so 3 responses are decoded as 4.
FAST_ROWS = (1, 2, 4)


class QueueFull(Exception):
    """As many prompts wait as may."""


@dataclass
class Sampling:
    """How tokens are chosen: the likeliest at temperatures below `MIN_TEMPERATURE`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    warpers: list[LogitsProcessor] = field(default_factory=list)  # further ones, which keep a row's tokens from a draw

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature >= MIN_TEMPERATURE


@dataclass(eq=False)
class Waiting:
    r"""
    A prompt, and whom to tell of its answer.

    Args:
        prompt (`list[int]`): Ids of the LLM's tokenizer.
        tell (`Callable`): Called in the batches' thread with what there is to tell.
    """

    prompt: list[int]
    tell: Callable[[Any], None]
    begun: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)  # answered, failed, or not wanted any more
    came: float = field(default_factory=time.monotonic, init=False)

    def fail(self, error: Exception) -> None:
        """Tells of an error, unless it has ended."""
        if not self.ended:
            self.ended = True
            self.tell(error)


@dataclass(eq=False)
class Encoding(Waiting):
    """A prompt to be encoded; tells its states, of shape `(prompt_length, slm_hidden_size)`, on the CPU."""


@dataclass
class Written:
    """Some more text of a response; with a `finish_reason` the last of it."""

    text: str
    finish_reason: str | None
    num_tokens: int  # of the whole response until now


@dataclass(eq=False)
class Response(Waiting):
    """A response to be written; tells [`Written`] as it comes if `streamed`, or else once."""

    text: ResponseText
    max_tokens: int
    sampling: Sampling
    streamed: bool = False
    generator: torch.Generator | None = field(default=None, init=False)

    def add(self, token: int, end_tokens: Sequence[int]) -> None:
        """Takes the next token."""
        if self.ended:
            return
        if token in end_tokens:
            self.text.ids.append(token)
            self.end("stop")
            return
        self.text.add(token)
        if self.text.stopped:
            self.end("stop")
        elif len(self.text.ids) >= self.max_tokens:
            self.end("length")
        elif self.streamed and (more := self.text.take()):
            self.tell(Written(more, None, len(self.text.ids)))

    def end(self, reason: str) -> None:
        """Tells the rest."""
        self.text.end()
        self.ended = True
        reason = "stop" if self.text.stopped else reason
        self.tell(Written(self.text.take(), reason, len(self.text.ids)))


# -------------------------------------------------------------------------------------- what `generate` is given along
class _Listener(StoppingCriteria):
    """Hands each response its tokens; those that have ended are done, and so are rows of no response."""

    def __init__(self, responses: list[Response], end_tokens: Sequence[int]):
        self.responses, self.end_tokens = responses, end_tokens

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.Tensor:
        done = torch.ones(len(input_ids), dtype=torch.bool)
        for i, (response, token) in enumerate(zip(self.responses, input_ids[:, -1].tolist(), strict=False)):
            response.add(token, self.end_tokens)
            done[i] = response.ended
        return done.to(input_ids.device)


class _Sampler(LogitsProcessor):
    """Makes the greatest score of each response that samples a draw of its own; leaves the others as they are."""

    def __init__(self, responses: list[Response]):
        self.rows = [i for i, response in enumerate(responses) if response.sampling.draws]
        self.sampled = [responses[i] for i in self.rows]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        settings = [response.sampling for response in self.sampled]
        of_rows = scores.new_tensor([[one.temperature, one.top_p] for one in settings])
        chosen = scores[self.rows].float() / of_rows[:, :1]  # (sampled, vocab_size)
        for row, one in zip(chosen, settings, strict=True):
            if 0 < one.top_k < len(row):
                row[row < row.topk(one.top_k).values[-1]] = -torch.inf
        if any(one.top_p < 1 for one in settings):
            ordered, order = chosen.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(dim=-1)
            left_out = probabilities.cumsum(dim=-1) - probabilities >= of_rows[:, 1:]
            left_out[:, 0] = False  # also where 32 bits make 0 of `top_p`
            chosen = torch.full_like(chosen, -torch.inf).scatter(1, order, ordered.masked_fill(left_out, -torch.inf))
        for i, one in enumerate(settings):
            for warper in one.warpers:
                chosen[i : i + 1] = warper(input_ids, chosen[i : i + 1])
        noise = torch.stack(
            [torch.empty_like(chosen[0]).exponential_(generator=response.generator) for response in self.sampled]
        )
        scores[self.rows] = (chosen.softmax(dim=-1) / noise.clamp(min=1e-30)).to(scores.dtype)
        return scores


# ------------------------------------------------------------------------------------------------------------- batches
class Batcher:
    r"""
    Answers prompts in batches, in a thread of its own. Its methods may be called from any thread.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): With its LLM loaded.
        max_batch_size (`int`): Prompts at a time.
        max_queue (`int`): Prompts that may wait.
        fast (`bool`):
            Whether few responses at a time are written by a compiled step (`generate(fast=True)`), once it is compiled
            in the background.
        on_batch (`Callable`, *optional*): Called with the prompts of each batch that begins.

    Raises:
        ValueError: if the checkpoint's generation config asks for what `generate` refuses.
    """

    def __init__(
        self,
        model: LLM2SLMForConditionalGeneration,
        max_batch_size: int,
        max_queue: int,
        fast: bool = False,
        on_batch: Callable[[Sequence[Waiting]], None] = lambda batch: None,
    ):
        self.model, self.max_batch_size, self.max_queue, self.on_batch = model, max_batch_size, max_queue, on_batch
        slm = model.config.slm_config
        # What a decoder-only SLM's prompt and response share.
        self.positions = None if slm.is_encoder_decoder else max_positions(slm.get_text_config())
        self.end_tokens = end_tokens(model)
        self.fast_rows: list[int] = []  # that are compiled
        self._queue: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._last_size = 1
        self._try_once()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()
        self._compiling: threading.Thread | None = None
        if fast:
            self._compiling = threading.Thread(target=self._compile, name="compiling", daemon=True)
            self._compiling.start()

    @property
    def alive(self) -> bool:
        """Whether prompts are answered."""
        return self._thread.is_alive() and not self._closing

    @property
    def compiling(self) -> bool:
        """Whether a step is being compiled: a process that ends by itself meanwhile is aborted by torch."""
        return self._compiling is not None and self._compiling.is_alive()

    @property
    def num_waiting(self) -> int:
        """Prompts that wait."""
        return len(self._queue)

    def submit(self, prompts: Sequence[Waiting]) -> None:
        """
        Lets prompts wait for their turn.

        Raises:
            QueueFull: if there is no room for all of them.
        """
        with self._changed:
            if self._closing or len(self._queue) + len(prompts) > self.max_queue:
                raise QueueFull
            self._queue.extend(prompts)
            self._changed.notify_all()

    def remove_ended(self) -> None:
        """Makes room: prompts that nobody waits for any more leave the queue."""
        with self._changed:
            self._queue = deque(waiting for waiting in self._queue if not waiting.ended)

    def close(self) -> None:
        """Answers what waits, and ends."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    @torch.no_grad()
    def _try_once(self) -> None:
        try:
            self._generate(*self._encode([[0, 1]]), max_new_tokens=1, eos_token_id=self.end_tokens or None)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The checkpoint cannot be served. What it writes with says: {error}") from error

    def _work(self) -> None:
        while batch := self._next_batch():
            self.on_batch(batch)
            self._answer(batch)

    def _next_batch(self) -> list[Waiting]:
        """The prompts that are answered next; none once it is closed and all is answered."""
        batch: list[Waiting] = []
        with self._changed:
            while not batch and (self._queue or not self._closing):
                while not self._queue and not self._closing:
                    self._changed.wait()
                more = True
                while more and len(self._queue) < self._last_size and not self._closing:
                    more = self._changed.wait(GATHER_SECONDS)
                others: list[Waiting] = []
                while self._queue and len(batch) < self.max_batch_size:
                    waiting = self._queue.popleft()
                    if not waiting.ended:
                        (batch if self._goes_with(batch, waiting) else others).append(waiting)
                self._queue.extendleft(reversed(others))
                self._last_size = max(len(batch), 1)
        return batch

    def _goes_with(self, batch: list[Waiting], waiting: Waiting) -> bool:
        """Whether it is of the batch's kind, and the longest prompt and the longest response still fit together."""
        if batch and type(waiting) is not type(batch[0]):
            return False
        together = [one for one in (*batch, waiting) if isinstance(one, Response)]
        if self.positions is None or len(together) < 2:
            return True
        longest = max(len(one.prompt) for one in together) + max(one.max_tokens for one in together)
        return longest <= self.positions

    def _answer(self, batch: Sequence[Waiting]) -> None:
        for waiting in batch:
            waiting.begun = True
        try:
            self._answer_together(batch)
        except Exception as error:
            failed = [waiting for waiting in batch if not waiting.ended]
            # What fails together may work alone: no prompt harms another. What has begun to write cannot begin again.
            alone = [one for one in failed if len(batch) > 1 and not (isinstance(one, Response) and one.text.ids)]
            if len(alone) < len(failed):
                logger.exception("A batch of %d failed.", len(batch))
            for waiting in failed:
                if waiting in alone:
                    self._answer([waiting])
                else:
                    waiting.fail(error)

    @torch.no_grad()
    def _answer_together(self, batch: Sequence[Waiting]) -> None:
        embeds, mask = self._encode([waiting.prompt for waiting in batch])
        responses = [waiting for waiting in batch if isinstance(waiting, Response)]
        if responses:
            self._write(responses, embeds, mask)
            return
        for waiting, states, tokens in zip(batch, embeds.float().cpu(), mask.bool().cpu(), strict=True):
            waiting.ended = True
            waiting.tell(states[tokens])

    def _encode(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of each prompt and their mask; equal prompts are read once."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        length = max(map(len, distinct))
        ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in distinct])
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in distinct])
        device = self.model.device
        encoding = self.model.encode_prompt(ids.to(device), mask.to(device))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        rows = [place[tuple(prompt)] for prompt in prompts]
        return encoding.prompt_embeds[rows], encoding.attention_mask[rows]

    def _write(self, responses: list[Response], embeds: torch.Tensor, mask: torch.Tensor) -> None:
        for response in responses:
            response.generator = torch.Generator(embeds.device)
            if response.sampling.seed is None:
                response.generator.seed()
            else:
                response.generator.manual_seed(response.sampling.seed)
        rows = next((size for size in self.fast_rows if size >= len(responses)), None)
        if rows is not None:  # rows of no response make up the number that is compiled
            own = [min(i, len(responses) - 1) for i in range(rows)]
            embeds, mask = embeds[own], mask[own]
        options: dict[str, Any] = {}
        if any(response.sampling.draws for response in responses):
            options["logits_processor"] = LogitsProcessorList([_Sampler(responses)])
        self._generate(
            embeds,
            mask,
            max_new_tokens=max(response.max_tokens for response in responses),
            stopping_criteria=StoppingCriteriaList([_Listener(responses, self.end_tokens)]),
            eos_token_id=self.end_tokens or None,
            fast=rows is not None,
            **options,
        )
        for response in responses:  # whatever else the checkpoint's generation config stops at
            if not response.ended:
                response.end("length")

    def _generate(self, embeds: torch.Tensor, mask: torch.Tensor, **options: Any) -> None:
        """One response to each prompt, the likeliest; whatever the checkpoint's generation config says of that."""
        self.model.generate(
            prompt_embeds=embeds,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            stop_strings=None,  # each response looks for its own
            **options,
        )

    def _compile(self) -> None:
        try:
            self._compile_steps()
        except Exception:
            logger.warning("Compiling failed: responses are written in the plain way.", exc_info=True)

    @torch.no_grad()
    def _compile_steps(self) -> None:
        """Makes the compiled steps. The first length is compiled for itself, the second for all longer ones."""
        lengths = [length for length in (2, 300) if not find_too_long(self.model.config, [(length, 2)])]
        for rows in FAST_ROWS:
            for length in lengths:
                if self._closing:
                    return
                embeds, mask = self._encode([[i % 2 for i in range(length)]] * rows)
                self._generate(embeds, mask, max_new_tokens=2, min_new_tokens=2, fast=True)
            if not is_compiled(self.model.slm, rows):
                return  # `generate` has said why, and wrote in the plain way
            self.fast_rows = [*self.fast_rows, rows]


__all__ = ["Batcher", "Encoding", "QueueFull", "Response", "Sampling", "Waiting", "Written"]
