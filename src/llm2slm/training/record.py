"""What a finished training says of itself: numbers of weights, and the loss curve as a picture."""

from pathlib import Path
from typing import Any

from ..language_models import whole_model
from ..utils import check_installed


def count_parameters(arm: str, model) -> dict[str, int]:
    """Numbers of weights of `slm`, `projector` and what of the `llm` reads prompts, loaded or not."""
    if arm != "llm2slm":
        return {arm: sum(p.numel() for p in model.parameters())}
    whole = whole_model(model.config)
    parts = {"slm": whole.slm, "projector": whole.projector, "llm": whole.llm}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def count_trained(model) -> int:
    """Number of weights that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def plot_losses(log_history: list[dict[str, Any]], title: str, path: Path, taught: bool = False) -> None:
    """Draws training and evaluation loss against steps, as a PNG; `taught`: whether a teacher is in the former."""
    check_installed("A picture", "matplotlib")
    from matplotlib.figure import Figure

    training = "training, with the divergence from the teacher" if taught else "training"
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for name, label, marker in (("loss", training, ""), ("eval_loss", "evaluation", "o")):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(title=title, xlabel="optimizer steps", ylabel="cross-entropy, nats per response token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
