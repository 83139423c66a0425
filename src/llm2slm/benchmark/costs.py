"""What reading a prompt and writing a token cost, counted from configurations: weights, operations, bytes.

Counted are the matrix products: 2 operations for each weight and token, and those of attention over the positions in
the cache (all of the prompt's pairs of positions, as kernels without a causal shortcut compute them). Norms,
activations and embedding look-ups are left out. A token's bytes are those of the weights its matrix products read and
of the keys and values in the cache: on a CPU, or at a small batch, they set the limit.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..language_models import whole_model

# How T5 and BART-like decoders call their attention to the encoder, and the two projections of the prompt in it.
_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "cross_attn", "crossattention")
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value")


@dataclass
class Stage:
    """
    A stack of layers that positions pass through.

    Args:
        weights (`int`): Weights in its matrix products.
        layers (`int`): Its depth.
        attention_width (`int`): Heads times their width, of all layers together.
        cache_width (`int`): Numbers that one position adds to keys and values, of all layers together.
    """

    weights: int
    layers: int
    attention_width: int
    cache_width: int

    def flops(self, positions: float, context: float) -> float:
        """Of `positions` new positions, each attending to `context` ones."""
        return positions * (2 * self.weights + 4 * self.attention_width * context)

    def bytes_read(self, context: int, batch_size: int, bytes_per_number: float) -> float:
        """Of one run over a batch whose examples have `context` positions in the cache."""
        return bytes_per_number * (self.weights + batch_size * context * self.cache_width)


@dataclass
class Costs:
    """
    What a system costs.

    Args:
        parameters (`int`): All weights, shared ones once.
        prompt (`list[Stage]`): What each position of the prompt passes through.
        head (`Stage`): What writes the first token from the prompt's last position: the head, or a decoder's step.
        token (`Stage`): What each further token passes through.
        encoder_decoder (`bool`): Whether the tokens attend to an encoder's positions beside their own.
    """

    parameters: int
    prompt: list[Stage]
    head: Stage
    token: Stage
    encoder_decoder: bool

    def prompt_flops(self, prompt_length: float, batch_size: int) -> float:
        """Floating-point operations until the first token."""
        stages = sum(stage.flops(prompt_length, prompt_length) for stage in self.prompt)
        return batch_size * (stages + self.head.flops(1, prompt_length))

    def token_flops(self, context: float, batch_size: int) -> float:
        """Floating-point operations of one further token of each example, at `context` positions."""
        return batch_size * self.token.flops(1, context)

    def token_bytes(self, context: int, batch_size: int, bytes_per_number: float) -> float:
        """Bytes read for one further token of each example, at `context` positions."""
        return self.token.bytes_read(context, batch_size, bytes_per_number)


def costs_of(config: PretrainedConfig) -> Costs:
    """
    Counts the costs of a decoder-only model, an encoder-decoder or an LLM-to-SLM model; no weights are made.

    Args:
        config (`PretrainedConfig`): The model's configuration.
    """
    if config.model_type == "llm2slm":
        return _costs_of_llm2slm(whole_model(config))
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return _costs_of_lm(auto_class.from_config(config))


def _costs_of_lm(model) -> Costs:
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    head = Stage(_weights(model.get_output_embeddings()), 0, 0, 0)
    if not config.is_encoder_decoder:
        body = _stage(model, config.get_text_config(), _weights(model) - head.weights)
        token = Stage(body.weights + head.weights, body.layers, body.attention_width, body.cache_width)
        return Costs(parameters, [body], head, token, False)
    decoder = model.get_decoder()
    keys_and_values = sum(_weights(module) for name, module in decoder.named_modules() if _reads_encoder(name))
    decoder_config = getattr(config, "decoder", config)
    decoder_layers = getattr(decoder_config, "num_decoder_layers", None) or decoder_config.num_hidden_layers
    own = _stage(model, decoder_config, _weights(decoder) - keys_and_values + head.weights, decoder_layers)
    # A token attends to the prompt and to the response so far.
    own = Stage(own.weights, own.layers, 2 * own.attention_width, 2 * own.cache_width)
    encoder_config = getattr(config, "encoder", config)
    encoder = _stage(model, encoder_config, _weights(model.get_encoder()) + keys_and_values)
    return Costs(parameters, [encoder], own, own, True)


def _costs_of_llm2slm(model) -> Costs:
    slm, llm_config = _costs_of_lm(model.slm), model.config.llm_text_config
    llm = _stage(model.llm, llm_config, _weights(model.llm), max(model.config.prompt_layers))
    projector = Stage(_weights(model.projector), 0, 0, 0)
    parameters = sum(p.numel() for p in model.parameters())
    return Costs(parameters, [llm, projector, *slm.prompt], slm.head, slm.token, slm.encoder_decoder)


def _weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, (nn.Linear, Conv1D)))


def _reads_encoder(name: str) -> bool:
    *path, last = name.split(".")
    return last in _KEYS_AND_VALUES and any(part in _CROSS_ATTENTION for part in path)


def _stage(model, config, weights: int, layers: int | None = None) -> Stage:
    layers = config.num_hidden_layers if layers is None else layers
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:  # a state space model's state does not grow
        return Stage(weights, layers, 0, 0)
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    return Stage(weights, layers, layers * heads * head_dim, 2 * layers * key_value_heads * head_dim)
