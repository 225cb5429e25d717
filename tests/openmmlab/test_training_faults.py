"""Faults of long runs: kills, damaged files, invalid losses, data that does not fit the model."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import torch
from training_helpers import KILLED, ROOT, environment, run_tool, write_config, write_images

# Kills its own process in the middle of an epoch or of writing a checkpoint, as environment variables say.
KILLER = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == int(os.environ.get("KILL_AT_ITERATION", -1)):
            os.kill(os.getpid(), signal.SIGKILL)

flush = os.fsync

def kill_half_way(file):
    if os.fstat(file).st_size < 100_000:  # not a checkpoint
        return flush(file)
    os.ftruncate(file, os.fstat(file).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

if "KILL_WHILE_WRITING" in os.environ:
    os.fsync = kill_half_way
"""
WITH_KILLER = """
custom_imports = dict(imports=["grootv.openmmlab", "killer"], allow_failed_imports=False)
custom_hooks = [*custom_hooks, dict(type="KillHook")]
"""


def train(config: Path, work_dir: Path, *options: str, **kill: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/train.py"), str(config), "--work-dir", str(work_dir), *options]
    env = {**environment(config.parent), **{name: str(value) for name, value in kill.items()}}
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_equal_runs(first: dict, second: dict) -> None:
    for part in ("state_dict", "ema_state_dict"):
        assert first[part].keys() == second[part].keys()
        different = [name for name, value in first[part].items() if not torch.equal(value, second[part][name])]
        assert not different, f"{part}: {different}"
    for number, state in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][number][name]) for name, value in state.items())
    assert first["meta"]["iter"] == second["meta"]["iter"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, config, and the work directory `unbroken` of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("small")
    write_images(folder / "data", "train", 12, seed=0)
    write_images(folder / "data", "val", 4, seed=1)
    (folder / "killer.py").write_text(KILLER)
    config = write_config(folder, folder / "data", WITH_KILLER)
    result = train(config, folder / "unbroken")
    assert result.returncode == 0, result.stdout[-6000:]
    return folder


@pytest.mark.slow
def test_a_killed_run_ends_where_an_unbroken_one_does(small: Path) -> None:
    config, work_dir = small / "small.py", small / "killed"
    assert train(config, work_dir, KILL_AT_ITERATION=6).returncode == KILLED  # an epoch has 4 iterations
    assert sorted(path.name for path in work_dir.glob("epoch_*")) == ["epoch_1.pth"]
    assert train(config, work_dir, "--resume", KILL_WHILE_WRITING=1).returncode == KILLED
    assert sorted(path.name for path in work_dir.glob("epoch_*")) == ["epoch_1.pth"]
    assert len(list(work_dir.glob(".epoch_2.pth.*.tmp"))) == 1
    result = train(config, work_dir, "--resume")
    assert result.returncode == 0, result.stdout[-6000:]
    assert "resumed epoch: 1, iter: 4" in result.stdout
    assert not list(work_dir.glob(".*.tmp"))
    assert_equal_runs(load(small / "unbroken/epoch_3.pth"), load(work_dir / "epoch_3.pth"))


@pytest.mark.slow
def test_a_damaged_last_checkpoint_is_passed_over(small: Path) -> None:
    work_dir = small / "damaged"
    work_dir.mkdir()
    shutil.copy(small / "unbroken/epoch_2.pth", work_dir)
    content = bytearray((small / "unbroken/epoch_3.pth").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(byte ^ 4 for byte in content[middle : middle + 400])
    (work_dir / "epoch_3.pth").write_bytes(content)
    result = train(small / "small.py", work_dir, "--resume")
    assert result.returncode == 0, result.stdout[-6000:]
    assert f"{work_dir / 'epoch_3.pth'} is damaged and is skipped" in result.stdout
    assert "Validating the checkpoint that the run resumes from" in result.stdout
    assert "resumed epoch: 2" in result.stdout
    assert_equal_runs(load(small / "unbroken/epoch_3.pth"), load(work_dir / "epoch_3.pth"))


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(small: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes((small / "unbroken/epoch_3.pth").read_bytes()[:-100])
    result = train(small / "small.py", tmp_path / "work", "--resume", str(tmp_path / "broken.pth"))
    assert result.returncode == 1
    assert f"checkpoint {tmp_path / 'broken.pth'} cannot be used: it is incomplete or damaged" in result.stdout


def test_a_checkpoint_of_another_model_is_not_evaluated(small: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"backbone.stem.conv1.bias": torch.zeros(4)}, "meta": {}}, tmp_path / "other.pth")
    result = run_tool(
        "test.py", small / "small.py", tmp_path / "other.pth", "--work-dir", tmp_path, paths=(small,), code=1
    )
    assert "missing keys in source state_dict: backbone.stem.conv1.weight" in result.stdout


def test_an_invalid_loss_stops_with_the_iteration(small: Path, tmp_path: Path) -> None:
    options = ("optim_wrapper.optimizer.lr=1e30", "optim_wrapper.clip_grad=None")
    result = train(small / "small.py", tmp_path / "work", "--cfg-options", *options)
    assert result.returncode == 1
    assert "FloatingPointError: invalid loss at iteration 2 (epoch 1, batch 2, process 0): loss=" in result.stdout
    assert not list((tmp_path / "work").glob("*.pth"))


def test_damaged_images_stop_a_run_beyond_the_limit(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "data", tmp_path / "data")
    for number in range(2):
        path = tmp_path / f"data/train/square/{number}.png"
        path.write_bytes(path.read_bytes()[:60])
    root = f"train_dataloader.dataset.root={tmp_path / 'data'}"
    limited = train(small / "small.py", tmp_path / "a", "--cfg-options", root, "train_dataloader.dataset.max_damaged=1")
    assert limited.returncode == 1
    assert "max_damaged=1 allows no more" in limited.stdout and "DamagedDataError" in limited.stdout
    options = (
        root,
        "train_dataloader.dataset.max_damaged=2",
        "train_dataloader.num_workers=2",
        "train_cfg.max_epochs=2",
    )
    allowed = train(small / "small.py", tmp_path / "b", "--cfg-options", *options)
    assert allowed.returncode == 0, allowed.stdout[-6000:]
    for number in range(2):
        assert allowed.stdout.count(f"square/{number}.png is damaged") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train_dataloader.dataset.root=nowhere", "FileNotFoundError: .*nowhere/train does not exist"),
        ("model.backbone.num_classes=5 model.data_preprocessor.mixup.num_classes=5", "has 3 classes .* num_classes=5"),
    ],
)
def test_data_that_does_not_fit_is_said_before_the_first_iteration(
    small: Path, tmp_path: Path, option: str, message: str
) -> None:
    import re

    result = train(small / "small.py", tmp_path, "--cfg-options", *option.split())
    assert result.returncode == 1 and re.search(message, result.stdout), result.stdout[-3000:]
    assert "Epoch(train)" not in result.stdout


def test_validation_data_with_other_classes_is_refused(small: Path, tmp_path: Path) -> None:
    write_images(tmp_path, "val", 2, seed=0, classes=("circle", "square", "triangle"))
    result = train(small / "small.py", tmp_path / "work", "--cfg-options", f"val_dataloader.dataset.root={tmp_path}")
    assert result.returncode == 1 and "only in one of them: ['stripes', 'triangle']" in result.stdout
