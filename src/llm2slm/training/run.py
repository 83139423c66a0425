"""A training from its options to the folder it leaves; `llm2slm train` calls [`train`]."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer, TrainerState, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import disable_progress_bar

from ..data.pairs import describe_labels, describe_parts, hash_texts, recorded_source
from ..loading_llm2slm import resolve_revision, split_gguf
from ..utils import check_installed, machine, peak_memory_gib, shown, versions, write_folder, write_json
from . import record, setup
from .distillation import TaughtCollator
from .options import TrainOptions
from .run_folder import (
    ELSEWHERE,
    REPORT,
    START,
    check_data,
    last_complete_checkpoint,
    move_to_top,
    open_run_folder,
    remove_incomplete_checkpoints,
    remove_made_first,
)
from .sources import WeighingCollator, check_sources, scale_weights
from .teacher import Teaching, describe_counts, find_teacher, teach
from .token_loss import TokenLossTrainer
from .trainer import FreedMemory, SecondsInLog, SimilarLengthTrainer, TrainerOptions, parameter_groups


def train(options: TrainOptions, training: TrainerOptions) -> None:
    r"""
    Trains in a folder, `training.output_dir`: a new one, or that of the same training, which is resumed.

        train(
            TrainOptions(data="pairs.jsonl", llm="google-t5/t5-large", slm="google-t5/t5-small"),
            TrainerOptions(output_dir="runs/t5", learning_rate=1e-4),
        )

    Args:
        options ([`TrainOptions`]): What is trained, and on which data.
        training ([`TrainerOptions`]): How.

    Raises:
        OSError: if data or a model is missing, the folder is another's, or the disk is too small.
        ValueError: if options or data are not right.
        ImportError: if a package is missing.
    """
    check_installed("Training", "datasets", "matplotlib", *([] if options.lora_r is None else ["peft"]))
    if options.projector_learning_rate is not None and (training.fsdp or training.deepspeed):
        raise ValueError("FSDP and DeepSpeed make the optimizer themselves: leave out `projector_learning_rate`.")
    if options.teacher and training.label_smoothing_factor:
        raise ValueError("A teacher says what else might stand there: leave out `label_smoothing_factor`.")
    if options.more_data and training.label_smoothing_factor:
        raise ValueError("`more_data` weighs the loss token by token, unsmoothed: leave out `label_smoothing_factor`.")
    if options.validation_split == "none" and training.eval_strategy != "no":
        raise ValueError('There is nothing to evaluate with `validation_split="none"`: set `eval_strategy="no"`.')
    if training.save_only_model:
        raise ValueError("A training is resumed from the optimizer's state, too: leave out `save_only_model`.")
    if training.deepspeed and options.lora_r is not None and options.arm != "llm":
        raise ValueError(
            "LoRA on the SLM is merged at the end, which does not go with DeepSpeed: leave out one of them."
        )
    if is_deepspeed_zero3_enabled():  # loading a model then needs all processes, but the start is made by one
        raise ValueError("DeepSpeed's ZeRO stage 3 is not supported: choose stage 1 or 2.")
    folder = Path(training.output_dir)
    disable_progress_bar()  # of reading and writing weights, one for each checkpoint; the training's own remains
    try:
        _train(options, training, {**options.recipe, **training.recipe}, folder)
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from the last checkpoint in {folder}.", file=sys.stderr)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _train(options: TrainOptions, training: TrainerOptions, recipe: dict[str, Any], folder: Path) -> None:
    with training.main_process_first(local=False):
        open_run_folder(folder, recipe)
        if (folder / REPORT).exists():
            remove_made_first(folder)
            _say(training, f"This training is finished: its result is in {folder}.")
            return
        teacher = find_teacher(options)
        check_sources(options)
        (pairs, more_pairs), parts = setup.load_splits(options, teacher), setup.find_parts(options)
        check_data(folder, {split: hash_texts(rows) for split, rows in pairs.items()}, training.world_size)
        if parts is not None:
            _say(training, describe_parts(options.data, parts))
        for source in [options.data, *options.more_data]:
            if labels := describe_labels(source, options.completion_format):
                _say(training, labels)
        if options.arm != "llm" and not (folder / START).exists():
            set_seed(training.seed)
            write_folder(folder / START, lambda path: setup.write_start(options, pairs, training.device, path))
    model, tokenizer = setup.load_start(options, folder / START)
    if options.arm == "llm2slm":
        max_new_tokens = training.generation_max_length or options.response_max_length
        setup.set_generation(model, max_new_tokens, training.generation_num_beams or 1)
    with training.main_process_first(local=False):
        examples = setup.make_examples(options, pairs, model, tokenizer)
        if options.arm == "llm2slm" and options.cache_features:
            model.to(training.device)
            examples = setup.cache_features(options, examples, model)
            model.llm = None
        teaching = None
        if teacher is not None:
            examples["train"], teaching = teach(
                options, teacher, examples["train"], tokenizer, training.device, folder
            )
            if cut := describe_counts(teaching.counts):
                _say(training, cut)
        if options.more_data:
            examples["train"] = scale_weights(examples["train"])
        remove_incomplete_checkpoints(folder, training.world_size)
    parameters = record.count_parameters(options.arm, model)
    collator, trainer_class, more = setup.make_collator(options, model, tokenizer), SimilarLengthTrainer, {}
    if teaching is not None:
        collator = TaughtCollator(collator, teaching)
    if options.more_data:
        collator = WeighingCollator(collator)
    if teaching is not None or options.more_data:
        trainer_class = TokenLossTrainer
        more = {
            "weight": options.teacher_weight,
            "temperature": options.teacher_temperature,
            "shift": not model.config.is_encoder_decoder,
        }
    if options.lora_r is not None:
        set_seed(training.seed)
        model = setup.with_lora(options, model)
    parameters["trained"] = record.count_trained(model)
    report = _describe(options, recipe, examples, parts, more_pairs, teaching, parameters)
    _check_disk(folder, model, training)

    trainer = trainer_class(
        model,
        training,
        data_collator=collator,
        train_dataset=examples["train"],
        eval_dataset=examples.get("validation"),
        processing_class=tokenizer,
        optimizers=(_make_optimizer(options, training, model), None),
        callbacks=[SecondsInLog(), FreedMemory()],
        **more,
    )
    checkpoint = last_complete_checkpoint(folder, training.world_size)
    _say(
        training,
        f"Training {options.arm} on {len(examples['train']):,} pairs, {parameters['trained'] / 1e6:.1f}M parameters"
        + (f", resuming from {checkpoint}." if checkpoint else "."),
    )
    if checkpoint is not None and _steps_left(checkpoint) == 0:
        metrics = _load_trained(trainer, checkpoint)
    else:
        metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    finish(options, training, folder, trainer, metrics, report)


def _steps_left(checkpoint: Path) -> int:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.max_steps - state.global_step


def _load_trained(trainer: Seq2SeqTrainer, checkpoint: Path) -> dict[str, float]:
    """Takes up what was killed behind its last step: the Trainer would do another one, if that was within an epoch."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.best_global_step}")
    trainer._load_from_checkpoint(str(best if trainer.args.load_best_model_at_end and best.is_dir() else checkpoint))
    return {"epoch": trainer.state.epoch, "total_flos": trainer.state.total_flos}


def _describe(options, recipe, examples, parts, more_pairs, teaching: Teaching | None, parameters) -> dict[str, Any]:
    """What `run.json` says of a training before its first step."""
    return {
        "arm": options.arm,
        "recipe": {name: value for name, value in recipe.items() if name not in ELSEWHERE},
        "llm": _source(options.llm) if options.llm else None,
        "slm": None if options.arm == "llm" else _slm_source(options),
        "teacher": None if teaching is None else _teacher_source(options, teaching),
        "data": {
            "source": recorded_source(options.data),
            "fingerprint": hash_texts(examples["train"]),
            "train_pairs": len(examples["train"]),
            "validation_pairs": len(examples["validation"]) if "validation" in examples else 0,
            "more": {recorded_source(name): number for name, number in more_pairs.items()},
            "parts": parts,  # of a file that was split by a hash of its prompts
            "prompt_format": options.prompt_format,
            "completion_format": options.completion_format,
        },
        "parameters": parameters,
    }


def finish(
    options: TrainOptions,
    training: TrainerOptions,
    folder: Path,
    trainer: Seq2SeqTrainer,
    metrics: dict[str, float],
    report: dict[str, Any],
) -> None:
    """Writes the result: metrics and picture, the best model and its tokenizer and, last, `run.json`."""
    trainer.save_metrics("train", metrics, combined=False)
    trainer.save_state()
    history, eval_loss = list(trainer.state.log_history), None
    if trainer.eval_dataset is not None:
        evaluation = trainer.evaluate()
        trainer.save_metrics("eval", evaluation, combined=False)
        eval_loss = evaluation["eval_loss"]
    _save_model(options, folder, trainer)
    if not trainer.is_world_process_zero():
        return
    losses = [entry for entry in history if "loss" in entry]
    record.plot_losses(history, f"{options.arm}: {folder.name}", folder / "loss.png", taught=options.teacher != "")
    report["train"] = {
        "seconds": history[-1]["seconds"],
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "final_loss": losses[-1]["loss"] if losses else None,
        "eval_loss": eval_loss,
        "peak_memory_gib": peak_memory_gib(),
    }
    report |= {"versions": versions(), "machine": machine(), "seed": training.seed}
    write_json(folder / REPORT, report, replace=True)
    remove_made_first(folder)
    _say(training, f"Finished: {shown(folder)}" + ("" if eval_loss is None else f", evaluation loss {eval_loss:.4f}"))


def _save_model(options: TrainOptions, folder: Path, trainer: Seq2SeqTrainer) -> None:
    """Writes the best model and its tokenizer, with what LoRA learned of an SLM in the SLM's own weights."""
    aside = folder / "result.part"
    if trainer.is_world_process_zero():
        shutil.rmtree(aside, ignore_errors=True)
    if options.lora_r is not None and options.arm != "llm":
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    if trainer.is_fsdp_enabled:  # as one file, which the first process writes
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(aside))
    if trainer.is_world_process_zero():
        (aside / "training_args.bin").unlink()  # a pickle, which no one needs to load the model
        move_to_top(aside, folder)


def _source(name: str) -> dict[str, Any]:
    folder, gguf_file = split_gguf(name, None)
    return {"name_or_path": name, "revision": resolve_revision(folder, gguf_file, {})}


def _slm_source(options: TrainOptions) -> dict[str, Any]:
    if options.slm == "fresh":
        return {"name_or_path": "fresh", "revision": None}
    if options.slm == "slice":
        return _source(options.slice_of or options.llm) | {"layers": options.slm_layers}
    return _source(options.slm)


def _teacher_source(options: TrainOptions, teaching: Teaching) -> dict[str, Any]:
    return _source(teaching.teacher.name) | {
        "weight": options.teacher_weight,
        "temperature": options.teacher_temperature,
        "top_k": options.teacher_top_k,
        "dtype": options.teacher_dtype,
        "prompt_format": teaching.teacher.prompt_format,
        "distributions": teaching.folder.name,
        **teaching.counts,
    }


def _make_optimizer(options, training, model):
    if options.arm != "llm2slm" or options.projector_learning_rate is None:
        return None  # the Trainer makes its own
    groups = parameter_groups(model, training.learning_rate, options.projector_learning_rate, training.weight_decay)
    optimizer_class, arguments = Seq2SeqTrainer.get_optimizer_cls_and_kwargs(training, model)
    return optimizer_class(groups, **arguments)


def _check_disk(folder: Path, model, training) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = sum(p.numel() * p.element_size() for p in trained)
    checkpoint_bytes = saved + 2 * 4 * sum(p.numel() for p in trained)  # Adam's two moments
    needed = ((training.save_total_limit or 1) + 1) * checkpoint_bytes + saved
    # Those of the interrupted training are replaced one by one.
    there = sum(path.stat().st_size for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/*"))
    free = shutil.disk_usage(folder).free + there
    if needed > free:
        raise OSError(
            f"The checkpoints of this training need {needed / 2**30:.2f} GiB, but {folder} has {free / 2**30:.2f} GiB "
            "free: make room, or choose a smaller `save_total_limit`."
        )


def _say(training: TrainerOptions, text: str) -> None:
    if training.process_index == 0:
        print(text, flush=True)
