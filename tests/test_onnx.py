"""`llm2slm export --onnx`: what onnxruntime writes is what `generate` writes, and the folder is complete."""

import json

import pytest
import torch
import transformers
from conftest import EOS, build_model, build_prompts, response_tokens

from llm2slm.cli import main as cli
from llm2slm.sharing.onnx import PAGE, export_onnx

TOKENS = 24


@pytest.fixture(scope="module")
def load_writer():
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="needs pip install 'llm-to-slm[onnx]'")
    pytest.importorskip("transformers.exporters", reason=f"Transformers {transformers.__version__} does not export")
    from onnx_bits import load_writer

    return load_writer


@pytest.mark.parametrize("slm", ["llama", "qwen2", "gemma3"])
def test_greedy_tokens_equal_generate(slm, load_writer, tokenizer, tmp_path):
    model = build_model(slm=slm)
    folder = export_onnx(model, tokenizer, tmp_path / "onnx")
    write = load_writer(folder)
    for prompt in build_prompts((1, 5, 9)):  # the last two are longer than Gemma's window
        encoding = model.encode_prompt(prompt[None])
        expected = model.generate(**encoding, max_new_tokens=TOKENS, do_sample=False)[0]
        written = write(encoding.prompt_embeds[0].detach().numpy(), EOS, TOKENS)
        assert response_tokens(model, torch.tensor(written)) == response_tokens(model, expected)
        assert len(written) > 4


def test_a_folder_in_8_bits_is_complete(load_writer, tokenizer, tmp_path):
    import onnx
    import onnxruntime

    model = build_model(slm="llama")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "pair")
    tokenizer.save_pretrained(tmp_path / "pair")
    folder = tmp_path / "onnx"
    assert cli.main(["export", str(tmp_path / "pair"), "--onnx", str(folder), "--bits", "8"]) is None
    settings = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    page = {path.name for path in PAGE.iterdir()}
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "embed_tokens.onnx"} | settings | page
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["max_new_tokens"], generation["eos_token_id"]) == (7, EOS)
    graph = onnx.load(folder / "model.onnx").graph
    large = [weight for weight in graph.initializer if len(weight.dims) == 2 and min(weight.dims) > 1]
    assert len(large) == 15 and {weight.data_type for weight in large} == {onnx.TensorProto.INT8}
    (embeds,) = onnxruntime.InferenceSession(folder / "embed_tokens.onnx").run(None, {"input_ids": [[5, 9]]})
    expected = model.slm.get_input_embeddings()(torch.tensor([[5, 9]])).detach()
    torch.testing.assert_close(torch.tensor(embeds), expected, atol=float(expected.abs().max()) / 200, rtol=0)


def test_what_cannot_be_exported_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="can be exported to ONNX, and this one is t5"):
        export_onnx(build_model(slm="t5"), tokenizer, tmp_path / "onnx")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists; delete it or choose another"):
        export_onnx(build_model(slm="llama"), tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
