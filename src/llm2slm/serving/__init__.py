"""Serving: other programs' servers, made to serve LLM-to-SLM checkpoints."""
