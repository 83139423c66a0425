"""Building an SLM: its tokenizer, its model, and where its weights start."""

from .initialization import fit_head, standardize_states, start_at_zero, start_from_states
from .slm import make_slm, slice_lm
from .tokenizers import limit_tokenizer, token_map, train_tokenizer, trim_tokenizer

__all__ = [
    "fit_head",
    "limit_tokenizer",
    "make_slm",
    "slice_lm",
    "standardize_states",
    "start_at_zero",
    "start_from_states",
    "token_map",
    "train_tokenizer",
    "trim_tokenizer",
]
