"""What a finished training says of itself: `run.json`, and the loss curve as a picture."""

import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..benchmark.costs import whole_model
from ..utils import cpu_model, resident_bytes

PACKAGES = ("llm-to-slm", "transformers", "torch", "datasets", "accelerate", "peft")


class Clock(TrainerCallback):
    """Adds to each log entry how many `seconds` the training has taken, those before it was resumed included."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock where the checkpoint's last entry stopped it."""
        before = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.started = time.monotonic() - (before[-1] if before else 0.0)

    def on_log(self, args, state, control, **kwargs):
        """Notes the time in the newest entry."""
        if hasattr(self, "started"):
            state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 3)


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


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # with its build, which an index may leave out of the package's version
    return found


def machine() -> dict[str, Any]:
    """What it ran on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_model(), "threads": torch.get_num_threads(), "gpu": gpu}


def peak_memory_gib() -> float | None:
    """The most memory this process had at a time, in GiB; `None` where the system does not say."""
    peak_bytes = resident_bytes("VmHWM")
    return None if peak_bytes is None else round(peak_bytes / 2**30, 3)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes aside and renames."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.rename(path)


def plot_losses(log_history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws training and evaluation loss against steps, as a PNG."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for name, label, marker in (("loss", "training", ""), ("eval_loss", "evaluation", "o")):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(title=title, xlabel="optimizer steps", ylabel="cross-entropy, nats per response token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
