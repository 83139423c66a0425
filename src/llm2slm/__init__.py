"""LLM-to-SLM: a frozen LLM encodes the prompt once, a small language model writes the response.

`import llm2slm` makes the Auto classes and `pipeline` of Transformers know LLM-to-SLM. The names below are imported
when they are first used: what prepares data needs the extra `train`, what loads and generates does not.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .building import make_slm, slice_lm, token_map, train_tokenizer, trim_tokenizer
    from .configuration_llm2slm import LLM2SLMConfig
    from .data.collator import DataCollatorForLLM2SLM, tokenize_pairs
    from .data.pairs import load_pairs
    from .data.prompt_features import cache_prompt_features
    from .drafting_llm2slm import LosslessOutput
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration, PromptEncoding
    from .pipeline_llm2slm import LLM2SLMText2TextGenerationPipeline
    from .tokenization_llm2slm import LLM2SLMTokenizer
    from .training.trainer import parameter_groups

# Where each public name is.
_MODULES = {
    "DataCollatorForLLM2SLM": "data.collator",
    "LLM2SLMConfig": "configuration_llm2slm",
    "LLM2SLMForConditionalGeneration": "modeling_llm2slm",
    "LLM2SLMText2TextGenerationPipeline": "pipeline_llm2slm",
    "LLM2SLMTokenizer": "tokenization_llm2slm",
    "LosslessOutput": "drafting_llm2slm",
    "PromptEncoding": "modeling_llm2slm",
    "cache_prompt_features": "data.prompt_features",
    "load_pairs": "data.pairs",
    "make_slm": "building",
    "parameter_groups": "training.trainer",
    "slice_lm": "building",
    "token_map": "building",
    "tokenize_pairs": "data.collator",
    "train_tokenizer": "building",
    "trim_tokenizer": "building",
}
__all__ = [
    "DataCollatorForLLM2SLM",
    "LLM2SLMConfig",
    "LLM2SLMForConditionalGeneration",
    "LLM2SLMText2TextGenerationPipeline",
    "LLM2SLMTokenizer",
    "LosslessOutput",
    "PromptEncoding",
    "cache_prompt_features",
    "load_pairs",
    "make_slm",
    "parameter_groups",
    "slice_lm",
    "token_map",
    "tokenize_pairs",
    "train_tokenizer",
    "trim_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next time this function is not asked
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "llm2slm_command" not in sys.modules:  # the command registers what it needs when it runs, not to print help
    from . import auto  # noqa: F401
