"""Models whose parameters accelerate keeps on disk: composed, loaded, run, moved and saved as any other."""

import pytest
import torch
from conftest import (
    TRANSFORMERS_4,
    LLM2SLMForConditionalGeneration,
    build_labels,
    build_llm,
    build_model,
    build_prompts,
    build_slm,
    padded,
)
from safetensors import safe_open

PROMPT = padded(build_prompts())
PARTS = ("llm", "projector", "slm")


def answer(model):
    return model.generate(**PROMPT, max_new_tokens=5, do_sample=False)


@pytest.fixture
def on_disk(tmp_path):
    return {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}


@pytest.fixture
def llm_folder(tmp_path, request):
    build_llm(getattr(request, "param", "llama")).save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def is_on_disk(part) -> bool:
    return {parameter.device.type for parameter in part.parameters()} == {"meta"}


# Transformers 4 does not find tied weights on disk again, and that is said.
TIED = ("t5", "bart") if TRANSFORMERS_4 else ()
REFUSED = r"ties '.*embed_tokens.weight' to other weights.*with weights on disk.*or use Transformers 5"
LLMS = [kind for kind in ("t5", "bert", "bart", "llama", "gemma3", "gpt2") if kind not in TIED]
SLMS = [kind for kind in ("t5", "llama") if kind not in TIED]


@pytest.mark.skipif(not TIED, reason="Transformers 5 finds them")
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_tied_weights_that_are_lost_on_disk_are_refused(kind, on_disk, tmp_path):
    build_llm(kind).save_pretrained(tmp_path / "llm")
    build_slm(kind).save_pretrained(tmp_path / "slm")
    with pytest.raises(ValueError, match=REFUSED):
        build_model(tmp_path / "llm", llm_kwargs=on_disk)
    with pytest.raises(ValueError, match=REFUSED):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(build_llm(), tmp_path / "slm", slm_kwargs=on_disk)
    build_model("llama", kind).save_pretrained(tmp_path / "pair")
    device_map = {"llm": "cpu", "projector": "cpu", "slm": "disk"}
    with pytest.raises(ValueError, match=REFUSED):
        LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "pair", device_map=device_map)


@pytest.mark.parametrize("llm_folder", LLMS, indirect=True)
@pytest.mark.parametrize("llm_layer", [-1, [0, 1]], ids=str)
def test_an_offloaded_llm_is_composed_and_gives_the_same_states(llm_folder, on_disk, llm_layer):
    fields = {"llm_layer": llm_layer, "fusion": "add"}  # "add" measures the LLM's embeddings too
    expected, model = build_model(llm_folder, **fields), build_model(llm_folder, llm_kwargs=on_disk, **fields)
    assert is_on_disk(model.llm)
    assert model.encode_hidden_states(**PROMPT).equal(expected.encode_hidden_states(**PROMPT))
    assert model.config.llm_fingerprint == expected.config.llm_fingerprint


def test_the_layers_above_those_read_are_not_run_when_offloaded(llm_folder, on_disk, count_calls):
    whole = build_llm("llama")
    model = build_model(llm_folder, llm_kwargs=on_disk, llm_layer=1)
    assert len(model.llm.layers) == 1 < len(whole.model.layers)
    norm = count_calls(model.llm.layers[0])
    model.encode_hidden_states(**PROMPT)
    assert len(norm) == 1
    assert model.llm.forward.args == (model.llm,)


@pytest.mark.parametrize("slm", SLMS)
def test_an_slm_passed_offloaded_is_composed(llm_folder, on_disk, slm, tmp_path):
    build_slm(slm).save_pretrained(tmp_path / "slm")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm_folder, tmp_path / "slm", slm_kwargs=on_disk)
    assert is_on_disk(model.slm) and not is_on_disk(model.projector)
    assert answer(model).shape[0] == 3


@pytest.mark.parametrize("slm", SLMS)
@pytest.mark.parametrize("offloaded", [("llm",), ("projector", "slm"), PARTS], ids=str)
@pytest.mark.parametrize("include_llm", [False, True])
def test_a_checkpoint_with_offloaded_parts_writes_the_same(llm_folder, tmp_path, slm, offloaded, include_llm):
    model = build_model(llm_folder, slm)
    model.save_pretrained(tmp_path / "pair", include_llm=include_llm)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(
        tmp_path / "pair",
        device_map={part: "disk" if part in offloaded else "cpu" for part in PARTS},
        offload_folder=str(tmp_path / "offload"),
    )
    assert {part for part in PARTS if is_on_disk(getattr(loaded, part))} == set(offloaded)
    assert answer(loaded).equal(answer(model))
    assert loaded.generate(**PROMPT, max_new_tokens=5, do_sample=False, fast=True).equal(answer(model))
    labels = build_labels()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**PROMPT, labels=labels).loss, model(**PROMPT, labels=labels).loss)


def test_an_offloaded_llm_of_other_weights_is_recognised(llm_folder, on_disk, tmp_path):
    build_model(llm_folder).save_pretrained(tmp_path / "pair")
    build_llm("llama", seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differs from the fingerprint"):
        LLM2SLMForConditionalGeneration.from_pretrained(
            tmp_path / "pair", llm_name_or_path=tmp_path / "other", llm_kwargs=on_disk
        )


def test_a_pair_with_an_offloaded_llm_is_moved_trained_and_saved(llm_folder, on_disk, tmp_path):
    model, expected = build_model(llm_folder, llm_kwargs=on_disk), build_model(llm_folder)
    model.to("cpu").train()
    model(**PROMPT, labels=build_labels()).loss.backward()
    assert is_on_disk(model.llm) and model.projector.out.weight.grad is not None
    model.eval()
    for include_llm in (False, True):
        folder = tmp_path / f"pair-{include_llm}"
        model.save_pretrained(folder, include_llm=include_llm)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert any(name.startswith("llm.") for name in file.keys()) == include_llm
        assert answer(LLM2SLMForConditionalGeneration.from_pretrained(folder)).equal(answer(expected))
    assert is_on_disk(model.llm)


@pytest.mark.parametrize("slm", SLMS)
def test_a_checkpoint_loaded_to_disk_is_saved_again(llm_folder, tmp_path, slm):
    model = build_model(llm_folder, slm)
    model.save_pretrained(tmp_path / "pair", include_llm=True)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(
        tmp_path / "pair", device_map=dict.fromkeys(PARTS, "disk"), offload_folder=str(tmp_path / "offload")
    )
    loaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert answer(LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "again")).equal(answer(model))
