"""Fast decode: the SLM's step compiled as a whole, on caches of fixed size.

Choices made here:
- `slm.generate` prepares everything and hands over to the loop here, its `custom_generate`: lengths, logits
  processors, stopping criteria and random numbers are Transformers' own, so the tokens are the plain path's.
- The prompt is read as in the plain path. Its keys and values are then copied into `StaticLayer`s, sliding windows
  too: the mask says what they see, so one step serves each position and is compiled once.
- On CPU linear layers and attention are written for a few rows (few_rows_llm2slm.py): otherwise compiling gains a
  tenth.
- Whatever cannot be compiled is decoded in the plain way, with a note.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import collections
import functools
import inspect
import itertools
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .arguments_llm2slm import SPECIAL_TOKENS
from .beams_llm2slm import search_beams
from .few_rows_llm2slm import CompiledFewRows
from .inputs_llm2slm import CACHE, positions_of

logger = logging.get_logger(__name__)

BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
BACKEND = "inductor"  # of torch.compile; tests of everything else take one that is quicker to compile
BLOCK = 256  # positions; caches hold a multiple and double when full, so that few sizes are compiled
ENCODER_BLOCK = 64  # positions of an encoder-decoder's prompt, for the same reason
# Fast decode takes 0.44 of the plain time at 1 row, 0.55 at 4, 0.80 at 8 in float32; in bfloat16 on a CPU with matrix
# units 0.27, 0.46 and 1.26, without them 0.29, 0.43 and 0.50 (results/fast_decode.json, fast_decode-epyc.json).
MAX_CPU_ROWS = 8
MAX_CPU_ROWS_BESIDE_MATRIX_UNITS = 4


@dataclass
class _Compiled:
    """
    What stays between two calls: an SLM's compiled step, and a cache that no call uses, as CUDA graphs replay on one
    address. Calls of other threads have caches of their own.
    """

    function: types.FunctionType
    step: Callable
    lock: threading.Lock = field(default_factory=threading.Lock)
    failed: bool = False
    idle_caches: collections.deque[Cache] = field(default_factory=lambda: collections.deque(maxlen=1))


_number = itertools.count()
# On CPU one for each number of responses: loops over a number that is not known compile to slower code.
_compiled: weakref.WeakKeyDictionary[PreTrainedModel, dict[int | None, _Compiled]] = weakref.WeakKeyDictionary()
_compiled_lock = threading.Lock()


def generate_fast(
    slm: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    generation_config: GenerationConfig,
    **kwargs,
):
    r"""
    `slm.generate` with a compiled step, or, with a note, without one where that is not possible.

    Args:
        slm (`PreTrainedModel`):
            The model that writes.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, prompt_length, hidden_size)`):
            The prompt; padded on the left for a decoder-only model.
        attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`):
            1 for tokens, 0 for padding.
        generation_config (`GenerationConfig`):
            How to generate.
        kwargs:
            Further arguments of `slm.generate`.

    Returns:
        What `slm.generate` returns.
    """
    inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "generation_config": generation_config}
    rows = inputs_embeds.shape[0] * _rows_per_prompt(generation_config)
    reason = _why_plain(slm, generation_config, kwargs)
    if reason is None and inputs_embeds.device.type == "cpu" and rows > (most := _max_cpu_rows(slm.dtype)):
        reason = f"more than {most} responses at a time in {slm.dtype} on this CPU, where it gains nothing"
    if reason is not None:
        logger.warning_once(f"`fast=True` does not go with {reason}: decoding in the plain way.")
        return slm.generate(**inputs, **kwargs)
    if generation_config.get_generation_mode() in BEAMS:
        decode = _search_beams
    else:  # Transformers hands no streamer to a `custom_generate`
        decode = functools.partial(_decode, streamer=kwargs.get("streamer"))
    return slm.generate(**inputs, **kwargs, custom_generate=decode)


def _max_cpu_rows(dtype: torch.dtype) -> int:
    matrix_units = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return MAX_CPU_ROWS_BESIDE_MATRIX_UNITS if matrix_units else MAX_CPU_ROWS


def _rows_per_prompt(generation_config) -> int:
    return max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)


def why_not_compiled(slm: PreTrainedModel) -> str | None:
    """What keeps an SLM's step from being compiled; `None` if nothing does."""
    if any(compiled.failed for compiled in list(_compiled.get(slm, {}).values())):
        return f"{type(slm).__name__} here: its step could not be compiled"
    if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(slm):
        return "a model sharded over processes"
    config = slm.config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if not slm._can_compile_fullgraph or not layer_types <= {"full_attention", "sliding_attention"}:
        return f"{type(slm).__name__}, which Transformers cannot compile on caches of fixed size"
    return None


def is_compiled(slm: PreTrainedModel, rows: int) -> bool:
    """Whether a step for this many responses at a time has been compiled, and none has failed."""
    return why_not_compiled(slm) is None and not _compiled.get(slm, {}).keys().isdisjoint({rows, None})


def _why_plain(slm, generation_config, kwargs) -> str | None:
    """What keeps a call from fast decode."""
    if (reason := why_not_compiled(slm)) is not None:
        return reason
    mode = generation_config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, *BEAMS):
        return mode.value.replace("_", " ")
    if generation_config.return_dict_in_generate:
        return "`return_dict_in_generate=True`"
    if generation_config.use_cache is False or generation_config.cache_implementation is not None:
        return "`use_cache=False` and `cache_implementation`"
    if generation_config.compile_config is not None or generation_config.disable_compile:
        return "`compile_config` and `disable_compile`, as it compiles in its own way"
    if kwargs.get("custom_generate") is not None:
        return "`custom_generate`"
    if kwargs.get("streamer") is not None and mode in BEAMS:
        return "a streamer of beams"
    known = {*inspect.signature(slm.generate).parameters, *SPECIAL_TOKENS, "decoder_input_ids", "input_ids"}
    if unknown := sorted(set(kwargs) - known):
        return f"arguments for the SLM's forward, {unknown}"
    if kwargs.get("synced_gpus"):
        return "a model sharded over processes"
    return None


# --------------------------------------------------------------------------------------------------------- the loop
def _decode(
    slm, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **model_kwargs
) -> torch.LongTensor:
    """Greedy search or sampling, as in `GenerationMixin`; called by `slm.generate` with all it prepared."""
    pad_token = generation_config._pad_token_tensor
    stops_at_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    step = CompiledStep(slm, input_ids, model_kwargs, _rows_per_prompt(generation_config))
    logits = step.read_prompt()
    while True:
        scores = logits_processor(input_ids, logits[:, -1].to(input_ids.device, torch.float32))
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if stops_at_eos:
            tokens = tokens.where(unfinished, pad_token)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if not unfinished.any():
            break
        logits = step.write(tokens[:, None])
    step.end()
    if streamer is not None:
        streamer.end()
    return input_ids


def _search_beams(slm, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Beam search or beam sampling, as in `GenerationMixin`; called by `slm.generate` with all it prepared."""
    step = CompiledStep(slm, input_ids, model_kwargs, _rows_per_prompt(generation_config))
    sequences = search_beams(step, input_ids, logits_processor, stopping_criteria, generation_config)
    step.end()
    return sequences


class CompiledStep:
    """
    One batch of responses: the prompt in the plain way, then token after token through the compiled step.

    Args:
        slm (`PreTrainedModel`): The model that writes.
        input_ids (`torch.LongTensor`): What the response begins with; of shape `(batch_size, 0)` if with nothing.
        model_kwargs (`dict`): The prompt: `inputs_embeds`, or `encoder_outputs` with their `attention_mask`.
        rows_per_prompt (`int`): Responses to each prompt; the rows of one prompt lie side by side.
    """

    def __init__(self, slm, input_ids, model_kwargs, rows_per_prompt):
        self.slm, self.prompt_ids, self.given = slm, input_ids, model_kwargs
        self.rows_per_prompt = rows_per_prompt
        self.arguments = inspect.signature(slm.forward).parameters
        rows = input_ids.shape[0] if input_ids.device.type == "cpu" else None
        with _compiled_lock:
            of_slm = _compiled.setdefault(slm, {})
            if rows not in of_slm:
                of_slm[rows] = _compile(_lean_logits, input_ids.device.type)
        self.compiled = of_slm[rows]
        self.inputs = {}  # of each step
        self.unguarded = None

    def read_prompt(self) -> torch.Tensor:
        """Logits of the prompt; its keys and values are set out for the steps."""
        given = {name: self.given[name] for name in (CACHE, "logits_to_keep") if name in self.given}
        prepare = self._encoder_decoder_inputs if self.slm.config.is_encoder_decoder else self._decoder_only_inputs
        output = self.slm(**prepare(), **given, use_cache=True, return_dict=True)
        if "cache_position" in self.arguments:  # Transformers 4
            self.inputs["cache_position"] = torch.tensor([self.length], device=self.prompt_ids.device)
        cache, logits = output[CACHE], output.logits
        if logits.shape[0] < self.prompt_mask.shape[0]:
            cache.batch_repeat_interleave(self.rows_per_prompt)
            logits = logits.repeat_interleave(self.rows_per_prompt, dim=0)
        self._set_out_cache(cache, BLOCK * (self.length // BLOCK + 1))
        return logits

    def _decoder_only_inputs(self):
        """Each prompt once: `generate` has repeated them for the beams."""
        embeds, mask = self.given["inputs_embeds"], self.given.get("attention_mask")
        if mask is None:  # Transformers 5 drops a mask of ones
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        inputs = {"inputs_embeds": embeds, "attention_mask": mask}
        if "position_ids" in self.arguments:
            inputs["position_ids"] = positions_of(mask)
            self.inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
        self.length, self.prompt_mask = embeds.shape[1], mask
        self.prefix = ""
        return {name: states[:: self.rows_per_prompt] for name, states in inputs.items()}

    def _encoder_decoder_inputs(self):
        states, mask = self.given["encoder_outputs"].last_hidden_state, self.given["attention_mask"]
        padding = -states.shape[1] % ENCODER_BLOCK
        inputs = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=nn.functional.pad(states, (0, 0, 0, padding))),
            "attention_mask": nn.functional.pad(mask, (0, padding)),
        }
        self.inputs.update(inputs)
        self.length, self.prompt_mask = self.prompt_ids.shape[1], torch.ones_like(self.prompt_ids)
        self.prefix = "decoder_"
        return {"decoder_input_ids": self.prompt_ids, **inputs}

    def _set_out_cache(self, cache, capacity):
        """Copies `cache` into one with room for `capacity` positions."""
        try:
            idle = self.compiled.idle_caches.pop()
        except IndexError:
            idle = None
        self.unguarded = None
        self.capacity, self.inputs[CACHE] = capacity, _fixed_cache(cache, self.length, capacity, idle)
        # Positions not yet written are hidden by causality.
        self.inputs[f"{self.prefix}attention_mask"] = nn.functional.pad(
            self.prompt_mask, (0, capacity - self.prompt_mask.shape[1]), value=1
        )

    def write(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits behind `tokens` of shape `(batch_size, 1)`."""
        self._make_room()
        self.inputs[f"{self.prefix}input_ids"] = tokens.contiguous()  # the compiled step takes no other strides
        logits = self._run()
        self._move(1)
        return logits

    def write_embeds(self, embeds: torch.Tensor) -> torch.Tensor:
        """Logits behind a token that has no id, only its embedding of shape `(batch_size, 1, hidden_size)`."""
        self._make_room()
        inputs = {name: value for name, value in self.inputs.items() if name != "input_ids"}
        logits = _logits(self.slm, {**inputs, "inputs_embeds": embeds})
        self._move(1)
        return logits

    def take_back(self, number: int) -> None:
        """Forgets the last tokens written."""
        self._move(-number)
        self._forget_step()

    def _make_room(self):
        if self.length == self.capacity:
            self._set_out_cache(self.inputs[CACHE], 2 * self.capacity)

    def _move(self, number):
        self.length += number
        for name in {"position_ids", "cache_position"} & set(self.inputs):
            self.inputs[name] = self.inputs[name] + number

    def choose_rows(self, rows: torch.Tensor) -> None:
        """Goes on with what was written in these rows, of shape `(batch_size,)`; each is of the same prompt."""
        if rows.tolist() == list(range(len(rows))):
            return
        cache = self.inputs[CACHE]
        for layer in getattr(cache, "self_attention_cache", cache).layers:
            for states in (layer.keys, layer.values):
                written = states[:, :, : self.length]  # in place: CUDA graphs replay on one address
                written.copy_(written.index_select(0, rows))

    def end(self) -> None:
        """Leaves the cache to the next response."""
        self.compiled.idle_caches.append(self.inputs[CACHE])

    def _run(self):
        if self.unguarded is not None:
            return self.unguarded(self.slm, self.inputs)
        if not self.compiled.failed:
            try:
                with self.compiled.lock:
                    logits = self.compiled.step(self.slm, self.inputs)
                    if self.prompt_ids.device.type == "cpu":
                        self.unguarded = _latest_code(self.compiled.function)
                    else:  # a CUDA graph writes its next ones into the same memory, for whatever thread
                        logits = logits.clone()
                return logits
            except torch.OutOfMemoryError:  # no fault of the step: the next response may have room
                raise
            except Exception as error:  # one that is not about compiling comes again below
                self.compiled.failed = True
                logger.warning_once(
                    f"`fast=True`: the step of {type(self.slm).__name__} could not be compiled, decoding in the plain "
                    f"way. {type(error).__name__}: {error}"
                )
                self._forget_step()
        return _logits(self.slm, self.inputs)

    def _forget_step(self):
        """Takes back that a step which failed half-way has counted its token: the layers of Transformers 5 do."""
        cache = self.inputs[CACHE]
        for layer in getattr(cache, "self_attention_cache", cache).layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(self.length)


# ------------------------------------------------------------------------------------------------ caches of fixed size
def _fixed_cache(cache, length, capacity, idle):
    """The first `length` positions of `cache` in one with room for `capacity`: `idle` if it has that shape."""
    if not isinstance(cache, EncoderDecoderCache):
        return Cache(layers=_fixed_layers(cache.layers, length, capacity, [] if idle is None else idle.layers))
    own, cross = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
    idle_own = [] if idle is None else idle.self_attention_cache.layers
    idle_cross = [] if idle is None else idle.cross_attention_cache.layers
    prompt_length = cross[0].keys.shape[2]
    return EncoderDecoderCache(
        Cache(layers=_fixed_layers(own, length, capacity, idle_own)),
        Cache(layers=_fixed_layers(cross, prompt_length, prompt_length, idle_cross)),
    )


def _fixed_layers(layers, length, capacity, idle):
    if [_kind(layer, capacity) for layer in layers] != [_kind(layer, layer.max_cache_len) for layer in idle]:
        idle = [StaticLayer(max_cache_len=capacity) for _ in layers]
    for fixed, layer in zip(idle, layers, strict=True):
        keys, values = layer.keys[:, :, :length], layer.values[:, :, :length]
        padding = (0, 0, length - keys.shape[2], 0)  # a sliding window has forgotten the first ones
        fixed.reset()
        fixed.update(nn.functional.pad(keys, padding), nn.functional.pad(values, padding))
    return idle


def _kind(layer, capacity):
    keys, values = layer.keys, layer.values
    # Tensors of inference mode cannot be written to outside of it.
    shape = (*keys.shape[:2], keys.shape[3], values.shape[3], capacity)
    return shape, keys.dtype, keys.device, keys.is_inference()


# -------------------------------------------------------------------------------------------------- the compiled step
def _compile(function, device_type):
    # The compiler counts what it compiled by code object, and stops at eight; and a size that differs from one it has
    # seen in code of the same name, it takes for one that varies. So each gets code and a name of its own.
    name = f"{function.__name__}_{next(_number)}"
    own = types.FunctionType(function.__code__.replace(co_name=name), globals())
    mode = "reduce-overhead" if device_type == "cuda" else None  # CUDA graphs
    return _Compiled(own, torch.compile(own, backend=BACKEND, fullgraph=True, mode=mode))


def _latest_code(function):
    """
    What the compiler has just run for `function`, without its guards. They compare each module and parameter of the
    SLM with what it was, which takes about a sixth of a small SLM's step: the first step of a response is enough.
    PyTorch's public way, `torch.compiler.set_stance(skip_guard_eval_unsafe=True)`, holds for the whole process: other
    threads' calls, of other models too, would go without guards.
    """
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list  # slow to import

    entries = _debug_get_cache_entry_list(function.__code__)
    if not entries:
        raise RuntimeError("torch.compile is switched off")
    return types.FunctionType(entries[0].code, globals())


def _lean_logits(slm, inputs):
    with CompiledFewRows():
        return _logits(slm, inputs)


def _logits(slm, inputs):
    return slm(**inputs, use_cache=True, return_dict=True).logits
