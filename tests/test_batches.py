"""Batches of similar length: what the order promises."""

import random

import pytest

from llm2slm.training.trainer import SimilarLengthSampler

LENGTHS = random.Random(0).choices(range(2, 200), k=1003)


def batches_of(sampler, size):
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


def sampler_of(lengths, batch_size, seed, epoch=0):
    return SimilarLengthSampler(lengths, batch_size, seed, lambda: epoch)


def padded(batches):
    return sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)


def test_each_example_comes_once_and_little_is_padded():
    sampler = sampler_of(LENGTHS, 16, seed=1)
    batches = batches_of(sampler, 16)
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS))) and len(sampler) == len(LENGTHS)
    at_random = random.Random(1).sample(range(len(LENGTHS)), len(LENGTHS))
    shuffled = [at_random[start : start + 16] for start in range(0, len(at_random), 16)]
    assert padded(batches) < 1.1 * sum(LENGTHS) < 1.5 * sum(LENGTHS) < padded(shuffled)


def test_the_batches_come_at_random_and_not_by_length():
    longest = [max(LENGTHS[i] for i in batch) for batch in batches_of(sampler_of(LENGTHS, 16, seed=1), 16)]
    falls = sum(after < before for before, after in zip(longest, longest[1:], strict=False))
    assert 0.3 < falls / len(longest) < 0.7


def test_seed_and_epoch_alone_decide_the_order():
    sampler, third = sampler_of(LENGTHS, 8, seed=1), sampler_of(LENGTHS, 8, seed=1, epoch=3)
    first = list(sampler)
    assert list(sampler) == first == list(sampler_of(LENGTHS, 8, seed=1))
    assert list(third) == list(sampler_of(LENGTHS, 8, seed=1, epoch=3)) != first
    assert list(sampler_of(LENGTHS, 8, seed=2)) != first


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_few_examples(count):
    assert sorted(sampler_of(LENGTHS[:count], 8, seed=0)) == list(range(count))
