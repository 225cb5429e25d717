"""Runs that get SIGTERM: they leave a checkpoint, and what resumes from it ends where an unbroken run does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from training_helpers import ROOT, environment, write_config, write_images

from grootv.openmmlab.runtime.checkpoints import find_intact_checkpoint
from grootv.openmmlab.runtime.distributed import set_slurm_environment
from grootv.openmmlab.runtime.termination import ResumableBatchSampler

# Sends SIGTERM to all processes of the run, as schedulers do, from a process that is no parent of any.
TERMINATOR = """
import os, subprocess
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

def terminate():
    subprocess.run(["/bin/kill", "-TERM", "--", f"-{os.getpgrp()}"], start_new_session=True)

@HOOKS.register_module()
class TerminatorHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == int(os.environ.get("TERMINATE_AT_ITERATION", -1)):
            terminate()

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.epoch == int(os.environ.get("TERMINATE_VALIDATION_OF_EPOCH", -1)):
            terminate()
"""
WITH_TERMINATOR = """
custom_imports = dict(imports=["grootv.openmmlab", "terminator"], allow_failed_imports=False)
custom_hooks = [*custom_hooks, dict(type="TerminatorHook")]
train_dataloader.update(num_workers=2, persistent_workers=True)
"""


def train(config: Path, work_dir: Path, *options: str, code: int = 0, **terminate: int) -> str:
    result = subprocess.run(
        [sys.executable, ROOT / "tools/train.py", config, "--work-dir", work_dir, *options],
        env={**environment(config.parent), **{name: str(value) for name, value in terminate.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        timeout=200,
    )
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout[-6000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose epochs have 4 iterations; beside it the work directory `unbroken` of an undisturbed run."""
    folder = tmp_path_factory.mktemp("small")
    write_images(folder / "data", "train", 12, seed=0)
    write_images(folder / "data", "val", 4, seed=1)
    (folder / "terminator.py").write_text(TERMINATOR)
    config = write_config(folder, folder / "data", WITH_TERMINATOR)
    train(config, folder / "unbroken")
    return config


def assert_ends_like_the_unbroken_run(config: Path, work_dir: Path) -> None:
    first, second = (
        torch.load(folder / "epoch_3.pth", weights_only=True) for folder in (config.parent / "unbroken", work_dir)
    )
    for part in ("state_dict", "ema_state_dict"):
        different = [name for name, value in first[part].items() if not torch.equal(value, second[part][name])]
        assert not different, f"{part}: {different}"
    for number, state in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][number][name]) for name, value in state.items())
    assert first["meta"]["iter"] == second["meta"]["iter"] == 12


@pytest.mark.slow
@pytest.mark.parametrize(("iteration", "done"), [(6, 2), (8, 4)], ids=["within an epoch", "last batch of an epoch"])
def test_a_terminated_run_ends_where_an_unbroken_one_does(
    small: Path, tmp_path: Path, iteration: int, done: int
) -> None:
    checkpoint = tmp_path / f"epoch_1_iter_{iteration}.pth"
    log = train(small, tmp_path, code=143, TERMINATE_AT_ITERATION=iteration)
    assert f"the run ends after iteration {iteration} with exit code 143" in log and str(checkpoint) in log
    assert checkpoint.exists()
    log = train(small, tmp_path, "--resume")
    assert f"resumed epoch: 1, iter: {iteration}" in log and f"{done} batches of epoch 2 are done and left out" in log
    assert "Validating the checkpoint that the run resumes from" not in log
    assert_ends_like_the_unbroken_run(small, tmp_path)
    assert not checkpoint.exists()


@pytest.mark.slow
def test_termination_during_validation_leaves_the_periodic_checkpoint(small: Path, tmp_path: Path) -> None:
    log = train(small, tmp_path, code=143, TERMINATE_VALIDATION_OF_EPOCH=2)
    assert "the run ends during validation with exit code 143" in log
    assert sorted(path.name for path in tmp_path.glob("epoch_*")) == ["epoch_1.pth", "epoch_2.pth"]
    assert "Validating the checkpoint that the run resumes from" in train(small, tmp_path, "--resume")
    assert_ends_like_the_unbroken_run(small, tmp_path)


@pytest.mark.slow
def test_accumulated_gradients_reach_the_weights_first(small: Path, tmp_path: Path) -> None:
    options = "--cfg-options", "optim_wrapper.accumulative_counts=2"
    train(small, tmp_path, *options, code=143, TERMINATE_AT_ITERATION=5)
    assert (tmp_path / "epoch_1_iter_6.pth").exists()


@pytest.mark.slow
def test_a_run_that_counts_iterations(small: Path, tmp_path: Path) -> None:
    counting = tmp_path / "counting.py"
    counting.write_text(
        small.read_text()
        + "train_cfg = dict(by_epoch=False, max_iters=8, val_interval=4)\nparam_scheduler = []\n"
        + 'default_hooks.update(checkpoint=dict(type="AtomicCheckpointHook", by_epoch=False, interval=4))\n'
        + 'train_dataloader["sampler"] = dict(type="InfiniteSampler", shuffle=True)\n'
        + "log_processor = dict(by_epoch=False)\n"
    )
    (tmp_path / "terminator.py").write_text(TERMINATOR)
    train(counting, tmp_path / "work", code=143, TERMINATE_AT_ITERATION=6)
    names = [path.name for path in sorted((tmp_path / "work").glob("iter_*"))]
    assert names == ["iter_4.pth", "iter_6.pth"]
    assert "resumed epoch: 0, iter: 6" in train(counting, tmp_path / "work", "--resume")
    names = [path.name for path in sorted((tmp_path / "work").glob("iter_*"))]
    assert names == ["iter_4.pth", "iter_8.pth"]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_batches_are_not_loaded(workers: int) -> None:
    loader = DataLoader(range(10), batch_size=2, num_workers=workers, persistent_workers=workers > 0)
    batches = ResumableBatchSampler(BatchSampler(SequentialSampler(range(10)), 2, drop_last=False))
    vars(loader)["batch_sampler"] = batches
    batches.skip = 3
    assert [batch.tolist() for batch in loader] == [[6, 7], [8, 9]]
    batches.skip = 0
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert len(loader) == 5 and isinstance(batches.sampler, SequentialSampler)


def test_the_most_advanced_checkpoint(tmp_path: Path) -> None:
    for name in ("epoch_1", "epoch_1_iter_30", "epoch_1_iter_4", "epoch_2", "best_top1_epoch_3", "epoch_10"):
        torch.save({}, tmp_path / f"{name}.pth")
    for name in ("epoch_10", "epoch_2", "epoch_1_iter_30", "epoch_1_iter_4", "epoch_1"):
        assert find_intact_checkpoint(tmp_path) == str(tmp_path / f"{name}.pth")
        (tmp_path / f"{name}.pth").unlink()


def test_the_environment_of_a_slurm_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that the test leaves no variable behind
        monkeypatch.delenv(name)
    task = {"PROCID": "5", "LOCALID": "1", "STEP_NUM_TASKS": "8", "STEP_NODELIST": "node[3-6]", "JOB_ID": "1234567"}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "node3")
    set_slurm_environment()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["5", "1", "8"]
    assert os.environ["MASTER_ADDR"] == "node3" and os.environ["MASTER_PORT"] == "24567"
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(RuntimeError, match="needs a task that srun has started: SLURM_PROCID not set"):
        set_slurm_environment()
