"""
The dial on real prompts: quality against speed, from the LLM's own responses to the pair's.

    python experiments/dial.py --model model_cards/simplify-smollm2-135m --adapter runs/llm-lora --data data/simplify \
        --output results/simplify/dial.json

For each prompt the LLM writes greedily by itself, and the pair and the LLM together at each tolerance, in an order
that turns with the prompts. Each prompt's responses are kept beside the report, in a .jsonl file: killed, it goes on
there.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from lossless import load_llm_with_head
from tqdm.auto import tqdm

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer, load_pairs
from llm2slm.evaluation.metrics import compute_statistics, interval
from llm2slm.loading_llm2slm import load_tokenizer
from llm2slm.utils import machine, versions

COUNTS = ("llm_calls", "draft_tokens", "accepted_tokens", "unasked_tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="LLM-to-SLM checkpoint with the LLM's tokenizer, maybe trimmed")
    parser.add_argument("--llm", help="folder of a fine-tuned LLM (default: the one it was trained behind)")
    parser.add_argument("--adapter", help="folder of a LoRA adapter of the LLM, which is merged")
    parser.add_argument("--data", required=True, help="data set whose prompts are read")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, help="prompts, evenly spaced (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument(
        "--tolerances",
        type=float,
        nargs="+",
        default=[0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1],
        help="(default: %(default)s)",
    )
    parser.add_argument("--ask-below", type=float, help="at each tolerance (default: what is not tolerated)")
    parser.add_argument("--fast", action="store_true", help="draft with the compiled step")
    parser.add_argument("--metrics", nargs="+", default=["chrf", "bleu"], help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()

    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "metrics")}
    pairs = load_pairs(arguments.data, arguments.split, max_examples=arguments.limit)
    rows = write_responses(arguments, settings, pairs["prompt"])
    report = {
        **settings,
        "examples": len(rows),
        "ways": summarize(rows, pairs["completion"], arguments.metrics),
        "machine": machine(),
        "versions": versions(),
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["ways"], arguments.metrics))


def write_responses(arguments: argparse.Namespace, settings: dict, prompts: list[str]) -> list[dict]:
    """For each prompt what each way wrote, and what it took; those that an earlier run has kept are not made again."""
    path = arguments.output.with_suffix(".jsonl")
    if not path.exists():
        path.write_text(json.dumps(settings) + "\n")
    # What a killed run left of its last line is written again.
    first, *kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if json.loads(first) != settings:
        raise SystemExit(f"{path} is of other settings: {first.strip()}. Delete it, or choose another --output.")
    path.write_text(first + "".join(kept))
    rows = [json.loads(line) for line in kept]
    if len(rows) == len(prompts):
        return rows
    ways, tokenizer, llm_tokenizer = load_ways(arguments)
    names = list(ways)
    for number in tqdm(range(len(rows), len(prompts)), initial=len(rows), total=len(prompts)):
        inputs = tokenizer(prompts[number], return_tensors="pt")
        if number == len(rows):
            for way in ways.values():
                way(inputs)  # warm-up
        row = {}
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            ids, counts = ways[name](inputs)
            seconds = time.perf_counter() - start
            response = llm_tokenizer.decode(ids, skip_special_tokens=True).strip()
            row[name] = {"response": response, "tokens": len(ids), "seconds": seconds, **counts}
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return rows


def load_ways(arguments: argparse.Namespace):
    """
    By name, functions that write a response of a prompt: its ids, and counts. And the tokenizers of the prompts and of
    the responses; the pair's own for the LLM may be trimmed.
    """
    tokenizer = LLM2SLMTokenizer.from_pretrained(arguments.model)
    tuned = arguments.llm is not None or arguments.adapter is not None
    # A pair reads the states of its own LLM; that it has two need not be paid for where they are one.
    model = LLM2SLMForConditionalGeneration.from_pretrained(arguments.model, dtype=arguments.dtype, load_llm=tuned)
    llm = load_llm_with_head(model.config, arguments.llm, arguments.adapter, arguments.dtype)
    ends = {"eos_token_id": tokenizer.llm_tokenizer.eos_token_id, "pad_token_id": tokenizer.llm_tokenizer.pad_token_id}
    options = {"do_sample": False, "max_new_tokens": arguments.max_new_tokens, **ends}

    def alone(inputs):
        ids = llm.generate(**inputs, **options)[0]
        return ids if llm.config.is_encoder_decoder else ids[inputs["input_ids"].shape[1] :], {}

    def together(tolerance):
        dial = {"llm": llm, "tolerance": tolerance, "ask_below": arguments.ask_below, "fast": arguments.fast}
        dial["return_dict_in_generate"] = True

        def write(inputs):
            output = model.generate(**inputs, **dial, **options)
            return output.sequences[0], {name: output[name] for name in COUNTS}

        return write

    ways = {"llm": alone, **{f"{tolerance:g}": together(tolerance) for tolerance in arguments.tolerances}}
    gguf_file = model.config.llm_gguf_file if arguments.llm is None else None
    llm_tokenizer = load_tokenizer(arguments.llm or model.config.llm_name_or_path, gguf_file=gguf_file)
    return ways, tokenizer, llm_tokenizer


def summarize(rows: list[dict], references: list[str], metrics: list[str]) -> dict[str, dict]:
    """For each way its scores with 95% intervals, its time, how much faster it is than the LLM, and its counts."""
    ways = {}
    for name in rows[0]:
        of_way = [row[name] for row in rows]
        total = {field: sum(row[field] for row in of_way) for field in of_way[0] if field != "response"}
        scores = {}
        for metric in metrics:
            statistics = compute_statistics(metric, [row["response"] for row in of_way], references)
            scores[metric] = {"score": statistics.score, "interval": interval(statistics)}
        ways[name] = {
            "scores": scores,
            **total,
            "speed_up": sum(row["llm"]["seconds"] for row in rows) / total["seconds"],
            "as_the_llm": sum(row[name]["response"] == row["llm"]["response"] for row in rows),
        }
        if "draft_tokens" in total:
            ways[name]["acceptance_rate"] = total["accepted_tokens"] / max(total["draft_tokens"], 1)
            ways[name]["tokens_per_llm_call"] = total["tokens"] / total["llm_calls"]
    return ways


def table(ways: dict[str, dict], metrics: list[str]) -> str:
    lines = [f"| tolerance | {' | '.join(metrics)} | faster than the LLM | drafts kept | tokens a call of the LLM |"]
    lines.append("|---|" + "---:|" * (len(metrics) + 3))
    for name, way in ways.items():
        scores = [f"{way['scores'][metric]['score']:.1f}" for metric in metrics]
        drafts = ["", ""]
        if "acceptance_rate" in way:
            drafts = [f"{way['acceptance_rate']:.0%}", f"{way['tokens_per_llm_call']:.2f}"]
        lines.append("| " + " | ".join([name, *scores, f"{way['speed_up']:.2f}x", *drafts]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
