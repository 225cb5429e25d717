"""Training runs that are killed at random moments, killed while they save, or find the disk full."""

import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import torch
from doors import FAULT_TRIES, campaign
from training_helpers import KILLED, ROOT, environment, write_config, write_images

from grootv.openmmlab.runtime.checkpoints import find_intact_checkpoint, is_intact

pytestmark = [campaign, pytest.mark.slow, pytest.mark.timeout(3600)]

# Kills its own process after a random time, or after it has written a random part of a checkpoint.
KILLER = """
import os, random, signal, threading, time

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

if "KILL_AFTER" in os.environ:
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    @HOOKS.register_module()
    class KillHook(Hook):
        def before_train(self, runner):
            threading.Timer(float(os.environ["KILL_AFTER"]), kill).start()

if "KILL_WHILE_SAVING" in os.environ:
    flush, saves = os.fsync, [int(os.environ["KILL_WHILE_SAVING"])]

    def kill_while_saving(file):
        size = os.fstat(file).st_size
        if size < 100_000:  # not a checkpoint
            return flush(file)
        saves[0] -= 1
        if saves[0] == 0:
            os.ftruncate(file, random.randrange(size))
            kill()
        flush(file)

    os.fsync = kill_while_saving
"""
WITH_KILLER = """
import os
custom_imports = dict(imports=["grootv.openmmlab", "random_killer"], allow_failed_imports=False)
if "KILL_AFTER" in os.environ:
    custom_hooks = [*custom_hooks, dict(type="KillHook")]
del os
"""


def train(folder: Path, work_dir: Path, prepare: Callable[[], None] | None = None, **kill: object):
    command = [sys.executable, str(ROOT / "tools/train.py"), str(folder / "small.py"), "--work-dir", str(work_dir)]
    env = {**environment(folder), **{name: str(value) for name, value in kill.items()}}
    return subprocess.run(
        [*command, "--resume"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=prepare,
        timeout=600,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, config, and the work directory `unbroken` of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("kills")
    write_images(folder / "data", "train", 12, seed=0)
    write_images(folder / "data", "val", 4, seed=1)
    (folder / "random_killer.py").write_text(KILLER)
    write_config(folder, folder / "data", WITH_KILLER)
    result = train(folder, folder / "unbroken")
    assert result.returncode == 0, result.stdout[-6000:]
    return folder


def assert_ends_like_the_unbroken_run(small: Path, work_dir: Path) -> None:
    result = train(small, work_dir)
    assert result.returncode == 0, result.stdout[-6000:]
    assert not list(work_dir.glob(".*.tmp"))
    first, second = (torch.load(folder / "epoch_3.pth") for folder in (small / "unbroken", work_dir))
    for part in ("state_dict", "ema_state_dict"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())


def test_kills_at_random_moments(small: Path, capsys: pytest.CaptureFixture) -> None:
    generator = random.Random(0)
    killed = 0
    for number in range(FAULT_TRIES):
        work_dir = small / f"random{number}"
        killed += train(small, work_dir, KILL_AFTER=generator.uniform(0.05, 3)).returncode == KILLED
        assert_ends_like_the_unbroken_run(small, work_dir)
    with capsys.disabled():
        print(f"\n{killed} of {FAULT_TRIES} runs killed at random moments; all ended like the unbroken run")


def test_kills_while_saving(small: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(FAULT_TRIES):
        work_dir = small / f"saving{number}"
        assert train(small, work_dir, KILL_WHILE_SAVING=number % 3 + 1).returncode == KILLED
        assert all(is_intact(path) for path in work_dir.glob("*.pth"))
        assert_ends_like_the_unbroken_run(small, work_dir)
    with capsys.disabled():
        print(f"\n{FAULT_TRIES} of {FAULT_TRIES} runs killed while saving; all ended like the unbroken run")


def test_a_full_disk(small: Path) -> None:
    """The limit of a file's size stands for a full disk: it makes the same call of the system fail."""
    size = (small / "unbroken/epoch_1.pth").stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

    work_dir = small / "full"
    result = train(small, work_dir, limit)
    assert result.returncode == 1
    assert f"File too large: '{work_dir / 'epoch_1.pth'}'" in result.stdout
    assert not list(work_dir.glob("*.pth")) and not list(work_dir.glob(".*.tmp"))
    assert find_intact_checkpoint(work_dir) is None
    assert_ends_like_the_unbroken_run(small, work_dir)
