"""`llm2slm train` end to end on tiny models: each arm, each way to an SLM, what the folder holds, bad input."""

import json
import logging
import random
import signal
from collections import Counter

import pytest
import torch
from conftest import (
    LLM_HIDDEN,
    LLM_KINDS,
    QUICK_TRAINING,
    SLM_VOCAB,
    build_llm,
    build_llm_tokenizer,
    build_model,
    build_slm,
    build_slm_tokenizer,
    jitter,
    read_report,
    train,
)
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.cli import main as cli
from llm2slm.data.pairs import format_of_text, without_empty
from llm2slm.training import record, setup
from llm2slm.training.options import TrainOptions
from llm2slm.training.record import plot_losses
from llm2slm.training.run import train as run_training
from llm2slm.training.setup import make_collator, with_lora
from llm2slm.training.trainer import TrainerOptions

STEPS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An LLM with a tokenizer of words and one with a BPE, SLMs, and pairs whose response spells the prompt."""
    folder = tmp_path_factory.mktemp("files")
    build_llm("llama").save_pretrained(folder / "llm")
    build_llm_tokenizer().save_pretrained(folder / "llm")
    torch.manual_seed(0)
    jitter(AutoModelForCausalLM.from_config(LLM_KINDS["llama"](LLM_HIDDEN, SLM_VOCAB))).save_pretrained(folder / "bpe")
    build_slm_tokenizer().save_pretrained(folder / "bpe")
    for kind in ("t5", "llama"):
        build_slm(kind).save_pretrained(folder / kind)
        build_slm_tokenizer().save_pretrained(folder / kind)
    generator = random.Random(0)
    with open(folder / "pairs.jsonl", "w") as file:
        for _ in range(60):
            numbers = [generator.randrange(54) for _ in range(generator.randrange(2, 8))]
            pair = {
                "prompt": " ".join(f"w{i}" for i in numbers),
                "completion": " ".join("abc"[i % 3] for i in numbers),
            }
            file.write(json.dumps(pair) + "\n")
    return folder


@pytest.fixture
def recipe(files, tmp_path):
    """A recipe that takes a second."""
    return {
        "data": str(files / "pairs.jsonl"),
        "train_split": "train[:48]",
        "validation_split": "train[48:]",
        "llm": str(files / "llm"),
        "vocab_size": 300,
        "max_steps": STEPS,
        "eval_steps": 4,
        "per_device_train_batch_size": 6,
        **QUICK_TRAINING,
        "cache_dir": str(tmp_path / "features"),
        "output_dir": str(tmp_path / "run"),
    }


def report(recipe) -> dict:
    return read_report(recipe["output_dir"])


def logged_losses(recipe) -> dict[int, float]:
    """The loss of each evaluation, by its step."""
    with open(recipe["output_dir"] + "/trainer_state.json") as file:
        return {entry["step"]: entry["eval_loss"] for entry in json.load(file)["log_history"] if "eval_loss" in entry}


def load(recipe):
    return LLM2SLMForConditionalGeneration.from_pretrained(recipe["output_dir"])


# --------------------------------------------------------------------------------------------- the form of the prompts
@pytest.mark.parametrize(
    "prompt_format, kept", [("{prompt} w0", "{prompt} w0"), ("{completion} {prompt}", None), ("{prompt}", None)]
)
def test_prompts_are_read_in_the_form_of_the_recipe_once(files, prompt_format, kept):
    options = TrainOptions(
        data=str(files / "pairs.jsonl"),
        train_split="train[:8]",
        validation_split="none",
        llm=str(files / "llm"),
        slm=str(files / "llama"),
        prompt_format=prompt_format,
    )
    llm_tokenizer, model = build_llm_tokenizer(), build_model(slm="llama")
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, build_slm_tokenizer(), format_of_text(prompt_format))
    assert tokenizer.prompt_format == kept
    found = setup.make_examples(options, setup.load_splits(options)[0], model, tokenizer)["train"]
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()[:8]]
    assert found["input_ids"][:] == llm_tokenizer([prompt_format.format(**row) for row in rows])["input_ids"]
    if kept:  # what its users write, it was trained on
        assert found["input_ids"][:] == tokenizer([row["prompt"] for row in rows])["input_ids"]


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_a_training_leaves_the_form_and_the_way_of_writing_with_the_checkpoint(recipe, files, slm, capsys):
    changes = {"slm": str(files / slm), "prompt_format": "{prompt} w0", "response_max_length": 30, "max_steps": 1}
    assert train(recipe, vocab_size=None, hidden_size=None, num_hidden_layers=None, **changes) is None
    model, tokenizer = load(recipe), LLM2SLMTokenizer.from_pretrained(recipe["output_dir"])
    assert tokenizer.prompt_format == model.config.prompt_format == "{prompt} w0"
    assert tokenizer.encode("w1") == tokenizer.encode("w1 w0", apply_prompt_format=False)
    config, start = model.generation_config, int(slm == "t5")
    assert (config.max_length, config.num_beams, config.do_sample) == (30 + start, 1, False)
    config.eos_token_id = None
    inputs = tokenizer("w1", return_tensors="pt")
    assert model.generate(**inputs).equal(model.generate(**inputs, max_new_tokens=30, num_beams=1, do_sample=False))

    beams = {"generation_num_beams": 3, "generation_max_length": 12, "output_dir": recipe["output_dir"] + "-beams"}
    assert train(recipe, vocab_size=None, hidden_size=None, num_hidden_layers=None, **changes, **beams) is None
    config = load(beams).generation_config
    assert (config.max_length, config.num_beams) == (12 + start, 3)


def test_the_way_of_writing_is_not_the_slms_own_sampling():
    model = build_model(slm="llama")
    model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5, top_k=7, max_new_tokens=5)
    setup.set_generation(model, 9, 2)
    config, default = model.generation_config, GenerationConfig()
    assert (config.max_length, config.max_new_tokens, config.num_beams, config.do_sample) == (9, None, 2, False)
    assert all(getattr(config, name) == getattr(default, name) for name in ("temperature", "top_p", "top_k"))
    config.validate(strict=True)


# -------------------------------------------------------------------------------------------------------- the folder
def test_the_folder_holds_the_model_and_says_how_it_was_trained(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record, "plot_losses", plot_losses)
    assert train(recipe, llm_layer=[0, -1], projector_type="linear") is None
    model, tokenizer = load(recipe), LLM2SLMTokenizer.from_pretrained(recipe["output_dir"])
    assert model.config.llm_layer == [0, -1] and model.projector.hidden is None
    assert model.generate(**tokenizer(["w1 w2"], return_tensors="pt"), max_new_tokens=4).shape[1] <= 4

    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "recipe.yaml", "loss.png", "model.safetensors", "tokenizer.json", "llm_tokenizer"} <= names
    assert {"train_results.json", "eval_results.json", "trainer_state.json", f"checkpoint-{STEPS}"} <= names
    assert not {name for name in names if name.endswith((".part", ".bin"))} and "start" not in names
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")

    run = report(recipe)
    assert run["arm"] == "llm2slm" and run["seed"] == 42
    left_out = ("output_dir", "cache_dir", "disable_tqdm")  # where and how it was shown, not what was trained
    given = {**recipe, "llm_layer": [0, -1], "projector_type": "linear"}
    assert run["recipe"] == {name: value for name, value in given.items() if name not in left_out}
    assert run["llm"] == {"name_or_path": recipe["llm"], "revision": None}
    assert (run["data"]["train_pairs"], run["data"]["validation_pairs"]) == (48, 12)
    sizes = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("llm", "projector", "slm")}
    assert run["parameters"] == {"trained": sizes["projector"] + sizes["slm"], **sizes}
    assert run["train"]["steps"] == STEPS and run["train"]["seconds"] > 0 and run["train"]["peak_memory_gib"] > 0
    losses = list(logged_losses(recipe).values())
    assert len(losses) == 3 and losses[-1] < losses[0]  # it learned
    assert run["train"]["eval_loss"] == pytest.approx(min(losses))
    assert "Finished" in capsys.readouterr().out


@pytest.mark.parametrize("names", [[], ["loss"], ["loss", "eval_loss"]], ids=len)
def test_a_picture_is_drawn_of_what_losses_there_are(names, tmp_path):
    history = [{"step": step, name: 1 / step} for step in (1, 2) for name in names]
    plot_losses([*history, {"step": 2, "train_runtime": 1.0}], "title", tmp_path / "loss.png", taught=True)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_training_is_not_done_again(recipe, tmp_path, capsys):
    train(recipe)
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    assert train(recipe) is None
    assert "is finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_the_best_checkpoint_is_the_result(recipe, tmp_path):
    # Reads one pair over and over: soon it knows nothing else.
    train(recipe, train_split="train[:1]", learning_rate=0.1, save_total_limit=9, eval_steps=2)
    losses = logged_losses(recipe)
    best = min(losses, key=losses.get)
    assert best < STEPS
    best_model = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "run" / f"checkpoint-{best}")
    for name, parameter in load(recipe).state_dict().items():
        assert torch.equal(parameter, best_model.state_dict()[name])


def test_a_machine_without_an_accelerator_trains_in_bfloat16_unasked(recipe):
    if torch.accelerator.is_available():
        pytest.skip("needs a machine with a CPU alone")
    assert train(recipe, use_cpu=None, bf16=True, max_steps=2, validation_split="none") is None
    assert report(recipe)["train"]["steps"] == 2


def test_without_validation_the_last_step_is_the_result(recipe, tmp_path):
    train(recipe, validation_split="none", save_steps=6)
    run = report(recipe)
    assert run["train"]["eval_loss"] is None and run["data"]["validation_pairs"] == 0
    last = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "run" / f"checkpoint-{STEPS}")
    for name, parameter in load(recipe).state_dict().items():
        assert torch.equal(parameter, last.state_dict()[name])


# ----------------------------------------------------------------------------------------------------------- the arms
def test_the_arms_learn_from_the_same_pairs(recipe, files, tmp_path):
    runs = {}
    for arm in ("llm2slm", "slm", "llm"):
        arm_recipe = {**recipe, "arm": arm, "output_dir": str(tmp_path / arm)}
        assert train(arm_recipe) is None
        runs[arm] = report(arm_recipe)
    assert len({run["data"]["fingerprint"] for run in runs.values()}) == 1
    assert runs["slm"]["parameters"]["trained"] == runs["slm"]["parameters"]["slm"]
    assert runs["llm"]["parameters"]["trained"] < runs["llm"]["parameters"]["llm"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "slm")
    slm = AutoModelForCausalLM.from_pretrained(tmp_path / "slm")
    assert eval_loss(slm, tokenizer, files) == pytest.approx(runs["slm"]["train"]["eval_loss"], rel=1e-4)

    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(files / "llm")
    before = eval_loss(base, build_llm_tokenizer(), files)
    llm = PeftModel.from_pretrained(base, tmp_path / "llm").eval()
    loss = eval_loss(llm, AutoTokenizer.from_pretrained(tmp_path / "llm"), files)
    assert loss == pytest.approx(runs["llm"]["train"]["eval_loss"], rel=1e-4) and loss < before


@torch.no_grad()
def eval_loss(model, tokenizer, files) -> float:
    """The mean loss of a token over all responses; the Trainer evaluates them in two batches, one of them not full."""
    two_sided = LLM2SLMTokenizer.from_tokenizers(tokenizer, tokenizer)
    pairs = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()][48:]
    assert len(pairs) % 8
    total = count = 0
    for row in (two_sided(pair["prompt"], text_target=pair["completion"]) for pair in pairs):
        ids = torch.tensor([row["input_ids"] + row["labels"]])
        scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scores = scores.gather(1, ids[0, 1:, None])[-len(row["labels"]) :]
        total, count = total - scores.sum().item(), count + len(scores)
    return total / count


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma3"])
@pytest.mark.parametrize("prompts", [[5, 9, 3], [12, 12, 12], [0, 4, 2]])
def test_an_arm_alone_computes_no_logits_where_all_is_prompt(kind, prompts):
    """And the loss is what it would be with all of them."""
    model, generator = build_slm(kind), torch.Generator().manual_seed(5)
    options = TrainOptions(arm="slm", data="pairs", slm=kind)
    rows = []
    for prompt_length, length in zip(prompts, [9, 20, 17], strict=True):
        ids = torch.randint(4, SLM_VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt_length + ids[prompt_length:]})
    batch = make_collator(options, model, build_slm_tokenizer())(rows)
    everything = {name: torch.full((3, 24), -100) for name in ("input_ids", "labels")}
    for name, tensor in everything.items():
        for i, row in enumerate(rows):
            tensor[i, : len(row[name])] = torch.tensor(row[name])
    mask = (everything["input_ids"] != -100).long()
    with torch.no_grad():
        output = model(**batch)
        expected = model(everything["input_ids"].clamp(min=0), attention_mask=mask, labels=everything["labels"])
    assert output.logits.shape[1] == 24 - max(min(prompts) - 1, 0)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_an_encoder_decoder_alone_reads_the_prompt_and_writes_the_response(recipe, files):
    assert train(recipe, arm="slm", slm=str(files / "t5"), llm=None) is None
    assert AutoModelForSeq2SeqLM.from_pretrained(recipe["output_dir"]).config.model_type == "t5"
    assert report(recipe)["llm"] is None


@pytest.mark.parametrize(
    "arm, slm", [("llm2slm", "llama"), ("llm2slm", "t5"), ("slm", "llama"), ("slm", "t5"), ("llm", None)]
)
def test_labels_can_be_smoothed(recipe, files, arm, slm):
    """The Trainer's option: it takes the labels away from the model, and makes the loss of its logits."""
    slm = slm and str(files / slm)
    assert train(recipe, arm=arm, slm=slm, label_smoothing_factor=0.1) is None
    first, *_, last = logged_losses(recipe).values()
    assert last < first


@pytest.mark.parametrize("arm", ["llm2slm", "slm", "llm"])
def test_chats_go_through_the_llms_template(recipe, files, tmp_path, arm):
    with open(tmp_path / "chats.jsonl", "w") as file:
        for line in (files / "pairs.jsonl").read_text().splitlines():
            roles = {"prompt": "user", "completion": "assistant"}
            chat = {name: [{"role": roles[name], "content": text}] for name, text in json.loads(line).items()}
            file.write(json.dumps(chat) + "\n")
    assert train(recipe, arm=arm, data=str(tmp_path / "chats.jsonl"), max_steps=1) is None
    tokenizer = LLM2SLMTokenizer if arm == "llm2slm" else AutoTokenizer
    chat = [{"role": "user", "content": "w1"}]
    text = tokenizer.from_pretrained(recipe["output_dir"]).apply_chat_template(chat, tokenize=False)
    assert text == "user w1 "


WAYS = {
    "own": ({}, {}, {}),
    "llm": ({"slm_tokenizer": "llm"}, {"shared_tokenizer": True}, {"vocab_size": 64}),
    "trimmed": ({"slm_tokenizer": "trimmed"}, {"shared_tokenizer": True}, {}),
    "slice": (
        {"slm": "slice", "slm_layers": [1], "vocab_size": None},
        {"shared_tokenizer": True},
        {"hidden_size": LLM_HIDDEN},
    ),
    "trimmed slice": (
        {"slm": "slice", "slm_layers": [0, 1], "slm_tokenizer": "trimmed"},
        {"shared_tokenizer": True},
        {"hidden_size": LLM_HIDDEN},
    ),
    "slice of another": (
        {"slm": "slice", "slm_layers": [1], "slice_of": "llama", "vocab_size": None},
        {},
        {"vocab_size": 64},
    ),
    "pretrained": ({"slm": "t5"}, {}, {"model_type": "t5"}),
    "pretrained, of one tokenizer": ({"slm": "llama"}, {"shared_tokenizer": True}, {"model_type": "llama"}),
}


# Both fusions where the prompt is read by another vocabulary than the LLM's; elsewhere they take turns.
WAYS_AND_FUSIONS = [
    (way, fusion)
    for i, way in enumerate(WAYS)
    for fusion in (["replace", "add"] if "trimmed" in way else [["replace", "add"][i % 2]])
]


@pytest.mark.parametrize(("way", "fusion"), WAYS_AND_FUSIONS)
def test_each_way_to_an_slm(recipe, files, way, fusion):
    changes, config, slm_config = WAYS[way]
    changes = {name: str(files / value) if value in ("t5", "llama") else value for name, value in changes.items()}
    llm = "bpe" if way not in ("pretrained", "slice of another") else "llm"
    changes |= {"llm": str(files / llm), "fusion": fusion, "max_steps": 2, "eval_steps": 1}
    assert train(recipe, **changes) is None
    model = load(recipe)
    assert model.config.fusion == fusion
    assert model.config.shared_tokenizer == config.get("shared_tokenizer", False)
    for name, value in slm_config.items():
        assert getattr(model.config.slm_config, name) == value
    trimmed = "trimmed" in way
    assert (model.prompt_token_map is not None) == trimmed
    if trimmed:
        tokenizer = LLM2SLMTokenizer.from_pretrained(recipe["output_dir"])
        assert model.config.vocab_size < SLM_VOCAB
        assert tokenizer.decode(tokenizer(text_target="a b c")["input_ids"], skip_special_tokens=True) == "a b c"
        if fusion == "add":  # it reads the prompt, too
            ids = tokenizer("w1 w2")["input_ids"]
            assert tokenizer.decode(model.prompt_token_map[ids]) == tokenizer.llm_tokenizer.decode(ids) == "w1 w2"


@pytest.mark.parametrize("fusion", ["replace", "add"])
def test_the_llm_can_read_in_the_pieces_that_a_trimmed_slm_writes(recipe, files, fusion):
    both = {"llm": str(files / "bpe"), "slm_tokenizer": "trimmed", "llm_tokenizer": "trimmed", "fusion": fusion}
    whole = len(AutoTokenizer.from_pretrained(files / "bpe"))
    assert train(recipe, **both, vocab_size=whole - 4, max_steps=1, eval_steps=1) is None
    model, tokenizer = load(recipe), LLM2SLMTokenizer.from_pretrained(recipe["output_dir"])
    for line in (files / "pairs.jsonl").read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        ids = tokenizer(prompt)["input_ids"]
        assert model.prompt_token_map[ids].tolist() == tokenizer.slm_tokenizer(prompt)["input_ids"]


def test_lora_on_the_slm_is_merged_into_the_result(recipe, files):
    assert train(recipe, slm=str(files / "llama"), lora_r=2) is None
    before = AutoModelForCausalLM.from_pretrained(files / "llama").state_dict()
    for name, weight in load(recipe).slm.state_dict().items():
        rank = torch.linalg.matrix_rank(weight - before[name], atol=1e-5).item() if weight.ndim == 2 else 0
        assert rank == (2 if "proj" in name else 0), name
    run = report(recipe)
    assert run["parameters"]["projector"] < run["parameters"]["trained"] < run["parameters"]["slm"]


@pytest.mark.parametrize("arm", ["llm", "llm2slm"])
def test_a_frozen_head_multiplies_all_rows_at_once(arm):
    model = build_model(slm="llama") if arm == "llm2slm" else build_llm("llama")
    model = with_lora(TrainOptions(arm=arm, data="pairs", llm="llm", slm="slm", lora_r=2), model)
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda head, states: seen.extend(states))
    ids = torch.arange(2, 14).view(2, 6)
    kept = {"labels": ids} if arm == "llm2slm" else {"labels": ids[:, 2:], "logits_to_keep": 4}
    model(input_ids=ids, **kept).loss.backward()
    (states,) = seen
    assert states.is_contiguous() and not model.get_output_embeddings().weight.requires_grad


# ---------------------------------------------------------------------------------------------------------- the start
def test_a_start_at_zero(recipe, files):
    still = {"learning_rate": 1e-12, "max_steps": 1, "eval_steps": 1, "llm": str(files / "bpe"), "slm": "slice"}
    assert train({**recipe, **still}, slm_layers=[0], vocab_size=None, start="zero", fusion="add") is None
    assert load(recipe).projector.out.weight.abs().max() < 1e-9


def test_a_slice_of_the_upper_layers_starts_at_the_llms_states(recipe, files):
    llm = AutoModelForCausalLM.from_pretrained(files / "bpe")
    depth = llm.config.num_hidden_layers
    changes = {"llm": str(files / "bpe"), "slm": "slice", "slm_tokenizer": "trimmed", "slm_layers": [depth - 1]}
    kind = {"projector_type": "linear", "projector_norm": "none", "llm_layer": depth - 1, "start": "states"}
    assert train(recipe, **changes, **kind, max_steps=1, learning_rate=0.0) is None
    model, tokenizer = load(recipe), LLM2SLMTokenizer.from_pretrained(recipe["output_dir"])
    assert torch.equal(model.projector.out.weight, torch.eye(LLM_HIDDEN))
    assert model.slm.config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size < llm.config.vocab_size


def test_the_states_are_brought_to_one_scale_before_the_first_step(recipe, files):
    depth = AutoModelForCausalLM.from_pretrained(files / "bpe").config.num_hidden_layers
    changes = {"llm": str(files / "bpe"), "slm": "slice", "slm_tokenizer": "trimmed", "slm_layers": [depth - 1]}
    kind = {"projector_norm": "standardize", "llm_layer": depth - 1, "start": "states", "fusion": "add"}
    assert train(recipe, **changes, **kind, max_steps=1, learning_rate=0.0) is None
    (norm,) = load(recipe).projector.norms
    assert norm.mean.abs().min() > 0 and (norm.scale - 1).abs().min() > 0


def test_what_only_responses_have_starts_at_its_states_there(recipe, files):
    llm, tokenizer = (kind.from_pretrained(files / "bpe") for kind in (AutoModelForCausalLM, AutoTokenizer))
    layer = llm.config.num_hidden_layers - 1
    changes = {"llm": str(files / "bpe"), "slm": "slice", "slm_tokenizer": "trimmed", "slm_layers": [layer]}
    kind = {"projector_type": "linear", "projector_norm": "none", "llm_layer": layer, "start": "states"}
    assert train(recipe, **changes, **kind, max_steps=1, learning_rate=0.0) is None
    pairs = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()][:48]
    states = {"▁b": [], "▁c": []}
    for pair in pairs:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        ids = [*prompt, *tokenizer(pair["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            read = llm(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        for token, state in zip(tokenizer.convert_ids_to_tokens(ids), read, strict=True):
            if token in states:
                states[token].append(state)
    slm_ids = LLM2SLMTokenizer.from_pretrained(recipe["output_dir"]).get_vocab()
    embeddings = load(recipe).slm.get_input_embeddings().weight
    for token, found in states.items():
        assert len(found) > 20
        mean = torch.stack(found).mean(dim=0)
        assert (embeddings[slm_ids[token]] - mean).norm() < 0.2 * mean.norm(), token


def test_the_slm_alone_starts_at_the_same_embeddings(recipe, files):
    depth = AutoModelForCausalLM.from_pretrained(files / "bpe").config.num_hidden_layers
    changes = {"llm": str(files / "bpe"), "slm": "slice", "slm_tokenizer": "trimmed", "slm_layers": [depth - 1]}
    kind = {"projector_type": "linear", "projector_norm": "none", "llm_layer": depth - 1, "start": "states"}
    embeddings = {}
    for arm in ("llm2slm", "slm"):
        output_dir = f"{recipe['output_dir']}-{arm}"
        run = {**recipe, **changes, **kind, "arm": arm, "output_dir": output_dir}
        assert train(run, max_steps=1, learning_rate=0.0) is None
        tokenizer = AutoTokenizer.from_pretrained(output_dir, trust_remote_code=False)
        slm = AutoModelForCausalLM.from_pretrained(output_dir) if arm == "slm" else load(run).slm
        known = {token: id for token, id in tokenizer.get_vocab().items() if id < slm.config.vocab_size}
        embeddings[arm] = {token: slm.get_input_embeddings().weight[id] for token, id in known.items()}
        assert slm.get_output_embeddings().weight is not slm.get_input_embeddings().weight
    pairs = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()][:48]
    seen = Counter(token for pair in pairs for token in tokenizer.tokenize(pair["prompt"])[1:])
    shared = embeddings["slm"].keys() & embeddings["llm2slm"].keys()
    often = [token for token in shared if seen[token] >= 20]  # the others lean on the rest of the vocabulary
    assert often
    for token in often:
        alone, behind = embeddings["slm"][token], embeddings["llm2slm"][token]
        assert (alone - behind).norm() < 0.2 * behind.norm(), token


def test_pairs_with_an_empty_side_are_left_out_if_asked_for(recipe, tmp_path, capsys):
    pairs = [{"prompt": f"w{i} w1", "completion": "a b" if i % 4 else " "} for i in range(12)]
    path = tmp_path / "some_empty.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = {"data": str(path), "train_split": "all", "validation_split": "none", "max_steps": 2}
    assert train(recipe, **changes) == 2
    error = capsys.readouterr().err
    assert "3 of 12 pairs have an empty side, the first is {'prompt': 'w0 w1'" in error and "`skip_empty`" in error
    assert train(recipe, **changes, skip_empty=True, output_dir=str(tmp_path / "second")) is None
    assert "3 of 12 pairs have an empty side" in capsys.readouterr().out
    assert report({**recipe, "output_dir": str(tmp_path / "second")})["data"]["train_pairs"] == 9
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "w1", "completion": None}) + "\n")
    assert train(recipe, **changes, skip_empty=True, output_dir=str(tmp_path / "third")) is None
    assert "4 of 13 pairs have an empty side" in capsys.readouterr().out
    # What it leaves out an evaluation leaves out too.
    options = ["--data", path, "--split", "all", "--max-new-tokens", 4, "--output", tmp_path / "report.json"]
    assert cli.main(["evaluate", "--model", str(tmp_path / "third"), *map(str, options)]) is None
    assert json.loads((tmp_path / "report.json").read_text())["data"]["examples"] == 9


def test_chats_with_an_empty_side_are_left_out_too():
    def chat(role: str, text: str | None) -> list[dict]:
        return [] if text is None else [{"role": role, "content": text}]

    sides = [("a", "b"), (None, "b"), ("a", None), (" ", "b"), ("a", "")]
    rows = Dataset.from_list([{"prompt": chat("user", p), "completion": chat("assistant", c)} for p, c in sides])
    assert without_empty(rows, "train", skip=True).to_list() == rows.select([0]).to_list()
    with pytest.raises(ValueError, match="4 of 5 pairs have an empty side"):
        without_empty(rows, "train", skip=False)
    with pytest.raises(ValueError, match="train: each of the 4 pairs has an empty side"):
        without_empty(rows.select([1, 2, 3, 4]), "train", skip=True)


def test_a_training_without_validation_evaluates_nothing(tmp_path):
    options = TrainOptions(data="pairs.jsonl", slm="fresh", arm="slm", validation_split="none")
    with pytest.raises(ValueError, match='set `eval_strategy="no"`'):
        run_training(options, TrainerOptions(output_dir=str(tmp_path / "run"), use_cpu=True))


def test_one_process_trains_on_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(Seq2SeqTrainingArguments, "__post_init__", lambda self: setattr(self, "_n_gpu", 2))
    assert TrainerOptions(output_dir=str(tmp_path)).n_gpu == 1


def test_a_tied_head_is_no_missing_key_of_the_best_checkpoint(recipe, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging.getLogger("transformers.trainer"), "warning", lambda text, *_: warnings.append(text))
    train(recipe)
    model = load(recipe)
    assert model.slm.get_output_embeddings().weight is model.slm.get_input_embeddings().weight
    assert not [text for text in warnings if "missing keys" in text]


def test_the_projector_has_a_learning_rate_of_its_own(recipe, files):
    llama = str(files / "llama")
    assert train(recipe, slm=llama, learning_rate=1e-9, projector_learning_rate=0.1) is None
    model = load(recipe)
    before = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    for name, weight in model.slm.state_dict().items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=0)
    assert model.projector.out.bias.abs().max() > 0.01  # they start at zero


# ------------------------------------------------------------------------------------------------------- the features
def test_cached_features_train_as_the_live_llm_does(recipe):
    losses = []
    for cached in (True, False):
        output = f"{recipe['output_dir']}-{cached}"
        assert train(recipe, cache_features=cached, output_dir=output) is None
        losses.append(report({"output_dir": output})["train"]["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_another_training_on_the_same_prompts_does_not_run_the_llm(recipe, monkeypatch):
    train(recipe)

    def fails(*args):
        raise AssertionError("the LLM was run")

    monkeypatch.setattr(LLM2SLMForConditionalGeneration, "encode_hidden_states", fails)
    assert train(recipe, learning_rate=0.02, output_dir=recipe["output_dir"] + "-2") is None


def test_an_interrupted_training_goes_on_without_the_llm_and_ends_as_if_it_had_not_been(recipe, monkeypatch, capsys):
    assert train(recipe, output_dir=recipe["output_dir"] + "-whole", save_steps=4) is None
    steps = []

    def interrupted(trainer, *args, **kwargs):
        steps.append(1)
        if len(steps) == 7:
            signal.raise_signal(signal.SIGINT)
        return training_step(trainer, *args, **kwargs)

    training_step = Seq2SeqTrainer.training_step
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    try:
        assert train(recipe) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "The same command goes on from the last checkpoint" in capsys.readouterr().err

    def fails(*args, **kwargs):
        raise AssertionError("the LLM was loaded")

    monkeypatch.setattr(LLM2SLMForConditionalGeneration, "load_llm", fails)
    assert train(recipe) is None
    assert "resuming from" in capsys.readouterr().out
    monkeypatch.undo()
    whole = load({"output_dir": recipe["output_dir"] + "-whole"}).state_dict()
    for name, parameter in load(recipe).state_dict().items():
        assert torch.equal(parameter, whole[name])
    assert len(steps) == 6 + 1 + STEPS - 4


# ----------------------------------------------------------------------------------------------------------- bad input
def assert_refused(capsys, recipe, *fragments, **changes):
    capsys.readouterr()
    assert train(recipe, **changes) == 2
    captured = capsys.readouterr()
    last = captured.err.rstrip("\n").split("\n")[-1]
    assert "Traceback" not in captured.err and last.startswith("llm2slm train: error: ")
    for fragment in fragments:
        assert fragment in last


@pytest.mark.parametrize(
    "changes, fragments",
    [
        ({"data": None}, ["`data` is needed"]),
        ({"output_dir": ""}, ["`output_dir` is needed"]),
        ({"slm": None}, ["`slm` is needed for the arm 'llm2slm'"]),
        ({"arm": "llm", "llm": None}, ["`llm` is needed for the arm 'llm'"]),
        ({"slm": "slice"}, ["`slm_layers` is needed to slice"]),
        ({"slm_layers": [1]}, ["are for `slm: slice`, got slm 'fresh'"]),
        ({"slm": "llama", "slm_tokenizer": "trimmed"}, ["has its own tokenizer", "'own', got 'trimmed'"]),
        ({"llm_tokenizer": "trimmed"}, ["it needs `slm_tokenizer: trimmed`, got 'own'"]),
        ({"slm": "slice", "slm_layers": [7], "vocab_size": None}, ["each from 0 to 1", "got [7]"]),
        ({"slm": "slice", "slm_layers": [1]}, ["`vocab_size`", "needs `slm_tokenizer: trimmed`, got 'own'"]),
        ({"lora_alpha": 8}, ["`lora_alpha` is about LoRA: give its rank, `lora_r`"]),
        ({"save_only_model": True}, ["leave out `save_only_model`"]),
        ({"start": "zero"}, ["`start: zero` needs `fusion: add`"]),
        ({"start": "states", "cache_features": False}, ["needs `cache_features: true`"]),
        ({"start": "zero", "fusion": "add"}, ["A start at zero needs", "shared_tokenizer=True"]),
        ({"llm_layer": [9]}, ["`llm_layer` must be an integer from -3 to 2"]),
        ({"vocab_size": 100}, ["`vocab_size` must be at least 258"]),
        ({"prompt_max_length": 0}, ["`prompt_max_length` must be at least 1, got 0"]),
        ({"prompt_max_length": 2}, ["pairs are over the limits", "Raise the limits"]),
        ({"data": "none.jsonl"}, ["There is no file 'none.jsonl'"]),
        ({"prompt_format": "{text}"}, ["no column 'text' for the prompt, only ['prompt', 'completion']"]),
        ({"train_split": "dev"}, ["no split 'dev'"]),
        ({"train_split": "all", "validation_split": "validation"}, ["of one file may have rows in common"]),
        ({"llm": "./none"}, ["./none"]),
        ({"slm": "./none"}, ["./none"]),
        ({"learning_rat": 1}, ["no option 'learning_rat'; the nearest is 'learning_rate'"]),
        ({"eval_steps": 5, "save_steps": 7}, ["the saving steps to be a round multiple of the evaluation steps"]),
    ],
)
def test_bad_options_are_one_line_before_anything_is_trained(recipe, changes, fragments, capsys, monkeypatch):
    monkeypatch.setattr(Seq2SeqTrainer, "train", lambda *args, **kwargs: pytest.fail("it was trained"))
    assert_refused(capsys, recipe, *fragments, **changes)


def test_a_prompt_beyond_the_positions_is_refused(recipe, tmp_path, capsys):
    pairs = [{"prompt": "w1 " * 70, "completion": "a"}] * 3
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = {"data": str(tmp_path / "long.jsonl"), "train_split": "all", "validation_split": "none"}
    assert_refused(capsys, recipe, "needs 71 positions, but the LLM (llama) has 64", **changes)
    # Nothing was trained yet: the folder is free for another recipe.
    assert train(recipe, **changes, prompt_max_length=20, truncate=True, max_steps=1) is None
    assert report(recipe)["recipe"]["truncate"] is True


def test_a_folder_with_something_else_is_left_alone(recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert_refused(capsys, recipe, "holds other things than a training")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("kept")
    assert_refused(capsys, recipe, "is a file", output_dir=str(tmp_path / "file"))


def test_a_folder_of_another_training_is_left_alone(recipe, tmp_path, capsys):
    train(recipe)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert_refused(
        capsys, recipe, "holds another training: its `learning_rate` is 0.01, here it is 0.02", learning_rate=0.02
    )
    assert_refused(capsys, recipe, "its `fusion` is the default, here it is 'add'", fusion="add")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_full_disk_is_told_before_the_first_step(recipe, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    assert_refused(capsys, recipe, "The checkpoints of this training need", "has 0.00 GiB free", cache_features=False)


def test_the_checkpoints_of_an_interrupted_training_are_room_for_its_next(recipe, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr("llm2slm.training.run.finish", stop)
        assert train(recipe) == 130
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    new = {**recipe, "output_dir": str(tmp_path / "new")}
    assert_refused(capsys, new, "The checkpoints of this training need")
    assert train(recipe, save_total_limit=1) is None


def stop(*_):
    raise KeyboardInterrupt


def test_secrets_are_not_written(recipe, tmp_path):
    train(recipe, hub_token="hf_secret", max_steps=1, eval_steps=1)
    for path in (tmp_path / "run").iterdir():
        if path.is_file():
            assert b"hf_secret" not in path.read_bytes(), path.name
