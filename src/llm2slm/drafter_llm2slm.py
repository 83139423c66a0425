"""The drafter of a response that an LLM verifies: the SLM behind an encoded prompt, in the LLM's ids.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils import logging

from .decoding_llm2slm import CompiledStep, why_not_compiled
from .inputs_llm2slm import CACHE, PROMPT_AND_RESPONSE, check_positions
from .loading_llm2slm import max_positions

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Dial:
    """Which drafts the LLM is asked about, which of their tokens stand, how long they get and how they are written."""

    tolerance: float
    ask_below: float
    max_draft_tokens: int = 16
    draft_confidence: float = 0.25
    fast: bool = False

    @property
    def never_asks(self) -> bool:
        """The LLM is not run behind the prompt."""
        return self.tolerance == 1

    def is_unsure(self, probability: float) -> bool:
        """Whether the LLM is asked about a token to which the SLM gives this probability."""
        return self.ask_below >= 1 or probability < self.ask_below

    def is_exact(self, do_sample: bool) -> bool:
        """Whether the response is the LLM's own greedy one."""
        return self.tolerance == 0 and self.ask_below >= 1 and not do_sample


@dataclass
class Draft:
    """Tokens that the SLM proposes, in the LLM's ids."""

    tokens: list[int] = field(default_factory=list)
    unsure: bool = False  # about one of them, so that the LLM is asked
    distributions: list[torch.Tensor] = field(default_factory=list)  # what each was drawn from, in sampling


class _PlainSteps:
    """The SLM behind a prompt, in the plain way."""

    def __init__(self, model, prompt_embeds):
        self.slm, self.embed, self.prompt_embeds = model.slm, model._embed_with_slm, prompt_embeds
        self.is_encoder_decoder = self.slm.config.is_encoder_decoder
        self.fewer_logits = "logits_to_keep" in inspect.signature(self.slm.forward).parameters
        self.cache: Any = DynamicCache()
        if self.is_encoder_decoder:
            self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            self.encoder_outputs = self.slm.get_encoder()(inputs_embeds=prompt_embeds, return_dict=True)
            self.start_token = model.config.decoder_start_token_id

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(vocab_size,)` behind further tokens of shape `(1, length)`; -1 is one that it lacks."""
        first = self.cache.get_seq_length() == 0
        arguments = {CACHE: self.cache, "use_cache": True, "return_dict": True}
        if self.is_encoder_decoder:
            ids = _lacking_as_padding(self.slm, ids)
            if first:
                ids = torch.cat([ids.new_tensor([[self.start_token]]), ids], dim=1)
            output = self.slm(encoder_outputs=self.encoder_outputs, decoder_input_ids=ids, **arguments)
        else:
            embeds = self.embed(ids).to(self.prompt_embeds.dtype)
            if first:
                embeds = torch.cat([self.prompt_embeds, embeds], dim=1)
            if self.fewer_logits:
                arguments["logits_to_keep"] = 1
            output = self.slm(inputs_embeds=embeds, **arguments)
        return output.logits[0, -1]

    def take_back(self, number: int) -> None:
        """Forgets the last tokens read."""
        self.cache.crop(-number)

    def end(self) -> None:
        """Nothing is kept for the next response."""


class _CompiledSteps:
    """The SLM behind a prompt, with its step compiled: one token after another."""

    def __init__(self, model, prompt_embeds):
        self.slm, self.embed = model.slm, model._embed_with_slm
        self.is_encoder_decoder = self.slm.config.is_encoder_decoder
        mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=prompt_embeds.device)
        ids, prompt = mask.new_zeros(1, 0), {"inputs_embeds": prompt_embeds, "attention_mask": mask}
        if self.is_encoder_decoder:
            encoder_outputs = self.slm.get_encoder()(inputs_embeds=prompt_embeds, return_dict=True)
            ids = mask.new_tensor([[model.config.decoder_start_token_id]])
            prompt = {"encoder_outputs": encoder_outputs, "attention_mask": mask}
        elif "logits_to_keep" in inspect.signature(self.slm.forward).parameters:
            prompt["logits_to_keep"] = 1
        self.step = CompiledStep(self.slm, ids, prompt, rows_per_prompt=1)
        self.of_prompt = self.step.read_prompt()

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """As [`_PlainSteps.read`]."""
        if self.is_encoder_decoder:
            ids = _lacking_as_padding(self.slm, ids)
        logits = self.of_prompt
        for token in ids[0].tolist():
            one = ids.new_tensor([[token]])
            logits = self.step.write(one) if token >= 0 else self.step.write_embeds(self.embed(one))
        return logits[0, -1]

    def take_back(self, number: int) -> None:
        """Forgets the last tokens read."""
        self.step.take_back(number)

    def end(self) -> None:
        """Leaves the cache to the next response."""
        self.step.end()


def _lacking_as_padding(slm, ids):
    """An encoder-decoder reads a token that it lacks as padding."""
    return ids.masked_fill(ids < 0, slm.config.pad_token_id or 0)


def _start_steps(model, prompt_embeds, fast: bool) -> _PlainSteps | _CompiledSteps:
    if fast:
        reason = why_not_compiled(model.slm)
        if reason is None:
            return _CompiledSteps(model, prompt_embeds)
        logger.warning_once(f"`fast=True` does not go with {reason}: drafting in the plain way.")
    return _PlainSteps(model, prompt_embeds)


class Drafter:
    """The SLM with an encoded prompt and a cache: it continues a response, in the LLM's ids."""

    def __init__(self, model, prompt_embeds, dial: Dial):
        self.dial = dial
        self.steps = _start_steps(model, prompt_embeds, dial.fast)
        self.is_encoder_decoder = model.slm.config.is_encoder_decoder
        self.context_length = 1 if self.is_encoder_decoder else prompt_embeds.shape[1]
        self.read: list[int] = []  # the response's tokens that the steps have read
        self.device = prompt_embeds.device
        self.text_config = model.slm.config.get_text_config(decoder=True)
        positions = max_positions(self.text_config)
        self.max_response_length = None if positions is None else positions - self.context_length
        # The SLM's id of each of the LLM's, and back; -1 for none.
        self.slm_ids = model.prompt_token_map
        self.llm_vocab_size = model.config.llm_text_config.vocab_size
        if self.slm_ids is not None:
            known = (self.slm_ids >= 0).nonzero().flatten()
            self.llm_ids = self.slm_ids.new_full((model.config.vocab_size,), -1).long()
            self.llm_ids[self.slm_ids[known].long()] = known

    def check_room(self, length: int) -> None:
        """Raises a `ValueError` if the SLM has not the positions for a response of `length` tokens."""
        what = "response has" if self.is_encoder_decoder else PROMPT_AND_RESPONSE
        check_positions("SLM", self.text_config, self.context_length + length, what)

    def draft(
        self,
        response: list[int],
        limit: int,
        ends: set[int],
        process: Callable | None = None,
        do_sample: bool = False,
    ) -> Draft:
        """Continues `response`, which has grown since the last call, by at most `limit` tokens."""
        if self.max_response_length is not None:
            limit = min(limit, self.max_response_length - len(response))
        draft = Draft()
        if limit <= 0:
            return draft
        same, most = 0, min(len(self.read), len(response) - 1)  # the last token is read, maybe again, for its logits
        while same < most and self.read[same] == response[same]:
            same += 1
        if same < len(self.read):
            self.steps.take_back(len(self.read) - same)
        self.read = self.read[:same]
        unread, probability = response[same:], 1.0
        token: int | None
        while len(draft.tokens) < limit:
            logits = self._next_token_logits(unread).float()
            if process is not None:
                scores = process(self._over_the_llms_tokens(logits), draft.tokens)
                if torch.isneginf(scores).all():  # the SLM has no token that is allowed: the LLM is asked
                    break
                distribution = scores.softmax(dim=-1)
                choice = torch.multinomial(distribution, num_samples=1) if do_sample else distribution.argmax()
                token, chance = int(choice), float(distribution[choice])
                if do_sample:
                    draft.distributions.append(distribution)
            else:
                if self.dial.never_asks:  # there is no one else to write
                    logits = self._without_tokens_the_llm_lacks(logits)
                top = logits.softmax(dim=-1).max(dim=-1)
                token, chance = self._llm_id(int(top.indices)), float(top.values)
                if token is None:
                    break
            draft.tokens.append(token)  # sure or not: the step is paid for, and to verify one more costs little
            unread = [token]
            if self.dial.is_unsure(chance):
                draft.unsure = True
                probability *= chance
            if probability < self.dial.draft_confidence or token in ends:
                break
        return draft

    def end(self) -> None:
        """Leaves what the steps have taken."""
        self.steps.end()

    def _next_token_logits(self, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens], dtype=torch.long, device=self.device)
        if self.slm_ids is not None:
            ids = self.slm_ids.to(ids.device)[ids].long()
        self.read += tokens
        return self.steps.read(ids)

    def _without_tokens_the_llm_lacks(self, logits: torch.Tensor) -> torch.Tensor:
        if self.slm_ids is None:
            return logits[: self.llm_vocab_size]
        return logits.masked_fill(self.llm_ids.to(logits.device) < 0, -torch.inf)

    def _over_the_llms_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(llm_vocab_size,)`: minus infinity for tokens that the SLM lacks."""
        scores = logits.new_full((self.llm_vocab_size,), -torch.inf)
        if self.slm_ids is None:
            known = logits[: self.llm_vocab_size]
            scores[: len(known)] = known
            return scores
        llm_ids = self.llm_ids.to(logits.device)
        scores[llm_ids[llm_ids >= 0]] = logits[llm_ids >= 0]
        return scores

    def _llm_id(self, token: int) -> int | None:
        """The LLM's id of a token of the SLM, `None` if the LLM has no such token."""
        if self.slm_ids is None:
            return token if token < self.llm_vocab_size else None
        llm_token = int(self.llm_ids[token])
        return llm_token if llm_token >= 0 else None
