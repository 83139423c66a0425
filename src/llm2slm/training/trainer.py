"""The Trainer as a training uses it: its options, batches of like lengths, two learning rates, and two callbacks.

Batches hold examples of about the same length: padding costs as much time as text does. The projector has a learning
rate of its own, since it starts at random and the SLM is often pretrained.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices, get_parameter_names

from ..utils import give_back_freed_memory
from .options import TrainerDefaults, differences

LENGTH = "length"  # the column: tokens of an example, prompt and response
# As in Trainer.get_decay_parameter_names.
NO_WEIGHT_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


@dataclass
class TrainerOptions(TrainerDefaults, Seq2SeqTrainingArguments):
    """
    The Trainer's options, with the defaults of [`~llm2slm.training.options.TrainerDefaults`]. `recipe` holds those
    that were given and differ from the defaults.

    Raises:
        ValueError: if there is no `output_dir`, or an option is not right.
    """

    def __post_init__(self):
        self.recipe = differences(self)
        if not self.output_dir:
            raise ValueError("`output_dir` is needed: the new folder of this training.")
        self.output_dir = os.path.abspath(self.output_dir)
        if self.eval_strategy == "no":
            self.load_best_model_at_end, self.metric_for_best_model = False, None
        if self.save_steps is None:
            self.save_steps = self.eval_steps
        if self.save_strategy is None:
            self.save_strategy = "steps" if self.eval_strategy == "no" else self.eval_strategy
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self.label_names = ["labels"]
        # The Trainer refuses bfloat16 on a machine that has a CPU alone, unless told that this is what is meant.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if self.n_gpu > 1:  # of one process: the Trainer would wrap the model in `DataParallel`, which copies it anew
            self._n_gpu = 1


# ------------------------------------------------------------------------------------------------------------- batches
class SimilarLengthSampler(Sampler[int]):
    r"""
    An order of the examples in which each batch holds similar lengths, and the batches come at random.

    Seed and epoch alone decide it: a resumed training goes on in the same order, which Transformers' own
    `LengthGroupedSampler` does not promise (it draws from the global generator), and so do several processes.

    Args:
        lengths (`Sequence[int]`): Of each example.
        batch_size (`int`): Examples of one step, of all processes together.
        seed (`int`): Each epoch has an order of its own.
        epoch (`Callable[[], int]`):
            The epoch that begins. It is asked for: of several processes, accelerate does not pass on which epoch is
            resumed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch())
        indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        full = len(indices) // self.batch_size  # a smaller last batch stays the last
        for batch in [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]:
            yield from batches[batch]


class SimilarLengthTrainer(Seq2SeqTrainer):
    """
    The Trainer with batches of similar length, unless its options choose another order, and an evaluation loss that is
    the mean over all tokens of responses. Transformers' own is the mean over batches, be they full or not.
    """

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """The Trainer's, with the loss of a token in place of that of a batch."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # the loss of all tokens, and how many they are
        # Each process takes the mean over its own tokens, which are summed below.
        across, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.args.average_tokens_across_devices = across
        total = self._evaluated.float().to(self.args.device)  # not every device has float64
        loss, tokens = self.accelerator.reduce(total, reduction="sum").tolist()
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        """The Trainer's; counts what the mean over tokens is made of."""
        tokens = (inputs["labels"] != -100).sum().item()
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None:
            self._evaluated += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)
        return loss, logits, labels

    def _get_train_sampler(self, train_dataset=None):
        if getattr(self.args, "train_sampling_strategy", "random") != "random":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self.args.train_batch_size * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SimilarLengthSampler(rows[LENGTH], batch_size, seed, lambda: int(self.state.epoch or 0))

    def _issue_warnings_after_load(self, load_result):
        # A tied weight is saved once: under its other names it is missing, and loaded all the same.
        weights, missing = self.model.state_dict(), load_result.missing_keys
        loaded = {weight.data_ptr() for name, weight in weights.items() if name not in missing}
        untied = [name for name in missing if name not in weights or weights[name].data_ptr() not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=untied))


# ------------------------------------------------------------------------------------------------- two learning rates
def parameter_groups(
    model: nn.Module, learning_rate: float, projector_learning_rate: float, weight_decay: float = 0.0
) -> list[dict]:
    r"""
    The trainable parameters of an LLM-to-SLM model in groups for an optimizer, which a trainer then takes:

    ```python
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=5e-4, projector_learning_rate=2e-3))
    Seq2SeqTrainer(model, ..., optimizers=(optimizer, None))
    ```

    The trainer's schedule multiplies both learning rates. For LoRA wrap the model first (`peft.get_peft_model`), since
    `SFTTrainer(peft_config=...)` makes its parameters later.

    Args:
        model (`nn.Module`): [`LLM2SLMForConditionalGeneration`], or what PEFT made of it.
        learning_rate (`float`): Of the SLM, and of its adapters.
        projector_learning_rate (`float`): Of the projector.
        weight_decay (`float`, *optional*, defaults to 0.0): Of all but biases and normalisations, as in the Trainer.

    Returns:
        `list[dict]`: groups with `params`, `lr` and `weight_decay`. The LLM's parameters are in none.

    Raises:
        ValueError: if a learning rate is not positive, or no parameter of a projector or an SLM is trained.
    """
    rates = {"projector": projector_learning_rate, "slm": learning_rate}
    for name, rate in (("learning_rate", learning_rate), ("projector_learning_rate", projector_learning_rate)):
        if not rate > 0:
            raise ValueError(f"`{name}` must be positive, got {rate}.")
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NO_WEIGHT_DECAY))
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        # Wrappers put their own names before the model's.
        part = next((part for part in name.split(".") if part in ("llm", "projector", "slm")), None)
        if parameter.requires_grad and part in rates:
            groups[rates[part], weight_decay if name in decayed else 0.0].append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__name__} is no LLM-to-SLM model, or nothing of it is trained.")
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


# ----------------------------------------------------------------------------------------------------------- callbacks
class SecondsInLog(TrainerCallback):
    """Adds to each log entry how many `seconds` the training has taken, those before it was resumed included."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock where the checkpoint's last entry stopped it."""
        before = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.started = time.monotonic() - (before[-1] if before else 0.0)

    def on_log(self, args, state, control, **kwargs):
        """Notes the time in the newest entry."""
        if hasattr(self, "started"):
            state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 3)


class FreedMemory(TrainerCallback):
    """Gives memory back every few steps, which costs about as much as a hundredth of them."""

    STEPS = 10

    def on_step_end(self, args, state, control, **kwargs):
        """Called after each optimizer step."""
        if state.global_step % self.STEPS == 0:
            give_back_freed_memory()
