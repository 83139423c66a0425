"""Pairs of prompt and completion, and what becomes of them: tokens, batches, the LLM's cached states."""
