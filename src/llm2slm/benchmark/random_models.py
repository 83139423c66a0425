"""Sizes of real models, to measure or estimate without their weights."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Type of the configuration and its fields.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-large": (
        "t5",
        {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "decoder_start_token_id": 0},
    ),
    "t5-small": (
        "t5",
        {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "decoder_start_token_id": 0},
    ),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "llama-1b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
    ),
    "llama-100m": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "tie_word_embeddings": True,
        },
    ),
    "llama-15m": (
        "llama",
        {
            "vocab_size": 8192,
            "hidden_size": 384,
            "intermediate_size": 1152,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "tie_word_embeddings": True,
        },
    ),
    "llama-5m": (
        "llama",
        {
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
}


def load_config(name: str) -> "PretrainedConfig":
    """
    The configuration of one of `SIZES`, or of a model by name, folder or GGUF file; no weights are read.

    Raises:
        OSError: if there is no such model.
        ImportError: if it is a GGUF file, and the package that reads these is missing.
    """
    from transformers import AutoConfig

    from ..loading_llm2slm import check_gguf, split_gguf

    if name in SIZES:
        model_type, sizes = SIZES[name]
        return AutoConfig.for_model(model_type, **sizes)
    folder, gguf_file = split_gguf(name, None)
    check_gguf(gguf_file)
    kwargs = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoConfig.from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as error:
        known = ", ".join(SIZES)
        raise OSError(f"{name!r} is neither a model nor one of the sizes {known}: {error}") from error
