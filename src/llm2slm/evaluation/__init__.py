"""Evaluation: responses, scores, reports, and data sets labelled by an LLM."""
