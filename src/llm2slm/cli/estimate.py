"""What LLM-to-SLM would gain for a pair of models on this machine, before any training and without their weights.

```bash
llm2slm estimate --llm google-t5/t5-large --slm google-t5/t5-small
llm2slm estimate --llm smollm2-135m --slm llama-15m --prompt-length 200 --response-length 60 --dtype bfloat16
llm2slm estimate --llm ./llm.gguf --slm ./slm --output estimate.json
```
"""

from dataclasses import asdict, dataclass
from typing import Literal

from ..benchmark.random_models import SIZES
from .options import DEVICE_HELP, option

SOURCES = "name on the Hub or folder, of which the configuration is read, or sizes: " + ", ".join(SIZES)


@dataclass
class Options:
    """The options of `llm2slm estimate`."""

    llm: str = option(f"the LLM: {SOURCES}", metavar="NAME")
    slm: str = option(f"the SLM: {SOURCES}", metavar="NAME")
    llm_layer: list[int] = option("layers read; -1 is the last", [-1])
    prompt_length: int = option("tokens", 64, at_least=1)
    response_length: int = option("tokens", 128, at_least=1)
    batch_size: int = option("prompts at a time", 1, at_least=1)
    dtype: Literal["float32", "bfloat16", "float16"] = option("number format of the weights", "float32")
    device: str | None = option(DEVICE_HELP, None, metavar="NAME")
    threads: int | None = option("CPU threads of torch; its own choice if omitted", None, at_least=1)
    output: str | None = option("new .json file: what was counted, measured and predicted", None, metavar="FILE")


def run(options: Options) -> None:
    """Predicts, and prints a Markdown table; errors are those of [`~llm2slm.benchmark.estimate.estimate`]."""
    from ..benchmark.estimate import estimate, to_markdown

    print(to_markdown(estimate(**asdict(options))))
