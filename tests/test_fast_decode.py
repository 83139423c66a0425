"""`generate(fast=True)` writes what `generate` writes. Most tests trace the step without generating code for it."""

import functools
import logging

import pytest
import torch
from conftest import EOS, PAD, SLM_HIDDEN, SLM_KINDS, build_model, build_prompts, padded
from torch._dynamo.utils import counters
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from llm2slm import decoding_llm2slm


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A quick backend, and notes that are logged again in each test."""
    monkeypatch.setattr(decoding_llm2slm, "BACKEND", "eager")
    decoding_llm2slm.logger.warning_once.__func__.cache_clear()


@pytest.fixture
def notes(caplog):
    caplog.set_level(logging.WARNING, logger=decoding_llm2slm.logger.name)
    return lambda: [record.getMessage() for record in caplog.records if "fast=True" in record.getMessage()]


def both(model, inputs, seed=0, **kwargs):
    """Ids of the plain path and of the fast one."""
    torch.manual_seed(seed)
    plain = model.generate(**inputs, **kwargs)
    torch.manual_seed(seed)
    return plain, model.generate(**inputs, fast=True, **kwargs)


def compiled_and_used(model):
    compiled = decoding_llm2slm._compiled.get(model.slm)
    return bool(compiled) and not any(step.failed for step in compiled.values())


@functools.cache
def model_of(kind):
    """
    One model for all tests that change nothing of it. A step is compiled for each kind and number of responses: most
    tests have six, as six prompts or with beams or samples of less.
    """
    return build_model("llama", kind)


def of_kinds(*kinds):
    """Each kind's tests on one worker, so that its step is compiled once."""
    return pytest.mark.parametrize("kind", [pytest.param(kind, marks=on_one_worker(kind)) for kind in kinds])


def on_one_worker(kind):
    return pytest.mark.xdist_group(f"fast_decode_{kind}")


SIX_PROMPTS = build_prompts((5, 9, 3, 7, 2, 8))
# The penalty keeps random models from writing one token over and over.
GREEDY = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 3.0}


def early_end(model, inputs) -> int:
    """A token that ends the first row's response before its longest time."""
    return model.generate(**inputs, **GREEDY, eos_token_id=None)[0].tolist()[6]


@pytest.fixture
def deprecations(recwarn):
    """A function: what was called since its last call that transformers says is on its way out."""
    logger, said = logging.getLogger("transformers"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    type(logger).warning_once.cache_clear()
    logger.addHandler(handler)

    def found():
        texts = [str(warning.message) for warning in recwarn if "site-packages/torch/" not in warning.filename] + said
        recwarn.clear()
        said.clear()
        return [text for text in texts if "deprecat" in text.lower()]

    yield found
    logger.removeHandler(handler)


@of_kinds(*SLM_KINDS)
def test_greedy_tokens_equal_the_plain_path_and_nothing_called_is_on_its_way_out(
    kind, notes, count_calls, deprecations
):
    model = model_of(kind)
    end = early_end(model, padded(SIX_PROMPTS))
    deprecations()  # the test's own
    llm_calls = count_calls(model.llm)
    for side in ("left", "right"):
        plain, fast = both(model, padded(SIX_PROMPTS, side), **GREEDY, eos_token_id=end)
        assert torch.equal(plain, fast)
    assert len(set(map(tuple, plain.tolist()))) > 2 and PAD in plain[:, 1:]
    assert len(llm_calls) == 4
    assert compiled_and_used(model) and not notes() and not deprecations()


# One response at a time, and three: each kind of SLM is compiled once.
@pytest.mark.parametrize(("kind", "rows"), [("llama", 1), ("t5", 3)])
def test_the_step_that_inductor_compiles_writes_the_same_tokens(kind, rows, notes, monkeypatch):
    monkeypatch.setattr(decoding_llm2slm, "BACKEND", "inductor")
    model = build_model("llama", kind)
    for prompts, options in ((rows, {"do_sample": False}), (rows, {"do_sample": True}), (1, {"num_beams": rows})):
        inputs = padded(build_prompts((7, 4, 9)[:prompts]))
        plain, fast = both(model, inputs, **options, max_new_tokens=20, eos_token_id=None)
        assert torch.equal(plain, fast)
    assert compiled_and_used(model) and not notes()


@of_kinds("t5", "gpt2")
def test_sampling_with_one_seed_gives_the_same_tokens(kind, deprecations):
    model = model_of(kind)
    options = {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2, "max_new_tokens": 12}
    plain, fast = both(model, padded(build_prompts()), **options)
    other, _ = both(model, padded(build_prompts()), seed=1, **options)
    assert torch.equal(plain, fast) and not torch.equal(plain, other)
    assert compiled_and_used(model) and not deprecations()


@of_kinds(*SLM_KINDS)
def test_beams_are_those_of_the_plain_path(kind, notes, count_calls, deprecations):
    model = model_of(kind)
    inputs = padded(build_prompts()[:2])
    common = {**GREEDY, "eos_token_id": early_end(model, inputs)}
    deprecations()  # the test's own
    llm_calls = count_calls(model.llm)
    for options in ({"num_return_sequences": 2}, {"length_penalty": 2.0, "early_stopping": True}):
        plain, fast = both(model, inputs, **common, num_beams=3, **options)
        assert torch.equal(plain, fast)
    assert not torch.equal(plain, model.generate(**inputs, **common))
    assert len(llm_calls) == 5
    assert compiled_and_used(model) and not notes() and not deprecations()


@on_one_worker("llama")
@pytest.mark.parametrize(
    "options",
    [
        {"early_stopping": "never", "length_penalty": 1.5},
        {"early_stopping": "never", "length_penalty": -1.0, "num_return_sequences": 2},
        {"length_penalty": 0.0, "min_new_tokens": 5},
        {"stopping_criteria": True},
        {"max_new_tokens": 1},
    ],
)
def test_beams_end_where_those_of_the_plain_path_do(options):
    if "stopping_criteria" in options:
        options = {"stopping_criteria": StoppingCriteriaList([RowsOfTokens()])}
    model = model_of("llama")
    inputs = padded(build_prompts((7, 4)))
    ends = [early_end(model, inputs), 5]
    plain, fast = both(model, inputs, **{**GREEDY, "num_beams": 3, "eos_token_id": ends, **options})
    assert torch.equal(plain, fast) and compiled_and_used(model)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_sampled_beams_a_cache_outgrown_and_greedy_behind_them(kind, notes, monkeypatch):
    monkeypatch.setattr(decoding_llm2slm, "BLOCK", 8)
    model = build_model("llama", kind)
    two, four = padded(build_prompts((5, 9))), padded(build_prompts((5, 9, 3, 7)))
    for inputs, options in (
        (two, {"num_beams": 2, "do_sample": True}),
        (two, {"num_beams": 2, "do_sample": False}),
        (four, {"do_sample": False}),
    ):
        plain, fast = both(model, inputs, max_new_tokens=30, eos_token_id=None, **options)
        assert torch.equal(plain, fast)
    assert min(cache_lengths(model)) > 30
    assert compiled_and_used(model) and not notes()


def cache_lengths(model) -> list[int]:
    """Of the caches that are kept for the next call, by number of rows."""
    caches = [cache for compiled in decoding_llm2slm._compiled[model.slm].values() for cache in compiled.idle_caches]
    return [getattr(cache, "self_attention_cache", cache).layers[0].max_cache_len for cache in caches]


def test_a_response_outgrows_the_cache_of_sliding_windows(monkeypatch):
    monkeypatch.setattr(decoding_llm2slm, "BLOCK", 8)
    model = build_model("llama", "gemma3")
    plain, fast = both(model, padded(build_prompts((5, 9))), do_sample=False, max_new_tokens=40, eos_token_id=None)
    assert torch.equal(plain, fast)
    (length,) = cache_lengths(model)
    assert length > 40
    assert compiled_and_used(model)


def test_a_prompt_of_exactly_a_block_and_a_response_of_one_token(monkeypatch):
    monkeypatch.setattr(decoding_llm2slm, "BLOCK", 4)
    model = build_model("llama", "llama")
    for length in (1, 3, 4, 5):
        for max_new_tokens in (1, 2):
            inputs = padded(build_prompts((length,)))
            plain, fast = both(model, inputs, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=None)
            assert torch.equal(plain, fast) and fast.shape == (1, max_new_tokens)


@of_kinds("t5", "llama")
def test_calls_of_other_lengths_compile_nothing_and_see_nothing_of_earlier_ones(kind):
    model = model_of(kind)
    both(model, padded(build_prompts((20, 11) * 3)), do_sample=False, max_new_tokens=20, eos_token_id=None)
    graphs = counters["stats"]["unique_graphs"]
    for lengths, max_new_tokens in (((4, 7) * 3, 9), ((30, 3) * 3, 25)):
        inputs = padded(build_prompts(lengths, seed=max_new_tokens))
        plain, fast = both(model, inputs, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=None)
        assert torch.equal(plain, fast)
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_new_weights_and_a_module_changed_between_two_calls_are_seen():
    model = build_model("llama", "llama")
    inputs = padded(build_prompts((6,)))
    old, _ = both(model, inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    with torch.no_grad():
        for parameter in model.slm.parameters():
            parameter.mul_(-1)
    before, fast = both(model, inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(before, fast) and not torch.equal(before, old)
    mlp = model.slm.model.layers[0].mlp
    mlp.down_proj = torch.nn.Sequential(mlp.down_proj, torch.nn.Linear(SLM_HIDDEN, SLM_HIDDEN))
    plain, fast = both(model, inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(plain, fast) and not torch.equal(plain, before)
    mlp.down_proj = mlp.down_proj[0]
    _, fast = both(model, inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(fast, before)


def test_inference_mode_and_back():
    model = build_model("llama", "llama")
    inputs = padded(build_prompts((6,)))
    plain, _ = both(model, inputs, do_sample=False, max_new_tokens=8)
    with torch.inference_mode():
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=8, fast=True), plain)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=8, fast=True), plain)
    assert compiled_and_used(model)


def test_bfloat16():
    model = build_model("llama", "llama").to(torch.bfloat16)
    plain, fast = both(model, padded(build_prompts((6,))), do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(plain, fast) and compiled_and_used(model)


class Recorder:
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended += 1


class RowsOfTokens(StoppingCriteria):
    """Ends a row behind an odd token."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 2 == 1


@of_kinds("t5", "llama")
def test_streamers_processors_and_stopping_criteria_are_heard(kind):
    model = model_of(kind)
    inputs = padded(build_prompts((6,)))
    recorders = [Recorder(), Recorder()]
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 3, "repetition_penalty": 1.5}
    for recorder, fast in zip(recorders, (False, True), strict=True):
        model.generate(**inputs, streamer=recorder, fast=fast, **options)
    assert recorders[0].puts == recorders[1].puts and recorders[1].ended == 1
    options["stopping_criteria"] = StoppingCriteriaList([RowsOfTokens()])
    plain, fast = both(model, padded(SIX_PROMPTS), **options)
    assert torch.equal(plain, fast)
    assert compiled_and_used(model)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"num_beams": 3}, "more than 8 responses at a time in torch.float32"),
        ({"return_dict_in_generate": True, "output_scores": True}, "return_dict_in_generate"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"do_sample": True, "num_return_sequences": 3}, "more than 8 responses at a time in torch.float32"),
    ],
)
def test_what_it_cannot_do_is_decoded_in_the_plain_way_with_a_note(options, reason, notes):
    model = build_model("llama", "llama")
    plain, fast = both(model, padded(build_prompts()), max_new_tokens=6, **options)
    if "return_dict_in_generate" in options:
        assert fast.keys() == plain.keys()
        plain, fast = plain.sequences, fast.sequences
    assert torch.equal(plain, fast)
    assert len(notes()) == 1 and reason in notes()[0]
    assert model.slm not in decoding_llm2slm._compiled


def test_in_bfloat16_a_cpu_with_matrix_units_takes_fewer_rows(notes, monkeypatch):
    model, inputs = build_model("llama", "llama").to(torch.bfloat16), padded(build_prompts((6, 3, 8, 5, 4)))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model.generate(**inputs, fast=True, do_sample=False, max_new_tokens=4)
    assert notes() == [] and compiled_and_used(model)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model.generate(**inputs, fast=True, do_sample=False, max_new_tokens=4)
    assert len(notes()) == 1 and "more than 4 responses at a time in torch.bfloat16" in notes()[0]


def no_compiler(graph, inputs):
    raise RuntimeError("there is no compiler here")


def half_way(graph, inputs):
    def run(*arguments):
        graph(*arguments)
        raise RuntimeError("it does not run")

    return run


@pytest.mark.parametrize(
    ("kind", "backend", "reason"),
    [
        ("llama", no_compiler, "no compiler here"),
        ("llama", half_way, "it does not run"),
        ("t5", half_way, "it does not run"),
    ],
)
def test_a_step_that_does_not_compile_or_run_is_run_as_it_is(kind, backend, reason, notes, monkeypatch):
    monkeypatch.setattr(decoding_llm2slm, "BACKEND", backend)
    model = build_model("llama", kind)
    for _ in range(2):
        plain, fast = both(model, padded(build_prompts()), do_sample=False, max_new_tokens=8, eos_token_id=None)
        assert torch.equal(plain, fast)
    assert len(notes()) == 2 and reason in notes()[0]


def test_torch_compile_may_be_switched_off(notes):
    model = build_model("llama", "llama")
    with torch.compiler.set_stance("force_eager"):
        plain, fast = both(model, padded(build_prompts()), do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(plain, fast)
    assert len(notes()) == 1 and "switched off" in notes()[0]


def test_an_error_of_the_model_is_not_taken_for_one_of_the_compiler():
    model = build_model("llama", "llama")
    inputs = {"prompt_embeds": torch.randn(1, 4, SLM_HIDDEN)}
    model.slm.lm_head.weight = torch.nn.Parameter(torch.randn(EOS + 3, SLM_HIDDEN + 1))
    with pytest.raises(RuntimeError, match="shape"):
        model.generate(**inputs, fast=True, max_new_tokens=4)
