"""Scores against values worked out by hand and against sacrebleu, their intervals, and the paired test."""

import math
import random

import numpy as np
import pytest
import sacrebleu

from llm2slm.evaluation.metrics import (
    compare,
    compute_statistics,
    interval,
    repeats_itself,
    resampled_scores,
    score_texts,
)

NAMES = ["bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"]
WORDS = "the a cat dog sat ran on under mat tree and then far away home soon".split()


def build_texts(size: int, share_right: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Responses with this share of words, and a quarter of that of whole texts, as in the references."""
    rng, references = random.Random(seed), []
    for _ in range(size):
        references.append(" ".join(rng.choices(WORDS, k=rng.randint(6, 15))))
    rng = random.Random(seed + 1)

    def respond(reference):
        if rng.random() < share_right / 4:
            return reference
        return " ".join(w if rng.random() < share_right else rng.choice(WORDS) for w in reference.split())

    return [respond(reference) for reference in references], references


def score(name, predictions, references):
    return score_texts(name, predictions, references)["score"]


# -------------------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("name", NAMES)
def test_equal_texts_score_100_and_others_0(name):
    assert score(name, ["the cat sat down here"], ["the cat sat down here"]) == pytest.approx(100)
    assert score(name, ["xxxx"], ["the cat sat down here"]) == pytest.approx(0)


def test_scores_worked_out_by_hand():
    prediction, reference = "the cat sat on the mat", "the cat lay on the mat"
    # ROUGE-1: 5 of 6 words; ROUGE-2: 3 of 5 pairs (the cat, on the, the mat); ROUGE-L: the cat ... on the mat.
    assert score("rouge1", [prediction], [reference]) == pytest.approx(100 * 5 / 6)
    assert score("rouge2", [prediction], [reference]) == pytest.approx(100 * 3 / 5)
    assert score("rougeL", [prediction], [reference]) == pytest.approx(100 * 5 / 6)
    # BLEU: of 6, 5, 4 and 3 runs of one to four words 5, 3, 1 and 0 match; sacrebleu counts that 0 as half a match.
    precisions = [5 / 6, 3 / 5, 1 / 4, 0.5 / 3]
    assert score("bleu", [prediction], [reference]) == pytest.approx(100 * math.prod(precisions) ** (1 / 4))
    # A response of 6 of 8 words pays exp(1 - 8 / 6) for being short.
    short = score("bleu", ["the cat sat on the mat"], ["the cat sat on the mat every day"])
    assert short == pytest.approx(100 * math.exp(1 - 8 / 6))
    assert score("exact_match", ["a", " b\n", "c", "D"], ["a", "b", "x", "d"]) == 50


def test_rouge_is_the_mean_of_the_examples_and_bleu_is_not():
    predictions, references = ["the cat sat down", "dog"], ["the cat sat down", "the cat"]
    assert score("rouge1", predictions, references) == pytest.approx((100 + 0) / 2)
    assert score("bleu", predictions, references) > 60


def test_bleu_and_chrf_are_sacrebleus_own():
    predictions, references = build_texts(50, 0.7)
    bleu, chrf = (score_texts(n, predictions, references) for n in ("bleu", "chrf"))
    assert bleu["score"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score)
    assert chrf["score"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score)
    assert bleu["signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert chrf["signature"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}"


def test_a_resample_is_scored_as_if_its_texts_were_written_out():
    predictions, references = build_texts(30, 0.7)
    drawn = np.random.default_rng(5).integers(30, size=30)
    written_out = [predictions[i] for i in drawn], [[references[i] for i in drawn]]
    for name, metric in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        resampled = resampled_scores(compute_statistics(name, predictions, references), 1, seed=5)
        assert resampled[0] == pytest.approx(metric(*written_out).score)


def copied(predictions, references, prompts):
    return score_texts("copied_words", predictions, references, prompts)["score"]


def test_copied_words_are_those_of_prompt_and_one_reference():
    prompts = ["Open Zork 3 on Linux.", "Run Nano on Linux."]
    references = ["Apri Zork 3 su Linux.", "Avvia nano su Linux."]
    # To copy: Zork, 3, nano. Not Linux, which both references have, nor "su", which no prompt has.
    assert copied(["zork! su Linux", "Avvia Nano"], references, prompts) == pytest.approx(100 * 2 / 3)
    assert copied(["3 Zork", "NANO"], references, prompts) == 100
    assert copied(["", "Linux"], references, prompts) == 0
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert copied(["zork! su Linux", "Avvia Nano"], references, chats) == pytest.approx(100 * 2 / 3)


def test_where_there_is_no_word_to_copy_none_is_lost():
    score = score_texts("copied_words", ["uno", "due"], ["uno", "due"], ["one", "two"])
    assert (score["score"], score["low"], score["high"]) == (100, 100, 100)


def test_a_response_that_ends_in_one_piece_over_and_over_repeats_itself():
    loops = ["hi " * 20, "He said: " + "la di da, " * 4 + "la di", "ha" * 10, "no. " * 30 + "n"]
    fine = [
        "holy, holy, holy",
        "Wait ....................",
        "ha ha ha ha",
        "la di da, " * 4 + "and the end",
        "",
        "word",
    ]
    assert [repeats_itself(text) for text in loops + fine] == [True] * 4 + [False] * 6
    assert score("repeating", [*loops, *fine], [""] * 10) == 40


# ----------------------------------------------------------------------------------------------------------- intervals
@pytest.mark.parametrize("name", NAMES)
def test_intervals_contain_the_score_shrink_with_more_examples_and_are_repeatable(name):
    widths = []
    for size in (50, 800):
        statistics = compute_statistics(name, *build_texts(size, 0.7))
        low, high = interval(statistics)
        assert low < statistics.score < high
        assert interval(statistics) == (low, high)
        assert (resampled_scores(statistics, 9, seed=0) != resampled_scores(statistics, 9, seed=1)).any()
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.5)  # 16 times as many examples


def test_the_interval_of_bleu_is_about_sacrebleus():
    predictions, references = build_texts(400, 0.7)
    low, high = interval(compute_statistics("bleu", predictions, references))
    theirs = sacrebleu.BLEU().corpus_score(predictions, [references], n_bootstrap=1000)
    assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_an_interval_of_one_example_is_its_score(name):
    statistics = compute_statistics(name, ["a cat sat on the mat"], ["a cat sat on a mat"])
    assert interval(statistics, num_resamples=20) == pytest.approx((statistics.score, statistics.score))


def test_half_right_of_a_hundred_has_the_binomial_interval():
    statistics = compute_statistics("exact_match", ["a"] * 100, ["a", "b"] * 50)
    low, high = interval(statistics, num_resamples=4000)
    assert (low, high) == pytest.approx((40.2, 59.8), abs=1.5)  # 50 -+ 1.96 standard deviations of 5


# --------------------------------------------------------------------------------------------------------- comparisons
@pytest.mark.parametrize("name", NAMES)
def test_the_paired_test_finds_a_real_difference_in_both_directions(name):
    (better, references), (worse, _) = build_texts(300, 0.85), build_texts(300, 0.5)
    a, b = (compute_statistics(name, texts, references) for texts in (better, worse))
    test, reverse = compare(a, b), compare(b, a)
    assert test["difference"] == pytest.approx(a.score - b.score)
    assert 0 < test["low"] < test["difference"] < test["high"] and test["p"] < 0.01
    assert reverse["p"] == test["p"] and reverse["high"] == pytest.approx(-test["low"])


@pytest.mark.parametrize("name", NAMES)
def test_the_paired_test_finds_no_difference_between_equals(name):
    predictions, references = build_texts(300, 0.7)
    statistics = compute_statistics(name, predictions, references)
    assert compare(statistics, statistics) == {"difference": 0, "low": 0, "high": 0, "p": 1}
    # Each system is the better one in half of the examples.
    other, _ = build_texts(300, 0.7, seed=0)
    worse = [f"{text} away" for text in predictions]
    one = [p if i % 2 else w for i, (p, w) in enumerate(zip(other, worse, strict=True))]
    two = [w if i % 2 else p for i, (p, w) in enumerate(zip(other, worse, strict=True))]
    test = compare(*(compute_statistics(name, texts, references) for texts in (one, two)))
    assert test["low"] < 0 < test["high"] and test["p"] > 0.05


def test_pairing_finds_what_two_intervals_do_not():
    predictions, references = build_texts(200, 0.7)
    slightly_worse = [text.rsplit(" ", 1)[0] if i % 3 == 0 else text for i, text in enumerate(predictions)]
    a, b = (compute_statistics("chrf", texts, references) for texts in (predictions, slightly_worse))
    assert interval(a)[0] < b.score  # the intervals overlap
    assert compare(a, b)["p"] < 0.05


# ----------------------------------------------------------------------------------------------------------- bad input
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="got 'rouge9'"):
        compute_statistics("rouge9", ["a"], ["a"])
    with pytest.raises(ValueError, match="got 2 predictions and 1 references"):
        compute_statistics("bleu", ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="at least one; got 0"):
        compute_statistics("bleu", [], [])
    with pytest.raises(ValueError, match="got 0 prompts and 1 predictions"):
        compute_statistics("copied_words", ["a"], ["a"])
    one, two = (compute_statistics("bleu", ["a"] * size, ["a"] * size) for size in (1, 2))
    with pytest.raises(ValueError, match="1 and 2 examples"):
        compare(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_response_scores_0(name):
    assert score(name, ["", ""], ["the cat", "a dog"]) == 0
