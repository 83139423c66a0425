"""The projector: from the LLM's hidden states to the width of the SLM's embeddings.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_llm2slm import LLM2SLMConfig


class LLM2SLMStandardization(nn.Module):
    """
    `(states - mean) / scale`, number by number, `(..., hidden_size)` as given: both are constants, measured once by
    [`~llm2slm.building.standardize_states`]. Until then it changes nothing.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, hidden_size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Of the shape of `states`."""
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
        # A quantized weight's dtype is how it is stored; a bias is never quantized.
        states = prompt_hidden_states.to(self.out.bias.dtype).split(self.llm_hidden_size, dim=-1)
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


@torch.no_grad()
def init_linear(linear: nn.Linear, output_std: float):
    """Outputs of standard deviation `output_std` for inputs of standard deviation 1."""
    linear.weight.normal_(mean=0.0, std=output_std / linear.in_features**0.5)
    linear.bias.zero_()
