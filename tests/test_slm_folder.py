"""`llm2slm export --slm`: the SLM by itself writes to encoded prompts what the pair writes to prompts."""

import json
import shutil

import pytest
import torch
from conftest import build_llm_tokenizer, build_model, build_prompts, build_slm_tokenizer, padded
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from llm2slm import LLM2SLMTokenizer
from llm2slm.cli import main as cli
from llm2slm.language_models import end_tokens


@pytest.mark.parametrize("kind, fusion", [("llama", "replace"), ("gemma3", "add"), ("t5", "replace")])
def test_an_exported_slm_writes_to_encoded_prompts_what_the_pair_does(kind, fusion, llm_folder, tmp_path, capsys):
    model = build_model(str(llm_folder), kind, fusion=fusion)
    model.generation_config.max_length = 7
    model.generation_config.num_beams = 2
    model.generation_config.eos_token_id = None  # so the SLM's own end is the export's
    model.save_pretrained(tmp_path / "pair")
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    tokenizer.save_pretrained(tmp_path / "pair")
    prompts = padded(build_prompts())
    shutil.rmtree(llm_folder)  # it is not needed

    argv = ["export", str(tmp_path / "pair"), "--slm", f"{tmp_path / 'slm'}/"]
    assert cli.main(argv) is None
    assert str(tmp_path / "slm") in capsys.readouterr().out
    auto_class = AutoModelForSeq2SeqLM if model.config.slm_config.is_encoder_decoder else AutoModelForCausalLM
    slm = auto_class.from_pretrained(tmp_path / "slm")
    assert slm.config.model_type == model.config.slm_config.model_type
    assert slm.generation_config.eos_token_id == end_tokens(model) != []
    with torch.no_grad():
        encoded = model.encode_prompt(**prompts)
    written = slm.generate(inputs_embeds=encoded.prompt_embeds, attention_mask=encoded.attention_mask)
    assert written.tolist() == model.generate(**prompts).tolist()
    alone = AutoTokenizer.from_pretrained(tmp_path / "slm")
    assert alone.batch_decode(written, skip_special_tokens=True) == tokenizer.batch_decode(
        written, skip_special_tokens=True
    )
    assert alone.eos_token_id == tokenizer.eos_token_id
    assert json.loads((tmp_path / "slm" / "tokenizer_config.json").read_text()).get("auto_map") is None

    assert cli.main(argv) == 2  # nothing is overwritten
    assert "slm/ exists" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair", "slm"]
