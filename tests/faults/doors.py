"""The doors by which a file of weights gets into this project, and files that must not get through."""

import os
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from dense_helpers import write_dense_config
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader, load_checkpoint
from timm.models import load_checkpoint as timm_load_checkpoint
from torch import Tensor, nn
from training_helpers import write_config

import grootv.openmmlab  # noqa: F401  registers the backbone and mmengine's loaders
from grootv.openmmlab.runtime.runner import Runner

# How often the campaign of `make test-faults` tries each fault; zero leaves it out.
FAULT_TRIES = int(os.environ.get("FAULT_TRIES", "0"))
campaign = pytest.mark.skipif(FAULT_TRIES == 0, reason="takes minutes: `make test-faults` runs it")

# The model of the doors: that of the small config of `training_helpers`.
SIZE = {"dims": (8, 16), "depths": (1, 1), "num_classes": 3}
FIRST = "stem.conv1.weight"


def make_model(**changes: Any) -> nn.Module:
    return timm.create_model("grootv_nano", **{**SIZE, **changes})


def timm_file(path: Path, folder: Path) -> Tensor:
    return make_model(pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 3}).stem.conv1.weight


def timm_checkpoint_path(path: Path, folder: Path) -> Tensor:
    return make_model(checkpoint_path=str(path)).stem.conv1.weight


def timm_loading(path: Path, folder: Path) -> Tensor:
    model = make_model()
    timm_load_checkpoint(model, str(path))
    return model.stem.conv1.weight


def init_cfg(path: Path, folder: Path) -> Tensor:
    sizes = {"dims": SIZE["dims"], "depths": SIZE["depths"], "out_indices": (0, 1)}
    config = {"type": "GrootV", "arch": "nano", "init_cfg": {"type": "Pretrained", "checkpoint": str(path)}, **sizes}
    backbone = MODELS.build(config)
    backbone.init_weights()
    return backbone.model.stem.conv1.weight


def checkpoint_loader(path: Path, folder: Path) -> Tensor:
    from grootv.models.checkpoint import backbone_weights, official_to_own

    content = CheckpointLoader.load_checkpoint(str(path), "cpu")
    return {official_to_own(name): value for name, value in backbone_weights(content).items()}[FIRST]


def mmengine_loading(path: Path, folder: Path) -> Tensor:
    model = make_model()
    load_checkpoint(model, str(path))
    return model.stem.conv1.weight


def detector(path: Path, folder: Path) -> Tensor:
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    from mmdet.apis import init_detector

    config = write_dense_config(folder, "detection", folder)
    return init_detector(str(config), str(path), device="cpu").backbone.model.stem.conv1.weight


def segmentor(path: Path, folder: Path) -> Tensor:
    pytest.importorskip("mmseg", reason="mmseg is not installed")
    from mmseg.apis import init_model

    config = write_dense_config(folder, "segmentation", folder)
    return init_model(str(config), str(path), device="cpu").backbone.model.stem.conv1.weight


def _runner(folder: Path, data: Path, **changes: Any) -> Runner:
    cfg = Config.fromfile(write_config(folder, data))
    cfg.work_dir = str(folder / "work")
    cfg.experiment_name = folder.name
    cfg.visualizer = {"type": "Visualizer"}
    cfg.merge_from_dict({"train_cfg.max_epochs": 1, **changes})
    return Runner.from_cfg(cfg)


def load_from(path: Path, folder: Path) -> Tensor:
    runner = _runner(folder, folder / "data", load_from=str(path))
    runner.call_hook("before_run")
    runner.load_or_resume()
    return runner.model.backbone.stem.conv1.weight


def evaluation(path: Path, folder: Path) -> Tensor:
    runner = _runner(folder, folder / "data", load_from=str(path))
    runner.test()
    return runner.model.backbone.stem.conv1.weight


def resume(path: Path, folder: Path) -> Tensor:
    runner = _runner(folder, folder / "data", load_from=str(path), resume=True)
    runner.train()
    return runner.model.backbone.stem.conv1.weight


def resume_found(path: Path, folder: Path) -> Tensor:
    work_dir = folder / "work"
    work_dir.mkdir(exist_ok=True)
    (work_dir / "epoch_1.pth").unlink(missing_ok=True)
    os.link(path, work_dir / "epoch_1.pth")
    runner = _runner(folder, folder / "data", resume=True)
    runner.train()
    return runner.model.backbone.stem.conv1.weight


DOORS: dict[str, Callable[[Path, Path], Tensor]] = {
    door.__name__: door
    for door in (
        timm_file,
        timm_checkpoint_path,
        timm_loading,
        init_cfg,
        checkpoint_loader,
        mmengine_loading,
        detector,
        segmentor,
        load_from,
        evaluation,
        resume,
        resume_found,
    )
}
# Those that load a file of weights into this model whatever else the file holds.
WEIGHT_DOORS = ("timm_file", "timm_checkpoint_path", "timm_loading", "init_cfg", "load_from", "evaluation")


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@contextmanager
def yacs() -> Iterator[type]:
    """A stand-in for the module of yacs, with a class of its configuration that pickles as the real one does."""
    module = types.ModuleType("yacs.config")

    def freeze(self: dict, name: str, value: Any) -> None:
        raise AttributeError("the configuration is frozen")

    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config", "__setattr__": freeze})
    with mock.patch.dict(sys.modules, {"yacs": types.ModuleType("yacs"), "yacs.config": module}):
        yield module.CfgNode


def save_as_published(path: Path, weights: dict[str, Tensor], averaged: dict[str, Tensor] | None = None) -> None:
    """Write a file as the published training scripts of GrootV and VMamba do."""
    with yacs() as node:
        config = node(MODEL=node(NAME="tiny", DIMS=[8, 16], PRETRAINED=None), TRAIN=node(EPOCHS=300, BASE_LR=1e-3))
        for part in (config, *config.values()):
            part.__dict__["__immutable__"] = True
        content = {
            "model": weights,
            "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-6), "params": [0]}]},
            "lr_scheduler": {"last_epoch": 299},
            "max_accuracy": np.float64(83.4),
            "epoch": 299,
            "config": config,
        }
        if averaged is not None:
            content |= {"model_ema": averaged, "max_accuracy_ema": np.float64(83.6), "ema_decay": 0.9999}
        torch.save(content, path)


def flip(path: Path, generator: np.random.Generator | None = None) -> None:
    """Change one bit: in the middle of the largest tensor, or of any byte that the generator draws."""
    content = bytearray(path.read_bytes())
    if generator is None:
        with zipfile.ZipFile(path) as archive:
            tensors = [record for record in archive.infolist() if "/data/" in record.filename]
        largest = max(tensors, key=lambda record: record.file_size)
        # Behind the record's header and its padding to a multiple of 64 bytes.
        content[-(-(largest.header_offset + 30 + len(largest.filename)) // 64) * 64 + largest.file_size // 2] ^= 1
    else:
        content[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
    path.write_bytes(content)
