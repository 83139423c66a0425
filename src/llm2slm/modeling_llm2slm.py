"""LLM-to-SLM: a frozen LLM encodes the prompt once, a small language model (SLM) writes the response.

Method: Bergner et al., "Think Big, Generate Quick: LLM-to-SLM for Fast Autoregressive Decoding" (arXiv 2402.16844).
The file reads top to bottom: output, the model (build, encode, forward). Beside it stand composing_llm2slm.py (a pair
of two pretrained models), projector_llm2slm.py, inputs_llm2slm.py (checks and masks), checkpoint_llm2slm.py (loading
and saving), generation_llm2slm.py (`generate`), training_llm2slm.py (what trainers ask of the model).

Choices made here:
- A call changes nothing that another thread's call may use: what has to differ, such as layers that keep their states,
  is a shallow copy for the call (layers_llm2slm.py).

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import copy
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput, Seq2SeqLMOutput

from .arguments_llm2slm import only_special_tokens
from .checkpoint_llm2slm import LLM2SLMPreTrainedModel
from .composing_llm2slm import LLM2SLMComposingMixin
from .configuration_llm2slm import LLM2SLMConfig
from .generation_llm2slm import LLM2SLMGenerationMixin
from .inputs_llm2slm import (
    PROMPT_AND_RESPONSE,
    as_ids,
    check_ids_of_states,
    check_labels,
    check_positions,
    check_prompt_ids,
    check_prompt_kwargs,
    check_prompt_states,
    check_response,
    check_tensor,
    fill_masked,
    longest_row,
    num_prompts,
    padding_order,
    positions_of,
    reordered,
    response_mask,
    with_prompt_positions,
)
from .layers_llm2slm import LayerStates, truncate, without_head
from .loading_llm2slm import compute_device, is_offloaded, llm_auto_class, slm_auto_class
from .projector_llm2slm import LLM2SLMProjector, LLM2SLMStandardization, init_linear
from .training_llm2slm import LLM2SLMTrainingMixin, uses_checkpointing

if TYPE_CHECKING:  # this file's relative imports complete the checkpoint (Transformers 4 asks no other file for any)
    from .beams_llm2slm import search_beams  # noqa: F401
    from .decoding_llm2slm import generate_fast  # noqa: F401
    from .drafter_llm2slm import Drafter  # noqa: F401
    from .drafting_llm2slm import LosslessGenerationMixin  # noqa: F401
    from .few_rows_llm2slm import EagerFewRows  # noqa: F401
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


class LLM2SLMForConditionalGeneration(
    LLM2SLMPreTrainedModel, LLM2SLMComposingMixin, LLM2SLMTrainingMixin, LLM2SLMGenerationMixin, GenerationMixin
):
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
            self.llm = self._reader(llm)
        self.projector = LLM2SLMProjector(config)
        self.register_buffer("prompt_token_map", None)
        if config.maps_prompt_tokens:
            self.prompt_token_map = torch.full((config.llm_text_config.vocab_size,), -1, dtype=torch.int32)
        self.slm = slm_auto_class(config.slm_config).from_config(config.slm_config) if slm is None else slm
        config.slm_config = self.slm.config  # one object: what changes the SLM is said of the pair
        # How to generate is said in one place, this model's generation config: the SLM's own keeps its tokens only.
        self.slm.generation_config = only_special_tokens(self.slm.generation_config)
        # Neither a quantizer nor float16 may touch what each part says of itself (Transformers 5 asks them) and, of a
        # quantized model, the projector, which is small and all that the SLM learns of the LLM.
        kept = {name for part in (self.llm, self.slm) if part is not None for name in part._keep_in_fp32_modules or ()}
        quantized = getattr(config, "quantization_config", None) is not None
        self._keep_in_fp32_modules = sorted(kept | ({"projector"} if quantized else set()))
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
            init_linear(module, output_std=1.0 if module is self.projector.hidden else 0.02)

    def _reader(self, llm: PreTrainedModel) -> PreTrainedModel:
        """What of `llm` reads the prompt, up to the highest layer asked for, frozen and in eval mode."""
        reader = self._prompt_part(llm)
        num_layers, depth = self.config.llm_text_config.num_hidden_layers, max(self.config.prompt_layers)
        reader = truncate(reader, num_layers, depth) if depth < num_layers else reader
        return reader.requires_grad_(False).eval()

    def _prompt_part(self, llm: PreTrainedModel) -> PreTrainedModel:
        """What of `llm` returns hidden states of the prompt."""
        if not self.config.llm_config.is_encoder_decoder:
            return without_head(llm)
        # An encoder of Transformers 4 has no such method.
        return llm.get_encoder() if hasattr(llm, "get_encoder") else llm

    def _apply(self, fn, recurse=True):
        """`to` and its kin move projector and SLM; an offloaded LLM is where its device map says."""
        # One that is on meta without accelerate has just been made there, and gets its place now.
        if self.llm is None or not is_offloaded(self.llm) or compute_device(self.llm).type == "meta":
            return super()._apply(fn, recurse)
        llm, self._modules["llm"] = self.llm, None
        try:
            return super()._apply(fn, recurse)
        finally:
            self._modules["llm"] = llm

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
        return self.slm.resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @property
    def vocab_size(self) -> int:
        """The SLM's, as `resize_token_embeddings` leaves it."""
        return self.config.vocab_size

    def get_decoder(self):
        """The SLM's decoder."""
        return self.slm.get_decoder()

    # What Transformers gives to every model and this one cannot do: it would come to nothing, or to an obscure error.
    def set_encoder(self, encoder, modality=None):
        """What encodes the prompt is the LLM, which the projector was trained for."""
        raise NotImplementedError(
            "The prompt is encoded by the LLM: `load_llm` loads it, and `from_llm_slm_pretrained` builds a pair on "
            "another."
        )

    def set_decoder(self, decoder):
        """What writes the response is the SLM, which the projector was trained for."""
        raise NotImplementedError("Set the decoder of the SLM by itself, before `from_llm_slm_pretrained`.")

    def prune_heads(self, heads_to_prune):
        """The heads are the SLM's."""
        raise NotImplementedError("Prune the SLM by itself, before `from_llm_slm_pretrained`: `slm.prune_heads(...)`.")

    def init_continuous_batching(self, *args, **kwargs):
        """Continuous batching, `generate_batch` among it, reads token ids alone, and the SLM's prompts are states."""
        raise NotImplementedError(
            "Continuous batching takes token ids, but the SLM reads projected states: call `generate` on padded "
            "batches."
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

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
        input_ids = as_ids("input_ids", input_ids)
        if prompt_hidden_states is None:
            prompt_hidden_states = self.encode_hidden_states(input_ids, attention_mask)
            if attention_mask is None:
                attention_mask = torch.ones(prompt_hidden_states.shape[:2], dtype=torch.long)
            prompt_hidden_states = fill_masked(prompt_hidden_states, attention_mask)
        else:
            prompt_hidden_states, attention_mask = check_prompt_states(
                self.config,
                "prompt_hidden_states",
                prompt_hidden_states,
                self.config.prompt_hidden_size,
                attention_mask,
            )
            check_ids_of_states(self.config, input_ids, prompt_hidden_states, attention_mask, adds_own_embeddings)
        device = compute_device(self.projector)
        attention_mask = attention_mask.to(device).long()
        # (batch_size, prompt_length, slm_hidden_size)
        prompt_embeds = self.projector(prompt_hidden_states.to(device))
        if self.projector.out.bias.dtype != self.slm.dtype:  # the projector of a quantized model is not
            prompt_embeds = prompt_embeds.to(self.slm.dtype)
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
        input_ids, attention_mask = check_prompt_ids(self.config, input_ids, attention_mask)
        if self.llm is None:
            raise ValueError("The frozen LLM is not loaded: call `load_llm()`, or pass `prompt_hidden_states`.")
        # Padding on the right gives every kind of LLM the right positions, whether or not it takes `position_ids`.
        attention_mask = attention_mask.to(compute_device(self.llm))
        order = padding_order(attention_mask, "right")
        input_ids, attention_mask = input_ids.to(order.device).gather(1, order), attention_mask.gather(1, order)
        arguments = {"use_cache": False} if "use_cache" in _arguments(type(self.llm).forward) else {}
        reading = LayerStates(self.llm, self.config.prompt_layers, self.config.llm_text_config.num_hidden_layers)
        hidden_states: Any = None
        for rows in self._rows_run_together(attention_mask):
            longest = longest_row(attention_mask[rows])
            prompt = {"input_ids": input_ids[rows, :longest], "attention_mask": attention_mask[rows, :longest]}
            reading.model(**prompt, **arguments, return_dict=True)
            row_states = reading.states().to(order.device)  # (number of rows, longest, prompt_hidden_size)
            if hidden_states is None:
                hidden_states = row_states.new_zeros(*input_ids.shape, row_states.shape[-1])
            hidden_states[rows, :longest] = row_states
        return reordered(hidden_states, order.argsort(dim=1))  # (batch_size, prompt_length, prompt_hidden_size)

    def _rows_run_together(self, attention_mask) -> list[list[int]]:
        """
        The rows of a batch in one or more runs of the LLM. On a CPU, padding takes as long as text does, so rows of
        other lengths are worth a run of their own when they save `RUN_TOKENS` of padding; a GPU takes them at once.
        """
        if attention_mask.device.type != "cpu":
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
        shift_labels: torch.LongTensor | None = None,
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
            shift_labels (`torch.LongTensor` of shape `(batch_size, response_length)`, *optional*):
                In a batch for a trainer, with `decoder_input_ids`: what the loss is of, in place of `labels`.

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
        check_prompt_kwargs(kwargs)
        # PEFT and the trainers pass more than this model takes: `None` for all it does not use, and `use_cache`.
        if unknown := {k for k, v in kwargs.items() if v is not None} - {"use_cache"}:
            raise TypeError(
                f"`forward` got unexpected arguments: {sorted(unknown)}. (PEFT's prompt tuning and prefix tuning pass "
                "some, since they write into the prompt: adapt the SLM's layers instead, e.g. with LoRA.)"
            )
        if self.training and getattr(self.get_input_embeddings(), "neftune_noise_alpha", None) is not None:
            raise ValueError(
                "`neftune_noise_alpha` puts noise on token embeddings, but the SLM reads the prompt as projections of "
                "the LLM's states: leave it out."
            )
        outputs_wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        outputs_wanted = {
            name: getattr(self.config, name) if value is None else value
            for name, value in outputs_wanted.items()
            if value is not None or getattr(self.config, name)  # or else as the SLM's configuration says
        }
        labels, decoder_input_ids = as_ids("labels", labels), as_ids("decoder_input_ids", decoder_input_ids)
        prompts = {
            "prompt_embeds": prompt_embeds,
            "prompt_hidden_states": prompt_hidden_states,
            "input_ids": input_ids,
        }
        for name, prompt in prompts.items():
            check_tensor(name, prompt)
        rows = num_prompts(*prompts.values())
        if labels is not None:
            check_response("labels", labels, rows)
            check_labels(self.config, labels)
            if decoder_attention_mask is None:
                decoder_attention_mask = response_mask(labels)
            if decoder_input_ids is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        check_response("decoder_input_ids", decoder_input_ids, rows)
        check_tensor("decoder_attention_mask", decoder_attention_mask)
        if decoder_attention_mask is not None and decoder_attention_mask.shape != decoder_input_ids.shape:
            raise ValueError(
                f"`decoder_attention_mask` must have shape {tuple(decoder_input_ids.shape)} like the response, got "
                f"{tuple(decoder_attention_mask.shape)}."
            )
        prompt_embeds, prompt_mask = self._encoded_prompt(
            input_ids, attention_mask, prompt_hidden_states, prompt_embeds
        )
        if (
            self.training
            and torch.is_grad_enabled()
            and not prompt_embeds.requires_grad
            and uses_checkpointing(self.slm)
        ):
            # Reentrant checkpointing gives no gradient to adapters behind inputs that need none.
            # `enable_input_require_grads` sees to token embeddings, which the prompt does not pass.
            prompt_embeds = prompt_embeds.detach().requires_grad_()
        order = self._slm_order(prompt_mask)
        embeds, mask = reordered(prompt_embeds, order), reordered(prompt_mask, order)
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
            output = Seq2SeqLMOutput(**output)
        else:
            output = self._decoder_only_forward(
                embeds, mask, decoder_input_ids, decoder_attention_mask, outputs_wanted
            )
        if order is not None:
            output = with_prompt_positions(output, prompt_mask, order, self.config.slm_config.is_encoder_decoder)
        if labels is not None:
            logits = output.logits.contiguous()
            loss = self.loss_function(
                logits,
                labels=None,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=(labels if shift_labels is None else shift_labels).contiguous(),
            )
            output = Seq2SeqLMOutput(loss=loss, **output)
        if shift_labels is not None and kwargs.get("use_cache") is None and "sft" in (self.model_tags or ()):
            # A batch for SFTTrainer (see DataCollatorForLLM2SLM), but not from it, since its calls say `use_cache`:
            # another trainer of the same model does not shift `labels`.
            output["logits"] = output.logits.roll(1, dims=1)
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
        check_positions("SLM", self.config.slm_config.get_text_config(), longest_row(mask), PROMPT_AND_RESPONSE)
        arguments = _arguments(type(self.slm).forward)
        optional = dict(outputs_wanted)
        if "position_ids" in arguments:
            optional["position_ids"] = positions_of(mask)
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
        if input_ids is not None or prompt_hidden_states is not None:
            raise ValueError(
                "`prompt_embeds` are the prompt, already encoded: pass neither `input_ids` nor `prompt_hidden_states` "
                "with them."
            )
        prompt_embeds, mask = check_prompt_states(
            self.config, "prompt_embeds", prompt_embeds, self.config.slm_hidden_size, attention_mask
        )
        # Where and in the dtype that `encode_prompt` gives them.
        device, dtype = compute_device(self.projector), self.slm.dtype
        return prompt_embeds.to(device, dtype), mask.to(device)

    def _slm_order(self, mask) -> torch.Tensor | None:
        """
        The prompt's positions as the SLM takes them, `(batch_size, longest)`: padded on the side that its own
        positions are right with, less what is padding in every row. `None` for a prompt without padding.
        """
        longest = longest_row(mask)
        if longest * len(mask) == int(mask.sum()) and longest == mask.shape[1]:
            return None
        if self.config.slm_config.is_encoder_decoder:
            return padding_order(mask, "right")[:, :longest]
        return padding_order(mask, "left")[:, -longest:]

    def _prompt_for_slm(self, input_ids, attention_mask, prompt_hidden_states, prompt_embeds):
        """Embeddings and mask of the prompt in `_slm_order`."""
        embeds, mask = self._encoded_prompt(input_ids, attention_mask, prompt_hidden_states, prompt_embeds)
        order = self._slm_order(mask)
        return reordered(embeds, order), reordered(mask, order)


@functools.cache
def _arguments(function) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


__all__ = ["LLM2SLMForConditionalGeneration", "PromptEncoding"]
