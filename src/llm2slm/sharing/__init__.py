"""Sharing a model: its card, and the upload to the Hub."""
