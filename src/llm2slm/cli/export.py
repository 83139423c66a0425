"""Write the small model of a checkpoint as ONNX, with a page on which it writes in a browser.

```bash
llm2slm export user/checkpoint --onnx folder
llm2slm export ./checkpoint --onnx folder --bits 8
```

docs/serving.md says how the page is used.
"""

import argparse
from dataclasses import dataclass
from typing import Literal

from ..utils import check_installed, check_new_file
from .options import option


@dataclass
class Options:
    """The options of `llm2slm export`."""

    onnx: str = option("new folder for the SLM as ONNX, its tokenizer, and a page for the browser", metavar="FOLDER")
    bits: Literal["8", "32"] = option("with --onnx: of each weight; 32 is exact, 8 a quarter as large", "32")
    revision: str | None = option("branch, tag or commit of the checkpoint's repository on the Hub", None)


def add_more_options(parser: argparse.ArgumentParser, help_only: bool) -> None:
    """Adds the checkpoint, which is no option."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="LLM-to-SLM checkpoint: folder, or name on the Hub")


def run(options: Options, checkpoint: str) -> None:
    """Writes the folder; errors are those of [`~llm2slm.sharing.onnx.export_onnx`]."""
    check_installed("`llm2slm export`", "onnx", "onnxruntime", "onnxscript", install="pip install 'llm-to-slm[onnx]'")
    check_new_file(options.onnx)
    from ..language_models import load_checkpoint
    from ..sharing.onnx import export_onnx

    model, tokenizer = load_checkpoint(checkpoint, options.revision, dtype="float32", device="cpu", load_llm=False)
    print(f"Written: {export_onnx(model, tokenizer, options.onnx, 8 if options.bits == '8' else 32)}")
