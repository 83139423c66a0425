"""Serving a checkpoint to others."""
