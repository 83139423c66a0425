"""The README's own lines, run as they are printed; small models stand where it names large ones of the Hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import build_llm, build_llm_tokenizer, build_slm, build_slm_tokenizer

README = Path(__file__).parents[1] / "README.md"


def test_compose_train_save_load_and_reuse_run_as_printed(tmp_path):
    (tmp_path / "google-t5").mkdir()
    for name, model, tokenizer in (
        ("t5-large", build_llm("t5"), build_llm_tokenizer()),
        ("t5-small", build_slm("t5"), build_slm_tokenizer()),
    ):
        model.save_pretrained(tmp_path / "google-t5" / name)  # what `from_pretrained` finds before it asks the Hub
        tokenizer.save_pretrained(tmp_path / "google-t5" / name)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert "pipeline" in blocks[0] and len(blocks) == 7  # the first answers with the checkpoint that was trained
    checks = 'print("written:", ids.shape)\nassert model.llm is not None and len(pairs) == len(cached) == 1\n'
    (tmp_path / "lines.py").write_text("\n".join([*blocks[1:], checks]), encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "lines.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "written: torch.Size([1, " in run.stdout
    saved = {path.name for path in (tmp_path / "my-pair").iterdir()}
    assert {"model.safetensors", "config.json", "modeling_llm2slm.py", "llm_tokenizer"} <= saved
    assert (tmp_path / "out-lora").is_dir()
