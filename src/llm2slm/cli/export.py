"""Write the small model of a checkpoint by itself: a plain Hugging Face folder, which reads prompts encoded elsewhere.

```bash
llm2slm export user/checkpoint --slm folder
vllm serve folder --enable-prompt-embeds
```

docs/serving.md says how prompts come to it.
"""

import argparse
from dataclasses import dataclass

from .options import option


@dataclass
class Options:
    """The options of `llm2slm export`."""

    slm: str = option("new folder for the SLM as a Hugging Face model, with its tokenizer", metavar="FOLDER")
    revision: str | None = option("branch, tag or commit of the checkpoint's repository on the Hub", None)


def add_more_options(parser: argparse.ArgumentParser, help_only: bool) -> None:
    """Adds the checkpoint, which is no option."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="LLM-to-SLM checkpoint: folder, or name on the Hub")


def run(options: Options, checkpoint: str) -> None:
    """Writes the folder; errors are those of [`~llm2slm.sharing.slm_folder.export_slm`]."""
    from ..language_models import load_checkpoint
    from ..sharing.slm_folder import export_slm
    from ..utils import check_new_file

    check_new_file(options.slm)
    model, tokenizer = load_checkpoint(checkpoint, options.revision, device="cpu", load_llm=False)
    print(f"Written: {export_slm(model, tokenizer, options.slm)}")
