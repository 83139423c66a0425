"""Learning from a teacher's distributions besides the responses: batches, and the divergence from the teacher.

The divergence is KL(teacher || student) over the outcomes that are kept of the
teacher: its likeliest tokens, and one more that is all others together. A temperature T divides the log-probabilities
of these outcomes, the teacher's and the student's alike; both are normalised again over them, and the divergence is
multiplied by T squared (Hinton et al., https://arxiv.org/abs/1503.02531, section 2, where it divides all logits: the
teacher's are not known one by one beyond the likeliest).
"""

from collections.abc import Callable
from typing import Any

import torch

from ..data.teacher_distributions import NOTHING, in_students_tokens, read_distributions
from .teacher import PLACE, POSITIONS, Teaching

IDS, LOG_PROBS, TAUGHT = "teacher_ids", "teacher_log_probs", "teacher_taught"  # of a batch
# The least log of what the student expects of none of the kept tokens: below, float32 has no digits left of it.
LEAST_TAIL = 1e-6


class TaughtCollator:
    r"""
    Makes batches as another collator does, and adds what the teacher expects, one row for each label that is not -100,
    in the order of the labels: `teacher_ids` of shape `(tokens, top_k)` with -1 for none, `teacher_log_probs` of shape
    `(tokens, top_k + 1)`, and `teacher_taught` of shape `(tokens,)`, which of the rows have a distribution.

    Args:
        collate (`Callable`): The other collator.
        teaching ([`Teaching`]): What there is of the teacher.
    """

    def __init__(self, collate: Callable[[list[dict]], dict[str, torch.Tensor]], teaching: Teaching):
        self.collate, self.teaching = collate, teaching

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The examples as one batch of tensors; without the teacher's if they have none, as those that evaluate."""
        batch = self.collate(rows)
        if PLACE not in rows[0]:
            return batch
        kept = [self._read(row[PLACE], torch.as_tensor(row[POSITIONS])) for row in rows]
        ids, log_probs = (torch.cat(parts) for parts in zip(*kept, strict=True))
        ids, log_probs = in_students_tokens(ids, log_probs, self.teaching.token_map)
        taught = torch.cat([torch.as_tensor(row[POSITIONS]) for row in rows]) >= 0
        return {**batch, IDS: ids, LOG_PROBS: log_probs, TAUGHT: taught}

    def _read(self, place: str, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # A token without a distribution gets the first one, which `teacher_taught` tells the loss to leave out.
        return tuple(tensor[positions.clamp(min=0)] for tensor in read_distributions(self.teaching.folder, place))


def divergence(
    logits: torch.Tensor, log_total: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, temperature: float
) -> torch.Tensor:
    r"""
    KL(teacher || student) of each token over the teacher's outcomes, times the temperature squared; in nats.

    Args:
        logits (`torch.Tensor` of shape `(tokens, vocab_size)`): The student's.
        log_total (`torch.Tensor` of shape `(tokens,)`): `logits.logsumexp(dim=1)`.
        ids (`torch.LongTensor` of shape `(tokens, top_k)`): The student's ids of the outcomes, -1 for none.
        log_probs (`torch.Tensor` of shape `(tokens, top_k + 1)`): The teacher's, the tail's last.
        temperature (`float`): Divides the log-probabilities of the outcomes.

    Returns:
        `torch.Tensor` of shape `(tokens,)`.
    """
    found = logits.gather(1, ids.clamp(min=0)) - log_total[:, None]  # (tokens, top_k)
    found = found.masked_fill(ids < 0, NOTHING)
    together = found.logsumexp(dim=1, keepdim=True).clamp(max=-LEAST_TAIL)
    outcomes = torch.cat([found, torch.log(-torch.expm1(together))], dim=1)  # (tokens, top_k + 1)
    outcomes, log_probs = ((values / temperature).log_softmax(dim=1) for values in (outcomes, log_probs))
    return temperature**2 * (log_probs.exp() * (log_probs - outcomes)).sum(dim=1)
