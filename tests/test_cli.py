"""Every command end to end on a tiny checkpoint, its help, and one line for each kind of bad input."""

import argparse
import dataclasses
import importlib
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import run_fresh
from pyarrow import parquet, table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import llm2slm
from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.benchmark.random_models import SIZES
from llm2slm.cli import generate
from llm2slm.cli import main as cli
from llm2slm.cli.options import option, read_recipe
from llm2slm.language_models import end_tokens, load_checkpoint, response_limit, set_generation, write_responses
from llm2slm.serving import offline, vllm_offline

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w3 w3", "w2 w1"]
VOCAB_SIZE = 60


def build_tokenizer(letter: str) -> PreTrainedTokenizerFast:
    vocab = [*SPECIAL.values(), *(f"{letter}{i}" for i in range(VOCAB_SIZE - 4))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def build_llama(**kwargs) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **kwargs,
    )
    return LlamaForCausalLM(config).eval()


def build_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """A slim checkpoint with each kind of SLM, their LLM, and another LLM."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_tokenizer("w"), build_tokenizer("v"))
    for name in ("llm", "other_llm"):
        build_llama(hidden_size=40).save_pretrained(folder / name)
        build_tokenizer("w").save_pretrained(folder / name)
    for name, slm in (("llama", build_llama(hidden_size=32)), ("t5", build_t5())):
        for parameter in slm.parameters():  # else a random model repeats one token
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(str(folder / "llm"), slm, llm_layer=1)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("llm", "other_llm", "llama", "t5")}


@pytest.fixture(params=["llama", "t5"])
def checkpoint(checkpoints, request) -> str:
    return checkpoints[request.param]


def expected_responses(checkpoint: str, prompts: list[str], **kwargs) -> list[str]:
    model = LLM2SLMForConditionalGeneration.from_pretrained(checkpoint)
    tokenizer = LLM2SLMTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    return tokenizer.batch_decode(model.generate(**inputs, **kwargs), skip_special_tokens=True)


def assert_one_line_error(capsys, argv: list[str], *fragments: str):
    """The error is the last thing on stderr, after at most what Transformers itself reports while it loads."""
    code = cli.main(argv)
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and "Traceback" not in captured.err
    *_, last = captured.err.rstrip("\n").split("\n")
    assert last.startswith(f"llm2slm {argv[0]}: error: "), captured.err
    for fragment in fragments:
        assert fragment in last


# ------------------------------------------------------------------------------------------------------- the command
def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    output = capsys.readouterr().out
    assert f"usage: llm2slm {command}" in output and "--config" in output


QUICK_HELP = [["--help"], ["-h"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)]


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("argv", QUICK_HELP, ids=" ".join)
def test_help_needs_neither_torch_nor_transformers(argv):
    # As the installed script does.
    code = f"""
import sys
from llm2slm_command import main
sys.argv = ["llm2slm", *{argv!r}]
try:
    main()
finally:
    assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "llm2slm" in result.stdout


FIRST = ["import llm2slm", "from llm2slm.data import pairs", "import transformers, llm2slm"]


def test_everywhere_else_importing_the_package_registers_the_auto_classes():
    # Whatever the process was called with. Each is a child of one process that imported only what all of them need.
    code = f"""
import os, sys
import huggingface_hub, safetensors, tokenizers, torch
sys.argv = ["/somewhere/bin/llm2slm", "--help"]
for first in {FIRST!r}:
    assert not {{"llm2slm", "transformers"}} & set(sys.modules)
    if os.fork() == 0:
        break
    assert os.wait()[1] == 0, first
else:
    sys.exit()
exec(first)
from transformers import AutoConfig, AutoModelForSeq2SeqLM
import llm2slm
assert AutoConfig.for_model("llm2slm").model_type == "llm2slm"
assert llm2slm.LLM2SLMConfig in AutoModelForSeq2SeqLM._model_mapping
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_public_names_are_found_when_they_are_used():
    assert set(llm2slm.__all__) <= set(dir(llm2slm))
    assert all(getattr(llm2slm, name).__name__ == name for name in llm2slm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LLM3SLM'"):
        _ = llm2slm.LLM3SLM


OPTIONAL = ["datasets", "gguf", "matplotlib", "peft", "rouge_score", "sacrebleu", "starlette", "trl", "uvicorn"]
TRAIN = "pip install 'llm-to-slm[train]'"
LOADING = """
from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
import llm2slm.language_models, llm2slm.building
"""
HELP = f"""
from llm2slm.cli.main import main
for command in {[*cli.COMMANDS]!r}:
    try:
        main([command, "--help"])
    except SystemExit as exit:
        assert exit.code == 0
"""
# Each on data and models that are not there: nothing was looked for yet.
NO_MODELS = ["--llm", "./none", "--slm", "./none"]
COMMANDS_WITHOUT = [
    (["train", "--data", "./none", *NO_MODELS, "--output-dir", "run"], TRAIN),
    (["evaluate", "--model", "./none", "--data", "./none", "--output", "none.json"], TRAIN),
    (["label", "--llm", "./none", "--data", "./none", "--output", "none"], TRAIN),
    (["benchmark", *NO_MODELS, "--plot", "none.png"], TRAIN),
    (["benchmark", *NO_MODELS, "--quality-plot", "none.png"], TRAIN),
    (["benchmark", *NO_MODELS, "--systems", "ctranslate2"], "pip install ctranslate2"),
    (["benchmark", *NO_MODELS, "--systems", "llama.cpp"], "pip install llama-cpp-python"),
    (["serve", "./none"], "pip install 'llm-to-slm[serve]'"),
    (["race", "./none"], "pip install 'llm-to-slm[race]'"),
    (["generate", "--model", "./none", "--prompt", "w1", "--engine", "vllm"], "pip install 'llm-to-slm[vllm]'"),
    (["generate", "--model", "./none", "--prompt", "w1", "--output", "none.parquet"], "pip install pyarrow"),
]
COMMANDS = f"""
import os
from llm2slm.cli.main import main
for argv in {[argv for argv, _ in COMMANDS_WITHOUT]!r}:
    assert main(argv) == 2
assert not os.path.exists("run")
"""
FUNCTIONS_WITHOUT = [
    ("from llm2slm import DataCollatorForLLM2SLM", TRAIN),
    ("from llm2slm import load_pairs", TRAIN),
    ("import llm2slm.training.run", TRAIN),
    ("from llm2slm.evaluation.metrics import score_texts; score_texts('chrf', ['a'], ['a'])", TRAIN),
    ("from llm2slm.benchmark.report import plot_latencies; plot_latencies({}, 'none.png')", TRAIN),
    ("from llm2slm.language_models import load_model; load_model('adapter')", "pip install 'llm-to-slm[peft]'"),
    ("from llm2slm.benchmark.estimate import estimate; estimate('llm.gguf', 'llm.gguf')", "pip install gguf"),
    ("from llm2slm import LLM2SLMTokenizer as T; T.from_tokenizers('llm.gguf', 'llm.gguf')", "pip install gguf"),
]
FUNCTIONS = f"""
for code in {[code for code, _ in FUNCTIONS_WITHOUT]!r}:
    try:
        exec(code)
    except ImportError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def without_packages(tmp_path_factory):
    """What some codes wrote in a process of their own, in which no optional package can be imported."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "llm.gguf").touch()
    codes = {"loading": LOADING, "help": HELP, "commands": COMMANDS, "functions": FUNCTIONS}
    missing = [*OPTIONAL, "ctranslate2", "gradio", "llama_cpp", "pyarrow", "vllm"]
    found = run_fresh(codes, f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))", cwd=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "llm.gguf"]
    return found


one_process = pytest.mark.xdist_group("without_packages")


@one_process
def test_loading_and_generating_do_without_the_packages_of_training(without_packages):
    assert without_packages["loading"][-1] is None, without_packages["loading"][-1]


@one_process
def test_help_of_each_command_needs_no_optional_package(without_packages):
    out, _, error = without_packages["help"]
    assert error is None, error
    assert all("usage: " in out and f" {command} [-h]" in out for command in cli.COMMANDS)


@one_process
def test_a_missing_package_is_said_first_with_the_line_that_installs_it(without_packages):
    _, err, error = without_packages["commands"]
    assert error is None, error
    errors = [line for line in err.splitlines() if ": error: " in line]
    for (argv, line), said in zip(COMMANDS_WITHOUT, errors, strict=True):
        assert said.startswith(f"llm2slm {argv[0]}: error: ") and said.endswith(f", not installed here: {line}"), said


@one_process
def test_a_function_whose_package_is_missing_names_what_installs_it(without_packages):
    out, _, error = without_packages["functions"]
    assert error is None, error
    for (code, line), said in zip(FUNCTIONS_WITHOUT, out.splitlines(), strict=True):
        assert said.endswith(f": {line}"), f"{code}: {said}"


def test_module_is_the_command():
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    argv = [sys.executable, "-m", "llm2slm.cli", "benchmark"]
    result = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.strip().endswith("error: Say what to measure: --model CHECKPOINT, or both --llm and --slm.")


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["generate"], ["generate", "--model", "x", "--batch-size", "0"], ["generate", "--oops"]]
)
def test_bad_option_exits_with_2_and_usage(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv)
    assert exit_info.value.code == 2
    assert "usage: llm2slm" in capsys.readouterr().err


def test_interrupt_is_quiet(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", interrupted)
    assert cli.main(["generate", "--model", "x"]) == 130
    assert capsys.readouterr() == ("", "")


def test_traceback_can_be_asked_for(tmp_path):
    with pytest.raises(OSError, match="no folder"):
        cli.main(["--traceback", "generate", "--model", str(tmp_path / "none"), "--prompt", "w1"])


def test_recipe_holds_options_and_command_line_overrides_them(checkpoints, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {checkpoints['llama']}\nprompt: [w1 w2 w3, w4]\nmax_new_tokens: 3\ndo_sample: false\nseed: null\n"
    )
    assert cli.main(["generate", "--config", str(recipe), "--max-new-tokens", "5"]) is None
    expected = expected_responses(checkpoints["llama"], ["w1 w2 w3", "w4"], max_new_tokens=5)
    assert capsys.readouterr().out.splitlines() == expected


def test_a_list_at_the_end_of_a_recipe_leaves_the_checkpoint_alone(tmp_path, capsys):
    (tmp_path / "race.yaml").write_text("systems: [llm, fast]\n")
    argv = ["race", "./none", "--config", str(tmp_path / "race.yaml")]
    assert_one_line_error(capsys, argv, "There is no folder './none'")


def test_a_recipe_is_named_in_full_and_once(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("prompt: [w1]\n")
    argv = ["generate", "--model", "./none"]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*argv, "--conf", str(tmp_path / "recipe.yaml")])
    assert "unrecognized arguments: --conf" in capsys.readouterr().err
    argv += 2 * ["--config", str(tmp_path / "recipe.yaml")]
    assert_one_line_error(capsys, argv, "--config takes one recipe, and there are 2")


@pytest.mark.parametrize("text, message", [("- a\n", "must hold options"), ("a: [\n", "is not YAML")])
def test_bad_recipe_is_one_line(text, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert_one_line_error(capsys, ["generate", "--config", str(recipe)], message)


@pytest.mark.parametrize(
    "name, nearest",
    [("max_tokens", "max_new_tokens"), ("sed", "seed"), ("num-beam", "num_beams"), ("config", "config")],
)
def test_unknown_option_in_a_recipe_is_named_with_the_nearest(name, nearest, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: x\n{name}: 3\n")
    message = f"generate has no option '{name}'" + (f"; the nearest is '{nearest}'." if name != "config" else "")
    assert_one_line_error(capsys, ["generate", "--config", str(recipe)], message)


@dataclass
class EveryKind:
    """Options of every kind."""

    some_rate: float = option("a number", 1.0)
    layers: list[int] | None = option("several", None)
    strategy: Literal["no", "steps"] = option("a choice", "steps")
    shuffle: bool | None = option("on, off or neither", None)
    quiet: bool = option("off unless asked for", False)
    bf16: bool = option("on unless asked not to", True)
    size: int = option("a size", 1, at_least=1)
    text: str = option("a text, 100% as it is", "default")


def options_given(monkeypatch, *argv: str) -> EveryKind:
    """What a command with every kind of option gets."""
    seen = []
    add_command(monkeypatch, "kinds", EveryKind, seen.append)
    assert cli.main(["kinds", *argv]) is None
    return seen[0]


def add_command(monkeypatch, name: str, options: type, run) -> None:
    module = types.ModuleType(f"llm2slm.cli.{name}")
    module.Options, module.run = options, run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, name, "do something")


@pytest.mark.parametrize(
    "argv, name, value",
    [
        ([], "some_rate", 1.0),
        (["--some-rate", "2"], "some_rate", 2.0),
        (["--some_rate=2"], "some_rate", 2.0),
        (["--layers", "1", "-2"], "layers", [1, -2]),
        (["--strategy", "no"], "strategy", "no"),
        ([], "shuffle", None),
        (["--shuffle"], "shuffle", True),
        (["--no-shuffle"], "shuffle", False),
        (["--quiet"], "quiet", True),
        (["--quiet", "no"], "quiet", False),
        (["--no_bf16"], "bf16", False),
        (["--text=a_b=c_d"], "text", "a_b=c_d"),
    ],
)
def test_options_are_those_of_the_dataclass(argv, name, value, monkeypatch):
    assert getattr(options_given(monkeypatch, *argv), name) == value


def test_help_shows_each_option_once_with_its_default(monkeypatch, capsys):
    add_command(monkeypatch, "kinds", EveryKind, print)
    with pytest.raises(SystemExit):
        cli.main(["kinds", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--some-rate X a number (default: 1.0)" in text and "--some_rate" not in text
    assert "a text, 100% as it is (default: default)" in text
    assert "--strategy {no,steps} a choice (default: steps)" in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--size", "0"], "must be a whole number from 1, got '0'"),
        (["--quiet", "maybe"], "must be yes or no, got 'maybe'"),
        (["--strategy", "x"], "invalid choice: 'x'"),
    ],
)
def test_a_bad_value_is_named(argv, message, monkeypatch, capsys):
    add_command(monkeypatch, "kinds", EveryKind, print)
    with pytest.raises(SystemExit):
        cli.main(["kinds", *argv])
    assert message in capsys.readouterr().err


LIBRARY = {
    "evaluate": ("llm2slm.evaluation.run", "evaluate"),
    "label": ("llm2slm.evaluation.labelling", "label"),
    "estimate": ("llm2slm.benchmark.estimate", "estimate"),
    "benchmark": ("llm2slm.benchmark.measure", "benchmark"),
    "card": ("llm2slm.sharing.card", "write_card"),
    "push": ("llm2slm.sharing.upload", "push"),
}


@pytest.mark.parametrize("command", LIBRARY)
def test_a_command_has_the_arguments_and_defaults_of_its_function(command):
    module, name = LIBRARY[command]
    arguments = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    fields = {f.name: f for f in dataclasses.fields(importlib.import_module(f"llm2slm.cli.{command}").Options)}
    assert set(fields) - {"compare", "show", "space"} == set(arguments)
    for name, argument in arguments.items():
        default = fields[name].default
        if fields[name].default_factory is not dataclasses.MISSING:
            default = tuple(fields[name].default_factory())
        if argument.default is not inspect.Parameter.empty:
            assert default == argument.default, name
        elif command != "evaluate" and (command, name) != ("push", "run"):  # left out with --space
            assert default is dataclasses.MISSING, name


def recipe_value(text, name, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(text)
    return getattr(options_given(monkeypatch, "--config", str(tmp_path / "recipe.yaml")), name)


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("some_rate: 2e-3", "some_rate", 0.002),  # a string in YAML
        ("some-rate: 0.5", "some_rate", 0.5),
        ("layers: [0, -1]", "layers", [0, -1]),
        ("strategy: no", "strategy", "no"),  # a boolean in YAML
        ("shuffle: true", "shuffle", True),
        ("shuffle: false", "shuffle", False),
        ("quiet: true", "quiet", True),
        ("quiet: false", "quiet", False),
        ("bf16: true", "bf16", True),
        ("bf16: false", "bf16", False),
        ('text: "{prompt}\\n"', "text", "{prompt}\n"),
        ("text: null", "text", "default"),
        ('text: "--quiet"', "text", "--quiet"),
    ],
)
def test_recipes_have_types(text, name, value, tmp_path, monkeypatch):
    assert recipe_value(text, name, tmp_path, monkeypatch) == value


def test_a_recipe_holds_objects_for_options_that_take_json(tmp_path):
    parser = argparse.ArgumentParser()
    parser.add_argument("--more", type=json.loads)
    (tmp_path / "recipe.yaml").write_text("more: {a: 1, b: [x]}")
    arguments = read_recipe(str(tmp_path / "recipe.yaml"), "kinds", parser)
    assert parser.parse_args(arguments).more == {"a": 1, "b": ["x"]}


# ---------------------------------------------------------------------------------------------------------- generate
def test_generate_writes_what_model_generate_does(checkpoint, capsys):
    assert cli.main(["generate", "--model", checkpoint, "--max-new-tokens", "8", "--prompt", *PROMPTS]) is None
    expected = expected_responses(checkpoint, PROMPTS, max_new_tokens=8)
    assert len(set(expected)) > 1  # they say something
    assert capsys.readouterr().out.splitlines() == expected


def test_generate_streams_the_same_text(checkpoint, capsys):
    assert (
        cli.main(["generate", "--model", checkpoint, "--max-new-tokens", "8", "--stream", "--prompt", *PROMPTS])
        is None
    )
    expected = expected_responses(checkpoint, PROMPTS, max_new_tokens=8)
    assert capsys.readouterr().out.splitlines() == expected


def test_generate_from_lines_to_jsonl_in_batches(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    output = tmp_path / "responses.jsonl"
    argv = ["generate", "--model", checkpoint, "--input", str(tmp_path / "prompts.txt"), "--output", str(output)]
    assert cli.main([*argv, "--max-new-tokens", "8", "--num-beams", "2", "--batch-size", "2"]) is None
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["response"] for row in rows] == expected_responses(checkpoint, PROMPTS, max_new_tokens=8, num_beams=2)
    captured = capsys.readouterr()
    assert captured.out == "" and "5/5" in captured.err  # the progress bar
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "responses.jsonl"]


def test_generate_keeps_the_other_columns_of_jsonl(checkpoints, tmp_path):
    rows = [{"id": 7, "prompt": "w1 w2"}, {"id": 8, "prompt": "w3"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "responses.jsonl"
    argv = ["generate", "--model", checkpoints["llama"], "--input", str(tmp_path / "prompts.jsonl")]
    assert cli.main([*argv, "--output", str(output), "--max-new-tokens", "2"]) is None
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{"id": row["id"], "prompt": row["prompt"]} for row in written] == rows


def test_generate_reads_standard_input(checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w1 w2 w3\nw4")))
    assert cli.main(["generate", "--model", checkpoints["llama"], "--max-new-tokens", "4"]) is None
    expected = expected_responses(checkpoints["llama"], ["w1 w2 w3", "w4"], max_new_tokens=4)
    assert capsys.readouterr().out.splitlines() == expected


def test_generate_puts_prompts_into_the_form_and_writes_as_the_checkpoint_says(checkpoint, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(checkpoint, own)
    tokenizer = LLM2SLMTokenizer.from_pretrained(own)
    tokenizer.prompt_format = "{prompt} w3"
    tokenizer.save_pretrained(own)
    settings = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps(settings | {"max_length": 9, "num_beams": 3}))

    def written(*options):
        assert cli.main(["generate", "--model", str(own), "--prompt", "w1 w2", *options]) is None
        return capsys.readouterr().out.splitlines()

    assert written() == expected_responses(checkpoint, ["w1 w2 w3"], max_length=9, num_beams=3)
    greedy = expected_responses(checkpoint, ["w1 w2 w3"], max_new_tokens=5)
    assert written("--max-new-tokens", "5", "--num-beams", "1") == greedy
    assert written("--max-new-tokens", "5", "--stream") == greedy  # beams cannot be shown
    assert len(written("--do-sample", "--seed", "1")) == 1


def test_generate_writes_up_to_128_tokens_where_the_checkpoint_says_no_length(checkpoints, capsys):
    argv = ["generate", "--model", checkpoints["t5"], "--prompt", "w1 w2 w3"]
    assert cli.main(argv) is None
    assert capsys.readouterr().out.splitlines() == expected_responses(
        checkpoints["t5"], ["w1 w2 w3"], max_new_tokens=128
    )


def test_same_seed_same_samples(checkpoints, capsys):
    argv = ["generate", "--model", checkpoints["llama"], "--do-sample", "--temperature", "2", "--top-p", "0.9"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert cli.main([*argv, "--max-new-tokens", "8", "--prompt", "w1 w2", "--seed", seed]) is None
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_prompt_max_length_cuts_the_prompt(checkpoints, capsys):
    argv = ["generate", "--model", checkpoints["llama"], "--max-new-tokens", "4", "--prompt-max-length", "2"]
    assert cli.main([*argv, "--prompt", "w1 w2 w3 w4"]) is None
    assert capsys.readouterr().out.splitlines() == expected_responses(
        checkpoints["llama"], ["w1 w2"], max_new_tokens=4
    )


def test_code_in_the_checkpoint_is_not_run(checkpoints, tmp_path, capsys):
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["llama"], copy)
    code = list(copy.glob("*.py"))
    assert code and "auto_map" in json.loads((copy / "config.json").read_text())
    for path in code:
        path.write_text("raise RuntimeError('run')")
    assert cli.main(["generate", "--model", str(copy), "--max-new-tokens", "2", "--prompt", "w1"]) is None


def test_output_is_never_overwritten(checkpoints, tmp_path, capsys):
    output = tmp_path / "kept.jsonl"
    output.write_text("kept")
    argv = ["--model", checkpoints["llama"], "--output", str(output)]
    assert_one_line_error(capsys, ["generate", *argv, "--prompt", "w1"], "kept.jsonl exists")
    assert_one_line_error(capsys, ["benchmark", *argv], "kept.jsonl exists")
    assert output.read_text() == "kept"


def interrupted_run(argv: list[str], batches: int, monkeypatch) -> None:
    """`llm2slm generate`, stopped by Ctrl-C before it writes one batch more."""
    left, generate_batch = [batches], offline.generate_batch

    def stops(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return generate_batch(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(offline, "generate_batch", stops)
        assert cli.main(argv) == 130


@pytest.mark.parametrize(
    "more", [[], ["--do-sample", "--seed", "3"], ["--stream"]], ids=["greedy", "sampled", "stream"]
)
def test_an_interrupted_output_is_gone_on_with(more, checkpoints, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("\n".join(["w1", "", *PROMPTS]) + "\n")
    argv = ["generate", "--model", checkpoints["llama"], "--input", str(tmp_path / "p.txt"), "--batch-size", "2"]
    argv += ["--max-new-tokens", "4", *more]
    whole, output, part = (tmp_path / name for name in ("whole.jsonl", "cut.jsonl", "cut.jsonl.part"))
    assert cli.main([*argv, "--output", str(whole)]) is None
    argv += ["--output", str(output)]
    interrupted_run(argv, 2, monkeypatch)
    assert f"goes on from {part}" in capsys.readouterr().err
    kept = part.read_bytes()
    assert 0 < len(kept) < len(whole.read_bytes()) and whole.read_bytes().startswith(kept)
    part.write_bytes(kept[:-5])  # as a kill in the middle of writing leaves it
    assert cli.main(argv) is None
    assert output.read_bytes() == whole.read_bytes()
    assert f"Going on with {part}: 2 prompts" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl", "p.txt", "whole.jsonl"]


def test_parquet_is_read_and_written_row_by_row_and_gone_on_with(checkpoints, tmp_path, monkeypatch):
    rows = [{"id": i, "tags": ["a"] * i, "prompt": text} for i, text in enumerate(["w1 w2", "", "w3", "w4 w5"])]
    rows[3]["2024-01-02"] = "2024-01-02"  # a text, and no date; only one row has it
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["generate", "--model", checkpoints["llama"], "--max-new-tokens", "4", "--batch-size", "1"]

    def written(read: str, write: str, *, in_two: bool = False) -> list[dict]:
        more = [*argv, "--input", str(tmp_path / read), "--output", str(tmp_path / write)]
        if in_two:
            interrupted_run(more, 2, monkeypatch)
        assert cli.main(more) is None
        if write.endswith(".parquet"):
            return parquet.read_table(tmp_path / write).to_pylist()
        return [json.loads(line) for line in (tmp_path / write).read_text().splitlines()]

    plain = written("p.jsonl", "r.jsonl")
    assert [row["finish_reason"] is None for row in plain] == [False, True, False, False]
    with_all = [{"id": None, "tags": None, "prompt": None, "2024-01-02": None, **row} for row in plain]
    assert written("p.jsonl", "r.parquet", in_two=True) == with_all
    prompts = parquet.read_table(tmp_path / "r.parquet").drop_columns(["response", "finish_reason"])
    parquet.write_table(prompts, tmp_path / "p.parquet")
    assert written("p.parquet", "again.jsonl") == with_all
    assert not list(tmp_path.glob("*.part*"))


def test_columns_that_do_not_go_into_parquet_are_said_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1", "id": 1}\n{"prompt": "w2", "id": "x"}\n')
    argv = ["generate", "--model", str(tmp_path), "--input", str(tmp_path / "p.jsonl")]  # a folder without a model
    assert_one_line_error(capsys, [*argv, "--output", str(tmp_path / "r.parquet")], "one type a column")
    parquet.write_table(table({"prompt": ["w1"], "day": [date(2024, 1, 2)]}), tmp_path / "p.parquet")
    argv[-1] = str(tmp_path / "p.parquet")
    assert_one_line_error(capsys, argv, "row 1: a column is not what JSON has", "date")
    (tmp_path / "p.parquet").write_text("prompt")
    assert_one_line_error(capsys, argv, "p.parquet is not Parquet")


def test_an_unfinished_output_with_other_prompts_or_settings_is_kept_and_refused(
    checkpoints, tmp_path, monkeypatch, capsys
):
    argv = ["generate", "--model", checkpoints["llama"], "--output", str(tmp_path / "r.jsonl"), "--batch-size", "1"]
    interrupted_run([*argv, "--max-new-tokens", "4", "--prompt", "w1", "w2"], 1, monkeypatch)
    kept = (tmp_path / "r.jsonl.part").read_bytes()
    capsys.readouterr()
    for more, what in (
        (["--max-new-tokens", "5", "--prompt", "w1", "w2"], "`max_new_tokens` was 4, and is 5"),
        (["--max-new-tokens", "4", "--prompt", "w1", "w3"], "`prompts` was "),
    ):
        assert_one_line_error(capsys, [*argv, *more], "r.jsonl.part was begun with other settings", what, "or delete")
    assert (tmp_path / "r.jsonl.part").read_bytes() == kept
    (tmp_path / "r.jsonl.part").unlink()  # as the error says: then it starts over
    assert cli.main([*argv, "--max-new-tokens", "5", "--prompt", "w1", "w3"]) is None
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


def test_an_output_is_not_gone_on_with_by_other_weights(checkpoints, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    argv = ["generate", "--model", str(folder), "--output", str(tmp_path / "r.jsonl"), "--batch-size", "1"]
    argv += ["--max-new-tokens", "4", "--prompt", "w1", "w2"]
    interrupted_run(argv, 1, monkeypatch)
    model = LLM2SLMForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.projector.out.weight += 1  # trained on in its folder
    model.save_pretrained(folder)
    assert_one_line_error(capsys, argv, "r.jsonl.part was begun with other settings: `weights` was ")


def test_an_output_that_another_process_writes_is_left_alone(tmp_path):
    prompts = offline.Prompts(lambda: iter([{"prompt": "w1"}]), 1, "")
    other = f"""
from llm2slm.serving import offline
prompts = offline.Prompts(lambda: iter([{{"prompt": "w1"}}]), 1, "")
with offline.Output({str(tmp_path / "r.jsonl")!r}, prompts, {{}}, 1).opened() as (file, _):
    file.write("other")
"""
    with offline.Output(str(tmp_path / "r.jsonl"), prompts, {}, 1).opened() as (file, _):
        assert "Another process writes" in (run_fresh({"other": other})["other"][2] or "")
        file.write("{}\n")
    assert (tmp_path / "r.jsonl").read_text() == "{}\n" and [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_prompts_that_are_too_long_are_told_before_the_first_response(checkpoints, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("w1\n\n" + "w2 " * 70 + "\nw3\n")
    argv = ["generate", "--model", checkpoints["llama"], "--input", str(tmp_path / "p.txt"), "--max-new-tokens", "4"]
    argv += ["--batch-size", "1", "--output", str(tmp_path / "r.jsonl")]
    assert_one_line_error(capsys, argv, "1 of 4 prompts are too long, the first is number 3", "--prompt-max-length")
    assert not list(tmp_path.glob("r.jsonl*"))
    assert cli.main([*argv, "--prompt-max-length", "40"]) is None
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 4


def test_a_blank_line_is_an_empty_response(checkpoint, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("w1 w2\n \nw3\n\n")
    argv = ["generate", "--model", checkpoint, "--input", str(tmp_path / "p.txt"), "--max_new_tokens", "4"]
    first, last = expected_responses(checkpoint, ["w1 w2", "w3"], max_new_tokens=4)
    for more in ([], ["--stream"]):
        assert cli.main([*argv, *more]) is None
        captured = capsys.readouterr()
        assert captured.out.split("\n") == [first, "", last, "", ""]
        assert "p.txt: 2 of 4 prompts, the first in row 2, are empty" in captured.err
    assert cli.main([*argv, "--output", str(tmp_path / "r.jsonl")]) is None
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == [first, "", last, ""]
    assert rows[1] == {"prompt": " ", "response": "", "finish_reason": None}


def test_a_csv_file_is_read_by_its_columns(checkpoints, tmp_path):
    (tmp_path / "p.csv").write_bytes('\ufeffid,prompt\r\n7,"w1, w2\nw3"\r\n8,w4\r\n9\r\n'.encode())
    argv = ["generate", "--model", checkpoints["llama"], "--input", str(tmp_path / "p.csv"), "--max-new-tokens", "2"]
    assert cli.main([*argv, "--output", str(tmp_path / "r.jsonl")]) is None
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(row["id"], row["prompt"]) for row in rows] == [("7", "w1, w2\nw3"), ("8", "w4"), ("9", "")]


@pytest.mark.parametrize("name", ["response", "finish_reason"])
def test_a_column_of_the_outputs_own_is_refused(name, checkpoints, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "w1"}) + "\n" + json.dumps({"prompt": "w2", name: "x"}))
    argv = ["generate", "--model", checkpoints["llama"], "--input", str(tmp_path / "p.jsonl")]
    argv += ["--output", str(tmp_path / "r.jsonl")]
    assert_one_line_error(capsys, argv, f"The prompts have a column `{name}`")


def test_stop_strings_of_the_checkpoint_end_what_is_shown_and_what_is_written(checkpoint, tmp_path, capsys):
    (whole,) = expected_responses(checkpoint, ["w1 w2"], max_new_tokens=8)
    own = tmp_path / "own"
    shutil.copytree(checkpoint, own)
    settings = json.loads((own / "generation_config.json").read_text())
    stop = whole[len(whole) // 2 :][:2]
    (own / "generation_config.json").write_text(json.dumps(settings | {"stop_strings": [stop]}))
    argv = ["generate", "--model", str(own), "--prompt", "w1 w2", "--max-new-tokens", "8"]
    for more in ([], ["--stream"], ["--num-beams", "1"]):
        assert cli.main([*argv, *more]) is None
        captured = capsys.readouterr()
        assert captured.out == whole.partition(stop)[0] + "\n" and "cut" not in captured.err
    model, tokenizer = load_checkpoint(str(own))
    strings = set_generation(model, tokenizer, max_new_tokens=8, num_beams=1)
    (text,), (tokens,) = write_responses(model, tokenizer, tokenizer("w1 w2", return_tensors="pt"), strings)
    assert text == whole.partition(stop)[0] and tokens < 8


def test_a_length_that_counts_a_start_token_is_one_token_less():
    config = GenerationConfig(max_length=9)
    assert [response_limit(config, is_encoder_decoder) for is_encoder_decoder in (True, False)] == [8, 9]


def test_a_response_cut_at_its_limit_is_marked(checkpoint, tmp_path, capsys):
    model = LLM2SLMForConditionalGeneration.from_pretrained(checkpoint)
    first, *_ = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, eos_token_id=None)[0, -3:].tolist()
    own = tmp_path / "own"
    shutil.copytree(checkpoint, own)
    settings = json.loads((own / "generation_config.json").read_text())
    argv = ["generate", "--model", str(own), "--prompt", "w1 w2", "--max-new-tokens", "3"]
    for ends, reason in ((first, "stop"), (None, "length")):
        (own / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ends}))
        output = tmp_path / f"{reason}.jsonl"
        for more in (["--output", str(output)], []):
            assert cli.main([*argv, *more]) is None
            assert ("1 of 1 responses were cut at their limit" in capsys.readouterr().err) == (reason == "length")
        assert json.loads(output.read_text())["finish_reason"] == reason


def test_a_device_that_is_not_there_is_said_before_anything_is_read(capsys):
    for command in (
        ["generate", "--model", "./none", "--prompt", "w1"],
        ["evaluate", "--model", "./none", "--data", "./none", "--output", "none.json"],
        ["label", "--llm", "./none", "--data", "./none", "--output", "none"],
    ):
        assert_one_line_error(capsys, [*command, "--device", "nonsense"], "--device nonsense")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.txt", "", "has no prompts"),
        ("p.txt", "\n \n", "row 1: the prompt is empty"),
        ("p.csv", "id,text\n1,w1\n", "has no column `prompt`, only ['id', 'text']"),
        ("p.csv", "", "has no column `prompt`, only []"),
        ("p.csv", "prompt\nw1,w2\n", "row 1 has more cells than the 1 columns ['prompt']"),
        ("p.csv", "prompt\n" + 140_000 * "w", "is not CSV: field larger than field limit"),
        ("p.json", '[{"prompt": "w1"}]', "must be text, one prompt a line, or .jsonl, .csv"),
        ("p.jsonl", '{"prompt": "w1"}\n{"text": "w2"}\n', "row 2 has no column `prompt`, only ['text']"),
        ("p.jsonl", '{"prompt": 3}\n', "row 1: the prompt must be a string, got 3"),
        ("p.jsonl", "w1\n", "row 1 is not JSON"),
        ("p.jsonl", "[1]\n", "row 1 must be an object"),
    ],
)
def test_bad_prompts_are_one_line_before_anything_is_loaded(name, text, message, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert_one_line_error(capsys, ["generate", "--model", "none", "--input", str(tmp_path / name)], message)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--input", "none.txt"], "There is no file 'none.txt'"),
        (["--prompt", "w1", "--output", "none/x.jsonl"], "There is no folder 'none'"),
        (["--prompt", "w1"], "There is no folder './none'"),
        (["--prompt", "w1", " "], "--prompt, row 2: the prompt is empty"),
        (["--prompt", "w1", "--temperature", "0.5"], "add --do-sample"),
        (["--prompt", "w1", "--stream", "--num-beams", "2"], "cannot show beam search"),
        (["--prompt", "w1", "--engine", "vllm", "--stream"], "--stream shows one response at a time"),
        (["--prompt", "w1", "--engine", "vllm", "--num-beams", "2"], "leave out --engine for beam search"),
        (["--prompt", "w1", "--engine", "vllm", "--device", "cpu"], "leave out --device"),
    ],
)
def test_bad_generate_options_are_one_line(argv, message, capsys):
    assert_one_line_error(capsys, ["generate", "--model", "./none", *argv], message)


def test_vllm_ends_a_response_where_generate_does(checkpoints, tmp_path):
    """Also where the pair's own generation config says no end: it is the SLM's then."""
    model = LLM2SLMForConditionalGeneration.from_pretrained(checkpoints["llama"])
    model.generation_config = GenerationConfig(max_new_tokens=30)
    model.save_pretrained(tmp_path / "pair")
    own = vllm_offline._generation_config(str(tmp_path / "pair"), None, model.config)
    ends = vllm_offline.sampling_params(own, vllm_offline.Choice())["stop_token_ids"]
    model = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "pair")
    assert model.generation_config.eos_token_id is None and ends == end_tokens(model) != []


@pytest.mark.parametrize(
    "asked",
    [
        {"guidance_scale": 1.5},
        {"max_time": 2.0},
        {"exponential_decay_length_penalty": (5, 1.1)},
        {"encoder_repetition_penalty": 1.2},
        {"watermarking_config": {"bias": 2.0}},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 1},
        {"forced_eos_token_id": 0},
        {"max_time": 1.0},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_vllm_does_not_do_is_refused(asked):
    with pytest.raises(ValueError, match=f"says `{next(iter(asked))}`.*which --engine vllm does not do"):
        vllm_offline.sampling_params(GenerationConfig(**asked), vllm_offline.Choice())
    off = {"guidance_scale": 1.0, "encoder_repetition_penalty": 1.0, "min_length": 0, "stop_strings": []}
    assert vllm_offline.sampling_params(GenerationConfig(**off), vllm_offline.Choice())["temperature"] == 0.0


def test_wrong_models_and_long_prompts_are_one_line(checkpoints, capsys):
    llama = checkpoints["llama"]
    argv = ["generate", "--prompt", "w1", "--model"]
    assert_one_line_error(capsys, [*argv, checkpoints["llm"]], "is a llama model, not an LLM-to-SLM checkpoint")
    assert_one_line_error(capsys, [*argv, os.path.dirname(llama)], "There is no checkpoint")
    assert_one_line_error(capsys, [*argv, llama, "--llm", checkpoints["other_llm"]], "fingerprint")
    assert_one_line_error(capsys, [*argv, llama, "--llm", "./none"], "frozen LLM could not be loaded")
    assert_one_line_error(capsys, [*argv, llama, "--device", "nonsense"], "--device nonsense")
    assert_one_line_error(
        capsys,
        ["generate", "--model", llama, "--max-new-tokens", "4", "--prompt", "w1", "w1 " * 65],
        "1 of 2 prompts are too long, the first is number 2",
    )


# --------------------------------------------------------------------------------------------------------- benchmark
QUICK = ["--prompt-length", "6", "--response-length", "5", "--repeats", "3"]
FIGURES = ("first_token_ms", "per_token_ms", "tokens_per_second", "end_to_end_s")


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_benchmark_reports_every_figure(checkpoint, tmp_path, capsys, restored_threads, quick_probe):
    output = tmp_path / "report.json"
    argv = ["benchmark", "--model", checkpoint, "--threads", "1", "--batch-size", "2", "--output", str(output), *QUICK]
    assert cli.main(argv) is None
    report = json.loads(output.read_text())
    assert {"cpu", "cores", "threads", "torch", "transformers", "dtype", "date"} <= set(report["machine"])
    assert report["machine"]["threads"] == 1 and report["machine"]["dtype"] == "float32"
    assert report["arguments"]["prompt_length"] == 6

    runs = {}
    for system in report["systems"]:
        runs[system["name"]] = system["runs"]
        assert system["parameters"] > 0
        for figure in FIGURES:
            values = system["runs"][figure]
            assert len(values) == 3 and min(values) > 0
            assert system[figure] == {"median": sorted(values)[1], "min": min(values), "max": max(values)}
        for first, per_token, rate, total in zip(*(system["runs"][figure] for figure in FIGURES), strict=True):
            assert first + 4 * per_token == pytest.approx(1000 * total)
            assert rate * total == pytest.approx(2 * 5)
    assert list(runs) == ["slm", "llm2slm", "llm"]
    for name, figure, above, below in (
        ("per_token_llm2slm_to_slm", "per_token_ms", "llm2slm", "slm"),
        ("end_to_end_llm_to_llm2slm", "end_to_end_s", "llm", "llm2slm"),
    ):
        ratios = sorted(a / b for a, b in zip(runs[above][figure], runs[below][figure], strict=True))
        ratio = report["ratios"][name]
        assert [ratio["min"], ratio["median"], ratio["max"]] == pytest.approx(ratios)

    table = capsys.readouterr().out
    assert table.startswith("| System | Parameters |")
    assert all(f"\n| {name} | " in table for name in runs)
    assert "per token, llm2slm / slm: **" in table and "end to end, llm / llm2slm: **" in table


def test_benchmark_of_folders_and_of_sizes(checkpoints, monkeypatch, capsys, quick_probe):
    tiny = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    monkeypatch.setitem(SIZES, "tiny", ("llama", {**tiny, "num_attention_heads": 2}))
    argv = ["benchmark", "--llm", checkpoints["llm"], "--slm", "tiny", "--dtype", "bfloat16", *QUICK]
    assert cli.main([*argv, "--systems", "llm2slm", "slm"]) is None
    output = capsys.readouterr().out
    assert "| slm | " in output and "| llm2slm | " in output and "| llm | " not in output
    assert "bfloat16" in output and "llm / llm2slm" not in output


def test_checkpoint_that_holds_its_llm_is_measured_without_the_llm_alone(checkpoints, tmp_path, capsys, quick_probe):
    model = LLM2SLMForConditionalGeneration.from_pretrained(checkpoints["llama"])
    model.config.llm_name_or_path = None
    model.save_pretrained(tmp_path / "whole", include_llm=True)
    LLM2SLMTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(tmp_path / "whole")
    assert cli.main(["benchmark", "--model", str(tmp_path / "whole"), *QUICK]) is None
    captured = capsys.readouterr()
    assert "Left out: llm." in captured.err
    assert "| llm2slm | " in captured.out and "| llm | " not in captured.out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "Say what to measure"),
        (["--llm", "t5-large"], "Say what to measure"),
        (["--model", "x", "--slm", "t5-small"], "leave out --slm"),
        (["--llm", "llama-5m", "--slm", "llama-5m", "--response-length", "1"], "at least 2"),
        (
            ["--llm", "llama-5m", "--slm", "llama-5m", "--response-length", "4000"],
            "slm: --prompt-length 64 with --response-length 4000 needs 4064 positions, but the model (llama) has 2048",
        ),
        (["--llm", "./none", "--slm", "llama-5m"], "./none"),
    ],
)
def test_bad_benchmark_options_are_one_line(argv, message, capsys):
    assert_one_line_error(capsys, ["benchmark", *argv], message)


def test_command_can_be_added_by_a_module_and_a_line(monkeypatch, capsys):
    @dataclass
    class Hello:
        name: str = option("whom to greet")

    add_command(monkeypatch, "hello", Hello, lambda options: print(f"hello {options.name}"))
    assert cli.main(["hello", "--name", "you"]) is None
    assert capsys.readouterr().out == "hello you\n"
