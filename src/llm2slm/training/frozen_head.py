"""A frozen head that is as fast as one that is trained."""

import torch
from transformers import PreTrainedModel


def read_states_in_one_piece(model: PreTrainedModel) -> None:
    """
    Lets the model's head, if it has one, copy the states that it gets into one piece. Those of the responses, or of
    the last position alone, are a slice, which `torch.matmul` multiplies row by row of the batch with copies of a
    frozen weight (PyTorch 2.13, https://github.com/pytorch/pytorch/pull/166891): on a CPU up to hundreds of times
    slower.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_make_contiguous)


def _make_contiguous(head, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(states.contiguous() for states in inputs)
