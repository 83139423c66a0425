"""
The page of `llm2slm export --onnx` in Chromium: is its response `generate`'s, how many tokens a second does it write,
how many bytes does a prompt take, and does it write when the server has ended?

    llm2slm export model_cards/simplify-smollm2-135m --onnx onnx-8 --bits 8 && npm install --prefix onnx-8
    python experiments/browser.py --checkpoint model_cards/simplify-smollm2-135m --data data/simplify \\
        --folders onnx-8 --output results/browser.json

It needs selenium, and Debian's chromium and chromium-driver. Tokens a second are those that the page shows, without
the first one. `--screenshots FOLDER` leaves pictures of the page.
"""

import argparse
import functools
import http.server
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from datasets import load_from_disk
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from llm2slm.language_models import load_checkpoint
from llm2slm.utils import check_new_file, cpu_model, versions, write_json

SERVER_PORT, SECONDS = 8765, 300
SHOWN = ("response", "tokens", "speed", "first", "received", "status")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve_folder(folder: Path) -> http.server.ThreadingHTTPServer:
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def start_encoder(checkpoint: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "llm2slm.cli", "serve", checkpoint, "--dtype", "float32", "--no-fast"]
    process = subprocess.Popen([*command, "--port", str(SERVER_PORT), "--origins", "*"])
    started = time.monotonic()
    while time.monotonic() - started < SECONDS and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{SERVER_PORT}/health"):
                return process
        except OSError:
            time.sleep(1)
    process.kill()
    sys.exit("The server did not start.")


def start_browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path="/usr/bin/chromedriver")
    return webdriver.Chrome(options=options, service=service)


class Page:
    def __init__(self, browser: webdriver.Chrome, url: str):
        self.browser = browser
        browser.get(url)
        self.wait("Ready.")
        self._show_server().send_keys(f"http://127.0.0.1:{SERVER_PORT}")

    def _show_server(self):
        self.browser.execute_script("document.querySelector('details').open = true")
        server = self.browser.find_element(By.ID, "server")
        server.clear()
        return server

    def wait(self, *beginnings: str) -> dict[str, str]:
        """What the page shows once its status begins with one of these."""
        status = self.browser.find_element(By.ID, "status")
        WebDriverWait(self.browser, SECONDS).until(lambda _: status.text.startswith(beginnings))
        return {name: self.browser.find_element(By.ID, name).text for name in SHOWN}

    def press(self, button: str) -> dict[str, str]:
        self.browser.find_element(By.ID, button).click()
        return self.wait("Done.", "Cut after", "The server does not answer")

    def write(self, prompt: str) -> dict[str, str]:
        self.browser.execute_script("document.getElementById('prompt').value = arguments[0]", prompt)
        return self.press("write")

    def screenshots(self, folder: Path):
        self.browser.execute_script("document.querySelector('details').open = false")
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            for name, width, height in (("desktop", 1200, 800), ("phone", 390, 844)):
                size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"}
                self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                self.browser.save_screenshot(str(folder / f"{name}-{scheme}.png"))


def measure(page: Page, prompts: list[str], expected: list[str]) -> list[dict]:
    rows = []
    for prompt, text in zip(prompts, expected, strict=True):
        shown = page.write(prompt)
        row = {"equal": shown["response"] == text.strip(), "tokens": int(shown["tokens"])}
        row |= {"tokens_per_s": float(shown["speed"]), "first_token_ms": int(shown["first"].split()[0])}
        row |= {"received_kb": float(shown["received"].split()[0])}
        rows.append(row)
        print(row, flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="a folder with a test split")
    parser.add_argument("--folders", type=Path, nargs="+", required=True, help="with what `npm install` puts there")
    parser.add_argument("--prompts", type=int, default=20, help="the first of the test split")
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    check_new_file(arguments.output)
    prompts = list(load_from_disk(arguments.data)["test"].select(range(arguments.prompts))["prompt"])
    model, tokenizer = load_checkpoint(arguments.checkpoint, dtype="float32", device="cpu")
    expected = []
    for prompt in prompts:
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), num_beams=1, max_new_tokens=128)
        expected.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    del model
    results = {}
    for folder in arguments.folders:
        encoder, files, browser = start_encoder(arguments.checkpoint), serve_folder(folder), start_browser()
        try:
            page = Page(browser, f"http://127.0.0.1:{files.server_address[1]}/")
            rows = measure(page, prompts, expected)
            encoder.terminate()
            encoder.wait()
            again = page.press("again")
            refused = page.press("write")["status"]
            if arguments.screenshots is not None:
                page.press("again")
                page.screenshots(arguments.screenshots)
            names = ("tokens_per_s", "first_token_ms", "received_kb")
            results[folder.name] = {
                "equal_responses": sum(row["equal"] for row in rows),
                "medians": {name: statistics.median(row[name] for row in rows) for name in names},
                "without_the_server": {
                    "tokens": int(again["tokens"]),
                    "tokens_per_s": float(again["speed"]),
                    "equal": again["response"] == expected[-1].strip(),
                    "a_new_prompt": refused,
                },
                "chromium": browser.capabilities["browserVersion"],
                "rows": rows,
            }
        finally:
            browser.quit()
            files.shutdown()
            if encoder.poll() is None:
                encoder.kill()
    settings = {"checkpoint": arguments.checkpoint, "data": arguments.data, "prompts": arguments.prompts}
    machine = {"cpu": cpu_model(), "load": os.getloadavg()[0], "versions": versions()}
    write_json(arguments.output, {**settings, **machine, "folders": results})


if __name__ == "__main__":
    main()
