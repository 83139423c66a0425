"""Cached prompt features: the LLM runs once per prompt, and training on the cache is training on the LLM."""

import numpy as np
import pytest
import torch
from conftest import build_model, build_prompts
from datasets import Dataset

from llm2slm.data import DataCollatorForLLM2SLM, tokenize_pairs
from llm2slm.features import cache_prompt_features


@pytest.fixture
def model():
    return build_model("llama", "t5", llm_layer=[0, -1])


@pytest.fixture
def prompts():
    return Dataset.from_dict({"input_ids": [ids.tolist() for ids in build_prompts((5, 9, 3, 9, 1))]})


def count_llm_calls(model) -> list:
    calls: list = []
    model.llm.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_cached_states_are_the_llms_in_the_rows_order(model, prompts, tmp_path):
    cached = cache_prompt_features(prompts, model, tmp_path)
    for row in cached:
        ids = torch.tensor([row["input_ids"]])
        live = model.encode_hidden_states(ids)[0]
        assert row["prompt_hidden_states"].shape == (ids.shape[1], model.config.prompt_hidden_size)
        np.testing.assert_allclose(row["prompt_hidden_states"].astype(np.float32), live.numpy(), atol=2e-2, rtol=2e-3)


def test_the_same_prompts_and_llm_find_their_cache_again(model, prompts, tmp_path):
    cache_prompt_features(prompts, model, tmp_path)
    calls = count_llm_calls(model)
    again = cache_prompt_features(prompts, model, tmp_path)
    assert not calls and len(again) == len(prompts)


def test_other_layers_or_prompts_make_another_cache(model, prompts, tmp_path):
    cache_prompt_features(prompts, model, tmp_path)
    calls = count_llm_calls(model)
    cache_prompt_features(prompts.select([1, 0]), model, tmp_path)
    assert calls
    other = build_model("llama", "t5", llm_layer=1)
    calls = count_llm_calls(other)
    cache_prompt_features(prompts, other, tmp_path)
    assert calls and len(list(tmp_path.iterdir())) == 3


def test_an_interrupted_cache_goes_on_where_it_was(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("llm2slm.features.ROWS_PER_SHARD", 2)
    run = model.encode_hidden_states
    monkeypatch.setattr(model, "encode_hidden_states", FailsAfter(run, calls=1))
    with pytest.raises(KeyboardInterrupt):
        cache_prompt_features(prompts, model, tmp_path)
    counted = FailsAfter(run, calls=100)
    monkeypatch.setattr(model, "encode_hidden_states", counted)
    cached = cache_prompt_features(prompts, model, tmp_path)
    assert len(cached) == 5
    assert counted.done == 2  # three shards, of which one was there


class FailsAfter:
    def __init__(self, function, calls):
        self.function, self.calls, self.done = function, calls, 0

    def __call__(self, *args):
        if self.done == self.calls:
            raise KeyboardInterrupt
        self.done += 1
        return self.function(*args)


def test_a_full_disk_is_told_before_anything_runs(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    calls = count_llm_calls(model)
    with pytest.raises(OSError, match="The prompt features need .* GiB, but .* has 0.00 GiB free"):
        cache_prompt_features(prompts, model, tmp_path)
    assert not calls


def test_an_empty_prompt_and_a_missing_column_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="The prompt of row 1 is empty"):
        cache_prompt_features(Dataset.from_dict({"input_ids": [[4], []]}), model, tmp_path)
    with pytest.raises(ValueError, match=r"no column `input_ids`, only \['text'\]"):
        cache_prompt_features(Dataset.from_dict({"text": ["a"]}), model, tmp_path)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_of_cached_features_gives_the_loss_of_the_live_llm(model, tokenizer, tmp_path, padding_side):
    tokenizer.llm_tokenizer.padding_side = padding_side
    pairs = Dataset.from_dict({"prompt": ["w1 w2 w3", "w4", "w5 w6"], "completion": ["ab", "cde", "f"]})
    pairs = tokenize_pairs(pairs, tokenizer, prompt_max_length=16, response_max_length=16)
    cached = cache_prompt_features(pairs, model, tmp_path)
    collate = DataCollatorForLLM2SLM(tokenizer)
    live = model(**collate([pairs[i] for i in range(3)]))
    model.llm = None
    from_cache = model(**collate([cached[i] for i in range(3)]))
    torch.testing.assert_close(from_cache.loss, live.loss, atol=1e-3, rtol=1e-3)


def test_pairs_with_an_empty_or_a_too_long_side_are_dropped(tokenizer):
    rows = {"prompt": ["w1 w2", "w1 " * 30, "w1"], "completion": ["ab", "a", ""]}
    pairs = tokenize_pairs(Dataset.from_dict(rows), tokenizer, prompt_max_length=16, response_max_length=16)
    assert pairs["prompt"][:] == ["w1 w2"]
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['completion'\]; it has \['prompt'\]"):
        tokenize_pairs(Dataset.from_dict({"prompt": ["a"]}), tokenizer, 8, 8)
