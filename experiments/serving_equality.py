"""
Whether vLLM's server writes what `generate` does: real prompts, many at a time, float32, greedily.

    python training/build_simplify.py --output data/simplify
    python -c "from datasets import load_from_disk; load_from_disk('data/simplify')['test'].to_json('simplify.jsonl')"
    python experiments/serving_equality.py --pair model_cards/simplify-smollm2-135m simplify.jsonl \\
        --output results/serving_equality.json

It runs where vLLM and the plugin are installed. `--pair` can be said again for other checkpoints. Of each file of
prompts (JSON Lines with a column `prompt`) 200 are taken, evenly spaced. `generate` reads one prompt at a time; the
server gets as many as `--concurrency` says. Of a response that differs the report has the first token that does, and
by how much the model's logits there prefer its own: next to nothing if the two tokens are as good as equal.
"""

import argparse
import asyncio
import json
import os
import signal
import tempfile
from pathlib import Path

import aiohttp
import torch
import vllm
from serving_load import start, wait

from llm2slm import LLM2SLMTokenizer
from llm2slm.language_models import load_checkpoint
from llm2slm.utils import check_new_file, machine, read_json_lines, versions, write_json


def write_with_generate(checkpoint: str, prompts: list[str]) -> list[list[int]]:
    model, tokenizer = load_checkpoint(checkpoint, dtype="float32", device="cpu")
    responses = []
    for prompt in prompts:
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), num_beams=1, do_sample=False)
        responses.append(ids[0].tolist())
    return responses


async def write_with_server(url, process, log, prompts: list[str], concurrency: int, max_tokens: int) -> list[dict]:
    answers: list[dict] = [{} for _ in prompts]
    waiting = list(enumerate(prompts))[::-1]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        await wait(session, process, url, log)

        async def client():
            while waiting:
                number, prompt = waiting.pop()
                body = {"model": "served", "prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True}
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    response.raise_for_status()
                    (answers[number],) = (await response.json())["choices"]

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return answers


@torch.no_grad()
def logits_apart(checkpoint: str, prompt: str, begun: list[int], own: int, other: int) -> dict[str, float]:
    """Logits of two tokens behind the beginning of a response."""
    model, tokenizer = load_checkpoint(checkpoint, dtype="float32", device="cpu")
    inputs = tokenizer(prompt, return_tensors="pt")
    labels = torch.tensor([[*begun, own]])
    logits = model(**inputs, labels=labels).logits[0, len(begun)]
    return {"own_logit": logits[own].item(), "other_logit": logits[other].item()}


def compare(checkpoint: str, source: str, arguments) -> dict:
    rows = read_json_lines(source)
    prompts = [rows[i * len(rows) // arguments.prompts]["prompt"] for i in range(arguments.prompts)]
    expected = write_with_generate(checkpoint, prompts)
    generation = json.loads((Path(checkpoint) / "generation_config.json").read_text())
    tokenizer = LLM2SLMTokenizer.from_pretrained(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process, url = start(checkpoint, log, ["--dtype", "float32", "--max-model-len", "1024"])
        try:
            answers = asyncio.run(
                write_with_server(url, process, log, prompts, arguments.concurrency, generation["max_length"])
            )
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    different = []
    for prompt, own, answer in zip(prompts, expected, answers, strict=True):
        text = tokenizer.decode(own, skip_special_tokens=True)
        if text == answer["text"] and own == answer["token_ids"]:
            continue
        pairs = list(zip(own, answer["token_ids"], strict=False))
        place = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        found = {"prompt": prompt, "generate": text, "server": answer["text"], "token": place}
        if place is not None:
            found |= logits_apart(checkpoint, prompt, own[:place], *pairs[place])
        different.append(found)
    return {
        "checkpoint": Path(checkpoint).name,
        "prompts": len(prompts),
        "equal": len(prompts) - len(different),
        "tokens": sum(map(len, expected)),
        "different": different,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, action="append", required=True, metavar=("CHECKPOINT", "PROMPTS"))
    parser.add_argument("--prompts", type=int, default=200, help="of each file")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()
    check_new_file(arguments.output)
    found = []
    for checkpoint, source in arguments.pair:
        found.append(compare(checkpoint, source, arguments))
        print(json.dumps(found[-1]), flush=True)
    report = {"concurrency": arguments.concurrency, "dtype": "float32", "machine": machine()}
    used = {**versions(), "vllm": vllm.__version__}
    write_json(arguments.output, {**report, "versions": used, "checkpoints": found})


if __name__ == "__main__":
    main()
