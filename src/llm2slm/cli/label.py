"""Let an LLM write the responses of a data set: labels to train on, as the paper does.

```bash
llm2slm label --llm ./llm --data ./simplify --instruction "Say it in simple English." --few-shot 3 --output ./labelled
llm2slm label --llm runs/fine-tuned-llm --data ./simplify --split train validation --output ./labelled
llm2slm train --config recipe.yaml --data ./labelled --output-dir runs/on-labels
```

The result is a data set with the rows and columns of `--data`, whose `completion` is what the LLM wrote; how it came
about is in its `label.json`. The same command again goes on with an interrupted labelling, and its result is the same
as an uninterrupted one's.
"""

from dataclasses import asdict, dataclass

from .options import DATA_HELP, DEVICE_HELP, DTYPES, option


@dataclass
class Options:
    """The options of `llm2slm label`."""

    llm: str = option("what writes: folder, GGUF file, adapter, or name on the Hub", metavar="NAME")
    data: str = option(f"prompts: {DATA_HELP}", metavar="NAME")
    output: str = option("new folder for the data set", metavar="FOLDER")

    revision: str | None = option("branch, tag or commit of the LLM's repository on the Hub", None)
    base: str | None = option("where an adapter's base model is, if not where it says", None, metavar="NAME")
    dtype: DTYPES = option("number format of the weights; auto: as they are stored", "auto")
    device: str | None = option(DEVICE_HELP, None, metavar="NAME")

    split: list[str] = option("one or more parts of the data", ["train"], metavar="NAME")
    prompt_format: str | None = option(
        "how a prompt is made of a row's columns, such as '{prompt}'; if omitted, as the LLM was trained, by the "
        "run.json in its folder; else the column `prompt`",
        None,
    )
    completion_format: str | None = option("likewise the completions of --few-shot examples", None)
    max_examples: int | None = option("this many of each split, evenly spaced; all if omitted", None, at_least=1)

    instruction: str | None = option("what to do, said before each prompt", None)
    few_shot: int | None = option(
        "put N pairs of the first split before each prompt; they are themselves left out", None, at_least=1
    )
    chat_template: bool | None = option(
        "put prompts into the LLM's chat template; if omitted, if it has one and `llm2slm train` did not train it",
        None,
    )

    batch_size: int = option("prompts at a time", 16, at_least=1)
    max_new_tokens: int = option("tokens of a response at most", 128, at_least=1)
    do_sample: bool = option("sample; the likeliest token, always, if omitted", False)
    temperature: float | None = option("of sampling; below 1 is more cautious", None)
    top_p: float | None = option("sample from the likeliest tokens of this total probability", None)
    seed: int = option("same seed, same samples", 0)


def run(options: Options) -> None:
    """Labels a data set; errors are those of [`~llm2slm.evaluation.labelling.label`]."""
    from ..evaluation.labelling import label

    label(**asdict(options))
