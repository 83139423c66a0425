"""Where the projector starts: at zero, or at the SLM's own embeddings of the prompt."""

import copy

import pytest
import torch
from conftest import build_llm, build_llm_tokenizer, build_model, build_slm, build_slm_tokenizer, jitter
from datasets import Dataset
from test_building import CORPUS, OTHER_TEXTS, TEXTS, byte_level, roberta_like

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.building import make_slm, slice_lm, token_map, train_tokenizer, trim_tokenizer
from llm2slm.features import cache_prompt_features
from llm2slm.starts import align_projector, start_at_zero, start_from_states

PROMPTS = [*TEXTS[:3], *CORPUS[:5], *OTHER_TEXTS]


def build_llm_for(tokenizer, hidden_size=48):
    torch.manual_seed(0)
    llm = make_slm(tokenizer, hidden_size, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=False)
    return jitter(llm)


def pair_with_two_tokenizers(slm_tokenizer=None, slm=None, build_llm_tokenizer=byte_level, **config):
    llm_tokenizer = build_llm_tokenizer()
    slm_tokenizer = slm_tokenizer or train_tokenizer(CORPUS, 300)
    torch.manual_seed(1)
    slm = slm or jitter(make_slm(slm_tokenizer, 32, 1, 4))
    torch.manual_seed(2)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(build_llm_for(llm_tokenizer), slm, **config)
    return model, LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer)


def pair_with_a_trimmed_tokenizer(texts=PROMPTS, **config):
    llm_tokenizer = byte_level()
    llm = build_llm_for(llm_tokenizer)
    trimmed, token_ids = trim_tokenizer(llm_tokenizer, texts)
    torch.manual_seed(2)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm,
        slice_lm(llm, [1], token_ids),
        shared_tokenizer=True,
        prompt_token_map=token_map(len(llm_tokenizer), token_ids),
        **config,
    )
    return model, LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, trimmed)


def cached(model, tokenizer, folder, prompts=PROMPTS):
    rows = Dataset.from_dict({"input_ids": tokenizer(list(prompts))["input_ids"]})
    return cache_prompt_features(rows, model, folder)


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
    with pytest.raises(ValueError, match="needs `fusion='add'` and `shared_tokenizer=True`.*align_projector"):
        start_at_zero(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.projector.state_dict().items())


# ------------------------------------------------------------------------------------------------------------- aligned
EXACT = {"llm_layer": 0, "projector_type": "linear", "projector_norm": None}  # token in, token out


@torch.no_grad()
def prompt_embeds(model, tokenizer, text):
    return model.encode_prompt(**tokenizer(text, return_tensors="pt")).prompt_embeds[0]


@torch.no_grad()
def own_embeddings(model, tokenizer, text):
    ids = tokenizer.slm_tokenizer(text, return_tensors="pt")["input_ids"]
    return model.slm.get_input_embeddings()(ids)[0]


def explained(found, targets):
    return 1 - float((found - targets).square().sum() / (targets - targets.mean(dim=0)).square().sum())


def test_aligned_projections_are_the_slms_own_embeddings_where_the_projector_can_give_them(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(**EXACT)
    r_squared = align_projector(model, cached(model, tokenizer, tmp_path), tokenizer)
    assert 0.999 < r_squared <= 1
    for text in PROMPTS:
        own = own_embeddings(model, tokenizer, text)
        torch.testing.assert_close(prompt_embeds(model, tokenizer, text), own, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("config", [{}, {"llm_layer": [0, 1, -1], "projector_hidden_size": 64}])
def test_the_figure_is_the_share_of_the_variance_that_is_explained(config, tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(**config)
    before = copy.deepcopy(model.projector.state_dict())
    targets = torch.cat([own_embeddings(model, tokenizer, text) for text in PROMPTS])

    def found():
        return torch.cat([prompt_embeds(model, tokenizer, text) for text in PROMPTS])

    assert explained(found(), targets) < 0.1
    r_squared = align_projector(model, cached(model, tokenizer, tmp_path), tokenizer)
    assert 0.2 < r_squared < 1
    assert r_squared == pytest.approx(explained(found(), targets), abs=5e-3)  # the cache is float16
    changed = {name for name, weight in model.projector.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"out.weight", "out.bias"}


def test_with_two_tokenizers_the_target_is_the_mean_of_the_tokens_that_overlap(tmp_path):
    model = build_model("llama", "llama", **EXACT)
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    texts = ["w1 w2 w13", "w13 user w2", "w40 w2 w1"]
    assert align_projector(model, cached(model, tokenizer, tmp_path, texts), tokenizer) > 0.999
    embeddings = model.slm.get_input_embeddings().weight
    for text in texts:
        found = prompt_embeds(model, tokenizer, text)[:-1]  # the end token is no text
        for embed, word in zip(found, text.split(), strict=True):
            pieces = {"user": ["▁u", "s", "e", "r"]}.get(word, ["▁w", *word[1:]])
            target = embeddings[tokenizer.convert_tokens_to_ids(pieces)].mean(dim=0)
            torch.testing.assert_close(embed, target, atol=0.02, rtol=0.02)


def test_spaces_and_newlines_have_targets_too(tmp_path):
    model, tokenizer = pair_with_two_tokenizers(build_llm_tokenizer=roberta_like, **EXACT)
    texts = ["a\n", "b \n\n", "c  d\n"]
    assert align_projector(model, cached(model, tokenizer, tmp_path, texts), tokenizer) > 0.999
    newline = own_embeddings(model, tokenizer, "\n")[0]
    read = tokenizer("a\n")["input_ids"]
    place = read.index(tokenizer.llm_tokenizer.convert_tokens_to_ids("Ċ"))
    torch.testing.assert_close(prompt_embeds(model, tokenizer, "a\n")[place], newline, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("slm", ["t5", "marian", "gpt2"])
@pytest.mark.parametrize("config", [{}, {"fusion": "add", "llm_layer": [1, 2]}])
def test_any_pair_of_kinds_and_tokenizers_can_be_aligned(slm, config, tmp_path):
    slm_tokenizer = build_slm_tokenizer("$A </s>" if slm == "t5" else "$A")
    model, tokenizer = pair_with_two_tokenizers(slm_tokenizer, build_slm(slm), **config)
    data = cached(model, tokenizer, tmp_path)
    r_squared = align_projector(model, data, tokenizer)
    assert 0.2 < r_squared < 1
    found = prompt_embeds(model, tokenizer, PROMPTS[0])
    for layer in (model.projector.out, model.projector.llm_embeddings):
        if layer is not None:
            jitter(layer)  # where the fitted layers were before makes no difference
    assert align_projector(model, data, tokenizer) == pytest.approx(r_squared)
    torch.testing.assert_close(prompt_embeds(model, tokenizer, PROMPTS[0]), found)


def test_tokens_that_a_trimmed_vocabulary_lacks_do_not_count(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(texts=PROMPTS[:1], **EXACT)
    data = cached(model, tokenizer, tmp_path)
    assert (model.prompt_token_map[torch.tensor(sum(data["input_ids"], []))] < 0).any()
    assert align_projector(model, data, tokenizer) > 0.999


def test_only_so_many_rows_are_read(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(projector_type="linear", llm_layer=-1)
    data = cached(model, tokenizer, tmp_path)
    everything = align_projector(model, data, tokenizer)
    assert align_projector(model, data, tokenizer, max_rows=1) > everything  # the less there is, the better it fits
    assert align_projector(model, data, tokenizer, max_rows=len(data)) == pytest.approx(everything)


def test_an_alignment_that_cannot_be_made_says_so_and_changes_nothing(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer()
    before = copy.deepcopy(model.projector.state_dict())
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['prompt_hidden_states'\].*cache_prompt_features"):
        align_projector(model, Dataset.from_dict({"input_ids": [[1, 2]]}), tokenizer)
    assert all(torch.equal(weight, before[name]) for name, weight in model.projector.state_dict().items())
    model = build_model("llama", "llama")
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    with pytest.raises(ValueError, match="No token of the prompts has a target"):
        align_projector(model, cached(model, tokenizer, tmp_path, ["", ""]), tokenizer)
    model, tokenizer = pair_with_a_trimmed_tokenizer(fusion="add")
    with pytest.raises(ValueError, match="use `start_at_zero`"):
        align_projector(model, cached(model, tokenizer, tmp_path), tokenizer)


# --------------------------------------------------------------------------------------------------- the LLM's states
UPPER = {"llm_layer": 1, "projector_type": "linear", "projector_norm": None}  # the SLM is layer 2 of the LLM


def test_from_the_llms_states_the_first_token_is_the_llms(tmp_path):
    model, tokenizer = pair_with_a_trimmed_tokenizer(**UPPER)
    llm, token_ids = build_llm_for(byte_level()), trim_tokenizer(byte_level(), PROMPTS)[1]
    start_from_states(model, cached(model, tokenizer, tmp_path))
    for text in PROMPTS:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            found = model(**batch, labels=torch.tensor([[0]])).logits[0, 0]
            expected = llm(**batch).logits[0, -1, token_ids]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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
