"""The demonstrations of detection and segmentation with few iterations."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import timm
import torch
from dense_helpers import TASKS, make_data, skip_without
from PIL import Image
from training_helpers import ROOT, environment

import grootv  # noqa: F401  registers the models in timm


@pytest.mark.parametrize("task", TASKS)
def test_the_demonstration_ends_with_figures_and_pictures(task: str, tmp_path: Path) -> None:
    skip_without(task)
    for each, name in (("detection", "coco"), ("segmentation", "ade")):
        make_data(each, tmp_path / "data" / name)
    length = {"detection": "train_cfg.max_epochs=1", "segmentation": "train_cfg.max_iters=2"}[task]
    options = [
        length,
        "train_cfg.val_interval=100",
        "train_dataloader.batch_size=4",
        "default_hooks.checkpoint.interval=1",
    ]
    command = [sys.executable, str(ROOT / "tools" / "demo_dense.py"), task, "--data", str(tmp_path / "data")]
    torch.save(timm.create_model("grootv_nano", num_classes=10).state_dict(), tmp_path / "classifier.pth")
    command += ["--pretrained", str(tmp_path / "classifier.pth")]
    command += ["--out-dir", str(tmp_path / "out"), "--cfg-options", *options]
    result = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "Loaded the backbone from" in result.stdout
    shown = {"detection": ("box AP50", "mask AP50"), "segmentation": ("mIoU over the ten digits",)}[task]
    assert all(name in result.stdout for name in shown)
    assert (tmp_path / "out" / "learning_curve.png").is_file()
    # Four held-out images with their truth, in rows of two, enlarged so that labels can be read.
    assert Image.open(tmp_path / "out" / "predictions.png").size[0] > 2 * 2 * 350
