"""Checkpoints: slim or whole, complete, checked against the LLM they were trained with, and adapters on top."""

import copy
import functools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    LLM_HIDDEN,
    LLM_KINDS,
    LLM_VOCAB,
    SLM_VOCAB,
    TRANSFORMERS_4,
    build_labels,
    build_llm,
    build_model,
    build_prompts,
    build_slm,
    jitter,
    padded,
)
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    FalconH1Config,
    Gemma2Config,
)

import llm2slm.checkpoint_llm2slm as checkpoint_module
from llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration

PROMPT = padded(build_prompts())
LABELS = build_labels()
CODE = {path.name for path in Path(checkpoint_module.__file__).parent.glob("*_llm2slm.py")}
SEVERAL_LLMS = ("t5", "t5gemma", "bert", "bart", "llama", "gemma3")


@pytest.fixture
def slim(llm_folder):
    """A model whose LLM has a place of its own."""
    return build_model(llm_folder, "llama")


@pytest.fixture
def checkpoint(slim, tmp_path):
    slim.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@torch.no_grad()
def logits(model):
    return model(**PROMPT, labels=LABELS).logits


def load(folder, **kwargs) -> LLM2SLMForConditionalGeneration:
    return LLM2SLMForConditionalGeneration.from_pretrained(folder, **kwargs)


def stored_names(folder) -> set[str]:
    names = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def names_in(*modules, model) -> set[str]:
    return {name for name in model.state_dict() if name.split(".")[0] in modules}


# ------------------------------------------------------------------------------------------------------- slim or whole
def test_a_slim_checkpoint_holds_projector_slm_and_code_but_nothing_of_the_llm(slim, checkpoint):
    files = {path.name for path in checkpoint.iterdir()} - {"README.md"}
    assert files == {"config.json", "generation_config.json", "model.safetensors"} | CODE
    assert stored_names(checkpoint) == names_in("projector", "slm", model=slim)
    assert logits(load(checkpoint)).equal(logits(slim))


def test_a_whole_checkpoint_needs_no_other_folder(slim, tmp_path, llm_folder):
    expected = logits(slim)
    slim.save_pretrained(tmp_path / "whole", include_llm=True)
    assert stored_names(tmp_path / "whole") == names_in("llm", "projector", "slm", model=slim)
    shutil.rmtree(llm_folder)
    loaded = load(tmp_path / "whole")
    assert logits(loaded).equal(expected)
    assert not any(parameter.requires_grad for parameter in loaded.llm.parameters())


@pytest.mark.parametrize("kind", SEVERAL_LLMS)
@pytest.mark.parametrize("layer", [-1, 1])
def test_each_kind_of_llm_is_found_again_by_name_and_inside_a_whole_checkpoint(kind, layer, tmp_path):
    build_llm(kind).save_pretrained(tmp_path / "llm")
    model = build_model(tmp_path / "llm", llm_layer=layer)
    assert logits(model).equal(logits(build_model(kind, llm_layer=layer)))  # a name or an object: the same model
    model.save_pretrained(tmp_path / "slim")
    assert not any(name.startswith("llm.") for name in stored_names(tmp_path / "slim"))
    assert logits(load(tmp_path / "slim")).equal(logits(model))
    model.save_pretrained(tmp_path / "whole", include_llm=True)
    assert logits(load(tmp_path / "whole")).equal(logits(model))


def test_one_model_can_be_saved_whole_then_slim_then_whole_again(slim, tmp_path):
    for name, include in (("a", True), ("b", None), ("c", True), ("d", False)):
        slim.save_pretrained(tmp_path / name, include_llm=include)
        assert any(key.startswith("llm.") for key in stored_names(tmp_path / name)) == bool(include)
        assert json.loads((tmp_path / name / "config.json").read_text())["include_llm"] == bool(include)


def test_a_whole_checkpoint_loaded_and_saved_stays_whole(slim, tmp_path):
    slim.save_pretrained(tmp_path / "first", include_llm=True)
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert stored_names(tmp_path / "second") == stored_names(tmp_path / "first")


def test_an_llm_passed_as_an_object_is_saved_unless_it_is_given_a_place(tmp_path, llm_folder):
    model = build_model("llama", "llama")
    model.save_pretrained(tmp_path / "whole")
    assert any(name.startswith("llm.") for name in stored_names(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"slim checkpoint names its LLM.*`config.llm_name_or_path` is None"):
        model.save_pretrained(tmp_path / "slim", include_llm=False)
    assert not (tmp_path / "slim").exists()
    model.config.llm_name_or_path = str(llm_folder)
    model.save_pretrained(tmp_path / "slim")
    assert logits(load(tmp_path / "slim")).equal(logits(model))


def test_an_llm_that_is_not_to_be_included_is_never_uploaded(tmp_path):
    model = build_model("llama", "t5")  # of objects: it has no place where the LLM could be loaded from
    for save in (model.push_to_hub, model.save_pretrained):
        with pytest.raises(ValueError, match="A slim checkpoint names its LLM"):
            save(str(tmp_path / "pair"), include_llm=False)
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize("how", ["full state dict", "shards", "after training mode", "after load_llm"])
def test_a_slim_checkpoint_never_holds_the_llm(slim, tmp_path, how):
    kwargs = {}
    if how == "full state dict":
        kwargs["state_dict"] = slim.state_dict()
    elif how == "shards":
        kwargs["max_shard_size"] = "10KB"
    elif how == "after training mode":
        slim.train().requires_grad_(True)
    else:
        slim.load_llm()
    expected = logits(slim)
    slim.save_pretrained(tmp_path / "slim", **kwargs)
    assert stored_names(tmp_path / "slim") == names_in("projector", "slm", model=slim)
    if how == "shards":
        index = json.loads((tmp_path / "slim" / "model.safetensors.index.json").read_text())
        assert not any(name.startswith("llm.") for name in index["weight_map"])
    assert logits(load(tmp_path / "slim")).equal(expected)


def test_saving_again_what_was_loaded_gives_the_same_weights_and_config(checkpoint, tmp_path):
    load(checkpoint).save_pretrained(tmp_path / "again")
    first, second = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "again")]
    for config in configs:
        config["slm_config"].pop("dtype", None)  # a model that was never loaded does not say it
    assert configs[0] == configs[1]


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSeq2SeqLM])
def test_auto_classes_load_the_checkpoint(auto_class, checkpoint, slim):
    loaded = auto_class.from_pretrained(checkpoint)
    assert type(loaded) is LLM2SLMForConditionalGeneration
    assert type(AutoConfig.from_pretrained(checkpoint)) is LLM2SLMConfig
    assert logits(loaded).equal(logits(slim))


# ------------------------------------------------------------------------------------------------------ the right LLM?
def test_the_llm_may_be_elsewhere_on_this_machine(checkpoint, llm_folder, slim, tmp_path):
    llm_folder.rename(tmp_path / "moved")
    with pytest.raises(OSError, match=r"(?s)frozen LLM could not be loaded from .*llm_name_or_path"):
        load(checkpoint)
    loaded = load(checkpoint, llm_name_or_path=tmp_path / "moved")
    assert logits(loaded).equal(logits(slim))
    assert loaded.config.llm_name_or_path == str(llm_folder)  # what is saved again is not about this machine


def test_alternatives_of_the_llm_are_tried_in_order_until_one_is_the_right_llm(checkpoint, llm_folder, slim, tmp_path):
    llm_folder.rename(tmp_path / "moved")
    build_llm("llama", seed=9).save_pretrained(tmp_path / "other")
    places = [{"llm_name_or_path": str(tmp_path / name)} for name in ("missing", "other", "moved")]
    config = LLM2SLMConfig.from_pretrained(checkpoint)
    for chosen in (places[:2], places):
        config.llm_alternatives = chosen
        config.save_pretrained(checkpoint)
        if len(chosen) < 3:
            with pytest.raises(OSError, match=r"(?s)none of its 3 places:.*missing.*other.*differs from the finger"):
                load(checkpoint)
    loaded = load(checkpoint)
    assert logits(loaded).equal(logits(slim))
    assert loaded.config.llm_alternatives == places  # and saved again as they were
    with pytest.raises(OSError, match="could not be loaded from .*missing"):  # a place that is said is the only one
        load(checkpoint, llm_name_or_path=tmp_path / "missing")


@pytest.mark.parametrize("place", ["user/llm", {"llm_revision": "main"}, {"llm_name_or_path": "llm", "revision": "a"}])
def test_an_alternative_that_names_no_place_is_refused(place):
    with pytest.raises(ValueError, match="`llm_alternatives` must be dictionaries with `llm_name_or_path`"):
        LLM2SLMConfig(llm_alternatives=[place])


def test_an_llm_of_the_same_shape_with_other_weights_is_refused(checkpoint, tmp_path):
    build_llm("llama", seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"LLM at '.*other' is not the one.*parameter '.*' differs.*llm_name_or_path"):
        load(checkpoint, llm_name_or_path=tmp_path / "other")


def test_an_llm_fine_tuned_a_little_is_refused(checkpoint, llm_folder, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(llm_folder)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.mul_(1.05)
    llm.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="differs from the fingerprint"):
        load(checkpoint, llm_name_or_path=tmp_path / "tuned")
    untested = load(checkpoint, load_llm=False)
    assert untested.load_llm(tmp_path / "tuned", check=False).llm is not None


@pytest.mark.parametrize(
    ("kind", "hidden", "vocab", "found"),
    [
        ("gpt2", LLM_HIDDEN, LLM_VOCAB, "its model_type is 'gpt2', not 'llama'"),
        ("llama", 40, LLM_VOCAB, "its hidden_size is 40, not 24"),
        ("llama", LLM_HIDDEN, 77, "its vocab_size is 77, not 60"),
    ],
)
def test_an_llm_of_another_shape_is_refused(kind, hidden, vocab, found, checkpoint, tmp_path):
    AutoModelForCausalLM.from_config(LLM_KINDS[kind](hidden, vocab)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"'.*other' is not the one this checkpoint was trained with: {found}"):
        load(checkpoint, llm_name_or_path=tmp_path / "other")


def test_an_llm_whose_weights_are_cut_off_is_refused(checkpoint, llm_folder):
    path = llm_folder / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"LLM's weights in .*lack layers.0.mlp.up_proj.weight"):
        load(checkpoint)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS_AND_DTYPES = [  # each pair of the three
    (kind, stored, DTYPES[(i + j) % 3]) for i, kind in enumerate(SEVERAL_LLMS) for j, stored in enumerate(DTYPES)
]


@pytest.mark.parametrize(("kind", "stored", "dtype"), KINDS_AND_DTYPES, ids=str)
def test_the_llm_is_recognised_whatever_dtype_it_is_stored_and_loaded_in(kind, stored, dtype, tmp_path):
    build_llm(kind).to(stored).save_pretrained(tmp_path / "llm")
    model = build_model(tmp_path / "llm", "llama", llm_kwargs={"dtype": torch.float32})
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = load(tmp_path / "checkpoint", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.slm.parameters()} == {dtype}
    # T5 keeps some of its layers in float32 when it is loaded in float16.
    assert dtype in {parameter.dtype for parameter in loaded.llm.parameters()} <= {dtype, torch.float32}


def test_a_model_made_from_a_half_precision_llm_recognises_the_full_one(llm_folder, tmp_path):
    model = build_model(llm_folder, "llama", llm_kwargs={"dtype": torch.bfloat16})
    assert model.llm.dtype == torch.bfloat16 and model.slm.dtype == torch.float32
    model.save_pretrained(tmp_path / "checkpoint")
    assert load(tmp_path / "checkpoint", llm_kwargs={"dtype": torch.float32}).llm.dtype == torch.float32


# ---------------------------------------------------------------------------------------- what the LLM's load is given
@pytest.fixture
def llm_loads(monkeypatch):
    """The arguments of each load of an LLM from now on."""
    calls, original = [], checkpoint_module.load_llm

    def spy(name, gguf_file, **kwargs):
        calls.append({"name": str(name), **kwargs})
        return original(name, gguf_file, **kwargs)

    monkeypatch.setattr(checkpoint_module, "load_llm", spy)
    return calls


def test_the_checkpoints_own_revision_subfolder_and_trust_are_not_the_llms(slim, tmp_path, llm_folder, llm_loads):
    slim.config.llm_revision = "0123abc"
    slim.save_pretrained(tmp_path / "repository" / "best")
    load(tmp_path / "repository", subfolder="best", revision="v1.0", trust_remote_code=True)
    (call,) = llm_loads
    assert call["name"] == str(llm_folder)
    assert call["revision"] == "0123abc"
    assert not {"subfolder", "trust_remote_code"} & call.keys()


def test_an_llm_in_another_place_has_no_pinned_revision(slim, tmp_path, llm_folder, llm_loads):
    slim.config.llm_revision = "0123abc"
    slim.save_pretrained(tmp_path / "checkpoint")
    load(tmp_path / "checkpoint", llm_name_or_path=llm_folder, revision="v1.0")
    assert llm_loads[0].get("revision") is None


def test_the_llms_own_arguments_reach_it_and_win(checkpoint, llm_loads):
    llm_kwargs = {"trust_remote_code": True, "revision": "main", "dtype": torch.bfloat16}
    model = load(checkpoint, dtype=torch.float32, llm_kwargs=llm_kwargs)
    assert {name: llm_loads[0][name] for name in llm_kwargs} == llm_kwargs
    assert model.llm.dtype == torch.bfloat16 and model.slm.dtype == model.projector.out.weight.dtype == torch.float32


def test_a_model_without_its_llm_works_on_cached_features_until_it_is_loaded(checkpoint, slim, tmp_path):
    model = load(checkpoint, load_llm=False)
    assert model.llm is None
    features = slim.encode_hidden_states(**PROMPT)
    with torch.no_grad():
        cached = model(attention_mask=PROMPT["attention_mask"], prompt_hidden_states=features, labels=LABELS).logits
    assert cached.equal(logits(slim))
    states = {"attention_mask": PROMPT["attention_mask"], "prompt_hidden_states": features}
    assert model.generate(**states, max_new_tokens=5).equal(slim.generate(**PROMPT, max_new_tokens=5))
    with pytest.raises(ValueError, match="LLM is not loaded"):
        model.generate(**PROMPT)
    model.train().requires_grad_(True)
    model.save_pretrained(tmp_path / "again")
    assert stored_names(tmp_path / "again") == stored_names(checkpoint)
    with pytest.raises(ValueError, match=r"`include_llm=True`, but the LLM is not loaded.*load_llm"):
        model.save_pretrained(tmp_path / "whole", include_llm=True)
    assert not (tmp_path / "whole").exists()
    assert logits(model.load_llm()).equal(logits(slim))


# -------------------------------------------------------------------------------------------- broken and foreign files
def test_missing_weights_are_reported(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_weights_that_are_cut_off_are_reported(checkpoint, part):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(OSError, match=r"weights in .*checkpoint.* are cut off or damaged"):
        load(checkpoint)


def test_weights_of_another_model_are_reported(checkpoint):
    build_slm("t5").save_pretrained(checkpoint.parent / "t5")
    shutil.copy(checkpoint.parent / "t5" / "model.safetensors", checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights in .*checkpoint.* are not this model's: they lack projector\."):
        load(checkpoint)


def test_weights_of_another_shape_are_reported(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["projector.out.weight"] = torch.zeros(3, 3)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"are not this model's: they have other shapes for projector\.out\.weight"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["projector.out.bias", "slm.model.norm.weight"])
def test_a_single_missing_weight_is_reported(checkpoint, name):
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop(name)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lack {name}"):
        load(checkpoint)


def test_pickled_weights_are_neither_written_nor_read(checkpoint, slim, tmp_path):
    with pytest.raises(ValueError, match=r"safetensors only.*safe_serialization=False"):
        slim.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled").exists()
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    for kwargs in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load(checkpoint, **kwargs)


def test_weights_of_the_llm_that_are_cut_off_are_reported(checkpoint, llm_folder):
    path = llm_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"The LLM's weights in .*llm.* are cut off or damaged"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("{", "is not an index of weights"),
        ({"weights": {}}, "is not an index of weights"),
        (
            {"weight_map": {"slm.lm_head.weight": "../llm/model.safetensors"}},
            "names a file outside its folder: '../llm",
        ),
        ({"weight_map": {"slm.lm_head.weight": "/model.safetensors"}}, "names a file outside its folder: '/model"),
        ({"weight_map": {"slm.lm_head.weight": "a.safetensors"}}, "names 'a.safetensors', which is missing"),
    ],
    ids=str,
)
@pytest.mark.parametrize("of_llm", [False, True])
def test_an_index_that_leads_nowhere_is_reported(checkpoint, llm_folder, shards, message, of_llm):
    folder = llm_folder if of_llm else checkpoint
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(shards if shards == "{" else json.dumps(shards))
    with pytest.raises(OSError, match=rf"(?s){folder.name}/model.safetensors.index.json' {message}"):
        load(checkpoint)


def test_the_folder_of_another_model_is_reported(llm_folder):
    with pytest.raises(ValueError, match="configuration of a 'llama' model, not of an LLM-to-SLM pair"):
        load(llm_folder)


# ------------------------------------------------------------------------------------------ saved over an earlier save
FORMS = {
    "slim": {},
    "whole": {"include_llm": True},
    "slim in shards": {"max_shard_size": "20KB"},
    "whole in shards": {"include_llm": True, "max_shard_size": "20KB"},
    "variant": {"variant": "other"},
}


@pytest.mark.parametrize("first", ["slim", "whole", "slim in shards", "whole in shards"])
@pytest.mark.parametrize("second", FORMS)
def test_a_folder_holds_the_last_save_alone(slim, tmp_path, first, second):
    folder = tmp_path / "pair"
    slim.save_pretrained(folder, **FORMS[first])
    (folder / "notes.txt").write_text("the user's")
    jitter(slim.slm)
    slim.save_pretrained(folder, **FORMS[second])
    assert logits(load(folder, variant=FORMS[second].get("variant"))).equal(logits(slim))
    if second == "variant":  # beside the weights without one
        return
    parts = ("llm", "projector", "slm") if "whole" in second else ("projector", "slm")
    assert stored_names(folder) == names_in(*parts, model=slim)
    assert (folder / "model.safetensors").exists() != ("shards" in second)
    assert (folder / "model.safetensors.index.json").exists() == ("shards" in second)
    assert (folder / "notes.txt").exists()
    assert not list(folder.glob(".*"))


def test_the_adapter_of_an_earlier_training_does_not_come_on_top(llm_folder, tmp_path):
    model = build_model(llm_folder)
    adapted = with_lora(copy.deepcopy(model))
    adapted.save_pretrained(tmp_path / "pair")
    assert (tmp_path / "pair" / "adapter_config.json").exists()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "pair")
    assert not list((tmp_path / "pair").glob("adapter*"))
    assert logits(load(tmp_path / "pair")).equal(logits(merged))


@pytest.mark.parametrize("first", ["slim", "slim in shards"])
@pytest.mark.parametrize("second", ["slim", "slim in shards"])
def test_a_save_that_is_interrupted_never_leaves_a_mixture(slim, tmp_path, first, second, monkeypatch):
    old = logits(slim)
    slim.save_pretrained(tmp_path / "old", **FORMS[first])
    jitter(slim.slm)
    new, moves, original = logits(slim), 0, os.replace

    def interrupted_move(source, target):
        nonlocal moves
        moves -= 1
        if moves < 0:
            raise KeyboardInterrupt
        original(source, target)

    for count in range(1000):
        folder = tmp_path / f"pair-{count}"
        shutil.copytree(tmp_path / "old", folder)
        moves = count
        monkeypatch.setattr(checkpoint_module.os, "replace", interrupted_move)
        try:
            slim.save_pretrained(folder, **FORMS[second])
            break
        except KeyboardInterrupt:
            monkeypatch.undo()
            with pytest.raises(OSError, match="no file named"):
                load(folder)
            slim.save_pretrained(folder, **FORMS[second])  # and the next save is as any other
            assert logits(load(folder)).equal(new)
    assert count > 3
    # One that is interrupted while it writes leaves the old model.
    shutil.copytree(tmp_path / "old", tmp_path / "pair")
    monkeypatch.setattr(type(slim.config), "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        slim.save_pretrained(tmp_path / "pair", **FORMS[second])
    assert logits(load(tmp_path / "pair")).equal(old)


def test_a_folder_with_the_weights_of_two_saves_is_refused(slim, tmp_path):
    for name, size in (("pair", "1GB"), ("shards", "20KB")):
        slim.save_pretrained(tmp_path / name, max_shard_size=size)
    for path in (tmp_path / "shards").glob("model*"):
        path.rename(tmp_path / "pair" / path.name)
    with pytest.raises(ValueError, match=r"weights of two saves, model.safetensors and model.safetensors.index.json"):
        load(tmp_path / "pair")


def test_a_file_is_no_folder_to_save_to(slim, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`save_directory` must be a folder, but '.*file' is a file"):
        slim.save_pretrained(tmp_path / "file")


def test_what_is_saved_by_another_than_the_main_process_is_the_main_processes(slim, tmp_path):
    slim.save_pretrained(tmp_path / "pair", is_main_process=False)
    assert not list((tmp_path / "pair").iterdir())


# ------------------------------------------------------------------------------------------------------- many at once
def test_checkpoints_load_in_many_threads_at_once_each_right_or_with_its_own_reason(slim, checkpoint, tmp_path):
    build_llm("llama", seed=9).save_pretrained(tmp_path / "other")
    other = build_model("llama", "t5")
    other.save_pretrained(tmp_path / "whole")
    expected = {checkpoint: logits(slim), tmp_path / "whole": logits(other)}
    verbosity, dtype = transformers.logging.get_verbosity(), torch.get_default_dtype()

    def work(number):
        if number % 4 == 3:
            with pytest.raises(ValueError, match="differs from the fingerprint"):
                load(checkpoint, llm_name_or_path=tmp_path / "other")
            return True
        folder, dtype = list(expected)[number % 2], torch.bfloat16 if number % 4 == 2 else torch.float32
        loaded = AutoModel.from_pretrained(folder, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        return dtype == torch.bfloat16 or logits(loaded).equal(expected[folder])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(24)))
    assert (transformers.logging.get_verbosity(), torch.get_default_dtype()) == (verbosity, dtype)


# ------------------------------------------------------------------------------------------- what a pair's LLM saves
@pytest.mark.parametrize("kind", [kind for kind in LLM_KINDS if kind != "t5gemma"])
def test_what_a_pairs_llm_saves_is_an_llm(kind, tmp_path):
    model = build_model(kind)
    model.llm.save_pretrained(tmp_path / "llm")
    again = build_model(tmp_path / "llm")
    again.save_pretrained(tmp_path / "pair")
    for other in (again, load(tmp_path / "pair")):
        assert other.encode_hidden_states(**PROMPT).equal(model.encode_hidden_states(**PROMPT))


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_an_llm_saved_without_its_highest_layers_is_refused(kind, tmp_path):
    build_model(kind, llm_layer=1).llm.save_pretrained(tmp_path / "llm")
    message = "have the first 1 of its 2 layers only: they are a pair's.*Save the LLM that the pair was made of"
    if kind == "t5gemma":
        message = "is the encoder of a T5Gemma alone.*Save the whole T5Gemma"
    with pytest.raises(ValueError, match=message):
        build_model(tmp_path / "llm")


# ------------------------------------------------------------------------------------ dtype, devices, attention, vocab
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype_reaches_each_part_and_the_model_runs_in_it(checkpoint, dtype):
    model = load(checkpoint, dtype=dtype)
    assert {model.llm.dtype, model.slm.dtype, model.projector.out.weight.dtype} == {dtype}
    assert logits(model).dtype == dtype
    assert model.generate(**PROMPT, max_new_tokens=3).shape[0] == 3


def test_the_dtypes_name_before_it_was_called_dtype_still_works(checkpoint):
    model = load(checkpoint, torch_dtype=torch.bfloat16)
    assert {model.llm.dtype, model.slm.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    "device_map", [{"": "cpu"}, {"llm": "cpu", "projector": "cpu", "slm": "cpu"}, "cpu", "auto"], ids=str
)
@pytest.mark.parametrize("include_llm", [False, True])
def test_device_maps_place_each_part(slim, tmp_path, device_map, include_llm):
    slim.save_pretrained(tmp_path / "checkpoint", include_llm=include_llm)
    model = load(tmp_path / "checkpoint", device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert logits(model).equal(logits(slim))
    assert model.generate(**PROMPT, max_new_tokens=4).equal(slim.generate(**PROMPT, max_new_tokens=4))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("include_llm", [False, True])
def test_the_attention_implementation_reaches_both_models(slim, tmp_path, attention, include_llm):
    slim.save_pretrained(tmp_path / "checkpoint", include_llm=include_llm)
    model = load(tmp_path / "checkpoint", attn_implementation=attention)
    assert model.llm.config._attn_implementation == attention
    assert model.slm.config._attn_implementation == attention
    torch.testing.assert_close(logits(model), logits(slim), atol=1e-4, rtol=1e-4)


def test_a_resized_vocabulary_is_the_slms_and_is_saved(slim, tmp_path):
    before, llm_rows = logits(slim), slim.llm.get_input_embeddings().num_embeddings
    slim.resize_token_embeddings(SLM_VOCAB + 6, mean_resizing=False)
    assert slim.llm.get_input_embeddings().num_embeddings == llm_rows
    assert slim.config.vocab_size == slim.slm.config.vocab_size == SLM_VOCAB + 6
    assert logits(slim).shape[-1] == SLM_VOCAB + 6
    assert logits(slim)[..., :SLM_VOCAB].equal(before)
    slim.save_pretrained(tmp_path / "resized")
    loaded = load(tmp_path / "resized")
    assert loaded.config.vocab_size == SLM_VOCAB + 6
    assert logits(loaded).equal(logits(slim))
    new = torch.full((1, 2), SLM_VOCAB + 5)
    assert loaded(input_ids=PROMPT["input_ids"][1:2], labels=new).loss.isfinite()


@pytest.mark.parametrize("slm", ["t5", "bart", "llama"])
def test_what_changes_the_slm_is_said_of_the_pair_and_saved(slm, llm_folder, tmp_path):
    model = build_model(llm_folder, slm)
    for pair in (model, load_again(model, tmp_path / "first")):
        pair.slm.resize_token_embeddings(SLM_VOCAB + 6, mean_resizing=False)
        pair.slm.config.eos_token_id = SLM_VOCAB + 1
        pair.config.pad_token_id = SLM_VOCAB + 2
        for config in (pair.config, load_again(pair, tmp_path / "second").config):
            for part in (config, config.slm_config):
                assert part.vocab_size == SLM_VOCAB + 6
                assert (part.eos_token_id, part.pad_token_id) == (SLM_VOCAB + 1, SLM_VOCAB + 2)
        assert logits(load_again(pair, tmp_path / "third")).equal(logits(pair))


def load_again(model, folder):
    model.save_pretrained(folder)
    return load(folder)


def test_vocabularies_resized_behind_the_pairs_back_are_not_saved(llm_folder, tmp_path):
    model = build_model(llm_folder)
    model.llm.resize_token_embeddings(LLM_VOCAB + 5, mean_resizing=False)
    with pytest.raises(ValueError, match="LLM's vocabulary was resized from 60 to 65 tokens.*Resize it first"):
        model.save_pretrained(tmp_path / "pair", include_llm=True)
    shared = build_model(llm_folder, fusion="add", shared_tokenizer=True)
    shared.slm.resize_token_embeddings(LLM_VOCAB - 1, mean_resizing=False)
    with pytest.raises(ValueError, match="SLM's vocabulary was resized to 59 tokens.*shared with the LLM"):
        shared.save_pretrained(tmp_path / "pair")
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}])
def test_positions_are_turned_alike_whichever_version_wrote_the_checkpoint(scaling):
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 9}
    newer = {"model_type": "llama", **fields, "rope_parameters": {"rope_theta": 1e5, **scaling}}
    older = {"model_type": "llama", **fields, "rope_theta": 1e5}
    older |= {"rope_scaling": None if scaling["rope_type"] == "default" else scaling}
    expected = 1e5 ** (-torch.arange(0, 16, 2) / 16) / scaling.get("factor", 1.0)
    for part in (newer, older):
        config = LLM2SLMConfig(llm_config=part, slm_config=part)
        config = LLM2SLMConfig(**config.to_dict())
        for sub_config in (config.llm_config, config.slm_config):
            found = AutoModelForCausalLM.from_config(sub_config).model.rotary_emb.inv_freq
            torch.testing.assert_close(found, expected)


def test_models_that_either_version_saved_are_composed_with_their_own_positions(tmp_path):
    build_llm("llama").save_pretrained(tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    expected, labels = {}, LABELS.clamp(max=LLM_VOCAB - 1)
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 3e3}}
    for name, fields in (("older", {"rope_theta": 3e3}), ("newer", newer)):
        shutil.copytree(tmp_path / "llm", tmp_path / name)
        others = {key: value for key, value in config.items() if not key.startswith("rope_")}
        (tmp_path / name / "config.json").write_text(json.dumps(others | fields))
        torch.manual_seed(0)  # of the projector
        model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(tmp_path / name, tmp_path / name)
        expected[name] = (model.encode_hidden_states(**PROMPT), model(**PROMPT, labels=labels).loss)
        model.save_pretrained(tmp_path / f"pair-{name}")
        torch.testing.assert_close(load(tmp_path / f"pair-{name}").encode_hidden_states(**PROMPT), expected[name][0])
    torch.testing.assert_close(*expected.values())


# Of tiny models of further kinds.
SMALL = {"vocab_size": SLM_VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def test_a_gemma_slm_is_read_by_the_version_that_saved_it(tmp_path):
    config = Gemma2Config(**SMALL, head_dim=16)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        build_llm(), AutoModelForCausalLM.from_config(config)
    )
    model.save_pretrained(tmp_path / "pair", include_llm=True)
    load(tmp_path / "pair")
    fields = json.loads((tmp_path / "pair" / "config.json").read_text())
    fields["transformers_version"] = "5.0.0" if TRANSFORMERS_4 else "4.57.1"
    (tmp_path / "pair" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="a gemma2 reads projected states at another scale.*load it with"):
        load(tmp_path / "pair")


def test_an_slm_that_does_more_with_its_tokens_than_look_them_up_is_refused():
    config = FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8)
    for multiplier in (1.0, 5.0):
        config.embedding_multiplier = multiplier
        slm = AutoModelForCausalLM.from_config(config)
        compose = functools.partial(LLM2SLMForConditionalGeneration.from_llm_slm_pretrained, build_llm(), slm)
        if multiplier == 1:
            assert not compose().slm.training
        else:
            with pytest.raises(ValueError, match=r"The SLM \(falcon_h1\) does more with its tokens than look up"):
                compose()


def test_a_place_of_the_llm_where_none_is_loaded_is_refused(tmp_path):
    build_model().save_pretrained(tmp_path / "whole", include_llm=True)
    with pytest.raises(ValueError, match="contains its LLM.*llm_name_or_path='nowhere'.*leave that out"):
        load(tmp_path / "whole", llm_name_or_path="nowhere")
    with pytest.raises(ValueError, match="`load_llm=False` not to load it"):
        load(tmp_path / "whole", llm_name_or_path="nowhere", load_llm=False)


def test_gemma_3s_two_ways_of_turning_positions_are_read_too():
    turns = {"sliding_attention": {"rope_type": "default", "rope_theta": 2e3}}
    turns["full_attention"] = {"rope_type": "linear", "rope_theta": 3e5, "factor": 8.0}
    config = LLM2SLMConfig(slm_config={"model_type": "gemma3_text", "rope_parameters": turns}).slm_config
    if hasattr(config, "rope_theta"):  # Transformers 4
        assert (config.rope_theta, config.rope_local_base_freq) == (3e5, 2e3)
        assert config.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    else:
        assert config.rope_parameters == turns


# ------------------------------------------------------------------------------------------ outputs, frozen LLM, modes
@pytest.mark.parametrize("slm", ["t5", "bart", "llama", "gpt2", "gemma3"])
def test_hidden_states_and_attentions_are_those_of_the_response(slm):
    model = build_model(slm=slm)
    model.slm.set_attn_implementation("eager")
    output = model(**PROMPT, labels=LABELS, output_hidden_states=True, output_attentions=True)
    assert output.logits.shape == (*LABELS.shape, SLM_VOCAB)
    assert len(output.decoder_hidden_states) == 3 and len(output.decoder_attentions) == 2
    assert {state.shape for state in output.decoder_hidden_states} == {(3, 6, model.config.slm_hidden_size)}
    for weights in output.decoder_attentions:
        assert weights.shape[:3] == (3, 4, 6)  # batch, heads, response
    plain = model(**PROMPT, labels=LABELS)
    assert plain.decoder_hidden_states is None and plain.decoder_attentions is None
    torch.testing.assert_close(plain.logits, output.logits)


@pytest.mark.parametrize("slm", ["t5", "bart", "llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_and_attentions_of_the_prompt_are_where_its_tokens_are(slm, side):
    model = build_model(slm=slm)
    model.slm.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    # Padding at both ends of every row, and more of it in some.
    prompt = {name: torch.nn.functional.pad(tensor, (2, 1)) for name, tensor in padded(build_prompts(), side).items()}
    output = model(**prompt, labels=LABELS[:, :4], **wanted)
    over_prompt = "cross_attentions" if model.config.slm_config.is_encoder_decoder else "decoder_attentions"
    for row, tokens in enumerate(build_prompts()):
        single = model(input_ids=tokens[None], labels=LABELS[row : row + 1, :4], **wanted)
        at = prompt["attention_mask"][row] == 1
        states = torch.stack([output.encoder_last_hidden_state, *output.encoder_hidden_states])[:, row]
        expected = torch.stack([single.encoder_last_hidden_state, *single.encoder_hidden_states])[:, 0]
        torch.testing.assert_close(states[:, at], expected, atol=1e-4, rtol=1e-4)
        assert not torch.stack(output.encoder_hidden_states)[:, row, ~at].any()
        weights = torch.stack(output.encoder_attentions)[:, row]  # (num_layers, heads, prompt_length, prompt_length)
        expected = torch.stack(single.encoder_attentions)[:, 0]
        torch.testing.assert_close(weights[..., at, :][..., at], expected, atol=1e-4, rtol=1e-4)
        weights, expected = torch.stack(output[over_prompt])[:, row], torch.stack(single[over_prompt])[:, 0]
        keys = torch.cat([at, torch.ones(weights.shape[-1] - len(at), dtype=torch.bool)])
        torch.testing.assert_close(weights[..., keys], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slm", ["t5", "gpt2"])
def test_hidden_states_and_attentions_can_be_asked_for_in_the_configuration(slm):
    model = build_model(slm=slm)
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    output = model(**PROMPT, labels=LABELS)
    assert len(output.decoder_hidden_states) == len(output.encoder_hidden_states) == 3
    assert len(output.decoder_attentions) == len(output.encoder_attentions) == 2
    assert model(**PROMPT, labels=LABELS, output_hidden_states=False).decoder_hidden_states is None


@pytest.mark.parametrize("slm", ["gpt2", "bart", "llama"])
def test_attentions_that_the_slm_cannot_give_are_left_out(slm):
    model = build_model(slm=slm)
    model.set_attn_implementation("sdpa")
    output = model(**PROMPT, labels=LABELS, output_attentions=True)  # some give a `None` for each layer
    assert set(output.decoder_attentions or [None]) == set(output.encoder_attentions or [None]) == {None}


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_the_configuration_of_the_slm_is_one_object(slm):
    model = build_model(slm=slm)
    assert model.config.slm_config is model.slm.config
    model.config.vocab_size = 99
    assert model.slm.config.vocab_size == model.vocab_size == 99


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_without_return_dict_the_output_is_a_tuple(slm):
    model = build_model(slm=slm)
    expected = model(**PROMPT, labels=LABELS)
    output = model(**PROMPT, labels=LABELS, return_dict=False)
    assert isinstance(output, tuple)
    assert output[0].equal(expected.loss) and output[1].equal(expected.logits)
    assert model(**PROMPT, decoder_input_ids=LABELS.clamp(min=0), return_dict=False)[0].shape == expected.logits.shape


def test_the_llm_stays_frozen_and_in_eval_mode_whatever_is_called(slim, checkpoint):
    slim.save_pretrained(checkpoint.parent / "whole", include_llm=True)
    for model in (slim, load(checkpoint), load(checkpoint.parent / "whole"), copy.deepcopy(slim)):
        for call in (
            lambda m: m,
            lambda m: m.train(),
            lambda m: m.requires_grad_(True),
            lambda m: m.eval().train(True),
            lambda m: m.load_llm(),
            lambda m: m.slm.train(),
        ):
            call(model)
            assert not any(parameter.requires_grad for parameter in model.llm.parameters())
            assert not any(module.training for module in model.llm.modules())
            assert all(parameter.requires_grad for parameter in model.slm.parameters())
        assert model.projector.training
        model.requires_grad_(False)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(slim):
    def gradients():
        slim.zero_grad()
        slim(**PROMPT, labels=LABELS).loss.backward()
        return {name: p.grad.clone() for name, p in slim.named_parameters() if p.grad is not None}

    slim.train()
    plain = gradients()
    slim.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert slim.is_gradient_checkpointing
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() == {n for n in plain if not n.startswith("llm.")} and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


# ------------------------------------------------------------------------------------------------------------ adapters
def with_lora(model) -> PeftModel:
    targets = r"slm\..*\.(q|v|q_proj|v_proj)"
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, target_modules=targets, modules_to_save=["projector"], init_lora_weights=False
    )
    torch.manual_seed(5)
    return get_peft_model(model, config)


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_lora_trains_the_slms_adapters_and_the_projector_alone(slm):
    adapted = with_lora(build_model(slm=slm)).train()
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name and ".slm." in name or ".projector.modules_to_save." in name for name in trainable)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        adapted(**PROMPT, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {name for name, p in adapted.named_parameters() if not p.equal(before[name])} == trainable
    assert not any(module.training for module in adapted.base_model.model.llm.modules())


def test_a_model_with_the_layers_of_an_adapter_in_it_is_not_saved_as_a_checkpoint(llm_folder, tmp_path):
    model = build_model(llm_folder)
    adapted = with_lora(model)
    with pytest.raises(ValueError, match=r"PEFT has put its layers in this model.*merge_and_unload\(\)"):
        model.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert logits(load(tmp_path / "merged")).equal(logits(model))


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_an_adapter_is_saved_loaded_merged_and_generates(slm, llm_folder, tmp_path):
    model = build_model(llm_folder, slm)
    model.save_pretrained(tmp_path / "base")
    base_logits = logits(model)
    adapted = with_lora(load(tmp_path / "base")).eval()
    with torch.no_grad():
        adapted.base_model.model.projector.out.bias.add_(1.0)  # a trained projector
    expected = logits(adapted)
    assert not torch.allclose(expected, base_logits, atol=1e-2)
    ids = adapted.generate(**PROMPT, max_new_tokens=5)

    adapted.save_pretrained(tmp_path / "adapter")
    assert not any(".llm." in name for name in stored_names(tmp_path / "adapter"))
    assert any(".projector." in name for name in stored_names(tmp_path / "adapter"))

    loaded = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    assert logits(loaded).equal(expected)
    assert loaded.generate(**PROMPT, max_new_tokens=5).equal(ids)

    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert stored_names(tmp_path / "merged") == stored_names(tmp_path / "base")
    assert logits(load(tmp_path / "merged")).equal(logits(merged))


def test_an_auto_peft_model_finds_checkpoint_and_llm(llm_folder, tmp_path):
    build_model(llm_folder).save_pretrained(tmp_path / "base")
    adapted = with_lora(load(tmp_path / "base")).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    assert isinstance(loaded.base_model.model, LLM2SLMForConditionalGeneration)
    assert logits(loaded).equal(logits(adapted))
    assert loaded.generate(**PROMPT, max_new_tokens=4).equal(adapted.generate(**PROMPT, max_new_tokens=4))
