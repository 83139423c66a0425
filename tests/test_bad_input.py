"""What is wrong is refused before the model runs: the argument, what it must be, what was found."""

import copy

import pytest
import torch
from conftest import (
    LLM_HIDDEN,
    LLM_KINDS,
    LLM_VOCAB,
    POSITIONS,
    SLM_HIDDEN,
    SLM_KINDS,
    SLM_VOCAB,
    build_labels,
    build_llm,
    build_llm_tokenizer,
    build_model,
    build_prompts,
    build_slm,
    build_slm_tokenizer,
    llama,
    padded,
    t5,
)
from transformers import AutoModel, AutoModelForCausalLM

from llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration

PROMPT = padded(build_prompts())
LABELS = build_labels()
ONE_TOKEN = {"max_new_tokens": 1}


@pytest.fixture(scope="module")
def model():
    """An LLM with 64 positions, an SLM without a limit."""
    return build_model("llama", "t5")


@pytest.fixture(scope="module", params=["generate", "forward", "encode_prompt"])
def run(request, model, module_calls):
    """Each way into the model; the LLM must not have run when it refuses."""

    def call(**prompt):
        before = len(module_calls)
        try:
            if request.param == "generate":
                return model.generate(**prompt, **ONE_TOKEN)
            if request.param == "forward":
                return model(**prompt, labels=build_labels(len(next(iter(prompt.values())))))
            if "prompt_embeds" in prompt:
                return model.generate(**prompt, **ONE_TOKEN)
            return model.encode_prompt(**prompt)
        except ValueError:
            assert len(module_calls) == before
            raise

    return call


@pytest.fixture(scope="module")
def module_calls(model):
    calls = []
    handle = model.llm.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


# ------------------------------------------------------------------------------------------------------------- prompts
def test_a_valid_prompt_is_not_refused(run):
    assert run(**PROMPT) is not None


@pytest.mark.parametrize("shape", [(1, 0), (5,), (1, 2, 3)], ids=str)
def test_ids_that_are_no_batch_of_prompts(run, shape):
    with pytest.raises(ValueError, match=r"`input_ids` must have shape \(batch_size, prompt_length\).* got \("):
        run(input_ids=torch.ones(shape, dtype=torch.long))


def test_a_row_without_a_token(run):
    mask = PROMPT["attention_mask"].clone()
    mask[1] = 0
    with pytest.raises(ValueError, match="Row 1 of `attention_mask` has no token"):
        run(input_ids=PROMPT["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("token", [LLM_VOCAB, SLM_VOCAB, -1, -100])
def test_ids_outside_the_llms_vocabulary(run, token):
    ids = PROMPT["input_ids"].clone()
    ids[1, 4] = token
    with pytest.raises(ValueError, match=rf"`input_ids` must be ids of the LLM's.*from 0 to 59; found {token}\."):
        run(input_ids=ids)


def test_ids_and_mask_of_different_shapes(run):
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(3, 9\) like `input_ids`, got \(3, 8\)"):
        run(input_ids=PROMPT["input_ids"], attention_mask=PROMPT["attention_mask"][:, 1:])


@pytest.mark.parametrize("name", ["prompt_embeds", "prompt_hidden_states"])
def test_states_and_mask_of_different_shapes(run, model, name):
    width = {"prompt_embeds": SLM_HIDDEN, "prompt_hidden_states": LLM_HIDDEN}[name]
    with pytest.raises(ValueError, match=rf"`attention_mask` must have shape \(3, 9\) like `{name}`, got \(2, 9\)"):
        run(**{name: torch.zeros(3, 9, width)}, attention_mask=PROMPT["attention_mask"][1:])


def test_no_prompt_at_all(model):
    for call in (model.generate, model.encode_prompt, lambda: model(labels=LABELS)):
        with pytest.raises(ValueError, match="Pass the prompt: `input_ids`, `prompt_hidden_states` or"):
            call()


@pytest.mark.parametrize("name", ["prompt_embeds", "prompt_hidden_states"])
@pytest.mark.parametrize("shape", [(3, 9, 7), (3, 0, None), (9, None)], ids=str)
def test_states_of_the_wrong_shape(run, name, shape):
    width = {"prompt_embeds": SLM_HIDDEN, "prompt_hidden_states": LLM_HIDDEN}[name]
    shape = tuple(width if size is None else size for size in shape)
    with pytest.raises(ValueError, match=rf"`{name}` must have shape \(batch_size, prompt_length, {width}\), got \("):
        run(**{name: torch.zeros(shape)})


@pytest.mark.parametrize("name", ["prompt_embeds", "prompt_hidden_states"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite(run, name, value):
    width = {"prompt_embeds": SLM_HIDDEN, "prompt_hidden_states": LLM_HIDDEN}[name]
    states = torch.zeros(3, 9, width)
    states[1, 4, 2] = value
    with pytest.raises(ValueError, match=f"`{name}` has NaN or infinite values"):
        run(**{name: states}, attention_mask=PROMPT["attention_mask"])


@pytest.mark.parametrize("slm", SLM_KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["prompt_embeds", "prompt_hidden_states"])
@torch.no_grad()
def test_what_stands_at_masked_positions_does_not_matter(slm, side, name):
    model = build_model(slm=slm)
    prompt = padded(build_prompts(), side)
    expected = model(**prompt, labels=LABELS).logits[LABELS != -100]
    states = model.encode_prompt(**prompt)[0] if name == "prompt_embeds" else model.encode_hidden_states(**prompt)
    states[prompt["attention_mask"] == 0] = float("nan")
    found = model(attention_mask=prompt["attention_mask"], **{name: states}, labels=LABELS).logits[LABELS != -100]
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------------------- lengths
def learned_positions(kind):
    """RoBERTa counts positions from its padding id + 1, which is 1 here."""
    return POSITIONS - 1 if kind == "roberta" else POSITIONS


@pytest.mark.parametrize("kind", sorted(LLM_KINDS.keys() - {"t5"}))
def test_a_prompt_longer_than_the_llms_positions(kind):
    model = build_model(kind, "t5")
    limit = learned_positions(kind)
    model.encode_prompt(**padded(build_prompts((limit,))))
    message = rf"prompt has {limit + 1} tokens, but the LLM \(.*\) has {limit} positions.*truncation=True, max_length="
    with pytest.raises(ValueError, match=message):
        model.generate(**padded(build_prompts((limit + 1, 3))), **ONE_TOKEN)


@pytest.mark.parametrize("kind", sorted(SLM_KINDS.keys() - {"t5"}))
def test_a_prompt_longer_than_the_slms_positions(kind):
    model = build_model("t5", kind)
    model.encode_prompt(**padded(build_prompts((POSITIONS,))))
    message = rf"prompt has 65 tokens, but the SLM \({kind}.*\) has 64 positions.*truncation=True, max_length="
    with pytest.raises(ValueError, match=message):
        model.generate(**padded(build_prompts((65, 3))), **ONE_TOKEN)
    with pytest.raises(ValueError, match=message.replace("truncation=True, max_length=", "")):
        model.generate(prompt_embeds=torch.zeros(1, 65, SLM_HIDDEN), **ONE_TOKEN)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_only_slm_needs_positions_for_the_response_too(kind):
    model = build_model("t5", kind)
    prompt = padded(build_prompts((60, 3)))
    message = rf"prompt and the response have .* tokens, but the SLM \({kind}\) has 64 positions"
    with pytest.raises(ValueError, match=message):
        model(**prompt, labels=build_labels(2, 10))
    with pytest.raises(ValueError, match=message):
        model.generate(**prompt, max_new_tokens=10, min_new_tokens=10)
    assert model.generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape == (2, 4)
    with pytest.raises(ValueError, match=message):  # by default, 20 tokens
        model.generate(**prompt)


@pytest.mark.parametrize("kind", ["bart", "marian"])
def test_an_encoder_decoder_slm_needs_positions_for_the_response(kind, module_calls):
    model, prompt = build_model("t5", kind), padded(build_prompts((9, 3)))
    before = len(module_calls)
    for length in ({"max_new_tokens": 65}, {"max_length": 66}):
        with pytest.raises(ValueError, match=rf"response has 65 tokens, but the SLM \({kind}\) has 64 positions"):
            model.generate(**prompt, **length)
    assert len(module_calls) == before
    whole = model.generate(**prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, num_beams=1)
    assert whole.shape == (2, 65)  # the start token is read, the last is not


def test_padding_takes_no_positions():
    ids = torch.cat([torch.zeros(1, 30, dtype=torch.long), build_prompts((60,))[0][None]], dim=1)
    mask = torch.cat([torch.zeros(1, 30, dtype=torch.long), torch.ones(1, 60, dtype=torch.long)], dim=1)
    model = build_model("gpt2", "gpt2")
    alone = model.generate(ids[:, 30:], max_new_tokens=3, do_sample=False)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False).equal(alone)


# -------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_labels_that_teach_nothing_or_are_outside_the_vocabulary(slm):
    model = build_model(slm=slm)
    with pytest.raises(ValueError, match="All `labels` are -100"):
        model(**PROMPT, labels=torch.full((3, 4), -100))
    for token in (SLM_VOCAB, -5):
        labels = LABELS.clone()
        labels[0, 0] = token
        with pytest.raises(ValueError, match=rf"`labels` must be ids of the SLM's tokenizer, from 0 to 63.*{token}\."):
            model(**PROMPT, labels=labels)
    with pytest.raises(ValueError, match="Pass the response: `labels` or `decoder_input_ids`"):
        model(**PROMPT)


@pytest.mark.parametrize("prompt", ["input_ids", "prompt_hidden_states", "prompt_embeds"])
@pytest.mark.parametrize("name", ["labels", "decoder_input_ids"])
def test_a_response_that_is_not_one_row_for_each_prompt(model, module_calls, prompt, name):
    tensors = {
        "input_ids": PROMPT["input_ids"],
        "prompt_hidden_states": torch.zeros(3, 9, LLM_HIDDEN),
        "prompt_embeds": torch.zeros(3, 9, SLM_HIDDEN),
    }
    before = len(module_calls)
    for response in (LABELS[:2], LABELS[0], LABELS[:, :0]):
        message = rf"`{name}` must have shape \(3, response_length\), one row for each prompt, got \("
        with pytest.raises(ValueError, match=message):
            model(**{prompt: tensors[prompt], name: response.clamp(min=0)})
    assert len(module_calls) == before


def test_invalid_labels_are_refused_before_the_llm_runs(model, module_calls):
    before = len(module_calls)
    for labels in (None, torch.full((3, 4), -100), torch.full((3, 4), SLM_VOCAB)):
        with pytest.raises(ValueError, match="response|labels"):
            model(**PROMPT, labels=labels)
    assert len(module_calls) == before


# ------------------------------------------------------------------------------------------------------ configurations
@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"fusion": "concat"}, "`fusion` must be one of 'replace', 'add', got 'concat'"),
        ({"projector_type": "conv"}, "`projector_type` must be one of 'mlp', 'linear', got 'conv'"),
        (
            {"projector_norm": "batch"},
            "`projector_norm` must be one of 'layer_norm', 'standardize', None, got 'batch'",
        ),
        ({"llm_layer": 3}, r"`llm_layer` must be an integer from -3 to 2 .*2 layers.*got 3"),
        ({"llm_layer": -4}, r"`llm_layer` must be an integer from -3 to 2 .*got -4"),
        ({"llm_layer": [0, 9]}, r"`llm_layer` must be .*got \[0, 9\]"),
        ({"llm_layer": 1.5}, "`llm_layer` must be an integer.*got 1.5"),
        ({"llm_layer": "last"}, "`llm_layer` must be an integer.*got 'last'"),
        ({"llm_layer": []}, "`llm_layer` must name at least one layer, got an empty list"),
        ({"llm_layers": [1]}, r"Unknown configuration field\(s\) \['llm_layers'\]; known are .*'llm_layer'"),
        ({"projector_hidden_act": "sine"}, "`projector_hidden_act` must be .*got 'sine'"),
        ({"projector_hidden_size": -8}, "`projector_hidden_size` must be .*got -8"),
    ],
    ids=str,
)
def test_unknown_choices(field, message):
    with pytest.raises(ValueError, match=message):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(build_llm(), build_slm(), **field)


def small_slm():
    return AutoModelForCausalLM.from_config(llama(SLM_HIDDEN, LLM_VOCAB - 1))


@pytest.mark.parametrize("fusion", ["add", "replace"])
def test_a_trimmed_vocabulary_without_its_token_map(fusion):
    message = (
        r"trimmed vocabulary \(the LLM's vocabulary has 60 tokens, the SLM's 59\) needs `prompt_token_map`.*leave "
        "`shared_tokenizer=False`: `fusion='add'` then adds to a learned projection of the LLM's input embeddings"
    )
    with pytest.raises(ValueError, match=message):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
            build_llm(), small_slm(), fusion=fusion, shared_tokenizer=True
        )
    # Without the claim it is what the message says.
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(build_llm(), small_slm(), fusion="add")
    assert model.projector.llm_embeddings is not None and model.prompt_token_map is None


@pytest.mark.parametrize(
    ("token_map", "message"),
    [
        ([0] * (LLM_VOCAB - 1), r"must be integers of shape \(60,\).*got torch.int64 of shape \(59,\)"),
        (torch.zeros(LLM_VOCAB), r"must be integers of shape \(60,\).*got torch.float32"),
        ([LLM_VOCAB - 1] * LLM_VOCAB, "must hold ids of the SLM's tokenizer, from 0 to 58, or -1; found 59"),
        ([-2] * LLM_VOCAB, "must hold ids of the SLM's tokenizer, from 0 to 58, or -1; found -2"),
    ],
    ids=["short", "float", "too high", "too low"],
)
def test_a_token_map_of_another_pair(token_map, message):
    with pytest.raises(ValueError, match=f"`prompt_token_map` {message}"):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
            build_llm(), small_slm(), shared_tokenizer=True, prompt_token_map=token_map
        )


@pytest.mark.parametrize("shared", [True, False])
def test_a_token_map_where_none_is_needed(shared):
    slm = build_slm() if shared else small_slm()
    with pytest.raises(ValueError, match=f"`prompt_token_map` is for.*got `shared_tokenizer={shared}` where"):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
            build_llm(), slm, shared_tokenizer=shared, prompt_token_map=[0] * LLM_VOCAB
        )


def test_a_shared_vocabulary_resized_to_one_that_is_not():
    model = build_model(fusion="add", shared_tokenizer=True)
    with pytest.raises(ValueError, match="must have at least 60 tokens, got 59"):
        model.resize_token_embeddings(LLM_VOCAB - 1)
    token_map = [min(i, 49) for i in range(LLM_VOCAB)]
    trimmed = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        build_llm(), small_slm(), shared_tokenizer=True, prompt_token_map=token_map
    )
    for size in (49, LLM_VOCAB):
        with pytest.raises(ValueError, match=f"must have at least 50 and at most 59 tokens, got {size}"):
            trimmed.resize_token_embeddings(size)
    trimmed.resize_token_embeddings(50)
    assert trimmed.config.vocab_size == 50


@pytest.mark.parametrize("rows", [(3, 8), (2, 9)], ids=str)
def test_adding_needs_ids_that_fit_the_cached_states(rows):
    model = build_model(fusion="add", shared_tokenizer=True)
    states = model.encode_hidden_states(**PROMPT)
    with pytest.raises(ValueError, match="`fusion='add'` with a shared tokenizer.*pass `input_ids` with"):
        model.generate(prompt_hidden_states=states, attention_mask=PROMPT["attention_mask"], **ONE_TOKEN)
    ids = torch.ones(rows, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"`input_ids` \({rows[0]}, {rows[1]}\) and `prompt_hidden_states` \(3, 9,"):
        model.generate(ids, prompt_hidden_states=states, attention_mask=PROMPT["attention_mask"], **ONE_TOKEN)
    ids = torch.full((3, 9), LLM_VOCAB)
    with pytest.raises(ValueError, match="`input_ids` must be ids of the LLM's tokenizer, from 0 to 59; found 60"):
        model.generate(ids, prompt_hidden_states=states, attention_mask=PROMPT["attention_mask"], **ONE_TOKEN)


# -------------------------------------------------------------------------------------------------------------- models
def test_llm_and_slm_that_share_parameters():
    slm = AutoModelForCausalLM.from_config(llama(SLM_HIDDEN, SLM_VOCAB))
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(slm, copy.deepcopy(slm))
    assert all(parameter.requires_grad for parameter in model.slm.parameters())
    with pytest.raises(ValueError, match=r"LLM and SLM share the parameter '.*'.*copy.deepcopy\(slm\)"):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(slm, slm)


def test_a_refused_pair_leaves_the_models_as_they_were():
    slm = AutoModelForCausalLM.from_config(llama(SLM_HIDDEN, SLM_VOCAB)).train()
    with pytest.raises(ValueError, match="share the parameter"):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(slm, slm)
    assert all(parameter.requires_grad for parameter in slm.parameters())


def test_loading_arguments_for_a_loaded_model():
    for name in ("llm", "slm"):
        with pytest.raises(ValueError, match=f"`{name}_kwargs` are for loading the {name.upper()} by name"):
            LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
                build_llm(), build_slm(), **{f"{name}_kwargs": {"dtype": torch.float32}}
            )


def test_an_slm_that_writes_nothing():
    encoder = AutoModel.from_config(LLM_KINDS["bert"](SLM_HIDDEN, SLM_VOCAB))
    with pytest.raises(ValueError, match=r"`slm` must be .*got BertModel"):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(build_llm(), encoder)


def test_an_llm_that_has_no_place():
    model = build_model()
    with pytest.raises(ValueError, match="configuration names no LLM: pass `llm_name_or_path`"):
        model.load_llm()


@pytest.mark.parametrize("slm", ["t5", "llama"])
@pytest.mark.parametrize("same_tokenizer", [True, False])
def test_a_checkpoint_as_assistant_of_a_decoder_only_llm(slm, same_tokenizer):
    drafter = build_model("llama", slm)
    target, kwargs = build_slm("llama"), {}
    if not same_tokenizer:
        target, kwargs = (
            build_llm(),
            {"tokenizer": build_llm_tokenizer(), "assistant_tokenizer": build_slm_tokenizer()},
        )
    with pytest.raises(ValueError, match="cannot be passed directly as `assistant_model`.*draft nonsense"):
        target.generate(PROMPT["input_ids"][1:2], assistant_model=drafter, max_new_tokens=5, do_sample=False, **kwargs)


def test_the_folder_of_an_llm_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="nothing_here"):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(tmp_path / "nothing_here", build_slm())


def test_a_folder_with_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"has several GGUF files, \['a.gguf', 'b.gguf'\]: say which with"):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(tmp_path, build_slm())


def test_sub_configurations_are_copied():
    llm_config, slm_config = llama(LLM_HIDDEN, LLM_VOCAB), t5(SLM_HIDDEN, SLM_VOCAB)
    config = LLM2SLMConfig.from_sub_configs(llm_config, slm_config)
    config.llm_config.vocab_size = config.slm_config.vocab_size = 7
    assert (llm_config.vocab_size, slm_config.vocab_size) == (LLM_VOCAB, SLM_VOCAB)
