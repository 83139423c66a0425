"""Sharing a model: its card, the upload to the Hub, and its SLM by itself."""
