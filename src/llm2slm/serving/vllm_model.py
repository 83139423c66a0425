"""The pair as vLLM runs it: the SLM is vLLM's own model, the prompt what a multimodal model encodes first."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.inputs import mm_input
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo
from vllm.platforms import current_platform

from .vllm_config import PROMPT, max_prompt_length, placeholder_id, writes_only
from .vllm_encoder import PromptEncoder


# ----------------------------------------------------------------------------------------------- the prompt as an item
class PromptItems(ProcessorBatchItems):
    """Prompts, each a list of the LLM's ids."""

    def __init__(self, data):
        super().__init__(data, PROMPT)

    def get_item_for_hash(self, index):
        """What tells one prompt from another."""
        return torch.tensor(self.data[index]).numpy().tobytes()


class PromptParser(MultiModalDataParser):
    """Reads prompts and no other kind of item."""

    def _get_subparsers(self):
        return {PROMPT: PromptItems}


class PromptInfo(BaseProcessingInfo):
    """One request has one prompt."""

    def get_data_parser(self):
        """Of prompts."""
        return PromptParser()

    def get_supported_mm_limits(self):
        """Items in one request."""
        return {PROMPT: 1}

    def get_mm_max_tokens_per_item(self, seq_len, mm_counts):
        """Tokens of the longest prompt."""
        return {PROMPT: max_prompt_length(self.get_hf_config(), seq_len)}


class PromptDummyInputs(BaseDummyInputsBuilder):
    """The longest prompt, for measuring memory."""

    def get_dummy_text(self, mm_counts):
        """There is none beside the item."""
        return ""

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        """As long as the LLM and vLLM allow."""
        return {PROMPT: [[0] * max_prompt_length(self.info.get_hf_config(), seq_len)] * mm_counts.get(PROMPT, 0)}


class PromptProcessor(BaseMultiModalProcessor):
    """Makes of a prompt one item, and as many placeholders as it has tokens."""

    def apply(self, inputs, timing_ctx):
        """The prompt's ids go to the encoder, placeholders to the SLM, which gets the encoder's output for them."""
        (ids,) = inputs.mm_data_items[PROMPT].get_all()
        item = MultiModalKwargsItem({"prompt_ids": MultiModalFieldElem(torch.tensor(ids), MultiModalBatchedField())})
        return mm_input(
            [placeholder_id(self.info.get_hf_config())] * len(ids),
            MultiModalKwargsItems({PROMPT: [item]}),
            inputs.get_mm_hashes(self.info.model_id, self.info.ctx.get_mm_config().mm_hasher_algorithm),
            {PROMPT: [PlaceholderRange(offset=0, length=len(ids))]},
        )

    def _get_mm_fields_config(self, *args):
        return {}

    def _get_prompt_updates(self, *args):
        return []


# ----------------------------------------------------------------------------------------------------------- the model
@MULTIMODAL_REGISTRY.register_processor(PromptProcessor, info=PromptInfo, dummy_inputs=PromptDummyInputs)
class LLM2SLMForVLLM(nn.Module, SupportsMultiModal, SupportsLoRA):
    """
    `slm` is vLLM's own model, `encoder` a [`PromptEncoder`]. A server that only receives encoded prompts has no
    encoder, one that only encodes has no SLM.
    """

    slm: Any  # a VllmModel
    encoder: PromptEncoder | None
    _mark_language_model: Any  # inherited; without vLLM a type checker takes them for tensors
    _mark_tower_model: Any

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    @classmethod
    def get_placeholder_str(cls, modality, i):
        """No text stands for a prompt."""
        return None

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        slm_config = self.config.slm_config
        with self._mark_language_model(vllm_config):
            self.slm = init_vllm_registered_model(
                vllm_config,
                hf_config=slm_config,
                prefix=maybe_prefix(prefix, "slm"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[slm_config.model_type]],
            )
        transfer = vllm_config.ec_transfer_config
        if transfer is not None and transfer.is_encode_only:
            # vLLM does not read files of the SLM alone where it has none, and the encoder may need its embeddings.
            self._language_model_names = []
        self.encoder = None
        if not writes_only(vllm_config):
            with self._mark_tower_model(vllm_config, PROMPT):
                self.encoder = PromptEncoder(
                    self.config, vllm_config.model_config.dtype, torch.device(vllm_config.device_config.device)
                )

    def embed_multimodal(self, prompt_ids=(), **kwargs):
        """Encodes prompts, each of shape `(length,)`; returns of each `(length, slm_hidden_size)`."""
        if self.encoder is None:
            raise RuntimeError("This server has no LLM: it writes responses to prompts that another one has encoded.")
        return self.encoder(list(prompt_ids))

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """The SLM's hidden states."""
        return self.slm(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states):
        """The SLM's."""
        return self.slm.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Takes each tensor of the checkpoint once, and the LLM of a slim checkpoint from its own place."""
        of_encoder: dict[str, torch.Tensor] = {}

        def of_slm():
            for name, tensor in weights:
                place = None if self.encoder is None else self.encoder.place_of(name)
                if place is not None:
                    of_encoder[place] = tensor
                if name.startswith("slm."):
                    yield name, tensor

        loaded = AutoWeightsLoader(self).load_weights(of_slm())
        if self.encoder is None:
            return loaded
        self.encoder.load(of_encoder)
        if current_platform.is_cpu():
            self.encoder.pack()
        return loaded | {f"encoder.{name}" for name, _ in self.encoder.named_parameters()}

    def get_mm_mapping(self):
        """Which part is which: adapters are for the SLM."""
        return MultiModelKeys.from_string_field(language_model="slm", tower_model="encoder")
