"""Where projector and SLM start: at the SLM alone, or at the LLM's own states."""

import copy

import pytest
import torch
from conftest import build_llm, build_model, build_slm, gemma3, jitter, llama
from datasets import Dataset
from test_building import CORPUS, OTHER_TEXTS, TEXTS, byte_level
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GraniteConfig

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.building import (
    fit_head,
    make_slm,
    slice_lm,
    standardize_states,
    start_at_zero,
    start_from_states,
    token_map,
    trim_tokenizer,
)
from llm2slm.data.prompt_features import cache_prompt_features

PROMPTS = [*TEXTS[:3], *CORPUS[:5], *OTHER_TEXTS]


def build_llm_for(tokenizer, hidden_size=48, depth=2):
    torch.manual_seed(0)
    llm = make_slm(tokenizer, hidden_size, num_hidden_layers=depth, num_attention_heads=4, tie_word_embeddings=False)
    return jitter(llm)


def pair_with_a_trimmed_tokenizer(texts=PROMPTS, depth=2, llm=None, **config):
    llm_tokenizer = byte_level()
    llm = build_llm_for(llm_tokenizer, depth=depth) if llm is None else llm
    trimmed, token_ids = trim_tokenizer(llm_tokenizer, texts)
    torch.manual_seed(2)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        copy.deepcopy(llm),
        slice_lm(llm, [1], token_ids),
        shared_tokenizer=True,
        prompt_token_map=token_map(len(llm_tokenizer), token_ids),
        **config,
    )
    return model, LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, trimmed)


def cached(model, tokenizer, folder, prompts=PROMPTS):
    rows = Dataset.from_dict({"input_ids": tokenizer(list(prompts))["input_ids"]})
    return cache_prompt_features(rows, model, folder)


# ----------------------------------------------------------------------------------------------------------- one scale
@pytest.mark.parametrize("fusion", ["replace", "add"])
@pytest.mark.parametrize("layers", [1, [0, 2]])
def test_standardized_every_number_of_the_states_has_mean_zero_and_deviation_one(fusion, layers, tmp_path):
    tokenizer = byte_level()
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        build_llm_for(tokenizer), build_slm("llama"), fusion=fusion, llm_layer=layers, projector_norm="standardize"
    )
    data = cached(model, tokenizer, tmp_path)
    states = torch.cat([torch.as_tensor(row["prompt_hidden_states"]).float() for row in data])
    norms = model.projector.norms
    width = model.projector.llm_hidden_size
    read = states.split(width, dim=-1)[: len(norms)]
    assert all(norm(part).equal(part) for norm, part in zip(norms, read, strict=True))
    standardize_states(model, data)
    for norm, part in zip(norms, read, strict=True):
        scaled = norm(part)
        torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(width), atol=1e-4, rtol=0)
        torch.testing.assert_close(scaled.std(dim=0, correction=0), torch.ones(width), atol=1e-3, rtol=0)
    model.save_pretrained(tmp_path / "pair", include_llm=True)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "pair")
    assert loaded.projector(states[None]).equal(model.projector(states[None]))


def test_a_number_that_never_varies_is_not_blown_up(tmp_path):
    model, _ = pair_with_a_trimmed_tokenizer(llm_layer=1, projector_norm="standardize")
    states = torch.randn(40, 48)
    states[:, 7] = 0.1
    rows = [{"input_ids": [5] * 10, "prompt_hidden_states": part.tolist()} for part in states.split(10)]
    standardize_states(model, Dataset.from_list(rows).with_format("torch"))
    assert model.projector.norms[0](states)[:, 7].abs().max() < 1e-3


def test_only_a_projector_that_standardizes_is_given_mean_and_deviation(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer()
    with pytest.raises(ValueError, match="`projector_norm` must be 'standardize', got 'layer_norm'"):
        standardize_states(model, cached(model, tokenizer, tmp_path))


# ------------------------------------------------------------------------------------------------------------- at zero
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "marian"])
def test_from_zero_the_pair_is_the_slm_alone(kind):
    slm = build_slm(kind)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        build_llm("gpt2"), copy.deepcopy(slm), fusion="add", shared_tokenizer=True
    )
    ids, labels = torch.randint(4, 60, (2, 7)), torch.randint(4, 60, (2, 5))
    assert not torch.allclose(model(input_ids=ids, labels=labels).logits, alone(slm, ids, labels), atol=1e-3)
    start_at_zero(model)
    torch.testing.assert_close(model(input_ids=ids, labels=labels).logits, alone(slm, ids, labels))


@torch.no_grad()
def alone(slm, ids, labels):
    """The SLM's logits of the labels behind its own prompt."""
    if slm.config.is_encoder_decoder:
        return slm(input_ids=ids, labels=labels).logits
    return slm(torch.cat([ids, labels[:, :-1]], dim=1)).logits[:, -labels.shape[1] :]


def test_from_zero_a_pair_with_a_trimmed_tokenizer_writes_what_the_slm_alone_writes():
    model, tokenizer = pair_with_a_trimmed_tokenizer(fusion="add")
    slm = copy.deepcopy(model.slm)
    start_at_zero(model)
    arguments = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    written = model.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), **arguments)
    own = tokenizer.slm_tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    ids = slm.generate(**own, **arguments)
    assert torch.equal(written, ids[:, own["input_ids"].shape[1] :])


def test_from_zero_the_projector_learns():
    model, tokenizer = pair_with_a_trimmed_tokenizer(fusion="add")
    start_at_zero(model)
    batch = tokenizer(PROMPTS[0], text_target=PROMPTS[1], return_tensors="pt")
    model.train()(**batch).loss.backward()
    assert model.projector.out.weight.grad.abs().max() > 0


@pytest.mark.parametrize("config", [{"fusion": "replace"}, {"fusion": "add"}])
def test_a_start_at_zero_that_would_leave_nothing_of_the_prompt_is_refused(config):
    model = build_model("llama", "llama", **config)
    before = copy.deepcopy(model.projector.state_dict())
    with pytest.raises(ValueError, match="needs `fusion='add'` and `shared_tokenizer=True`"):
        start_at_zero(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.projector.state_dict().items())


# --------------------------------------------------------------------------------------------------- the LLM's states
UPPER = {"llm_layer": 1, "projector_type": "linear", "projector_norm": None}  # the SLM is layer 2 of the LLM


def granite(hidden_size, vocab_size):
    multipliers = {"embedding_multiplier": 12.0, "residual_multiplier": 0.2, "attention_multiplier": 0.1}
    return llama(hidden_size, vocab_size, GraniteConfig, **multipliers, logits_scaling=8.0)


def gemma2(hidden_size, vocab_size):
    return llama(hidden_size, vocab_size, Gemma2Config, head_dim=8)


# Gemma 3 multiplies the embeddings that it looks up; Granite, and Gemma 2 before Transformers 5, those it is given.
@pytest.mark.parametrize("norm", [None, "standardize"])
@pytest.mark.parametrize("kind", [llama, gemma3, gemma2, granite])
def test_from_the_llms_states_the_slice_sees_and_says_what_the_llm_does(kind, norm, tmp_path):
    torch.manual_seed(0)
    llm = jitter(AutoModelForCausalLM.from_config(kind(48, len(byte_level())))).eval()
    model, tokenizer = pair_with_a_trimmed_tokenizer(llm=llm, **UPPER | {"projector_norm": norm})
    token_ids = trim_tokenizer(byte_level(), PROMPTS)[1]
    data = cached(model, tokenizer, tmp_path)
    if norm is not None:
        standardize_states(model, data)
    start_from_states(model, data)
    for text in PROMPTS:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            found = model(**batch, labels=torch.tensor([[0]])).logits[0, 0]
            expected = llm(**batch).logits[0, -1, token_ids]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for index in (0, 3):
        ids = torch.tensor([data[index]["input_ids"]])
        with torch.no_grad():
            seen = model.slm.get_decoder()(
                model.prompt_token_map[ids].long(), output_hidden_states=True
            ).hidden_states[0]
            states = llm(ids, output_hidden_states=True).hidden_states[1]
        assert seen[:, 1:].norm().item() == pytest.approx(states[:, 1:].norm().item(), rel=0.5)
    assert fit_head(model, llm, data) == pytest.approx(1.0, abs=1e-3)  # no layer is left out


def test_from_the_llms_states_a_token_is_embedded_as_its_mean_state(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(**UPPER)
    texts = ["And light", "And light light", "And the light"] * 200  # "the" is never first
    head = model.slm.get_output_embeddings().weight.detach().clone()
    data = cached(model, tokenizer, tmp_path, texts)
    start_from_states(model, data)
    (llm_id,) = tokenizer(" light")["input_ids"]
    states = [
        state
        for row in data
        for token, state in zip(row["input_ids"][1:], torch.as_tensor(row["prompt_hidden_states"])[1:], strict=True)
        if token == llm_id
    ]
    found = model.slm.get_input_embeddings().weight[model.prompt_token_map[llm_id]]
    torch.testing.assert_close(found, torch.stack(states).float().mean(dim=0), atol=0.02, rtol=0.02)
    assert torch.equal(model.slm.get_output_embeddings().weight, head)


def test_added_to_the_mean_states_the_projection_is_zero_at_first(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(fusion="add", llm_layer=1)
    start_from_states(model, cached(model, tokenizer, tmp_path))
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    own = model.slm.get_input_embeddings()(model.prompt_token_map[ids].long())
    torch.testing.assert_close(model.encode_prompt(ids).prompt_embeds, own)
    assert own.std() > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"projector_type": "mlp"}, "projector_type to be 'linear'"),
        ({"projector_norm": "layer_norm"}, "projector_norm to be None"),
        ({"llm_layer": [0, 1]}, "number of layers read to be 1, got 2"),
    ],
)
def test_a_start_from_states_that_cannot_be_made_says_so(change, match, tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(**{**UPPER, **change})
    with pytest.raises(ValueError, match=match):
        start_from_states(model, cached(model, tokenizer, tmp_path))


def test_a_start_from_states_of_an_slm_that_normalises_embeddings_is_refused(tmp_path):
    bloom = BloomConfig(vocab_size=len(byte_level()), hidden_size=48, n_layer=2, n_head=4)
    model, tokenizer = pair_with_a_trimmed_tokenizer(llm=AutoModelForCausalLM.from_config(bloom), **UPPER)
    with pytest.raises(ValueError, match="BloomForCausalLM normalises them"):
        start_from_states(model, cached(model, tokenizer, tmp_path))


def test_a_start_from_states_needs_states_of_the_slms_tokens(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(**UPPER)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['prompt_hidden_states'\].*cache_prompt_features"):
        start_from_states(model, Dataset.from_dict({"input_ids": [[1, 2]]}))
    of_one_token = cached(model, tokenizer, tmp_path, ["a", "b"])  # and the first is left out
    with pytest.raises(ValueError, match="No token of the texts is in the SLM's vocabulary"):
        start_from_states(model, of_one_token)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------- the slice's head
@torch.no_grad()
def distance_to_the_llm(model, tokenizer, llm) -> float:
    """Of the pair's probabilities for the first token of a response from the LLM's, over all prompts."""
    token_ids = trim_tokenizer(byte_level(), PROMPTS)[1]
    total = 0.0
    for text in PROMPTS:
        batch = tokenizer(text, return_tensors="pt")
        found = model(**batch, labels=torch.tensor([[0]])).logits[0, 0].softmax(dim=0)
        total += (found - llm(**batch).logits[0, -1, token_ids].softmax(dim=0)).abs().sum().item()
    return total


def test_the_head_of_a_slice_without_a_gap_stays(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(**UPPER)
    data = cached(model, tokenizer, tmp_path)
    start_from_states(model, data)
    head = model.slm.get_output_embeddings().weight.detach().clone()
    assert fit_head(model, build_llm_for(byte_level()), data) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(model.slm.get_output_embeddings().weight, head, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("fusion", ["replace", "add"])
def test_the_head_of_a_slice_with_a_gap_comes_nearer_to_the_llm(fusion, tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(depth=4, **UPPER, fusion=fusion)
    llm, data = build_llm_for(byte_level(), depth=4), cached(model, tokenizer, tmp_path)
    start_from_states(model, data)
    before, others = distance_to_the_llm(model, tokenizer, llm), copy.deepcopy(model.state_dict())
    assert 0 < fit_head(model, llm, data) < 1
    if fusion == "replace":  # `add` starts at the tokens' mean states, not at those of this prompt
        assert distance_to_the_llm(model, tokenizer, llm) < 0.8 * before
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, others[name])}
    assert changed == {"slm.lm_head.weight"}


def test_a_head_that_cannot_be_fitted_says_so(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(**UPPER)
    data, llm = cached(model, tokenizer, tmp_path), build_llm_for(byte_level())
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['prompt_hidden_states'\]"):
        fit_head(model, llm, Dataset.from_dict({"input_ids": [[1, 2]]}))
    model.slm.get_output_embeddings().weight = model.slm.get_input_embeddings().weight
    with pytest.raises(ValueError, match="start_from_states` comes first"):
        fit_head(model, llm, data)
