"""PEFT's methods adapt the SLM, however they name its layers: never the frozen LLM, and tied weights stay tied."""

import warnings

import peft
import pytest
import torch
from conftest import SLM_KINDS, build_labels, build_model, build_prompts, padded
from packaging import version
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from llm2slm import LLM2SLMForConditionalGeneration

PROMPT, LABELS = padded(build_prompts()), build_labels()
LABELS[:, 0], LABELS[:, 1] = 5, 6
SLM_ATTENTION = r"slm\..*\.(q|v|q_proj|v_proj|c_attn)"
TIED = ["qwen2", "gpt2", "t5", "bart"]


def train(model, steps=2):
    """A few steps of what is to be trained; the gradients of the last."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**PROMPT, labels=LABELS).loss.backward()
        optimizer.step()
    return {name: parameter.grad for name, parameter in trained.items()}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**PROMPT, labels=LABELS).logits


# ----------------------------------------------------------------------------------------------- the LLM stays frozen
METHODS = {
    "names": LoraConfig(target_modules=["q_proj", "v_proj"]),
    "all-linear": LoraConfig(target_modules="all-linear"),
    "regex": LoraConfig(target_modules=r".*\.q_proj"),
    "layers_to_transform": LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]),
    "parameters": LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
    "modules_to_save": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "projector"]),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]}),
    "DoRA": LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": LoHaConfig(target_modules=["q_proj"]),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_matches_layers_of_both_models_adapts_the_slm_alone(method, tmp_path):
    model = build_model("llama", "llama")
    frozen = {name: (id(module), type(module)) for name, module in model.llm.named_modules()}
    with pytest.warns(UserWarning, match=r"The LLM is frozen: PEFT's layers were taken out .* 'llm\.[a-z]"):
        adapted = get_peft_model(model, METHODS[method])
    assert {name: (id(module), type(module)) for name, module in model.llm.named_modules()} == frozen
    gradients = train(adapted)
    assert gradients and all(grad is not None for grad in gradients.values())
    assert any(".slm." in name for name in gradients) and not any(".llm." in name for name in gradients)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama", "llama"), tmp_path)
    torch.testing.assert_close(logits(loaded), expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in merged.llm.parameters())


def test_an_adapter_added_later_adapts_the_slm_alone_when_it_is_trained():
    model = build_model("llama", "llama")
    adapted = get_peft_model(model, LoraConfig(target_modules=SLM_ATTENTION))
    names = [name for name, _ in model.llm.named_modules()]
    adapted.add_adapter("second", LoraConfig(target_modules=["q_proj", "down_proj"]))
    adapted.set_adapter("second")
    with pytest.warns(UserWarning, match="The LLM is frozen"):
        adapted.train()
    assert [name for name, _ in model.llm.named_modules()] == names
    gradients = train(adapted)
    assert gradients and all(".second." in name and grad is not None for name, grad in gradients.items())


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason="this Transformers' own `add_adapter` wants a newer PEFT",
)
def test_add_adapter_of_transformers_adapts_the_slm_alone():
    model = build_model("llama", "llama")
    with pytest.warns(UserWarning, match="The LLM is frozen"):
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    gradients = train(model)
    assert gradients and all(name.startswith("slm.") and grad is not None for name, grad in gradients.items())


def test_biases_of_the_llm_are_not_trained_either():
    model = build_model("gpt2", "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what names the SLM alone needs no warning
        adapted = get_peft_model(model, LoraConfig(target_modules=SLM_ATTENTION, bias="all", fan_in_fan_out=True))
    gradients = train(adapted)
    assert any(name.endswith(".bias") for name in gradients)
    assert not any(".llm." in name for name in gradients)


@pytest.mark.parametrize("targets", [r"llm\..*\.q_proj", ["q_proj"]])
def test_layers_of_the_llm_alone_are_refused(targets):
    model = build_model("llama", "gpt2")
    with (
        pytest.warns(UserWarning, match="The LLM is frozen"),
        pytest.raises(ValueError, match="`target_modules` match layers of it alone: choose the SLM's"),
    ):
        get_peft_model(model, LoraConfig(target_modules=targets))


def test_what_writes_into_the_prompt_is_refused():
    config = PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2, num_layers=2, num_attention_heads=4, token_dim=32
    )
    adapted = get_peft_model(build_model("llama", "llama"), config)
    with pytest.raises(TypeError, match="prompt tuning and prefix tuning.*adapt the SLM's layers instead"):
        adapted(**PROMPT, labels=LABELS)


# -------------------------------------------------------------------------------------------------------- tied weights
@pytest.mark.parametrize("slm", SLM_KINDS)
def test_the_configuration_says_whether_the_slm_is_tied(slm, tmp_path):
    model = build_model(slm=slm)
    tied = model.slm.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings == model.config.to_dict()["tie_word_embeddings"] == tied
    model.save_pretrained(tmp_path)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings == tied
    assert (loaded.slm.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    assert logits(loaded).equal(logits(model))
    model.config.tie_word_embeddings = False
    assert model.config.slm_config.tie_word_embeddings is False


@pytest.mark.parametrize("slm", TIED)
@pytest.mark.parametrize("method", [LoraConfig, TrainableTokensConfig])
def test_single_tokens_are_trained_in_embeddings_and_head(method, slm, tmp_path):
    if method is LoraConfig:
        config = LoraConfig(target_modules=SLM_ATTENTION, trainable_token_indices=[5, 6])
    else:
        config = TrainableTokensConfig(token_indices=[5, 6])
    model = build_model(slm=slm)
    before = model.slm.get_input_embeddings().weight.detach().clone()
    adapted = get_peft_model(model, config)
    gradients = train(adapted)
    assert any("trainable_tokens_delta" in name and grad.abs().max() > 0 for name, grad in gradients.items())
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build_model(slm=slm), tmp_path)), expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=1e-4)
    weight = merged.slm.get_input_embeddings().weight
    assert merged.get_output_embeddings().weight is weight
    assert (weight != before).any(dim=1).nonzero().flatten().tolist() == [5, 6]
    merged.save_pretrained(tmp_path / "merged")
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert logits(loaded).equal(logits(merged))


@pytest.mark.parametrize(("slm", "embeddings"), [("qwen2", "embed_tokens"), ("qwen2", "lm_head"), ("gpt2", "lm_head")])
def test_embeddings_trained_in_full_stay_tied(slm, embeddings):
    config = LoraConfig(target_modules=SLM_ATTENTION, modules_to_save=[embeddings], ensure_weight_tying=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "embed_tokens" is the LLM's too
        adapted = get_peft_model(build_model("bert", slm), config)
    train(adapted)
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert merged.slm.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings is True


def test_embeddings_that_training_unties_are_saved_apart(tmp_path):
    config = LoraConfig(target_modules=SLM_ATTENTION, modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="`tie_word_embeddings=True` and a tied layer is part of the adapter"):
        adapted = get_peft_model(build_model(slm="qwen2"), config)
    train(adapted)
    expected = logits(adapted)
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- gradient checkpointing
@pytest.mark.parametrize("slm", SLM_KINDS)
@pytest.mark.parametrize("projector", [None, ["projector"]], ids=["frozen projector", "trained projector"])
def test_reentrant_checkpointing_changes_no_gradient(slm, projector):
    gradients = {}
    for reentrant in (None, True):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=SLM_ATTENTION, init_lora_weights=False, modules_to_save=projector)
        model = get_peft_model(build_model(slm=slm), config).train()
        if reentrant:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        gradients[reentrant] = train(model, steps=1)
    assert all(grad is not None for grad in gradients[True].values())
    torch.testing.assert_close(gradients[True], gradients[None], atol=1e-5, rtol=1e-4)


def test_nothing_behind_a_frozen_prompt_needs_gradients_without_checkpointing():
    model = build_model(slm="t5").train()
    model.projector.requires_grad_(False)
    assert not model.encode_prompt(**PROMPT).prompt_embeds.requires_grad
    model.slm.requires_grad_(False)
    assert not model(**PROMPT, labels=LABELS).loss.requires_grad
