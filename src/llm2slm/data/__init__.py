"""Pairs of prompt and completion, and what becomes of them: tokens, batches, the LLM's cached states."""

from ..utils import check_installed

check_installed(__name__, "datasets")
