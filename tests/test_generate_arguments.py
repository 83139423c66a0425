"""Each option of `generate` does what it does for the SLM alone, or is refused in words.

The reference: a prompt that is the SLM's own embeddings of some ids is what the SLM reads when it is given those ids.
docs/generation.md lists every option with the test that shows it.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from conftest import (
    EOS,
    PAD,
    SLM_VOCAB,
    TRANSFORMERS_4,
    build_llm,
    build_model,
    build_prompts,
    build_slm_tokenizer,
    padded,
)
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from llm2slm import LLM2SLMForConditionalGeneration, decoding_llm2slm
from llm2slm.arguments_llm2slm import only_special_tokens
from llm2slm.inputs_llm2slm import CACHE, CACHE_NAMES

PROMPT = padded(build_prompts())
DOCS = Path(__file__).parent.parent / "docs" / "generation.md"
IDS = torch.randint(4, SLM_VOCAB, (2, 5), generator=torch.Generator().manual_seed(5))
GREEDY = {"do_sample": False, "max_new_tokens": 8}
KINDS = ["t5", "bart", "llama", "gpt2"]
MODELS = {kind: build_model("llama", kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request):
    """Shared by all tests, none of which changes it."""
    return MODELS[request.param]


@pytest.fixture(params=["llama", "gpt2"])
def decoder_only(request):
    return MODELS[request.param]


@pytest.fixture
def eager(monkeypatch):
    """The step of fast decode is traced, but no code is generated for it."""
    monkeypatch.setattr(decoding_llm2slm, "BACKEND", "eager")


def is_encoder_decoder(model):
    return model.config.slm_config.is_encoder_decoder


def start_of(model):
    """What a response of the SLM alone begins with: its prompt, if it is decoder-only."""
    return torch.full((2, 1), model.config.decoder_start_token_id) if is_encoder_decoder(model) else IDS[:, :0]


@torch.no_grad()
def write(model, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(prompt_embeds=model._embed_with_slm(IDS), **{**GREEDY, **kwargs})


@torch.no_grad()
def write_with_slm(model, seed=0, beginning=None, **kwargs):
    """The response of the SLM alone, which is given ids."""
    torch.manual_seed(seed)
    kwargs = {**GREEDY, **kwargs}
    if is_encoder_decoder(model):
        given = {} if beginning is None else {"decoder_input_ids": beginning}
        return model.slm.generate(IDS, attention_mask=torch.ones_like(IDS), **given, **kwargs)
    ids = IDS if beginning is None else torch.cat([IDS, beginning], dim=1)
    for name in ("max_length", "min_length"):
        if name in kwargs:
            kwargs[name] += IDS.shape[1]
            kwargs.pop("max_new_tokens" if name == "max_length" else "min_new_tokens", None)
    output = model.slm.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
    return output[:, IDS.shape[1] :]


# ------------------------------------------------------------------------------------- what the SLM alone writes, too
EQUAL = {
    "max_length": {"max_length": 6, "max_new_tokens": None},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": [EOS, 20, 54, 36, 57, 60]},
    "num_beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True},
    "num_beams_never": {"num_beams": 2, "early_stopping": "never", "length_penalty": -1.0},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "do_sample": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 3.0},
    "top_k": {"do_sample": True, "temperature": 3.0, "top_k": 3},
    "top_p": {"do_sample": True, "temperature": 3.0, "top_p": 0.5},
    "min_p": {"do_sample": True, "temperature": 3.0, "min_p": 0.2},
    "typical_p": {"do_sample": True, "temperature": 3.0, "typical_p": 0.4},
    "epsilon_cutoff": {"do_sample": True, "temperature": 3.0, "epsilon_cutoff": 0.03},
    "eta_cutoff": {"do_sample": True, "temperature": 3.0, "eta_cutoff": 0.4},
    "suppress_tokens": {"suppress_tokens": [20, 38, 54, 36, 35, 16, 30]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [20, 38, 54, 36, 27, 60, 0, 30, 57, 44]},
    "forced_eos_token_id": {"forced_eos_token_id": 33},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 3.0), "max_new_tokens": 20},
    "renormalize_logits": {"num_beams": 2, "renormalize_logits": True, "suppress_tokens": [20, 38, 54]},
    "remove_invalid_values": {"remove_invalid_values": True},
    "eos_token_id": {"eos_token_id": [20, 54, 57, 60]},
    "pad_token_id": {"pad_token_id": 9, "eos_token_id": [20, 54, 57, 60]},
    "use_cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "synthid": {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[3, 5, 7]), "do_sample": True},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 9, 11]},
    "low_memory": {"low_memory": True},
    "max_time": {"max_time": 100.0},
    "synced_gpus": {"synced_gpus": False},
}
if not TRANSFORMERS_4:
    EQUAL["top_h"] = {"do_sample": True, "temperature": 3.0, "top_h": 0.4}
    EQUAL["max_cache_len"] = {"cache_implementation": "static", "max_cache_len": 40}


@pytest.mark.parametrize("option", EQUAL)
def test_an_option_does_what_it_does_for_the_slm_alone(model, option):
    options = EQUAL[option]
    written = write(model, **options)
    assert torch.equal(written, write_with_slm(model, **options))
    if set(options) <= set(vars(GenerationConfig())):
        given = {name: value for name, value in {**GREEDY, **options}.items() if value is not None}
        torch.manual_seed(0)
        prompt_embeds = model._embed_with_slm(IDS)
        assert torch.equal(
            model.generate(prompt_embeds=prompt_embeds, generation_config=GenerationConfig(**given)), written
        )


@pytest.mark.parametrize(
    "option",
    [
        *("max_length", "num_beams", "beam_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "synthid"),
        *("epsilon_cutoff", "eta_cutoff", "suppress_tokens", "forced_eos_token_id", "prefix"),
    ],
)
def test_such_an_option_changes_the_response(option):
    options = EQUAL[option]
    sampling = {"do_sample": options.get("do_sample", False), "temperature": 3.0 if option != "temperature" else 1.0}
    if not sampling["do_sample"]:
        del sampling["temperature"]
    assert any(not torch.equal(write(m, **options), write(m, **sampling)) for m in MODELS.values())


def test_with_fast_decode_each_option_gives_the_same_tokens(eager):
    for option, options in EQUAL.items():
        assert torch.equal(write(MODELS["llama"], **options, fast=True), write(MODELS["llama"], **options)), option


# ------------------------------------------------------------------------- counted from the response, not the prompt
OF_THE_RESPONSE = {
    "repetition_penalty": {"repetition_penalty": 3.0},
    "repetition_penalty with sequence_bias": {"repetition_penalty": 3.0, "sequence_bias": {(20,): -2.0, (35,): 9.0}},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[20], [54, 31], [35, 16], [60, 60], [38, 38]]},
    "sequence_bias": {"sequence_bias": {(20,): -50.0, (54, 31): -50.0, (35, 16): -50.0, (60, 60): -50.0}},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=20.0)},
}


@pytest.mark.filterwarnings("ignore:Passing `")
@pytest.mark.parametrize("option", OF_THE_RESPONSE)
def test_penalties_and_watermarks_are_those_of_the_response(model, option):
    options = OF_THE_RESPONSE[option]
    embeds = model._embed_with_slm(IDS)
    expected = model.slm.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(IDS), **GREEDY, **options)
    assert torch.equal(write(model, **options), expected)
    assert torch.equal(write(model, **options), write(model, **options, seed=1))


@pytest.mark.filterwarnings("ignore:Passing `")
@pytest.mark.parametrize("option", OF_THE_RESPONSE)
def test_they_are_the_same_in_a_padded_batch(model, option):
    prompts, options = build_prompts((3, 9)), {**GREEDY, "eos_token_id": None, **OF_THE_RESPONSE[option]}
    together = model.generate(**padded(prompts), **options)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, model.generate(prompt[None], **options)[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 3.0}], ids=str)
def test_the_forced_first_token_comes_first(model, options, eager):
    start = int(is_encoder_decoder(model))
    ids = write(model, forced_bos_token_id=33, **options)
    assert (ids[:, start] == 33).all() and (ids[:, start + 1] != 33).any()
    # What is suppressed at the beginning is suppressed behind it, as everywhere in Transformers.
    second = ids[:, start + 1].tolist()
    ids = write(model, forced_bos_token_id=33, begin_suppress_tokens=second, **options)
    assert (ids[:, start] == 33).all() and not set(second) & set(ids[:, start + 1].tolist())
    if model is MODELS["llama"]:
        fast = write(model, forced_bos_token_id=33, begin_suppress_tokens=second, fast=True, **options)
        assert torch.equal(fast, ids)


def test_no_end_token_is_no_end_token(model):
    start = int(is_encoder_decoder(model))
    end = int(write(model)[0, start + 1])
    model.generation_config.eos_token_id, before = end, model.generation_config.eos_token_id
    model.slm.generation_config.eos_token_id = end
    try:
        assert (write(model)[0, start + 2 :] == PAD).all()
        assert (write(model, eos_token_id=None)[0, start + 2 :] != PAD).any()
    finally:
        model.generation_config.eos_token_id = model.slm.generation_config.eos_token_id = before


# --------------------------------------------------------------------------------------- the beginning of the response
BEGUN = torch.tensor([[20, 21, 9], [11, 35, 5]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 7, "max_new_tokens": None},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"begin_suppress_tokens": [20, 38, 54, 36, 27, 60, 0, 30, 57, 44]},
        {"forced_bos_token_id": 33},
        {"exponential_decay_length_penalty": (1, 3.0)},
        {"min_length": 8, "eos_token_id": [EOS, 20, 38, 54, 36, 27, 60, 30, 57, 44]},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_a_given_beginning_is_continued_as_by_the_slm_alone(model, options, eager):
    with_start = torch.cat([torch.full((2, 1), model.config.decoder_start_token_id), BEGUN], dim=1)
    if is_encoder_decoder(model):
        expected = write_with_slm(model, beginning=with_start, **options)
    else:
        alone = {name: value for name, value in options.items() if name != "forced_bos_token_id"}
        expected = write_with_slm(model, beginning=BEGUN, **alone)
    written = write(model, decoder_input_ids=BEGUN, **options)
    assert torch.equal(written, expected)
    assert written[:: len(written) // 2, is_encoder_decoder(model) :][:, :3].equal(BEGUN)
    mask = torch.ones_like(with_start)
    assert torch.equal(write(model, decoder_input_ids=with_start, decoder_attention_mask=mask, **options), expected)
    if model in (MODELS["t5"], MODELS["llama"]) and "do_sample" not in options:
        assert torch.equal(write(model, decoder_input_ids=BEGUN, fast=True, **options), expected)


def test_a_beginning_goes_on_as_it_would_have_in_any_batch_and_padding(model):
    whole = model.generate(**PROMPT, **{**GREEDY, "max_new_tokens": 9}, eos_token_id=None)
    beginning = whole[:, : 4 + is_encoder_decoder(model)]
    for side in ("left", "right"):
        prompt = padded(build_prompts(), side)
        assert model.generate(
            **prompt, **{**GREEDY, "max_new_tokens": 5}, decoder_input_ids=beginning, eos_token_id=None
        ).equal(whole)
    one_token = {"input_ids": build_prompts((1,))[0][None], "eos_token_id": None, **GREEDY}
    whole = model.generate(**one_token)
    again = model.generate(**{**one_token, "max_new_tokens": 5}, decoder_input_ids=whole[:, : whole.shape[1] - 5])
    assert again.equal(whole)


def test_the_start_token_alone_begins_nothing(model):
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    assert model.generate(**PROMPT, **GREEDY, decoder_input_ids=start).equal(model.generate(**PROMPT, **GREEDY))


def test_by_default_twenty_tokens_are_added(model):
    embeds = model._embed_with_slm(IDS)
    ids = model.generate(prompt_embeds=embeds, decoder_input_ids=BEGUN, do_sample=False, eos_token_id=None)
    assert ids.shape[1] in (23 + is_encoder_decoder(model), 23)


def test_a_streamer_gets_the_beginning_first(model):
    class Recorder:
        puts: list = []

        def put(self, value):
            self.puts.append(value.tolist())

        def end(self):
            pass

    recorder = Recorder()
    embeds = model._embed_with_slm(IDS[:1])
    ids = model.generate(prompt_embeds=embeds, decoder_input_ids=BEGUN[:1], streamer=recorder, **GREEDY)
    begun = 3 + is_encoder_decoder(model)
    assert recorder.puts == [ids[:, :begun].tolist(), *[[token] for token in ids[0, begun:].tolist()]]


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"decoder_input_ids": BEGUN[:1]},
            r"`decoder_input_ids` must have shape \(2, response_length\).*got \(1, 3\)",
        ),
        (
            {"decoder_input_ids": BEGUN[0]},
            r"`decoder_input_ids` must be integers of shape.*got torch.int64 of shape \(3,\)",
        ),
        ({"decoder_input_ids": BEGUN.float()}, "`decoder_input_ids` must be integers.*got torch.float32"),
        ({"decoder_input_ids": BEGUN[:, :0]}, r"`decoder_input_ids` must be.*got torch.int64 of shape \(2, 0\)"),
        (
            {"decoder_input_ids": BEGUN + 60},
            "`decoder_input_ids` must be ids of the SLM's tokenizer, from 0 to 63; found 95",
        ),
        ({"decoder_input_ids": BEGUN - 10}, "from 0 to 63; found -5"),
        (
            {"decoder_input_ids": BEGUN, "decoder_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
            "`decoder_attention_mask` must be ones.*beginnings of one length together",
        ),
        ({"decoder_attention_mask": torch.ones(2, 3)}, "`decoder_attention_mask` is the mask of `decoder_input_ids`"),
    ],
)
def test_a_beginning_that_is_none_is_refused_before_the_llm_runs(model, given, message, count_calls):
    calls = count_calls(model.llm)
    with pytest.raises(ValueError, match=message):
        model.generate(padded(build_prompts((4, 6)))["input_ids"] + 0, **GREEDY, **given)
    assert not calls


def test_a_start_token_in_some_rows_only_is_refused_where_it_has_a_place(model):
    ids = BEGUN.clone()
    ids[1, 0] = model.config.decoder_start_token_id
    if is_encoder_decoder(model):
        with pytest.raises(ValueError, match="All rows.*or none, but row 1 does and row 0 does not"):
            write(model, decoder_input_ids=ids)
    else:
        assert torch.equal(write(model, decoder_input_ids=ids), write_with_slm(model, beginning=ids))


def test_a_beginning_without_room_behind_it_is_refused(model, decoder_only):
    with pytest.raises(ValueError, match="max_length"):
        write(model, decoder_input_ids=BEGUN, max_new_tokens=None, max_length=3)
    with pytest.raises(ValueError, match="The prompt and the response have 66 tokens"):
        write(decoder_only, decoder_input_ids=BEGUN, max_new_tokens=58)


def test_labels_say_that_it_is_a_trainers_batch(model):
    alone = write(model)
    batch = {"labels": BEGUN, "decoder_input_ids": BEGUN, "decoder_attention_mask": torch.tensor([[1, 1, 0]] * 2)}
    assert torch.equal(write(model, **batch, shift_labels=BEGUN), alone)
    assert torch.equal(write(model, labels=BEGUN), alone)
    # Another shape than that of the labels: not made from them, and `Seq2SeqTrainer` wants it continued.
    begun = write(model, labels=BEGUN[:, :2], decoder_input_ids=BEGUN)
    assert torch.equal(begun, write(model, decoder_input_ids=BEGUN)) and not torch.equal(begun, alone)
    with pytest.raises(ValueError, match="shift_labels"):
        write(model, shift_labels=BEGUN)


# ------------------------------------------------------------------------------------------------------------- refused
EMBEDS = torch.zeros(2, 5, 32)
REFUSED = {
    "encoder_repetition_penalty": (2.0, "needs the prompt as ids.*`EncoderRepetitionPenaltyLogitsProcessor`"),
    "encoder_no_repeat_ngram_size": (2, "needs the prompt as ids.*`EncoderNoRepeatNGramLogitsProcessor`"),
    "guidance_scale": (1.5, "needs the prompt as ids"),
    "negative_prompt_ids": (IDS, "needs the prompt as ids"),
    "negative_prompt_attention_mask": (torch.ones_like(IDS), "needs the prompt as ids"),
    "token_healing": (True, "the prompt's last token"),
    "prefill_chunk_size": (1, "reads the whole prompt at once"),
    "continuous_batching_config": (object(), "continuous batching"),
    "assistant_model": (object(), "`generate_lossless` drafts for the LLM"),
    "assistant_tokenizer": (object(), "a drafter cannot read"),
    "assistant_early_exit": (1, "a drafter cannot read"),
    "assistant_ensemble_weight": (0.5, "a drafter cannot read"),
    "use_mtp": (True, "a drafter cannot read"),
    "speculation_type": ("dflash", "a drafter cannot read"),
    "is_assistant": (True, "drafts in `generate_lossless`, and with an `llm`"),
    "encoder_outputs": ((EMBEDS,), "pass an encoded prompt as `prompt_embeds`"),
    "decoder_inputs_embeds": (EMBEDS, "pass the beginning of the response as `decoder_input_ids`"),
    "position_ids": (torch.arange(5)[None], "follow from `attention_mask`"),
    "decoder_position_ids": (torch.arange(5)[None], "follow from `attention_mask`"),
    "cache_position": (torch.arange(5), "follow from `attention_mask`"),
    "penalty_alpha": (
        0.6,
        "custom_generate='transformers-community/contrastive-search'` and `trust_remote_code=True`",
    ),
    "dola_layers": ("low", "transformers-community/dola"),
    "num_beam_groups": (2, "transformers-community/group-beam-search"),
    "diversity_penalty": (1.0, "transformers-community/group-beam-search"),
    "constraints": ([object()], "transformers-community/constrained-beam-search"),
    "force_words_ids": ([[7]], "transformers-community/constrained-beam-search"),
}
AT_THE_DOOR = ("inputs_embeds", "token_type_ids")  # refused with the prompt: tests/test_inputs.py


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_before_the_llm_runs(name, count_calls):
    value, message = REFUSED[name]
    for kind, fast in (("t5", False), ("llama", False), ("t5", True), ("llama", True)):
        calls = count_calls(MODELS[kind].llm)
        with pytest.raises(ValueError, match=f"takes no `{name}`: .*{message}"):
            MODELS[kind].generate(**PROMPT, **GREEDY, fast=fast, **{name: value})
        assert not calls


def test_none_asks_for_nothing(model):
    names = [*REFUSED, *AT_THE_DOOR, *CACHE_NAMES, "labels", "decoder_input_ids"]
    assert torch.equal(write(model, **dict.fromkeys(names)), write(model))


def test_what_only_drafting_models_read_changes_nothing(model):
    options = {"num_assistant_tokens": 2, "num_assistant_tokens_schedule": "heuristic", "max_matching_ngram_size": 1}
    options |= {"assistant_confidence_threshold": 0.9, "assistant_lookbehind": 2, "target_lookbehind": 2}
    assert torch.equal(write(model, **options), write(model))


@pytest.mark.parametrize("fast", [False, True])
def test_an_unknown_argument_is_named_before_the_llm_runs(model, fast, count_calls):
    calls = count_calls(model.llm)
    with pytest.raises(ValueError, match="max_new_token'"):
        model.generate(**PROMPT, max_new_token=3, fast=fast)
    assert not calls


def test_processors_that_take_the_prompts_ids_serve_where_the_tokenizer_is_shared():
    model = build_model("llama", "llama", shared_tokenizer=True)
    ids = torch.arange(4, 56)[None]
    for processor, inside in (
        (EncoderRepetitionPenaltyLogitsProcessor(1000.0, ids), True),
        (EncoderNoRepeatNGramLogitsProcessor(1, ids), False),
    ):
        written = model.generate(ids, **GREEDY, eos_token_id=None, logits_processor=[processor])
        assert torch.isin(written, ids).tolist() == [[inside] * 8]


# --------------------------------------------------------------------------- by kind of SLM, version or what is there
def test_lookup_in_the_response_is_for_slms_that_have_a_start_token(model):
    options = {"prompt_embeds": model._embed_with_slm(IDS[:1]), "prompt_lookup_num_tokens": 3, **GREEDY}
    if is_encoder_decoder(model):
        assert torch.equal(model.generate(**options)[0], write(model)[0])
    else:
        with pytest.raises(ValueError, match="decoder-only SLM takes no `prompt_lookup_num_tokens`"):
            model.generate(**options)


def test_a_start_token_is_for_slms_that_have_one(model):
    for start in (7, [7, 9]):
        if is_encoder_decoder(model):
            written = write(model, decoder_start_token_id=start)
            assert torch.equal(written, write_with_slm(model, decoder_start_token_id=start))
            assert written[:, 0].tolist() == (start if isinstance(start, list) else [start, start])
            begun = write(model, decoder_start_token_id=start, decoder_input_ids=BEGUN)
            assert torch.equal(begun[:, 1:4], BEGUN) and torch.equal(begun[:, 0], written[:, 0])
        else:
            with pytest.raises(ValueError, match="decoder-only SLM takes no `decoder_start_token_id`"):
                write(model, decoder_start_token_id=start)
    assert torch.equal(write(model, decoder_start_token_id=model.config.decoder_start_token_id), write(model))


@pytest.mark.parametrize("name", CACHE_NAMES)  # whichever is Transformers' own
def test_an_empty_cache_is_filled_and_a_full_one_refused(model, name):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if is_encoder_decoder(model) else DynamicCache()
    output = write(model, **{name: cache}, return_dict_in_generate=True)
    assert torch.equal(output.sequences, write(model)) and output[CACHE] is cache
    for full in (cache, ((EMBEDS, EMBEDS),)):
        with pytest.raises(ValueError, match=f"`{CACHE}` must be an empty `Cache`"):
            write(model, **{name: full})


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static", "quantized", "dynamic"])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_other_caches_do_what_they_do_for_the_slm_alone(kind, cache):
    def outcome(generate):  # of models of their own: a cache that fails stays with the model in Transformers 4
        try:
            model = build_model("llama", kind)
            return generate(model, cache_implementation=cache, cache_config={"backend": "hqq"}).tolist()
        except Exception as error:
            return type(error), str(error)

    assert outcome(write) == outcome(write_with_slm)


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="paged"):
        write(model, cache_implementation="paged")


def test_a_cache_is_returned_in_the_old_format(model):
    options = {"return_legacy_cache": True, "return_dict_in_generate": True}
    if TRANSFORMERS_4:
        assert isinstance(write(model, **options)[CACHE], tuple)
    else:
        with pytest.raises(ValueError, match="return_legacy_cache"):
            write(model, **options)


def test_attentions_are_returned(model):
    output = write(model, output_attentions=True, return_dict_in_generate=True)
    names = ("decoder_attentions", "cross_attentions") if is_encoder_decoder(model) else ("attentions",)
    assert torch.equal(output.sequences, write(model))
    assert all(len(output[name]) == output.sequences.shape[1] - is_encoder_decoder(model) for name in names)


def test_processes_go_on_together(model, tmp_path):
    alone = write(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert torch.equal(write(model, synced_gpus=True), alone)
    finally:
        torch.distributed.destroy_process_group()


def test_the_models_defaults_may_be_left_out_where_transformers_knows_the_argument():
    model = build_model("llama", "t5")
    model.generation_config.num_beams = model.generation_config.max_new_tokens = 3
    options = {"generation_config": GenerationConfig(num_return_sequences=1), "use_model_defaults": False}
    if TRANSFORMERS_4:
        assert torch.equal(model.generate(**PROMPT, **options), build_model("llama", "t5").generate(**PROMPT))
    else:
        with pytest.raises(ValueError, match="use_model_defaults"):
            model.generate(**PROMPT, **options)


def test_a_compile_config_does_what_it_does_for_the_slm_alone(model):
    options = {"compile_config": CompileConfig(), "cache_implementation": "static"}
    assert torch.equal(write(model, **options), write_with_slm(model, **options))


def test_stop_strings_without_a_tokenizer_are_refused(model):
    with pytest.raises(ValueError, match=r"`stop_strings=\['a'\]` are found in text: pass the `tokenizer`"):
        write(model, stop_strings=["a"])
    assert torch.equal(write(model, stop_strings=["never written"], tokenizer=build_slm_tokenizer()), write(model))


def write_nothing(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    return input_ids, type(model)


def test_a_custom_loop_gets_what_the_slm_alone_would_give_it(model, caplog):
    for options in ({}, {"fast": True}, {"num_beam_groups": 2, "num_beams": 4}):
        ids, writer = write(model, custom_generate=write_nothing, **options)
        assert writer is type(model.slm) and ids[:: 4 if "num_beams" in options else 1].equal(start_of(model))


def test_a_custom_loop_of_a_folder_is_run(model, tmp_path):
    (tmp_path / "custom_generate").mkdir()
    code = "def generate(model, inputs_embeds, generation_config, tokenizer, **kwargs):\n"
    code += "    return inputs_embeds, generation_config, tokenizer"
    (tmp_path / "custom_generate" / "generate.py").write_text(code)
    (tmp_path / "config.json").write_text("{}")
    tokenizer = build_slm_tokenizer()
    options = {"num_beam_groups": 2, "num_beams": 4, "stop_strings": ["a"], "tokenizer": tokenizer}
    embeds, config, given = write(model, custom_generate=str(tmp_path), trust_remote_code=True, **options)
    assert given is tokenizer and config.stop_strings == ["a"]
    assert torch.equal(embeds, model._embed_with_slm(IDS)) and config.num_beam_groups == 2


@pytest.mark.parametrize("fast", [False, True])
def test_a_streamer_of_beams_is_refused_as_for_the_slm_alone(model, fast):
    with pytest.raises(ValueError, match="streamer.*beam"):
        write(model, num_beams=2, streamer=object(), fast=fast)


@pytest.mark.parametrize("options", [{"compile_config": CompileConfig()}, {"disable_compile": True}])
def test_fast_decode_leaves_what_is_said_about_compiling_to_the_plain_path(options, monkeypatch):
    model = build_model("llama", "llama")
    assert torch.equal(write(model, fast=True, **options), write(model))
    assert model.slm not in decoding_llm2slm._compiled


def test_of_a_generation_config_the_special_tokens_may_be_kept():
    config = GenerationConfig(eos_token_id=[1, 5], pad_token_id=0, num_beams=4, max_new_tokens=9)
    assert (
        only_special_tokens(config).to_diff_dict()
        == GenerationConfig(eos_token_id=[1, 5], pad_token_id=0).to_diff_dict()
    )


# ------------------------------------------------------------------------------------------------------- lossless mode
@pytest.fixture(scope="module")
def lossless():
    llm = build_llm("llama")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm, build_llm("llama", seed=7), shared_tokenizer=True
    )
    return model, llm


OF_LOSSLESS = {
    "guidance": {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[5, 6, 7]])},
    "forced tokens": {"forced_bos_token_id": 33, "forced_eos_token_id": 34},
    "penalties": {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "sequence_bias": {(20,): -5.0}},
    "suppressed": {"suppress_tokens": [1, 5, 9], "begin_suppress_tokens": [20], "bad_words_ids": [[7, 8]]},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "synthid": {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[3, 5, 7])},
    "lengths": {"min_new_tokens": 9, "exponential_decay_length_penalty": (3, 2.0)},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [4 + len(ids) % 7, 12]},
    "processor": {"logits_processor": [RepetitionPenaltyLogitsProcessor(2.0)], "renormalize_logits": True},
    "no meaning": {"num_assistant_tokens": 2, "low_memory": True, "remove_invalid_values": True, "max_time": 100.0},
}


@pytest.mark.parametrize("option", OF_LOSSLESS)
def test_lossless_mode_writes_what_the_llm_writes_with_that_option(lossless, option):
    model, llm = lossless
    prompt = PROMPT["input_ids"][1:2]
    options = {"max_new_tokens": 12, "do_sample": False, **OF_LOSSLESS[option]}
    expected = llm.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, prompt.shape[1] :]
    assert torch.equal(model.generate_lossless(prompt, llm=llm, **options).sequences, expected)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("num_beams", 2), ("num_return_sequences", 2), ("num_beam_groups", 2)),
        *(("diversity_penalty", 1.0), ("dola_layers", "low"), ("penalty_alpha", 0.6), ("constraints", [1])),
        *(("force_words_ids", [[7]]), ("assistant_early_exit", 1), ("prompt_lookup_num_tokens", 2), ("use_mtp", True)),
        *(("is_assistant", True), ("output_scores", True), ("assistant_ensemble_weight", 0.5)),
        *(("speculation_type", "dflash"), ("token_healing", True), ("prefill_chunk_size", 2)),
        *(("cache_implementation", "static"), ("cache_config", {}), ("max_cache_len", 9)),
        *(("compile_config", CompileConfig()), ("continuous_batching_config", {}), ("return_legacy_cache", True)),
    ],
)
def test_lossless_mode_refuses_what_it_cannot_honour(lossless, name, value):
    model, llm = lossless
    with pytest.raises(ValueError, match=f"Drafting for `llm` .*got {name}="):
        model.generate_lossless(PROMPT["input_ids"][1:2], llm=llm, **{name: value})


@pytest.mark.parametrize(
    "name", ["max_new_token", "decoder_input_ids", "past_key_values", "custom_generate", "synced_gpus"]
)
def test_lossless_mode_names_what_it_does_not_take(lossless, name):
    model, llm = lossless
    with pytest.raises(ValueError, match=name):
        model.generate_lossless(PROMPT["input_ids"][1:2], llm=llm, **{name: IDS})


# ----------------------------------------------------------------------------------------------------------- the table
def test_the_table_lists_every_option_with_a_test_that_exists():
    rows = re.findall(r"^\| `(\w+)` \| (\w[\w ]*) \| `(\w+)::(\w+)` \|", DOCS.read_text(encoding="utf-8"), re.M)
    listed = [name for name, *_ in rows]
    assert len(listed) == len(set(listed))
    assert {meaning for _, meaning, *_ in rows} <= {"honoured", "refused", "no meaning here", "by kind"}
    options = {name for name in {*GenerationConfig().to_dict(), *vars(GenerationConfig())} if not name.startswith("_")}
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    assert not (options | arguments | set(REFUSED)) - set(listed)
    for _, _, module, test in rows:
        path = Path(__file__).parent / f"{module}.py"
        assert f"def {test}(" in path.read_text(encoding="utf-8"), f"{module}::{test}"
    for name, meaning, *_ in rows:
        assert (meaning == "refused") == (name in REFUSED or name in AT_THE_DOOR), name


def test_a_beginning_must_be_a_tensor(model):
    with pytest.raises(TypeError, match="`decoder_input_ids` must be a `torch.Tensor`, got list"):
        model.generate(**PROMPT, **GREEDY, decoder_input_ids=BEGUN.tolist())
