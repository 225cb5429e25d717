"""Detection and segmentation with mmdetection and mmsegmentation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from ..inputs import read_image
from ..view import Number, PathText, Spec, View
from ._shared import IMAGE, finish, make_figure, show_image, shown

# Okabe and Ito's colours, which colour-blind people tell apart.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
OTHERS = "#777777"
INSTALL = "pip install 'grootv[openmmlab]'"
MAX_INSTANCES = 100


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
    classes = _Names(next((meta["classes"] for meta in metas if meta.get("classes")), ()))
    picture = shown(pixels)
    figure, ((photo, result),) = make_figure(picture, 1, 2, 13.0)
    show_image(photo, picture, (), "image")
    draw = _draw_instances if task == "mmdet" else _draw_regions
    data, words = draw(result, found, picture, pixels.shape[:2], classes, threshold)
    finish(result, picture, [], f"{Path(config).stem}", "")
    return View(figure, data, words, [*notes, words])


class _Names(dict[int, str]):
    """The name of each class, or its number."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(enumerate(names))

    def __missing__(self, label: int) -> str:
        return f"class {label}"


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
    axes: Axes, found: Any, picture: np.ndarray, size: tuple[int, int], classes: _Names, threshold: float
) -> tuple[dict[str, np.ndarray], str]:
    instances = found.pred_instances.numpy()
    kept = np.flatnonzero(instances.scores >= threshold)[:MAX_INSTANCES]
    data = {"boxes": instances.bboxes[kept], "scores": instances.scores[kept], "labels": instances.labels[kept]}
    if "masks" in instances:
        data["masks"] = instances.masks[kept]
    axes.imshow(picture)
    scale = picture.shape[0] / size[0]
    for number, (left, top, right, bottom) in enumerate(scale * data["boxes"]):
        colour = COLOURS[data["labels"][number] % len(COLOURS)]
        if "masks" in data:
            rows, columns = (
                np.linspace(0, full - 1, new).astype(int) for full, new in zip(size, picture.shape, strict=False)
            )
            _tint(axes, data["masks"][number][np.ix_(rows, columns)], colour)
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.8))
        axes.annotate(
            f"{classes[data['labels'][number]]} {data['scores'][number]:.2f}",
            (left, top),
            (2, -2),
            textcoords="offset points",
            va="top",
            fontsize=9,
            color="black",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2, "alpha": 0.9},
        )
    counts = np.bincount(data["labels"], minlength=1)
    named = ", ".join(f"{counts[label]} × {classes[label]}" for label in np.flatnonzero(counts).tolist()) or "nothing"
    return data, f"Found with a score of at least {threshold:g}: {named}."


def _draw_regions(
    axes: Axes, found: Any, picture: np.ndarray, size: tuple[int, int], classes: _Names, _: float
) -> tuple[dict[str, np.ndarray], str]:
    labels = found.pred_sem_seg.data[0].cpu().numpy()
    areas = (
        np.bincount(
            labels.ravel(),
        )
        / labels.size
    )
    largest = [label for label in np.argsort(-areas, kind="stable") if areas[label] > 0]
    axes.imshow(picture)
    rows, columns = (np.linspace(0, full - 1, new).astype(int) for full, new in zip(size, picture.shape, strict=False))
    small = labels[np.ix_(rows, columns)]
    shares = [f"{classes[label]} ({100 * areas[label]:.1f} %)" for label in largest]
    handles = []
    for number, label in enumerate(largest[: len(COLOURS)]):
        _tint(axes, small == label, COLOURS[number])
        handles.append(Patch(color=COLOURS[number], label=shares[number]))
    if len(largest) > len(COLOURS):
        _tint(axes, np.isin(small, largest[len(COLOURS) :]), OTHERS)
        handles.append(Patch(color=OTHERS, label=f"{len(largest) - len(COLOURS)} other classes"))
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=2, fontsize=9, frameon=False)
    return {"labels": labels}, f"Parts of the image: {', '.join(shares[: len(COLOURS)])}."


def _tint(axes: Axes, mask: np.ndarray, colour: str) -> None:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask.astype(bool)] = (red, green, blue, 130)
    axes.imshow(layer)


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
