"""The dial, `generate(..., llm=llm, tolerance=...)`: from the LLM's own response to the pair's, and sampling."""

import math

import pytest
import torch
from conftest import (
    EOS,
    LLM_VOCAB,
    PAD,
    PROMPT,
    SLM_KINDS,
    VARIED,
    Collects,
    EndsAfter,
    as_slm,
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
)
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm2slm import LLM2SLMTokenizer, LosslessOutput, drafter_llm2slm
from llm2slm.drafting_llm2slm import _best, _sampled

KINDS = ["llama", "gpt2", "t5"]


@pytest.fixture
def drafts(monkeypatch):
    """Each draft, in order, with the probabilities that the SLM gave to its tokens."""
    found, probabilities = [], []
    draft, is_unsure = drafter_llm2slm.Drafter.draft, drafter_llm2slm.Dial.is_unsure

    def spied_draft(*args, **kwargs):
        probabilities.clear()
        found.append((draft(*args, **kwargs), list(probabilities)))
        return found[-1][0]

    def spied_is_unsure(dial, probability):
        probabilities.append(probability)
        return is_unsure(dial, probability)

    monkeypatch.setattr(drafter_llm2slm.Drafter, "draft", spied_draft)
    monkeypatch.setattr(drafter_llm2slm.Dial, "is_unsure", spied_is_unsure)
    return found


def response_scores(llm, output) -> torch.Tensor:
    """The LLM's scores of each token of a response, behind those before it; of shape `(length, vocab_size)`."""
    if llm.config.is_encoder_decoder:
        return llm(PROMPT, decoder_input_ids=output.sequences).logits[0, :-1]
    ids = torch.cat([PROMPT, output.sequences], dim=1)
    return llm(ids).logits[0, PROMPT.shape[1] - 1 : -1]


def tokens_of(llm, output) -> torch.Tensor:
    return output.sequences[0, 1:] if llm.config.is_encoder_decoder else output.sequences[0]


# ------------------------------------------------------------------------------------------------------- the two ends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tolerance", [None, 0, 0.0])
def test_without_tolerance_it_is_lossless_mode(kind, tolerance):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm, noise=0.1)
    arguments = {"max_new_tokens": 20, "max_draft_tokens": 5, "draft_confidence": 0.1, **VARIED}
    lossless = model.generate_lossless(PROMPT, llm=llm, **arguments)
    output = model.generate(PROMPT, llm=llm, tolerance=tolerance, return_dict_in_generate=True, **arguments)
    assert output.sequences.tolist() == greedy(llm, max_new_tokens=20, **VARIED).tolist()
    assert output.to_tuple()[1:] == lossless.to_tuple()[1:] and output.unasked_tokens == 0
    ids = model.generate(PROMPT, llm=llm, tolerance=tolerance, **arguments)
    assert torch.equal(ids, lossless.sequences)


# Each kind of SLM behind an encoder-decoder and behind a decoder-only LLM, each of which has its turn.
ALONE = [
    (llms[i % len(llms)], slm)
    for i, slm in enumerate(SLM_KINDS)
    for llms in (["t5", "bart"], ["llama", "gemma3", "gpt2"])
]


@pytest.mark.parametrize(("llm_kind", "slm_kind"), ALONE)
def test_with_all_tolerance_the_pair_writes_alone(llm_kind, slm_kind, count_calls):
    llm = endless(build_llm(llm_kind))
    model = build_drafter(llm, build_slm_of_the_llms_vocabulary(slm_kind), llm_layer=[0, 1])
    model.llm = model._prompt_part(llm)
    expected = model.generate(PROMPT, max_new_tokens=20, eos_token_id=None, do_sample=False)
    model.llm = None
    heads = count_calls(llm.get_output_embeddings())
    output = model.generate(PROMPT, llm=llm, tolerance=1, max_new_tokens=20, return_dict_in_generate=True)
    expected = expected[0, 1:] if model.config.slm_config.is_encoder_decoder else expected[0]
    assert tokens_of(llm, output).tolist() == expected.tolist()
    assert not heads
    assert (output.llm_calls, output.acceptance_rate, output.unasked_tokens) == (1, 1.0, 20)


def test_an_llm_that_will_not_be_asked_reads_the_prompt_as_far_up_as_needed(llm, count_calls):
    model = build_drafter(llm, build_slm_of_the_llms_vocabulary("llama"), llm_layer=1)
    upper = count_calls(llm.model.layers[1])
    model.generate(PROMPT, llm=llm, tolerance=1, max_new_tokens=5)
    assert not upper
    model.generate(PROMPT, llm=llm, tolerance=0.9, max_new_tokens=5)
    assert upper


@pytest.mark.parametrize("kind", KINDS)
def test_a_trimmed_pair_alone_writes_the_llms_ids(kind):
    llm = endless(build_llm(kind))
    model = build_trimmed_drafter(llm, lacking=[7, 9])
    model.llm = model._prompt_part(llm)
    options = {"max_new_tokens": 20, **VARIED} if kind == "t5" else {"max_new_tokens": 20}
    expected = model.generate(PROMPT, eos_token_id=None, **options)[0]
    expected = expected[1:] if kind == "t5" else expected
    output = model.generate(PROMPT, llm=llm, tolerance=1, return_dict_in_generate=True, **options)
    assert model.prompt_token_map[tokens_of(llm, output)].tolist() == expected.tolist()


def test_the_pair_alone_writes_no_token_that_only_the_slm_has(llm):
    model = build_drafter(llm, build_slm("bart"))
    model.slm.final_logits_bias[0, LLM_VOCAB] = 1e4  # what it would always write
    output = model.generate(PROMPT, llm=llm, tolerance=1, max_new_tokens=10, return_dict_in_generate=True)
    assert output.sequences.max() < LLM_VOCAB and output.accepted_tokens == 10


# ------------------------------------------------------------------------------------------------------- between them
@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_its_share_of_the_best_ones_probability(kind):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm, noise=0.1)
    least = {}
    for tolerance in (0.2, 0.6, 0.95):
        arguments = {"tolerance": tolerance, "ask_below": 1, "max_new_tokens": 30, "draft_confidence": 0}
        output = model.generate(PROMPT, llm=llm, return_dict_in_generate=True, **arguments)
        scores, tokens = response_scores(llm, output), tokens_of(llm, output)
        shares = (scores.gather(1, tokens[:, None])[:, 0] - scores.max(dim=1).values).exp()
        least[tolerance] = shares.min()
        assert shares.min() >= 1 - tolerance - 1e-5
        assert output.unasked_tokens == 0 < output.accepted_tokens <= output.draft_tokens
    assert least[0.95] < 0.8, "some token is not the LLM's own"


def test_the_share_counts_up_to_the_last_bit():
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert [_best(scores, 1, tolerance).item() for tolerance in (0.0, 0.39, 0.41)] == [0, 0, 1]
    assert [_best(scores, drafted, 0.5).item() for drafted in (0, 1, 2, None)] == [0, 1, 0, 0]
    forbidden = torch.tensor([[1.0, -torch.inf]])
    assert _best(forbidden, 1, 0.999999).item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_llm_is_asked_about_unsure_drafts_only(kind, drafts, count_calls):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm, noise=0.2)
    arguments = {"tolerance": 0.5, "max_new_tokens": 30, "max_draft_tokens": 2, "return_dict_in_generate": True}
    model.generate(PROMPT, llm=llm, ask_below=1, **arguments, **VARIED)
    usual = torch.tensor([probability for _, seen in drafts for probability in seen]).quantile(
        torch.tensor([0.2, 0.5])
    )
    runs = count_calls(llm.get_output_embeddings())
    unasked = []
    for ask_below in (0, *usual.tolist(), 1):
        drafts.clear()
        runs.clear()
        output = model.generate(PROMPT, llm=llm, ask_below=ask_below, **arguments, **VARIED)
        assert output.llm_calls == len(runs) + (kind == "t5")
        assert all(draft.unsure == any(p < ask_below for p in seen) for draft, seen in drafts)
        kept = sum(len(draft.tokens) for draft, _ in drafts if not draft.unsure)
        # The run over a decoder-only LLM's prompt scores the first token in any case.
        assert output.unasked_tokens in (kept, kept - 1)
        unasked.append(output.unasked_tokens)
    assert unasked[0] >= 29 and unasked[-1] == 0
    assert any(0 < number < 29 for number in unasked), unasked


def test_what_was_kept_unasked_is_read_before_the_next_verdict(llm):
    model = build_copying_drafter(llm, noise=0.2)
    arguments = {"ask_below": 0.2, "max_new_tokens": 50, "max_draft_tokens": 3, **VARIED}
    output = model.generate(PROMPT, llm=llm, tolerance=0, return_dict_in_generate=True, **arguments)
    assert output.unasked_tokens > 0 and output.llm_calls > 2
    # Written again with the kept tokens forced, each verdict of the LLM is the same.
    written = output.sequences[0].tolist()
    scores = response_scores(llm, output)
    seen = {*zip(PROMPT[0].tolist(), PROMPT[0, 1:].tolist(), strict=False)}
    own, previous = 0, PROMPT[0, -1].item()
    for position, token in enumerate(written):
        banned = [second for first, second in seen if first == previous]
        allowed = scores[position].clone()
        allowed[banned] = -torch.inf
        assert token not in banned
        own += int(allowed.argmax()) == token
        seen.add((previous, token))
        previous = token
    assert own >= len(written) - output.unasked_tokens


def test_by_default_it_is_asked_about_as_much_as_is_not_tolerated(llm, noisy, drafts):
    for tolerance in (0.3, 0.85):
        drafts.clear()
        noisy.generate(PROMPT, llm=llm, tolerance=tolerance, max_new_tokens=30, **VARIED)
        assert all(draft.unsure == any(p < 1 - tolerance for p in seen) for draft, seen in drafts)
        assert {draft.unsure for draft, _ in drafts} >= {True} | ({False} if tolerance > 0.5 else set())


# ---------------------------------------------------------------------------------------------- as lossless mode does
@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("tolerance", [0.4, 1])
def test_streams_each_token_once_in_order(kind, tolerance):
    llm = endless(build_llm(kind))
    streamer = Collects()
    model = build_copying_drafter(llm, noise=0.1)
    ids = model.generate(PROMPT, llm=llm, tolerance=tolerance, max_new_tokens=12, streamer=streamer)
    given = ids if kind == "t5" else torch.cat([PROMPT, ids], dim=1)
    assert streamer.tokens == given[0].tolist() and streamer.ended


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
@pytest.mark.parametrize("tolerance", [0.4, 0.9, 1])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_it_is_as_long_as_asked_for(kind, tolerance, max_new_tokens):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm, noise=0.1)
    for length in ({"max_new_tokens": max_new_tokens}, {"max_length": max_new_tokens + (kind == "t5")}):
        ids = model.generate(PROMPT, llm=llm, tolerance=tolerance, max_draft_tokens=4, **length)
        assert ids.shape == (1, max_new_tokens + (kind == "t5"))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_length_is_that_of_the_call_then_the_llms_then_the_pairs(kind):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm, noise=0.1)
    start = int(kind == "t5")

    def length(**arguments) -> int:
        return model.generate(PROMPT, llm=llm, tolerance=0.9, **arguments).shape[1] - start

    model.generation_config.max_new_tokens = 23
    assert length() == 23
    model.generation_config.update(max_new_tokens=None, max_length=24 + start)
    assert length() == 24
    llm.generation_config.max_new_tokens = 12
    assert length() == 12
    assert length(max_length=5 + start) == length(max_new_tokens=5) == 5
    twelve = GenerationConfig(max_new_tokens=12)
    assert length(generation_config=twelve) == 12 and length(generation_config=twelve, max_length=5 + start) == 5


@pytest.mark.parametrize("tolerance", [0.4, 0.9, 1])
def test_it_ends_with_the_end_token_and_where_a_criterion_says(llm, noisy, tolerance):
    arguments = {"llm": llm, "tolerance": tolerance, "max_new_tokens": 30, **VARIED}
    written = noisy.generate(PROMPT, **arguments)[0].tolist()
    assert noisy.generate(PROMPT, eos_token_id=written[5], **arguments)[0].tolist() == written[:6]
    criteria = StoppingCriteriaList([EndsAfter(4)])
    assert noisy.generate(PROMPT, stopping_criteria=criteria, **arguments)[0].tolist() == written[:4]


@pytest.mark.parametrize("tolerance", [0.4, 0.9, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_forbidden_is_not_kept(kind, tolerance):
    llm = endless(build_llm(kind))
    model = build_trimmed_drafter(llm, [7, 9]) if kind == "gpt2" else build_copying_drafter(llm, noise=0.1)
    arguments = {"llm": llm, "tolerance": tolerance, **VARIED}
    first, *others = model.generate(PROMPT, max_new_tokens=8, **arguments)[0].tolist()[kind == "t5" :]
    bad = next(token for token in others if token != first)
    arguments |= {"bad_words_ids": [[bad]], "min_new_tokens": 10, "eos_token_id": [EOS, first]}
    ids = model.generate(PROMPT, max_new_tokens=12, **arguments)[0].tolist()
    assert bad not in ids
    assert len(ids) - (kind == "t5") >= 10


def test_padding_of_the_prompt_changes_nothing(llm, noisy):
    ids = torch.nn.functional.pad(PROMPT, (3, 2), value=PAD)
    mask = torch.nn.functional.pad(torch.ones_like(PROMPT), (3, 2))
    for tolerance in (0.5, 1):
        arguments = {"llm": llm, "tolerance": tolerance, "max_new_tokens": 12}
        padded = noisy.generate(input_ids=ids, attention_mask=mask, **arguments)
        assert padded.tolist() == noisy.generate(PROMPT, **arguments).tolist()


# ------------------------------------------------------------------------------------------------------------ sampling
WARPERS = {"temperature": 1.7, "top_k": 12, "top_p": 0.9}


def test_a_token_is_drawn_as_the_llm_would_draw_it():
    torch.manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.6, 0.0, 0.3])
    drafted = torch.multinomial(q, 4000, replacement=True)
    found = {}
    for tolerance in (0.0, 0.5):
        tokens = [_sampled(p.log()[None], int(token), [q], tolerance) for token in drafted]
        found[tolerance] = torch.cat(tokens).bincount(minlength=4) / len(drafted)
    assert (found[0.0] - p).abs().sum() / 2 < 0.02
    # Tolerated, tokens that the SLM likes come more often, but none more than twice as often as the LLM has it.
    expected = torch.tensor([0.1, 0.6, 0.0, 0.0]) + 0.3 * torch.tensor([2 / 3, 0, 1 / 3, 0])
    assert (found[0.5] - expected).abs().sum() / 2 < 0.02
    assert (found[0.5] <= 2 * p + 0.02).all()


@torch.no_grad()
def deviation(llm, model, tolerance: float, runs: int) -> float:
    """How far a sampled response's tokens are from the LLM's distribution: the greatest |z| of the tokens' counts."""
    counts, means, variances = (torch.zeros(LLM_VOCAB, dtype=torch.float64) for _ in range(3))
    for seed in range(runs):
        torch.manual_seed(seed)
        output = model.generate(
            PROMPT, llm=llm, tolerance=tolerance, do_sample=True, max_new_tokens=50, max_draft_tokens=4,
            draft_confidence=0.02, return_dict_in_generate=True, **WARPERS,
        )  # fmt: skip
        scores = response_scores(llm, output)
        warpers = TemperatureLogitsWarper(1.7), TopKLogitsWarper(12), TopPLogitsWarper(0.9)
        for warper in warpers:
            scores = warper(None, scores)
        p = scores.double().softmax(dim=-1)  # given what was written before: counts less p add up to a martingale
        tokens = tokens_of(llm, output)
        assert p.gather(1, tokens[:, None]).min() > 0 or tolerance == 1
        counts += tokens.bincount(minlength=LLM_VOCAB)
        means += p.sum(dim=0)
        variances += (p * (1 - p)).sum(dim=0)
    often = means > 10
    assert often.sum() > 5
    return float(((counts - means)[often] / variances[often].sqrt()).abs().max())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_sampled_responses_are_distributed_as_the_llms(kind):
    llm = endless(build_llm(kind))
    model = build_copying_drafter(llm, noise=0.3)
    assert deviation(llm, model, 0.0, runs=12) < 3.5
    assert deviation(llm, model, 1.0, runs=12) > 5, "the pair's own tokens would be told apart"


def test_sampled_drafts_of_a_trimmed_vocabulary_are_verified_over_the_llms():
    llm = endless(build_llm("llama"))
    model = build_trimmed_drafter(llm, lacking=[7, 9, 20])
    torch.manual_seed(0)
    arguments = {"do_sample": True, "max_new_tokens": 40, "temperature": 1.5}
    output = model.generate_lossless(PROMPT, llm=llm, **arguments)
    assert output.sequences.shape == (1, 40) and 0 < output.accepted_tokens < output.draft_tokens


def test_a_seed_gives_the_same_sample_again(llm, noisy):
    config = GenerationConfig(do_sample=True, max_new_tokens=20)
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(noisy.generate(PROMPT, config, llm=llm).tolist())
    assert samples[0] == samples[1] != samples[2]


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, True, "0.5"])
@pytest.mark.parametrize("name", ["tolerance", "ask_below"])
def test_a_share_is_from_0_to_1(llm, noisy, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be from 0 to 1, got {value!r}"):
        noisy.generate(PROMPT, llm=llm, **{name: value})


@pytest.mark.parametrize("name", ["tolerance", "ask_below"])
def test_without_an_llm_nothing_is_tolerated(noisy, name):
    with pytest.raises(ValueError, match=f"`{name}` is about what an LLM verifies.*as `llm`"):
        noisy.generate(PROMPT, **{name: 0.5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": PROMPT.repeat(2, 1), "streamer": object()}, "the tokens of one response, got 2 prompts"),
        ({"num_beams": 2}, "one response.*got num_beams=2"),
        ({"prompt_embeds": torch.zeros(1, 3, 24)}, "that LLM reads the prompt: pass `input_ids`"),
        ({"guidance_scale": 1.5}, "Only a greedy response with `tolerance=0` can have guidance_scale=1.5"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[3, 5])}, "can have a SynthID"),
        ({"tolerance": 0, "do_sample": True, "guidance_scale": 2.0}, "Only a greedy response"),
        ({"tolerance": 1, "max_new_tokens": 1000}, "The prompt and the response have 1009 tokens, but the SLM"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_refuses_what_it_cannot_do(llm, noisy, arguments, message):
    with pytest.raises(ValueError, match=message):
        noisy.generate(**{"inputs": PROMPT, "llm": llm, "tolerance": 0.5, "max_new_tokens": 4, **arguments})


def test_refuses_other_llms_and_tokenizers(llm, noisy):
    with pytest.raises(ValueError, match="not the one this checkpoint was trained with: its model_type is 'gpt2'"):
        noisy.generate(PROMPT, llm=build_llm("gpt2"), tolerance=0.5)
    with pytest.raises(ValueError, match="`config.shared_tokenizer` must be True"):
        build_model("llama", "llama").generate(PROMPT, llm=llm, tolerance=0.5)


def test_a_fine_tuned_llm_is_welcome(llm, noisy):
    tuned = endless(as_slm(llm, 0.3))
    ids = noisy.generate(PROMPT, llm=tuned, tolerance=0, max_new_tokens=10)
    assert ids.tolist() == greedy(tuned, max_new_tokens=10).tolist()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_beside_a_fine_tuned_llm_the_pair_reads_the_states_of_its_own(kind):
    llm = endless(build_llm(kind))
    model = build_drafter(llm, build_slm_of_the_llms_vocabulary("llama"))
    model.llm, tuned = model._prompt_part(llm), endless(as_slm(llm, 0.3))
    expected = model.generate(PROMPT, max_new_tokens=12, eos_token_id=None)
    arguments = {"llm": tuned, "max_new_tokens": 12, "return_dict_in_generate": True}
    assert tokens_of(llm, model.generate(PROMPT, tolerance=1, **arguments)).tolist() == expected[0].tolist()
    model.llm = None
    assert tokens_of(llm, model.generate(PROMPT, tolerance=1, **arguments)).tolist() != expected[0].tolist()


def test_stop_strings_are_the_llms_text(llm, noisy):
    letters = build_slm_tokenizer()  # since matching needs a vocabulary that spells any text
    tokenizer = LLM2SLMTokenizer.from_tokenizers(letters, build_llm_tokenizer())
    for tolerance in (0.5, 1):
        arguments = {"llm": llm, "tolerance": tolerance, "max_new_tokens": 20, **VARIED}
        text = letters.decode(noisy.generate(PROMPT, **arguments)[0])
        ended = noisy.generate(PROMPT, stop_strings=[text[4:7]], tokenizer=tokenizer, **arguments)
        assert ended.shape[1] < 20 and text.startswith(letters.decode(ended[0]))
        assert text[4:7] in letters.decode(ended[0])


class Only(LogitsProcessor):
    """As a grammar's: only these tokens may come."""

    def __init__(self, allowed):
        self.allowed = allowed

    def __call__(self, input_ids, scores):
        forbidden = torch.ones_like(scores, dtype=torch.bool)
        forbidden[:, self.allowed] = False
        return scores.masked_fill(forbidden, -torch.inf)


@pytest.mark.parametrize("tolerance", [0, 0.3, 1])
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_llm_writes_where_the_slm_has_no_token_that_is_allowed(llm, tolerance, do_sample):
    model, allowed = build_trimmed_drafter(llm, lacking=[7, 9]), LogitsProcessorList([Only([7, 9])])
    arguments = {"max_new_tokens": 6, "logits_processor": allowed, "do_sample": do_sample}
    ids = model.generate(PROMPT, llm=llm, tolerance=tolerance, **arguments)[0].tolist()
    assert len(ids) == 6 and set(ids) <= {7, 9}
    if not do_sample:
        assert ids == greedy(llm, max_new_tokens=6, logits_processor=allowed)[0].tolist()


class Turns(LogitsProcessor):
    """Of two grammars, one at each token by turns."""

    def __init__(self, *grammars):
        self.grammars = grammars

    def __call__(self, input_ids, scores):
        return self.grammars[(input_ids.shape[1] - PROMPT.shape[1]) % len(self.grammars)](input_ids, scores)


@pytest.mark.parametrize("tolerance", [0, 0.3, 1])
@pytest.mark.parametrize("fast", [False, True])
def test_the_llm_goes_on_behind_tokens_that_it_was_not_asked_about(llm, tolerance, fast):
    model = build_trimmed_drafter(llm, lacking=[7, 9])
    arguments = {"max_new_tokens": 6, "logits_processor": LogitsProcessorList([Turns(Only([10]), Only([7, 9]))])}
    ids = model.generate(PROMPT, llm=llm, tolerance=tolerance, fast=fast, **arguments)
    assert torch.equal(ids, greedy(llm, **arguments))


@pytest.mark.parametrize(
    "own", [{"guidance_scale": 1.5}, {"watermarking_config": SynthIDTextWatermarkingConfig(5, [1, 2])}]
)
def test_what_remembers_each_call_is_refused_of_the_llms_own_generation_config_too(llm, noisy, own):
    llm.generation_config.update(**own)
    with pytest.raises(ValueError, match="Only a greedy response with `tolerance=0`"):
        noisy.generate(PROMPT, llm=llm, tolerance=0.5, max_new_tokens=4)


def test_the_output_is_that_of_lossless_mode(llm, noisy):
    config = GenerationConfig(return_dict_in_generate=True, max_new_tokens=4)
    assert isinstance(noisy.generate(PROMPT, config, llm=llm, tolerance=0.5), LosslessOutput)
    assert isinstance(noisy.generate(PROMPT, llm=llm, tolerance=0.5, max_new_tokens=4), torch.Tensor)
