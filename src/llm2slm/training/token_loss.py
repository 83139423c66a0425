"""The loss of a training token by token: with what a teacher expects of each, and with what each counts.

For each token of a response the loss is `(1 - weight) * cross-entropy + weight * divergence`, and cross-entropy alone
for a token without a distribution of a teacher. Tokens of another source may count more or less.
"""

import torch

from .distillation import IDS, LOG_PROBS, TAUGHT, divergence
from .sources import WEIGHTS
from .trainer import SimilarLengthTrainer


class TokenLossTrainer(SimilarLengthTrainer):
    """
    A trainer whose training loss is made token by token. Its evaluation loss is cross-entropy, as any trainer's.

    Args:
        weight (`float`): Of the divergence from a teacher, from 0 to 1.
        temperature (`float`): Of both distributions.
        shift (`bool`): Whether logits predict the next label, as those of a decoder-only model do.
        args, kwargs: Those of `Seq2SeqTrainer`.
    """

    def __init__(self, *args, weight: float, temperature: float, shift: bool, **kwargs):
        self.weight, self.temperature, self.shift = weight, temperature, shift
        self.more: dict[str, torch.Tensor] = {}
        super().__init__(*args, compute_loss_func=self._mix, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Keeps for the loss what the model does not know."""
        self.more = {name: inputs.pop(name) for name in (IDS, LOG_PROBS, TAUGHT, WEIGHTS) if name in inputs}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _mix(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        logits, labels = outputs["logits"], labels.to(outputs["logits"].device)
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        responses = labels != -100
        logits, labels = logits[responses].float(), labels[responses]  # (tokens, vocab_size), (tokens,)
        log_total = logits.logsumexp(dim=1)
        loss = log_total - logits.gather(1, labels[:, None])[:, 0]
        more = {name: tensor.to(logits.device) for name, tensor in self.more.items()}
        if TAUGHT in more:
            ids, log_probs, taught = more[IDS], more[LOG_PROBS], more[TAUGHT]
            taught_loss = divergence(logits, log_total, ids, log_probs, self.temperature)
            loss = torch.where(taught, (1 - self.weight) * loss + self.weight * taught_loss, loss)
        if WEIGHTS in more:
            loss = loss * more[WEIGHTS].to(loss.dtype)
        return loss.mean() if num_items_in_batch is None else loss.sum() / num_items_in_batch
