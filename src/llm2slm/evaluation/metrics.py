"""Scores of texts with 95% intervals, offline, and the paired comparison of two systems.

    >>> from llm2slm.evaluation.metrics import score_texts
    >>> score_texts("chrf", predictions=["a cat sat"], references=["a cat sat down"])

Each metric is a function of numbers that are added up over the examples: n-gram counts for BLEU and chrF, words for
copied words, the examples' own scores for the others. A bootstrap resample therefore costs one sum, and no text is
read twice.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from ..utils import check_installed

# A response repeats itself if it ends in so many copies of one piece, that together have so many characters: the
# number of copies is not exceeded by "holy, holy, holy" or a row of dots, nor the length by "ha ha ha ha".
LEAST_COPIES, LEAST_LENGTH = 4, 16


@dataclass
class Statistics:
    """
    What a metric knows of a system's texts.

    Args:
        rows (`np.ndarray` of shape `(num_examples, num_statistics)`): What is added up over the examples.
        score_of (`Callable`): Turns the sum of some rows into their score, from 0 to 100.
        signature (`str`): How the metric was set up, and the version of what computes it.
    """

    rows: np.ndarray
    score_of: Callable[[np.ndarray], float]
    signature: str

    @property
    def score(self) -> float:
        """The score of all examples."""
        return self.score_of(self.rows.sum(axis=0))


def compute_statistics(
    name: str, predictions: Sequence[str], references: Sequence[str], prompts: Sequence[str | list[dict]] = ()
) -> Statistics:
    r"""
    Reads the texts.

    Args:
        name (`str`):
            `"bleu"`, `"chrf"`, `"rouge1"`, `"rouge2"`, `"rougeL"`, `"exact_match"`, `"copied_words"` or
            `"repeating"`.
        predictions (`Sequence[str]`): What the system wrote.
        references (`Sequence[str]`): What it should have written, one for each prediction.
        prompts (`Sequence[str | list[dict]]`, *optional*):
            What it was given, texts or chats, one for each prediction. For `"copied_words"` alone.

    Raises:
        ValueError: if the metric is unknown, there are no texts, or not as many of one kind as of another.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"There must be as many references as predictions, and at least one; got {len(predictions)} predictions "
            f"and {len(references)} references."
        )
    if name == "copied_words":
        return _copied_words_statistics(predictions, references, prompts)
    if name == "repeating":
        signature = f"copies:{LEAST_COPIES}|characters:{LEAST_LENGTH}"
        return _mean_statistics([repeats_itself(text) for text in predictions], signature)
    check_installed("Scoring", "rouge_score", "sacrebleu")
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    if name in ("bleu", "chrf"):
        return _sacrebleu_statistics(BLEU() if name == "bleu" else CHRF(), predictions, references)
    if name in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([name], use_stemmer=True)
        scores = [scorer.score(*pair)[name].fmeasure for pair in zip(references, predictions, strict=True)]
        return _mean_statistics(scores, f"stemmer:yes|rouge_score:{metadata.version('rouge_score')}")
    if name == "exact_match":
        matches = [a.strip() == b.strip() for a, b in zip(predictions, references, strict=True)]
        return _mean_statistics(matches, "case:mixed|strip:yes")
    raise ValueError(
        f"The metric must be bleu, chrf, rouge1, rouge2, rougeL, exact_match, copied_words or repeating, got {name!r}."
    )


def repeats_itself(text: str) -> bool:
    """
    Whether a text ends in one piece over and over, as of a model that found no end: at least `LEAST_COPIES` times, in
    at least `LEAST_LENGTH` characters with a letter or digit among them. The last copy may be cut off.
    """
    text = text.rstrip()
    for period in range(1, len(text) // LEAST_COPIES + 1):
        length = max(LEAST_COPIES * period, LEAST_LENGTH)
        end = text[-length:]
        if len(end) == length and end[period:] == end[:-period] and re.search(r"\w", end):
            return True
    return False


def interval(statistics: Statistics, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Least and greatest score of the middle 95% of bootstrap resamples of the examples."""
    scores = [*resampled_scores(statistics, num_resamples, seed)]
    low, high = np.percentile(scores, [2.5, 97.5])
    return min(float(low), statistics.score), max(float(high), statistics.score)  # a sum in another order rounds apart


def compare(
    statistics: Statistics, baseline: Statistics, num_resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    r"""
    Compares two systems on the same examples, by paired bootstrap resampling (Koehn, 2004).

    Args:
        statistics ([`Statistics`]): Of a system.
        baseline ([`Statistics`]): Of the other system, from the same metric and references.

    Returns:
        `dict` with `difference` (positive: more than the baseline), its 95% interval `low` and `high`, and `p`: how
        often chance alone gives a difference as large, in either direction, as in sacrebleu's paired bootstrap test.
    """
    if len(statistics.rows) != len(baseline.rows):
        raise ValueError(f"The systems have {len(statistics.rows)} and {len(baseline.rows)} examples: not the same.")
    difference = statistics.score - baseline.score
    # One seed and one number of examples: resample k is of the same examples for both.
    pairs = (resampled_scores(s, num_resamples, seed) for s in (statistics, baseline))
    differences = np.subtract(*pairs)
    low, high = np.percentile(differences, [2.5, 97.5])
    as_large = np.abs(differences - differences.mean()) >= abs(difference)
    p = (int(as_large.sum()) + 1) / (num_resamples + 1)
    return {"difference": difference, "low": float(low), "high": float(high), "p": p}


def resampled_scores(statistics: Statistics, num_resamples: int, seed: int) -> np.ndarray:
    """The scores of as many examples, drawn with replacement, `num_resamples` times."""
    rng, size = np.random.default_rng(seed), len(statistics.rows)
    scores = np.empty(num_resamples)
    for i in range(num_resamples):
        times_drawn = np.bincount(rng.integers(size, size=size), minlength=size)
        scores[i] = statistics.score_of(times_drawn @ statistics.rows)
    return scores


def score_texts(
    name: str,
    predictions: Sequence[str],
    references: Sequence[str],
    prompts: Sequence[str | list[dict]] = (),
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    One of the metrics of [`compute_statistics`]: `score`, from 0 to 100, its 95% interval `low` and `high`, and
    `signature`.
    """
    statistics = compute_statistics(name, predictions, references, prompts)
    low, high = interval(statistics, num_resamples, seed)
    return {"score": statistics.score, "low": low, "high": high, "signature": statistics.signature}


def words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def words_to_copy(references: Sequence[str], prompts: Sequence[str | list[dict]]) -> list[set[str]]:
    """Each reference's words that stand in its prompt, a text or a chat, and in no other reference."""
    wanted = [words(text) for text in references]
    references_with = Counter(word for reference in wanted for word in reference)
    texts = (prompt if isinstance(prompt, str) else " ".join(turn["content"] for turn in prompt) for prompt in prompts)
    return [
        {word for word in reference & words(text) if references_with[word] == 1}
        for reference, text in zip(wanted, texts, strict=True)
    ]


def _sacrebleu_statistics(metric, predictions, references) -> Statistics:
    # The two methods that sacrebleu's own bootstrap is made of; it has no public way to the difference of two systems.
    rows = metric._extract_corpus_statistics(list(predictions), [list(references)])
    return Statistics(
        np.array(rows),
        lambda total: metric._compute_score_from_stats(total.tolist()).score,
        str(metric.get_signature()),
    )


def _copied_words_statistics(predictions, references, prompts) -> Statistics:
    if len(prompts) != len(predictions):
        raise ValueError(
            f"Copied words need as many prompts as predictions; got {len(prompts)} prompts and {len(predictions)} "
            "predictions."
        )
    wanted = words_to_copy(references, prompts)
    rows = [
        [100 * len(copied & words(prediction)), len(copied)]
        for copied, prediction in zip(wanted, predictions, strict=True)
    ]
    return Statistics(
        np.array(rows, dtype=float),
        lambda total: float(total[0] / total[1]) if total[1] else 100.0,  # no word to copy, none lost
        "case:lower|in_references:1",
    )


def _mean_statistics(scores, signature) -> Statistics:
    rows = np.stack([100 * np.array(scores, dtype=float), np.ones(len(scores))], axis=1)
    return Statistics(rows, lambda total: float(total[0] / total[1]), signature)
