"""Detection and segmentation with mmdetection and mmsegmentation."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from grootv.visualization import draw_detections, draw_segmentation

from ..inputs import read_image
from ..view import Number, PathText, Spec, View
from ._shared import IMAGE, finish, make_figure, show_image, shown

INSTALL = "pip install 'grootv[openmmlab]'"
MAX_INSTANCES = 100
NAMED = 8


def plot_dense(image: str = "china", config: str = "", checkpoint: str = "", threshold: float = 0.3) -> View:
    """Boxes, masks and classes that a detector or segmentor finds.

    Args:
        image: A sample's name or a file's path.
        config: An mmengine config of a detector or segmentor. It is run as Python.
        checkpoint: Its weights; empty for random ones.
        threshold: Detections with a lower score are left out.

    Returns:
        A view with data `boxes` (N, 4) in pixels (left, top, right, bottom), `scores`, `labels` and, from models that
        give them, `masks` (N, H, W); or `labels` (H, W) of a segmentor.

    Raises:
        ValueError: an image or file that cannot be used.
        CheckpointError: the checkpoint is damaged, or not plain data.
        ImportError: mmdetection or mmsegmentation is not installed.
    """
    pixels, notes = read_image(image)
    if not config:
        raise ValueError("Choose a config, such as configs/detection/mask-rcnn_grootv-nano_fpn_digits.py.")
    for path in filter(None, (config, checkpoint)):
        if not Path(path).expanduser().is_file():
            raise ValueError(f"The file {path} does not exist.")
    task, model = _load(config, checkpoint, *(Path(path).stat().st_mtime_ns for path in (config, checkpoint) if path))
    if not checkpoint:
        notes.append("The model has random weights: this shows it before any training.")
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope(task):
        apis = import_module(f"{task}.apis")
        infer = apis.inference_detector if task == "mmdet" else apis.inference_model
        found = infer(model, np.ascontiguousarray(pixels[..., ::-1]))  # both take BGR
    # A checkpoint has the names of its classes; without one, those of COCO would be a guess.
    metas = [getattr(model, "dataset_meta", {}) if checkpoint else {}, model.cfg.get("metainfo", {})]
    classes = next((list(meta["classes"]) for meta in metas if meta.get("classes")), [])
    picture = shown(pixels)
    figure, ((photo, result),) = make_figure(picture, 1, 2, 13.0)
    show_image(photo, picture, (), "image")
    draw = _draw_instances if task == "mmdet" else _draw_regions
    data, words = draw(result, found, picture, pixels.shape[:2], classes, threshold)
    finish(result, picture, [], Path(config).stem)
    return View(figure, data, words, [*notes, words])


@lru_cache(maxsize=2)
def _load(config: str, checkpoint: str, *_: int) -> tuple[str, Any]:
    """The package, "mmdet" or "mmseg", and the model; a changed file makes a new entry of the cache."""
    try:
        from mmengine.config import Config

        import grootv.openmmlab  # noqa: F401  registers the backbones, and makes checkpoints be read as data
    except ImportError as error:
        raise ImportError(f"Detection and segmentation need OpenMMLab's packages ({error}): {INSTALL}") from error
    try:
        cfg = Config.fromfile(Path(config).expanduser())
    except Exception as error:  # a config is Python
        raise ValueError(f"The config {config} cannot be read ({' '.join(str(error).split())}).") from error
    task = cfg.get("default_scope")
    if task not in ("mmdet", "mmseg"):
        raise ValueError(f"The config {config} is of {task or 'no known package'}, not of mmdet or mmseg.")
    from grootv.openmmlab.dense.requirements import require

    require(task)
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope(task), torch.random.fork_rng():
        torch.manual_seed(0)
        apis = import_module(f"{task}.apis")
        cfg.model.backbone.pop("init_cfg", None)
        if task == "mmdet":
            return task, apis.init_detector(cfg, checkpoint or None, palette="random", device="cpu")
        return task, apis.init_model(cfg, checkpoint or None, device="cpu")


def _draw_instances(
    axes: Axes, found: Any, picture: np.ndarray, size: tuple[int, int], classes: list[str], threshold: float
) -> tuple[dict[str, np.ndarray], str]:
    instances = found.pred_instances.numpy()
    kept = np.flatnonzero(instances.scores >= threshold)[:MAX_INSTANCES]
    data = {"boxes": instances.bboxes[kept], "scores": instances.scores[kept], "labels": instances.labels[kept]}
    counts = np.bincount(data["labels"], minlength=1)
    names = _names(classes, len(counts))
    drawn = {**data, "boxes": data["boxes"] * np.tile(np.divide(picture.shape[1::-1], size[::-1]), 2)}
    if "masks" in instances:
        data["masks"] = instances.masks[kept]
        drawn["masks"] = (
            np.stack([mask[_cells(size, picture)] for mask in data["masks"]]) if len(kept) else data["masks"]
        )
    draw_detections(axes, picture, drawn, names)
    named = ", ".join(f"{counts[label]} × {names[label]}" for label in np.flatnonzero(counts).tolist()) or "nothing"
    return data, f"Found with a score of at least {threshold:g}: {named}."


def _draw_regions(
    axes: Axes, found: Any, picture: np.ndarray, size: tuple[int, int], classes: list[str], _: float
) -> tuple[dict[str, np.ndarray], str]:
    labels = found.pred_sem_seg.data[0].cpu().numpy()
    areas = np.bincount(labels.ravel()) / labels.size
    names = _names(classes, len(areas))
    draw_segmentation(axes, picture, labels[_cells(size, picture)], names)
    largest = np.argsort(-areas, kind="stable")[:NAMED].tolist()
    shares = [f"{names[label]}: {100 * areas[label]:.1f} %" for label in largest if areas[label] > 0]
    return {"labels": labels}, f"Largest parts of the image: {', '.join(shares)}."


def _names(classes: list[str], count: int) -> list[str]:
    """At least `count` names: numbers for classes without one."""
    return classes + [f"class {label}" for label in range(len(classes), count)]


def _cells(size: tuple[int, int], picture: np.ndarray) -> tuple[np.ndarray, ...]:
    """The rows and columns of an image that are the pixels of a smaller picture of it."""
    rows, columns = (np.linspace(0, full - 1, new).astype(int) for full, new in zip(size, picture.shape, strict=False))
    return np.ix_(rows, columns)


SPEC = Spec(
    "dense",
    "Detection / Segmentation",
    "Boxes, masks and classes of a detector or segmentor of mmdetection or mmsegmentation. A config is run as Python.",
    plot_dense,
    (
        IMAGE,
        PathText("config", "Config", "A file such as configs/detection/mask-rcnn_grootv-nano_fpn_digits.py"),
        PathText("checkpoint", "Checkpoint", "Its weights; empty: random weights"),
        Number("threshold", "Least score", "Of detections", 0.0, 1.0, 0.05),
    ),
    main=4,
)
