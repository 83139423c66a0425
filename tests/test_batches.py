"""Batches of similar length: what the order promises."""

import random

import pytest

from llm2slm.training.trainer import SimilarLengthSampler

LENGTHS = random.Random(0).choices(range(2, 200), k=1003)


def batches_of(sampler, size):
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(batches):
    return sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)


def test_each_example_comes_once_and_little_is_padded():
    sampler = SimilarLengthSampler(LENGTHS, 16, seed=1)
    batches = batches_of(sampler, 16)
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS))) and len(sampler) == len(LENGTHS)
    at_random = random.Random(1).sample(range(len(LENGTHS)), len(LENGTHS))
    shuffled = [at_random[start : start + 16] for start in range(0, len(at_random), 16)]
    assert padded(batches) < 1.1 * sum(LENGTHS) < 1.5 * sum(LENGTHS) < padded(shuffled)


def test_the_batches_come_at_random_and_not_by_length():
    longest = [max(LENGTHS[i] for i in batch) for batch in batches_of(SimilarLengthSampler(LENGTHS, 16, seed=1), 16)]
    falls = sum(after < before for before, after in zip(longest, longest[1:], strict=False))
    assert 0.3 < falls / len(longest) < 0.7


def test_seed_and_epoch_alone_decide_the_order():
    sampler, again = SimilarLengthSampler(LENGTHS, 8, seed=1), SimilarLengthSampler(LENGTHS, 8, seed=1)
    first = list(sampler)
    assert list(sampler) == first == list(again)
    again.set_epoch(3)
    sampler.set_epoch(3)
    assert list(sampler) == list(again) != first
    assert list(SimilarLengthSampler(LENGTHS, 8, seed=2)) != first


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_few_examples(count):
    assert sorted(SimilarLengthSampler(LENGTHS[:count], 8, seed=0)) == list(range(count))
