"""Small detection and segmentation runs on scenes of digits, for the tests."""

from pathlib import Path

import pytest
from mmengine.config import Config
from training_helpers import ROOT

from grootv.sample_data.scenes import export_ade20k, export_coco

TASKS = {"detection": "mmdet", "segmentation": "mmseg"}

# The configs of the demonstrations on a narrow, shallow backbone, with two images a batch.
DETECTION = """
_base_ = "{root}/configs/detection/mask-rcnn_grootv-nano_fpn_digits.py"
model = dict(
    backbone=dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    neck=dict(in_channels=[8, 16, 24, 32]),
    test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(max_per_img=20)),
)
data_root = "{data}/"
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1))
"""
SEGMENTATION = """
_base_ = "{root}/configs/segmentation/grootv-nano_upernet_digits-128x128.py"
model = dict(
    backbone=dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    decode_head=dict(in_channels=[8, 16, 24, 32], channels=16),
    auxiliary_head=dict(in_channels=24, channels=16),
)
data_root = "{data}"
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=6, val_interval=6)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


def make_data(task: str, root: Path) -> Path:
    """Write eight scenes for training and four held-out ones in the format of the task."""
    export = {"detection": export_coco, "segmentation": export_ade20k}[task]
    return export(root, num_train=8, num_val=4)


def write_dense_config(folder: Path, task: str, data: Path, extra: str = "") -> Path:
    """Write the config of a small run on `data`; `extra` is appended to it."""
    text = {"detection": DETECTION, "segmentation": SEGMENTATION}[task]
    path = folder / f"small_{task}.py"
    path.write_text(text.format(root=ROOT, data=data) + extra)
    return path


def build_runner(config: Path, work_dir: Path, **changes: object):
    """Build the project's Runner for a config, in this process."""
    from grootv.openmmlab.runtime.runner import Runner

    cfg = Config.fromfile(config)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = work_dir.name
    cfg.merge_from_dict(changes)
    return Runner.from_cfg(cfg)


def skip_without(task: str) -> None:
    """Skip unless the package of the task is installed."""
    pytest.importorskip(TASKS[task], reason=f"{TASKS[task]} is not installed")


def fake_package(folder: Path, name: str, **files: str) -> None:
    """Write a package `name` of modules with the given sources, beside an empty `__init__`."""
    (folder / name).mkdir(parents=True)
    for file, content in {"__init__": "", **files}.items():
        (folder / name / f"{file}.py").write_text(content)
