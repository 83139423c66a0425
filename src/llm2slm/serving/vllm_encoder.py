"""What encodes the prompt in vLLM's engine: the frozen LLM and the projector, as the product runs them."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from ..configuration_llm2slm import LLM2SLMConfig
from ..loading_llm2slm import llm_auto_class, slm_auto_class
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration


class PackedLinear(nn.Module):
    """
    A linear layer as vLLM runs those of its own models on a CPU: its weights are laid out for that once. It takes the
    place of `linear`, whose weights it does not keep.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.cpu_linear: Any = None
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """From `(..., in_features)` to `(..., out_features)`."""
        return self.cpu_linear(states, self.weight, self.bias)


class SLMEmbeddings(nn.Module):
    """In the SLM's place: its token embeddings, which `fusion="add"` adds to, and nothing else of it."""

    def __init__(self, embeddings: nn.Module | None, dtype: torch.dtype):
        super().__init__()
        self.embeddings, self.dtype = embeddings, dtype

    def get_input_embeddings(self) -> nn.Module | None:
        """The SLM's own, `None` where the prompt's embeddings do not need them."""
        return self.embeddings


class PromptEncoder(nn.Module):
    """
    LLM, projector and, where the prompt's embeddings are added to, the SLM's token embeddings.

    Args:
        config (`LLM2SLMConfig`): The pair's.
        dtype (`torch.dtype`): What the LLM and the projector compute in.
        device (`torch.device`): Where.
    """

    def __init__(self, config: LLM2SLMConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        config = copy.deepcopy(config)
        with torch.device("meta"):  # its shapes and names, no memory
            slm = slm_auto_class(config.slm_config).from_config(config.slm_config, dtype=dtype)
        embeddings: nn.Module | None = None
        # Where each stored tensor that the encoder needs goes, by the beginning of its name.
        self.places = {"projector.": "projector.", "prompt_token_map": "prompt_token_map", "llm.": "llm."}
        if config.fusion == "add" and config.shared_tokenizer:
            embeddings = slm.get_input_embeddings().to_empty(device=device)
            slm._init_weights(embeddings)  # what is not stored: the scale of Gemma's
            name = next(name for name, module in slm.named_modules() if module is embeddings)
            self.places[f"slm.{name}."] = "slm.embeddings."
        llm = None
        with device:
            if config.include_llm or config.llm_name_or_path is None:
                # T5's encoder class changes the configuration it is given.
                llm_config = copy.deepcopy(config.llm_config)
                with no_init_weights():
                    llm = llm_auto_class(llm_config).from_config(llm_config, dtype=dtype)
            self.pair = LLM2SLMForConditionalGeneration(config, llm=llm, slm=slm)
        self.pair.projector.to(dtype)
        self.pair.slm = SLMEmbeddings(embeddings, dtype)
        self.pair.requires_grad_(False).eval()
        self.dtype = dtype

    def place_of(self, name: str) -> str | None:
        """Where a tensor of the checkpoint goes; `None` for one of the rest of the SLM's."""
        for stored, place in self.places.items():
            if name.startswith(stored):
                return place + name.removeprefix(stored)
        return None

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """
        Takes the tensors of a checkpoint by their places, and the LLM of a slim one from its own place.

        Raises:
            OSError: if there is no LLM at that place.
            ValueError: if tensors are missing or not this pair's, or the LLM is not the one trained with.
        """
        missing, unexpected = self.pair.load_state_dict(tensors, strict=False)
        own = self.pair.state_dict(keep_vars=True)
        loaded = {id(own[name]) for name in tensors if name in own}
        missing = [name for name in missing if id(own[name]) not in loaded]  # but what is tied to what came
        if missing or unexpected:
            raise ValueError(f"The checkpoint's weights are not this pair's: {sorted([*missing, *unexpected])[:3]}.")
        if self.pair.llm is None:
            self.pair.load_llm(dtype=self.dtype)

    def pack(self) -> None:
        """Has the linear layers of the LLM and the projector packed, once their weights are loaded. On a CPU only."""
        head = self.pair.llm.get_output_embeddings()  # it is never run
        for module in list(self.pair.modules()):
            for name, layer in module.named_children():
                if type(layer) is nn.Linear and layer is not head:
                    setattr(module, name, PackedLinear(layer))

    @torch.inference_mode()
    def forward(self, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
        """
        Encodes prompts, each a tensor of the LLM's ids of shape `(length,)`, together; returns of each its embeddings
        of shape `(length, slm_hidden_size)`.
        """
        lengths = [len(ids) for ids in prompts]
        ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # (number of prompts, longest)
        mask = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
        embeds = self.pair.encode_prompt(ids, mask.long()).prompt_embeds
        return [row[:length] for row, length in zip(embeds, lengths, strict=True)]
