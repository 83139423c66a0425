"""The options of a training: what is trained, on which data, and other defaults for the Trainer's own.

No torch and no transformers, so that `llm2slm train --help` stays quick.
"""

import math
import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from huggingface_hub.constants import HF_HOME


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainOptions:
    r"""
    What is trained, and on which data; each field is an option of `llm2slm train`, documented by its help. `recipe`
    holds the options that were given and differ from the defaults.

    Raises:
        ValueError: if an option that the others need is missing, or two of them contradict each other.
    """

    arm: Literal["llm2slm", "slm", "llm"] = _option(
        "llm2slm",
        "llm2slm: projector and SLM, behind the frozen LLM; slm: the SLM alone; llm: the LLM alone, with LoRA",
    )
    data: str = _option(
        "",
        "folder written by save_to_disk, .json, .jsonl, .csv or .parquet file (a hash of each prompt splits it into"
        " train, validation and test, and all is all of it), or name on the Hub",
    )
    train_split: str = _option("train", "split that is learned from")
    validation_split: str = _option("validation", "split whose loss chooses the best checkpoint; none: no evaluation")
    prompt_format: str | None = _option(
        None, 'text of a prompt made of the columns, such as "{prompt}\\n"; the column `prompt` if omitted'
    )
    completion_format: str | None = _option(
        None, "text of a response made of the columns; the column `completion` if omitted"
    )
    prompt_max_length: int = _option(512, "longest prompt, in tokens of the one who reads it")
    response_max_length: int = _option(512, "longest response, in tokens of the one who writes it")
    truncate: bool = _option(False, "cut longer ones instead of leaving them out")
    skip_empty: bool = _option(False, "leave out pairs with an empty side instead of stopping at the first")
    max_train_pairs: int | None = _option(None, "learn from this many pairs, evenly spaced")
    max_validation_pairs: int | None = _option(None, "evaluate on this many pairs, evenly spaced")
    more_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "further data sets to learn from, one or more, such as what `llm2slm label` wrote: the split"
            " `train` of a folder or a name on the Hub, all of a file, in the same formats"
        },
    )
    more_data_weight: float = _option(1.0, "what a token of --more-data counts in the loss; one of --data counts 1")

    llm: str = _option("", "the LLM: name on the Hub, folder, .gguf file or package:NAME")
    llm_dtype: Literal["float32", "bfloat16", "float16"] = _option("float32", "number format the LLM is loaded in")
    llm_layer: list[int] = field(
        default_factory=lambda: [-1],
        metadata={"help": "layers whose states are read, one or more: 0 is the first one's input, -1 the last"},
    )
    fusion: Literal["replace", "add"] = _option(
        "replace", "replace: the SLM sees the projected states; add: its embeddings of the prompt plus these"
    )
    projector_type: Literal["mlp", "linear"] = _option("mlp", "mlp: linear, ReLU, linear")
    projector_hidden_size: int | None = _option(None, "width inside the mlp; the SLM's if omitted")
    projector_norm: Literal["layer_norm", "standardize", "none"] = _option(
        "layer_norm",
        "normalisation of the LLM's states. standardize: each number by its own mean and deviation, measured before"
        " training (with cached features)",
    )
    start: Literal["random", "zero", "states"] = _option(
        "random",
        "the projector at first. zero: the model equals the SLM alone (with add and one tokenizer); states: a slice of"
        " the layers above the one read begins with its states as they are, and a head fitted to the layers it lacks;"
        " so does the SLM alone (with cached features)",
    )

    slm: str = _option(
        "", "the SLM: name on the Hub or folder; fresh: a new small Llama; slice: chosen layers of --slice-of"
    )
    slm_tokenizer: Literal["own", "llm", "trimmed"] = _option(
        "own", "own: the SLM's, trained on the text for a fresh one; llm: the LLM's; trimmed: the LLM's, of the text's"
        " tokens"
    )  # fmt: skip
    llm_tokenizer: Literal["own", "trimmed"] = _option(
        "own",
        "how the LLM's prompts are cut. own: as ever; trimmed: into the tokens of a trimmed SLM, which so can copy"
        " what it reads",
    )
    vocab_size: int | None = _option(
        None,
        "tokens at most, of a tokenizer trained for a fresh SLM (8192 if omitted) or trimmed (the most used ones)",
    )
    hidden_size: int = _option(256, "width of a fresh SLM")
    num_hidden_layers: int = _option(4, "depth of a fresh SLM")
    slm_layers: list[int] | None = _option(None, "layers of a slice, from 0")
    slice_of: str = _option("", "language model that is sliced; the LLM if omitted")

    teacher: str = _option(
        "",
        "learn from the distributions of this model too: a folder of --arm llm, an adapter or any model with the SLM's"
        " tokenizer, whole where the SLM's is trimmed",
    )
    teacher_weight: float = _option(
        0.5, "share of the divergence from the teacher in the loss, from 0 to 1; the rest is cross-entropy"
    )
    teacher_temperature: float = _option(1.0, "divides the log-probabilities of teacher and student")
    teacher_top_k: int = _option(32, "likeliest tokens of the teacher that are kept; the others count as one")
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "number format the teacher is loaded in; auto: as it is stored"
    )
    teacher_prompt_format: str | None = _option(
        None,
        "text of a prompt that the teacher reads, made of the columns; as in its training, or --prompt-format, if"
        " omitted",
    )

    projector_learning_rate: float | None = _option(None, "the projector's; --learning-rate if omitted")
    lora_r: int | None = _option(
        None, "rank of LoRA on the SLM, or on the LLM of --arm llm (16 there if omitted); the whole SLM if omitted"
    )
    lora_alpha: int | None = _option(None, "scale of LoRA; twice the rank if omitted")
    lora_dropout: float = _option(0.0, "dropout of LoRA")
    cache_features: bool = _option(True, "run the LLM once for each prompt, before training, and keep its states")
    features_dtype: Literal["auto", "float16", "bfloat16"] = _option(
        "auto", "number format they are kept in; auto: bfloat16 for an LLM in bfloat16, else float16"
    )
    cache_dir: str = _option(
        "", "folder of these states, and of a teacher's distributions; llm2slm in HF_HOME if omitted"
    )

    def __post_init__(self):
        self.recipe = differences(self)
        self._require("data")
        if self.arm != "slm":
            self._require("llm", f" for the arm {self.arm!r}")
        if self.arm != "llm":
            self._require("slm", f" for the arm {self.arm!r}")
            self._check_slm()
        if self.arm == "llm2slm" or (self.arm == "slm" and self.start == "states"):
            self._check_start()
        self._check_teacher()
        if not 0 < self.more_data_weight < math.inf:
            raise ValueError(f"`more_data_weight` must be positive, got {self.more_data_weight}.")
        if not self.more_data and "more_data_weight" in self.recipe:
            raise ValueError("`more_data_weight` is about further data sets: say which, `more_data`.")
        for name in (
            "prompt_max_length",
            "response_max_length",
            "vocab_size",
            "max_train_pairs",
            "max_validation_pairs",
            "lora_r",
            "teacher_top_k",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.arm == "llm" and self.lora_r is None:
            self.lora_r = 16
        if self.lora_r is None and (given := {"lora_alpha", "lora_dropout"} & self.recipe.keys()):
            raise ValueError(f"`{min(given)}` is about LoRA: give its rank, `lora_r`.")
        if self.lora_alpha is None and self.lora_r is not None:
            self.lora_alpha = 2 * self.lora_r
        if self.features_dtype == "auto":
            self.features_dtype = "bfloat16" if self.llm_dtype == "bfloat16" else "float16"
        if not self.cache_dir:
            self.cache_dir = os.path.join(HF_HOME, "llm2slm")

    def _require(self, name: str, why: str = ""):
        if not getattr(self, name):
            help = next(f.metadata["help"] for f in fields(self) if f.name == name)
            raise ValueError(f"`{name}` is needed{why}: {help.split(';')[0]}.")

    def _check_slm(self):
        if self.slm == "slice":
            self._require("slm_layers", " to slice")
            if not self.slice_of:
                self._require("llm", " to slice it, or `slice_of`")
        elif self.slm_layers or self.slice_of:
            raise ValueError(f"`slm_layers` and `slice_of` are for `slm: slice`, got slm {self.slm!r}.")
        if self.slm_tokenizer != "own":
            self._require("llm", f" for its tokenizer: `slm_tokenizer` is {self.slm_tokenizer!r}")
            if self.slm == "slice" and self.slice_of not in ("", self.llm):
                raise ValueError(
                    f"A slice of {self.slice_of!r} has that model's tokenizer: `slm_tokenizer` must be 'own', got "
                    f"{self.slm_tokenizer!r}."
                )
            if self.slm not in ("fresh", "slice"):
                raise ValueError(
                    f"The pretrained SLM {self.slm!r} has its own tokenizer: `slm_tokenizer` must be 'own', got "
                    f"{self.slm_tokenizer!r}. Other tokens are for `slm: fresh` and `slm: slice`."
                )
        if self.vocab_size is not None and self.slm == "slice" and self.slm_tokenizer == "own":
            raise ValueError(
                "`vocab_size` takes tokens away from a slice: it needs `slm_tokenizer: trimmed`, got 'own'."
            )
        if self.llm_tokenizer == "trimmed" and self.slm_tokenizer != "trimmed":
            raise ValueError(
                "`llm_tokenizer: trimmed` cuts prompts into the tokens of an SLM that has some of the LLM's: it needs "
                f"`slm_tokenizer: trimmed`, got {self.slm_tokenizer!r}."
            )

    def _check_teacher(self):
        if not self.teacher:
            if given := [name for name in self.recipe if name.startswith("teacher_")]:
                raise ValueError(f"`{given[0]}` is about a teacher: say which, `teacher`.")
            return
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"`teacher_weight` must be from 0 to 1, got {self.teacher_weight}.")
        if not 0 < self.teacher_temperature < math.inf:
            raise ValueError(f"`teacher_temperature` must be positive, got {self.teacher_temperature}.")
        if self.arm != "llm" and self.slm == "fresh" and self.slm_tokenizer == "own":
            raise ValueError(
                "A teacher and its student need one tokenizer, and a fresh SLM's own is no other model's: set "
                "`slm_tokenizer` to 'llm' or 'trimmed', with an LLM that has the teacher's."
            )

    def _check_start(self):
        if self.start == "states":
            self._require("llm", " for `start: states`, also of an SLM alone")
        if self.start == "zero" and self.fusion != "add":
            raise ValueError("`start: zero` needs `fusion: add`: with 'replace' the SLM would see no prompt at all.")
        for name, value in (("start", "states"), ("projector_norm", "standardize")):
            if getattr(self, name) == value and not self.cache_features:
                raise ValueError(f"`{name}: {value}` learns from cached features: it needs `cache_features: true`.")


@dataclass
class TrainerDefaults:
    """
    The Trainer's options that have other defaults here: ten evaluations and checkpoints, of which the best is the
    result.
    """

    output_dir: str = _option("", "new folder of this training, or that of an interrupted one, which is resumed")
    eval_strategy: str = _option("steps", "when to evaluate: steps, epoch or no")
    eval_steps: float | None = _option(0.1, "evaluate each so many steps; below 1 a share of all of them")
    save_strategy: str | None = _option(None, "when to save a checkpoint; as --eval-strategy if omitted")
    save_steps: float | None = _option(None, "save each so many steps; as --eval-steps if omitted")
    save_total_limit: int | None = _option(2, "checkpoints kept, the best one among them")
    load_best_model_at_end: bool = _option(True, "whether the result is the checkpoint of the lowest evaluation loss")
    metric_for_best_model: str | None = _option("eval_loss", "what the best checkpoint is chosen by")
    logging_steps: float = _option(0.02, "log the loss each so many steps; below 1 a share of all of them")
    report_to: str = _option("none", "where else to report to: tensorboard, wandb, ...")
    remove_unused_columns: bool = _option(False, "the collators choose the columns")
    generation_max_length: int | None = _option(
        None, "tokens of a response at most, unless the checkpoint is told otherwise; --response_max_length if omitted"
    )
    generation_num_beams: int | None = _option(
        None, "beams with which a response is written, unless the checkpoint is told otherwise; 1, greedy, if omitted"
    )
    dataloader_pin_memory: bool = _option(True, "whether batches wait in pinned memory, where there is a GPU")
    # Those that wait for the first process, which caches the features, would give up after half an hour.
    ddp_timeout: int = _option(7 * 24 * 3600, "seconds that processes wait for each other")


def differences(options: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults; no secrets."""
    values = {}
    for option in fields(options):
        if option.init and option.name not in ("hub_token", "push_to_hub_token"):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            if getattr(options, option.name) != default:
                values[option.name] = getattr(options, option.name)
    return values
