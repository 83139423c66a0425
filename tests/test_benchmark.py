"""What is counted, predicted and measured of latencies: that figures are right, not how small they are."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    T5Config,
)

from llm2slm import LLM2SLMConfig
from llm2slm.benchmark import machine_speed
from llm2slm.benchmark.costs import costs_of
from llm2slm.benchmark.estimate import break_even, predict
from llm2slm.benchmark.machine_speed import MachineSpeed, time_calls
from llm2slm.benchmark.measure import TokenTimes
from llm2slm.benchmark.random_models import SIZES, load_config
from llm2slm.benchmark.report import describe_busy
from llm2slm.benchmark.runners import Workload, load_runners
from llm2slm.cli import main as cli

pytestmark = pytest.mark.usefixtures("quick_probe")

QUICK = ["--prompt-length", "4", "--response-length", "5", "--repeats", "2", "--device", "cpu", "--threads", "1"]
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


@pytest.fixture(autouse=True)
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_sizes(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny-llm", ("llama", LLAMA))
    monkeypatch.setitem(SIZES, "tiny-slm", ("llama", {**LLAMA, "num_hidden_layers": 1}))
    monkeypatch.setitem(SIZES, "tiny-t5", ("t5", {**T5, "decoder_start_token_id": 0}))


# -------------------------------------------------------------------------------------------------------------- costs
def test_a_decoder_only_model_reads_all_but_its_embeddings_for_a_token():
    config = LlamaConfig(**LLAMA, num_key_value_heads=2)
    model = LlamaForCausalLM(config)
    costs = costs_of(config)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    embeddings = model.get_input_embeddings().weight.numel()
    assert costs.parameters == sum(p.numel() for p in model.parameters())
    assert costs.token.weights == costs.parameters - norms - embeddings
    assert costs.prompt[0].weights == costs.token.weights - embeddings  # the head is as large
    # Keys and values of 2 of 4 heads of width 8, in 3 layers.
    assert costs.token_bytes(10, batch_size=2, bytes_per_number=4) == 4 * (
        costs.token.weights + 2 * 10 * 3 * 2 * 2 * 8
    )
    assert costs.token_flops(10, batch_size=2) == 2 * (2 * costs.token.weights + 4 * 10 * 3 * 4 * 8)


def test_a_model_without_attention_reads_no_cache():
    costs = costs_of(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    assert costs.token.weights > 64 * 32
    assert costs.token_bytes(1000, batch_size=2, bytes_per_number=4) == 4 * costs.token.weights


def test_counted_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="eager")).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(2, 9, dtype=torch.long), logits_to_keep=1)
    # The head's own step is counted with the context of the prompt, but has no attention of its own.
    # Transformers 4 computes the rotary angles as a product.
    assert costs_of(model.config).prompt_flops(9, batch_size=2) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_an_encoder_decoder_projects_the_prompt_for_its_cross_attention_once():
    config = T5Config(**T5, decoder_start_token_id=0)
    costs = costs_of(config)
    square = 32 * 32  # heads * d_kv is as wide as the model
    feed_forward = 2 * 32 * 48
    assert costs.prompt[0].weights == 2 * (4 * square + feed_forward) + 2 * (2 * square)
    assert costs.token.weights == 2 * (4 * square + 2 * square + feed_forward) + 64 * 32
    assert costs.encoder_decoder


def test_llm2slm_reads_the_prompt_with_both_and_writes_with_the_slm_alone():
    llm, slm = LlamaConfig(**LLAMA), LlamaConfig(**{**LLAMA, "num_hidden_layers": 1})
    costs, alone = costs_of(LLM2SLMConfig.from_sub_configs(llm, slm)), costs_of(slm)
    assert costs.token == alone.token
    assert costs.prompt_flops(8, 1) > costs_of(llm).prompt[0].flops(8, 8) + alone.prompt_flops(8, 1)
    shallower = costs_of(LLM2SLMConfig.from_sub_configs(llm, slm, llm_layer=1))
    assert shallower.prompt[0].layers == 1
    assert shallower.prompt_flops(8, 1) < costs.prompt_flops(8, 1)


@pytest.mark.parametrize(
    "name, millions", [("t5-large", 737.7), ("t5-small", 60.5), ("smollm2-135m", 134.5), ("llama-15m", 14.7)]
)
def test_shapes_have_the_size_of_what_they_are_named_after(name, millions):
    assert costs_of(load_config(name)).parameters / 1e6 == pytest.approx(millions, abs=0.06)


# --------------------------------------------------------------------------------------------------------- prediction
def test_a_prediction_adds_work_and_overheads_and_overlaps_them_on_a_gpu():
    costs = costs_of(LlamaConfig(**LLAMA))
    cpu = MachineSpeed(bandwidth=1e9, flops=1e12, layer_s=1e-3, token_s=5e-3, overlaps=False)
    figures = predict(costs, cpu, (4, 3), batch_size=1, bytes_per_number=4)
    limit_ms = 1e3 * costs.token_bytes(5, 1, 4) / 1e9
    assert figures["token_limit_ms"] == pytest.approx(limit_ms)
    assert figures["per_token_ms"] == pytest.approx(limit_ms + 3 * 1 + 5)
    assert figures["end_to_end_s"] == pytest.approx((figures["first_token_ms"] + 2 * figures["per_token_ms"]) / 1e3)
    gpu = MachineSpeed(bandwidth=1e9, flops=1e12, layer_s=1e-3, token_s=5e-3, overlaps=True)
    assert predict(costs, gpu, (4, 3), 1, 4)["per_token_ms"] == pytest.approx(8)


@pytest.mark.parametrize(
    "ours, other, length",
    [((10, 1), (5, 2), 7), ((5, 1), (5, 2), 1), ((10, 2), (5, 2), None), ((4, 3), (5, 2), None)],
)
def test_break_even_is_the_first_length_that_ends_earlier(ours, other, length):
    def end(figures, n):
        return figures[0] + (n - 1) * figures[1]

    named = [{"first_token_ms": first, "per_token_ms": token} for first, token in (ours, other)]
    assert break_even(*named) == length
    if length is not None and length > 1:
        assert end(ours, length) < end(other, length) and end(ours, length - 1) >= end(other, length - 1)


def test_estimate_predicts_from_configurations_alone(tiny_sizes, tmp_path, capsys):
    output = tmp_path / "estimate.json"
    argv = ["--llm", "tiny-llm", "--slm", "tiny-slm", "--llm-layer", "1", "2", "--device", "cpu", "--threads", "1"]
    assert cli.main(["estimate", *argv, "--output", str(output)]) is None
    report = json.loads(output.read_text())
    assert set(report["systems"]) == {"llm", "slm", "llm2slm"}
    assert report["machine"]["bandwidth"] > 1e6 and report["machine"]["flops"] > 1e6
    assert "Predicted:" in capsys.readouterr().out
    LlamaConfig(**LLAMA).save_pretrained(tmp_path / "config_only")  # as of a model on the Hub, without its weights
    assert load_config(str(tmp_path / "config_only")).hidden_size == 32


def test_estimate_of_a_model_that_is_not_there_is_one_line(capsys):
    assert cli.main(["estimate", "--llm", "./nowhere", "--slm", "llama-5m"]) == 2
    assert "./nowhere" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- a busy machine
class Calls:
    """Calls of given seconds, one after the other and over again, and the clocks that show them."""

    def __init__(self, seconds: list[float], running: float = 1.0):
        self.seconds, self.share, self.count = seconds, running, 0
        self.now = self.had_processor = 0.0

    def __call__(self):
        seconds = self.seconds[self.count % len(self.seconds)]
        self.count += 1
        self.now += seconds
        self.had_processor += seconds * self.share


@pytest.fixture
def timed(monkeypatch):
    monkeypatch.setattr(machine_speed, "SECONDS_EACH", 1.0)

    def time(calls: Calls, device="cpu"):
        return time_calls(calls, torch.device(device), lambda: calls.now, lambda: calls.had_processor)

    return time


def test_a_speed_is_that_of_the_fastest_tenth_measured_again_where_the_spread_is_wide(timed):
    quiet, busy = Calls([0.010, 0.011]), Calls([0.010] + 3 * [0.160])
    assert timed(quiet).seconds == pytest.approx(0.010)
    assert quiet.now == pytest.approx(1.0, abs=0.05)
    found = timed(busy)
    assert found.seconds == pytest.approx(0.010) and found.spread == pytest.approx(16)
    assert busy.now == pytest.approx(machine_speed.MAX_ROUNDS, abs=1)


def test_a_burst_of_others_is_outlasted(timed):
    calls = Calls(10 * [0.100] + 1000 * [0.010])
    found = timed(calls)
    assert found.seconds == pytest.approx(0.010) and found.spread == pytest.approx(1) and calls.now < 3


def test_waiting_for_a_processor_is_noticed_where_all_calls_are_alike(timed):
    calls = Calls([0.010], running=0.4)
    assert timed(calls).spread == pytest.approx(1) and timed(calls).running == pytest.approx(0.4)
    assert calls.now > 3
    few = Calls([5.0], running=0.4)
    timed(few)
    assert few.now == 9 * 5.0  # slow calls are few: one to warm up, five that are timed, one in each further round
    assert timed(Calls([0.010], running=0.4), "meta").running == 1.0  # another device computes


def test_reports_say_that_the_machine_was_busy():
    assert describe_busy({"spread": 1.2, "running": 0.97}) == [] and describe_busy({}) == []
    for speed in ({"spread": 16.0, "running": 1.0}, {"spread": 1.0, "running": 0.4}):
        (line,) = describe_busy(speed)
        assert "while the machine was busy: repeat when quiet" in line
        assert f"{speed['spread']:.1f} times" in line and f"{1 - speed['running']:.0%}" in line


@pytest.mark.parametrize("running", [1.0, 0.3])
def test_estimate_and_benchmark_print_and_record_how_busy_the_machine_was(
    tiny_sizes, tmp_path, capsys, monkeypatch, running
):
    monkeypatch.setattr(machine_speed, "time_calls", lambda call, device: machine_speed.Timing(0.01, 1.1, running))
    pair = ["--llm", "tiny-llm", "--slm", "tiny-slm", "--device", "cpu"]
    assert cli.main(["estimate", *pair, "--output", str(tmp_path / "estimate.json")]) is None
    assert cli.main(["benchmark", *pair, *QUICK, "--output", str(tmp_path / "benchmark.json")]) is None
    assert capsys.readouterr().out.count("while the machine was busy") == (2 if running < 1 else 0)
    for name, part in (("estimate", "machine"), ("benchmark", "probe")):
        speed = json.loads((tmp_path / f"{name}.json").read_text())[part]
        assert (speed["spread"], speed["running"]) == (1.1, running)


# ---------------------------------------------------------------------------------------------------------- benchmark
def test_benchmark_reports_every_figure_and_draws_it(tiny_sizes, tmp_path, capsys):
    output, plot = tmp_path / "report.json", tmp_path / "latency.png"
    argv = ["benchmark", "--llm", "tiny-llm", "--slm", "tiny-slm", "--batch-size", "2", *QUICK]
    names = ["slm", "llm2slm", "beams", "fast_beams", "reuse", "llm"]
    argv += ["--num-beams", "3"]
    assert cli.main([*argv, "--systems", *names, "--output", str(output), "--plot", str(plot)]) is None
    report = json.loads(output.read_text())
    assert [system["name"] for system in report["systems"]] == names
    for system in report["systems"]:
        for figure in ("first_token_ms", "per_token_ms", "tokens_per_second", "end_to_end_s"):
            values = system["runs"][figure]
            assert len(values) == 2 and min(values) > 0
            assert system[figure]["min"] <= system[figure]["median"] <= system[figure]["max"]
        assert len(system["token_s"]) == 5 and system["token_s"] == sorted(system["token_s"])
        run = {name: values[0] for name, values in system["runs"].items()}
        assert 1000 * run["end_to_end_s"] == pytest.approx(run["first_token_ms"] + 4 * run["per_token_ms"])
        assert run["tokens_per_second"] == pytest.approx(2 * 5 / run["end_to_end_s"])
    by_name = {system["name"]: system for system in report["systems"]}
    ratio = report["ratios"]["end_to_end_llm_to_llm2slm"]
    pairs = zip(by_name["llm"]["runs"]["end_to_end_s"], by_name["llm2slm"]["runs"]["end_to_end_s"], strict=True)
    assert sorted(ratio.values()) == pytest.approx(sorted([*(a / b for a, b in pairs), ratio["median"]]))
    assert by_name["llm"]["predicted"]["token_limit_ms"] > 0 and by_name["reuse"]["predicted"] is None
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| llm2slm |" in capsys.readouterr().out


def test_lossless_and_assisted_write_what_the_llm_writes(tiny_sizes, tmp_path, capsys):
    argv = ["benchmark", "--llm", "tiny-llm", "--slm", "tiny-slm", "--assistant", "tiny-slm", *QUICK]
    output = tmp_path / "report.json"
    assert cli.main([*argv, "--systems", "llm", "lossless", "assisted", "--output", str(output)]) is None
    lossless = json.loads(output.read_text())["systems"][1]
    assert 0 <= lossless["acceptance_rate"] <= 1 and lossless["llm_calls"] >= 1
    assert "calls of the LLM" in capsys.readouterr().out


@pytest.mark.parametrize("pair", [("tiny-llm", "tiny-slm"), ("tiny-t5", "tiny-slm"), ("tiny-llm", "tiny-t5")])
def test_every_system_announces_each_token_it_writes(pair, tiny_sizes):
    systems = ["slm", "llm2slm", "llm", "reuse"]
    if "tiny-t5" not in pair:
        systems.append("lossless")
    work = Workload(
        prompt_length=6, response_length=5, batch_size=1, num_beams=1, dtype="float32", device=torch.device("cpu")
    )
    for runner in load_runners(systems, work, None, *pair, revision=None, assistant=None, gguf=None):
        tokens = TokenTimes()
        # An encoder-decoder's start token is counted, and a decoder-only model announces its prompt first.
        assert runner.generate(5, tokens) - 5 in (0, 1)
        assert len(tokens.times) - 5 in (0, 1)


def test_benchmark_of_a_t5_pair(tiny_sizes, capsys):
    argv = ["benchmark", "--llm", "tiny-t5", "--slm", "tiny-t5", *QUICK]
    assert cli.main(argv) is None
    assert "| llm |" in capsys.readouterr().out


def test_benchmark_of_saved_models_draws_quality_against_speed(tmp_path):
    for name, auto_class, config in (
        ("llm", AutoModelForCausalLM, LlamaConfig(**LLAMA)),
        ("slm", AutoModelForSeq2SeqLM, T5Config(**T5, decoder_start_token_id=0)),
    ):
        auto_class.from_config(config).save_pretrained(tmp_path / name)
    report = tmp_path / "evaluation.json"
    report.write_text(json.dumps({"system": "ours", "scores": {"chrf": {"score": 50.0, "low": 48.0, "high": 52.0}}}))
    plot = tmp_path / "quality.png"
    argv = ["benchmark", "--llm", str(tmp_path / "llm"), "--slm", str(tmp_path / "slm"), "--dtype", "bfloat16", *QUICK]
    assert cli.main([*argv, "--quality", f"llm2slm={report}", f"llm={report}", "--quality-plot", str(plot)]) is None
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_ctranslate2_is_given_is_the_llm(tiny_sizes, tmp_path):
    pytest.importorskip("ctranslate2", reason="an optional extra: pip install ctranslate2")
    argv = ["benchmark", "--llm", "tiny-t5", "--slm", "tiny-t5", "--systems", "llm", "ctranslate2", *QUICK]
    output = tmp_path / "report.json"
    assert cli.main([*argv, "--output", str(output)]) is None
    assert json.loads(output.read_text())["systems"][1]["parameters"] == costs_of(load_config("tiny-t5")).parameters


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--llm", "t5-small"], "--model"),
        (["--model", "x", "--slm", "llama-5m"], "leave out --slm"),
        (["--llm", "llama-5m", "--slm", "llama-5m", "--response-length", "1"], "--response-length"),
        (["--llm", "llama-5m", "--slm", "llama-5m", "--prompt-length", "5000"], "positions"),
        (["--llm", "llama-5m", "--slm", "llama-5m", "--systems", "assisted"], "--assistant"),
        (["--llm", "llama-5m", "--slm", "llama-5m", "--systems", "lossless", "--batch-size", "2"], "--batch-size 1"),
        (["--llm", "llama-5m", "--slm", "llama-5m", "--quality", "report.json"], "SYSTEM=REPORT"),
    ],
)
def test_bad_options_are_one_line(argv, message, capsys):
    assert cli.main(["benchmark", *argv, "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("llm2slm benchmark: error:")]) == 1
    assert message in error[-1]
