"""Lossless mode: the LLM's own greedy response, token for token. LLM-to-SLM drafts it, the LLM verifies the draft.

Choices made here:
- The prompt is encoded once for both. The LLM's run over it fills the cache that verification reads, and the states of
  its layers that the projector reads are kept. Transformers' assisted generation passes no states to a drafter.
- `llm.generate` prepares the call (lengths, logits processors, stopping criteria, the encoder's run) and hands over to
  the loop here, its `custom_generate`. Each token is processed and checked for stopping by itself, as without drafts.
- Drafter and LLM keep caches of their own, which hold what is verified and are cropped after each rejected draft.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import contextlib
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .arguments_llm2slm import stop_at_strings
from .inputs_llm2slm import check_prompt_ids, given_once
from .layers_llm2slm import LayerStates
from .loading_llm2slm import check_same_architecture, max_positions


@dataclass
class LosslessOutput(ModelOutput):
    """
    What the LLM would have written by itself, and what it took.

    Args:
        sequences (`torch.LongTensor` of shape `(1, response_length)`):
            The response's ids of the *LLM's* tokenizer, without the prompt. An encoder-decoder LLM's begin with its
            start token, as everywhere in Transformers.
        llm_calls (`int`):
            How often the LLM ran, the prompt's run included (for an encoder-decoder LLM, its encoder's).
        draft_tokens (`int`):
            How many tokens were drafted.
        accepted_tokens (`int`):
            How many of them are in the response.
        acceptance_rate (`float`):
            `accepted_tokens / draft_tokens`; 0 if nothing was drafted.
    """

    sequences: Any = None
    llm_calls: int | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    acceptance_rate: float | None = None


class LosslessGenerationMixin(GenerationMixin):
    """Gives [`LLM2SLMForConditionalGeneration`] its lossless mode."""

    @torch.no_grad()
    def generate_lossless(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        llm: PreTrainedModel,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        max_draft_tokens: int = 16,
        draft_confidence: float = 0.25,
        **kwargs,
    ) -> LosslessOutput:
        r"""
        Writes what `llm.generate(do_sample=False)` writes, token for token, in fewer runs of the LLM: the SLM drafts
        some tokens, and one run of the LLM verifies all of them. The LLM encodes the prompt once, for both.

        Tokens are the same up to ties: a run over several positions rounds differently than one over a single
        position, so where two tokens score the same to the last bit of the dtype, the other one may be chosen. Of
        SmolLM2-135M's responses to 200 real prompts none changed in float32, and 55 in bfloat16, which tells scores
        apart by a hundredth only (results/simplify).

        Args:
            inputs (`torch.LongTensor` of shape `(1, prompt_length)`, *optional*):
                Same as `input_ids`.
            generation_config (`GenerationConfig`, *optional*):
                As in `llm.generate`; defaults are those of `llm.generation_config`.
            llm (`PreTrainedModel`):
                The LLM with its head and all its layers, which this model was built on. It also encodes the prompt,
                so `self.llm` is not used and need not be loaded (`from_pretrained(..., load_llm=False)`).
            input_ids (`torch.LongTensor` of shape `(1, prompt_length)`, *optional*):
                Prompt ids of the LLM's tokenizer.
            attention_mask (`torch.Tensor` of shape `(1, prompt_length)`, *optional*):
                1 for tokens, 0 for padding on either side. All ones if omitted.
            max_draft_tokens (`int`, *optional*, defaults to 16):
                How many tokens the SLM drafts at most before the LLM verifies them.
            draft_confidence (`float`, *optional*, defaults to 0.25):
                The SLM drafts on while the probability it gives to the whole draft is at least this. A further token
                is of use only if the whole draft before it is right, so the best value is about what a step of the
                SLM costs in runs of the LLM.
            kwargs:
                Further arguments of `llm.generate`: `max_new_tokens`, `stopping_criteria`, `streamer`, ... As in
                `generate`, `max_length` means the response. With `stop_strings` pass the `tokenizer`.

        Returns:
            [`LosslessOutput`] with `sequences`, `acceptance_rate` and `llm_calls`.

        Raises:
            ValueError: for more than one prompt, sampling or beams; if `llm` has no head or is another LLM than this
                model was built on; if its tokenizer and the SLM's are not the same or the same trimmed
                (`config.shared_tokenizer`); if one of the two models cannot take tokens back; and for an invalid
                prompt (see `encode_prompt`).
        """
        self._check_lossless(llm, max_draft_tokens, draft_confidence)
        input_ids, attention_mask = check_prompt_ids(self.config, given_once(inputs, input_ids), attention_mask)
        if input_ids.shape[0] != 1:
            raise ValueError(f"Lossless mode takes one prompt at a time, got a batch of {input_ids.shape[0]}.")
        prompt_ids = input_ids[attention_mask.to(input_ids.device) != 0][None].to(llm.device)  # without padding
        arguments = _generate_arguments(generation_config, kwargs)
        if not llm.config.is_encoder_decoder:  # its `generate` counts the prompt
            for name in ("max_length", "min_length"):
                if arguments.get(name) is not None:
                    arguments[name] += prompt_ids.shape[1]
        reading = LayerStates(
            self._prompt_part(llm), self.config.prompt_layers, self.config.llm_text_config.num_hidden_layers, whole=llm
        )

        def start_drafter():
            return _Drafter(self, self.encode_prompt(prompt_ids, None, reading.states()).prompt_embeds)

        decode = functools.partial(
            _draft_and_verify,
            start_drafter=start_drafter,
            max_draft_tokens=max_draft_tokens,
            draft_confidence=draft_confidence,
            streamer=arguments.get("streamer"),
        )
        mask = torch.ones_like(prompt_ids)
        return reading.model.generate(prompt_ids, attention_mask=mask, custom_generate=decode, **arguments)

    def _check_lossless(self, llm, max_draft_tokens, draft_confidence):
        if not isinstance(llm, PreTrainedModel) or not llm.can_generate():
            raise ValueError(
                "`llm` must be the LLM with its head, as `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` loads it, "
                f"got {type(llm).__name__}."
            )
        check_same_architecture(llm.config, self.config.llm_config, llm.name_or_path or type(llm).__name__)
        if not self.config.shared_tokenizer:
            raise ValueError(
                "Lossless mode needs an SLM that writes the LLM's tokens, with the LLM's tokenizer or that trimmed: "
                "`config.shared_tokenizer` must be True, got False."
            )
        for name, model in (("LLM", llm), ("SLM", self.slm)):
            if model._is_stateful:
                raise ValueError(
                    f"Lossless mode takes back rejected tokens, but the {name} ({model.config.model_type}) keeps a "
                    "state from which none can be removed."
                )
        if isinstance(max_draft_tokens, bool) or not isinstance(max_draft_tokens, int) or max_draft_tokens < 1:
            raise ValueError(f"`max_draft_tokens` must be a positive integer, got {max_draft_tokens!r}.")
        if not 0 <= draft_confidence <= 1:
            raise ValueError(f"`draft_confidence` must be from 0 to 1, got {draft_confidence!r}.")


# What the caller cannot ask for, and the value it has: no other way of decoding, and nothing in the output but ids and
# counts.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "assistant_model": None,
    "assistant_early_exit": None,
    "assistant_ensemble_weight": None,
    "is_assistant": False,
    "prompt_lookup_num_tokens": None,
    "speculation_type": None,
    "use_mtp": False,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
# What a loop with a cache of its own has no place for.
_OWN_LOOP: dict[str, Any] = {
    "cache_implementation": None,
    "cache_config": None,
    "max_cache_len": None,
    "return_legacy_cache": None,
    "prefill_chunk_size": None,
    "token_healing": False,
    "compile_config": None,
    "continuous_batching_config": None,
}
_CALL = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)


def _generate_arguments(generation_config, kwargs) -> dict[str, Any]:
    """What `llm.generate` is called with, from what the caller asked for."""
    arguments = {} if generation_config is None else generation_config.to_diff_dict()
    arguments.pop("transformers_version", None)
    arguments |= kwargs
    known = {*vars(GenerationConfig()), *_GREEDY, *_OWN_LOOP, *_CALL}
    if unknown := sorted(set(arguments) - known):
        raise TypeError(f"`generate_lossless` got unexpected arguments: {unknown}.")
    if asked := _other_than(_GREEDY, arguments):
        raise ValueError(
            f"Lossless mode writes the LLM's greedy response, one, and returns its ids and counts; got {asked}."
        )
    if asked := _other_than(_OWN_LOOP, arguments):
        raise ValueError(
            f"Lossless mode reads the prompt as it is and has a loop and a cache of its own, got {asked}."
        )
    tokenizer = arguments.pop("tokenizer", None)
    if arguments.get("stop_strings") is not None and tokenizer is not None:
        tokenizer = getattr(tokenizer, "llm_tokenizer", tokenizer)
        strings = arguments.pop("stop_strings")
        arguments["stopping_criteria"] = stop_at_strings(strings, tokenizer, arguments.get("stopping_criteria"))
    arguments = {name: value for name, value in arguments.items() if name not in _GREEDY | _OWN_LOOP}
    arguments |= {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    # The loop below has a cache of its own, which can be cropped whatever the LLM's windows are.
    return arguments | {"use_cache": False, "cache_implementation": None}


def _other_than(values, arguments) -> str:
    """Those of `arguments` that are neither `None` nor what `values` says."""
    asked = {name: arguments[name] for name, value in values.items() if arguments.get(name) not in (None, value)}
    return ", ".join(f"{name}={value!r}" for name, value in asked.items())


def _draft_and_verify(
    llm,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    start_drafter,
    max_draft_tokens,
    draft_confidence,
    streamer=None,
    encoder_outputs=None,
    **kwargs,
) -> LosslessOutput:
    """The decoding loop, in place of the one that `llm.generate` would run."""
    is_encoder_decoder = llm.config.is_encoder_decoder
    response_start = 1 if is_encoder_decoder else input_ids.shape[1]
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if is_encoder_decoder else DynamicCache()
    fewer_logits = "logits_to_keep" in inspect.signature(llm.forward).parameters
    ends = generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}

    # Asked of each function that the LLM calls, so only where it can help.
    in_float32_on_a_cpu = llm.device.type == "cpu" and llm.dtype == torch.float32
    faster_linear = _FewRows() if in_float32_on_a_cpu else contextlib.nullcontext()

    llm_calls = 1 if is_encoder_decoder else 0  # the encoder's
    draft_tokens = accepted_tokens = 0
    # An encoder has read the prompt; a decoder-only LLM does so in its first run.
    drafter = start_drafter() if is_encoder_decoder else None
    unread, finished = input_ids, False
    while not finished:
        # 1. Draft.
        draft = []
        if drafter is not None:
            room = generation_config.max_length - input_ids.shape[1] - 1
            response = input_ids[0, response_start:].tolist()
            draft = drafter.draft(response, min(max_draft_tokens, room), draft_confidence, ends)
        # 2. Verify: one run over what the LLM has not read yet and the draft.
        new_ids = torch.cat([unread, unread.new_tensor([draft])], dim=1)
        arguments = {"past_key_values": cache, "use_cache": True, "return_dict": True}
        if fewer_logits:
            arguments["logits_to_keep"] = len(draft) + 1
        if is_encoder_decoder:
            arguments |= {"encoder_outputs": encoder_outputs, "decoder_input_ids": new_ids}
        else:
            arguments["input_ids"] = new_ids
        with faster_linear:
            output = llm(**arguments)
        if drafter is None:  # at once: guidance has the LLM read another prompt, too
            drafter = start_drafter()
        logits = output.logits[0, -len(draft) - 1 :].to(input_ids.device, torch.float32)
        # 3. Write the LLM's tokens, as far as the draft agrees with them and one further.
        matches = 0
        for position in range(len(draft) + 1):
            scores = logits_processor(input_ids, logits[position][None])
            token = scores.argmax(dim=-1)
            input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
            if streamer is not None:
                streamer.put(token.cpu())
            finished = bool(stopping_criteria(input_ids, None).all())
            matched = position < len(draft) and draft[position] == token.item()
            matches += matched
            if finished or not matched:
                break
        # 4. Forget what was rejected; the last token written is read next.
        rejected = len(draft) - position
        if rejected > 0:
            cache.crop(-rejected)
        unread = input_ids[:, -1:]
        llm_calls, draft_tokens, accepted_tokens = llm_calls + 1, draft_tokens + len(draft), accepted_tokens + matches
    if streamer is not None:
        streamer.end()
    return LosslessOutput(
        sequences=input_ids if is_encoder_decoder else input_ids[:, response_start:],
        llm_calls=llm_calls,
        draft_tokens=draft_tokens,
        accepted_tokens=accepted_tokens,
        acceptance_rate=accepted_tokens / max(draft_tokens, 1),
    )


class _FewRows(TorchFunctionMode):
    """
    Has linear layers read a few rows at once in less time: in float32 on a CPU, the product from the left, W @ x.T,
    takes hardly longer for a few rows than for one, unlike `linear`.
    """

    ROWS = range(2, 9)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs and args[0].device.type == "cpu" and args[0].dtype == torch.float32:
            inputs, weight, *bias = args
            dense = type(weight) in (torch.Tensor, torch.nn.Parameter)  # not one of a quantization library
            if dense and inputs.numel() // inputs.shape[-1] in self.ROWS:
                output = torch.mm(weight, inputs.reshape(-1, inputs.shape[-1]).t()).t().contiguous()
                output = output.view(*inputs.shape[:-1], -1)
                return output if not bias or bias[0] is None else output + bias[0]
        return function(*args, **(kwargs or {}))


class _Drafter:
    """The SLM with an encoded prompt and a cache: it continues a response greedily, in the LLM's ids."""

    def __init__(self, model, prompt_embeds):
        self.slm, self.embed, self.prompt_embeds = model.slm, model._embed_with_slm, prompt_embeds
        self.is_encoder_decoder = self.slm.config.is_encoder_decoder
        self.fewer_logits = "logits_to_keep" in inspect.signature(self.slm.forward).parameters
        self.read: list[int] = []  # the response's tokens in the cache
        if self.is_encoder_decoder:
            self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            self.encoder_outputs = self.slm.get_encoder()(inputs_embeds=prompt_embeds, return_dict=True)
            self.start_token, context_length = model.config.decoder_start_token_id, 1
        else:
            self.cache = DynamicCache()
            context_length = prompt_embeds.shape[1]
        positions = max_positions(self.slm.config.get_text_config(decoder=True))
        self.max_response_length = None if positions is None else positions - context_length
        # The SLM's id of each of the LLM's, and back; -1 for none.
        self.slm_ids = model.prompt_token_map
        self.llm_vocab_size = model.config.llm_text_config.vocab_size
        if self.slm_ids is not None:
            known = (self.slm_ids >= 0).nonzero().flatten()
            self.llm_ids = self.slm_ids.new_full((model.config.vocab_size,), -1).long()
            self.llm_ids[self.slm_ids[known].long()] = known

    def draft(self, response: list[int], limit: int, confidence: float, ends: set[int]) -> list[int]:
        """Continues `response`, which has grown since the last call, by at most `limit` tokens."""
        if self.max_response_length is not None:
            limit = min(limit, self.max_response_length - len(response))
        if limit <= 0:
            return []
        same = 0
        while same < len(self.read) and self.read[same] == response[same]:
            same += 1
        if same < len(self.read):
            self.cache.crop(same - len(self.read))
        self.read = self.read[:same]
        draft: list[int] = []
        unread, probability = response[same:], 1.0
        while len(draft) < limit:
            top = self._next_token_logits(unread).float().softmax(dim=-1).max(dim=-1)
            probability *= float(top.values)
            token = self._llm_id(int(top.indices))
            if token is None:
                break
            draft.append(token)  # sure or not: the step is paid for, and to verify one token more costs little
            unread = [token]
            if probability < confidence or token in ends:
                break
        return draft

    def _next_token_logits(self, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens], dtype=torch.long, device=self.prompt_embeds.device)
        if self.slm_ids is not None:
            ids = self.slm_ids.to(ids.device)[ids].long()
        first = self.cache.get_seq_length() == 0
        arguments = {"past_key_values": self.cache, "use_cache": True, "return_dict": True}
        if self.is_encoder_decoder:
            # A token that the SLM lacks is read as padding.
            ids = ids.masked_fill(ids < 0, self.slm.config.pad_token_id or 0)
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
        self.read += tokens
        return output.logits[0, -1]

    def _llm_id(self, token: int) -> int | None:
        """The LLM's id of a token of the SLM, `None` if the LLM has no such token."""
        if self.slm_ids is None:
            return token if token < self.llm_vocab_size else None
        llm_token = int(self.llm_ids[token])
        return llm_token if llm_token >= 0 else None


__all__ = ["LosslessGenerationMixin", "LosslessOutput"]
