"""Pairs of prompt and completion, and what becomes of them: tokens, batches, the LLM's cached states."""

from .collator import DataCollatorForLLM2SLM, tokenize_pairs
from .pairs import load_pairs
from .prompt_features import cache_prompt_features

__all__ = ["DataCollatorForLLM2SLM", "cache_prompt_features", "load_pairs", "tokenize_pairs"]
