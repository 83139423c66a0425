"""More than one process, on the CPU with gloo: DDP through the command, FSDP2 on the model itself."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import SLM_VOCAB, TRANSFORMERS_4, build_model, build_prompts, padded, save_training
from safetensors.torch import load_file, save_file

from llm2slm.cli import main as cli
from llm2slm.training.trainer import FreedMemory


def run(*arguments) -> str:
    """Runs a Python command; returns what its processes print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


# ----------------------------------------------------------------------------------------------------------------- DDP
@pytest.fixture
def recipe(tmp_path):
    pairs = [
        {"prompt": f"w{i} w{i + 1} " * (1 + i % 3), "completion": " ".join("abc"[i % 3] * (1 + i % 8))}
        for i in range(40)
    ]
    return {**save_training(tmp_path, pairs), "max_steps": 12, "eval_steps": 4, "per_device_eval_batch_size": 4}


def write_recipe(recipe, folder, **changes) -> str:
    """The two trainings share no cache: each has to make its own."""
    path = f"{folder}.yaml"
    with open(path, "w") as file:
        yaml.safe_dump({**recipe, **changes, "output_dir": str(folder), "cache_dir": f"{folder}-features"}, file)
    return path


def test_two_processes_train_as_one_with_their_batches_together(recipe, tmp_path):
    path = write_recipe(recipe, tmp_path / "two", per_device_train_batch_size=4, ddp_backend="gloo")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run(*torchrun, "-m", "llm2slm.cli", "train", "--config", path)
    assert output.count("Caching prompt features") == 2  # training and validation, by one process
    assert output.count("Finished") == 1

    path = write_recipe(recipe, tmp_path / "one", per_device_train_batch_size=8)
    assert cli.main(["train", "--config", path]) is None
    curves = {}
    for name in ("one", "two"):
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        curves[name] = [entry["loss"] for entry in history if "loss" in entry]
        curves[name] += [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(curves["one"]) == 12 + 3 and curves["one"][11] < curves["one"][0]
    assert curves["two"] == pytest.approx(curves["one"], rel=1e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)


def train_until(step: int, path: str):
    """What each process does of a training that is killed at this step."""

    class Killed(BaseException):
        pass

    def kill(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed

    FreedMemory.on_step_end = kill
    with pytest.raises(Killed):
        cli.main(["train", "--config", path])


@pytest.mark.skipif(TRANSFORMERS_4, reason="several processes on CPUs cannot load their optimizers' state there")
def test_two_processes_go_on_in_the_middle_of_an_epoch_as_if_nothing_had_happened(recipe, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = {
        name: write_recipe(
            recipe, tmp_path / name, per_device_train_batch_size=4, ddp_backend="gloo", eval_steps=3, max_steps=8
        )
        for name in ("whole", "killed")
    }
    run(*torchrun, "-m", "llm2slm.cli", "train", "--config", paths["whole"])
    run(*torchrun, __file__, "7", paths["killed"])
    assert (tmp_path / "killed" / "checkpoint-6").is_dir() and not (tmp_path / "killed" / "run.json").exists()
    output = run(*torchrun, "-m", "llm2slm.cli", "train", "--config", paths["killed"])  # four steps are an epoch
    assert "resuming from" in output
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in paths)
    assert all(torch.equal(killed[name], weight) for name, weight in whole.items())


# --------------------------------------------------------------------------------------------------------------- FSDP2
def small_model():
    """A frozen LLM that is run, and an SLM; dropout-free."""
    torch.manual_seed(0)
    return build_model("llama", "llama", llm_layer=[1, -1])


def train_steps(model, rows: slice, steps=3):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for step in range(steps):
        batch = padded(build_prompts((5, 5, 5, 5), seed=step))
        labels = torch.randint(4, SLM_VOCAB, (4, 6), generator=torch.Generator().manual_seed(step))
        losses = [
            model(**{name: value[part] for name, value in batch.items()}, labels=labels[part]).loss
            for part in ([rows] if rows is not None else [slice(0, 2), slice(2, 4)])
        ]
        (sum(losses) / len(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()


def fsdp_process(rank: int, folder: str):
    """What each of the two processes does."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = small_model()
    for layer in [*model.llm.layers, *model.slm.model.layers]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.to_local().shape[0] <= (parameter.shape[0] + 1) // 2, name  # no one holds all of it
    train_steps(model, slice(2 * rank, 2 * rank + 2))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if rank == 0:
        save_file(
            {name: weight.contiguous().clone() for name, weight in weights.items()}, f"{folder}/sharded.safetensors"
        )
    dist.destroy_process_group()


def test_fsdp2_shards_llm_and_slm_and_trains_as_one_process(tmp_path):
    run(__file__, str(tmp_path))
    sharded = load_file(tmp_path / "sharded.safetensors")
    model, before = small_model(), small_model().state_dict()
    train_steps(model, None)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(sharded[name], weight, atol=1e-5, rtol=1e-4)
        assert torch.equal(weight, before[name]) == name.startswith("llm."), name


if __name__ == "__main__":  # what is imported is imported once
    if len(sys.argv) == 3:
        train_until(int(sys.argv[1]), sys.argv[2])
    else:
        torch.multiprocessing.start_processes(fsdp_process, (sys.argv[1],), nprocs=2, start_method="fork")
