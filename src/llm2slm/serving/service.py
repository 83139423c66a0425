"""From a request to prompts that wait, and to what there is to tell of them."""

import asyncio
import contextlib
import copy
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import EpsilonLogitsWarper, EtaLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper

from ..language_models import find_too_long, own_stop_strings, response_limit
from ..loading_llm2slm import max_positions
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..tokenization_llm2slm import LLM2SLMTokenizer
from .batching import Batcher, Encoding, QueueFull, Response, Sampling, Waiting
from .metrics import Metrics
from .requests import ChatRequest, GenerationRequest, Message, RequestError
from .response_text import ResponseText

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1
# What a generation config may say and a response cannot have for itself, with the value by which it says nothing.
UNSERVED: dict[str, Any] = {
    "dola_layers": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "penalty_alpha": 0,
    "prompt_lookup_num_tokens": None,
    "top_h": None,
    "watermarking_config": None,
}


@dataclass
class Limits:
    r"""
    What requests may take.

    Args:
        batch_size (`int`): Prompts that are answered at a time.
        queue (`int`): Prompts that may wait.
        prompt_tokens (`int`): Tokens of a prompt, by the LLM's tokenizer.
        tokens (`int`): Tokens of a response.
        body_bytes (`int`): Size of a request.
        seconds (`float`): Of a request, from its last byte to the last of its answer.
    """

    batch_size: int = 16
    queue: int = 256
    prompt_tokens: int = 2048
    tokens: int = 1024
    body_bytes: int = 2**20
    seconds: float = 300.0


class ClientLeft(RequestError):
    """Nobody reads the answer any more."""

    def __init__(self):
        super().__init__(499, "The client left.")


class Job:
    r"""
    The prompts of one request, seen from the event loop.

    Args:
        batcher ([`Batcher`]): Where they wait.
        seconds (`float`): After which they are given up.
    """

    def __init__(self, batcher: Batcher, seconds: float):
        self.batcher, self.loop = batcher, asyncio.get_running_loop()
        self.waiting: Sequence[Waiting] = []
        self._news: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._timer = self.loop.call_later(seconds, self._out_of_time)

    def teller(self, index: int) -> Callable[[Any], None]:
        """What the batches' thread calls with the news of the prompt at `index`."""

        def tell(news: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and with it the request
                self.loop.call_soon_threadsafe(self._news.put_nowait, (index, news))

        return tell

    def submit(self, waiting: Sequence[Waiting]) -> None:
        """
        Lets the prompts wait for their turn.

        Raises:
            RequestError: if there is no room for them.
        """
        self.waiting = waiting
        try:
            self.batcher.submit(waiting)
        except QueueFull:
            self.leave()
            raise RequestError(
                429, "Too many requests wait: try again later.", code="queue_full", retry_after=RETRY_SECONDS
            ) from None

    def leave(self) -> None:
        """Gives up what has not ended."""
        self._timer.cancel()
        unfinished = [one for one in self.waiting if not one.ended]
        for one in unfinished:
            one.ended = True
        if unfinished:
            self.batcher.remove_ended()

    def stop(self, error: RequestError) -> None:
        """Gives up, and lets `news` say why."""
        self.leave()
        self._news.put_nowait((0, error))

    def _out_of_time(self) -> None:
        if any(one.begun for one in self.waiting):
            self.stop(RequestError(504, "The answer took longer than it may.", code="timeout"))
        else:
            message = "The server is busy: try again later."
            self.stop(RequestError(503, message, code="timeout", retry_after=RETRY_SECONDS))

    async def news(self) -> AsyncIterator[tuple[int, Any]]:
        """
        What there is to tell, with the index of its prompt, until all have ended.

        Raises:
            RequestError: if the request ends without an answer.
        """
        unfinished = len(self.waiting)
        while unfinished:
            index, news = await self._news.get()
            if isinstance(news, RequestError):
                raise news
            if isinstance(news, Exception):
                logger.error("A request failed.", exc_info=news)
                raise RequestError(500, "The server could not answer this request.")
            unfinished -= getattr(news, "finish_reason", "encoded") is not None
            yield index, news


def check_served(config: GenerationConfig) -> None:
    """
    Checks that a checkpoint's generation config asks for nothing that would be left out, or hold for a whole batch.

    Raises:
        ValueError: if it does.
    """
    for name, off in UNSERVED.items():
        if (value := getattr(config, name, None)) not in (None, off):
            raise ValueError(
                f"The checkpoint's generation config has {name}={value!r}, which is not served: take it out of "
                "generation_config.json."
            )


def read_sampling(config: GenerationConfig, device: torch.device) -> Sampling:
    """How tokens are chosen by a generation config, as `generate` reads it: greedily if it does not sample."""
    if not config.do_sample:
        return Sampling()
    # What a config of Transformers 5 leaves open, `generate` fills in.
    said = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    sampling = Sampling(
        **({"temperature": 1.0, "top_k": 50} | {name: value for name, value in said.items() if value is not None})
    )
    if config.min_p is not None:
        sampling.warpers.append(MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1:
        sampling.warpers.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff is not None and 0 < config.epsilon_cutoff < 1:
        sampling.warpers.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff is not None and 0 < config.eta_cutoff < 1:
        sampling.warpers.append(EtaLogitsWarper(config.eta_cutoff, device=str(device)))
    return sampling


class Service:
    r"""
    Answers requests about one model.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): With its LLM loaded.
        tokenizer ([`LLM2SLMTokenizer`]): The checkpoint's.
        limits ([`Limits`], *optional*): What requests may take.
        fast (`bool`, *optional*, defaults to `False`): See [`~llm2slm.serving.batching.Batcher`].

    Raises:
        ValueError: if the checkpoint's generation config asks for what is not served.
    """

    def __init__(
        self,
        model: LLM2SLMForConditionalGeneration,
        tokenizer: LLM2SLMTokenizer,
        limits: Limits | None = None,
        fast: bool = False,
    ):
        self.model, self.tokenizer, self.limits = model, tokenizer, limits or Limits()
        llm, slm = model.config.llm_text_config, model.config.slm_config
        self.llm_vocab_size, self.slm_positions = llm.vocab_size, max_positions(slm.get_text_config())
        held = (self.limits.prompt_tokens, max_positions(llm), self.slm_positions)
        self.prompt_tokens = min(limit for limit in held if limit is not None)
        own = model.generation_config
        self.default_tokens = response_limit(own, slm.is_encoder_decoder)
        check_served(own)
        self.default_sampling = read_sampling(own, model.device)
        self.own_stop = own_stop_strings(own)
        self.metrics = Metrics(lambda: self.batcher.num_waiting, lambda: max(self.batcher.fast_rows, default=0))
        self.batcher = Batcher(model, self.limits.batch_size, self.limits.queue, fast, self.metrics.note_batch)

    # --------------------------------------------------------------------------------------------------------- prompts
    def tokenize(self, prompts: list[str | list[int]]) -> list[list[int]]:
        """
        The ids of prompts: texts are put into the checkpoint's prompt format, ids are taken as they are.

        Raises:
            RequestError: if there are too many, or one is empty, too long, or has ids that the LLM does not have.
        """
        self._check_number(len(prompts))
        return [
            self._checked(self._encode(prompt, "prompt") if isinstance(prompt, str) else prompt, "prompt")
            for prompt in prompts
        ]

    def tokenize_chat(self, messages: list[Message]) -> list[int]:
        """
        The ids of a chat. A checkpoint with a prompt format was trained on single prompts: it reads the last message
        in that format. Another reads the chat in its template or, without one, the last message as it is.

        Raises:
            RequestError: if the last message is not the user's, is empty, or the chat is too long.
        """
        if messages[-1].role != "user":
            raise RequestError(400, "The last message must be the user's.", "messages")
        ids = self._encode(messages[-1].content, "messages")
        if self.tokenizer.prompt_format is None and self.tokenizer.chat_template is not None:
            chat = [{"role": message.role, "content": message.content} for message in messages]
            try:
                text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template refuses, in a way of its own, what it does not know
                raise RequestError(400, f"The chat template refuses this: {error}", "messages") from error
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self._checked(ids, "messages")

    def _encode(self, text: str, param: str) -> list[int]:
        if not text.strip():
            raise RequestError(400, "The prompt is empty.", param)
        return self.tokenizer.encode(text)

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise RequestError(400, "The prompt is empty.", param)
        if min(ids) < 0 or max(ids) >= self.llm_vocab_size:
            raise RequestError(400, f"Token ids are those of the LLM, from 0 to {self.llm_vocab_size - 1}.", param)
        if len(ids) > self.prompt_tokens:
            message = f"The prompt has {len(ids)} tokens, and may have {self.prompt_tokens} at most."
            raise RequestError(400, message, param, "context_length_exceeded")
        return ids

    # ------------------------------------------------------------------------------------------------------- the model
    def write(self, asked: GenerationRequest, prompts: list[list[int]]) -> Job:
        """
        Begins the responses of a request, `n` to each prompt.

        Raises:
            RequestError: if they can never be written, or too many others wait.
        """
        n, streamed = asked.n or 1, bool(asked.stream)
        if n > self.limits.batch_size:
            raise RequestError(400, f"`n` may be {self.limits.batch_size} at most.", "n")
        self._check_number(n * len(prompts))
        lengths = [self._max_tokens(asked, prompt) for prompt in prompts]
        job = Job(self.batcher, self.limits.seconds)
        job.submit(
            [
                Response(
                    prompts[index // n],
                    job.teller(index),
                    ResponseText(self.tokenizer, [*asked.stop, *self.own_stop], streamed),
                    lengths[index // n],
                    self._sampling(asked, index % n),
                    streamed,
                )
                for index in range(n * len(prompts))
            ]
        )
        return job

    def encode(self, prompts: list[list[int]]) -> Job:
        """
        Begins to encode prompts.

        Raises:
            RequestError: if they are too long together, or too many others wait.
        """
        tokens, most = sum(map(len, prompts)), self.limits.batch_size * self.prompt_tokens
        if tokens > most:
            message = f"The prompts of one request have {tokens} tokens together, and may have {most} at most."
            raise RequestError(400, message, "prompt")
        job = Job(self.batcher, self.limits.seconds)
        job.submit([Encoding(prompt, job.teller(index)) for index, prompt in enumerate(prompts)])
        return job

    def _check_number(self, number: int) -> None:
        if number > self.limits.queue:
            raise RequestError(400, f"A request may ask for {self.limits.queue} answers at most.", "prompt")

    def _sampling(self, asked: GenerationRequest, index: int) -> Sampling:
        sampling = copy.copy(self.default_sampling)
        if asked.temperature is not None:
            sampling.temperature = asked.temperature
        if asked.top_p is not None:
            sampling.top_p = asked.top_p
        if asked.seed is not None:  # each of several responses has its own
            sampling.seed = (asked.seed + index) % 2**63
        return sampling

    def _max_tokens(self, asked: GenerationRequest, prompt: list[int]) -> int:
        wanted, param = asked.max_tokens, "max_tokens"
        if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
            wanted, param = asked.max_completion_tokens, "max_completion_tokens"
        if wanted is not None and wanted > self.limits.tokens:
            raise RequestError(400, f"`{param}` may be {self.limits.tokens} at most.", param)
        config = self.model.config
        tokens = min(self.default_tokens, self.limits.tokens) if wanted is None else wanted
        if wanted is None and self.slm_positions is not None:
            taken = 0 if config.slm_config.is_encoder_decoder else len(prompt)
            tokens = max(1, min(tokens, self.slm_positions - taken))
        if too_long := find_too_long(config, [(len(prompt), tokens)]):
            raise RequestError(
                400,
                f"A prompt of {len(prompt)} tokens and a response of {tokens} need {too_long[0].needed} positions; "
                f"{too_long[0].part} has {too_long[0].limit}.",
                param,
                "context_length_exceeded",
            )
        return tokens
