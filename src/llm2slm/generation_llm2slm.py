"""`generate`: the prompt is encoded and projected once, then the SLM writes.

Choices made here:
- `generate` hands `inputs_embeds` to `slm.generate`: each decoding mode, cache and streamer of Transformers is
  inherited, none is rewritten.
- What the arguments ask for, and which of them are refused, is in arguments_llm2slm.py.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import contextlib
import threading

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging

from .arguments_llm2slm import (
    count_from_the_response,
    read_arguments,
    refuse_what_cannot_be_had,
    stop_at_strings,
    take_beginning,
    without_start,
)
from .decoding_llm2slm import generate_fast
from .drafting_llm2slm import LosslessGenerationMixin
from .inputs_llm2slm import (
    PROMPT_AND_RESPONSE,
    check_positions,
    check_prompt_kwargs,
    check_response,
    given_once,
    longest_row,
    num_prompts,
)

logger = logging.get_logger(__name__)

# Transformers 4 keeps one static cache on the SLM for all calls, so they take turns.
STATIC_CACHE_TURN = threading.RLock() if hasattr(GenerationMixin, "_get_cache") else contextlib.nullcontext()
DEFAULT_NEW_TOKENS = 20  # what Transformers writes where no length is said


class LLM2SLMGenerationMixin(LosslessGenerationMixin):
    """Gives [`LLM2SLMForConditionalGeneration`] its `generate` and its lossless mode."""

    def _prepare_model_inputs(self, *args, **kwargs):
        # `generate` below has no use for it: only an LLM's `generate` with this model as its assistant comes here.
        raise ValueError(
            "An LLM-to-SLM model cannot be passed directly as `assistant_model`: it would take the text written so "
            "far for a new prompt and draft nonsense. To draft for its LLM, call `model.generate_lossless(..., "
            "llm=llm)` on it in place of `llm.generate(..., assistant_model=model)`."
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config=None,
        *,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_hidden_states: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        fast: bool = False,
        llm: PreTrainedModel | None = None,
        tolerance: float | None = None,
        ask_below: float | None = None,
        **kwargs,
    ):
        r"""
        Writes the response: encodes and projects the prompt exactly once, the SLM does the rest. Takes the arguments
        of [`~transformers.GenerationMixin.generate`]; docs/generation.md lists the few that are refused, and why.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*):
                Same as `input_ids`.
            input_ids, attention_mask, prompt_hidden_states:
                The prompt, as in `encode_prompt`.
            prompt_embeds (`torch.FloatTensor` of shape `(batch_size, prompt_length, slm_hidden_size)`, *optional*):
                An encoded prompt, from `encode_prompt`: many calls, one encode.
            fast (`bool`, *optional*, defaults to `False`):
                Greedy search, sampling and beam search with a compiled step of the SLM: the same tokens (in bfloat16,
                up to rounding) in a fraction of the time, on CPU for up to 8 responses or beams at a time (4 in
                bfloat16 where the CPU has matrix units for it). The first call takes some 20 seconds to compile (a few
                where the compiler's cache on disk serves), as does the first of more than one response or beam. It
                needs what `torch.compile` needs (on CPU a C++ compiler); what it cannot do is decoded in the plain
                way, with a note.
            llm (`PreTrainedModel`, *optional*):
                The LLM with its head and all its layers: the one that this model was trained behind, or that
                fine-tuned. It verifies what the SLM writes, as in `generate_lossless`, whose arguments are taken too.
                With a tolerance, `self.llm` encodes the prompt for the SLM if it is loaded; else `llm` does, in one
                run for both, but a fine-tuned one's states are not those that the SLM has learned to read.
            tolerance (`float`, *optional*, defaults to 0):
                With `llm`, how far the response may be from the LLM's own, from 0 to 1. A drafted token is kept if
                the LLM gives it at least `1 - tolerance` of its best token's probability; in sampling, no token that
                the LLM is asked about is more than `1 / (1 - tolerance)` times as likely as the LLM has it (Leviathan
                et al., 2023, appendix A.5). With 0 the response is the LLM's own, with 1 this model's, and the LLM
                reads the prompt only.
            ask_below (`float`, *optional*, defaults to `1 - tolerance`):
                With `llm`, when it is asked, from 0 to 1: about a draft with a token to which the SLM gave less than
                this probability. Other drafts are kept as they are. With 1 it is asked about each draft.
            kwargs:
                Further arguments. `decoder_input_ids` of shape `(batch_size, length)` are the beginning of the
                response, which is continued; with `labels`, as a trainer passes them, they are left out if they are
                of one shape. With `stop_strings` pass the `tokenizer`.

        Returns:
            The response's ids, of shape `(batch_size * num_return_sequences, response_length)`, or a `ModelOutput`,
            with what `decoder_input_ids` began. An encoder-decoder SLM's begin with its start token, as everywhere in
            Transformers, a decoder-only SLM's without. `max_length` and `max_new_tokens` both mean the response, the
            latter what is added to its beginning.

            With `llm`, the ids are those of the *LLM's* tokenizer, begin as the LLM's do, and the output is a
            [`LosslessOutput`] if `return_dict_in_generate=True`.

        Raises:
            ValueError: for an invalid prompt (see `encode_prompt`), an argument that is unknown or cannot be honoured,
                and if the model is used as the `assistant_model` of a decoder-only LLM. With `llm`, also for what
                `generate_lossless` raises it for, and for a `tolerance` or `ask_below` that is not from 0 to 1.
        """
        if llm is not None:
            if prompt_hidden_states is not None or prompt_embeds is not None:
                raise ValueError("With `llm`, that LLM reads the prompt: pass `input_ids`, not an encoded prompt.")
            check_prompt_kwargs(kwargs)
            dial = {"tolerance": tolerance, "ask_below": ask_below, "fast": fast}
            input_ids = given_once(inputs, input_ids)
            return self._generate_within_tolerance(llm, input_ids, attention_mask, generation_config, **dial, **kwargs)
        for name, value in (("tolerance", tolerance), ("ask_below", ask_below)):
            if value is not None:
                raise ValueError(f"`{name}` is about what an LLM verifies: pass the LLM with its head as `llm`.")
        # 1. What is asked for; what cannot be had is refused before the LLM runs.
        is_encoder_decoder = self.config.slm_config.is_encoder_decoder
        max_length = kwargs.get("max_length")
        generation_config, kwargs = read_arguments(self.generation_config, generation_config, kwargs)
        check_prompt_kwargs(kwargs)
        start_token = generation_config.decoder_start_token_id if is_encoder_decoder else None
        beginning = take_beginning(kwargs, start_token, self.config.vocab_size)
        # Stop strings are matched against the SLM's vocabulary; encoder-decoders of Transformers 4 take no tokenizer.
        own_loop = isinstance(kwargs.get("custom_generate"), str)  # a whole `generate`, which may want the tokenizer
        tokenizer = kwargs.get("tokenizer") if own_loop else kwargs.pop("tokenizer", None)
        if (strings := generation_config.stop_strings) is not None and not own_loop:
            if tokenizer is None:
                raise ValueError(f"`stop_strings={strings!r}` are found in text: pass the `tokenizer`, too.")
            generation_config.stop_strings = None
            tokenizer = getattr(tokenizer, "slm_tokenizer", tokenizer)
            kwargs["stopping_criteria"] = stop_at_strings(strings, tokenizer, kwargs.get("stopping_criteria"))
        refuse_what_cannot_be_had(generation_config, kwargs, self.slm, self.config.decoder_start_token_id)
        # 2. Prompt phase: the only place where the LLM runs.
        input_ids = given_once(inputs, input_ids)
        if beginning is not None:
            rows = num_prompts(prompt_embeds, prompt_hidden_states, input_ids)
            check_response("decoder_input_ids", beginning, rows)
        if is_encoder_decoder:
            length, new = generation_config.max_length or 0, generation_config.max_new_tokens
            if new is not None:
                length = new + (1 if beginning is None else beginning.shape[1])
            # The last token is not read.
            check_positions("SLM", self.config.slm_config.get_text_config(), length - 1, "response has")
        embeds, mask = self._prompt_for_slm(input_ids, attention_mask, prompt_hidden_states, prompt_embeds)
        # 3. The beginning of the response. A decoder-only SLM reads it behind the prompt.
        if is_encoder_decoder and beginning is not None:
            kwargs["decoder_input_ids"] = beginning.to(embeds.device)
        elif not is_encoder_decoder:
            num_begun = 0
            if beginning is not None:
                kwargs["input_ids"] = begun = without_start(beginning, self.config.decoder_start_token_id).to(
                    embeds.device
                )
                num_begun = begun.shape[1]
                begun_embeds = self.slm.get_input_embeddings()(begun).to(embeds.dtype)  # (batch, num_begun, hidden)
                embeds, mask = (
                    torch.cat([embeds, begun_embeds], dim=1),
                    nn.functional.pad(mask, (0, num_begun), value=1),
                )
            if embeds.shape[1] == 1:  # Transformers 4 would feed a prompt of one position again at each step
                mask, embeds = nn.functional.pad(mask, (1, 0)), nn.functional.pad(embeds, (0, 0, 1, 0))
            count_from_the_response(generation_config, kwargs, num_begun, max_length, embeds.device)
            length = longest_row(mask) + (generation_config.max_new_tokens or DEFAULT_NEW_TOKENS)
            check_positions("SLM", self.config.slm_config.get_text_config(), length, PROMPT_AND_RESPONSE)
        # 4. Decode: the SLM alone.
        if self.slm.device.type == "meta" and not is_encoder_decoder and beginning is None:
            # Offloaded: Transformers 4 would begin a response on the device where the parameters are not.
            kwargs["inputs"] = mask.new_zeros(len(mask), 0)
        with contextlib.nullcontext() if generation_config.cache_implementation is None else STATIC_CACHE_TURN:
            if fast:
                return generate_fast(self.slm, embeds, mask, generation_config, **kwargs)
            return self.slm.generate(
                inputs_embeds=embeds, attention_mask=mask, generation_config=generation_config, **kwargs
            )


__all__ = ["LLM2SLMGenerationMixin"]
