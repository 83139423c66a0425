"""vLLM serves a checkpoint. `make test-vllm` runs these in an environment of their own: vLLM caps transformers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from itertools import count

import pytest
import torch
from conftest import (
    EOS,
    FUSIONS,
    LLM_HIDDEN,
    LLM_KINDS,
    SLM_VOCAB,
    build_llm_tokenizer,
    build_model,
    build_prompts,
    build_slm_tokenizer,
    jitter,
    llama,
)
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Gemma3TextConfig, Qwen2Config

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where its calls can be counted
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
vllm = pytest.importorskip("vllm", reason="vLLM is in an environment of its own: make test-vllm")

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole  # noqa: E402
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer  # noqa: E402
from llm2slm.cli import main as cli  # noqa: E402
from llm2slm.language_models import weights_id  # noqa: E402
from llm2slm.serving.vllm_config import PROMPT_FOLDER  # noqa: E402

ON_CPU = current_platform.is_cpu()
WIDE_LLM_VOCAB, NEW_TOKENS = 80, 12
SMALL = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4, "max_num_batched_tokens": 16}
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
TEXTS = [f"w{i} w{i + 9} w{7 * i % 50}" for i in range(8)]
TEXT = TEXTS[0]
LANGUAGE_MODEL_ONLY = {"limit_mm_per_prompt": {"prompt": 0}}
DEBUGGING = {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}
DRAFT = {"method": "draft_model", "num_speculative_tokens": 2}


def slm_config(kind, positions=64):
    """Heads as wide as vLLM's attention on a CPU takes them."""
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        return llama(64, SLM_VOCAB, Gemma3TextConfig, head_dim=32, sliding_window=8, layer_types=layers)
    if kind == "qwen2":
        return llama(128, SLM_VOCAB, Qwen2Config, tie_word_embeddings=True)
    config = llama(64, SLM_VOCAB, head_dim=32)
    config.max_position_embeddings = positions
    return config


def save_pair(folder, llm="llama", slm="llama", fusion="replace", slim=False, prompt_format=None, **slm_fields):
    """A tiny random pair and its tokenizers in `folder`; a slim one has its LLM in a folder beside it."""
    torch.manual_seed(0)
    config = LLM_KINDS[llm](LLM_HIDDEN, WIDE_LLM_VOCAB)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    llm_model = jitter(auto_class.from_config(config))
    if slim:
        llm_model.save_pretrained(f"{folder}-llm")
    options = dict(FUSIONS[fusion])
    if options.get("shared_tokenizer"):  # trimmed: four of the LLM's tokens and more are none of the SLM's
        options["prompt_token_map"] = [i if i < SLM_VOCAB - 4 else -1 for i in range(WIDE_LLM_VOCAB)]
    slm_model = jitter(AutoModelForCausalLM.from_config(slm_config(slm, **slm_fields)), 0.1)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        f"{folder}-llm" if slim else llm_model, slm_model, llm_layer=1, **options
    )
    jitter(model.projector)
    model.save_pretrained(folder)
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer(), prompt_format)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def greedy(model, ids):
    tokens = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def greedy_text(model, tokenizer, text):
    return tokenizer.decode(greedy(model, tokenizer(text)["input_ids"]), skip_special_tokens=True)


def written(engine, prompts):
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompts], vllm.SamplingParams(**GREEDY), use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture
def small_engines(monkeypatch):
    """`vllm.LLM` without compilation, for a few requests at a time."""

    class SmallLLM(vllm.LLM):
        batches_left = 100

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**SMALL, "max_num_batched_tokens": 64, **kwargs})

        def enqueue(self, *args, **kwargs):
            SmallLLM.batches_left -= 1
            if SmallLLM.batches_left < 0:
                raise KeyboardInterrupt
            return super().enqueue(*args, **kwargs)

    monkeypatch.setattr(vllm, "LLM", SmallLLM)
    return SmallLLM


def test_a_file_of_prompts_is_answered_as_by_generate_and_gone_on_with(tmp_path, small_engines, capsys):
    model, tokenizer = save_pair(tmp_path / "pair", fusion="add_shared", slim=True, prompt_format="w1 {prompt} w2")
    (tmp_path / "pair-llm").rename(tmp_path / "llm")
    texts = [TEXT, TEXT, "", *TEXTS[1:]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"id": text[:2], "prompt": text}) + "\n" for text in texts))
    argv = ["generate", "--engine", "vllm", "--model", str(tmp_path / "pair"), "--llm", str(tmp_path / "llm")]
    argv += ["--dtype", "float32", "--input", str(tmp_path / "p.jsonl"), "--batch-size", "4", "--max-new-tokens", "12"]

    def written(name, *more, code=None):
        assert cli.main([*argv, *more, "--output", str(tmp_path / name)]) == code
        if code is None:
            return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    def answer_to(text):
        if not text:
            return {"response": "", "finish_reason": None}
        ids = greedy(model, tokenizer(text)["input_ids"])
        reason = "stop" if ids[-1] == EOS else "length"
        return {"response": tokenizer.decode(ids, skip_special_tokens=True), "finish_reason": reason}

    assert written("greedy.jsonl") == [{"id": text[:2], "prompt": text, **answer_to(text)} for text in texts]
    assert "10 responses of " in capsys.readouterr().err
    sampling = ["--do-sample", "--temperature", "1.5", "--seed", "3"]
    whole = written("whole.jsonl", *sampling)
    assert whole[0]["response"] != whole[1]["response"]  # each prompt has its own seed
    small_engines.batches_left = 1
    written("cut.jsonl", *sampling, code=130)
    assert len((tmp_path / "cut.jsonl.part").read_text().splitlines()) == 4
    small_engines.batches_left = 100
    assert written("cut.jsonl", *sampling) == whole


def test_what_vllm_cannot_write_is_said_in_one_line(tmp_path, small_engines, capsys):
    save_pair(tmp_path / "pair", slim=True)
    save_pair(tmp_path / "other", slim=True, llm="gemma3")
    build_model("llama", "t5").save_pretrained(tmp_path / "t5")
    LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer()).save_pretrained(tmp_path / "t5")

    def error(*argv):
        assert cli.main(["generate", "--engine", "vllm", "--max-new-tokens", "4", "--model", *argv]) == 2
        captured = capsys.readouterr()
        assert not captured.out
        return captured.err.splitlines()[-1]

    pair = str(tmp_path / "pair")
    assert "this pair's is an encoder-decoder (t5)" in error(str(tmp_path / "t5"), "--prompt", "w1")
    assert "not an LLM-to-SLM checkpoint" in error(f"{pair}-llm", "--prompt", "w1")
    assert "There is no checkpoint" in error(f"{pair}-none", "--prompt", "w1")
    assert "frozen LLM could not be loaded" in error(pair, "--llm", f"{pair}-none", "--prompt", "w1")
    assert "is not the one" in error(pair, "--llm", str(tmp_path / "other-llm"), "--prompt", "w1")
    assert "top_p" in error(pair, "--do-sample", "--top-p", "3", "--prompt", "w1")
    assert "needs 65 positions, but the LLM (llama) has 64" in error(pair, "--prompt", "w1 " * 64)
    generation = json.loads((tmp_path / "pair" / "generation_config.json").read_text())
    (tmp_path / "pair" / "generation_config.json").write_text(json.dumps({**generation, "no_repeat_ngram_size": 2}))
    assert "`no_repeat_ngram_size` 2" in error(pair, "--prompt", "w1")


@pytest.mark.parametrize("slm, fusion", [("llama", "replace"), ("gemma3", "add_shared")])
def test_the_exported_slm_writes_to_encoded_prompts_in_a_stock_engine(tmp_path, slm, fusion):
    model, _ = save_pair(tmp_path / "pair", slm=slm, fusion=fusion)
    assert cli.main(["export", str(tmp_path / "pair"), "--slm", str(tmp_path / "slm")]) is None
    prompts = [ids.tolist() for ids in build_prompts((5, 9, 3, 40))]
    encoded = [model.encode_prompt(torch.tensor([ids])).prompt_embeds[0].detach() for ids in prompts]
    engine = vllm.LLM(str(tmp_path / "slm"), enable_prompt_embeds=True, distributed_executor_backend="uni", **SMALL)
    sampling = vllm.SamplingParams(**GREEDY)
    outputs = engine.generate([{"prompt_embeds": embeds} for embeds in encoded], sampling, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [greedy(model, ids) for ids in prompts]
    assert [output.outputs[0].text for output in outputs] == [
        build_slm_tokenizer().decode(greedy(model, ids), skip_special_tokens=True) for ids in prompts
    ]


# The one with n-grams last: vLLM starts no other engine in a process that has had one.
@pytest.mark.parametrize(
    "llm, slm, fusion, slim, options",
    [
        ("t5", "qwen2", "add_different", False, {}),
        ("gemma3", "gemma3", "add_shared", False, {}),
        ("llama", "llama", "replace", True, {"speculative_config": NGRAM}),
    ],
)
def test_greedy_tokens_equal_generate_and_a_repeated_prompt_runs_no_llm(tmp_path, llm, slm, fusion, slim, options):
    model, _ = save_pair(tmp_path / "pair", llm, slm, fusion, slim)
    prompts = [ids.tolist() for ids in build_prompts((5, 9, 3, 40, 20, 1, 9))]  # of which some are read in chunks
    engine = vllm.LLM(str(tmp_path / "pair"), distributed_executor_backend="uni", **SMALL, **options)
    (encoder,) = engine.apply_model(lambda model: model.encoder)
    assert not any("layers" in name or "lm_head" in name for name, _ in encoder.pair.slm.named_parameters())
    assert written(engine, prompts) == [greedy(model, ids) for ids in prompts]
    written(engine, prompts[:2])
    calls = []
    encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    assert written(engine, prompts[:2]) == [greedy(model, ids) for ids in prompts[:2]]
    assert not calls
    written(engine, [[7, 8, 9]])
    assert calls  # so they are counted


def test_two_processes_share_the_layers(tmp_path, monkeypatch):
    if ON_CPU:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core each
    model, _ = save_pair(tmp_path / "pair")
    prompts = [ids.tolist() for ids in build_prompts((5, 9, 3, 40))]
    engine = vllm.LLM(str(tmp_path / "pair"), tensor_parallel_size=2, block_size=32, **SMALL)
    try:
        assert written(engine, prompts) == [greedy(model, ids) for ids in prompts]
    finally:
        engine.llm_engine.engine_core.shutdown()


def test_a_quantized_slm_writes_nearly_as_before(tmp_path):
    model, _ = save_pair(tmp_path / "pair")
    ids = build_prompts((9,))[0]
    options = {"dtype": "bfloat16", "quantization": "fp8_per_channel", "distributed_executor_backend": "uni"}
    engine = vllm.LLM(str(tmp_path / "pair"), **{**SMALL, **options})
    parts = ("slm", "encoder")
    (dtypes,) = engine.apply_model(
        lambda model: {part: {weight.dtype for weight in getattr(model, part).parameters()} for part in parts}
    )
    assert torch.float8_e4m3fn in dtypes["slm"] and dtypes["encoder"] == {torch.bfloat16}
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    (output,) = engine.generate([{"prompt_token_ids": ids.tolist()}], sampling, use_tqdm=False)
    scores = {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
    start = torch.tensor([[model.config.decoder_start_token_id]])
    expected = model(ids[None], decoder_input_ids=start).logits[0, -1].log_softmax(dim=-1)
    torch.testing.assert_close(torch.tensor(list(scores.values())), expected[list(scores)], atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"speculative_config": DRAFT}, "Speculation by 'draft_model'"),
        ({"runner": "pooling"}, "has no embeddings and no scores"),
        ({"ec_transfer_config": DEBUGGING}, "would end this server"),
        ({"tokenizer_mode": "hf"}, "two tokenizers"),
        ({"skip_tokenizer_init": True}, "pass its tokenizers"),
        ({"enable_prompt_embeds": True}, "embeddings are made here"),
        (LANGUAGE_MODEL_ONLY, "Without its LLM"),
        ({"pipeline_parallel_size": 2}, "not split by layers"),
        ({"max_model_len": 100}, "max_model_len"),
        pytest.param(
            {"enable_lora": True}, "merge the adapter", marks=pytest.mark.skipif(not ON_CPU, reason="of CPUs alone")
        ),
    ],
)
def test_what_would_be_wrong_is_refused_at_start(tmp_path, options, message):
    save_pair(tmp_path / "pair")
    if "speculative_config" in options:
        AutoModelForCausalLM.from_config(slm_config("llama")).save_pretrained(tmp_path / "draft")
        options = {"speculative_config": {**DRAFT, "model": str(tmp_path / "draft")}}
    with pytest.raises(ValueError, match=message):
        EngineArgs(model=str(tmp_path / "pair"), **options).create_engine_config()


def test_an_encoder_decoder_slm_is_refused_at_start(tmp_path):
    build_model("llama", "t5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="decoder-only SLMs"):
        EngineArgs(model=str(tmp_path)).create_engine_config()


def test_greedy_is_the_default_and_the_length_is_what_the_slm_holds(tmp_path):
    save_pair(tmp_path / "pair", positions=128)
    config = EngineArgs(model=str(tmp_path / "pair")).create_engine_config().model_config
    assert config.get_diff_sampling_param() == {"temperature": 0.0}
    assert config.max_model_len == 128  # prompt and response; the LLM's 64 are the longest prompt's
    given = EngineArgs(model=str(tmp_path / "pair"), override_generation_config={"temperature": 0.7})
    assert given.create_engine_config().model_config.get_diff_sampling_param() == {"temperature": 0.7}


# ------------------------------------------------------------------------------------------------------------- servers
class Server:
    """A server in processes of its own."""

    def __init__(self, folder, log, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # What `vllm serve` calls; the command of the CPU build looks for a distribution called vllm.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        options = ["--served-model-name", "pair", "--host", "127.0.0.1", "--port", str(self.port)]
        small = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
        self.log = log
        self.process = subprocess.Popen(
            [*command, *options, *small, *arguments],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )

    def wait(self):
        end = time.monotonic() + 900  # on a busy machine
        while self.process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health")
                return self
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def post(self, path, **body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/{path}",
            json.dumps({"model": "pair", **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as response:
                text = response.read().decode()
                return response.status, text if body.get("stream") else json.loads(text)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, prompt, **body):
        status, answer = self.post("completions", prompt=prompt, **{"max_tokens": NEW_TOKENS, **body})
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def stop(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
            self.process.wait(60)


@contextmanager
def running(*servers):
    try:
        yield [server.wait() for server in servers]
    finally:
        for server in servers:
            server.stop()


ONE_MESSAGE = [{"role": "user", "content": TEXT}]
BAD_COMPLETIONS = {
    "ids above the LLM's": {"prompt": [5, WIDE_LLM_VOCAB]},
    "negative ids": {"prompt": [-1]},
    "no ids": {"prompt": []},
    "blank": {"prompt": "  "},
    "longer than the LLM reads": {"prompt": [5] * 65},
    "longer than the SLM holds": {"prompt": [5] * 500},
    "not a number": {"prompt": TEXT, "temperature": float("nan")},
    "beams": {"prompt": TEXT, "use_beam_search": True, "n": 2, "max_tokens": 4},
    "prompt logprobs": {"prompt": TEXT, "prompt_logprobs": 1},
    "echo with logprobs": {"prompt": TEXT, "echo": True, "logprobs": 1},
    "embeddings": {"prompt_embeds": "AAAA"},
}
BAD_CHATS = {
    "the assistant's": [{"role": "assistant", "content": TEXT}],
    "none": [],
    "an image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
}


def test_a_server_answers_as_generate_and_refuses_bad_requests_beside_good_ones(tmp_path):
    model, tokenizer = save_pair(tmp_path / "pair", prompt_format="w1 {prompt} w2", positions=128)
    expected = [greedy_text(model, tokenizer, text) for text in TEXTS]
    in_one_piece = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "128"]  # for the seeds
    server = Server(tmp_path / "pair", tmp_path / "log", *in_one_piece)
    with running(server), ThreadPoolExecutor(16) as threads:
        good = threads.map(server.complete, TEXTS)
        bad = [threads.submit(server.post, "completions", **body) for body in BAD_COMPLETIONS.values()]
        bad += [threads.submit(server.post, "chat/completions", messages=chat) for chat in BAD_CHATS.values()]
        assert list(good) == expected
        statuses = [answer.result()[0] for answer in bad]
        assert statuses == [400] * len(statuses), dict(zip([*BAD_COMPLETIONS, *BAD_CHATS], statuses, strict=True))

        before = [{"role": "user", "content": TEXTS[1]}, {"role": "assistant", "content": TEXTS[2]}]
        for messages in (ONE_MESSAGE, [*before, *ONE_MESSAGE]):  # trained on single texts, it reads the last
            chat = server.post("chat/completions", messages=messages, max_tokens=NEW_TOKENS)[1]
            assert chat["choices"][0]["message"]["content"] == expected[0]
        events = server.post("completions", prompt=TEXT, max_tokens=NEW_TOKENS, stream=True)[1].splitlines()
        parts = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
        assert "".join(part["choices"][0]["text"] for part in parts) == expected[0]

        ids = tokenizer(TEXT)["input_ids"]
        assert server.complete(ids) == expected[0]
        plain = tokenizer.decode(greedy(model, tokenizer.llm_tokenizer(TEXT)["input_ids"]), skip_special_tokens=True)
        in_format = server.complete(f"w1 {TEXT} w2", add_special_tokens=False)
        without_end = tokenizer.llm_tokenizer(f"w1 {TEXT} w2", add_special_tokens=False)["input_ids"]
        assert in_format == tokenizer.decode(greedy(model, without_end), skip_special_tokens=True)
        assert expected[0] != plain  # the format tells
        stop = expected[0][2:4]
        assert server.complete(TEXT, stop=[stop]) == expected[0][: expected[0].index(stop)]
        sampled = [server.complete(TEXT, temperature=1.0, seed=seed) for seed in (5, 5, 6, 7, 8)]
        assert sampled[0] == sampled[1] and len(set(sampled)) > 1
        logprobs = server.post("completions", prompt=TEXT, max_tokens=3, logprobs=2)[1]["choices"][0]["logprobs"]
        assert all(len(top) == 2 and max(top.values()) <= 0 for top in logprobs["top_logprobs"])
        assert server.complete(TEXT, structured_outputs={"regex": "[ab]{3}"}).strip("ab") == ""
        assert list(threads.map(server.complete, TEXTS)) == expected


def test_a_pair_trained_anew_in_its_folder_does_not_read_what_the_old_one_encoded(tmp_path):
    folder = {"shared_storage_path": str(tmp_path / "prompts")}
    transfer = {"ec_connector": PROMPT_FOLDER, "ec_role": "ec_both", "ec_connector_extra_config": folder}
    model, _ = save_pair(tmp_path / "pair")

    def connector():
        engine = EngineArgs(model=str(tmp_path / "pair"), ec_transfer_config=transfer)
        return ECConnectorFactory.create_connector(engine.create_engine_config(), ECConnectorRole.SCHEDULER)

    connector().save_caches({"hash": torch.ones(3, 8)}, "hash")
    assert connector().has_cache_item("hash")
    with torch.no_grad():
        model.projector.out.weight += 1
    model.save_pretrained(tmp_path / "pair")
    assert not connector().has_cache_item("hash")


def test_a_checkpoint_on_the_hub_is_told_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, old, new = tmp_path / "models--me--pair", "a" * 40, "b" * 40
    for commit in (old, new):
        save_pair(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(new)
    assert weights_id("me/pair") == new and weights_id("me/pair", old) == old
    one, other = (weights_id(str(repo / "snapshots" / commit)) for commit in (old, new))
    assert one == other != new  # folders of the same weights


def test_two_servers_encode_and_two_write_and_of_each_one_may_be_killed(tmp_path):
    model, tokenizer = save_pair(tmp_path / "pair", fusion="add_shared")
    (tmp_path / "prompts").mkdir()

    def server(name, role):
        folder = {"shared_storage_path": str(tmp_path / "prompts")}
        transfer = {"ec_connector": PROMPT_FOLDER, "ec_role": role, "ec_connector_extra_config": folder}
        return Server(tmp_path / "pair", tmp_path / name, "--ec-transfer-config", json.dumps(transfer))

    texts = [f"w{i} w{i + 9} w{7 * i % 50}" for i in range(32)]
    expected = [greedy_text(model, tokenizer, text) for text in texts]
    assert len(set(expected)) > 16  # a mixed-up answer shows
    encoders = [server(f"encoder {i}", "ec_producer") for i in range(2)]
    writers = [server(f"writer {i}", "ec_consumer") for i in range(2)]
    refused, answered = [], count(1)

    def ask(servers, number, text, **body):
        """As a client does: another server where one does not answer."""
        for one in (servers[number % 2], servers[(number + 1) % 2]):
            try:
                return one.complete(text, **body)
            except (OSError, HTTPException):
                refused.append(one)
        raise AssertionError(f"Nobody answers {text!r}.")

    def answer_to(number):
        ask(encoders, number, texts[number], max_tokens=1)
        answer = ask(writers, number, texts[number])
        done = next(answered)
        if done == 8:  # others are under way
            encoders[0].stop(signal.SIGKILL)
        elif done == 16:
            writers[0].stop(signal.SIGKILL)
        return answer

    with running(*encoders, *writers), ThreadPoolExecutor(4) as threads:
        status, answer = writers[0].post("completions", prompt=TEXT)
        assert status == 400 and "has not been encoded" in answer
        if ON_CPU:  # and prompts are read in parts here
            assert encoders[0].post("completions", prompt=TEXT, temperature=1.0, seed=1)[0] == 400
        assert list(threads.map(answer_to, range(32))) == expected
        assert {*refused} == {encoders[0], writers[0]}
        encoders[1].stop(signal.SIGKILL)  # what they have encoded is there
        assert list(threads.map(writers[1].complete, texts)) == expected
        assert writers[1].post("completions", prompt="w1 w1 w1 w1")[0] == 400
