"""LLM-to-SLM: a frozen LLM encodes the prompt once, a small language model (SLM) writes the response.

Method: Bergner et al., "Think Big, Generate Quick: LLM-to-SLM for Fast Autoregressive Decoding" (arXiv 2402.16844).
The file reads top to bottom: output, projector, the model (build, encode, forward, generate), helpers. Loading and
saving are in checkpoint_llm2slm.py.

Choices made here:
- `generate` encodes and projects the prompt once and hands `inputs_embeds` to `slm.generate`: each decoding mode,
  cache and streamer of Transformers is inherited, none is rewritten.
- The LLM's hidden states are read by hooks on the layers asked for, so that no other layer's states are kept.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import copy
import functools
import inspect
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.generation import StoppingCriteriaList, StopStringCriteria
from transformers.modeling_outputs import BaseModelOutput, ModelOutput, Seq2SeqLMOutput

from .checkpoint_llm2slm import LLM2SLMPreTrainedModel
from .configuration_llm2slm import LLM2SLMConfig
from .decoding_llm2slm import generate_fast
from .drafting_llm2slm import LosslessGenerationMixin
from .loading_llm2slm import (
    fingerprint,
    is_package,
    llm_auto_class,
    load_llm,
    load_slm,
    max_positions,
    record_layer_states,
    resolve_revision,
    shared_parameter,
    slm_auto_class,
    split_gguf,
    truncate,
    without_head,
)

if TYPE_CHECKING:  # this file's relative imports complete the checkpoint (Transformers 4 asks no other file for any)
    from .beams_llm2slm import search_beams  # noqa: F401
    from .pipeline_llm2slm import LLM2SLMText2TextGenerationPipeline  # noqa: F401
    from .tokenization_llm2slm import LLM2SLMTokenizer  # noqa: F401

# Prompt tokens that take as long as what a run costs besides: 32 in float32 and 45 in bfloat16, in the first 16 layers
# of SmolLM2-135M on two cores (results/mixed_lengths.json).
RUN_TOKENS = 32


@dataclass
class PromptEncoding(ModelOutput):
    """
    An encoded prompt; `model.generate(**encoding)` writes a response to it without running the LLM again.

    Args:
        prompt_embeds (`torch.FloatTensor` of shape `(batch_size, prompt_length, slm_hidden_size)`):
            What the SLM takes in place of its own prompt embeddings.
        attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`):
            1 for tokens, 0 for padding on either side.
    """

    prompt_embeds: Any = None
    attention_mask: Any = None


class LLM2SLMStandardization(nn.Module):
    """
    `(states - mean) / scale`, number by number, `(..., hidden_size)` as given: both are constants, measured once by
    [`~llm2slm.starts.standardize_states`]. Until then it changes nothing.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, hidden_size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (states - self.mean) / self.scale


class LLM2SLMProjector(nn.Module):
    """Maps the LLM's hidden states to the width of the SLM's embeddings (paper, section 3.2)."""

    def __init__(self, config: LLM2SLMConfig):
        super().__init__()
        self.num_layers, self.llm_hidden_size = len(config.llm_layers), config.llm_hidden_size
        input_size, output_size = self.num_layers * self.llm_hidden_size, config.slm_hidden_size
        self.norms = None
        if config.projector_norm is not None:
            norm = {"layer_norm": nn.LayerNorm, "standardize": LLM2SLMStandardization}[config.projector_norm]
            self.norms = nn.ModuleList(norm(self.llm_hidden_size) for _ in range(self.num_layers))
        self.hidden = None
        if config.projector_type == "mlp":
            self.hidden = nn.Linear(input_size, config.projector_hidden_size)
            self.act = ACT2FN[config.projector_hidden_act]
            input_size = config.projector_hidden_size
        self.out = nn.Linear(input_size, output_size)
        # With two tokenizers, "add" adds to the LLM's input embeddings at the SLM's width.
        self.llm_embeddings = nn.Linear(self.llm_hidden_size, output_size) if config.adds_llm_embeddings else None
        self.llm_embeddings_layer = config.prompt_layers.index(0) if config.adds_llm_embeddings else None

    def forward(self, prompt_hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch_size, prompt_length, prompt_hidden_size)` to `(batch_size, prompt_length, slm_hidden_size)`."""
        states = prompt_hidden_states.to(self.out.weight.dtype).split(self.llm_hidden_size, dim=-1)
        embeds = states[: self.num_layers]
        if self.norms is not None:
            embeds = [norm(layer_states) for norm, layer_states in zip(self.norms, embeds, strict=True)]
        embeds = torch.cat(tuple(embeds), dim=-1)  # (batch_size, prompt_length, num_layers * llm_hidden_size)
        if self.hidden is not None:
            embeds = self.act(self.hidden(embeds))
        embeds = self.out(embeds)  # (batch_size, prompt_length, slm_hidden_size)
        if self.llm_embeddings is not None:
            embeds = embeds + self.llm_embeddings(states[self.llm_embeddings_layer])
        return embeds


class LLM2SLMForConditionalGeneration(LLM2SLMPreTrainedModel, LosslessGenerationMixin, GenerationMixin):
    """
    A frozen LLM, a projector and a small language model, together an encoder-decoder: prompt in, response out.

    `llm` is `None` in a slim model whose LLM has not been loaded (see [`~LLM2SLMForConditionalGeneration.load_llm`]);
    `prompt_hidden_states` and `prompt_embeds` then still work. `prompt_token_map` is `None` unless the SLM's
    vocabulary is the LLM's, trimmed: an int32 tensor of shape `(llm_vocab_size,)` with the SLM's id of each of the
    LLM's tokens, -1 for none.
    """

    # ----------------------------------------------------------------------------------------------------- building
    def __init__(self, config: LLM2SLMConfig, llm: PreTrainedModel | None = None, slm: PreTrainedModel | None = None):
        super().__init__(config)
        self.register_module("llm", None)
        if llm is None and (config.include_llm or config.llm_name_or_path is None):
            # T5's encoder class changes the configuration it is given; any other LLM's is this model's own.
            llm_config = config.llm_config
            llm_config = copy.deepcopy(llm_config) if llm_config.is_encoder_decoder else llm_config
            llm = llm_auto_class(llm_config).from_config(llm_config)
        if llm is not None:
            self._set_llm(llm)
        self.projector = LLM2SLMProjector(config)
        self.register_buffer("prompt_token_map", None)
        if config.maps_prompt_tokens:
            self.prompt_token_map = torch.full((config.llm_text_config.vocab_size,), -1, dtype=torch.int32)
        self.slm = slm_auto_class(config.slm_config).from_config(config.slm_config) if slm is None else slm
        config.slm_config = self.slm.config  # one object: what is set in one place holds in both
        # How to generate is said in one place, this model's generation config: the SLM's own keeps its tokens only.
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        own = self.slm.generation_config
        self.slm.generation_config = GenerationConfig(**{name: getattr(own, name) for name in tokens})
        self.post_init()
        self._skip_llm_when_saving()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, LLM2SLMStandardization):
            module.mean.zero_()
            module.scale.fill_(1.0)
        elif isinstance(module, nn.Linear):
            _init_linear(module, output_std=1.0 if module is self.projector.hidden else 0.02)

    @classmethod
    def from_llm_slm_pretrained(
        cls,
        llm: "str | os.PathLike | PreTrainedModel",
        slm: "str | os.PathLike | PreTrainedModel",
        *,
        fusion: str = "replace",
        prompt_token_map: torch.Tensor | list[int] | None = None,
        llm_kwargs: dict | None = None,
        slm_kwargs: dict | None = None,
        **config_kwargs,
    ) -> "LLM2SLMForConditionalGeneration":
        r"""
        Composes a pretrained LLM and a pretrained SLM; the projector between them starts at random.

        Args:
            llm (`str`, `os.PathLike` or `PreTrainedModel`):
                Name on the Hub, folder, `.gguf` file or folder with one, or a loaded model. It is frozen; a model
                passed as an object is shared, not copied. The SLM's generation config becomes the pair's.
            slm (`str`, `os.PathLike` or `PreTrainedModel`):
                Likewise; anything `AutoModelForSeq2SeqLM` or `AutoModelForCausalLM` loads.
            fusion (`str`, *optional*, defaults to `"replace"`):
                `"replace"` or `"add"`, see [`LLM2SLMConfig`].
            prompt_token_map (`torch.LongTensor` or `list[int]` of shape `(llm_vocab_size,)`, *optional*):
                With `shared_tokenizer=True` and an SLM vocabulary smaller than the LLM's: the SLM's id of each token
                of the LLM, -1 for those it lacks, which `fusion="add"` embeds as the mean of all.
            llm_kwargs, slm_kwargs (`dict`, *optional*):
                Arguments of each `from_pretrained`: `dtype`, `device_map`, `revision`, `quantization_config`, ...
            config_kwargs:
                Further fields of [`LLM2SLMConfig`], such as `llm_layer` and `shared_tokenizer`.

        Raises:
            ValueError: if the two models share a parameter (training the SLM would change the LLM), a field of the
                configuration is unknown or invalid, or `prompt_token_map` is missing, not needed or invalid.
        """
        known = set(inspect.signature(LLM2SLMConfig.__init__).parameters) - {"self", "kwargs"}
        if unknown := set(config_kwargs) - known:
            raise ValueError(f"Unknown configuration field(s) {sorted(unknown)}; known are {sorted(known)}.")

        llm_source: dict = {}
        if not isinstance(llm, PreTrainedModel):
            llm_kwargs = dict(llm_kwargs or {})
            llm_name = llm
            name, gguf_file = split_gguf(llm, llm_kwargs.pop("gguf_file", None))
            llm, llm_config = load_llm(name, gguf_file, **llm_kwargs)
            revision = resolve_revision(name, gguf_file, llm_kwargs)
            llm_source = {
                "llm_name_or_path": str(llm_name) if is_package(llm_name) else name,
                "llm_revision": revision,
                "llm_gguf_file": gguf_file,
            }
        elif llm_kwargs:
            raise ValueError("`llm_kwargs` are for loading the LLM by name, but `llm` is a loaded model.")
        else:
            llm_config = llm.config
        if not isinstance(slm, PreTrainedModel):
            slm = load_slm(slm, **(slm_kwargs or {}))
        elif slm_kwargs:
            raise ValueError("`slm_kwargs` are for loading the SLM by name, but `slm` is a loaded model.")

        if not slm.can_generate():
            raise ValueError(
                f"`slm` must be a model that generates (with a language model head), got {type(slm).__name__}."
            )
        if shared := shared_parameter(llm, slm):
            raise ValueError(
                f"LLM and SLM share the parameter {shared!r}: training the SLM would change the frozen LLM. Pass a "
                "copy, e.g. `slm=copy.deepcopy(slm)`."
            )
        config = LLM2SLMConfig.from_sub_configs(llm_config, slm.config, fusion=fusion, **llm_source, **config_kwargs)
        token_map = _check_token_map(prompt_token_map, config)
        generation_config = slm.generation_config
        model = cls(config, llm=llm, slm=slm)
        if token_map is not None:
            model.prompt_token_map.copy_(token_map)
        config.llm_fingerprint = fingerprint(model.llm)
        model.generation_config = generation_config
        model.projector.to(slm.get_input_embeddings().weight.device, slm.dtype)
        model._match_embedding_scale()
        return model.eval()

    @torch.no_grad()
    def _match_embedding_scale(self):
        """Gives projections the standard deviation of the SLM's own embeddings, which it was pretrained on."""
        embeddings = self.slm.get_input_embeddings()
        ids = torch.arange(min(embeddings.num_embeddings, 4096), device=embeddings.weight.device)
        std = self._embed_with_slm(ids).float().std().item()
        _init_linear(self.projector.out, output_std=std)
        if self.projector.llm_embeddings is not None:
            llm_embeddings = self.llm.get_input_embeddings()
            ids = torch.arange(min(llm_embeddings.num_embeddings, 4096), device=llm_embeddings.weight.device)
            llm_std = llm_embeddings(ids).float().std().item()
            _init_linear(self.projector.llm_embeddings, output_std=std / max(llm_std, 1e-6))

    def _set_llm(self, llm: PreTrainedModel):
        """Keeps of `llm` what reads the prompt, frozen and in eval mode."""
        self.llm = self._prompt_part(llm).requires_grad_(False).eval()

    def _prompt_part(self, llm: PreTrainedModel) -> PreTrainedModel:
        """What of `llm` reads the prompt, up to the highest layer asked for; it shares the parameters."""
        llm = llm.get_encoder() if self.config.llm_config.is_encoder_decoder else without_head(llm)
        num_layers, depth = self.config.llm_text_config.num_hidden_layers, max(self.config.prompt_layers)
        return truncate(llm, num_layers, depth) if depth < num_layers else llm

    # --------------------------------------------------------------------------------------------- frozen, whatever
    def train(self, mode: bool = True):
        """Sets projector and SLM to training mode; the frozen LLM stays in eval mode."""
        super().train(mode)
        if self.llm is not None:
            self.llm.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True):
        """Switches gradients of projector and SLM; the LLM stays frozen."""
        super().requires_grad_(requires_grad)
        if self.llm is not None:
            self.llm.requires_grad_(False)
        return self

    # Token embeddings, head and vocabulary are the SLM's: it writes the response.
    def get_input_embeddings(self):
        """The SLM's token embeddings."""
        return self.slm.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replaces the SLM's token embeddings."""
        self.slm.set_input_embeddings(value)

    def get_output_embeddings(self):
        """The SLM's head."""
        return self.slm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        """Replaces the SLM's head."""
        self.slm.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """Resizes the SLM's vocabulary; one shared with the LLM keeps the ids of the prompt's tokens."""
        if self.config.shared_tokenizer and new_num_tokens is not None:
            lowest, highest = self.config.llm_text_config.vocab_size, None
            if self.prompt_token_map is not None:
                lowest, highest = int(self.prompt_token_map.max()) + 1, lowest - 1
            if new_num_tokens < lowest or (highest is not None and new_num_tokens > highest):
                raise ValueError(
                    f"With a tokenizer shared with the LLM the SLM's vocabulary must have at least {lowest}"
                    f"{'' if highest is None else f' and at most {highest}'} tokens, got {new_num_tokens}."
                )
        embeddings = self.slm.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.slm_config = self.slm.config
        return embeddings

    @property
    def vocab_size(self) -> int:
        """The SLM's, as `resize_token_embeddings` leaves it."""
        return self.config.vocab_size

    def get_decoder(self):
        """The SLM's decoder."""
        return self.slm.get_decoder()

    @property
    def base_model(self) -> nn.Module:
        """All but the SLM's head: what TRL's trainers call, to compute loss and metrics with the head themselves."""
        return LLM2SLMBackbone(self)

    model = base_model  # where TRL looks for it with Transformers 4

    # ----------------------------------------------------------------------------------------------- encode a prompt
    def encode_prompt(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_hidden_states: torch.Tensor | None = None,
    ) -> PromptEncoding:
        r"""
        Encodes the prompt with the frozen LLM and projects it to the SLM's width (paper, section 3).

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*):
                Prompt ids of the *LLM's* tokenizer. Needed without `prompt_hidden_states`, and with them if
                `fusion="add"` adds to the SLM's own embeddings.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*):
                1 for tokens, 0 for padding on either side. All ones if omitted.
            prompt_hidden_states (`torch.Tensor`, *optional*):
                The LLM's states of this prompt, of shape `(batch_size, prompt_length, prompt_hidden_size)`, from
                [`~LLM2SLMForConditionalGeneration.encode_hidden_states`]. Given, the LLM is not run, and need not be
                loaded.

        Returns:
            [`PromptEncoding`] with `prompt_embeds` of shape `(batch_size, prompt_length, slm_hidden_size)`.

        Raises:
            ValueError: if shapes disagree, a row has no token, ids are outside the LLM's vocabulary, the prompt is
                longer than the LLM's or the SLM's positions, or states are of the wrong width or not finite.
        """
        adds_own_embeddings = self.config.fusion == "add" and self.config.shared_tokenizer
        if prompt_hidden_states is None:
            prompt_hidden_states = self.encode_hidden_states(input_ids, attention_mask)
            if attention_mask is None:
                attention_mask = torch.ones(prompt_hidden_states.shape[:2], dtype=torch.long)
            prompt_hidden_states = _fill_masked(prompt_hidden_states, attention_mask)
        else:
            prompt_hidden_states, attention_mask = self._check_prompt_states(
                "prompt_hidden_states", prompt_hidden_states, self.config.prompt_hidden_size, attention_mask
            )
            if adds_own_embeddings:
                self._check_ids_of_states(input_ids, prompt_hidden_states, attention_mask)
        device = self.projector.out.weight.device
        attention_mask = attention_mask.to(device).long()
        # (batch_size, prompt_length, slm_hidden_size)
        prompt_embeds = self.projector(prompt_hidden_states.to(device))
        if adds_own_embeddings:
            prompt_embeds = prompt_embeds + self._embed_prompt(input_ids, attention_mask)
        return PromptEncoding(prompt_embeds=prompt_embeds, attention_mask=attention_mask)

    def _embed_prompt(self, input_ids, attention_mask):
        """The SLM's embeddings of the LLM's ids."""
        ids = input_ids.to(attention_mask.device).masked_fill(attention_mask == 0, 0)
        if self.prompt_token_map is not None:
            ids = self.prompt_token_map.to(ids.device)[ids].long()
        return self._embed_with_slm(ids)

    def _embed_with_slm(self, ids):
        """
        What the SLM makes of its ids before its first layer. -1 is a token that it lacks and gets the mean of all: in
        place of it, nothing but a projection would be of a size that the SLM has not learned to read.
        """
        embeddings = self.slm.get_input_embeddings()
        # Marian and Pegasus scale ids' embeddings, but not ours.
        scaled_outside = self.config.slm_config.is_encoder_decoder and type(embeddings) is nn.Embedding
        scale = getattr(self.slm.get_encoder(), "embed_scale", 1.0) if scaled_outside else 1.0
        embeds, lacking = embeddings(ids.clamp(min=0)), ids < 0
        if lacking.any():
            every = torch.arange(self.config.vocab_size, device=ids.device)
            embeds = torch.where(lacking[..., None], embeddings(every).mean(dim=0), embeds)
        return embeds * scale

    @torch.no_grad()
    def encode_hidden_states(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        r"""
        Runs the frozen LLM and returns the states the projector reads, of shape
        `(batch_size, prompt_length, prompt_hidden_size)` in the LLM's dtype: those of `config.prompt_layers`,
        concatenated. They depend on the LLM alone, so they can be cached for a whole training.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): Ids of the LLM's tokenizer.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*): All ones if omitted.

        Raises:
            ValueError: if the LLM is not loaded, or ids and mask are invalid (see `encode_prompt`).
        """
        input_ids, attention_mask = self._check_prompt_ids(input_ids, attention_mask)
        if self.llm is None:
            raise ValueError("The frozen LLM is not loaded: call `load_llm()`, or pass `prompt_hidden_states`.")
        # Padding on the right gives every kind of LLM the right positions, whether or not it takes `position_ids`.
        attention_mask = attention_mask.to(self.llm.device)
        order = _padding_order(attention_mask, "right")
        input_ids, attention_mask = input_ids.to(self.llm.device).gather(1, order), attention_mask.gather(1, order)
        arguments = {"use_cache": False} if "use_cache" in _arguments(type(self.llm).forward) else {}
        num_layers = self.config.llm_text_config.num_hidden_layers
        hidden_states: Any = None
        for rows in self._rows_run_together(attention_mask):
            longest = _longest(attention_mask[rows])
            with record_layer_states(self.llm, self.config.prompt_layers, num_layers) as states:
                prompt = {"input_ids": input_ids[rows, :longest], "attention_mask": attention_mask[rows, :longest]}
                self.llm(**prompt, **arguments, return_dict=True)
            # (number of rows, longest, prompt_hidden_size)
            row_states = torch.cat([states[layer] for layer in self.config.prompt_layers], dim=-1)
            if hidden_states is None:
                hidden_states = row_states.new_zeros(*input_ids.shape, row_states.shape[-1])
            hidden_states[rows, :longest] = row_states
        return _reordered(hidden_states, order.argsort(dim=1))  # (batch_size, prompt_length, prompt_hidden_size)

    def _rows_run_together(self, attention_mask) -> list[list[int]]:
        """
        The rows of a batch in one or more runs of the LLM. On a CPU, padding takes as long as text does, so rows of
        other lengths are worth a run of their own when they save `RUN_TOKENS` of padding; a GPU takes them at once.
        """
        if self.llm.device.type != "cpu":
            return [list(range(len(attention_mask)))]
        lengths = attention_mask.sum(dim=1).tolist()
        rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        # best[n]: the least time, in tokens, for the n longest rows, and where the last run of them begins.
        best = [(0, 0)]
        for end in range(1, len(rows) + 1):
            times = ((best[i][0] + lengths[rows[i]] * (end - i) + RUN_TOKENS, i) for i in range(end))
            best.append(min(times))
        runs, end = [], len(rows)
        while end > 0:
            start = best[end][1]
            runs.append(rows[start:end])
            end = start
        return runs

    def _check_prompt_ids(self, input_ids, attention_mask):
        if input_ids is None:
            raise ValueError("Pass the prompt: `input_ids`, `prompt_hidden_states` or `prompt_embeds`.")
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"`input_ids` must have shape (batch_size, prompt_length) with at least one token, got "
                f"{tuple(input_ids.shape)}."
            )
        attention_mask = _check_attention_mask(attention_mask, "input_ids", input_ids)
        # What pads the prompts may be unknown to the LLM (a pipeline pads with the SLM's token).
        input_ids = input_ids.masked_fill(attention_mask.to(input_ids.device) == 0, 0)
        llm_config = self.config.llm_text_config
        lowest, highest = int(input_ids.min()), int(input_ids.max())
        if lowest < 0 or highest >= llm_config.vocab_size:
            raise ValueError(
                f"`input_ids` must be ids of the LLM's tokenizer, from 0 to {llm_config.vocab_size - 1}; found "
                f"{lowest if lowest < 0 else highest}."
            )
        self._check_positions("LLM", llm_config, _longest(attention_mask))
        self._check_positions("SLM", self.config.slm_config.get_text_config(), _longest(attention_mask))
        return input_ids, attention_mask

    def _check_ids_of_states(self, input_ids, prompt_hidden_states, attention_mask):
        if input_ids is None:
            raise ValueError(
                "`fusion='add'` with a shared tokenizer adds to the SLM's own embeddings of the prompt: pass "
                "`input_ids` with `prompt_hidden_states`."
            )
        if input_ids.shape != attention_mask.shape:
            raise ValueError(
                f"`input_ids` {tuple(input_ids.shape)} and `prompt_hidden_states` "
                f"{tuple(prompt_hidden_states.shape)} must be of one batch size and prompt length."
            )
        self._check_prompt_ids(input_ids, attention_mask)

    def _check_prompt_states(self, name, states, width, attention_mask):
        if states.ndim != 3 or states.shape[-1] != width or states.shape[1] == 0:
            raise ValueError(
                f"`{name}` must have shape (batch_size, prompt_length, {width}), got {tuple(states.shape)}."
            )
        attention_mask = _check_attention_mask(attention_mask, name, states)
        states = _fill_masked(states, attention_mask)
        if not torch.isfinite(states).all():
            raise ValueError(f"`{name}` has NaN or infinite values at positions that are not masked.")
        self._check_positions("SLM", self.config.slm_config.get_text_config(), _longest(attention_mask))
        return states, attention_mask

    def _check_positions(self, model_name, config, length, what="prompt has"):
        limit = max_positions(config)
        if limit is not None and length > limit:
            raise ValueError(
                f"The {what} {length} tokens, but the {model_name} ({config.model_type}) has {limit} positions. "
                f"Tokenize with `truncation=True, max_length=...`, or choose a model with more positions."
            )

    # ------------------------------------------------------------------------------------------------------- forward
    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Shifts `labels` of shape `(batch_size, response_length)` right, behind the decoder's start token."""
        if self.config.slm_config.is_encoder_decoder:
            return self.slm.prepare_decoder_input_ids_from_labels(labels)
        decoder_input_ids = labels.new_full(labels.shape, self.config.decoder_start_token_id)
        decoder_input_ids[:, 1:] = labels[:, :-1]
        pad_token_id = self.config.pad_token_id if self.config.pad_token_id is not None else 0
        return decoder_input_ids.masked_fill(decoder_input_ids == -100, pad_token_id)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        prompt_hidden_states: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput | tuple:
        r"""
        Scores a response to a prompt.

        Args:
            input_ids, attention_mask, prompt_hidden_states:
                The prompt, as in `encode_prompt`.
            labels (`torch.LongTensor` of shape `(batch_size, response_length)`, *optional*):
                The response's ids of the *SLM's* tokenizer; -100 is ignored. Not shifted: `logits[:, i]` predicts
                `labels[:, i]`.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, response_length)`, *optional*):
                The response shifted right behind `config.decoder_start_token_id`; made from `labels` if omitted. A
                decoder-only SLM does not see the start token: the prompt's last position takes its place.
            decoder_attention_mask (`torch.Tensor` of shape `(batch_size, response_length)`, *optional*):
                1 for tokens, 0 for padding. Made from `labels` if omitted.
            prompt_embeds (`torch.FloatTensor` of shape `(batch_size, prompt_length, slm_hidden_size)`, *optional*):
                An already encoded prompt; the LLM and the projector are not run.
            num_items_in_batch (`int`, *optional*):
                Number of labels in the whole batch that the Trainer accumulates; the loss is then their sum by it.

        Returns:
            `Seq2SeqLMOutput` with `loss` (mean over the labels) and `logits` of shape
            `(batch_size, response_length, vocab_size)`. Its `encoder_...` are the SLM's over the prompt, its
            `decoder_...` those over the response; a decoder-only SLM has both in one sequence, where the last token of
            the prompt predicts the first of the response: its `decoder_attentions` are of shape `(batch_size,
            num_heads, response_length, prompt_length + response_length - 1)`, and `cross_attentions` is `None`.
            `encoder_last_hidden_state` is what the response attends to: the SLM encoder's output, or the prompt
            embeddings of a decoder-only SLM. Prompt positions are those of the call, and 0 where it masks them.

        Raises:
            ValueError: if there is neither `labels` nor `decoder_input_ids`, if they have not one row for each
                prompt, if all labels are -100 or one is outside the SLM's vocabulary, and for an invalid prompt (see
                `encode_prompt`).
        """
        return_dict = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        # PEFT and the trainers pass more than this model takes: `None` for all it does not use, and these two.
        if unknown := {k for k, v in kwargs.items() if v is not None} - {"use_cache", "shift_labels"}:
            raise TypeError(f"`forward` got unexpected arguments: {sorted(unknown)}.")
        outputs_wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        outputs_wanted = {
            name: getattr(self.config, name) if value is None else value
            for name, value in outputs_wanted.items()
            if value is not None or getattr(self.config, name)  # or else as the SLM's configuration says
        }
        prompts = (prompt_embeds, prompt_hidden_states, input_ids)
        num_prompts = next((len(prompt) for prompt in prompts if prompt is not None), None)
        if labels is not None:
            _check_response("labels", labels, num_prompts)
            self._check_labels(labels)
            if decoder_attention_mask is None:
                decoder_attention_mask = response_mask(labels)
            if decoder_input_ids is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        _check_response("decoder_input_ids", decoder_input_ids, num_prompts)
        prompt_embeds, prompt_mask = self._encoded_prompt(
            input_ids, attention_mask, prompt_hidden_states, prompt_embeds
        )
        order = self._slm_order(prompt_mask)
        embeds, mask = _reordered(prompt_embeds, order), _reordered(prompt_mask, order)
        if self.config.slm_config.is_encoder_decoder:
            output = self.slm(
                inputs_embeds=embeds,
                attention_mask=mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                use_cache=False,
                return_dict=True,
                **outputs_wanted,
            )
            output = Seq2SeqLMOutput(**{name: value for name, value in output.items() if name != "loss"})
        else:
            output = self._decoder_only_forward(
                embeds, mask, decoder_input_ids, decoder_attention_mask, outputs_wanted
            )
        if order is not None:
            output = _with_prompt_positions(output, prompt_mask, order, self.config.slm_config.is_encoder_decoder)
        if labels is not None:
            loss = _response_loss(output.logits, labels, num_items_in_batch)
            output = Seq2SeqLMOutput(loss=loss, **output)
        return output if return_dict else output.to_tuple()

    def _decoder_only_forward(
        self, prompt_embeds, prompt_mask, decoder_input_ids, decoder_attention_mask, outputs_wanted
    ):
        """One sequence: padding, prompt, response, padding. The prompt's last position predicts the first label."""
        response_ids = decoder_input_ids[:, 1:].to(prompt_embeds.device)
        response_mask = torch.ones_like(response_ids)
        if decoder_attention_mask is not None:
            response_mask = decoder_attention_mask[:, 1:]
        response_embeds = self.slm.get_input_embeddings()(response_ids).to(prompt_embeds.dtype)
        inputs_embeds = torch.cat([prompt_embeds, response_embeds], dim=1)  # (batch, prompt + response - 1, hidden)
        mask = torch.cat([prompt_mask, response_mask.to(prompt_mask)], dim=1)
        self._check_positions("SLM", self.config.slm_config.get_text_config(), _longest(mask), _PROMPT_AND_RESPONSE)
        arguments = _arguments(type(self.slm).forward)
        optional = dict(outputs_wanted)
        if "position_ids" in arguments:
            optional["position_ids"] = _position_ids(mask)
        response_length = decoder_input_ids.shape[1]
        if "logits_to_keep" in arguments:  # no head for the prompt's positions
            optional["logits_to_keep"] = response_length
        output = self.slm(
            inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False, return_dict=True, **optional
        )
        hidden_states, attentions = output.get("hidden_states"), output.get("attentions")
        if attentions and attentions[0] is None:  # what attention gives that does not give its weights
            attentions = None
        prompt_length = prompt_embeds.shape[1]
        return Seq2SeqLMOutput(
            logits=output.logits[:, -response_length:],  # (batch_size, response_length, vocab_size)
            decoder_hidden_states=hidden_states and tuple(state[:, -response_length:] for state in hidden_states),
            decoder_attentions=attentions and tuple(weights[:, :, -response_length:] for weights in attentions),
            encoder_hidden_states=hidden_states and tuple(state[:, :prompt_length] for state in hidden_states),
            encoder_attentions=attentions
            and tuple(weights[:, :, :prompt_length, :prompt_length] for weights in attentions),
            encoder_last_hidden_state=prompt_embeds,
        )

    def _encoded_prompt(self, input_ids, attention_mask, prompt_hidden_states, prompt_embeds):
        """Embeddings and mask of the prompt, as the caller padded it."""
        if prompt_embeds is None:
            encoding = self.encode_prompt(input_ids, attention_mask, prompt_hidden_states)
            return encoding.prompt_embeds, encoding.attention_mask
        prompt_embeds, mask = self._check_prompt_states(
            "prompt_embeds", prompt_embeds, self.config.slm_hidden_size, attention_mask
        )
        return prompt_embeds, mask.to(prompt_embeds.device)

    def _slm_order(self, mask) -> torch.Tensor | None:
        """
        The prompt's positions as the SLM takes them, `(batch_size, longest)`: padded on the side that its positions
        are right with, less what is padding in every row. `None` for a prompt without padding.
        """
        longest = _longest(mask)
        if longest * len(mask) == int(mask.sum()) and longest == mask.shape[1]:
            return None
        if self.config.slm_config.is_encoder_decoder:
            return _padding_order(mask, "right")[:, :longest]
        return _padding_order(mask, "left")[:, -longest:]

    def _prompt_for_slm(self, input_ids, attention_mask, prompt_hidden_states, prompt_embeds):
        """Embeddings and mask of the prompt in `_slm_order`."""
        embeds, mask = self._encoded_prompt(input_ids, attention_mask, prompt_hidden_states, prompt_embeds)
        order = self._slm_order(mask)
        return _reordered(embeds, order), _reordered(mask, order)

    def _check_labels(self, labels):
        highest, lowest = int(labels.max()), int(labels.masked_fill(labels == -100, 0).min())
        if highest == -100:
            raise ValueError("All `labels` are -100: there is no response to learn from.")
        if highest >= self.config.vocab_size or lowest < 0:
            raise ValueError(
                f"`labels` must be ids of the SLM's tokenizer, from 0 to {self.config.vocab_size - 1}, or -100; found "
                f"{lowest if lowest < 0 else highest}."
            )

    # ------------------------------------------------------------------------------------------------------ generate
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
        **kwargs,
    ):
        r"""
        Writes the response: encodes and projects the prompt exactly once, the SLM does the rest. Takes every argument
        of [`~transformers.GenerationMixin.generate`].

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*):
                Same as `input_ids`.
            input_ids, attention_mask, prompt_hidden_states:
                The prompt, as in `encode_prompt`.
            prompt_embeds (`torch.FloatTensor` of shape `(batch_size, prompt_length, slm_hidden_size)`, *optional*):
                An encoded prompt, from `encode_prompt`: many calls, one encode.
            fast (`bool`, *optional*, defaults to `False`):
                Greedy search, sampling and beam search with a compiled step of the SLM: the same tokens in a fraction
                of the time, on CPU for up to 8 responses or beams at a time (4 in bfloat16 where the CPU has matrix
                units for it). The first call takes some 20 seconds to compile (a few where the compiler's cache on
                disk serves), as does the first of more than one response or beam. It needs what `torch.compile` needs
                (on CPU a C++ compiler); what it cannot do is decoded in the plain way, with a note.

        Returns:
            The response's ids, of shape `(batch_size * num_return_sequences, response_length)`, or a `ModelOutput`.
            An encoder-decoder SLM's begin with its start token, as everywhere in Transformers. `max_length` and
            `max_new_tokens` both mean the response.

        Raises:
            ValueError: for an invalid prompt (see `encode_prompt`), and if the model is used as the `assistant_model`
                of a decoder-only LLM.
        """
        # 1. One generation config: the call's arguments, then the given config, then this model's.
        given, generation_config = generation_config, copy.deepcopy(self.generation_config)
        if given is not None:
            changes = given.to_diff_dict()
            changes.pop("transformers_version", None)
            generation_config.update(**changes)
        model_kwargs = generation_config.update(**kwargs)
        # 2. The Trainer passes the whole batch; the response is what is asked for here.
        for name in ("labels", "shift_labels", "decoder_input_ids", "decoder_attention_mask"):
            model_kwargs.pop(name, None)
        # Stop strings are matched against the SLM's vocabulary; encoder-decoders of Transformers 4 take no tokenizer.
        tokenizer = model_kwargs.pop("tokenizer", None)
        if generation_config.stop_strings is not None and tokenizer is not None:
            tokenizer = getattr(tokenizer, "slm_tokenizer", tokenizer)
            criteria = [*(model_kwargs.get("stopping_criteria") or [])]
            criteria.append(StopStringCriteria(tokenizer, generation_config.stop_strings))
            model_kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
            generation_config.stop_strings = None
        # 3. Prompt phase: the only place where the LLM runs.
        input_ids = inputs if input_ids is None else input_ids
        embeds, mask = self._prompt_for_slm(input_ids, attention_mask, prompt_hidden_states, prompt_embeds)
        if not self.config.slm_config.is_encoder_decoder:
            if embeds.shape[1] == 1:  # Transformers 4 would feed a prompt of one position again at each step
                mask, embeds = nn.functional.pad(mask, (1, 0)), nn.functional.pad(embeds, (0, 0, 1, 0))
            _lengths_mean_the_response(generation_config)
            length = _longest(mask) + (generation_config.max_new_tokens or 0)
            self._check_positions("SLM", self.config.slm_config.get_text_config(), length, _PROMPT_AND_RESPONSE)
        # 4. Decode: the SLM alone.
        if fast:
            return generate_fast(self.slm, embeds, mask, generation_config, **model_kwargs)
        return self.slm.generate(
            inputs_embeds=embeds, attention_mask=mask, generation_config=generation_config, **model_kwargs
        )


# ----------------------------------------------------------------------------------------------------- TRL's trainers
class LLM2SLMBackbone(nn.Module):
    """A view of a model, without parameters of its own, that returns the states which enter the SLM's head."""

    _tp_plan = _pp_plan = None

    def __init__(self, model: LLM2SLMForConditionalGeneration):
        super().__init__()
        self._whole = (model,)  # in a tuple: the model is not a part of its view

    def forward(self, decoder_input_ids: torch.Tensor | None = None, **inputs) -> BaseModelOutput:
        r"""
        Takes what [`LLM2SLMForConditionalGeneration`] takes, but `labels`.

        Returns:
            `BaseModelOutput` with `last_hidden_state` of shape `(batch_size, response_length, slm_hidden_size)`.

        Raises:
            ValueError: without `decoder_input_ids`, and for an SLM that adds a bias behind its head.
        """
        model = self._whole[0]
        if decoder_input_ids is None:
            raise ValueError(
                "SFTTrainer needs batches with `decoder_input_ids`: pass it "
                "`data_collator=DataCollatorForLLM2SLM(tokenizer, model=model)`."
            )
        bias = getattr(model.slm, "final_logits_bias", None)  # BART, Marian, Pegasus
        if bias is not None and bias.any():
            raise ValueError(
                f"SFTTrainer computes the loss from the head's weights alone, but {type(model.slm).__name__} adds "
                "`final_logits_bias` to what they give: train it with Seq2SeqTrainer."
            )
        entering = []

        def keep_states(head, args):
            entering.append(args[0])
            return (args[0][:, :1],)  # the head itself has nothing to do

        handle = model.get_output_embeddings().register_forward_pre_hook(keep_states)
        try:  # the class's own forward: the trainer has replaced the model's
            LLM2SLMForConditionalGeneration.forward(model, decoder_input_ids=decoder_input_ids, **inputs)
        finally:
            handle.remove()
        return BaseModelOutput(last_hidden_state=entering[0][:, -decoder_input_ids.shape[1] :])


# ------------------------------------------------------------------------------------------------- tensors and masks
def _check_attention_mask(attention_mask, name, tensor):
    if attention_mask is None:
        return torch.ones(tensor.shape[:2], dtype=torch.long, device=tensor.device)
    if attention_mask.shape != tensor.shape[:2]:
        raise ValueError(
            f"`attention_mask` must have shape {tuple(tensor.shape[:2])} like `{name}`, got "
            f"{tuple(attention_mask.shape)}."
        )
    empty = (attention_mask != 0).sum(dim=1) == 0
    if empty.any():
        raise ValueError(f"Row {int(empty.long().argmax())} of `attention_mask` has no token: its prompt is empty.")
    return attention_mask.long()


def _check_token_map(token_map, config: LLM2SLMConfig) -> torch.Tensor | None:
    llm_vocab_size, slm_vocab_size = config.llm_text_config.vocab_size, config.vocab_size
    sizes = f"the LLM's vocabulary has {llm_vocab_size} tokens, the SLM's {slm_vocab_size}"
    if token_map is None:
        if config.maps_prompt_tokens:
            raise ValueError(
                f"`shared_tokenizer=True` with a trimmed vocabulary ({sizes}) needs `prompt_token_map`: the SLM's id "
                "of each token of the LLM, -1 for none. With different tokenizers leave `shared_tokenizer=False`: "
                "`fusion='add'` then adds to a learned projection of the LLM's input embeddings."
            )
        return None
    if not config.maps_prompt_tokens:
        raise ValueError(
            "`prompt_token_map` is for `shared_tokenizer=True` with an SLM vocabulary smaller than the LLM's, got "
            f"`shared_tokenizer={config.shared_tokenizer}` where {sizes}."
        )
    token_map = torch.as_tensor(token_map)
    if token_map.is_floating_point() or token_map.shape != (llm_vocab_size,):
        raise ValueError(
            f"`prompt_token_map` must be integers of shape ({llm_vocab_size},), one for each token of the LLM, got "
            f"{token_map.dtype} of shape {tuple(token_map.shape)}."
        )
    lowest, highest = int(token_map.min()), int(token_map.max())
    if lowest < -1 or highest >= slm_vocab_size:
        raise ValueError(
            f"`prompt_token_map` must hold ids of the SLM's tokenizer, from 0 to {slm_vocab_size - 1}, or -1; found "
            f"{lowest if lowest < -1 else highest}."
        )
    return token_map


def _check_response(name, ids, num_prompts):
    if ids is None:
        raise ValueError("Pass the response: `labels` or `decoder_input_ids`. To write one, call `generate`.")
    if ids.ndim != 2 or ids.shape[1] == 0 or (num_prompts is not None and len(ids) != num_prompts):
        batch_size = "batch_size" if num_prompts is None else num_prompts
        raise ValueError(
            f"`{name}` must have shape ({batch_size}, response_length), one row for each prompt, got "
            f"{tuple(ids.shape)}."
        )


def response_mask(labels: torch.Tensor) -> torch.Tensor:
    """The `decoder_attention_mask` of `labels`: position i is fed label i - 1, the first the start token."""
    return torch.cat([torch.ones_like(labels[:, :1]), (labels[:, :-1] != -100).long()], dim=1)


def _longest(mask: torch.Tensor) -> int:
    """Tokens of the longest row."""
    return int(mask.sum(dim=1).max())


def _fill_masked(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zero at masked positions. They may hold anything, NaN too: the SLM masks them, but 0 * NaN is NaN."""
    return states.masked_fill(mask[:, :, None].to(states.device) == 0, 0.0)


@functools.cache
def _arguments(function) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _padding_order(mask: torch.Tensor, side: str) -> torch.Tensor:
    """The order of positions that moves padding to `side` and keeps the tokens' own order."""
    return torch.argsort((mask != 0).long(), dim=1, stable=True, descending=side == "right")


def _reordered(tensor: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The positions of `tensor`, `(batch_size, length)` or `(batch_size, length, width)`, in this order."""
    if order is None:
        return tensor
    return tensor.gather(1, order if tensor.ndim == 2 else order[:, :, None].expand(-1, -1, tensor.shape[-1]))


def _with_prompt_positions(output, mask, order, is_encoder_decoder) -> Seq2SeqLMOutput:
    """What the SLM says of a prompt in this order, where `mask` has the prompt's tokens; 0 for padding."""

    def restored(tensor, dim):
        in_order, rest = tensor.split([order.shape[1], tensor.shape[dim] - order.shape[1]], dim=dim)
        shape = [len(order), *(order.shape[1] if i == dim else 1 for i in range(1, tensor.ndim))]
        index, is_token = (t.to(tensor.device).view(shape) for t in (order, mask.gather(1, order) != 0))
        zeros = tensor.new_zeros(*tensor.shape[:dim], mask.shape[1], *tensor.shape[dim + 1 :])
        placed = zeros.scatter(dim, index.expand_as(in_order), in_order.masked_fill(~is_token, 0.0))
        return torch.cat([placed, rest], dim=dim)

    # Which dimensions of each are the prompt's: attentions are (batch_size, num_heads, queries, keys).
    dims = {"encoder_last_hidden_state": (1,), "encoder_hidden_states": (1,), "encoder_attentions": (2, 3)}
    dims["cross_attentions" if is_encoder_decoder else "decoder_attentions"] = (3,)
    for name, prompt_dims in dims.items():
        for dim in prompt_dims:
            if isinstance(output.get(name), tuple):  # of `None` where attention gives no weights
                output[name] = tuple(tensor if tensor is None else restored(tensor, dim) for tensor in output[name])
            elif output.get(name) is not None:
                output[name] = restored(output[name], dim)
    return output


_PROMPT_AND_RESPONSE = "prompt and the response have"


def _position_ids(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def _response_loss(logits, labels, num_items_in_batch):
    labels = labels.to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction=reduction
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _lengths_mean_the_response(generation_config):
    """With `inputs_embeds` a decoder-only `generate` counts the prompt in `max_length` and `min_length`."""
    if generation_config.max_new_tokens is None and generation_config.max_length is not None:
        generation_config.max_new_tokens, generation_config.max_length = generation_config.max_length, None
    if generation_config.min_new_tokens is None and generation_config.min_length:
        generation_config.min_new_tokens, generation_config.min_length = generation_config.min_length, None


@torch.no_grad()
def _init_linear(linear: nn.Linear, output_std: float):
    """Outputs of standard deviation `output_std` for inputs of standard deviation 1."""
    linear.weight.normal_(mean=0.0, std=output_std / linear.in_features**0.5)
    linear.bias.zero_()


__all__ = ["LLM2SLMForConditionalGeneration", "PromptEncoding"]
