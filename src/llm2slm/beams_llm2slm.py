"""Beam search and beam sampling for fast decode: the sequences that `GenerationMixin` finds, with less work around.

What goes on and what is finished follows from a few numbers a step. In tensors, as Transformers does it, telling takes
about as long as a step of a small SLM; here Python tells it, and tensors hold what is long.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .inputs_llm2slm import CACHE

_SORTS_WHAT_IS_PICKED = CACHE == "cache"  # as Transformers does since 5.24, where the cache has that name
NEVER = -1e9  # the sum of log probabilities of what is not to be continued


def search_beams(
    step,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
) -> torch.Tensor:
    r"""
    Writes the responses of a batch of prompts.

    Args:
        step:
            Gives logits: `read_prompt()` those behind the prompts, `write(tokens)` those behind one more token of each
            row, after `choose_rows(rows)` has said which row each of them goes on with.
        input_ids (`torch.LongTensor` of shape `(batch_size * num_beams, start_length)`):
            What the responses begin with.
        logits_processor (`LogitsProcessorList`):
            What `generate` prepared, as are the next two.
        stopping_criteria (`StoppingCriteriaList`):
            They tell of each continuation whether it ends.
        generation_config (`GenerationConfig`):
            Its `num_beams`, `num_return_sequences`, `do_sample`, `length_penalty`, `early_stopping` and `max_length`.

    Returns:
        `torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`: the best of each prompt.
    """
    num_beams, device = generation_config.num_beams, input_ids.device
    searches = [_Search(generation_config, input_ids.shape[1]) for _ in range(input_ids.shape[0] // num_beams)]
    num_candidates = _num_candidates(generation_config)
    first_rows = torch.arange(0, input_ids.shape[0], num_beams, device=device)[:, None]
    # The beams of a prompt are the same at first: one of them goes on.
    sums = torch.tensor([0.0] + [NEVER] * (num_beams - 1), device=device).repeat(len(searches))
    logits = step.read_prompt()
    while True:
        log_probs = logits[:, -1].to(device, torch.float32).log_softmax(dim=-1)
        log_probs = logits_processor(input_ids, log_probs) + sums[:, None]
        vocab_size = log_probs.shape[1]
        sums, picked = _pick(log_probs.view(len(searches), -1), num_candidates, generation_config.do_sample)
        rows = (first_rows + picked // vocab_size).view(-1)
        candidates = torch.cat([input_ids[rows], (picked % vocab_size).view(-1, 1)], dim=1)
        ended = stopping_criteria(candidates, None)

        beams = []  # the candidate, and its sum, that each row goes on with
        of_prompts = (candidates.split(num_candidates), sums.tolist(), ended.view_as(sums).tolist())
        for search, first, *of_prompt in zip(searches, range(0, len(rows), num_candidates), *of_prompts, strict=True):
            beams += [(first + i, total) for i, total in search.go_on(*of_prompt)]
        is_over = all(search.is_full_and_stops for search in searches)
        if ended.all() or is_over or not any(search.may_improve for search in searches):
            break
        chosen = torch.tensor([candidate for candidate, _ in beams], device=device)
        sums = torch.tensor([total for _, total in beams], device=device)
        input_ids = candidates[chosen]
        step.choose_rows(rows[chosen])
        logits = step.write(input_ids[:, -1:])
    best = [ids for search in searches for _, ids in search.finished[: generation_config.num_return_sequences]]
    return torch.nn.utils.rnn.pad_sequence(best, batch_first=True, padding_value=_padding(generation_config))


class _Search:
    """The finished responses of one prompt, and whether those still written may be better."""

    def __init__(self, generation_config, start_length):
        self.config, self.start_length = generation_config, start_length
        self.finished: list[tuple[float, torch.Tensor]] = []  # scores and ids, the best first
        self.may_improve = True

    @property
    def is_full_and_stops(self) -> bool:
        return self.config.early_stopping is True and len(self.finished) == self.config.num_beams

    def go_on(self, candidates: torch.Tensor, sums: list[float], ended: list[bool]) -> list[tuple[int, float]]:
        """Keeps the candidates that ended. Those that go on, the best first: which they are, and their sums."""
        num_beams, penalty = self.config.num_beams, self.config.length_penalty
        length = candidates.shape[1] - self.start_length
        if self.may_improve and not self.is_full_and_stops:
            new = [(sums[i] / length**penalty, candidates[i]) for i in range(num_beams) if ended[i]]
            self.finished = sorted(self.finished + new, key=lambda response: -response[0])[:num_beams]
        sums = [total + NEVER * end for total, end in zip(sums, ended, strict=True)]
        going_on = sorted(enumerate(sums), key=lambda candidate: -candidate[1])[:num_beams]
        if self.config.early_stopping == "never" and penalty > 0:
            length = self.config.max_length - self.start_length
        worst = self.finished[-1][0] if len(self.finished) == num_beams else NEVER
        self.may_improve = self.may_improve and going_on[0][1] / length**penalty > worst
        return going_on


def _num_candidates(generation_config) -> int:
    """Enough that as many as there are beams go on, whatever ends."""
    ends = generation_config._eos_token_tensor
    return max(2, 1 + (0 if ends is None else len(ends))) * generation_config.num_beams


def _pick(log_probs, num_candidates, do_sample):
    """Sums of the log probabilities of continuations, and which they are, each of shape `(batch_size, candidates)`."""
    if not do_sample:
        return log_probs.topk(num_candidates)
    picked = torch.multinomial(log_probs.softmax(dim=-1), num_candidates)
    picked_log_probs = log_probs.gather(1, picked)
    if _SORTS_WHAT_IS_PICKED:
        picked_log_probs, order = picked_log_probs.sort(dim=-1, descending=True)
        picked = picked.gather(1, order)
    return picked_log_probs, picked


def _padding(generation_config) -> int:
    ends, padding = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    if ends is None:
        return -1
    return int(padding or ends[0])  # Transformers takes a padding token of 0 for none
