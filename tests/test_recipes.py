"""The recipes in `training/recipes`: each is read by the train command, and trains tiny models on made-up rows."""

import argparse
import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Features, Translation, Value
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from llm2slm.building import train_tokenizer
from llm2slm.cli import main as cli
from llm2slm.cli import train
from llm2slm.cli.options import add_options, with_dashes
from llm2slm.data.pairs import load_pairs
from llm2slm.training.options import TrainOptions
from llm2slm.training.trainer import TrainerOptions

pytestmark = pytest.mark.xdist_group("recipes")  # each worker would make the models and data sets anew
FOLDER = Path(__file__).parents[1] / "training" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Which tiny models stand in for those on the Hub, and with what else the recipe is documented.
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "google/gemma-3-270m": "gemma3",
    "google-t5/t5-large": "t5-large",
    "google-t5/t5-small": "t5-small",
    "google/flan-t5-large": "t5-large",
    "openai-community/gpt2": "gpt2",
}
GPT2 = {"slm": "openai-community/gpt2", "start": "random"}


def read(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def sentence(generator, length=6):
    return " ".join(generator.choice(["amber", "barrel", "canvas", "dagger", "ember"]) for _ in range(length))


def columns_of(name):
    """A data set's columns, as they are in the one the recipe names."""
    string = Value("string")
    if name.startswith("wmt"):
        return {"translation": Translation(sorted(("en", name[-2:])))}
    if name == "cnn-dailymail":
        return {"article": string, "highlights": string, "id": string}
    if name == "alpaca":
        return {"output": string, "input": string, "instruction": string}
    if name == "instruct":
        return dict.fromkeys(("prompt", "completion", "task", "phrasing"), string)
    return {"prompt": string, "completion": string, "verse" if name == "simplify" else "package": string}


def rows_of(name, number, generator):
    for _ in range(number):
        yield {
            column: {language: sentence(generator) for language in feature.languages}
            if isinstance(feature, Translation)
            else sentence(generator)
            for column, feature in columns_of(name).items()
        }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models and data sets: Hub data sets with their own columns, splits and numbers of rows where it matters."""
    folder, generator = tmp_path_factory.mktemp("files"), random.Random(0)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
    t5 = {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 1}
    texts = [sentence(generator) for _ in range(100)]
    shared, other = train_tokenizer(texts, 300), train_tokenizer(texts, 290)
    for model, tokenizer, auto_class, config in (
        ("smollm2", shared, AutoModelForCausalLM, LlamaConfig(hidden_size=16, num_hidden_layers=30, **sizes)),
        ("gemma3", shared, AutoModelForCausalLM, Gemma3TextConfig(hidden_size=16, num_hidden_layers=18, **sizes)),
        ("t5-large", shared, AutoModelForSeq2SeqLM, T5Config(d_model=24, **t5)),
        ("t5-small", shared, AutoModelForSeq2SeqLM, T5Config(d_model=16, **t5)),
        ("gpt2", other, AutoModelForCausalLM, GPT2Config(n_embd=16, n_layer=2, n_head=2)),
    ):
        torch.manual_seed(0)
        config.vocab_size = len(tokenizer)
        config.eos_token_id, config.pad_token_id, config.bos_token_id = (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            0,
        )
        auto_class.from_config(config).save_pretrained(folder / model)
        tokenizer.save_pretrained(folder / model)
    for name in RECIPES:
        features = Features(columns_of(name))
        splits = {"train": 2040} if name == "alpaca" else {"train": 40, "validation": 8, "test": 8}
        data = {
            split: Dataset.from_list(list(rows_of(name, number, generator)), features=features)
            for split, number in splits.items()
        }
        if name == "alpaca":
            data["train"].to_parquet(str(folder / "alpaca.parquet"))
        else:
            DatasetDict(data).save_to_disk(str(folder / name))
    return folder


def options_of(name, **changes):
    """The options as `llm2slm train --config ...` reads them."""
    parser = argparse.ArgumentParser()
    add_options(parser, TrainOptions)
    train.add_more_options(parser, help_only=False)
    argv = ["train", "--config", str(FOLDER / f"{name}.yaml"), "--output_dir", "unused", "--use_cpu", "--bf16", "no"]
    for option, value in changes.items():
        argv += [f"--{option}", str(value)]
    parser.add_argument("--config")
    values = vars(parser.parse_args(cli._with_recipe(with_dashes(argv), "train", parser)[1:]))
    return tuple(
        options(**{field.name: values[field.name] for field in dataclasses.fields(options) if field.init})
        for options in (TrainOptions, TrainerOptions)
    )


@pytest.mark.parametrize("arm", ["llm2slm", "slm", "llm"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_train_command_reads_the_recipe_for_each_arm(name, arm):
    if arm != "llm2slm" and read(name).get("start"):
        options, trainer_options = options_of(name, arm=arm, start="random")
    else:
        options, trainer_options = options_of(name, arm=arm)
    for option, value in read(name).items():
        if option not in ("start", "bf16"):
            owner = options if hasattr(options, option) else trainer_options
            assert getattr(owner, option) == value, option
    assert options.arm == arm


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_says_its_own_command(name):
    comment = (FOLDER / f"{name}.yaml").read_text()
    assert f"llm2slm train --config training/recipes/{name}.yaml --output-dir runs/{name}\n" in comment
    built = re.search(r"python training/build_\w+\.py .*--output (\S+)", comment)
    assert (built and built[1]) == (read(name)["data"] if read(name)["data"].startswith("data/") else None)
    assert f"[`{name}`]({name}.yaml)" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    "name, prompt, completion",
    [
        ("wmt14-en-de", "translate English to German: {translation[en]}", "{translation[de]}"),
        ("wmt14-en-fr", "translate English to French: {translation[en]}", "{translation[fr]}"),
        ("wmt16-en-ro", "translate English to Romanian: {translation[en]}", "{translation[ro]}"),
        ("cnn-dailymail", "summarize: {article}", "{highlights}"),
        ("alpaca", "{instruction}\n{input}\n", "{output}"),
        ("simplify", "{prompt}\n", "{completion}"),
        ("instruct", "<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n", "{completion}"),
        ("summarize", "{prompt}\n", "{completion}"),
        ("translate-en-it", "{prompt}\n", "{completion}"),
    ],
)
def test_the_columns_become_prompts_and_completions(name, prompt, completion, files):
    options, _ = options_of(name)
    source = files / ("alpaca.parquet" if name == "alpaca" else name)
    pairs = load_pairs(source, options.validation_split, options.prompt_format, options.completion_format)
    rows = Dataset.from_parquet(str(source)) if name == "alpaca" else DatasetDict.load_from_disk(str(source))
    row = rows[40] if name == "alpaca" else rows["validation"][0]
    assert pairs[0] == {"prompt": prompt.format(**row), "completion": completion.format(**row)}


@pytest.mark.parametrize(
    "name, changes",
    [(name, {}) for name in RECIPES if name not in ("translate-en-fr", "translate-en-de")]  # as translate-en-it
    + [(name, GPT2) for name in ("wmt14-en-de", "cnn-dailymail")],
    ids=str,
)
def test_the_recipe_trains(name, changes, files, tmp_path):
    recipe = read(name) | changes
    overrides = {
        **changes,
        "data": files / ("alpaca.parquet" if name == "alpaca" else name),
        "llm": files / MODELS[recipe["llm"]],
        "cache_dir": tmp_path / "features",
        "output_dir": tmp_path / "run",
        "max_train_pairs": 16,
        "max_validation_pairs": 4,
        "max_steps": 2,
        "eval_steps": 1,
        "per_device_train_batch_size": 4,
        "warmup_steps": 0,
        "dataloader_num_workers": 0,
        "llm_dtype": "float32",
        "bf16": "no",
        "use_cpu": "yes",
        "disable_tqdm": "yes",
    }
    if recipe["slm"] in MODELS:
        overrides["slm"] = files / MODELS[recipe["slm"]]
    if recipe["slm"] == "fresh":
        overrides |= {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    argv = ["train", "--config", str(FOLDER / f"{name}.yaml")]
    assert (
        cli.main(argv + [text for option, value in overrides.items() for text in (f"--{option}", str(value))]) is None
    )

    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["data"]["train_pairs"], run["data"]["validation_pairs"], run["train"]["steps"]) == (16, 4, 2)
    assert run["data"]["prompt_format"] == recipe["prompt_format"]
    assert run["train"]["eval_loss"] > 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "features").exists() == recipe.get("cache_features", True)
