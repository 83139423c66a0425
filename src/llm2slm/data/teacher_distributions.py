"""What a teacher expects of each token of a response, kept on disk: its likeliest tokens, and the mass of the rest.

For each token of a response the `top_k` likeliest tokens by the teacher, which reads the prompt and the response
before it: their ids (int32) and log-probabilities (float16), and behind these the log of the probability of all other
tokens, the *tail*. They are in the teacher's ids, so that students of several vocabularies learn from one cache.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .shards import TOKENS_PER_BATCH, fill_cache, find_places, hash_ids, in_groups, read_place

# What a kill loses at most is the work on one shard, about 20,000 tokens with 32 likeliest ones.
SHARD_BYTES = 4 * 2**20
LOGITS_PER_BATCH = 2**28  # of one forward: 1 GiB in float32
NOTHING = -1e4  # the log of a probability of 0, finite so that 0 times it is 0


def cache_distributions(
    folder: Path,
    pairs: list[tuple[list[int], list[int]]],
    compute_logits: Callable[[list[tuple[list[int], list[int]]]], torch.Tensor],
    vocab_size: int,
    top_k: int,
    device_type: str = "cpu",
) -> list[str]:
    r"""
    Keeps a teacher's distributions of responses that the folder lacks, each distinct pair once.

    Args:
        folder (`Path`): The cache of one teacher and one `top_k`.
        pairs (`list[tuple[list[int], list[int]]]`): Ids of prompt and response, with the teacher's tokenizer.
        compute_logits (`Callable`):
            Gets some of the pairs and returns the teacher's logits for the tokens of their responses, one behind the
            other, of shape `(tokens, vocab_size)`.
        vocab_size (`int`): Logits of the teacher.
        top_k (`int`): Tokens kept; all, if the vocabulary is smaller.
        device_type (`str`, *optional*, defaults to `"cpu"`): Where the teacher runs: how much it reads at a time.

    Returns:
        `list[str]`: the place of each pair's distributions, for [`read_distributions`].

    Raises:
        ValueError: if a logit is not finite.
        OSError: if the disk cannot hold the cache.
    """
    top_k = min(top_k, vocab_size)
    most = min(TOKENS_PER_BATCH.get(device_type, TOKENS_PER_BATCH["other"]), max(1, LOGITS_PER_BATCH // vocab_size))

    def compute(shard, progress):
        # Batches of like lengths, of prompt and response: the shard's own order goes by the response.
        order = sorted(((len(pairs[row][0]) + length, place) for place, (length, row, _) in enumerate(shard)))[::-1]
        kept: list[Any] = [None] * len(shard)
        for batch in in_groups(order, most):
            places = [place for _, place in batch]
            lengths = [shard[place][0] for place in places]
            found = likeliest(compute_logits([pairs[shard[place][1]] for place in places]), top_k)
            for place, ids, log_probs in zip(places, *(tensor.split(lengths) for tensor in found), strict=True):
                kept[place] = ids, log_probs
            progress.update(sum(lengths))
        ids, log_probs = zip(*kept, strict=True)
        return {"ids": torch.cat(ids), "log_probs": torch.cat(log_probs)}

    keys = [(hash_ids(prompt, response), len(response)) for prompt, response in pairs]
    token_bytes = 4 * top_k + 2 * (top_k + 1)
    places = fill_cache(folder, keys, compute, token_bytes, SHARD_BYTES, ("teacher's distributions", "responses"))
    return [places[key] for key, _ in keys]


def find_distributions(folder: Path, pairs: list[tuple[list[int], list[int]]]) -> list[str] | None:
    """The places of the pairs' distributions if the folder has all of them."""
    places = find_places(folder)
    keys = [hash_ids(prompt, response) for prompt, response in pairs]
    return [places[key] for key in keys] if places.keys() >= set(keys) else None


def read_distributions(folder: str | Path, place: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of shape `(tokens, top_k)` and log-probabilities of shape `(tokens, top_k + 1)`, the tail's last."""
    tensors = read_place(folder, place, "teacher's distributions", "start the training again")
    return tensors["ids"], tensors["log_probs"]


def likeliest(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The likeliest tokens of each row of logits, and the tail.

    Args:
        logits (`torch.Tensor` of shape `(tokens, vocab_size)`): They may be changed.
        top_k (`int`): Tokens kept.

    Returns:
        Ids of shape `(tokens, top_k)`, int32, the likeliest first, and log-probabilities of shape
        `(tokens, top_k + 1)`, float16, the tail's last.

    Raises:
        ValueError: if a logit is not finite.
    """
    logits = logits.float()
    everything = logits.logsumexp(dim=1, keepdim=True)
    if not torch.isfinite(everything).all():
        raise ValueError("The teacher's logits are not finite: load it in another number format (`teacher_dtype`).")
    values, ids = logits.topk(top_k, dim=1)
    # Summed up by itself: as 1 less the others, a small tail would be the rounding of their sum.
    tail = logits.scatter_(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_probs = (torch.cat([values, tail], dim=1) - everything).clamp(min=NOTHING)
    return ids.to("cpu", torch.int32), log_probs.to("cpu", torch.float16)


def in_students_tokens(
    ids: torch.Tensor, log_probs: torch.Tensor, token_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    A teacher's distributions over a student's tokens: the masses of tokens that are one of the student's are added up,
    that of tokens which are none goes to the tail.

    Args:
        ids (`torch.Tensor` of shape `(tokens, top_k)`): The teacher's.
        log_probs (`torch.Tensor` of shape `(tokens, top_k + 1)`): Of these, and of the tail.
        token_map (`torch.LongTensor`): The student's id of each of the teacher's ids, -1 for none.

    Returns:
        Ids of the same shape, int64, with -1 for what is left over, and log-probabilities, float32.
    """
    probs, ids = log_probs.float().exp(), ids.long()
    mapped = torch.where(ids < len(token_map), token_map[ids.clamp(max=len(token_map) - 1)], -1)
    mapped, order = mapped.sort(dim=1, stable=True)
    is_new = torch.ones_like(mapped, dtype=torch.bool)
    is_new[:, 1:] = mapped[:, 1:] != mapped[:, :-1]
    column = is_new.long().cumsum(dim=1) - 1
    merged = torch.full_like(mapped, -1).scatter_(1, column, mapped)
    masses = torch.zeros_like(probs).scatter_add_(1, column, probs[:, :-1].gather(1, order))
    lost = masses[:, :-1].masked_fill(merged >= 0, 0.0).sum(dim=1)
    masses[:, :-1].masked_fill_(merged < 0, 0.0)
    masses[:, -1] = probs[:, -1] + lost
    return merged, torch.where(masses > 0, masses.log(), NOTHING).clamp(min=NOTHING)
