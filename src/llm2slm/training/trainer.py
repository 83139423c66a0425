"""Batches of examples of about the same length: padding costs as much time as text does."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer
from transformers.trainer_pt_utils import get_length_grouped_indices

LENGTH = "length"  # the column: tokens of an example, prompt and response


class SimilarLengthSampler(Sampler[int]):
    r"""
    An order of the examples in which each batch holds similar lengths, and the batches come at random.

    Seed and epoch alone decide it: a resumed training goes on in the same order, which Transformers' own
    `LengthGroupedSampler` does not promise (it draws from the global generator), and so do several processes.

    Args:
        lengths (`Sequence[int]`): Of each example.
        batch_size (`int`): Examples of one step, of all processes together.
        seed (`int`): Each epoch has an order of its own.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int):
        """Chooses the order; the trainer calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        full = len(indices) // self.batch_size  # a smaller last batch stays the last
        for batch in [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]:
            yield from batches[batch]


class SimilarLengthTrainer(Seq2SeqTrainer):
    """The Trainer with batches of similar length, unless its options choose another order."""

    def _get_train_sampler(self, train_dataset=None):
        if getattr(self.args, "train_sampling_strategy", "random") != "random":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self.args.train_batch_size * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SimilarLengthSampler(rows[LENGTH], batch_size, seed)
