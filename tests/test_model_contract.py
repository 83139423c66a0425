"""What holds for every kind of LLM, every kind of SLM and every fusion, in pairs of the three."""

import threading

import pytest
import torch
from conftest import (
    FUSIONS,
    LLM_KINDS,
    LLM_VOCAB,
    SLM_HIDDEN,
    SLM_KINDS,
    build_labels,
    build_llm,
    build_model,
    build_prompts,
    build_slm,
    build_slm_tokenizer,
    count_hooks,
    jitter,
    padded,
    response_tokens,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, TextIteratorStreamer

from llm2slm import LLM2SLMForConditionalGeneration, modeling_llm2slm

# Each LLM with each SLM, and each of both with each fusion: the fusions take turns.
MATRIX = [
    (llm, slm, list(FUSIONS)[(i + j) % len(FUSIONS)])
    for i, llm in enumerate(LLM_KINDS)
    for j, slm in enumerate(SLM_KINDS)
]
# Each LLM and each SLM with each fusion: for what a kind of LLM cannot do to a kind of SLM.
PAIRWISE = [
    (llm, list(SLM_KINDS)[(i + j) % len(SLM_KINDS)], fusion)
    for i, llm in enumerate(LLM_KINDS)
    for j, fusion in enumerate(FUSIONS)
]
PROMPTS = build_prompts()
LABELS = build_labels()
NEW_TOKENS = 6


@pytest.fixture(scope="module", params=MATRIX, ids="-".join)
def model(request):
    """One model for all tests of a combination: a test that changes it builds its own."""
    llm, slm, fusion = request.param
    return build_model(llm, slm, **FUSIONS[fusion])


pairwise = pytest.mark.parametrize("model", PAIRWISE, ids="-".join, indirect=True)


def greedy(model, prompt, **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    return model.generate(**prompt, **kwargs)


def test_a_batch_padded_on_either_side_writes_what_single_prompts_write(model):
    def written(prompt):  # no token twice, so that one favourite does not hide what the others do
        return [response_tokens(model, row) for row in greedy(model, prompt, no_repeat_ngram_size=1)]

    single = [written({"input_ids": prompt[None]})[0] for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in single}) > 1  # the prompt matters
    for side in ("left", "right"):
        assert written(padded(PROMPTS, side)) == single, side


@torch.no_grad()
def test_a_batch_padded_on_either_side_scores_like_single_prompts(model):
    single = torch.cat([model(input_ids=p[None], labels=LABELS[i, None]).logits for i, p in enumerate(PROMPTS)])
    assert (single[0] - single[2]).abs().max() > 0.1
    for side in ("left", "right"):
        logits = model(**padded(PROMPTS, side), labels=LABELS).logits
        torch.testing.assert_close(logits[LABELS != -100], single[LABELS != -100], atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_cached_decoding_has_the_logits_of_one_teacher_forced_forward_and_greedy_takes_the_best(model):
    output = greedy(model, padded(PROMPTS), num_beams=1, output_logits=True, return_dict_in_generate=True)
    cached = torch.stack(output.logits, dim=1)  # (batch_size, response_length, vocab_size)
    response = output.sequences[:, 1:] if model.config.slm_config.is_encoder_decoder else output.sequences
    start = torch.full_like(response[:, :1], model.config.decoder_start_token_id)
    decoder_input_ids = torch.cat([start, response[:, :-1]], dim=1)
    uncached = model(**padded(PROMPTS), decoder_input_ids=decoder_input_ids).logits
    torch.testing.assert_close(cached, uncached, atol=2e-4, rtol=1e-4)
    for row, best in zip(output.sequences, uncached.argmax(-1), strict=True):
        written = response_tokens(model, row)
        assert best.tolist()[: len(written)] == written
    assert greedy(model, padded(PROMPTS)).equal(output.sequences)


@pairwise
def test_a_static_cache_writes_what_a_dynamic_one_writes(model):
    dynamic = greedy(model, padded(PROMPTS))
    static = greedy(model, padded(PROMPTS), cache_implementation="static", disable_compile=True)
    assert [response_tokens(model, row) for row in static] == [response_tokens(model, row) for row in dynamic]


@pairwise
def test_the_llm_reads_the_prompt_exactly_once_in_generate(model, count_calls):
    calls = count_calls(model.llm)
    greedy(model, padded(PROMPTS))
    assert len(calls) == 1
    greedy(model, padded(PROMPTS), max_new_tokens=3, num_beams=2, num_return_sequences=2)
    assert len(calls) == 2


@pairwise
def test_encoded_prompts_are_reused_without_the_llm(model, count_calls):
    ids = greedy(model, padded(PROMPTS))
    encoding = model.encode_prompt(**padded(PROMPTS))
    calls = count_calls(model.llm)
    assert greedy(model, encoding).equal(ids)
    assert not calls


@pairwise
@torch.no_grad()
def test_cached_features_give_the_loss_of_live_ones(model, count_calls):
    prompt = padded(PROMPTS)
    live = model(**prompt, labels=LABELS)
    features = model.encode_hidden_states(**prompt)
    assert features.shape == (*prompt["input_ids"].shape, model.config.prompt_hidden_size)
    calls = count_calls(model.llm)
    assert model(**prompt, prompt_hidden_states=features, labels=LABELS).loss.equal(live.loss)
    other = model(**prompt, prompt_hidden_states=features.flip(0), labels=LABELS)
    assert (other.logits - live.logits).abs().max() > 0.05  # the features matter
    assert not calls


@pairwise
@torch.no_grad()
def test_a_saved_model_loads_bit_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    assert [name for name in saved if not saved[name].equal(found[name])] == []
    assert loaded(**padded(PROMPTS), labels=LABELS).logits.equal(model(**padded(PROMPTS), labels=LABELS).logits)
    assert greedy(loaded, padded(PROMPTS)).equal(greedy(model, padded(PROMPTS)))


@pytest.mark.parametrize(("llm", "slm", "fusion"), PAIRWISE, ids=map("-".join, PAIRWISE))
def test_training_changes_projector_and_slm_and_nothing_of_the_llm(llm, slm, fusion):
    model = build_model(llm, slm, **FUSIONS[fusion]).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # An SLM's fixed sinusoids are not trained either.
    fixed = {name for name, parameter in model.slm.named_parameters("slm") if not parameter.requires_grad}
    assert all("embed_positions" in name for name in fixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(**padded(PROMPTS), labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    same = {name for name, parameter in model.named_parameters() if parameter.equal(before[name])}
    assert same == {name for name, _ in model.llm.named_parameters("llm")} | fixed


# -------------------------------------------------------------------------------------------------- one part at a time
@pytest.mark.parametrize("slm", SLM_KINDS)
def test_the_llm_reads_the_prompt_once_however_the_slm_decodes(slm, count_calls):
    model = build_model(slm=slm)
    for decoding in (
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
        {"use_cache": False},
    ):
        calls = count_calls(model.llm)
        greedy(model, padded(PROMPTS), **decoding)
        assert len(calls) == 1, decoding
    calls = count_calls(model.llm)
    streamer = TextIteratorStreamer(build_slm_tokenizer(), timeout=60)
    kwargs = {"input_ids": PROMPTS[0][None], "max_new_tokens": NEW_TOKENS, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=kwargs)
    thread.start()
    assert list(streamer)
    thread.join()
    assert len(calls) == 1


@pytest.mark.parametrize("slm", SLM_KINDS)
@torch.no_grad()
def test_adding_nothing_to_a_shared_tokenizers_embeddings_is_the_slm_itself(slm):
    model = build_model(slm=slm, fusion="add", shared_tokenizer=True)
    model.projector.out.weight.zero_()
    model.projector.out.bias.zero_()
    ids, labels = PROMPTS[1][None], LABELS[:1]
    if model.config.slm_config.is_encoder_decoder:
        expected = model.slm(input_ids=ids, labels=labels).logits
    else:
        expected = model.slm(input_ids=torch.cat([ids, labels[:, :-1]], dim=1)).logits[:, -labels.shape[1] :]
    torch.testing.assert_close(model(input_ids=ids, labels=labels).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def hidden_states(llm, prompt):
    """The states of one prompt, all layers, as Transformers itself gives them."""
    llm = llm.get_encoder() if llm.config.is_encoder_decoder else llm.base_model
    return llm(input_ids=prompt[None], output_hidden_states=True).hidden_states


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2, [1], [0, 2], [2, 0, 1], [-1, -3]], ids=str)
@pytest.mark.parametrize("kind", LLM_KINDS)
def test_the_layers_read_are_those_of_output_hidden_states(kind, layer):
    model = build_model(kind, llm_layer=layer)
    reference = build_llm(kind)
    layers = layer if isinstance(layer, list) else [layer]
    for side in ("left", "right"):
        prompt = padded(PROMPTS, side)
        states = model.encode_hidden_states(**prompt)
        for i, tokens in enumerate(PROMPTS):
            all_states = hidden_states(reference, tokens)
            expected = torch.cat([all_states[k] for k in layers], dim=-1)[0]
            found = states[i, prompt["attention_mask"][i] == 1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fusion", ["replace", "add_different"])
@pytest.mark.parametrize("kind", LLM_KINDS)
def test_layers_above_the_highest_one_read_are_not_kept(kind, fusion):
    whole = build_model(kind, **FUSIONS[fusion])
    cut = build_model(kind, llm_layer=1, **FUSIONS[fusion])
    gone = {name for name, _ in whole.llm.named_parameters()} - {name for name, _ in cut.llm.named_parameters()}
    assert gone and all(".1." in name for name in gone)  # the second layer, and nothing else
    assert {name for name in whole.llm.state_dict() if name in gone} == gone
    assert not gone & set(cut.llm.state_dict())
    assert (
        build_model(kind, llm_layer=0).llm.num_parameters() == cut.llm.num_parameters()
    )  # one layer stays: its input


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_an_llm_passed_as_an_object_is_not_changed_by_reading_a_lower_layer(kind):
    llm = build_llm(kind)
    before, names = hidden_states(llm, PROMPTS[1]), list(llm.state_dict())
    hooks = count_hooks(llm)  # Transformers 5 sets some to return hidden states
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, build_slm(), llm_layer=1)
    model.encode_prompt(**padded(PROMPTS))
    assert list(llm.state_dict()) == names
    assert count_hooks(llm) == hooks
    for found, expected in zip(hidden_states(llm, PROMPTS[1]), before, strict=True):
        assert found.equal(expected)
    shared = {parameter.data_ptr() for parameter in llm.parameters()}
    assert {parameter.data_ptr() for parameter in model.llm.parameters()} < shared  # and not copied


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", LLM_KINDS)
def test_prompts_of_other_lengths_are_read_in_another_run_when_that_saves_time(kind, side, count_calls, monkeypatch):
    model = build_model(llm=kind)
    prompt = padded(build_prompts((3, 9, 2, 9)), side)
    mask = prompt["attention_mask"].bool()
    calls = count_calls(model.llm)
    together = model.encode_hidden_states(**prompt)
    assert len(calls) == 1
    monkeypatch.setattr(modeling_llm2slm, "RUN_TOKENS", 4)  # less than the 13 tokens of padding
    apart = model.encode_hidden_states(**prompt)
    assert len(calls) == 3 and apart.shape == together.shape
    torch.testing.assert_close(apart[mask], together[mask], atol=2e-5, rtol=1e-4)


def test_a_run_of_its_own_has_to_save_more_than_it_costs():
    model = build_model()
    lengths = torch.tensor([20, 100, 19, 101, 50])
    mask = (torch.arange(101) < lengths[:, None]).long()
    runs = {frozenset(rows) for rows in model._rows_run_together(mask)}
    assert runs == {frozenset({1, 3}), frozenset({4}), frozenset({0, 2})}
    mask = (torch.arange(101) < torch.tensor([80, 100, 90, 101])[:, None]).long()  # 33 tokens of padding, 32 a run
    assert len(model._rows_run_together(mask)) == 1


def test_the_head_of_an_encoder_passed_as_an_object_is_not_read():
    torch.manual_seed(0)
    llm = AutoModelForMaskedLM.from_config(LLM_KINDS["bert"](24, 60)).eval()
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, build_slm())
    expected = hidden_states(llm, PROMPTS[0])[-1]
    torch.testing.assert_close(model.encode_hidden_states(PROMPTS[0][None]), expected)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    "projector",
    [
        {"projector_type": "linear"},
        {"projector_norm": None},
        {"projector_norm": "standardize"},
        {"llm_layer": [0, 1, 2]},
    ],
)
@torch.no_grad()
def test_each_projector_maps_to_the_slms_width_and_matters(fusion, projector):
    model = build_model(**FUSIONS[fusion], **projector)
    encoding = model.encode_prompt(**padded(PROMPTS))
    assert encoding.prompt_embeds.shape == (3, 9, model.config.slm_hidden_size)
    assert encoding.attention_mask.equal(padded(PROMPTS)["attention_mask"])
    loss = model(**padded(PROMPTS), labels=LABELS).loss
    model.projector.out.weight.neg_()
    assert (model(**padded(PROMPTS), labels=LABELS).loss - loss).abs() > 1e-3


@pytest.mark.parametrize("slm", ["t5", "llama"])
@torch.no_grad()
def test_a_fresh_projector_speaks_at_the_scale_of_the_slms_embeddings(slm):
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(build_llm(), build_slm(slm))
    embeds = model.encode_prompt(**padded(build_prompts((60, 60)))).prompt_embeds
    assert embeds.std() == pytest.approx(model.get_input_embeddings().weight.std().item(), rel=0.5)


@pytest.mark.parametrize("slm", ["t5", "gpt2"])
def test_the_loss_is_the_mean_over_labels_or_their_sum_by_the_trainers_count(slm):
    model = build_model(slm=slm)
    whole = model(**padded(PROMPTS), labels=LABELS)
    count = (LABELS != -100).sum()
    expected = torch.nn.functional.cross_entropy(whole.logits[LABELS != -100], LABELS[LABELS != -100])
    torch.testing.assert_close(whole.loss, expected)
    # Two steps of accumulation, of 1 and 2 rows, give the loss of the whole batch.
    parts = [
        model(**{k: v[rows] for k, v in padded(PROMPTS).items()}, labels=LABELS[rows], num_items_in_batch=count).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)


# -------------------------------------------------------------------------------------------------- trimmed vocabulary
TRIMMED_VOCAB = 40
TOKEN_MAP = [token - 10 if 10 <= token < 50 else -1 for token in range(LLM_VOCAB)]  # the SLM lacks 20 of the 60


def build_trimmed_model(slm="llama", llm=None, **config):
    """The SLM's tokenizer is the LLM's without its first and its last ten tokens."""
    torch.manual_seed(1)
    slm_config = SLM_KINDS[slm](SLM_HIDDEN, TRIMMED_VOCAB)
    auto_class = AutoModelForSeq2SeqLM if slm_config.is_encoder_decoder else AutoModelForCausalLM
    return LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        build_llm() if llm is None else llm,
        jitter(auto_class.from_config(slm_config)).eval(),
        **{"fusion": "add", "shared_tokenizer": True, "prompt_token_map": TOKEN_MAP, **config},
    )


@pytest.mark.parametrize("slm", SLM_KINDS)
@torch.no_grad()
def test_a_trimmed_slm_reads_the_prompt_with_its_own_ids_and_lacking_tokens_as_the_mean(slm):
    model = build_trimmed_model(slm)
    model.projector.out.weight.zero_()
    model.projector.out.bias.zero_()
    embeds = model.encode_prompt(torch.tensor([[10, 49, 9, 50]])).prompt_embeds[0]
    weight = model.get_input_embeddings()(torch.arange(TRIMMED_VOCAB))
    scale = SLM_HIDDEN**0.5 if slm == "marian" else 1.0
    torch.testing.assert_close(embeds[:2], weight[[0, 39]] * scale)
    torch.testing.assert_close(embeds[2:], weight.mean(dim=0).expand(2, -1) * scale)
    labels = LABELS.clamp(max=TRIMMED_VOCAB - 1)
    assert model(**padded(PROMPTS), labels=labels).loss.isfinite()
    assert greedy(model, padded(PROMPTS)).max() < TRIMMED_VOCAB


@pytest.mark.parametrize("fusion", ["add", "replace"])
@torch.no_grad()
def test_a_trimmed_model_loads_bit_equal_and_reads_without_its_llm(llm_folder, tmp_path, fusion):
    model = build_trimmed_model(llm=llm_folder, fusion=fusion)
    assert model.prompt_token_map.tolist() == TOKEN_MAP and model.prompt_token_map.dtype == torch.int32
    model.save_pretrained(tmp_path / "checkpoint")
    prompt, labels = padded(PROMPTS), LABELS.clamp(max=TRIMMED_VOCAB - 1)
    expected = model(**prompt, labels=labels).logits
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert loaded.prompt_token_map.equal(model.prompt_token_map)
    assert loaded(**prompt, labels=labels).logits.equal(expected)
    half = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16)
    assert half.prompt_token_map.equal(model.prompt_token_map)
    placed = LLM2SLMForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint", device_map={"llm": "cpu", "projector": "cpu", "slm": "cpu"}
    )
    assert placed(**prompt, labels=labels).logits.equal(expected)
    without = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", load_llm=False)
    states = model.encode_hidden_states(**prompt)
    assert without.llm is None
    assert without(**prompt, prompt_hidden_states=states, labels=labels).logits.equal(expected)


def test_a_trimmed_checkpoint_without_its_token_map_is_refused(llm_folder, tmp_path):
    build_trimmed_model(llm=llm_folder).save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.safetensors"
    weights = load_file(path)
    del weights["prompt_token_map"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are not this model's: they lack prompt_token_map"):
        LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")


@torch.no_grad()
def test_an_adapter_of_a_trimmed_model_loads_onto_it(tmp_path):
    config = LoraConfig(target_modules=r"slm\..*\.q_proj", modules_to_save=["projector"], init_lora_weights=False)
    adapted = get_peft_model(build_trimmed_model(), config)
    adapted.save_pretrained(tmp_path)
    labels = LABELS.clamp(max=TRIMMED_VOCAB - 1)
    loaded = PeftModel.from_pretrained(build_trimmed_model(), tmp_path)
    expected = adapted(**padded(PROMPTS), labels=labels).logits
    assert loaded(**padded(PROMPTS), labels=labels).logits.equal(expected)
    assert not build_trimmed_model()(**padded(PROMPTS), labels=labels).logits.equal(expected)
