"""`llm2slm serve`: each caller gets what `generate` gives alone, in OpenAI's shapes; what has no answer is refused."""

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import torch
import uvicorn
from conftest import POSITIONS, build_llm_tokenizer, build_model, build_slm_tokenizer
from transformers import GenerationConfig

from llm2slm import LLM2SLMTokenizer, decoding_llm2slm
from llm2slm.cli import main as cli
from llm2slm.serving import batching, offline
from llm2slm.serving.batching import Batcher, Response, Sampling, Written
from llm2slm.serving.response_text import ResponseText
from llm2slm.serving.server import Server, listen, own_names
from llm2slm.serving.service import Limits, Service, read_sampling

PAIRS = {"llama": "llama", "t5": "t5"}  # LLM to SLM
NAME = "tiny"
COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/prompt_embeddings"


def build_tokenizer(prompt_format="w9 {prompt}") -> LLM2SLMTokenizer:
    return LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer(), prompt_format)


class Client:
    """A server in a thread, and how to ask it."""

    def __init__(self, service: Service, api_key: str | None):
        self.service = service
        listening = listen("127.0.0.1", 0)
        server = Server(service, NAME, api_key, hosts=own_names(listening, "127.0.0.1"))
        self.port = listening.getsockname()[1]
        self.uvicorn = uvicorn.Server(uvicorn.Config(server.app, log_level="warning"))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()

    def ask(self, path, body=None, method=None, content_type="application/json", **headers):
        """Status, headers and JSON (or text) of an answer; `body` is JSON or bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(
            method or ("GET" if body is None else "POST"), path, content, {"Content-Type": content_type, **headers}
        )
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        with contextlib.suppress(ValueError):
            text = json.loads(text)
        return answer.status, answer.headers, text

    def text(self, path=COMPLETIONS, **body) -> str:
        """The text of a whole response."""
        status, _, answer = self.ask(path, body)
        assert status == 200, answer
        choice = answer["choices"][0]
        return choice["text"] if path == COMPLETIONS else choice["message"]["content"]

    def stream(self, path=COMPLETIONS, **body) -> tuple[str, list[dict]]:
        """The text of a stream, and its chunks."""
        status, _, answer = self.ask(path, {**body, "stream": True})
        assert status == 200 and answer.endswith("data: [DONE]\n\n"), answer
        chunks = [json.loads(line[6:]) for line in answer.split("\n\n")[:-2]]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        return "".join(one["text"] if path == COMPLETIONS else one["delta"]["content"] for one in choices), chunks

    def send(self, body, path=COMPLETIONS) -> socket.socket:
        """The connection of a request whose answer is not waited for."""
        content = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def metric(self, name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)", self.ask("/metrics")[2], re.MULTILINE)[1])

    def wait_for_a_batch(self):
        """Until the first batch has begun."""
        self.wait(lambda: self.metric("llm2slm_batch_prompts_sum") == 1)

    def wait(self, condition):
        """Until something holds, which it does soon."""
        until = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.005)

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def serve():
    """A function that serves a model until the test ends."""
    clients = []

    def start(model, tokenizer=None, api_key=None, **limits) -> Client:
        service = Service(model, tokenizer or build_tokenizer(), Limits(**limits))
        clients.append(Client(service, api_key))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def build_pair(slm="llama"):
    """A pair that is not done at once: it never ends a response by itself."""
    model = build_model(PAIRS[slm], slm)
    model.generation_config.eos_token_id = model.slm.generation_config.eos_token_id = None
    return model


def alone(model, tokenizer, prompt, max_tokens=8) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=1)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.fixture
def held(monkeypatch):
    """Lets a model begin to write only when it is let go."""

    def hold(model):
        gate, generate = threading.Event(), model.generate
        monkeypatch.setattr(model, "generate", lambda **kwargs: gate.wait(20) and generate(**kwargs))
        return gate

    return hold


# ------------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("slm", PAIRS)
def test_32_callers_at_once_get_what_generate_gives_each_alone(slm, serve):
    model, tokenizer = build_model(PAIRS[slm], slm), build_tokenizer()
    client = serve(model, tokenizer, batch_size=8)
    prompts = [" ".join(f"w{(7 * i + j) % 54}" for j in range(1 + i % 11)) for i in range(32)]
    lengths = [1 + 5 * i % 17 for i in range(32)]
    expected = [alone(model, tokenizer, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    assert len(set(expected)) > 16  # what is mixed up would show

    def ask(i):
        body = {"prompt": prompts[i], "max_tokens": lengths[i], "temperature": 0}
        return client.stream(**body)[0] if i % 3 == 0 else client.text(**body)

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == expected
    assert 4 <= client.metric("llm2slm_batch_prompts_count") < 32  # together, and no more than eight at a time
    assert client.metric('llm2slm_requests_total{path="/v1/completions",status="200"}') == 32


def test_an_answer_counts_tokens_and_says_why_it_ended(serve):
    model = build_pair()
    client = serve(model)
    _, _, answer = client.ask(COMPLETIONS, {"prompt": ["w1 w2", "w3"], "max_tokens": 3, "n": 2, "model": NAME})
    assert answer["object"] == "text_completion" and answer["model"] == NAME
    assert [(one["index"], one["finish_reason"]) for one in answer["choices"]] == [(i, "length") for i in range(4)]
    assert answer["choices"][0]["text"] == answer["choices"][1]["text"] != answer["choices"][2]["text"]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}
    first = model.generate(**build_tokenizer()("w1 w2", return_tensors="pt"), max_new_tokens=1)[0, -1].item()
    client.service.batcher.end_tokens = [first]
    _, _, answer = client.ask(COMPLETIONS, {"prompt": "w1 w2", "max_tokens": 3})
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 1


def test_stop_strings_end_a_response_before_them_in_streams_too(serve):
    client = serve(build_pair())
    whole = client.text(prompt="w1 w2", max_tokens=20)
    stop = [whole[9:12], "no such text"]
    _, _, answer = client.ask(COMPLETIONS, {"prompt": "w1 w2", "max_tokens": 20, "stop": stop})
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == whole[: whole.index(stop[0])]
    text, chunks = client.stream(prompt="w1 w2", max_tokens=20, stop=stop, stream_options={"include_usage": True})
    assert text == answer["choices"][0]["text"] and chunks[-1]["usage"] == answer["usage"]
    assert [choice["finish_reason"] for choice in chunks[-2]["choices"]] == ["stop"] and not chunks[-1]["choices"]
    assert len(chunks) > 5


def test_a_stream_is_read_line_by_line_and_passed_on_at_once(serve, monkeypatch):
    tokenizer, text = build_tokenizer(), "\u2028é\u0085"  # at which Python and httpx end a line
    monkeypatch.setattr(tokenizer, "decode", lambda ids, skip_special_tokens: text * len(ids))
    client = serve(build_pair(), tokenizer)
    _, headers, answer = client.ask(COMPLETIONS, {"prompt": "w1", "max_tokens": 3, "stream": True})
    lines = [line.removeprefix("data: ") for line in answer.splitlines() if line]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    assert "".join(event["choices"][0]["text"] for event in events) == 3 * text
    assert headers["Cache-Control"] == "no-cache" and headers["X-Accel-Buffering"] == "no"


def test_text_is_shown_when_its_characters_and_stop_strings_are_complete():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    def shown(text, stop):
        response, parts = ResponseText(Bytes(), stop, streamed=True), []
        for token in text.encode():
            response.add(token)
            parts.append(response.take())
            if response.stopped:
                break
        response.end()
        return [*parts, response.take()]

    assert shown("aé€", []) == ["a", "", "é", "", "", "€", ""]
    assert shown("abxabcd", ["abc"]) == ["", "", "abx", "", "", "", ""]
    assert shown("xab", ["abc"]) == ["x", "", "", "ab"]
    cut = ResponseText(Bytes(), [], streamed=True)
    cut.add("é".encode()[0])
    cut.end()
    assert cut.take() == "�"  # as `decode` gives it


def test_a_chat_reads_the_last_message_in_the_prompt_format_or_the_template(serve):
    model = build_pair()
    plain, template = build_tokenizer("w9 {prompt}"), build_tokenizer(None)
    chat = [{"role": "system", "content": "w5"}, {"role": "user", "content": [{"type": "text", "text": "w1 w2"}]}]
    text = alone(model, plain, "w1 w2")
    client = serve(model, plain)
    assert client.text(CHAT, messages=chat, max_tokens=8) == text
    streamed, chunks = client.stream(CHAT, messages=chat, max_completion_tokens=8)
    assert streamed == text and chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    for name in ("annotations", "audio", "function_call", "refusal", "tool_calls"):  # which clients send back as None
        chat.insert(1, {"role": "assistant", "content": "w3", name: None})
    assert client.text(CHAT, messages=chat, max_tokens=8) == text
    del chat[1:-1]
    of_template = template("system w5 user w1 w2 assistant", add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**of_template, max_new_tokens=8)
    expected = template.decode(ids[0], skip_special_tokens=True)
    assert expected != text
    assert serve(model, template).text(CHAT, messages=chat, max_tokens=8) == expected


def test_a_seed_gives_the_same_in_any_company(serve, held):
    model = build_pair()
    client = serve(model)
    sampled = {"prompt": "w1 w2", "max_tokens": 12, "temperature": 1, "top_p": 0.9, "seed": 5}
    once = client.text(**sampled)
    assert len({client.text(**{**sampled, "seed": seed}) for seed in range(4)}) == 4
    assert len({client.text(**{**sampled, "seed": None}) for _ in range(4)}) == 4
    greedy = client.text(prompt="w1 w2", max_tokens=12, temperature=0)
    for least in ({"top_p": 1e-6}, {"top_p": 1e-46}, {"temperature": 1e-38}, {"temperature": 1e-5}):
        assert client.text(**{**sampled, **least}) == greedy
    gate = held(model)
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(client.text, prompt=f"w{i} w3 w4", max_tokens=9, temperature=2) for i in range(6)]
        again = pool.submit(client.text, **sampled)
        also = pool.submit(client.text, prompt="w1 w2", max_tokens=12)
        gate.set()
        assert again.result() == once and also.result() == greedy
        assert len({other.result() for other in others}) == 6


def test_sampling_draws_from_the_distribution():
    response = Response([1], print, ResponseText(None, [], False), 1, Sampling(temperature=0.5, top_p=0.8))
    response.generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([[2.0, 1.5, 1.0, -1.0]])
    draws = [batching._Sampler([response])(None, scores).argmax().item() for _ in range(4000)]
    expected = torch.tensor([4.0, 3.0]).softmax(dim=0)  # at temperature 0.5, of those that make up 0.8
    assert set(draws) == {0, 1}
    assert abs(draws.count(0) / 4000 - expected[0].item()) < 0.03


@pytest.mark.parametrize("setting", [{"min_p": 0.99}, {"typical_p": 1e-6}, {"epsilon_cutoff": 0.99}, {"top_k": 1}])
def test_a_checkpoint_that_samples_does_so_as_its_generation_config_says(setting, serve):
    model = build_pair()
    model.generation_config.update(do_sample=True, temperature=0.5, **setting)
    (name,) = setting
    client = serve(model)
    texts = {client.text(prompt="w1 w2", max_tokens=8, seed=seed) for seed in range(4)}
    torch.manual_seed(0)
    inputs, tokenizer = build_tokenizer()("w1 w2", return_tensors="pt"), build_tokenizer()
    by_generate = {tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0]) for _ in range(4)}
    assert len(by_generate) == 1  # the setting leaves one token to draw
    assert texts == by_generate, name


def test_what_a_generation_config_leaves_open_is_as_in_generate():
    assert read_sampling(GenerationConfig(do_sample=True), torch.device("cpu")) == Sampling(1.0, 1.0, 50)
    assert read_sampling(GenerationConfig(top_p=0.5, min_p=0.1), torch.device("cpu")) == Sampling()
    (eta,) = read_sampling(GenerationConfig(do_sample=True, eta_cutoff=0.25), torch.device("cpu")).warpers
    assert eta.epsilon == 0.25


def test_stop_strings_of_the_checkpoint_end_a_response(serve):
    model = build_pair()
    words = serve(model).text(prompt="w1 w2", max_tokens=8).split()
    model.generation_config.stop_strings = words[3]
    model.generation_config.num_return_sequences = 2  # `n` says how many
    assert serve(model).text(prompt="w1 w2", max_tokens=8).split() == words[: words.index(words[3])]


@pytest.mark.parametrize("slm", PAIRS)
def test_a_file_of_prompts_is_answered_as_the_server_answers(slm, serve):
    model, tokenizer, prompts = build_pair(slm), build_tokenizer(), ["w1 w2", "w3 w4 w5"]
    client = serve(model, tokenizer)
    whole = client.text(prompt="w1 w2", max_tokens=12)
    ids = model.generate(**tokenizer("w3 w4 w5", return_tensors="pt"), max_new_tokens=12)[0].tolist()
    model.generation_config.stop_strings = whole[len(whole) // 2 :][:2]
    model.generation_config.num_return_sequences = 2
    model.slm.generation_config.eos_token_id = ids[-3]  # the pair's own config has none
    client = serve(model, tokenizer)
    answers = offline.generate_batch(model, tokenizer, prompts, max_new_tokens=12)
    served = client.ask(COMPLETIONS, {"prompt": prompts, "max_tokens": 12})[2]
    assert [answer[:2] for answer in answers] == [(one["text"], one["finish_reason"]) for one in served["choices"]]
    assert [answer.finish_reason for answer in answers] == ["stop", "stop"]
    assert sum(answer.num_tokens for answer in answers) == served["usage"]["completion_tokens"] < 24


@pytest.mark.parametrize("setting", [{"guidance_scale": 2.0}, {"penalty_alpha": 0.6}, {"top_h": 0.4}])
def test_what_a_generation_config_asks_for_and_is_not_served_is_refused_at_start(setting):
    model = build_pair()
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* is not served"):
        Service(model, build_tokenizer())


@pytest.mark.parametrize("setting", [{"encoder_no_repeat_ngram_size": 3}, {"token_healing": True}])
def test_what_generate_refuses_of_a_generation_config_is_refused_at_start(setting):
    model = build_pair()
    model.generation_config.update(**setting)
    with pytest.raises(ValueError, match=f"cannot be served.*{next(iter(setting))}"):
        Service(model, build_tokenizer())


def test_files_of_prompts_are_answered_whatever_a_generation_config_returns():
    model, tokenizer = build_pair(), build_tokenizer()
    expected = offline.generate_batch(model, tokenizer, ["w1"], max_new_tokens=4)
    model.generation_config.return_dict_in_generate = True
    assert offline.generate_batch(model, tokenizer, ["w1"], max_new_tokens=4) == expected


@pytest.mark.parametrize("slm", PAIRS)
def test_prompt_embeddings_are_what_the_slm_reads(slm, serve):
    model, tokenizer = build_pair(slm), build_tokenizer()
    client = serve(model, tokenizer)
    for kind, dtype in (("float", None), ("base64", None), ("float", "float16"), ("base64", "float16")):
        body = {"prompt": ["w1 w2 w3 w4 w5 w6 w7", "w4"], "encoding_format": kind}
        status, _, answer = client.ask(EMBEDDINGS, body | ({} if dtype is None else {"dtype": dtype}))
        assert status == 200 and answer["usage"]["prompt_tokens"] == 12
        for item, prompt in zip(answer["data"], body["prompt"], strict=True):
            states = model.encode_prompt(**tokenizer(prompt, return_tensors="pt")).prompt_embeds[0]
            given = item["embedding"]
            if kind == "base64":
                given = torch.frombuffer(bytearray(base64.b64decode(given)), dtype=getattr(torch, dtype or "float32"))
            given = torch.as_tensor(given).float().view(item["shape"])
            close = 1e-5 if dtype is None else 1e-3
            torch.testing.assert_close(given, states.detach(), atol=close, rtol=close)


@pytest.mark.parametrize("kind", ["float", "base64"])
def test_prompt_embeddings_are_written_in_small_pieces(kind, serve):
    client = serve(build_pair())
    body = {"prompt": ["w1 " * 50, "w2 " * 50], "encoding_format": kind}
    with client.send(body, EMBEDDINGS) as connection, connection.makefile("rb") as answer:
        connection.settimeout(20)
        while answer.readline() != b"\r\n":  # its headers
            pass
        pieces = [answer.read(int(size, 16) + 2)[:-2] for size in iter(answer.readline, b"0\r\n")]
    assert json.loads(b"".join(pieces)) == client.ask(EMBEDDINGS, body)[2]
    assert max(map(len, pieces)) < sum(map(len, pieces)) / 10


def test_prompt_embeddings_that_16_bits_do_not_hold_are_refused(serve):
    model = build_pair()
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.mul_(1e7)
    client = serve(model)
    answer = client.ask(EMBEDDINGS, {"prompt": "w1 w2", "dtype": "float16"})
    assert_refused(answer, 400, "too large for float16")
    assert client.ask(EMBEDDINGS, {"prompt": "w1 w2"})[0] == 200


def test_few_responses_are_written_by_the_compiled_step(monkeypatch):
    monkeypatch.setattr(decoding_llm2slm, "BACKEND", "eager")
    model, tokenizer = build_pair(), build_tokenizer()
    expected = [alone(model, tokenizer, prompt) for prompt in ("w1", "w2 w3", "w4")]
    batcher, told, all_told = Batcher(model, 8, 8, fast=True), {}, threading.Event()
    batcher._compiling.join(60)
    assert batcher.fast_rows == [1, 2, 4]
    calls = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: calls.append(kwargs) or generate(**kwargs))

    def tell(prompt, written):
        told[prompt] = written
        if len(told) == 3:
            all_told.set()

    prompts = ("w1", "w2 w3", "w4")
    batcher.submit(
        [
            Response(
                tokenizer.encode(prompt),
                lambda written, prompt=prompt: tell(prompt, written),
                ResponseText(tokenizer, [], False),
                8,
                Sampling(),
            )
            for prompt in prompts
        ]
    )
    assert all_told.wait(60)
    batcher.close()
    assert [(call["fast"], len(call["prompt_embeds"])) for call in calls] == [(True, 4)]
    assert [told[prompt] for prompt in prompts] == [Written(text, "length", 8) for text in expected]


@pytest.mark.parametrize("fails", ["compiling", "encoding"])
def test_what_cannot_be_compiled_is_not_said_to_be(fails, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler here")

    decoding_llm2slm.logger.warning_once.__func__.cache_clear()
    caplog.set_level("WARNING", logger=decoding_llm2slm.logger.name)
    model = build_pair()
    if fails == "compiling":
        monkeypatch.setattr(decoding_llm2slm, "BACKEND", fail)
    else:
        tried, encode = [], model.encode_prompt  # once before anything is compiled
        monkeypatch.setattr(model, "encode_prompt", lambda *a: fail() if tried else (tried.append(1), encode(*a))[1])
    batcher = Batcher(model, 8, 8, fast=True)
    batcher._compiling.join(60)
    batcher.close()
    assert batcher.fast_rows == [] and "no compiler here" in caplog.text


def test_the_openai_client_works_unchanged(serve):
    openai = pytest.importorskip("openai", reason="the client is not installed")
    server = serve(build_pair(), api_key="secret")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="secret", max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME] == [client.models.retrieve(NAME).id]
    whole = client.completions.create(model=NAME, prompt="w1 w2", max_tokens=6, extra_body={"logprobs": False})
    parts = list(client.completions.create(model=NAME, prompt="w1 w2", max_tokens=6, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    messages = [{"role": "user", "content": "w1 w2"}]
    chat = client.chat.completions.create(model=NAME, messages=messages, max_tokens=6, seed=1, temperature=0.7)
    parts = list(
        client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=6, seed=1, temperature=0.7, stream=True
        )
    )
    assert "".join(part.choices[0].delta.content for part in parts) == chat.choices[0].message.content
    messages += [chat.choices[0].message.model_dump(), {"role": "user", "content": "w3"}]
    assert client.chat.completions.create(model=NAME, messages=messages, max_tokens=6).choices[0].message.content
    assert (chat.usage.completion_tokens, chat.choices[0].finish_reason) == (6, "length")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.completions.create(model="gpt", prompt="w1")
    with pytest.raises(openai.BadRequestError, match="`logprobs`"):
        client.completions.create(model=NAME, prompt="w1", logprobs=2)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="guess").models.list()


def test_hugging_faces_client_works_without_the_models_name(serve, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it would ask nobody, this machine neither
    server = serve(build_pair())
    client = huggingface_hub.InferenceClient(base_url=f"http://127.0.0.1:{server.port}/v1")
    messages = [{"role": "user", "content": "w1 w2"}]
    text = client.chat_completion(messages, max_tokens=6).choices[0].message.content
    assert text == server.text(CHAT, messages=messages, max_tokens=6) == server.text(prompt="w1 w2", max_tokens=6)
    parts = list(client.chat_completion(messages, max_tokens=6, stream=True))
    assert "".join(part.choices[0].delta.content for part in parts) == text
    assert server.text(CHAT, model="tgi", messages=messages, max_tokens=6) == text
    assert_refused(server.ask("/v1/models/dummy"), 404, "no model")


# ------------------------------------------------------------------------------------------------------------ refusals
MALFORMED = [
    (b"{nope", 400, "JSON"),
    (b"[]", 400, "object"),
    (b'{"prompt": "\\ud800"}', 400, "JSON"),
    (b'{"prompt": "w1", "temperature": NaN}', 400, "`temperature`"),
    (b"[" * 100_000, 400, "JSON"),
    ({}, 400, "`prompt`"),
    ({"prompt": 3}, 400, "`prompt`"),
    ({"prompt": []}, 400, "`prompt`"),
    ({"prompt": " "}, 400, "empty"),
    ({"prompt": ["w1", ""]}, 400, "empty"),
    ({"prompt": [5, 60]}, 400, "from 0 to 59"),
    ({"prompt": [5, -1]}, 400, "from 0 to 59"),
    ({"prompt": [10**30]}, 400, "from 0 to 59"),
    ({"prompt": "w1", "model": "gpt"}, 404, "no model"),
    ({"prompt": "w1", "temperature": 3}, 400, "`temperature`"),
    ({"prompt": "w1", "top_p": 0}, 400, "`top_p`"),
    ({"prompt": "w1", "max_tokens": 0}, 400, "`max_tokens`"),
    ({"prompt": "w1", "max_tokens": "many"}, 400, "`max_tokens`"),
    ({"prompt": "w1", "stop": [""]}, 400, "`stop`"),
    ({"prompt": "w1", "seed": 2**64}, 400, "`seed`"),
    ({"prompt": "w1", "n": 17}, 400, "`n`"),
    ({"prompt": "w1", "presence_penalty": 0.5}, 400, "`presence_penalty`"),
    ({"prompt": "w1", "best": 1}, 400, "`best`"),
    ({"prompt": "w1", "logprobs": 0}, 400, "`logprobs`"),
]


def assert_refused(answer, status, fragment):
    found, _, body = answer
    assert found == status, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert fragment in body["error"]["message"] and "Traceback" not in body["error"]["message"]


def test_what_cannot_be_answered_is_refused_in_openais_shape(serve):
    client = serve(build_pair())
    before = client.text(prompt="w1", max_tokens=4)
    for body, status, fragment in MALFORMED:
        assert_refused(client.ask(COMPLETIONS, body), status, fragment)
    chats = [
        ([], "`messages`"),
        ([{"role": "assistant", "content": "w1"}], "user's"),
        ([{"role": "robot", "content": "w1"}], "`messages.0.role`"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "`messages.0.content`"),
        ([{"role": "user", "content": ""}], "empty"),
    ]
    for messages, fragment in chats:
        assert_refused(client.ask(CHAT, {"messages": messages}), 400, fragment)
    assert_refused(client.ask(CHAT, {"messages": [{"role": "user", "content": "w1"}], "tools": [1]}), 400, "`tools`")
    assert_refused(client.ask(EMBEDDINGS, {"prompt": "w1", "encoding_format": "int8"}), 400, "`encoding_format`")
    # What a page of another site can send without asking.
    assert_refused(client.ask(COMPLETIONS, {"prompt": "w1"}, content_type="text/plain"), 415, "application/json")
    assert_refused(client.ask("/v1/nothing"), 404, "/v1/nothing")
    assert_refused(client.ask(COMPLETIONS), 405, "GET")
    assert client.text(prompt="w1", max_tokens=4) == before and client.ask("/health")[0] == 200


def test_the_key_is_asked_for(serve):
    client = serve(build_pair(), api_key="secret")
    assert_refused(client.ask(COMPLETIONS, {"prompt": "w1"}), 401, "API key")
    assert_refused(client.ask("/v1/models", Authorization="Bearer secre"), 401, "API key")
    assert client.ask("/v1/models", Authorization="Bearer secret")[0] == client.ask("/health")[0] == 200


def test_pages_whose_name_leads_here_are_refused(serve):
    client = serve(build_pair())
    assert client.ask("/v1/models", Host="page.example:8000")[0] == 400
    for name in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
        assert client.ask("/v1/models", Host=name)[0] == 200
    with listen("0.0.0.0", 0) as open_to_all:  # which has names that are not known here
        assert own_names(open_to_all, "0.0.0.0") == []


def test_limits_of_one_request(serve):
    client = serve(build_pair(), prompt_tokens=10, tokens=POSITIONS, body_bytes=2000)
    assert_refused(client.ask(COMPLETIONS, {"prompt": "w1 " * 9}), 400, "11 tokens, and may have 10")
    assert_refused(client.ask(COMPLETIONS, {"prompt": "w1", "max_tokens": POSITIONS + 1}), 400, "64 at most")
    assert_refused(client.ask(COMPLETIONS, {"prompt": "w1", "max_tokens": 62}), 400, "need 65 positions")
    assert client.ask(COMPLETIONS, {"prompt": "w1"})[2]["usage"]["completion_tokens"] == 61  # what there is room for
    assert_refused(client.ask(COMPLETIONS, {"prompt": "w1 " * 900}), 413, "2000 bytes")
    ids = [[5] * 10] * 2
    few = serve(build_pair(), prompt_tokens=10, batch_size=2)
    assert few.ask(EMBEDDINGS, {"prompt": ids})[0] == 200
    assert_refused(few.ask(EMBEDDINGS, {"prompt": [*ids, [5]]}), 400, "21 tokens together, and may have 20")
    connection = client.send({"prompt": "w1"})
    connection.close()
    with socket.create_connection(("127.0.0.1", client.port)) as connection:  # of a size that is not said before
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\nbb8\r\n{'x' * 3000}\r\n".encode())
        assert b" 413 " in connection.recv(1000)


def test_prompts_that_only_fit_alone_are_not_put_together(serve, held):
    model = build_pair()
    client, gate = serve(model), held(model)
    bodies = [{"prompt": "w1 " * 50, "max_tokens": 3}, {"prompt": "w1", "max_tokens": 50}]
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.text, prompt="w1", max_tokens=1)
        client.wait_for_a_batch()
        answers = [pool.submit(client.ask, COMPLETIONS, body) for body in bodies]
        client.wait(lambda: client.service.batcher.num_waiting == 2)
        gate.set()
        assert [answer.result()[0] for answer in answers] == [200, 200] and first.result() is not None
    assert client.metric("llm2slm_batch_prompts_count") == 3


def test_a_full_queue_says_when_to_come_again(serve, held):
    model = build_pair()
    client, gate = serve(model, queue=2), held(model)
    for path in (COMPLETIONS, EMBEDDINGS):  # before they are tokenized, which would find the last one empty
        assert_refused(client.ask(path, {"prompt": ["w1", "w2", ""]}), 400, "2 answers at most")
    begun = client.send({"prompt": "w1"})
    client.wait_for_a_batch()
    waiting = client.send({"prompt": ["w1", "w2"]})
    client.wait(lambda: client.service.batcher.num_waiting == 2)
    refused = client.ask(COMPLETIONS, {"prompt": "w3"})
    assert_refused(refused, 429, "wait")
    assert refused[1]["Retry-After"] == "1"
    gate.set()
    assert b" 200 " in begun.recv(1000) and b" 200 " in waiting.recv(1000)


def test_time_is_up_for_what_waits_and_for_what_is_written(serve, held):
    model = build_pair()
    client, gate = serve(model, seconds=0.5), held(model)
    with ThreadPoolExecutor(2) as pool:
        written = pool.submit(client.ask, COMPLETIONS, {"prompt": "w1"})
        client.wait_for_a_batch()
        waits = client.ask(COMPLETIONS, {"prompt": "w1", "stream": True})
        assert_refused(waits, 503, "busy")
        assert waits[1]["Retry-After"] == "1"
        assert_refused(written.result(), 504, "longer")
    assert client.service.batcher.num_waiting == 0
    gate.set()
    client.wait(lambda: client.ask(COMPLETIONS, {"prompt": "w1", "max_tokens": 1})[0] == 200)


# -------------------------------------------------------------------------------------------------- leaving and ending
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_client_leaves_is_not_written(stream, serve, held):
    model = build_pair()
    client, gate = serve(model), held(model)
    written = []
    running = client.send({"prompt": "w1", "max_tokens": 60, "stream": stream})
    client.wait_for_a_batch()
    queued = client.send({"prompt": "w2", "stream": stream})
    client.wait(lambda: client.service.batcher.num_waiting == 1)
    queued.close()
    client.wait(lambda: client.service.batcher.num_waiting == 0)  # left the queue behind a batch that runs
    forward = model.slm.forward
    model.slm.forward = lambda *args, **kwargs: written.append(1) or forward(*args, **kwargs)
    running.close()
    client.wait(lambda: client.metric("llm2slm_clients_left_total") == 2)
    gate.set()
    assert client.text(prompt="w3", max_tokens=1)
    assert len(written) <= 3  # of 60 steps


def test_one_prompt_that_fails_harms_no_other(serve, held, monkeypatch, caplog):
    model = build_pair()
    tokenizer = build_tokenizer()
    expected = alone(model, tokenizer, "w1")
    client, gate = serve(model, tokenizer), held(model)
    encode, bad = model.encode_prompt, tokenizer.encode("w2")

    def fail_at_one(ids, mask):
        if any(row[mask[i] == 1].tolist() == bad for i, row in enumerate(ids)):
            raise RuntimeError("a secret of the machine")
        return encode(ids, mask)

    monkeypatch.setattr(model, "encode_prompt", fail_at_one)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.text, prompt="w3", max_tokens=1)
        client.wait_for_a_batch()
        good, failed = (pool.submit(client.ask, COMPLETIONS, {"prompt": p, "max_tokens": 8}) for p in ("w1", "w2"))
        client.wait(lambda: client.service.batcher.num_waiting == 2)
        gate.set()
        assert_refused(failed.result(), 500, "could not answer")
        assert good.result()[2]["choices"][0]["text"] == expected and first.result() is not None
    assert "a secret of the machine" in caplog.text  # for whoever runs the server


@pytest.mark.parametrize("argv", [["--api-key", ""], []])
def test_an_empty_key_is_refused(argv, monkeypatch, capsys):
    monkeypatch.setenv("LLM2SLM_API_KEY", "")
    assert cli.main(["serve", "./none", "--host", "0.0.0.0", *argv]) == 2
    assert "The API key is empty" in capsys.readouterr().err


def test_sigterm_ends_the_command_when_running_answers_are_finished(tmp_path):
    model = build_pair("t5")
    model.generation_config.update(max_new_tokens=400, min_new_tokens=300)
    model.save_pretrained(tmp_path / "pair", include_llm=True)
    build_tokenizer().save_pretrained(tmp_path / "pair")
    command = [sys.executable, "-m", "llm2slm.cli", "serve", str(tmp_path / "pair"), "--port", "0", "--no-fast"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"LLM2SLM_API_KEY": "secret"}
    )
    try:
        lines = iter(process.stderr.readline, "")
        address = next(
            match for line in lines if (match := re.search(r"Serving pair at http://127.0.0.1:(\d+)", line))
        )
        port = int(address[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        body = json.dumps({"prompt": "w1", "stream": True, "stream_options": {"include_usage": True}})
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        connection.request("POST", COMPLETIONS, body, headers)
        answer = connection.getresponse()
        begun = answer.read(200)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        text = (begun + answer.read()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert json.loads(text.split("\n\n")[-3][6:])["usage"]["completion_tokens"] >= 300
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()
