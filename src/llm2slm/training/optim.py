"""Two learning rates for one optimizer: the projector starts at random, the SLM is often pretrained."""

from collections import defaultdict

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

# As in Trainer.get_decay_parameter_names.
NO_WEIGHT_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


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
