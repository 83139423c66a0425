"""Latency of LLM-to-SLM beside the SLM alone and the LLM, in one run.

```bash
llm2slm benchmark --model ./checkpoint --output report.json                # a trained checkpoint
llm2slm benchmark --llm google-t5/t5-large --slm google-t5/t5-small        # two pretrained models, projector at random
llm2slm benchmark --llm t5-large --slm t5-small --threads 2                # their sizes, all weights at random
llm2slm benchmark --llm smollm2-135m --slm llama-5m --systems slm llm2slm --repeats 50  # tiny: many short runs
llm2slm benchmark --llm t5-large --slm t5-small --systems slm llm2slm fast llm ctranslate2 --plot latency.png
llm2slm benchmark --model ./checkpoint --systems llm2slm llm lossless llama.cpp --gguf ./llm.gguf
```

How it is made fair is said in `llm2slm.benchmark.measure`.
"""

from dataclasses import asdict, dataclass

from ..benchmark.random_models import SIZES
from ..benchmark.report import DEFAULT_SYSTEMS, SYSTEMS, to_markdown
from .options import DEVICE_HELP, DTYPES, option


@dataclass
class Options:
    """The options of `llm2slm benchmark`."""

    model: str | None = option("LLM-to-SLM checkpoint: folder, or name on the Hub", None, metavar="NAME")
    llm: str | None = option("where the frozen LLM is, if not where the checkpoint says", None, metavar="NAME")
    slm: str | None = option(
        "without --model: the SLM, and --llm the LLM, each a folder, a name on the Hub, or sizes with random weights: "
        + ", ".join(SIZES),
        None,
        metavar="NAME",
    )
    revision: str | None = option("branch, tag or commit of the checkpoint's repository on the Hub", None)
    dtype: DTYPES = option("number format of the weights; auto: as they are stored", "float32")
    device: str | None = option(DEVICE_HELP, None, metavar="NAME")

    systems: list[str] = option(
        "what to measure. " + "; ".join(f"{name}: {what}" for name, what in SYSTEMS.items()),
        DEFAULT_SYSTEMS,
        metavar="SYSTEM",
        choices=[*SYSTEMS],
    )
    num_beams: int = option("of the systems with beam search", 4, at_least=1)
    assistant: str | None = option("language model that drafts for the system 'assisted'", None, metavar="NAME")
    gguf: str | None = option("the LLM as the system 'llama.cpp' runs it", None, metavar="FILE")
    prompt_length: int = option("tokens", 64, at_least=1)
    response_length: int = option("tokens, at least 2", 128, at_least=1)
    batch_size: int = option("prompts at a time", 1, at_least=1)
    threads: int | None = option("CPU threads of torch; its own choice if omitted", None, at_least=1)
    repeats: int = option("measured runs of each system", 5, at_least=1)

    output: str | None = option("new .json file: every figure, timing and the machine", None, metavar="FILE")
    plot: str | None = option("new .png file: latency against the response's length", None, metavar="FILE")
    quality: list[str] = option("evaluation reports of these systems, for --quality-plot", [], metavar="SYSTEM=REPORT")
    metric: str = option("the score in them that is drawn", "chrf", metavar="NAME")
    quality_plot: str | None = option("new .png file: score against seconds", None, metavar="FILE")


def run(options: Options) -> None:
    """Measures, and prints a Markdown table; errors are those of [`~llm2slm.benchmark.measure.benchmark`]."""
    from ..benchmark.measure import benchmark

    print(to_markdown(benchmark(**asdict(options))))
