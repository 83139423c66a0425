"""
`llm2slm serve` under load: wrong answers, requests that never end, the server's memory; and its throughput beside
batched `generate` in the same run.

    python training/build_simplify.py --output data/simplify
    python experiments/serving_soak.py --model model_cards/simplify-smollm2-135m --data data/simplify \
        --output results/serving_soak.json

Of the requests some are malformed, and of some the client leaves after a random time. The others ask for one of a few
hundred prompts, each with a length of its own, whole or as a stream; what `generate` writes to it alone is right.
"""

import argparse
import contextlib
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llm2slm.data.pairs import load_pairs
from llm2slm.language_models import load_checkpoint
from llm2slm.utils import machine, versions

STUCK_SECONDS = 120
MALFORMED = [b"{", b"[]", b'{"prompt": ""}', b'{"prompt": "a", "max_tokens": -1}', b'{"prompt": "a", "best": 1}']


class Client:
    """Asks the server at a port."""

    def __init__(self, port: int):
        self.port = port

    def connect(self, method: str, path: str, body=None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STUCK_SECONDS)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection

    def ask(self, method: str, path: str, body=None) -> tuple[int, str]:
        with contextlib.closing(self.connect(method, path, body)) as connection:
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def text(self, prompt: str, max_tokens: int, stream: bool = False) -> str:
        body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": stream})
        status, answer = self.ask("POST", "/v1/completions", body)
        if status != 200:
            raise ValueError(f"status {status}: {answer}")
        if not stream:
            return json.loads(answer)["choices"][0]["text"]
        *events, end, _ = answer.split("\n\n")
        if end != "data: [DONE]":
            raise ValueError(f"the stream ended with {end!r}")
        return "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)

    def metric(self, name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)", self.ask("GET", "/metrics")[1], re.MULTILINE)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="LLM-to-SLM checkpoint")
    parser.add_argument("--data", required=True, help="data set whose prompts are asked")
    parser.add_argument("--requests", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=300, help="different ones (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of a response at most (default: %(default)s)")
    parser.add_argument("--throughput-requests", type=int, default=256, help="a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each way, in turns (default: %(default)s)")
    parser.add_argument("--no-fast", action="store_true", help="without the compiled step")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()

    prompts = load_pairs(arguments.data, "test", None, None, arguments.prompts)["prompt"]
    model, tokenizer = load_checkpoint(arguments.model, dtype="float32", device="cpu")
    command = [sys.executable, "-m", "llm2slm.cli", "serve", arguments.model, "--dtype", "float32", "--device", "cpu"]
    command += ["--port", "0", *(["--no-fast"] if arguments.no_fast else [])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address, said = None, ""
        while address is None and (line := process.stderr.readline()):
            address, said = re.search(r"http://127\.0\.0\.1:(\d+)", line), said + line
        if address is None:
            raise RuntimeError(f"The server did not start:\n{said}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # else the pipe fills
        client = Client(int(address[1]))
        until = time.monotonic() + (0 if arguments.no_fast else 600)
        while client.metric("llm2slm_compiled_responses") < 4 and time.monotonic() < until:
            time.sleep(1)
        report = {
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "machine": machine(),
            "versions": versions(),
            "compiled_responses": client.metric("llm2slm_compiled_responses"),
            "throughput": compare(client, model, tokenizer, prompts, arguments),
        }
        print(json.dumps(report["throughput"]))
        report["soak"] = soak(client, model, tokenizer, prompts, arguments)
        print(json.dumps(report["soak"]))
    finally:
        process.terminate()
        code = process.wait()
    report["exit_code"] = code
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def written(model, tokenizer, prompts: list[str], max_tokens: int) -> list[str]:
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_tokens)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def compare(client: Client, model, tokenizer, prompts: list[str], arguments) -> dict:
    """Requests a second at concurrency 16, and prompts a second in batches of 16; medians of rounds in turns."""
    asked = [prompts[i % len(prompts)] for i in range(arguments.throughput_requests)]
    seconds: dict[str, list[float]] = {"serve": [], "generate": []}
    for turn in range(arguments.rounds + 1):  # the first one warms up
        start = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda prompt: client.text(prompt, arguments.max_tokens), asked))
        middle = time.perf_counter()
        for i in range(0, len(asked), 16):
            written(model, tokenizer, asked[i : i + 16], arguments.max_tokens)
        if turn > 0:
            seconds["serve"].append(middle - start)
            seconds["generate"].append(time.perf_counter() - middle)
    rates = {name: len(asked) / statistics.median(times) for name, times in seconds.items()}
    return {"prompts_per_second": rates, "ratio": rates["serve"] / rates["generate"], "seconds": seconds}


def soak(client: Client, model, tokenizer, prompts: list[str], arguments) -> dict:
    """Every request's fate, and the server's memory after a tenth of them and at the end."""
    lengths = [1 + 7 * i % arguments.max_tokens for i in range(len(prompts))]
    expected = [written(model, tokenizer, [prompt], n)[0] for prompt, n in zip(prompts, lengths, strict=True)]
    fates: Counter[str] = Counter()
    wrong: list[dict] = []
    memory, lock = {}, threading.Lock()

    def one(number: int) -> str:
        chance = random.Random(number)
        kind = chance.random()
        if kind < 0.05:
            status, answer = client.ask("POST", "/v1/completions", chance.choice(MALFORMED))
            return "malformed, refused" if status == 400 and "error" in json.loads(answer) else "malformed, answered"
        index, stream = chance.randrange(len(prompts)), chance.random() < 0.5
        if kind < 0.1:
            body = json.dumps({"prompt": prompts[index], "max_tokens": arguments.max_tokens, "stream": stream})
            connection = client.connect("POST", "/v1/completions", body)
            time.sleep(chance.random())
            connection.close()
            return "left"
        text = client.text(prompts[index], lengths[index], stream)
        if text == expected[index]:
            return "right"
        with lock:
            wrong.append({"prompt": prompts[index], "expected": expected[index], "got": text, "stream": stream})
        return "wrong"

    def fate(number: int) -> None:
        try:
            found = one(number)
        except TimeoutError:
            found = "stuck"
        except (OSError, ValueError) as error:
            found = f"failed: {error}"[:200]
        with lock:
            fates[found] += 1
            done = fates.total()
        if done == max(1, arguments.requests // 10):
            memory["after_a_tenth"] = client.metric("process_resident_memory_bytes")

    start = time.perf_counter()
    with ThreadPoolExecutor(arguments.concurrency) as pool:
        list(pool.map(fate, range(arguments.requests)))
    seconds = time.perf_counter() - start
    memory["at_the_end"] = client.metric("process_resident_memory_bytes")
    batches = client.metric("llm2slm_batch_prompts_sum") / client.metric("llm2slm_batch_prompts_count")
    return {
        "fates": dict(fates),
        "wrong": wrong[:10],
        "seconds": seconds,
        "prompts_per_batch": batches,
        "memory_bytes": memory,
        "memory_growth": memory["at_the_end"] / memory["after_a_tenth"] - 1,
    }


if __name__ == "__main__":
    main()
