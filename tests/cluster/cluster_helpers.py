"""A small config on the handwritten digits, runs that stop where a test wants to interrupt them, and the run that they
are compared with."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from training_helpers import ROOT, environment

from grootv.sample_data import export_digits

PAUSE = """
import os, signal, time
from pathlib import Path
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class PauseHook(Hook):
    # Stops after the iteration PAUSE_AT of the environment, until SIGTERM comes or the file `go` exists.
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 != int(os.environ.get("PAUSE_AT", 0)):
            return
        folder = Path(os.environ["PAUSE_FOLDER"])
        handler = signal.getsignal(signal.SIGTERM)

        def go(*arguments):
            handler(*arguments)
            (folder / "go").touch()

        signal.signal(signal.SIGTERM, go)
        (folder / f"pid_{runner.rank}.tmp").write_text(str(os.getpid()))
        (folder / f"pid_{runner.rank}.tmp").rename(folder / f"pid_{runner.rank}")
        while not (folder / "go").exists():
            time.sleep(0.05)
        signal.signal(signal.SIGTERM, handler)
"""
CONFIG = """
_base_ = ["{root}/configs/classification/grootv-nano_digits.py"]
model = dict(backbone=dict(dims=(8, 16), depths=(1, 1)))
max_epochs = 3
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=3, convert_to_iter_based=True)]
train_dataloader = dict(batch_size=8, dataset=dict(root="{data}"))
val_dataloader = dict(dataset=dict(root="{data}"))
default_hooks = dict(logger=dict(interval=1))
custom_imports = dict(imports=["grootv.openmmlab", "pause"])
custom_hooks = [*_base_.custom_hooks, dict(type="PauseHook")]
"""
IMAGES_PER_CLASS = 10  # 100 images are 6 iterations of 2 x 8 an epoch


def write_experiment(folder: Path) -> Path:
    """Data, the hook and the config, in `folder`; returns the config's path."""
    export_digits(folder / "data")
    for split in ("train", "val"):
        for name in (folder / "data" / split).iterdir():
            for image in sorted(name.iterdir())[IMAGES_PER_CLASS:]:
                image.unlink()
    (folder / "pause.py").write_text(PAUSE)
    config = folder / "digits.py"
    config.write_text(CONFIG.format(root=ROOT, data=folder / "data"))
    return config


def run_environment(config: Path, pause_folder: Path | None = None, pause_at: int = 0) -> dict[str, str]:
    """Environment of a run; with a folder, all its processes pause after the iteration `pause_at`."""
    env = environment(config.parent)
    if pause_folder is not None:
        pause_folder.mkdir()
        env.update(PAUSE_FOLDER=str(pause_folder), PAUSE_AT=str(pause_at))
    return env


def wait_for(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    """Wait until `condition` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} in {seconds} s"
        time.sleep(0.1)


def wait_for_pause(pause_folder: Path, processes: int = 2) -> list[int]:
    """Wait until all processes pause; returns their ids by rank."""
    files = [pause_folder / f"pid_{rank}" for rank in range(processes)]
    wait_for(lambda: all(file.exists() for file in files), f"pause in {pause_folder}")
    return [int(file.read_text()) for file in files]


def free_port() -> int:
    """A port that no one listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def missing_programs(*names: str) -> list[str]:
    """Which of `names` are not installed."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in names if shutil.which(name, path=path) is None]


def finish(process: subprocess.Popen[str], code: int | None, log: Path) -> str:
    """Wait for the end of `process` and check its exit code (None: any failure); returns its log."""
    process.wait(timeout=90)
    text = log.read_text()
    good = process.returncode != 0 if code is None else process.returncode == code
    assert good, f"exit code {process.returncode}\n{text[-6000:]}"
    return text


def assert_equal_ends(first: Path, second: Path) -> None:
    """Weights, their averages and the optimizer's state are the same bits after the last epoch of two runs."""
    left, right = (torch.load(folder / "epoch_3.pth", weights_only=True) for folder in (first, second))
    for part in ("state_dict", "ema_state_dict"):
        assert left[part].keys() == right[part].keys()
        different = [name for name, value in left[part].items() if not torch.equal(value, right[part][name])]
        assert not different, f"{part}: {different}"
    assert left["optimizer"]["state"].keys() == right["optimizer"]["state"].keys()
    for number, state in left["optimizer"]["state"].items():
        assert all(torch.equal(value, right["optimizer"]["state"][number][name]) for name, value in state.items())
    assert left["meta"]["iter"] == right["meta"]["iter"] == 18
