"""Lossless mode: the LLM's own greedy response, token for token, from fewer runs of the LLM."""

import math

import pytest
import torch
from conftest import (
    EOS,
    LLM_VOCAB,
    PAD,
    POSITIONS,
    PROMPT,
    SLM_HIDDEN,
    SLM_KINDS,
    SLM_VOCAB,
    VARIED,
    Collects,
    EndsAfter,
    build_copying_drafter,
    build_drafter,
    build_llm,
    build_llm_tokenizer,
    build_model,
    build_slm,
    build_slm_of_the_llms_vocabulary,
    build_slm_tokenizer,
    build_trimmed_drafter,
    endless,
    greedy,
    jitter,
)
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Lfm2Config,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from llm2slm import LLM2SLMTokenizer, LosslessOutput, decoding_llm2slm, drafter_llm2slm, drafting_llm2slm
from llm2slm.building.tokenizers import limit_tokenizer, trim_tokenizer
from llm2slm.few_rows_llm2slm import EagerFewRows

WRITING_LLMS = ["t5", "t5gemma", "bart", "llama", "gemma3", "gpt2"]
COPIED_LLMS = ["t5", "bart", "llama", "gemma3", "gpt2"]


# ----------------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("slm_kind", SLM_KINDS)
@pytest.mark.parametrize("llm_kind", WRITING_LLMS)
def test_response_is_the_llms_own_whatever_is_drafted(llm_kind, slm_kind):
    llm = endless(build_llm(llm_kind))
    model = build_drafter(llm, build_slm_of_the_llms_vocabulary(slm_kind))
    output = model.generate_lossless(
        PROMPT, llm=llm, max_new_tokens=16, max_draft_tokens=3, draft_confidence=0, **VARIED
    )
    assert isinstance(output, LosslessOutput)
    assert output.sequences.tolist() == greedy(llm, max_new_tokens=16, **VARIED).tolist()
    assert output.draft_tokens > output.accepted_tokens


@pytest.mark.parametrize("max_draft_tokens", [1, 4, 16])
@pytest.mark.parametrize("kind", COPIED_LLMS)
def test_partly_right_drafts_are_accepted_as_far_as_they_go(kind, max_draft_tokens):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm, noise={"t5": 0.1, "bart": 0.05}.get(kind, 0.1))
    arguments = {"max_draft_tokens": max_draft_tokens, "draft_confidence": 0}
    output = model.generate_lossless(PROMPT, llm=llm, max_new_tokens=30, **arguments, **VARIED)
    assert output.sequences.tolist() == greedy(llm, max_new_tokens=30, **VARIED).tolist()
    assert 0 < output.accepted_tokens < output.draft_tokens
    assert output.acceptance_rate == output.accepted_tokens / output.draft_tokens


@pytest.mark.parametrize("kind", COPIED_LLMS)
def test_a_perfect_drafter_leaves_the_llm_one_run_for_each_draft(kind, count_calls):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm)
    calls = count_calls(llm)
    output = model.generate_lossless(PROMPT, llm=llm, max_new_tokens=31, max_draft_tokens=4, draft_confidence=0)
    assert output.sequences.tolist() == greedy(llm, max_new_tokens=31).tolist()
    assert output.acceptance_rate == 1.0
    # Each run writes the draft and one more; a decoder-only LLM's first run has read the prompt, and writes one.
    if llm.config.is_encoder_decoder:
        assert output.llm_calls == 1 + math.ceil(31 / 5)
    else:
        assert output.llm_calls == 1 + math.ceil(30 / 5)
        assert len(calls) - 31 == output.llm_calls
    assert output.accepted_tokens == 31 - math.ceil(31 / 5)


@pytest.mark.parametrize(("llm_kind", "slm_kind"), [(kind, None) for kind in COPIED_LLMS] + [("llama", "marian")])
def test_drafts_are_what_the_model_itself_would_write_on(llm_kind, slm_kind, spied_drafts):
    llm = endless(build_llm(llm_kind))
    if slm_kind is None:
        model = build_copying_drafter(llm, noise=0.05)
    else:
        model = build_drafter(llm, build_slm(slm_kind))
    model.llm = model._prompt_part(llm)
    states = model.encode_hidden_states(PROMPT)
    model.llm = None
    model.generate_lossless(PROMPT, llm=llm, max_new_tokens=20, max_draft_tokens=4, draft_confidence=0, **VARIED)
    assert sum(len(draft) for _, draft in spied_drafts) > 20
    for response, draft in spied_drafts:
        if draft:
            logits = model(
                input_ids=PROMPT, prompt_hidden_states=states, labels=torch.tensor([response + draft])
            ).logits
            assert logits[0, len(response) :].argmax(dim=-1).tolist() == draft


@pytest.fixture
def spied_drafts(monkeypatch):
    """The verified response and the draft of each round, while drafting goes on as ever."""
    rounds, draft = [], drafter_llm2slm.Drafter.draft

    def spy(drafter, response, *args, **kwargs):
        drafted = draft(drafter, response, *args, **kwargs)
        rounds.append((response, drafted.tokens))
        return drafted

    monkeypatch.setattr(drafter_llm2slm.Drafter, "draft", spy)
    return rounds


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_padding_of_the_prompt_changes_nothing(kind, side):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm, noise=0.05)
    drafting = {"max_new_tokens": 12, **VARIED}
    expected = model.generate_lossless(PROMPT, llm=llm, **drafting)
    left, right = {"left": (4, 0), "right": (0, 4), "both": (2, 3)}[side]
    ids = torch.nn.functional.pad(PROMPT, (left, right), value=PAD)
    mask = torch.nn.functional.pad(torch.ones_like(PROMPT), (left, right))
    output = model.generate_lossless(input_ids=ids, attention_mask=mask, llm=llm, **drafting)
    assert output.sequences.tolist() == greedy(llm, max_new_tokens=12, **VARIED).tolist()
    assert (output.llm_calls, output.draft_tokens) == (expected.llm_calls, expected.draft_tokens)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_several_prompts_are_answered_as_each_by_itself(kind, do_sample):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm, noise=0.05)
    prompts = [PROMPT, PROMPT[:, :3], PROMPT.flip(1)]
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.cat([torch.nn.functional.pad(ids, (longest - ids.shape[1], 0), value=PAD) for ids in prompts])
    # They end at a token that comes sooner in one response than in another.
    rows = [greedy(llm, prompt=prompt, max_new_tokens=12, **VARIED)[0, 1:].tolist() for prompt in prompts]
    end = next(token for token in rows[1] if len({(row + [token]).index(token) for row in rows}) > 1)
    options = {"max_new_tokens": 12, "eos_token_id": end, "do_sample": do_sample, **VARIED}
    torch.manual_seed(0)
    apart = [model.generate_lossless(prompt, llm=llm, **options) for prompt in prompts]
    torch.manual_seed(0)
    output = model.generate_lossless(ids, attention_mask=(ids != PAD).long(), llm=llm, **options)
    for row, alone in zip(output.sequences, apart, strict=True):
        assert row[: alone.sequences.shape[1]].tolist() == alone.sequences[0].tolist()
        assert set(row[alone.sequences.shape[1] :].tolist()) <= {llm.generation_config.pad_token_id}
    lengths = [alone.sequences.shape[1] for alone in apart]
    assert output.sequences.shape[1] == max(lengths) and (do_sample or min(lengths) < max(lengths))
    for count in ("llm_calls", "draft_tokens", "accepted_tokens"):
        assert output[count] == sum(alone[count] for alone in apart)
    assert output.acceptance_rate == output.accepted_tokens / output.draft_tokens


def test_what_differs_from_prompt_to_prompt_goes_to_its_own(llm, noisy):
    prompts = torch.cat([PROMPT, PROMPT.flip(1)])
    options = {"llm": llm, "max_new_tokens": 6, "negative_prompt_ids": None}
    output = noisy.generate_lossless(prompts, prefix_allowed_tokens_fn=lambda row, ids: [7 + row, 9 + row], **options)
    assert {*output.sequences[0].tolist()} <= {7, 9} and {*output.sequences[1].tolist()} <= {8, 10}
    options["negative_prompt_ids"] = torch.tensor([[5, 6], [8, 7]])
    output = noisy.generate_lossless(prompts, guidance_scale=3.0, **options)
    for row, prompt in enumerate(prompts):
        options["negative_prompt_ids"] = torch.tensor([[5, 6], [8, 7]])[row : row + 1]
        alone = noisy.generate_lossless(prompt[None], guidance_scale=3.0, **options)
        assert torch.equal(alone.sequences[0], output.sequences[row])
    with pytest.raises(ValueError, match="`negative_prompt_ids` has 1 rows, but there are 2 prompts"):
        noisy.generate_lossless(prompts, guidance_scale=3.0, **options)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_prompt_is_read_once(kind, count_calls):
    llm = endless(build_llm(kind))
    model = build_drafter(llm, build_slm("llama"))
    lengths = []
    reader = llm.get_encoder() if kind == "t5" else llm
    reader.get_input_embeddings().register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    projected = count_calls(model.projector)
    output = model.generate_lossless(PROMPT, llm=llm, max_new_tokens=10, max_draft_tokens=3, draft_confidence=0)
    assert sum(length >= PROMPT.shape[1] for length in lengths) == 1
    assert len(projected) == 1
    if kind == "llama":
        assert sum(lengths) == PROMPT.shape[1] + (output.llm_calls - 1) + output.draft_tokens


def test_states_of_the_prompt_are_those_the_model_was_trained_on():
    llm = build_llm("llama")
    for layers in ([1], [0, -1], [-1]):
        model = build_drafter(llm, build_slm("llama"), llm_layer=layers)
        seen = []
        model.projector.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model.generate_lossless(PROMPT, llm=llm, max_new_tokens=2)
        model.llm = model._prompt_part(llm)
        torch.testing.assert_close(seen[0], model.encode_hidden_states(PROMPT))


def test_tokens_that_only_the_slm_has_are_not_drafted(llm):
    model = build_drafter(llm, build_slm("bart"))
    assert LLM_VOCAB < SLM_VOCAB
    model.slm.final_logits_bias[0, LLM_VOCAB] = 1e4  # what it would always write
    output = model.generate_lossless(PROMPT, llm=llm, max_new_tokens=10, draft_confidence=0)
    assert output.sequences.tolist() == greedy(llm, max_new_tokens=10).tolist()
    assert output.draft_tokens == 0


# -------------------------------------------------------------------------------------------------- trimmed vocabulary
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_drafts_of_a_trimmed_vocabulary_are_the_llms_tokens(kind):
    llm = endless(build_llm(kind))
    expected = greedy(llm, max_new_tokens=25)
    used = {*PROMPT[0].tolist(), *expected[0].tolist()}
    model = build_trimmed_drafter(llm, lacking=[token for token in range(4, LLM_VOCAB) if token not in used][:5])
    output = model.generate_lossless(PROMPT, llm=llm, max_new_tokens=25, max_draft_tokens=4, draft_confidence=0)
    assert output.sequences.tolist() == expected.tolist()
    assert output.acceptance_rate == 1.0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_tokens_that_a_trimmed_vocabulary_lacks_are_the_llms_to_write(kind, spied_drafts):
    llm = endless(build_llm(kind))
    expected = greedy(llm, max_new_tokens=25, **VARIED)
    lacking = [token for token in dict.fromkeys(expected[0, 1:].tolist()) if token not in PROMPT and token != PAD][1:3]
    model = build_trimmed_drafter(llm, lacking)
    arguments = {"max_draft_tokens": 4, "draft_confidence": 0}
    output = model.generate_lossless(PROMPT, llm=llm, max_new_tokens=25, **arguments, **VARIED)
    assert output.sequences.tolist() == expected.tolist()
    assert not set(lacking) & {token for _, draft in spied_drafts for token in draft}
    behind = [(response, draft) for response, draft in spied_drafts if draft and set(lacking) & set(response)]
    assert behind, "drafting goes on behind such a token"
    if kind != "t5":
        slm, embeddings = model.slm, model.slm.get_input_embeddings()
        for response, draft in behind:
            ids = model.prompt_token_map[torch.tensor([*PROMPT[0], *response, *draft])]
            every = embeddings(torch.arange(embeddings.num_embeddings))
            embeds = torch.where(ids[:, None] < 0, every.mean(dim=0), every[ids])  # the projector adds nothing
            written = slm(inputs_embeds=embeds[None, :-1]).logits[0, -len(draft) :].argmax(dim=-1)
            assert written.tolist() == ids[-len(draft) :].tolist()


# ------------------------------------------------------------------------------------------------------ where it ends
@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5"])
def test_it_ends_with_the_end_token_wherever_that_falls_in_a_draft(kind, spied_drafts):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm)
    written = greedy(llm, max_new_tokens=16)[0, 1:].tolist()
    for end in (written[0], written[2], written[4], written[-1]):
        spied_drafts.clear()
        for ends in (end, [end, EOS]):
            expected = greedy(llm, max_new_tokens=16, eos_token_id=ends)
            arguments = {"eos_token_id": ends, "max_draft_tokens": 6, "draft_confidence": 0}
            output = model.generate_lossless(PROMPT, llm=llm, max_new_tokens=16, **arguments)
            assert output.sequences.tolist() == expected.tolist()
        assert not any(end in draft[:-1] for _, draft in spied_drafts)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_it_is_as_long_as_asked_for(kind, max_new_tokens):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm)
    output = model.generate_lossless(PROMPT, llm=llm, max_new_tokens=max_new_tokens, max_draft_tokens=4)
    assert output.sequences.tolist() == greedy(llm, max_new_tokens=max_new_tokens).tolist()
    assert output.sequences.shape[1] == max_new_tokens + (kind == "t5")


def test_lengths_mean_the_response(llm, noisy):
    assert noisy.generate_lossless(PROMPT, llm=llm, max_length=12).sequences.shape == (1, 12)
    config = GenerationConfig(max_length=8, min_length=8, eos_token_id=greedy(llm, max_new_tokens=1).item())
    assert noisy.generate_lossless(PROMPT, config, llm=llm).sequences.shape == (1, 8)


@pytest.mark.parametrize("tokens", [1, 5, 6])
def test_stopping_criteria_see_each_token(llm, tokens):
    model = build_copying_drafter(llm)
    criteria = StoppingCriteriaList([EndsAfter(tokens)])
    arguments = {"max_draft_tokens": 8, "draft_confidence": 0}
    output = model.generate_lossless(PROMPT, llm=llm, max_new_tokens=20, stopping_criteria=criteria, **arguments)
    assert output.sequences.tolist() == greedy(llm, max_new_tokens=20)[:, :tokens].tolist()


def test_stop_strings_are_the_llms_text(llm):
    model = build_copying_drafter(llm)
    llm_tokenizer = build_slm_tokenizer()  # the letters, since matching needs a vocabulary that spells any text
    text = llm_tokenizer.decode(greedy(llm, max_new_tokens=12, **VARIED)[0])
    arguments = {"stop_strings": [text[4:7]], "max_new_tokens": 12, **VARIED}
    expected = greedy(llm, tokenizer=llm_tokenizer, **arguments)
    assert expected.shape[1] < 12
    for tokenizer in (llm_tokenizer, LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, build_llm_tokenizer())):
        output = model.generate_lossless(PROMPT, llm=llm, tokenizer=tokenizer, **arguments)
        assert output.sequences.tolist() == expected.tolist()


def test_stop_strings_are_found_in_the_llms_own_generation_config(llm):
    model, tokenizer = build_copying_drafter(llm), build_slm_tokenizer()
    text = tokenizer.decode(greedy(llm, max_new_tokens=12, **VARIED)[0])
    llm.generation_config.stop_strings = [text[4:7]]
    expected = greedy(llm, tokenizer=tokenizer, max_new_tokens=12, **VARIED)
    assert expected.shape[1] < 12
    output = model.generate_lossless(PROMPT, llm=llm, tokenizer=tokenizer, max_new_tokens=12, **VARIED)
    assert output.sequences.tolist() == expected.tolist()


def test_stop_strings_want_a_tokenizer_with_all_that_the_llm_writes(llm):
    whole = build_slm_tokenizer()
    trimmed, _ = trim_tokenizer(whole, ["a c a"])
    pair = LLM2SLMTokenizer.from_tokenizers(limit_tokenizer(whole, trimmed), trimmed)
    model, arguments = build_copying_drafter(llm), {"llm": llm, "max_new_tokens": 4, "stop_strings": ["b"]}
    with pytest.raises(ValueError, match="has only those that the SLM writes: pass the LLM's own `tokenizer`"):
        model.generate_lossless(PROMPT, tokenizer=pair, **arguments)
    model.generate_lossless(PROMPT, tokenizer=whole, **arguments)


class CountsTokens(LogitsProcessor):
    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores


def test_logits_processors_see_each_token_once(llm, noisy):
    counter = CountsTokens()
    noisy.generate_lossless(PROMPT, llm=llm, max_new_tokens=10, logits_processor=LogitsProcessorList([counter]))
    assert counter.lengths == list(range(PROMPT.shape[1], PROMPT.shape[1] + 10))


def test_it_goes_on_where_the_slms_positions_end(llm):
    config = SLM_KINDS["gpt2"](SLM_HIDDEN, SLM_VOCAB)
    config.n_positions = 20
    model = build_drafter(llm, jitter(type(build_slm("gpt2"))(config)).eval())
    output = model.generate_lossless(PROMPT, llm=llm, max_new_tokens=40, draft_confidence=0)
    assert output.sequences.tolist() == greedy(llm, max_new_tokens=40).tolist()


def test_drafts_never_pass_the_llms_positions():
    llm = endless(build_llm("gpt2"))
    length = POSITIONS - PROMPT.shape[1]
    output = build_copying_drafter(llm).generate_lossless(PROMPT, llm=llm, max_new_tokens=length, draft_confidence=0)
    assert output.sequences.tolist() == greedy(llm, max_new_tokens=length).tolist()


def test_an_unsure_drafter_asks_the_llm_sooner(llm, noisy, spied_drafts):
    longest = {}
    for confidence in (0, 0.15, 1):
        spied_drafts.clear()
        arguments = {"max_new_tokens": 30, "draft_confidence": confidence, **VARIED}
        output = noisy.generate_lossless(PROMPT, llm=llm, **arguments)
        assert output.sequences.tolist() == greedy(llm, max_new_tokens=30, **VARIED).tolist()
        longest[confidence] = max(len(draft) for _, draft in spied_drafts)
    assert longest[1] == 1 < longest[0.15] < longest[0]


# ------------------------------------------------------------------------------------------------- like `llm.generate`
def test_what_the_llm_would_sample_by_default_is_written_greedily(llm, noisy, caplog):
    expected = greedy(llm, max_new_tokens=10)
    llm.generation_config.update(do_sample=True, num_beams=3)
    drafting_llm2slm.logger.warning_once.__func__.cache_clear()
    caplog.set_level("WARNING", logger=drafting_llm2slm.logger.name)
    assert noisy.generate_lossless(PROMPT, llm=llm, max_new_tokens=10).sequences.tolist() == expected.tolist()
    assert "what the LLM writes with `num_beams=1`" in caplog.text


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_streams_what_generate_streams(kind):
    llm = endless(build_llm(kind))
    model, expected, found = build_copying_drafter(llm, noise=0.05), Collects(), Collects()
    greedy(llm, max_new_tokens=10, streamer=expected)
    model.generate_lossless(PROMPT, llm=llm, max_new_tokens=10, streamer=found)
    assert found.tokens == expected.tokens
    assert found.ended


def test_leaves_both_models_as_they_were(llm, noisy):
    before = llm.generation_config.to_dict()
    expected = llm(PROMPT).logits
    first, second = (noisy.generate_lossless(PROMPT, llm=llm, max_new_tokens=10) for _ in "ab")
    assert second.to_tuple()[1:] == first.to_tuple()[1:]
    assert llm.generation_config.to_dict() == before
    assert torch.equal(llm(PROMPT).logits, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llm.modules())


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "one response.*got num_beams=4"),
        ({"num_return_sequences": 2}, "one response.*got num_return_sequences=2"),
        ({"output_scores": True}, "returns its ids and counts; got output_scores=True"),
        ({"max_draft_tokens": 0}, "`max_draft_tokens` must be a positive integer, got 0"),
        ({"draft_confidence": 1.5}, "`draft_confidence` must be from 0 to 1, got 1.5"),
        ({"inputs": PROMPT.repeat(2, 1), "streamer": object()}, "the tokens of one response, got 2 prompts"),
        ({"inputs": PROMPT + 100}, "ids of the LLM's tokenizer, from 0 to 59"),
        ({"attention_mask": torch.zeros_like(PROMPT)}, "has no token: its prompt is empty"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_refuses_what_would_not_be_exact(llm, noisy, arguments, message):
    with pytest.raises(ValueError, match=message):
        noisy.generate_lossless(**{"inputs": PROMPT, "llm": llm, "max_new_tokens": 4, **arguments})


def test_refuses_arguments_it_does_not_know(llm, noisy):
    with pytest.raises(ValueError, match=r"unexpected arguments: \['max_new_token', 'prompt_embeds'\]"):
        noisy.generate_lossless(PROMPT, llm=llm, max_new_token=4, prompt_embeds=torch.zeros(1, 2, 24))
    nothing = {"decoder_input_ids": None, "labels": None, "past_key_values": None, "synced_gpus": False}
    expected = noisy.generate_lossless(PROMPT, llm=llm, max_new_tokens=4)
    assert noisy.generate_lossless(PROMPT, llm=llm, max_new_tokens=4, **nothing).sequences.equal(expected.sequences)


def test_refuses_an_llm_that_cannot_write(llm, noisy):
    for other in (llm.model, "a/name"):
        with pytest.raises(ValueError, match=f"`llm` must be the LLM with its head.*got {type(other).__name__}"):
            noisy.generate_lossless(PROMPT, llm=other)


def test_refuses_another_llm(noisy):
    with pytest.raises(ValueError, match="not the one this checkpoint was trained with: its model_type is 'gpt2'"):
        noisy.generate_lossless(PROMPT, llm=build_llm("gpt2"))


def test_refuses_different_tokenizers(llm):
    model = build_model("llama", "llama")
    with pytest.raises(
        ValueError, match="the LLM's tokenizer or that trimmed: `config.shared_tokenizer` must be True"
    ):
        model.generate_lossless(PROMPT, llm=llm)


def test_refuses_models_that_cannot_take_tokens_back(llm, noisy, monkeypatch):
    for name, model in (("LLM", llm), ("SLM", noisy.slm)):
        with monkeypatch.context() as patch:
            patch.setattr(model, "_is_stateful", True, raising=False)
            with pytest.raises(ValueError, match=rf"takes back rejected tokens, but the {name} \(llama\)"):
                noisy.generate_lossless(PROMPT, llm=llm)


def test_refuses_convolutions_whose_states_cannot_be_taken_back(llm):
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Lfm2Config(**fields, vocab_size=60, num_key_value_heads=1, layer_types=["conv", "full_attention"])
    slm = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"takes back rejected tokens, but the SLM \(lfm2\)"):
        build_drafter(llm, slm).generate_lossless(PROMPT, llm=llm)


def test_passed_as_assistant_model_it_names_the_lossless_mode(llm, noisy):
    with pytest.raises(ValueError, match=r"call `model.generate_lossless\(..., llm=llm\)`"):
        llm.generate(PROMPT, assistant_model=noisy, do_sample=False, max_new_tokens=4)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9])
def test_a_few_rows_at_once_are_what_linear_gives(rows, with_bias):
    layer = torch.nn.Linear(48, 24, bias=with_bias)
    inputs = torch.randn(1, rows, 48)
    with torch.no_grad():
        expected = layer(inputs)
        with EagerFewRows():
            output = layer(inputs)
            lower = layer.to(torch.bfloat16)(inputs.to(torch.bfloat16))
    assert output.is_contiguous() and lower.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)


# -------------------------------------------------------------------------------------------------- drafts, compiled
COUNTS = ("llm_calls", "draft_tokens", "accepted_tokens", "unasked_tokens")


@pytest.fixture
def eager_backend(monkeypatch):
    """A backend that compiles at once."""
    monkeypatch.setattr(decoding_llm2slm, "BACKEND", "eager")


def same_drafts(model, llm, prompt=PROMPT, **options) -> None:
    """Asserts that the compiled step drafts what the plain way drafts."""
    plain, fast = (model.generate_lossless(prompt, llm=llm, fast=fast, **options) for fast in (False, True))
    assert plain.sequences.tolist() == fast.sequences.tolist()
    assert [plain[name] for name in COUNTS] == [fast[name] for name in COUNTS]
    assert 0 < plain.accepted_tokens < plain.draft_tokens
    compiled = decoding_llm2slm._compiled[model.slm][1]
    assert not compiled.failed and len(compiled.idle_caches) == 1


@pytest.mark.parametrize("kind", COPIED_LLMS)
def test_the_compiled_step_drafts_the_same_and_takes_back_what_was_rejected(kind, eager_backend):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm, noise={"t5": 0.1, "bart": 0.05}.get(kind, 0.1))
    for max_draft_tokens in (3, 8):  # the second response takes the cache of the first
        same_drafts(model, llm, max_new_tokens=30, max_draft_tokens=max_draft_tokens, draft_confidence=0, **VARIED)


def test_the_compiled_step_reads_tokens_that_a_trimmed_vocabulary_lacks(eager_backend, monkeypatch):
    monkeypatch.setattr(decoding_llm2slm, "BLOCK", 8)  # a cache that is outgrown
    llm = endless(build_llm("llama"))
    used = greedy(llm, max_new_tokens=24, **VARIED)[0].tolist()
    model = build_trimmed_drafter(llm, lacking=used[3:20:4])
    jitter(model.slm, 0.02)
    same_drafts(model, llm, max_new_tokens=24, max_draft_tokens=4, draft_confidence=0, **VARIED)


def test_what_cannot_be_compiled_drafts_in_the_plain_way(noisy, llm, eager_backend, monkeypatch, caplog):
    expected = noisy.generate_lossless(PROMPT, llm=llm, max_new_tokens=12, **VARIED)
    monkeypatch.setattr(type(noisy.slm), "_can_compile_fullgraph", False)
    drafter_llm2slm.logger.warning_once.__func__.cache_clear()
    with caplog.at_level("WARNING", logger=drafter_llm2slm.logger.name):
        output = noisy.generate_lossless(PROMPT, llm=llm, max_new_tokens=12, fast=True, **VARIED)
    assert output.sequences.equal(expected.sequences) and "drafting in the plain way" in caplog.text
