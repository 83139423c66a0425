"""Scores a model's responses, its loss and its speed, and whether LLM-to-SLM uses its LLM; compares several models.

```bash
llm2slm evaluate --model ./checkpoint --data ./simplify --split test --output llm2slm.json
llm2slm evaluate --model ./slm-alone --data ./simplify --output slm.json --num-beams 4
llm2slm evaluate --model ./llm --data ./simplify --few-shot 3 --instruction "Say it simply." --output few-shot.json
llm2slm evaluate --model ./instruct --data ./instruct-data --by task --output instruct.json
llm2slm evaluate --compare slm.json llm2slm.json few-shot.json --output table.md
llm2slm evaluate --show slm.json llm2slm.json --max-examples 5
```

The model is an LLM-to-SLM checkpoint, a causal language model, an encoder-decoder or a PEFT adapter. The report's
texts are written beside it, into a file that ends in `.jsonl`. `--compare` and `--show` read it or, if there is none,
the folder's `texts.parquet`.
"""

from dataclasses import asdict, dataclass

from ..evaluation.reports import METRICS, compare_reports, score_table, show_reports
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
    by: str | None = option(
        "a report for each value of this column, in one run: --output task.json --by task gives task-VALUE.json",
        None,
        metavar="COLUMN",
    )
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
        "new .json file for the report; with --compare and --show: new file for what is printed", None, metavar="FILE"
    )
    compare: list[str] | None = option("tables of these reports, each tested against the first", None, metavar="FILE")
    show: list[str] | None = option(
        "prompts, references and responses of these reports as plain text; of --max-examples, if given",
        None,
        metavar="FILE",
    )


def check_reads_reports(options: Options) -> None:
    """
    Checks that nothing is asked of a model where reports are read.

    Raises:
        ValueError: if something is.
    """
    reads, allowed = ("--compare", set()) if options.compare else ("--show", {"max_examples"})
    unsaid = Options()
    for name, value in asdict(options).items():
        if name not in {"compare", "show", "output"} | allowed and value != getattr(unsaid, name):
            raise ValueError(f"{reads} reads reports: it goes without --{name.replace('_', '-')}.")


def run(options: Options) -> None:
    """Evaluates a model, or compares or shows reports; errors are those of the functions that it calls."""
    if options.compare or options.show:
        if options.compare and options.show:
            raise ValueError("--compare and --show print different things: use one of them.")
        check_reads_reports(options)
        check_new_file(options.output)
        if options.compare:
            text = compare_reports(options.compare)
        else:
            text = show_reports(options.show or [], options.max_examples)
        print(text)
        if options.output is not None:
            with write_whole(options.output) as file:
                file.write(text + "\n")
        return
    arguments = asdict(options)
    del arguments["compare"], arguments["show"]
    if missing := [name for name in ("model", "data", "output") if arguments[name] is None]:
        raise ValueError(f"Say --{' and --'.join(missing)}; or --compare or --show reports.")
    from ..evaluation.run import evaluate

    print(score_table(evaluate(**arguments)))
