"""Bad data, configs and checkpoints of detection and segmentation runs: each raises an error that names the cause."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import numpy as np
import torch
from dense_helpers import TASKS, build_runner, make_data, skip_without, write_dense_config
from PIL import Image

TRAIN_IMAGES = {"detection": "train2017", "segmentation": "images/training"}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return request.param


@pytest.fixture
def data(task: str, tmp_path: Path) -> Path:
    return make_data(task, tmp_path / "data")


def run_training(task: str, data: Path, tmp_path: Path, extra: str = "", **changes: object):
    runner = build_runner(write_dense_config(tmp_path, task, data, extra), tmp_path / f"run_{task}", **changes)
    runner.train()
    return runner


def first_image(task: str, data: Path) -> Path:
    return sorted((data / TRAIN_IMAGES[task]).iterdir())[0]


def test_a_damaged_image_stops_with_its_path(task: str, data: Path, tmp_path: Path) -> None:
    first_image(task, data).write_bytes(b"this is no image")
    with pytest.raises(AssertionError, match=f"failed to load image: .*{first_image(task, data).name}"):
        run_training(task, data, tmp_path, **{"train_cfg.val_interval": 100})


def test_a_truncated_segmentation_map_is_named(tmp_path: Path) -> None:
    skip_without("segmentation")
    data = make_data("segmentation", tmp_path / "data")
    label = sorted((data / "annotations/training").iterdir())[0]
    label.write_bytes(label.read_bytes()[: label.stat().st_size // 2])
    runner = build_runner(write_dense_config(tmp_path, "segmentation", data), tmp_path / "cut")
    dataset = runner.build_train_loop(runner._train_loop).dataloader.dataset
    with pytest.raises(RuntimeError, match=rf"{label.name}: OSError: image file is truncated"):
        dataset[0]


@pytest.mark.parametrize(
    ("split", "content"), [("train", '{"images": ['), ("train", "[]"), ("train", "{}"), ("val", "\xff"), ("val", "[]")]
)
def test_broken_annotations_are_named(tmp_path: Path, split: str, content: str) -> None:
    skip_without("detection")
    data = make_data("detection", tmp_path / "data")
    file = data / f"annotations/instances_{split}2017.json"
    file.write_bytes(content.encode("latin-1"))
    runner = build_runner(write_dense_config(tmp_path, "detection", data), tmp_path / "json")
    with pytest.raises(RuntimeError, match=f"annotations .*{file.name}: "):
        if split == "train":
            runner.build_dataloader(runner.cfg.train_dataloader)
        else:
            runner.build_evaluator(runner.cfg.val_evaluator)


def test_images_of_another_suffix_are_said(tmp_path: Path) -> None:
    skip_without("segmentation")
    from grootv.openmmlab.dense.data_files import DataFilesHook

    data = make_data("segmentation", tmp_path / "data")
    (data / "images/training/forgotten.webp").write_bytes(b"1")
    runner = build_runner(write_dense_config(tmp_path, "segmentation", data), tmp_path / "suffix")
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    DataFilesHook().before_train(runner)
    log = next((tmp_path / "suffix").rglob("*.log")).read_text()
    assert "train_dataloader: 1 files in" in log and "the first: " in log and "forgotten.webp" in log


@pytest.mark.parametrize("fault", ["missing", "empty"])
def test_missing_images_are_named_before_the_first_iteration(task: str, data: Path, tmp_path: Path, fault: str) -> None:
    image = first_image(task, data)
    if task == "segmentation" and fault == "missing":
        # mmseg lists the images that exist, so only their labels can be missing.
        image = data / "annotations" / "training" / f"{image.stem}.png"
    image.unlink()
    if fault == "empty":
        image.touch()
    with pytest.raises(FileNotFoundError, match=f"train_dataloader: 1 files .* missing or empty: .*{image.name}"):
        run_training(task, data, tmp_path)
    assert not list((tmp_path / f"run_{task}").glob("*.pth"))


def test_a_batch_without_any_object_trains(task: str, data: Path, tmp_path: Path) -> None:
    extra = ""
    if task == "detection":
        file = data / "annotations" / "instances_train2017.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
        extra = "train_dataloader['dataset']['filter_cfg'] = dict(filter_empty_gt=False)\n"
    else:
        for path in (data / "annotations" / "training").iterdir():
            Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    runner = build_runner(write_dense_config(tmp_path, task, data, extra), tmp_path / f"run_{task}")
    batch = next(iter(runner.build_train_loop(runner._train_loop).dataloader))
    losses = runner.model(**runner.model.data_preprocessor(batch, training=True), mode="loss")
    total, values = runner.model.parse_losses(losses)
    total.backward()
    assert all(value.isfinite().all() for value in values.values())
    # Every parameter gets a gradient, because the other processes of a distributed run wait for it.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in runner.model.parameters())


def test_a_wrong_number_of_classes_is_said_before_the_first_iteration(task: str, data: Path, tmp_path: Path) -> None:
    if task == "detection":
        error, message = AssertionError, r"`num_classes` \(7\) in Shared2FCBBoxHead .* `classes`\s+10\) in CocoDataset"
        changes = {"model.roi_head.bbox_head.num_classes": 7}
    else:
        error, message = ValueError, r"train_dataloader has 11 classes .*num_classes=7"
        changes = {"model.decode_head.num_classes": 7, "model.auxiliary_head.num_classes": 7}
    with pytest.raises(error, match=message):
        run_training(task, data, tmp_path, **changes)


def test_a_checkpoint_of_another_size_is_refused(task: str, data: Path, tmp_path: Path) -> None:
    runner = build_runner(write_dense_config(tmp_path, task, data), tmp_path / f"wide_{task}")
    torch.save({"state_dict": runner.model.state_dict(), "meta": {}}, tmp_path / "wide.pth")
    heads = {
        "detection": {"model.neck.in_channels": [8, 16, 24, 40]},
        "segmentation": {"model.decode_head.in_channels": [8, 16, 24, 40]},
    }[task]
    changes = {"model.backbone.dims": (8, 16, 24, 40), "load_from": str(tmp_path / "wide.pth"), **heads}
    narrow = build_runner(write_dense_config(tmp_path, task, data), tmp_path / f"narrow_{task}", **changes)
    with pytest.raises(RuntimeError, match=r"backbone\.model\.stages\.3\.norm\.weight.*32"):
        narrow.test()


def test_an_initial_checkpoint_of_another_size_stops_the_run(task: str, data: Path, tmp_path: Path) -> None:
    runner = build_runner(write_dense_config(tmp_path, task, data), tmp_path / f"first_{task}")
    torch.save({"state_dict": runner.model.state_dict()}, tmp_path / "first.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "first.pth")}
    changes = {"model.backbone.init_cfg": init_cfg, "model.backbone.depths": (1, 1, 2, 1)}
    with pytest.raises(RuntimeError, match=r"does not fit the model: .* missing: stages\.2\.blocks\.1\.norm1\.weight"):
        run_training(task, data, tmp_path, **changes)


def test_a_wrong_architecture_is_named(task: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arch must be one of .*got 'giant'"):
        run_training(task, data, tmp_path, **{"model.backbone.arch": "giant"})


def test_output_indices_out_of_range_are_named(task: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out_indices must be increasing numbers of 0 to 3, got \(1, 2, 3, 4\)"):
        run_training(task, data, tmp_path, **{"model.backbone.out_indices": (1, 2, 3, 4)})
