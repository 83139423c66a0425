"""Write the small model of a checkpoint by itself, which reads prompts encoded elsewhere: a plain Hugging Face folder,
or ONNX with a page on which it writes in a browser.

```bash
llm2slm export user/checkpoint --slm folder
vllm serve folder --enable-prompt-embeds
llm2slm export user/checkpoint --onnx page
llm2slm export user/checkpoint --onnx page --bits 8
```

docs/serving.md says how prompts come to it.
"""

import argparse
from dataclasses import dataclass
from typing import Literal

from ..utils import check_installed, check_new_file
from .options import option


@dataclass
class Options:
    """The options of `llm2slm export`."""

    slm: str | None = option(
        "new folder for the SLM as a Hugging Face model, with its tokenizer", None, metavar="FOLDER"
    )
    onnx: str | None = option(
        "new folder for the SLM as ONNX, its tokenizer, and a page for the browser", None, metavar="FOLDER"
    )
    bits: Literal["8", "32"] = option("with --onnx: of each weight; 32 is exact, 8 a quarter as large", "32")
    revision: str | None = option("branch, tag or commit of the checkpoint's repository on the Hub", None)


def add_more_options(parser: argparse.ArgumentParser, help_only: bool) -> None:
    """Adds the checkpoint, which is no option."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="LLM-to-SLM checkpoint: folder, or name on the Hub")


def run(options: Options, checkpoint: str) -> None:
    """
    Writes the folder; errors are those of [`~llm2slm.sharing.slm_folder.export_slm`] and
    [`~llm2slm.sharing.onnx.export_onnx`].

    Raises:
        ImportError: if what it takes to write ONNX is not installed.
        ValueError: if options name no folder, or two.
    """
    if (options.slm is None) == (options.onnx is None):
        raise ValueError("Name one folder: --slm for a Hugging Face model, or --onnx.")
    if options.onnx is not None:
        install = "pip install 'llm-to-slm[onnx]'"
        check_installed("`llm2slm export --onnx`", "onnx", "onnxruntime", "onnxscript", install=install)
    check_new_file(options.slm)
    check_new_file(options.onnx)
    from ..language_models import load_checkpoint
    from ..sharing.onnx import export_onnx
    from ..sharing.slm_folder import export_slm

    dtype = "auto" if options.onnx is None else "float32"
    model, tokenizer = load_checkpoint(checkpoint, options.revision, dtype=dtype, device="cpu", load_llm=False)
    if options.slm is not None:
        written = export_slm(model, tokenizer, options.slm)
    elif options.onnx is not None:
        written = export_onnx(model, tokenizer, options.onnx, 8 if options.bits == "8" else 32)
    print(f"Written: {written}")
