"""`generate` takes what Transformers' own takes, and its lengths mean the response."""

import threading

import pytest
import torch
from conftest import (
    BOS,
    EOS,
    PAD,
    SLM_KINDS,
    build_llm,
    build_model,
    build_prompts,
    build_slm,
    padded,
    response_length,
    response_tokens,
)
from transformers import GenerationConfig, LogitsProcessor, TextIteratorStreamer, TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

from llm2slm import LLM2SLMForConditionalGeneration

PROMPT = padded(build_prompts())
LONG_PROMPT = padded(build_prompts((30, 25)))
SPECIAL_IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}


class Varied(LogitsProcessor):
    """Prefers another token at each step: a greedy response in which no token comes twice, and that never ends."""

    def __call__(self, input_ids, scores):
        scores = scores.scatter(1, input_ids, float("-inf")) if input_ids.shape[1] else scores
        scores[:, :4] = float("-inf")
        return scores


@pytest.fixture(scope="module", params=SLM_KINDS)
def model(request):
    return build_model(slm=request.param)


@pytest.fixture
def fresh_model():
    """A decoder-only SLM, for tests that change the model."""
    return build_model(slm="llama")


def never_ending(model, **kwargs):
    return model.generate(**kwargs, do_sample=False, logits_processor=[Varied()])


# ------------------------------------------------------------------------------------------------------ decoding modes
def test_sampling_gives_several_different_responses_to_each_prompt(model):
    set_seed(0)
    ids = model.generate(**PROMPT, do_sample=True, num_return_sequences=4, max_new_tokens=8)
    assert ids.shape[0] == 12
    for i in range(3):
        assert len({tuple(response_tokens(model, row)) for row in ids[4 * i : 4 * i + 4]}) > 1
    set_seed(0)
    again = model.generate(**PROMPT, do_sample=True, num_return_sequences=4, max_new_tokens=8)
    assert again.equal(ids)


def test_beams_come_best_first_with_scores_that_the_logits_confirm(model):
    output = model.generate(
        **PROMPT,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=5,
        min_new_tokens=5,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = output.sequences_scores.reshape(3, 3)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    transitions = model.slm.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    torch.testing.assert_close(transitions.sum(dim=1), output.sequences_scores, atol=1e-4, rtol=1e-4)
    for i in range(3):
        assert len({tuple(row.tolist()) for row in output.sequences[3 * i : 3 * i + 3]}) == 3


def test_transition_scores_of_greedy_decoding_are_the_models_log_probabilities(model):
    output = model.generate(
        **PROMPT, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    scores = model.slm.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert scores.shape == (3, len(output.scores))
    best = torch.stack([step.log_softmax(-1).max(-1).values for step in output.scores], dim=1)
    for i, row in enumerate(output.sequences):
        written = len(response_tokens(model, row))
        torch.testing.assert_close(scores[i, :written], best[i, :written], atol=1e-4, rtol=1e-4)


def test_return_dict_in_generate_returns_what_was_asked_for(model):
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "max_new_tokens": 4}
    output = never_ending(model, **PROMPT, return_dict_in_generate=True, **wanted)
    assert output.sequences.equal(never_ending(model, **PROMPT, max_new_tokens=4))
    assert len(output.scores) == len(output.logits) == 4
    states = "decoder_hidden_states" if model.config.slm_config.is_encoder_decoder else "hidden_states"
    assert len(output[states]) == 4


def test_streamed_text_is_the_text_of_generate(model, tokenizer):
    prompt = {name: value[1:2] for name, value in PROMPT.items()}
    expected = tokenizer.decode(never_ending(model, **prompt, max_new_tokens=20)[0], skip_special_tokens=True)
    # What an encoder-decoder streams first is its start token.
    skip_prompt = model.config.slm_config.is_encoder_decoder
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True, timeout=60)
    kwargs = {**prompt, "max_new_tokens": 20, "streamer": streamer}
    thread = threading.Thread(target=never_ending, args=(model,), kwargs=kwargs)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 2
    assert "".join(pieces) == expected


def test_text_streamer_prints_the_response_alone(model, tokenizer, capsys):
    prompt = {name: value[1:2] for name, value in PROMPT.items()}
    ids = never_ending(model, **prompt, max_new_tokens=8, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_stop_strings_end_the_response_where_they_first_appear(model, tokenizer):
    prompt = {name: value[1:2] for name, value in PROMPT.items()}
    whole = tokenizer.decode(never_ending(model, **prompt, max_new_tokens=12)[0], skip_special_tokens=True)
    stop = whole.replace(" ", "")[4]
    kwargs = {"stop_strings": [stop], "tokenizer": tokenizer, "max_new_tokens": 12}
    text = tokenizer.decode(never_ending(model, **prompt, **kwargs)[0], skip_special_tokens=True)
    assert text == whole[: whole.index(stop) + 1]
    assert len(text) < len(whole)


def test_a_prompt_of_one_token_is_answered_as_in_any_batch(model):
    prompts = build_prompts((1, 6))
    alone = never_ending(model, input_ids=prompts[0][None], max_new_tokens=6)
    together = never_ending(model, **padded(prompts), max_new_tokens=6)
    assert response_tokens(model, alone[0]) == response_tokens(model, together[0])
    assert response_tokens(model, together[1]) != response_tokens(model, together[0])
    # Each step sees what was written before, not the prompt again.
    logits = model.generate(
        input_ids=prompts[0][None],
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    written = logits.sequences[:, model.config.slm_config.is_encoder_decoder :]
    start = torch.full_like(written[:, :1], model.config.decoder_start_token_id)
    with torch.no_grad():
        forced = model(input_ids=prompts[0][None], decoder_input_ids=torch.cat([start, written[:, :-1]], dim=1)).logits
    torch.testing.assert_close(torch.stack(logits.logits, dim=1), forced, atol=2e-4, rtol=1e-4)


def test_positional_ids_are_the_prompt_as_in_every_generate(model):
    ids = PROMPT["input_ids"][1:2]
    assert model.generate(ids, max_new_tokens=5).equal(model.generate(input_ids=ids, max_new_tokens=5))


# ------------------------------------------------------------------------------------------------------------- lengths
@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=["short prompt", "long prompt"])
def test_lengths_mean_the_response_whatever_the_prompts(model, prompt):
    assert response_length(model, never_ending(model, **prompt, max_new_tokens=7)) == 7
    # The start token of an encoder-decoder counts in `max_length`, as everywhere in Transformers.
    assert never_ending(model, **prompt, max_length=9).shape[1] == 9
    assert never_ending(model, **prompt, generation_config=GenerationConfig(max_length=9)).shape[1] == 9
    default = never_ending(model, **prompt).shape[1]
    if model.config.slm_config.is_encoder_decoder:  # 20 tokens with the start token or without, by version
        assert default == never_ending(model.slm, input_ids=prompt["input_ids"]).shape[1]
    else:
        assert default == 20


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=["short prompt", "long prompt"])
def test_minimum_lengths_mean_the_response_whatever_the_prompts(model, prompt):
    def lengths(**kwargs):
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=9, logits_processor=[EndAtOnce()], **kwargs)
        return {row.tolist().index(EOS) for row in ids}

    class EndAtOnce(LogitsProcessor):
        """Ends as soon as a minimum allows: what is forbidden stays at minus infinity."""

        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, EOS] = torch.where(scores[:, EOS].isinf(), scores[:, EOS], 1e6)
            return scores

    start = int(model.config.slm_config.is_encoder_decoder)
    assert lengths() == {start}
    assert lengths(min_new_tokens=5) == {start + 5}
    assert lengths(min_length=5) == {5}


def test_a_checkpoints_own_length_is_a_default_that_both_kinds_of_length_override(fresh_model, caplog):
    start = int(fresh_model.config.slm_config.is_encoder_decoder)
    fresh_model.generation_config.update(max_length=6 + start, num_beams=2, eos_token_id=None)

    def length(**kwargs):
        return fresh_model.generate(**PROMPT, **kwargs).shape[1] - start

    transformers_logging.enable_propagation()
    try:
        assert length() == 6
        assert length(max_new_tokens=9) == 9 and length(max_new_tokens=3) == 3
        assert length(max_length=8 + start) == 8
        assert length(generation_config=GenerationConfig(max_new_tokens=4)) == 4
        assert length(num_beams=1) == 6
    finally:
        transformers_logging.disable_propagation()
    assert "max_new_tokens" not in caplog.text  # nothing to warn of
    greedy = fresh_model.generate(**PROMPT, num_beams=1)
    fresh_model.generation_config.num_beams = 1
    assert greedy.equal(fresh_model.generate(**PROMPT))


# -------------------------------------------------------------------------------------------------- generation configs
def test_a_generation_config_is_followed_and_arguments_override_it(model):
    config = GenerationConfig(max_new_tokens=4, do_sample=False, **SPECIAL_IDS)
    before = config.to_dict()
    assert response_length(model, never_ending_with(model, config)) == 4
    assert response_length(model, never_ending_with(model, config, max_new_tokens=6)) == 6
    assert never_ending_with(model, config, num_beams=2, num_return_sequences=2).shape[0] == 6
    assert config.to_dict() == before
    model_config = model.generation_config.to_dict()
    model.generate(**PROMPT, max_new_tokens=3, num_beams=2, do_sample=True)
    assert model.generation_config.to_dict() == model_config


def never_ending_with(model, config, **kwargs):
    return model.generate(**PROMPT, generation_config=config, logits_processor=[Varied()], **kwargs)


@pytest.mark.parametrize("where", ["argument", "model", "object"])
def test_greedy_is_greedy_though_the_slm_came_with_sampling_as_its_default(where):
    slm = build_slm("llama")
    slm.generation_config = GenerationConfig(do_sample=True, temperature=5.0, **SPECIAL_IDS)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(build_llm(), slm)
    assert model.generation_config.do_sample and model.generation_config.temperature == 5.0
    kwargs = {}
    if where == "argument":
        kwargs["do_sample"] = False
    elif where == "model":
        model.generation_config = GenerationConfig(**SPECIAL_IDS)
    else:
        model.generation_config.do_sample = False
        kwargs["generation_config"] = GenerationConfig(max_new_tokens=12)
    results = {tuple(model.generate(**PROMPT, max_new_tokens=12, **kwargs).flatten().tolist()) for _ in range(4)}
    assert len(results) == 1


def test_what_a_generation_config_leaves_open_is_the_models_own(fresh_model):
    first = fresh_model.generate(**PROMPT, max_new_tokens=8, do_sample=False, min_new_tokens=8)
    stop = int(first[1, 3])
    assert stop not in first[1, :3].tolist()
    fresh_model.generation_config.eos_token_id = [EOS, stop]
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    ids = fresh_model.generate(**{name: value[1:2] for name, value in PROMPT.items()}, generation_config=config)
    assert ids[0].tolist() == first[1, :4].tolist()


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_generation_settings_are_saved_and_loaded_with_the_checkpoint(slm, tmp_path):
    model = build_model(slm=slm)
    model.generation_config.max_new_tokens = 3
    model.generation_config.num_beams = 2
    model.save_pretrained(tmp_path)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.generation_config.num_beams == 2
    assert response_length(loaded, loaded.generate(**PROMPT, min_new_tokens=3)) == 3
    expected = model.generate(**PROMPT, num_return_sequences=2)
    assert expected.shape[0] == 6
    assert loaded.generate(**PROMPT, num_return_sequences=2).equal(expected)


@pytest.mark.parametrize("cache", ["static", "dynamic", None])
def test_decoding_compiles_nothing_on_the_cpu(model, cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.compile was called")

    monkeypatch.setattr(torch, "compile", refuse)
    ids = never_ending(model, **PROMPT, max_new_tokens=5, cache_implementation=cache)
    assert response_length(model, ids) == 5


# ------------------------------------------------------------------------------------------------------ training loops
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_the_targets_that_a_trainer_passes_along_do_not_change_the_response(slm):
    model = build_model(slm=slm)
    expected = model.generate(**PROMPT, max_new_tokens=5)
    labels = torch.full((3, 4), 7)
    extra = {"labels": labels, "decoder_input_ids": labels, "decoder_attention_mask": torch.ones_like(labels)}
    assert model.generate(**PROMPT, max_new_tokens=5, **extra).equal(expected)


def test_generating_in_training_mode_leaves_the_mode_and_builds_no_graph(fresh_model):
    fresh_model.train()
    embeds = fresh_model.encode_prompt(**PROMPT).prompt_embeds
    assert embeds.requires_grad  # outside of generate it does
    output = fresh_model.generate(**PROMPT, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    assert not output.logits[0].requires_grad
    assert fresh_model.training and fresh_model.slm.training and not fresh_model.llm.training
