"""Responses that LLM-to-SLM drafts and the LLM verifies: the LLM's own, token for token, or one within a tolerance.

Choices made here:
- What stands is decided by lenience, the `l = 1 - tolerance` of Leviathan et al. (2023, arXiv 2211.17192, appendix
  A.5). Greedily, a drafted token is kept if the LLM gives it at least `l` times the probability of its best token. In
  sampling, one drawn from q is kept with probability min(1, p / (l * q)), else drawn anew from what p has more than q:
  with `l = 1` that is speculative sampling, whose tokens are distributed as the LLM's.
- The prompt is encoded once for both. The LLM's run over it fills the cache that verification reads, and the states of
  its layers that the projector reads are kept. Transformers' assisted generation passes no states to a drafter.
- `llm.generate` prepares the call (lengths, logits processors, stopping criteria, the encoder's run) and hands over to
  the loop here, its `custom_generate`. Each token is processed and checked for stopping by itself, as without drafts.
- Drafter (drafter_llm2slm.py) and LLM keep caches of their own, which hold what is verified and lose what is rejected.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import contextlib
import functools
import inspect
import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import SynthIDTextWatermarkingConfig
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .arguments_llm2slm import stop_at_strings
from .drafter_llm2slm import Dial, Draft, Drafter
from .few_rows_llm2slm import EagerFewRows
from .inputs_llm2slm import CACHE, check_prompt_ids, given_once
from .layers_llm2slm import LayerStates, truncate
from .loading_llm2slm import check_same_architecture, compute_device

logger = logging.get_logger(__name__)


@dataclass
class LosslessOutput(ModelOutput):
    """
    What the LLM would have written by itself, or a response within its tolerance, and what it took.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, response_length)`):
            The responses' ids of the *LLM's* tokenizer, without the prompts, padded on the right. An encoder-decoder
            LLM's begin with its start token, as everywhere in Transformers.
        llm_calls (`int`):
            How often the LLM ran, the prompt's run included (for an encoder-decoder LLM, its encoder's). This and the
            other counts are of all prompts together.
        draft_tokens (`int`):
            How many tokens were drafted.
        accepted_tokens (`int`):
            How many of them are in the responses.
        acceptance_rate (`float`):
            `accepted_tokens / draft_tokens`, the share that was kept; 0 if nothing was drafted.
        unasked_tokens (`int`):
            How many of the accepted tokens the LLM was not asked about.
    """

    sequences: Any = None
    llm_calls: int | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    acceptance_rate: float | None = None
    unasked_tokens: int | None = None


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
        max_draft_tokens: int = Dial.max_draft_tokens,
        draft_confidence: float = Dial.draft_confidence,
        fast: bool = False,
        **kwargs,
    ) -> LosslessOutput:
        r"""
        Writes what `llm.generate(do_sample=False)` writes, token for token, in fewer runs of the LLM: the SLM drafts
        some tokens, and one run of the LLM verifies all of them. The LLM encodes the prompt once, for both. With
        `do_sample=True` tokens are distributed as those of `llm.generate(do_sample=True)`.

        Tokens are the same up to ties: a run over several positions rounds differently than one over a single
        position, so where two tokens score the same to the last bit of the dtype, the other one may be chosen. Of
        SmolLM2-135M's responses to 200 real prompts none changed in float32, and 55 in bfloat16, which tells scores
        apart by a hundredth only (results/simplify).

        Several prompts are answered one after another. Each takes as long as by itself, and has its own `max_time`;
        logits processors and stopping criteria see one response at a time, without padding.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*):
                Same as `input_ids`.
            generation_config (`GenerationConfig`, *optional*):
                As in `llm.generate`; defaults are those of `llm.generation_config`, but it samples only if asked to.
            llm (`PreTrainedModel`):
                The LLM with its head and all its layers, which this model was built on. It also encodes the prompt,
                so `self.llm` is not used and need not be loaded (`from_pretrained(..., load_llm=False)`).
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*):
                Prompt ids of the LLM's tokenizer.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*):
                1 for tokens, 0 for padding on either side. All ones if omitted.
            max_draft_tokens (`int`, *optional*, defaults to 16):
                How many tokens the SLM drafts at most before the LLM verifies them.
            draft_confidence (`float`, *optional*, defaults to 0.25):
                The SLM drafts on while the probability it gives to the whole draft is at least this. A further token
                is of use only if the whole draft before it is right, so the best value is about what a step of the
                SLM costs in runs of the LLM.
            fast (`bool`, *optional*, defaults to `False`):
                Drafts with a compiled step of the SLM, as `generate(..., fast=True)` does.
            kwargs:
                Further arguments of `llm.generate`: `max_new_tokens`, `stopping_criteria`, `streamer`, ... As in
                `generate`, `max_length` means the response. With `stop_strings` pass the `tokenizer`. In sampling,
                logits processors are called on what is drafted, too.

        Returns:
            [`LosslessOutput`] with `sequences`, `acceptance_rate` and `llm_calls`.

        Raises:
            ValueError: for beams, or a streamer of several prompts; if `llm` has no head or is another LLM than this
                model was built on; if its tokenizer and the SLM's are not the same or the same trimmed
                (`config.shared_tokenizer`); if one of the two models cannot take tokens back; and for an invalid
                prompt (see `encode_prompt`).
        """
        dial = Dial(0.0, 1.0, max_draft_tokens, draft_confidence, fast)
        prompt = {"input_ids": given_once(inputs, input_ids), "attention_mask": attention_mask}
        return self._generate_with_llm(llm, **prompt, arguments=_arguments_of(generation_config, kwargs), dial=dial)

    def _generate_within_tolerance(
        self,
        llm,
        input_ids,
        attention_mask,
        generation_config,
        *,
        tolerance=None,
        ask_below=None,
        max_draft_tokens=Dial.max_draft_tokens,
        draft_confidence=Dial.draft_confidence,
        fast=False,
        **kwargs,
    ) -> Any:
        """`generate` with an `llm`; its arguments are explained there."""
        tolerance = 0.0 if tolerance is None else tolerance
        _check_share("tolerance", tolerance)
        ask_below = 1 - tolerance if ask_below is None else ask_below
        _check_share("ask_below", ask_below)
        dial = Dial(tolerance, 0.0 if tolerance == 1 else ask_below, max_draft_tokens, draft_confidence, fast)
        arguments = _with_length(_arguments_of(generation_config, kwargs), llm, self.generation_config)
        output = self._generate_with_llm(llm, input_ids, attention_mask, arguments, dial)
        return output if arguments.get("return_dict_in_generate") else output.sequences

    def _generate_with_llm(self, llm, input_ids, attention_mask, arguments, dial) -> LosslessOutput:
        self._check_llm(llm)
        _check_share("draft_confidence", dial.draft_confidence)
        if (most := dial.max_draft_tokens) is True or not isinstance(most, int) or most < 1:
            raise ValueError(f"`max_draft_tokens` must be a positive integer, got {most!r}.")
        input_ids, attention_mask = check_prompt_ids(self.config, input_ids, attention_mask)
        if len(input_ids) > 1 and arguments.get("streamer") is not None:
            raise ValueError(f"A `streamer` gets the tokens of one response, got {len(input_ids)} prompts.")
        for name in _OF_EACH_PROMPT:
            if arguments.get(name) is not None and len(arguments[name]) != len(input_ids):
                raise ValueError(f"`{name}` has {len(arguments[name])} rows, but there are {len(input_ids)} prompts.")
        arguments = _generate_arguments(arguments, dial, llm.generation_config)
        outputs = []
        for row, tokens in enumerate(attention_mask.to(input_ids.device) != 0):
            prompt_ids = input_ids[row, tokens][None].to(compute_device(llm))  # without padding
            outputs.append(self._answer(llm, prompt_ids, arguments | _of_row(arguments, row), dial))
        return outputs[0] if len(outputs) == 1 else _together(outputs, _pad_token_id(llm, arguments))

    def _answer(self, llm, prompt_ids, arguments, dial) -> LosslessOutput:
        """The response to one prompt, `(1, prompt_length)`, which has no padding."""
        if not llm.config.is_encoder_decoder:  # its `generate` counts the prompt
            lengths = [name for name in ("max_length", "min_length") if arguments.get(name) is not None]
            arguments = arguments | {name: arguments[name] + prompt_ids.shape[1] for name in lengths}
        mask = torch.ones_like(prompt_ids)
        writer, start_drafter = self._writer_and_drafter(llm, prompt_ids, mask, dial)
        decode = functools.partial(
            _draft_and_verify, start_drafter=start_drafter, dial=dial, streamer=arguments.get("streamer")
        )
        return writer.generate(prompt_ids, attention_mask=mask, custom_generate=decode, **arguments)

    def _writer_and_drafter(self, llm, prompt_ids, mask, dial):
        """
        The LLM that writes, `llm` or a copy that keeps its states of the prompt, and a function that starts the
        drafter once the prompt is read.
        """
        if self.llm is not None and dial.tolerance > 0:
            # Tokens will stand that the SLM alone has chosen: let it read the states that it has learned to read.
            return llm, lambda: Drafter(self, self.encode_prompt(prompt_ids).prompt_embeds, dial)
        layers, num_layers = self.config.prompt_layers, self.config.llm_text_config.num_hidden_layers
        prompt_part = self._prompt_part(llm)
        if llm.config.is_encoder_decoder or not dial.never_asks:
            reading = LayerStates(prompt_part, layers, num_layers, whole=llm)
            return reading.model, lambda: Drafter(
                self, self.encode_prompt(prompt_ids, None, reading.states()).prompt_embeds, dial
            )
        # A decoder-only LLM that will not be asked reads the prompt as far up as the projector needs it.
        if max(layers) < num_layers:
            prompt_part = truncate(prompt_part, num_layers, max(layers))
        apart = LayerStates(prompt_part, layers, num_layers)

        def start_drafter():
            apart.model(input_ids=prompt_ids, attention_mask=mask, use_cache=False, return_dict=True)
            return Drafter(self, self.encode_prompt(prompt_ids, None, apart.states()).prompt_embeds, dial)

        return llm, start_drafter

    def _check_llm(self, llm):
        if not isinstance(llm, PreTrainedModel) or not llm.can_generate():
            raise ValueError(
                "`llm` must be the LLM with its head, as `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` loads it, "
                f"got {type(llm).__name__}."
            )
        check_same_architecture(llm.config, self.config.llm_config, llm.name_or_path or type(llm).__name__)
        if not self.config.shared_tokenizer:
            raise ValueError(
                "Drafting for `llm` needs an SLM that writes the LLM's tokens, with the LLM's tokenizer or that "
                "trimmed: `config.shared_tokenizer` must be True, got False."
            )
        for name, model in (("LLM", llm), ("SLM", self.slm)):
            layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
            if model._is_stateful or "conv" in layer_types:  # LFM2, which Transformers does not call stateful
                raise ValueError(
                    f"Drafting for `llm` takes back rejected tokens, but the {name} ({model.config.model_type}) keeps "
                    "a state from which none can be removed."
                )


def _check_share(name, value):
    # `not` in front, so that NaN is refused
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"`{name}` must be from 0 to 1, got {value!r}.")


# What the caller cannot ask for, and the value it has: no other way of decoding, and nothing in the output but ids and
# counts.
_ONE_RESPONSE: dict[str, Any] = {
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
_OF_EACH_PROMPT = ("negative_prompt_ids", "negative_prompt_attention_mask")
_CALL = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "tokenizer",
    *_OF_EACH_PROMPT,
)


def _arguments_of(generation_config, kwargs) -> dict[str, Any]:
    """What the caller asked for. An argument is more than the config; `max_length` is the one length then."""
    arguments = {} if generation_config is None else generation_config.to_diff_dict()
    arguments.pop("transformers_version", None)
    if kwargs.get("max_length") is not None:
        arguments["max_new_tokens"] = None
    arguments |= kwargs
    if arguments.get("max_length") is not None:
        arguments.setdefault("max_new_tokens", None)  # or that of the LLM's config would be the length
    return arguments


def _with_length(arguments, llm, own: GenerationConfig) -> dict[str, Any]:
    """What the caller asked for, with the pair's own length where neither that nor the LLM says one."""
    names = ("max_new_tokens", "max_length")
    llms = getattr(llm, "generation_config", GenerationConfig())
    silent = llms.max_new_tokens is None and llms.max_length in (None, GenerationConfig().max_length)
    if silent and all(arguments.get(name) is None for name in names):
        said = {name: getattr(own, name) for name in names}
        return arguments | {name: length for name, length in said.items() if length is not None}
    return arguments


def _generate_arguments(arguments, dial, own: GenerationConfig) -> dict[str, Any]:
    """What `llm.generate` is called with, from what the caller asked for and, where that is silent, the LLM's own."""
    known = {*vars(GenerationConfig()), *_ONE_RESPONSE, *_OWN_LOOP, *_CALL}
    asked_for = (name for name, value in arguments.items() if value is not None and value is not False)
    if unknown := sorted(set(asked_for) - known):
        raise ValueError(f"Drafting for `llm` got unexpected arguments: {unknown}.")
    arguments = {name: value for name, value in arguments.items() if name in known}
    if asked := _other_than(_ONE_RESPONSE, arguments):
        raise ValueError(f"Drafting for `llm` writes one response and returns its ids and counts; got {asked}.")
    if asked := _other_than(_OWN_LOOP, arguments):
        raise ValueError(
            f"Drafting for `llm` reads the prompt as it is, in a loop and a cache of its own; got {asked}."
        )
    do_sample, effective = bool(arguments.get("do_sample")), vars(own) | arguments
    if effective.get("num_beams") not in (None, 1):
        logger.warning_once(
            f"The LLM's generation config has num_beams={own.num_beams}, but a draft is verified for one beam: what "
            "is written is what the LLM writes with `num_beams=1`."
        )
    if not dial.is_exact(do_sample):
        asked = _other_than({"guidance_scale": 1}, effective)
        if isinstance(effective.get("watermarking_config"), SynthIDTextWatermarkingConfig):
            asked = "a SynthID watermark"
        if asked:
            raise ValueError(
                f"Only a greedy response with `tolerance=0` can have {asked}: it remembers each token that it was "
                "called for, and a draft may be taken back."
            )
    tokenizer = arguments.get("tokenizer")
    if effective.get("stop_strings") is not None and tokenizer is not None:
        tokenizer = _whole_llm_tokenizer(tokenizer)
        criteria = stop_at_strings(effective["stop_strings"], tokenizer, arguments.get("stopping_criteria"))
        arguments = arguments | {"stopping_criteria": criteria, "stop_strings": None}
    left_out = {*_ONE_RESPONSE, *_OWN_LOOP, "tokenizer"}
    arguments = {name: value for name, value in arguments.items() if name not in left_out}
    arguments |= {"do_sample": do_sample, "num_beams": 1, "num_return_sequences": 1}
    # The loop below has a cache of its own, which can be cropped whatever the LLM's windows are.
    return arguments | {"use_cache": False, "cache_implementation": None}


def _whole_llm_tokenizer(tokenizer):
    """
    The LLM's side of a pair's tokenizer, or the tokenizer itself.

    Raises:
        ValueError: if that side was limited to the SLM's tokens: the LLM writes others too.
    """
    llms = getattr(tokenizer, "llm_tokenizer", tokenizer)
    ids = llms.get_vocab()
    if llms is not tokenizer and max(ids.values()) >= len(ids) and ids.keys() >= tokenizer.get_vocab().keys():
        raise ValueError(
            "`stop_strings` are found in the LLM's tokens, and this pair's tokenizer has only those that the SLM "
            "writes: pass the LLM's own `tokenizer`."
        )
    return llms


def _of_row(arguments, row) -> dict[str, Any]:
    """What differs from prompt to prompt, for the one in `row`."""
    of_row = {name: arguments[name][row : row + 1] for name in _OF_EACH_PROMPT if arguments.get(name) is not None}
    if (allowed := arguments.get("prefix_allowed_tokens_fn")) is not None:
        of_row["prefix_allowed_tokens_fn"] = lambda _, ids: allowed(row, ids)
    return of_row


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
    dial,
    streamer=None,
    encoder_outputs=None,
    **kwargs,
) -> LosslessOutput:
    """The decoding loop, in place of the one that `llm.generate` would run."""
    is_encoder_decoder, do_sample = llm.config.is_encoder_decoder, generation_config.do_sample
    response_start = 1 if is_encoder_decoder else input_ids.shape[1]
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if is_encoder_decoder else DynamicCache()
    fewer_logits = "logits_to_keep" in inspect.signature(llm.forward).parameters
    ends = generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}

    def process(logits, tokens):
        """The draft's scores, as the LLM's are processed, behind `tokens` of the draft."""
        written = torch.cat([input_ids, input_ids.new_tensor([tokens])], dim=1)
        return logits_processor(written, logits[None].to(input_ids.device))[0]

    # A greedy draft that is verified need not be processed.
    processes_draft = do_sample or (len(logits_processor) > 0 and not dial.is_exact(do_sample))
    drafting = {"ends": ends, "process": process if processes_draft else None, "do_sample": do_sample}
    # Asked of each function that the LLM calls, so only where it can help.
    in_float32_on_a_cpu = llm.device.type == "cpu" and llm.dtype == torch.float32
    faster_linear = EagerFewRows() if in_float32_on_a_cpu else contextlib.nullcontext()

    llm_calls = 1 if is_encoder_decoder or dial.never_asks else 0  # the encoder's, or that over the prompt alone
    draft_tokens = accepted_tokens = unasked_tokens = 0
    # An encoder has read the prompt; a decoder-only LLM that is asked does so in its first run.
    drafter = None
    if is_encoder_decoder or dial.never_asks:
        drafter = start_drafter()
        if dial.never_asks:
            drafter.check_room(generation_config.max_length - response_start)
    unread, finished = input_ids, False
    while not finished:
        # 1. Draft.
        draft = Draft()
        if drafter is not None:
            room = generation_config.max_length - input_ids.shape[1]
            room -= dial.ask_below >= 1  # verified in any case, and the LLM writes one further
            response = input_ids[0, response_start:].tolist()
            draft = drafter.draft(response, min(dial.max_draft_tokens, room), **drafting)
        length = len(draft.tokens)
        asked = draft.unsure or length == 0
        # 2. Verify: one run over what the LLM has not read yet and the draft.
        if asked:
            new_ids = torch.cat([unread, unread.new_tensor([draft.tokens])], dim=1)
            arguments = {CACHE: cache, "use_cache": True, "return_dict": True}
            if fewer_logits:
                arguments["logits_to_keep"] = length + 1
            if is_encoder_decoder:
                arguments |= {"encoder_outputs": encoder_outputs, "decoder_input_ids": new_ids}
            else:
                arguments["input_ids"] = new_ids
            with faster_linear:
                output = llm(**arguments)
            logits = output.logits[0, -length - 1 :].to(input_ids.device, torch.float32)
            if drafter is None:  # at once: guidance has the LLM read another prompt, too
                drafter = start_drafter()
                if dial.tolerance > 0:  # the run over the prompt scores the first token
                    draft = drafter.draft([], 1, **drafting)
        # 3. Write the draft as far as it stands and, if the LLM was asked, one token of its own.
        matches = 0
        for position in range(len(logits) if asked else length):
            drafted = draft.tokens[position] if position < len(draft.tokens) else None
            if not asked:
                token = input_ids.new_tensor([drafted])
            else:
                scores = logits_processor(input_ids, logits[position][None])
                if do_sample:
                    token = _sampled(scores, drafted, draft.distributions[position:], dial.tolerance)
                else:
                    token = _best(scores, drafted, dial.tolerance)
            input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
            if streamer is not None:
                streamer.put(token.cpu())
            finished = bool(stopping_criteria(input_ids, None).all())
            matched = drafted == token.item()
            matches += matched
            if finished or not matched:
                break
        # 4. Forget what was rejected; the LLM reads next what it has not read, the last token written for one.
        if asked:
            rejected = length - position
            if rejected > 0:
                cache.crop(-rejected)
            unread = input_ids[:, -1:]
        else:
            unread = torch.cat([unread, input_ids[:, -matches:]], dim=1)
            unasked_tokens += matches
        llm_calls += asked
        draft_tokens, accepted_tokens = draft_tokens + len(draft.tokens), accepted_tokens + matches
    if drafter is not None:
        drafter.end()
    if streamer is not None:
        streamer.end()
    return _output(
        input_ids if is_encoder_decoder else input_ids[:, response_start:],
        llm_calls=llm_calls,
        draft_tokens=draft_tokens,
        accepted_tokens=accepted_tokens,
        unasked_tokens=unasked_tokens,
    )


def _output(sequences, **counts: int) -> LosslessOutput:
    rate = counts["accepted_tokens"] / max(counts["draft_tokens"], 1)
    return LosslessOutput(sequences=sequences, acceptance_rate=rate, **counts)


def _pad_token_id(llm, arguments) -> int:
    """What `llm.generate` pads with."""
    padding, ends = (
        getattr(llm.generation_config, name) if arguments.get(name) is None else arguments[name]
        for name in ("pad_token_id", "eos_token_id")
    )
    if padding is None:
        padding = ends[0] if isinstance(ends, (list, tuple)) else ends
    return 0 if padding is None else padding


def _together(outputs: list[LosslessOutput], pad_token_id: int) -> LosslessOutput:
    """The outputs of several prompts as one."""
    counts = ("llm_calls", "draft_tokens", "accepted_tokens", "unasked_tokens")
    sequences = torch.nn.utils.rnn.pad_sequence(
        [output.sequences[0] for output in outputs], batch_first=True, padding_value=pad_token_id
    )
    return _output(sequences, **{name: sum(output[name] for output in outputs) for name in counts})


def _best(scores: torch.Tensor, drafted: int | None, tolerance: float) -> torch.Tensor:
    """
    The LLM's best token, or `drafted` if its probability is at least `1 - tolerance` of the best one's; of shape
    `(1,)`. `scores` are the LLM's, of shape `(1, vocab_size)`; their differences are ratios of probabilities.
    """
    best = scores.argmax(dim=-1)
    if tolerance > 0 and drafted is not None:
        if scores[0, drafted] >= scores[0, best] + math.log1p(-tolerance):
            return best.new_tensor([drafted])
    return best


def _sampled(
    scores: torch.Tensor, drafted: int | None, distributions: list[torch.Tensor], tolerance: float
) -> torch.Tensor:
    """
    A token of shape `(1,)`, distributed as `scores`, `(1, vocab_size)`, say if the tolerance is 0, and never more than
    `1 / (1 - tolerance)` times as likely. `drafted` was drawn from the first of `distributions`, each `(vocab_size,)`.
    """
    rest = p = scores[0].softmax(dim=-1)
    if drafted is not None:
        q = distributions[0]
        if torch.rand((), device=p.device) < p[drafted] / ((1 - tolerance) * q[drafted]):
            return torch.tensor([drafted], device=p.device)
        rest = (p - q).clamp(min=0)
        if not rest.any():  # one distribution, up to rounding
            rest = p
    return torch.multinomial(rest, num_samples=1)


__all__ = ["LosslessGenerationMixin", "LosslessOutput"]
