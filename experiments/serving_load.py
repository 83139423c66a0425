"""
What vLLM serves of a pair and of its LLM: requests a second, and milliseconds to the first token.

    python experiments/serving_load.py --checkpoint model_cards/simplify-smollm2-135m --prompts texts.txt \\
        --output results/serving.json

It runs where vLLM and the plugin are installed. Both servers are up at once and take turns: in each repeat every one
answers the same prompts, one line of the file each, at each concurrency, with `--max-tokens` tokens for each. Ratios
are taken within a repeat, and the medians of the repeats are reported. Prompts differ from repeat to repeat where
there are enough of them: neither server should have read one before.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
from transformers import AutoConfig

import llm2slm  # noqa: F401  (registers the configuration)
from llm2slm.loading_llm2slm import load_slm, load_tokenizer
from llm2slm.utils import check_new_file, cpu_model, versions, write_json


def start(folder: Path | str, log: Path, arguments: list[str]) -> tuple[subprocess.Popen, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--served-model-name", "served", *arguments]
    process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)
    return process, f"http://127.0.0.1:{port}"


async def wait(session: aiohttp.ClientSession, process: subprocess.Popen, url: str, log: Path):
    while process.poll() is None:
        try:
            async with session.get(f"{url}/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            await asyncio.sleep(0.5)
    sys.exit(f"The server did not start: {log.read_text()[-2000:]}")


async def answer(session: aiohttp.ClientSession, url: str, prompt: str, max_tokens: int) -> float:
    """Reads one whole response; returns the seconds until its first token."""
    body = {"model": "served", "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    started, first = time.perf_counter(), None
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            if first is None and line.startswith(b"data: {"):
                first = time.perf_counter() - started
    return first


async def measure(session, url: str, prompts: list[str], concurrency: int, max_tokens: int) -> dict[str, float]:
    waiting, first_tokens = prompts[::-1], []

    async def client():
        while waiting:
            first_tokens.append(await answer(session, url, waiting.pop(), max_tokens))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - started
    return {"requests_per_s": len(prompts) / seconds, "first_token_ms": 1000 * statistics.median(first_tokens)}


async def compare(urls, processes, logs, prompts, arguments) -> list[dict]:
    rows, next_prompt = [], 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        for name, url in urls.items():
            await wait(session, processes[name], url, logs[name])
            await measure(session, url, prompts[-4:], 4, arguments.max_tokens)  # warm
        for repeat in range(arguments.repeats):
            for concurrency in arguments.concurrency:
                count = max(arguments.requests, 2 * concurrency)
                chosen = [prompts[(next_prompt + i) % len(prompts)] for i in range(count)]
                next_prompt += count
                # Who comes first changes, so that what else goes on in the machine favours none.
                for name in sorted(urls, reverse=repeat % 2 == 1):
                    result = await measure(session, urls[name], chosen, concurrency, arguments.max_tokens)
                    rows.append({"served": name, "repeat": repeat, "concurrency": concurrency, **result})
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def summarize(rows: list[dict]) -> list[dict]:
    summary = []
    for concurrency in sorted({row["concurrency"] for row in rows}):
        of = {
            (row["served"], row["repeat"]): row for row in rows if row["concurrency"] == concurrency
        }  # one row for each
        repeats = sorted({repeat for _, repeat in of})
        line: dict = {"concurrency": concurrency}
        for measured in ("requests_per_s", "first_token_ms"):
            for name in ("pair", "llm"):
                line[f"{name}_{measured}"] = statistics.median(of[name, repeat][measured] for repeat in repeats)
            line[f"{measured}_pair_by_llm"] = statistics.median(
                of["pair", repeat][measured] / of["llm", repeat][measured] for repeat in repeats
            )
        summary.append(line)
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="the pair's; its LLM is what it is compared with")
    parser.add_argument("--prompts", type=Path, required=True, help="a text file, a prompt in each line")
    parser.add_argument("--requests", type=int, default=64, help="in each repeat; two a client at least")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()
    check_new_file(arguments.output)
    prompts = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    options = ["--dtype", arguments.dtype, "--max-model-len", "1024", "--max-num-seqs", "64", "--seed", "0"]
    options += ["--no-enable-prefix-caching", "--generation-config", "vllm"]
    config = AutoConfig.from_pretrained(arguments.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        llm_folder = Path(folder) / "llm"
        place = {"gguf_file": config.llm_gguf_file, "revision": config.llm_revision}
        place = {name: value for name, value in place.items() if value is not None}
        load_slm(config.llm_name_or_path, dtype=arguments.dtype, **place).save_pretrained(llm_folder)
        load_tokenizer(config.llm_name_or_path, **place).save_pretrained(llm_folder)
        logs = {name: Path(folder) / f"{name}.log" for name in ("pair", "llm")}
        folders = {"pair": arguments.checkpoint, "llm": llm_folder}
        started = {name: start(folders[name], logs[name], options) for name in folders}
        processes = {name: process for name, (process, _) in started.items()}
        try:
            urls = {name: url for name, (_, url) in started.items()}
            rows = asyncio.run(compare(urls, processes, logs, prompts, arguments))
        finally:
            for process in processes.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
    settings = {name: getattr(arguments, name) for name in ("requests", "max_tokens", "repeats", "dtype")}
    report = {"checkpoint": arguments.checkpoint, **settings, "cpu": cpu_model(), "versions": versions()}
    write_json(arguments.output, {**report, "summary": summarize(rows), "rows": rows})


if __name__ == "__main__":
    main()
