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

import argparse
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ..cli.main import add_loading_arguments, check_new_file, main, positive_int, write_aside
from .reports import METRICS, compare_reports, score_table, texts_path


def make_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `llm2slm evaluate`."""
    parser.add_argument("--model", metavar="NAME", help="what is evaluated: folder, GGUF file, or name on the Hub")
    add_loading_arguments(parser, dtype="auto")

    parser.add_argument(
        "--data",
        metavar="NAME",
        help="pairs: a folder written by save_to_disk, a .json, .jsonl, .csv or .parquet file (its split is `train`), "
        "or a data set on the Hub (`name` or `name:configuration`)",
    )
    parser.add_argument("--split", default="test", help="part of the data (default: %(default)s)")
    parser.add_argument(
        "--prompt-format",
        metavar="TEXT",
        help="how a prompt is made of a row's columns, such as '{prompt}' (default: as the model was trained, by the "
        "run.json in its folder; else the column `prompt`)",
    )
    parser.add_argument("--completion-format", metavar="TEXT", help="likewise the response that is right")
    parser.add_argument(
        "--max-examples", type=positive_int, metavar="N", help="this many, evenly spaced (default: all)"
    )
    parser.add_argument(
        "--prompt-max-length",
        type=positive_int,
        metavar="N",
        help="cut prompts to this many tokens (default: as the model was trained, if its training cut them)",
    )

    parser.add_argument("--few-shot", type=positive_int, metavar="N", help="put N solved examples before each prompt")
    parser.add_argument("--few-shot-split", default="train", help="where they are from (default: %(default)s)")
    parser.add_argument("--instruction", metavar="TEXT", help="what to do, said before each prompt")

    parser.add_argument("--batch-size", type=positive_int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=128, help="tokens of a response at most (default: %(default)s)"
    )
    parser.add_argument("--num-beams", type=positive_int, default=1, help="beam search (default: 1, greedy)")
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=[*METRICS], metavar="NAME", help=f"of {', '.join(METRICS)}"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="new .json file for the report; with --compare: new .md file for the tables"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="tables of these reports, each tested against the first",
    )


def run(args: argparse.Namespace) -> None:
    """
    Evaluates a model, or compares reports.

    Raises:
        OSError: if a model or a data set is missing, or an output exists.
        ValueError: if options disagree, pairs are empty or too long, or reports are of other data.
        ImportError: if a package is missing.
    """
    if args.compare:
        if args.model is not None:
            raise ValueError("--compare reads reports: it goes without --model.")
        return run_comparison(args)
    check_options(args)
    metrics, pairs = import_extras()
    from ..training.run_folder import read_run

    trained = read_run(args.model)
    if args.prompt_max_length is None and not (args.few_shot or args.instruction):
        args.prompt_max_length = trained_prompt_limit(trained["recipe"])
    formats = {
        name: vars(args)[name] if vars(args)[name] is not None else trained["data"].get(name)
        for name in ("prompt_format", "completion_format")
    }
    dataset = pairs.load_pairs(args.data, args.split, **formats, max_examples=args.max_examples)
    shots = []
    if args.few_shot:
        shots = pairs.load_pairs(args.data, args.few_shot_split, **formats, max_examples=args.few_shot).to_list()

    from ..language_models import load_system
    from ..training.record import machine, versions

    model, tokenizer = load_system(args, (trained["llm"] or {}).get("name_or_path"))
    rows, stop = make_rows(args, model, tokenizer, dataset, shots)
    references = [text if isinstance(text, str) else text[0]["content"] for text in dataset["completion"]]
    responses, measured = measure(args, model, tokenizer, rows, stop)
    report = {
        "system": system_name(args),
        "model": args.model,
        "data": {
            "source": pairs.recorded_source(args.data),
            "split": args.split,
            "fingerprint": pairs.fingerprint(dataset),
            "examples": len(rows),
            **formats,
        },
        "scores": {
            name: metrics.TextMetric(name).compute(predictions=responses, references=references)
            for name in args.metrics
        },
        **measured,
        "generation": {
            **{name: vars(args)[name] for name in ("max_new_tokens", "num_beams", "prompt_max_length")},
            **{name: vars(args)[name] for name in ("few_shot", "instruction")},
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "versions": versions() | {name: metadata.version(name) for name in ("evaluate", "rouge_score", "sacrebleu")},
        "machine": machine() | ({"gpu": None} if model.device.type == "cpu" else {}),
    }
    with write_aside(texts_path(args.output)) as file:
        for prompt, completion, response in zip(dataset["prompt"], references, responses, strict=True):
            line = {"prompt": prompt, "completion": completion, "response": response}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with write_aside(args.output) as file:
        file.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(score_table([report]))


def run_comparison(args: argparse.Namespace) -> None:
    """Prints the tables of several reports, and writes them to `args.output` if it is given."""
    check_new_file(args.output)
    import_extras()
    tables = compare_reports(args.compare)
    print(tables)
    if args.output is not None:
        with write_aside(args.output) as file:
            file.write(tables + "\n")


# --------------------------------------------------------------------------------------------------- what is evaluated
def check_options(args: argparse.Namespace) -> None:
    """
    Checks what can be checked before anything is read.

    Raises:
        OSError: if an output exists, or its folder does not.
        ValueError: if an option is missing or wrong.
    """
    if missing := [option for option in ("model", "data", "output") if vars(args)[option] is None]:
        raise ValueError(f"Say --{' and --'.join(missing)}; or --compare reports.")
    if Path(args.output).suffix != ".json":
        raise ValueError(f"--output must end in .json (the texts go beside it, into .jsonl), got {args.output!r}.")
    check_new_file(args.output)
    check_new_file(texts_path(args.output))


def import_extras():
    """The modules that need packages of the extra `train`."""
    try:
        from ..data import pairs
        from . import metrics
    except ImportError as error:
        raise ImportError(f"{error}. Evaluation needs: pip install 'llm-to-slm[train]'") from error
    return metrics, pairs


def trained_prompt_limit(recipe: dict[str, Any]) -> int | None:
    """The tokens that the training cut prompts to; `None` if it cut none. A recipe says what is not the default."""
    from ..training.options import TrainOptions

    return recipe.get("prompt_max_length", TrainOptions.prompt_max_length) if recipe.get("truncate") else None


def system_name(args: argparse.Namespace) -> str:
    """What the report calls the model: its folder's name, or its name on the Hub, and the number of shots."""
    name = Path(args.model).resolve().name if os.path.exists(args.model) else args.model
    return f"{name}, {args.few_shot}-shot" if args.few_shot else name


def make_rows(
    args: argparse.Namespace, model, tokenizer, dataset, shots: list[dict]
) -> tuple[list[dict[str, list[int]]], str | None]:
    """
    The pairs as `input_ids` and `labels`, and what ends a response besides the end-of-sequence token.

    Raises:
        ValueError: if a side is empty or too long for the model, or has no place for an instruction and examples.
    """
    from datasets import Dataset

    from ..data.collator import tokenize_pairs
    from ..language_models import SHOT_SEPARATOR, check_positions, few_shot_prompts

    stop = None
    if args.few_shot or args.instruction:
        if model.config.model_type == "llm2slm":
            raise ValueError("--few-shot and --instruction are for a model by itself, not for LLM-to-SLM.")
        if args.prompt_max_length:
            raise ValueError("--prompt-max-length would cut off the prompt, which is behind instruction and examples.")
        if not all(isinstance(text, str) for row in (dataset[0], *shots) for text in row.values()):
            raise ValueError("--few-shot and --instruction are for prompts that are strings, not chats.")
        prompts = few_shot_prompts(dataset["prompt"][:], shots, args.instruction, tokenizer)
        dataset = Dataset.from_dict({"prompt": prompts, "completion": dataset["completion"][:]})
        stop = SHOT_SEPARATOR if tokenizer.chat_template is None else None
    cut = args.prompt_max_length or sys.maxsize
    rows = tokenize_pairs(dataset, tokenizer, cut, sys.maxsize, truncate=True)
    rows = rows.select_columns(["input_ids", "labels"]).to_list()
    check_positions(model, rows, args.max_new_tokens)
    return rows, stop


# ---------------------------------------------------------------------------------------------------- what is measured
def measure(args: argparse.Namespace, model, tokenizer, rows: list[dict], stop: str | None):
    """The responses, and the report's `loss`, `speed`, `costs` and, for LLM-to-SLM, `shuffled_states`."""
    from ..language_models import set_generation
    from .shuffled_states import shuffle_among_like

    # Prompts of like length share a batch; the longest first, so that what does not fit fails at once.
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["input_ids"]), -len(rows[i]["labels"])))
    measured: dict[str, Any] = {"loss": held_out_loss(model, tokenizer, rows, order, args.batch_size)}
    if model.config.model_type == "llm2slm" and len(rows) > 1:
        donors = shuffle_among_like([len(row["input_ids"]) for row in rows])
        loss, shuffled = measured["loss"], held_out_loss(model, tokenizer, rows, order, args.batch_size, donors)
        measured["shuffled_states"] = {"loss": loss, "shuffled_loss": shuffled, "increase": shuffled / loss - 1}
    set_generation(model, tokenizer, args.max_new_tokens, args.num_beams)
    responses, measured["speed"] = write_all_responses(model, tokenizer, rows, order, args.batch_size, stop)
    measured["costs"] = count_costs(model.config, rows, measured["speed"], args.num_beams)
    return responses, measured


def batches(order: list[int], batch_size: int, description: str):
    """Parts of `order`, with a progress bar."""
    from tqdm.auto import tqdm

    with tqdm(total=len(order), unit="example", desc=description) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            yield batch
            progress.update(len(batch))


def held_out_loss(
    model, tokenizer, rows: list[dict], order: list[int], batch_size: int, donors: list[int] | None = None
) -> float:
    r"""
    The mean negative log-likelihood (nats) of the references' tokens, ends included.

    Args:
        model: Any that [`~llm2slm.language_models.load_system`] gives.
        tokenizer ([`LLM2SLMTokenizer`]): The model's.
        rows (`list[dict]`): The examples, with `input_ids` and `labels`.
        order (`list[int]`): The order in which they are read.
        batch_size (`int`): How many at a time.
        donors (`list[int]`, *optional*): For each example of LLM-to-SLM the one whose LLM states it is given.
    """
    from ..data.collator import DataCollatorForLLM2SLM
    from ..language_models import response_loss
    from .shuffled_states import states_of_others

    collate = DataCollatorForLLM2SLM(tokenizer)
    total = 0.0
    for batch in batches(order, batch_size, "Loss" if donors is None else "Loss with shuffled states"):
        tensors = {name: tensor.to(model.device) for name, tensor in collate([rows[i] for i in batch]).items()}
        if donors is not None:
            others = collate([rows[donors[i]] for i in batch])
            tensors["prompt_hidden_states"] = states_of_others(model, tensors, others)
        total += response_loss(model, tensors)
    return total / sum(len(row["labels"]) for row in rows)


def write_all_responses(model, tokenizer, rows: list[dict], order: list[int], batch_size: int, stop: str | None):
    """The responses in the order of `rows`, and the speed as the report has it."""
    from ..data.collator import DataCollatorForLLM2SLM
    from ..language_models import write_responses

    collate = DataCollatorForLLM2SLM(tokenizer)
    responses = [""] * len(rows)
    num_tokens, seconds = 0, 0.0
    for batch in batches(order, batch_size, "Writing responses"):
        tensors = {name: tensor.to(model.device) for name, tensor in collate([rows[i] for i in batch]).items()}
        start = time.perf_counter()
        texts, written = write_responses(model, tokenizer, tensors, stop)
        seconds += time.perf_counter() - start
        num_tokens += sum(written)
        for i, text in zip(batch, texts, strict=True):
            responses[i] = text
    return responses, {
        "seconds": seconds,
        "examples_per_second": len(rows) / seconds,
        "tokens_per_second": num_tokens / seconds,
        "batch_size": batch_size,
    }


def count_costs(config, rows: list[dict], speed: dict[str, Any], num_beams: int) -> dict[str, float]:
    """What the system has and, for prompts and responses of the mean length, computes for one example."""
    from ..benchmark.costs import costs_of

    costs = costs_of(config)
    prompt_length = sum(len(row["input_ids"]) for row in rows) / len(rows)
    response_length = speed["tokens_per_second"] / speed["examples_per_second"]
    flops = costs.prompt_flops(prompt_length, 1)
    flops += num_beams * (response_length - 1) * costs.token_flops(prompt_length + response_length / 2, 1)
    return {"parameters": costs.parameters, "gflop_per_example": flops / 1e9}


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
