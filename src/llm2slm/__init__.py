"""LLM-to-SLM: a frozen LLM encodes the prompt once, a small language model writes the response."""

import sys
from pathlib import PurePath

__all__ = [
    "LLM2SLMConfig",
    "LLM2SLMForConditionalGeneration",
    "LLM2SLMText2TextGenerationPipeline",
    "LLM2SLMTokenizer",
    "LosslessOutput",
    "PromptEncoding",
]

# The command imports its package before it reads its options; to print help it need not wait for Transformers.
_PRINTS_HELP = {"-h", "--help", "--version"}
if PurePath(sys.argv[0]).stem != "llm2slm" or _PRINTS_HELP.isdisjoint(sys.argv):
    from . import auto  # noqa: F401
    from .configuration_llm2slm import LLM2SLMConfig
    from .drafting_llm2slm import LosslessOutput
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration, PromptEncoding
    from .pipeline_llm2slm import LLM2SLMText2TextGenerationPipeline
    from .tokenization_llm2slm import LLM2SLMTokenizer
