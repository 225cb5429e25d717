"""tools/print_config.py prints a config as training would use it."""

import subprocess
import sys

import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config
from training_helpers import ROOT, environment


def test_print_config_prints_what_training_would_use() -> None:
    pytest.importorskip("mmdet")
    config = ROOT / "configs" / "detection" / "mask-rcnn_grootv-tiny_fpn_1x_coco.py"
    command = [sys.executable, str(ROOT / "tools" / "print_config.py"), str(config)]
    command += ["--cfg-options", "model.backbone.tree_per=stage"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed = Config.fromstring(result.stdout, ".py")
    assert printed.model.backbone.tree_per == "stage"
    assert printed.model.rpn_head.type == "RPNHead" and printed.train_dataloader.dataset.type == "CocoDataset"
