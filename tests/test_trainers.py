"""Seq2SeqTrainer and TRL's SFTTrainer train every kind of SLM, and never the LLM."""

import ctypes.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    SLM_KINDS,
    build_labels,
    build_llm,
    build_llm_tokenizer,
    build_model,
    build_prompts,
    build_slm_tokenizer,
    padded,
)
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.data.collator import DataCollatorForLLM2SLM, tokenize_pairs
from llm2slm.data.prompt_features import cache_prompt_features
from llm2slm.modeling_llm2slm import response_mask
from llm2slm.training.trainer import parameter_groups

TOKENIZER = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
TRAINERS = {Seq2SeqTrainer: Seq2SeqTrainingArguments, SFTTrainer: SFTConfig}
both_trainers = pytest.mark.parametrize("trainer_class", TRAINERS, ids=lambda trainer: trainer.__name__)
one_slm_each = pytest.mark.parametrize(
    ("trainer_class", "slm"), [(Seq2SeqTrainer, "llama"), (SFTTrainer, "t5")], ids=["Seq2SeqTrainer", "SFTTrainer"]
)
RAW_ROWS = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Transformers 4 leaves a training's precision in the environment, for all that come after it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def build_pairs(count=12) -> Dataset:
    """Prompts and completions of different lengths."""
    words = [[f"w{(3 * i + j) % 54}" for j in range(2 + i % 4)] for i in range(count)]
    completions = ["".join("abcdefghijkl"[(i + j) % 12] for j in range(1 + i % 5)) for i in range(count)]
    return Dataset.from_dict({"prompt": [" ".join(prompt) for prompt in words], "completion": completions})


@pytest.fixture(scope="module")
def pairs():
    return build_pairs()


@pytest.fixture(scope="module")
def tokenized(pairs):
    return tokenize_pairs(pairs, TOKENIZER, 16, 16)


def make_trainer(trainer_class, model, dataset, folder, callbacks=None, optimizers=(None, None), **arguments):
    """A trainer of three steps on the processor; `arguments` are its arguments', but for the evaluation set."""
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    eval_dataset, own = arguments.pop("eval_dataset", None), {}
    for name in ("peft_config", "compute_metrics", "compute_loss_func"):
        if name in arguments:
            own[name] = arguments.pop(name)
    return trainer_class(
        model,
        args=TRAINERS[trainer_class](output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=TOKENIZER,
        data_collator=DataCollatorForLLM2SLM(TOKENIZER, model=model),
        optimizers=optimizers,
        **own,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed_parts(model, before) -> set[str]:
    """Which of llm, projector and slm have a changed tensor."""
    return {name.split(".")[0] for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lora(**kwargs) -> LoraConfig:
    target_modules = r"slm\..*\.(q|v|q_proj|v_proj|c_attn)"
    return LoraConfig(r=4, target_modules=target_modules, modules_to_save=["projector"], **kwargs)


# --------------------------------------------------------------------------------------------------- each kind of SLM
@pytest.mark.parametrize("slm", SLM_KINDS)
def test_seq2seq_trainer_trains_and_its_evaluation_writes(slm, tokenized, tmp_path):
    model = build_model(slm=slm)
    model.generation_config.min_new_tokens = 3
    before, written = weights(model), []
    trainer = make_trainer(
        Seq2SeqTrainer,
        model,
        tokenized,
        tmp_path,
        eval_dataset=tokenized.select(range(5)),
        compute_metrics=lambda output: {"rows": written.append(output.predictions) or len(output.predictions)},
        predict_with_generate=True,
        generation_max_length=6,
        eval_strategy="steps",
        eval_steps=3,
    )
    first = trainer.evaluate()
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert last["eval_loss"] < first["eval_loss"] and last["eval_rows"] == 5
    ids = np.where(written[-1] < 0, TOKENIZER.pad_token_id, written[-1])
    assert (ids != TOKENIZER.pad_token_id).sum(axis=1).max() <= 6
    assert any(TOKENIZER.batch_decode(ids, skip_special_tokens=True))
    assert changed_parts(model, before) == {"projector", "slm"}


@pytest.mark.parametrize("slm", SLM_KINDS)
def test_sft_trainer_trains_and_reports_accuracy_and_entropy(slm, tokenized, tmp_path):
    model = build_model(slm=slm)
    before = weights(model)
    evaluation = {"eval_dataset": tokenized.select(range(5)), "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(SFTTrainer, model, tokenized, tmp_path, **evaluation)
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert 0 <= evaluated[-1]["eval_mean_token_accuracy"] <= 1 and evaluated[-1]["eval_entropy"] > 0
    assert changed_parts(model, before) == {"projector", "slm"}


@pytest.mark.parametrize("slm", SLM_KINDS)
def test_the_loss_of_sft_trainer_is_the_models_own(slm):
    model, prompt, labels = build_model(slm=slm), padded(build_prompts()), build_labels()
    own = model(**prompt, labels=labels)
    own.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    fused = model(
        **prompt,
        labels=labels,
        shift_labels=labels,
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        decoder_attention_mask=response_mask(labels),
        fused_lm_head=True,
    )
    fused.loss.backward()
    torch.testing.assert_close(fused.loss, own.loss)
    top = (own.logits.argmax(-1) == labels) & (labels != -100)
    assert fused.is_top1.bool().equal(top)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in gradients), name
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("slm", "task_type"), [("t5", None), ("bart", "SEQ_2_SEQ_LM"), ("llama", "SEQ_2_SEQ_LM"), ("gpt2", None)]
)
def test_sft_trainer_trains_adapters_and_projector_alone(slm, task_type, tokenized, tmp_path):
    model = build_model(slm=slm)
    before = weights(model)
    trainer = make_trainer(SFTTrainer, model, tokenized, tmp_path, peft_config=lora(task_type=task_type))
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all(".projector." in name or (".slm." in name and ".lora_" in name) for name in trained)
    adapted = weights(trainer.model)
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not tensor.equal(adapted[name])}
    assert moved and moved <= trained and any(".projector." in name for name in moved)
    assert any(".lora_" in name for name in moved)
    merged = trainer.model.merge_and_unload()
    assert changed_parts(merged, before) == {"projector", "slm"}


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_seq2seq_trainer_trains_adapters_and_writes(slm, tokenized, tmp_path):
    model = build_model(slm=slm)
    before = weights(model)
    adapted = get_peft_model(model, lora(task_type="SEQ_2_SEQ_LM"))
    arguments = {"predict_with_generate": True, "generation_max_length": 6}
    trainer = make_trainer(Seq2SeqTrainer, adapted, tokenized, tmp_path, **arguments)
    trainer.train()
    assert trainer.predict(tokenized.select(range(3))).predictions.shape[0] == 3
    assert changed_parts(adapted.merge_and_unload(), before) == {"projector", "slm"}


# ---------------------------------------------------------------------------------------------------- ways of training
def trained_weights(trainer_class, dataset, folder, slm="t5", **arguments):
    """Loss of each step, and the weights after them; plain gradient descent, so that they show the gradients."""
    model = build_model(slm=slm)
    trainer = make_trainer(
        trainer_class, model, dataset, folder, **{"optim": "sgd", "learning_rate": 0.1, **arguments}
    )
    trainer.train()
    return losses(trainer), weights(model)


def assert_same_training(found, expected, **tolerances):
    tolerances = tolerances or {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), **tolerances)
    torch.testing.assert_close(found[1], expected[1], **tolerances)


@both_trainers
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_accumulated_batches_train_like_one_larger_batch(trainer_class, slm, tokenized, tmp_path):
    whole = trained_weights(trainer_class, tokenized, tmp_path, slm, per_device_train_batch_size=6, max_steps=2)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2}
    assert_same_training(trained_weights(trainer_class, tokenized, tmp_path, slm, **sizes), whole)


@one_slm_each
def test_gradient_checkpointing_changes_no_result(trainer_class, slm, tokenized, tmp_path):
    plain = trained_weights(trainer_class, tokenized, tmp_path, slm)
    assert_same_training(trained_weights(trainer_class, tokenized, tmp_path, slm, gradient_checkpointing=True), plain)


@both_trainers
def test_bfloat16_trains_float32_weights_to_about_the_same(trainer_class, tokenized, tmp_path):
    plain = trained_weights(trainer_class, tokenized, tmp_path)
    half = trained_weights(trainer_class, tokenized, tmp_path, bf16=True)
    assert {tensor.dtype for tensor in half[1].values()} == {torch.float32}
    assert half[0] != plain[0]
    assert half[0] == pytest.approx(plain[0], rel=0.02)


@both_trainers
def test_the_best_checkpoint_is_loaded_at_the_end(trainer_class, tokenized, tmp_path, llm_folder):
    model = build_model(llm=llm_folder)  # a slim checkpoint, without the LLM
    before = weights(model)
    trainer = make_trainer(
        trainer_class,
        model,
        tokenized,
        tmp_path / "run",
        eval_dataset=tokenized.select(range(5)),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, which is the first
    )
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(evaluated) == evaluated[0] > evaluated[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[0])
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"projector", "slm"}
    found = model.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in saved.items())
    assert changed_parts(model, before) == {"projector", "slm"}


@one_slm_each
def test_a_resumed_training_ends_bit_equal(trainer_class, slm, tokenized, tmp_path, llm_folder):
    def train(folder, resume_from=None):
        model = build_model(llm=llm_folder, slm=slm)
        arguments = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(trainer_class, model, tokenized, folder, **arguments)
        trainer.train(resume_from_checkpoint=resume_from)
        return losses(trainer), weights(model)

    uninterrupted = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", resume_from=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed[0] == uninterrupted[0]
    assert [name for name, tensor in uninterrupted[1].items() if not tensor.equal(resumed[1][name])] == []


@both_trainers
def test_a_saved_training_loads_again_and_keeps_its_names(trainer_class, tokenized, tmp_path):
    model = build_model()
    names = set(model.state_dict())
    trainer = make_trainer(trainer_class, model, tokenized, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert set(loaded.state_dict()) == names
    prompt = padded(build_prompts())
    assert loaded.generate(**prompt, max_new_tokens=4).equal(model.eval().generate(**prompt, max_new_tokens=4))


def test_the_view_without_the_head_has_no_parameters_and_is_no_part_of_the_model():
    model = build_model()
    names = [name for name, _ in model.named_modules()]
    view = model.base_model
    assert view is not model and not list(view.parameters()) and not list(view.children())
    assert [name for name, _ in model.named_modules()] == names
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert model(**padded(build_prompts()), labels=build_labels()).loss.requires_grad


@both_trainers
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_reentrant_checkpointing_trains_adapters_alike(trainer_class, slm, tokenized, tmp_path):
    def train(**arguments):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=r"slm\..*\.(q|v|q_proj|v_proj)", init_lora_weights=False)
        adapted = get_peft_model(build_model(slm=slm), config)
        arguments |= {"optim": "sgd", "learning_rate": 0.1}
        trainer = make_trainer(trainer_class, adapted, tokenized, tmp_path, **arguments)
        trainer.train()
        return losses(trainer), weights(adapted)

    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert_same_training(train(**reentrant), train())


# ------------------------------------------------------------------------------- what a trainer does with the labels
def shifts_labels(trainer_class) -> bool:
    """Whether a trainer's own labels are one position ahead of the logits, as in all of TRL."""
    return trainer_class is SFTTrainer


def aligned(trainer_class, logits, labels):
    return (logits[:, :-1], labels[:, 1:]) if shifts_labels(trainer_class) else (logits, labels)


def first_logits(dataset, slm):
    """Log-probabilities and labels of the first four examples, as the model itself aligns them."""
    model, batch = build_model(slm=slm), DataCollatorForLLM2SLM(TOKENIZER)([dataset[i] for i in range(4)])
    with torch.no_grad():
        log_probs = model(**batch).logits.log_softmax(dim=-1)
    return log_probs[batch["labels"] != -100], batch["labels"][batch["labels"] != -100]


@both_trainers
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_labels_are_smoothed_where_they_stand(trainer_class, slm, tokenized, tmp_path):
    log_probs, labels = first_logits(tokenized, slm)
    true_class = log_probs.gather(1, labels[:, None]).mean()
    rows = tokenized.select(range(4))
    found = trained_weights(trainer_class, rows, tmp_path, slm, label_smoothing_factor=0.3, max_steps=1)
    assert found[0] == pytest.approx([-(0.7 * true_class + 0.3 * log_probs.mean()).item()], abs=1e-4)
    other = Seq2SeqTrainer if trainer_class is SFTTrainer else SFTTrainer
    assert_same_training(found, trained_weights(other, rows, tmp_path, slm, label_smoothing_factor=0.3, max_steps=1))


@both_trainers
def test_a_loss_of_ones_own_trains_like_the_models(trainer_class, tokenized, tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        logits, labels = aligned(trainer_class, outputs.logits, labels)
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / num_items_in_batch

    expected = trained_weights(trainer_class, tokenized, tmp_path)
    assert_same_training(trained_weights(trainer_class, tokenized, tmp_path, compute_loss_func=loss), expected)


@both_trainers
@pytest.mark.parametrize("slm", ["t5", "gpt2"])
def test_metrics_meet_the_logits_of_their_labels(trainer_class, slm, tokenized, tmp_path):
    def accuracy(output):
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        logits, labels = aligned(trainer_class, logits, output.label_ids)
        return {"accuracy": (logits.argmax(-1) == labels)[labels != -100].mean()}

    log_probs, labels = first_logits(tokenized, slm)
    rows = tokenized.select(range(4))
    arguments = {"eval_dataset": rows, "compute_metrics": accuracy}
    trainer = make_trainer(trainer_class, build_model(slm=slm), rows, tmp_path, **arguments)
    expected = (log_probs.argmax(-1) == labels).float().mean().item()
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(expected)


def test_the_dft_loss_weights_each_token_by_its_probability(tokenized, tmp_path):
    log_probs, labels = first_logits(tokenized, "llama")
    log_probs = log_probs.gather(1, labels[:, None])
    found = trained_weights(SFTTrainer, tokenized.select(range(4)), tmp_path, "llama", loss_type="dft", max_steps=1)
    assert found[0] == pytest.approx([-(log_probs * log_probs.exp()).mean().item()], abs=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"label_smoothing_factor": 0.2}])
def test_a_model_that_sft_trainer_had_trains_in_seq2seq_trainer_like_a_new_one(arguments, tokenized, tmp_path):
    arguments |= {"optim": "sgd", "learning_rate": 0.1}
    had = build_model()
    make_trainer(SFTTrainer, had, tokenized, tmp_path)
    found = []
    for model in (had, build_model()):
        trainer = make_trainer(Seq2SeqTrainer, model, tokenized, tmp_path, **arguments)
        trainer.train()
        found.append((losses(trainer), weights(model)))
    assert_same_training(*found)


def test_a_trainer_that_keeps_the_labels_needs_the_model_in_the_collator(tokenized, tmp_path):
    trainer = make_trainer(Seq2SeqTrainer, build_model(), tokenized, tmp_path, label_smoothing_factor=0.1)
    trainer.data_collator = DataCollatorForLLM2SLM(TOKENIZER)
    with pytest.raises(
        ValueError, match=r"keeps `labels`.*needs `data_collator=DataCollatorForLLM2SLM\(tokenizer, mo"
    ):
        trainer.train()


@both_trainers
def test_noise_on_token_embeddings_is_refused(trainer_class, tokenized, tmp_path):
    trainer = make_trainer(trainer_class, build_model(), tokenized, tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="`neftune_noise_alpha` puts noise on token embeddings.*leave it out"):
        trainer.train()


@pytest.mark.parametrize("packed", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_batches_without_padding_are_refused(packed, tokenized, tmp_path):
    with pytest.raises(ValueError, match="custom data collator is not supported when using padding-free"):
        make_trainer(SFTTrainer, build_model(), tokenized, tmp_path, **packed)


def test_a_text_that_sft_trainer_takes_for_its_own_answer_is_refused(pairs, tmp_path):
    trainer = make_trainer(SFTTrainer, build_model(), pairs, tmp_path, completion_only_loss=False)
    with pytest.raises(ValueError, match="that are the `input_ids` are SFTTrainer's own.*`tokenize_pairs` first"):
        trainer.train()


def test_sft_trainer_needs_a_head_without_adapted_tokens(tokenized, tmp_path):
    adapted = get_peft_model(
        build_model(slm="gpt2"), LoraConfig(target_modules=["c_proj"], trainable_token_indices=[5])
    )
    make_trainer(Seq2SeqTrainer, adapted, tokenized, tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match="`trainable_token_indices` of an SLM with tied embeddings.*Seq2SeqTrainer"):
        make_trainer(SFTTrainer, adapted, tokenized, tmp_path).train()


# ---------------------------------------------------------------------------------------------------------- data sets
def as_chats(pairs) -> Dataset:
    return pairs.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    )


@both_trainers
@pytest.mark.parametrize("conversational", [False, True])
def test_prompts_and_completions_train_like_tokenized_ones(trainer_class, conversational, pairs, tmp_path):
    rows = as_chats(pairs) if conversational else pairs
    expected = trained_weights(trainer_class, tokenize_pairs(rows, TOKENIZER, 16, 16), tmp_path)
    arguments = RAW_ROWS if trainer_class is SFTTrainer else {"remove_unused_columns": False}
    assert_same_training(trained_weights(trainer_class, rows, tmp_path, **arguments), expected)


@both_trainers
@pytest.mark.parametrize("fusion", ["replace", "add"])
def test_cached_features_train_like_the_live_llm(trainer_class, fusion, tokenized, tmp_path):
    model = build_model(fusion=fusion)
    cached = cache_prompt_features(tokenized, model, tmp_path)
    arguments = {"optim": "sgd", "learning_rate": 0.01}
    live = make_trainer(trainer_class, model, tokenized, tmp_path, **arguments)
    live.train()
    without_llm = build_model(fusion=fusion)
    without_llm.llm = None
    arguments |= RAW_ROWS if trainer_class is SFTTrainer else {"remove_unused_columns": False}
    trainer = make_trainer(trainer_class, without_llm, cached, tmp_path, **arguments)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(live), rel=2e-3)  # float16


def test_a_data_set_that_sft_trainer_tokenizes_itself_is_refused(pairs, tmp_path):
    trainer = make_trainer(SFTTrainer, build_model(), pairs, tmp_path)
    with pytest.raises(ValueError, match="begin with -100 are SFTTrainer's own.*`tokenize_pairs` first, or leave it"):
        trainer.train()


def test_sft_trainer_needs_the_collators_batches(tokenized, tmp_path):
    trainer = make_trainer(SFTTrainer, build_model(), tokenized, tmp_path)
    trainer.data_collator = DataCollatorForLLM2SLM(TOKENIZER)
    message = (
        r"batches with `decoder_input_ids`: pass it `data_collator=DataCollatorForLLM2SLM\(tokenizer, model=model\)`"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_an_slm_with_a_bias_behind_its_head_is_refused_by_sft_trainer_alone(tokenized, tmp_path):
    model = build_model(slm="marian")
    model.slm.final_logits_bias.fill_(1.0)
    make_trainer(Seq2SeqTrainer, model, tokenized, tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match="MarianMTModel adds `final_logits_bias`.*train it with Seq2SeqTrainer"):
        make_trainer(SFTTrainer, model, tokenized, tmp_path).train()


# ------------------------------------------------------------------------------------------------- two learning rates
def test_projector_and_slm_learn_at_their_own_rates_and_decay_like_the_trainers(tokenized, tmp_path):
    model = build_model(slm="gpt2")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=1e-3, projector_learning_rate=1e-2, weight_decay=0.1)
    decays = set(make_trainer(Seq2SeqTrainer, model, tokenized, tmp_path).get_decay_parameter_names(model))
    seen = []
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            seen.append(name)
            assert group["lr"] == (1e-2 if name.startswith("projector.") else 1e-3)
            assert group["weight_decay"] == (0.1 if name in decays else 0.0)
    assert sorted(seen) == sorted(name for name in names.values() if not name.startswith("llm."))


@both_trainers
def test_a_trainer_keeps_the_rates_and_schedules_both(trainer_class, tokenized, tmp_path):
    model = build_model()
    before = weights(model)
    optimizer = torch.optim.SGD(parameter_groups(model, learning_rate=1e-30, projector_learning_rate=0.1))
    trainer = make_trainer(trainer_class, model, tokenized, tmp_path, optimizers=(optimizer, None), max_steps=2)
    trainer.train()
    assert changed_parts(model, before) == {"projector"}  # the other rate is below what a float32 can show
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1e-30, 0.1}
    assert all(group["lr"] == 0 for group in optimizer.param_groups)  # both at the schedule's end


def test_adapters_are_in_the_slms_group():
    model = get_peft_model(build_model(slm="llama"), lora())
    groups = parameter_groups(model, learning_rate=1e-3, projector_learning_rate=1e-2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {group["lr"]: {names[id(p)] for p in group["params"]} for group in groups}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found[1e-3] == {name for name in trained if ".lora_" in name}
    assert found[1e-2] == {name for name in trained if ".projector." in name}
    assert found[1e-3] | found[1e-2] == trained


def test_parameter_groups_of_what_is_no_training():
    with pytest.raises(ValueError, match="`projector_learning_rate` must be positive, got 0"):
        parameter_groups(build_model(), learning_rate=1e-3, projector_learning_rate=0)
    for model in (build_llm(), build_model().requires_grad_(False)):
        with pytest.raises(ValueError, match=f"{type(model).__name__} is no LLM-to-SLM model, or nothing of it"):
            parameter_groups(model, learning_rate=1e-3, projector_learning_rate=1e-2)


# ------------------------------------------------------------------------------------------------------------- memory
FREED = """
from llm2slm.utils import give_back_freed_memory, resident_bytes

size = 4000
blocks = [b"x" * size for _ in range(50_000)]  # 200 MB
kept = blocks[::100]
del blocks
before = resident_bytes("VmRSS")
give_back_freed_memory()
print(before - resident_bytes("VmRSS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's and /proc")
@pytest.mark.parametrize("allocator", ["glibc", "jemalloc"])
def test_freed_memory_goes_back_to_the_system(allocator):
    environment = {**os.environ}
    if allocator == "jemalloc":
        library = ctypes.util.find_library("jemalloc")
        if library is None:
            pytest.skip("jemalloc is not installed")
        kept_by_it = "narenas:1,dirty_decay_ms:-1,muzzy_decay_ms:-1"  # for good, unless it is asked
        environment |= {"LD_PRELOAD": library, "MALLOC_CONF": kept_by_it}
    done = subprocess.run([sys.executable, "-c", FREED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100 * 2**20
