"""Pairs of prompt and completion, and what becomes of them: tokens, batches, the LLM's cached states."""

from ..utils import check_installed

check_installed(__name__, "datasets")

from .collator import DataCollatorForLLM2SLM, tokenize_pairs  # noqa: E402
from .pairs import load_pairs  # noqa: E402
from .prompt_features import cache_prompt_features  # noqa: E402

__all__ = ["DataCollatorForLLM2SLM", "cache_prompt_features", "load_pairs", "tokenize_pairs"]
