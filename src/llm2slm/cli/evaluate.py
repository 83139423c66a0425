"""Scores of a model's responses, its loss, its speed, and whether LLM-to-SLM uses its LLM; tables of several models.

```bash
llm2slm evaluate --model ./checkpoint --data ./simplify --split test --output llm2slm.json
llm2slm evaluate --model ./slm-alone --data ./simplify --output slm.json --num-beams 4
llm2slm evaluate --model ./llm --data ./simplify --few-shot 3 --instruction "Say it simply." --output few-shot.json
llm2slm evaluate --compare slm.json llm2slm.json few-shot.json --output table.md
```

The model is an LLM-to-SLM checkpoint, a causal language model, an encoder-decoder or a PEFT adapter. The report's
texts are beside it, in a file that ends in `.jsonl`.
"""

from dataclasses import asdict, dataclass

from ..evaluation.reports import METRICS, compare_reports, score_table
from ..utils import check_new_file, write_whole
from .options import DATA_HELP, DEVICE_HELP, DTYPES, option


@dataclass
class Options:
    """The options of `llm2slm evaluate`."""

    model: str | None = option("what is evaluated: folder, GGUF file, or name on the Hub", None, metavar="NAME")
    llm: str | None = option(
        "where the frozen LLM of a checkpoint, or an adapter's base model is, if not where it says",
        None,
        metavar="NAME",
    )
    revision: str | None = option("branch, tag or commit of the model's repository on the Hub", None)
    dtype: DTYPES = option("number format of the weights; auto: as they are stored", "auto")
    device: str | None = option(DEVICE_HELP, None, metavar="NAME")

    data: str | None = option(f"pairs: {DATA_HELP}", None, metavar="NAME")
    split: str = option("part of the data", "test", metavar="NAME")
    prompt_format: str | None = option(
        "how a prompt is made of a row's columns, such as '{prompt}'; if omitted, as the model was trained, by the "
        "run.json in its folder; else the column `prompt`, which the tokenizer of an LLM-to-SLM checkpoint brings "
        "into its form",
        None,
    )
    completion_format: str | None = option("likewise the response that is right", None)
    max_examples: int | None = option("this many, evenly spaced; all if omitted", None, at_least=1)
    prompt_max_length: int | None = option(
        "cut prompts to this many tokens; as the model was trained if omitted, if its training cut them",
        None,
        at_least=1,
    )

    few_shot: int | None = option("put N solved examples before each prompt", None, at_least=1)
    few_shot_split: str = option("where they are from", "train", metavar="NAME")
    instruction: str | None = option("what to do, said before each prompt", None)

    batch_size: int = option("prompts at a time", 16, at_least=1)
    max_new_tokens: int = option("tokens of a response at most", 128, at_least=1)
    num_beams: int = option("beam search with this many; greedy with one", 1, at_least=1)
    metrics: list[str] = option("scores", [*METRICS], metavar="NAME", choices=[*METRICS])
    output: str | None = option(
        "new .json file for the report; with --compare: new .md file for the tables", None, metavar="FILE"
    )
    compare: list[str] | None = option("tables of these reports, each tested against the first", None, metavar="FILE")


def run(options: Options) -> None:
    """Evaluates a model, or compares reports; errors are those of [`~llm2slm.evaluation.run.evaluate`]."""
    if options.compare:
        if options.model is not None:
            raise ValueError("--compare reads reports: it goes without --model.")
        check_new_file(options.output)
        tables = compare_reports(options.compare)
        print(tables)
        if options.output is not None:
            with write_whole(options.output) as file:
                file.write(tables + "\n")
        return
    arguments = asdict(options)
    del arguments["compare"]
    if missing := [name for name in ("model", "data", "output") if arguments[name] is None]:
        raise ValueError(f"Say --{' and --'.join(missing)}; or --compare reports.")
    from ..evaluation.run import evaluate

    print(score_table([evaluate(**arguments)]))
