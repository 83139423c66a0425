"""What trainers ask of the model: a frozen LLM, PEFT in the SLM alone, and for TRL the states that enter the head.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .layers_llm2slm import with_forward, with_modules


class LLM2SLMTrainingMixin(PreTrainedModel):
    """Gives [`LLM2SLMForConditionalGeneration`] a frozen LLM, whatever is called, and what trainers look for."""

    # ------------------------------------------------------------------------------------- frozen, whatever is called
    def train(self, mode: bool = True):
        """Sets projector and SLM to training mode; the frozen LLM stays in eval mode."""
        self._take_adapters_out_of_llm()
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

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "peft_config" and self.llm is not None:  # PEFT sets it once its layers are in
            self._take_adapters_out_of_llm()
            if all(_wrapped_by_peft(module) is None for module in self.modules()):
                raise ValueError(
                    "The LLM is frozen, and `target_modules` match layers of it alone: choose the SLM's, such as "
                    r"`r'slm\..*\.(q_proj|v_proj)'`."
                )

    def _take_adapters_out_of_llm(self):
        """PEFT finds layers by their names, in the frozen LLM too, where adapters would get no gradient."""
        if self.llm is None:
            return
        self.llm.requires_grad_(False)  # `bias="all"` unfreezes some
        wrappers = [name for name, module in self.llm.named_modules() if _wrapped_by_peft(module) is not None]
        outermost = [name for name in wrappers if not name.startswith(tuple(f"{other}." for other in wrappers))]
        for name in outermost:
            module = self.llm.get_submodule(name)
            while (inner := _wrapped_by_peft(module)) is not None:
                module = inner
            parent, _, child = name.rpartition(".")
            setattr(self.llm.get_submodule(parent), child, module)
        if outermost:
            warnings.warn(
                f"The LLM is frozen: PEFT's layers were taken out of it again ({len(outermost)}, the first at "
                f"'llm.{outermost[0]}'). To match the SLM's alone write, e.g., "
                r"`target_modules=r'slm\..*\.(q_proj|v_proj)'`, or pass `exclude_modules=r'llm\..*'`.",
                stacklevel=2,
            )

    @property
    def _tied_weights_keys(self):
        """The SLM's, by their names here: a mapping in Transformers 5, in 4 a list of how names end. PEFT reads it."""
        keys = self.slm._tied_weights_keys
        if isinstance(keys, dict):
            return {f"slm.{target}": f"slm.{source}" for target, source in keys.items()}
        ends = tuple(f".{key.removesuffix('.weight')}" for key in keys or ())
        names = (f"slm.{name}" for name, _ in self.slm.named_modules(remove_duplicate=False))
        return [f"{name}.weight" for name in names if name.endswith(ends)]

    # ------------------------------------------------------------------------------------------------ TRL's trainers
    @property
    def base_model(self) -> nn.Module:
        """All but the SLM's head: what TRL's trainers call, to compute loss and metrics with the head themselves."""
        return LLM2SLMBackbone(self)

    model = base_model  # where TRL looks for it with Transformers 4


class LLM2SLMBackbone(nn.Module):
    """A view of a model, without parameters of its own, that returns the states which enter the SLM's head."""

    _tp_plan = _pp_plan = None

    def __init__(self, model: Any):
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
        if getattr(model.get_output_embeddings(), "token_adapter", None) is not None:
            raise ValueError(
                "SFTTrainer computes the loss from the head's weights alone, but `trainable_token_indices` of an SLM "
                "with tied embeddings puts a layer of PEFT around the head: train it with Seq2SeqTrainer."
            )
        entering = []
        head = model.get_output_embeddings()

        def keep_states(forward):
            def keeping(states):
                entering.append(states)
                return forward(states[:, :1])  # the head itself has nothing to do

            return keeping

        # A copy for this call whose head keeps what enters it; the class's own forward, since the trainer has replaced
        # the model's.
        model = with_modules(model, {head: with_forward(head, keep_states)})
        type(model).forward(model, decoder_input_ids=decoder_input_ids, **inputs)
        return BaseModelOutput(last_hidden_state=entering[0][:, -decoder_input_ids.shape[1] :])


def _wrapped_by_peft(module: nn.Module) -> nn.Module | None:
    """The module inside, if PEFT has made this one: for `target_modules`, `modules_to_save`, single tokens."""
    inner = (module._modules.get(name) for name in ("base_layer", "original_module", "token_adapter"))
    return next((found for found in inner if found is not None), None)


def uses_checkpointing(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
