"""Models in 4 and 8 bits, with bitsandbytes on a CPU: what weights are stored in is not what is computed in."""

import pytest
import torch
from conftest import (
    LLM2SLMForConditionalGeneration,
    build_labels,
    build_llm,
    build_model,
    build_prompts,
    build_slm,
    padded,
)
from transformers import BitsAndBytesConfig

PROMPT = padded(build_prompts())
LABELS = build_labels()
BITS = (4, 8)


def config(bits, dtype=torch.float32, **kwargs):
    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=dtype, **kwargs)


def packed(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    """With AVX512-BF16, bitsandbytes packs 4-bit weights for a kernel that takes no layers as small as these."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def llm_folder(tmp_path):
    build_llm("llama").save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


@torch.no_grad()
def logits(model):
    return model(**PROMPT, labels=LABELS).logits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("slm", ["t5", "llama"])
@pytest.mark.parametrize("include_llm", [False, True])
def test_a_checkpoint_is_quantized_but_for_its_projector(bits, slm, include_llm, llm_folder, tmp_path):
    model = build_model(llm_folder, slm)
    model.save_pretrained(tmp_path / "pair", include_llm=include_llm)
    for skipped in (None, ["lm_head"]):
        loaded = LLM2SLMForConditionalGeneration.from_pretrained(
            tmp_path / "pair", quantization_config=config(bits, llm_int8_skip_modules=skipped)
        )
        parts = {name.split(".")[0] for name in packed(loaded)}
        assert parts == ({"llm", "slm"} if include_llm else {"slm"})
        encoding, expected = loaded.encode_prompt(**PROMPT)[0], model.encode_prompt(**PROMPT)[0]
        assert encoding.dtype == loaded.slm.dtype  # float16 in Transformers 4, if nothing is asked for
        mask = PROMPT["attention_mask"].bool()
        similarity = torch.cosine_similarity(encoding[mask].float(), expected[mask], dim=-1)
        assert similarity.mean() > 0.8 and (include_llm or similarity.min() > 0.9999)
        assert torch.cosine_similarity(logits(loaded).float(), logits(model), dim=-1).mean() > 0.6
        assert loaded.generate(**PROMPT, max_new_tokens=3).shape[0] == 3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_quantized_checkpoint_runs_in_half_precision(bits, dtype, llm_folder, tmp_path):
    build_model(llm_folder, "llama").save_pretrained(tmp_path / "pair", include_llm=True)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(
        tmp_path / "pair", dtype=dtype, quantization_config=config(bits, dtype)
    )
    assert loaded.encode_prompt(**PROMPT)[0].dtype == loaded.slm.dtype
    assert logits(loaded).isfinite().all()
    assert loaded.generate(**PROMPT, max_new_tokens=3).shape[0] == 3


@pytest.mark.parametrize("bits", BITS)
def test_a_projector_that_is_quantized_all_the_same_computes_in_its_own_precision(bits, llm_folder, tmp_path):
    model = build_model(llm_folder)
    states = model.encode_hidden_states(**PROMPT)
    expected = model.projector(states)
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    linear = model.projector.out
    new = {4: Linear4bit, 8: Linear8bitLt}[bits](linear.in_features, linear.out_features)
    if bits == 8:
        new = Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    new.load_state_dict(linear.state_dict())
    model.projector.out = new.to("cpu")
    assert packed(model)
    found = model.encode_prompt(prompt_hidden_states=states, attention_mask=PROMPT["attention_mask"])[0]
    mask = PROMPT["attention_mask"].bool()
    assert torch.cosine_similarity(found[mask], expected[mask], dim=-1).min() > 0.9


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_llm_and_the_plain_one_are_the_same_llm(bits, llm_folder, tmp_path):
    quantized = {"quantization_config": config(bits)}
    model = build_model(llm_folder, llm_kwargs=quantized)
    assert packed(model.llm)
    model.save_pretrained(tmp_path / "of quantized")
    build_model(llm_folder).save_pretrained(tmp_path / "of plain")
    for name in ("of quantized", "of plain"):
        for llm_kwargs in (quantized, None):
            loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / name, llm_kwargs=llm_kwargs)
            assert bool(packed(loaded)) == (llm_kwargs is not None)
            assert loaded.generate(**PROMPT, max_new_tokens=3).shape[0] == 3


def test_a_quantized_checkpoint_is_saved_and_loaded_quantized(llm_folder, tmp_path):
    build_model(llm_folder, "llama").save_pretrained(tmp_path / "pair")
    first = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "pair", quantization_config=config(4))
    first.save_pretrained(tmp_path / "in 4 bits")
    second = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "in 4 bits")
    assert packed(second) == packed(first)
    torch.testing.assert_close(logits(second), logits(first))


@pytest.mark.parametrize("part", ["slm", "llm"])
def test_parts_quantized_each_for_itself_are_not_saved(part, llm_folder, tmp_path):
    build_slm("llama").save_pretrained(tmp_path / "slm")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm_folder, tmp_path / "slm", **{f"{part}_kwargs": {"quantization_config": config(4)}}
    )
    with pytest.raises(ValueError, match=f"The {part} was quantized for itself.*Save the model unquantized"):
        model.save_pretrained(tmp_path / "pair", include_llm=True)
    assert not (tmp_path / "pair").exists()
