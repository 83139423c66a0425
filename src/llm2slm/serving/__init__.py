"""Serving a checkpoint to others: a server of its own, and a plugin for vLLM."""
