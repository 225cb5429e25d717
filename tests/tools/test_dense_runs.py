"""Small complete runs of detectors and segmentors with the project's tools and with those of mmdet and mmseg."""

import importlib
import json
import pickle
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine")

import torch
from dense_helpers import TASKS, build_runner, make_data, skip_without, write_dense_config
from mmengine.evaluator import DumpResults
from model_helpers import official_state, vmamba_names
from PIL import Image
from training_helpers import KILLED, ROOT, environment, run_tool

from grootv.models.checkpoint import checkpoint_filter_fn
from grootv.openmmlab import install_mmcv_ops

KILLER = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == int(os.environ.get("KILL_AT_ITERATION", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
"""
WITH_KILLER = """
custom_imports = dict(imports=[*_base_.custom_imports.imports, "killer"], allow_failed_imports=False)
custom_hooks = [*_base_.custom_hooks, dict(type="KillHook")]
"""
LAST = {"detection": "epoch_2.pth", "segmentation": "iter_6.pth"}


@pytest.fixture(scope="module", params=TASKS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run of tools/train.py: `task`, `folder`, `config`, `work_dir`, `log`, `checkpoint`."""
    skip_without(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "killer.py").write_text(KILLER)
    config = write_dense_config(folder, request.param, make_data(request.param, folder / "data"), WITH_KILLER)
    run_tool("train.py", config, "--work-dir", folder / "run", paths=(folder,))
    (log,) = (folder / "run").glob("*/*.log")
    checkpoint = folder / "run" / LAST[request.param]
    return SimpleNamespace(
        task=request.param, folder=folder, config=config, work_dir=log.parents[1], log=log, checkpoint=checkpoint
    )


def scalars(run: SimpleNamespace, work_dir: Path) -> list[dict]:
    lines = [
        line for path in sorted(work_dir.glob("*/vis_data/scalars.json")) for line in path.read_text().splitlines()
    ]
    return [json.loads(line) for line in lines]


def test_training_logs_evaluates_and_saves(run: SimpleNamespace) -> None:
    assert run.checkpoint.is_file()
    assert (run.work_dir / "learning_curve.png").is_file()
    entries = scalars(run, run.work_dir)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == {"detection": 8, "segmentation": 6}[run.task]
    assert all(0 < loss < 100 for loss in losses)
    metrics = {name for entry in entries for name in entry}
    assert {"detection": {"coco/bbox_mAP_50", "coco/segm_mAP_50"}, "segmentation": {"mIoU"}}[run.task] <= metrics
    assert "images_per_second" in metrics
    if run.task == "detection" and install_mmcv_ops():
        assert run.log.read_text().count("torchvision's nms and roi_align replace them") == 1


def test_evaluation_with_augmentation_and_pictures(run: SimpleNamespace) -> None:
    folder = run.folder / "pictures"
    result = run_tool(
        "test.py", run.config, run.checkpoint, "--tta", "--show-dir", folder, "--work-dir", run.folder / "test",
        paths=(run.folder,),
    )  # fmt: skip
    assert ("coco/segm_mAP_50" if run.task == "detection" else "mIoU") in result.stdout
    pictures = sorted(folder.iterdir())
    assert len(pictures) == 4 and all(path.suffix == ".png" for path in pictures)
    width, height = Image.open(pictures[0]).size
    # Truth and prediction side by side, each larger than the image of 128 x 160 or 160 x 128 pixels; a line of titles.
    assert width > 4 * 160 and width / height < 2 * 160 / 128


def test_the_tools_of_the_package_run_the_config(run: SimpleNamespace) -> None:
    package = Path(importlib.import_module(TASKS[run.task]).__file__).parent
    command = [sys.executable, str(package / ".mim" / "tools" / "train.py"), str(run.config)]
    command += ["--work-dir", str(run.folder / "theirs"), "--cfg-options", "train_cfg.val_interval=100"]
    result = subprocess.run(command, env=environment(run.folder), capture_output=True, text=True, cwd=run.folder)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (run.folder / "theirs" / LAST[run.task]).is_file()


def test_a_killed_run_resumes(run: SimpleNamespace) -> None:
    work_dir = run.folder / "killed"
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(run.config), "--work-dir", str(work_dir)]
    env = {**environment(run.folder), "KILL_AT_ITERATION": "5"}
    assert subprocess.run(command, env=env, capture_output=True).returncode == KILLED
    begun = {"detection": ["epoch_1.pth"], "segmentation": ["iter_2.pth", "iter_4.pth"]}[run.task]
    assert sorted(path.name for path in work_dir.glob("*.pth")) == begun
    run_tool("train.py", run.config, "--work-dir", work_dir, "--resume", paths=(run.folder,))
    assert (work_dir / LAST[run.task]).is_file()
    steps = [
        entry["iter" if run.task == "detection" else "step"] for entry in scalars(run, work_dir) if "loss" in entry
    ]
    # The killed run logged four iterations; the second run continues after the last checkpoint, that of the fourth.
    assert steps == [1, 2, 3, 4, *({"detection": [5, 6, 7, 8], "segmentation": [5, 6]}[run.task])]


def test_two_processes_train_and_evaluate_on_cpus(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PORT", str(free.getsockname()[1]))
    work_dir = run.folder / "two"
    length = {"detection": "train_cfg.max_epochs=1", "segmentation": "train_cfg.max_iters=2"}[run.task]
    options = ("--work-dir", work_dir, "--cfg-options", length, "train_cfg.val_interval=1")
    run_tool("dist_train.sh", run.config, 2, *options, paths=(run.folder,))
    entries = scalars(run, work_dir)
    assert sum("loss" in entry for entry in entries) == 2  # half of the iterations of an epoch, each of twice the batch
    assert any("mIoU" in entry or "coco/bbox_mAP" in entry for entry in entries)


@pytest.mark.parametrize("task", TASKS)
def test_released_files_load_into_a_config(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of mmengine in which VMamba's parameters have their official names, through tools/test.py: it gives what
    the same weights give under the names of this project."""
    skip_without(task)
    data = make_data(task, tmp_path / "data")
    small = write_dense_config(tmp_path, task, data)
    channels = [8, 16, 32, 64]
    backbone = {"_delete_": True, "type": "VMamba", "arch": "nano", "dims": channels, "depths": [1] * 4, "expand": 1}
    model = {"backbone": backbone, "neck": {"in_channels": channels}}
    if task == "segmentation":
        heads = {"decode_head": {"in_channels": channels}, "auxiliary_head": {"in_channels": channels[2]}}
        model = {"backbone": backbone, **heads}
    config = tmp_path / "vmamba.py"
    config.write_text(f'_base_ = "{small}"\nmodel = {model}\n')
    runner = build_runner(config, tmp_path / "own")
    names = {name: shape for name, shape in vmamba_names(8, (1,) * 4, 1).items() if "classifier" not in name}
    names |= {f"outnorm{i}.{kind}": [c] for i, c in enumerate(channels) for kind in ("weight", "bias")}
    official = official_state(names)
    heads = {name: value for name, value in runner.model.state_dict().items() if not name.startswith("backbone.")}
    state = heads | {f"backbone.{name}": value for name, value in official.items()}
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, tmp_path / "official.pth")
    out = tmp_path / "official.pkl"
    command = ["test.py", config, tmp_path / "official.pth", "--work-dir", tmp_path / "run", "--out", out]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in command])
    runpy.run_path(str(ROOT / "tools" / "test.py"), run_name="__main__")
    (log,) = (tmp_path / "run").glob("*/*.log")
    assert "unexpected key" not in log.read_text() and "missing keys" not in log.read_text()
    own = runner.model.backbone.model
    own.load_state_dict(checkpoint_filter_fn(official, own))
    runner.test_evaluator.metrics.append(DumpResults(out_file_path=str(tmp_path / "own.pkl")))
    runner.test()
    results, expected = (pickle.loads(path.read_bytes()) for path in (out, tmp_path / "own.pkl"))
    for image, same in zip(results, expected, strict=True):
        if task == "detection":
            torch.testing.assert_close(image["pred_instances"]["scores"], same["pred_instances"]["scores"])
            assert len(image["pred_instances"]["scores"])
        else:
            classes = image["pred_sem_seg"]["data"]
            assert len(classes.unique()) > 1 and torch.equal(classes, same["pred_sem_seg"]["data"])
