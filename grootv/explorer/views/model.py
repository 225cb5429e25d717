"""What a model sees: classes, the trees and affinities of its blocks, its receptive fields."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from grootv.visualization import MAP_COLOURS, field_area, receptive_field

from ..inputs import Classifier, load_classifier, read_image
from ..view import Choice, Point, Spec, View
from ._shared import (
    IMAGE,
    MAP_POINT,
    POINT,
    SCALE,
    SIZE,
    STAGE,
    calls_of,
    finish,
    make_figure,
    model_fields,
    show_image,
    show_tree_and_affinity,
    shown,
)

SHOWS = ("classes", "trees", "receptive fields")
_FAINTEST = 1e-5


def plot_model(
    image: str = "china",
    model: str = "grootv_nano",
    weights: str = "",
    scan: str = "tree",
    show: str = "trees",
    stage: int = 1,
    point: Point = (0.4, 0.62),
    scale: str = "log",
    size: int = 224,
) -> View:
    """What a model makes of an image.

    Args:
        image: A sample's name or a file's path.
        model: Name in timm's registry, such as "grootv_tiny" or "vmamba_tiny_s1l8".
        weights: A file of weights, or a training run's folder, see `grootv.explorer.inputs.load_classifier`.
        scan: Of a GrootV: "tree", or paths that it was trained with.
        show: "classes": the five most probable. "trees": of every block of a stage, with the affinity map of a point.
            "receptive fields": of a point in the maps of all stages (`grootv.visualization.receptive_field`).
        stage: From 1.
        point: Row and column, from 0 to 1.
        scale: Of affinities, "log" or "linear".
        size: The model sees about size² pixels, in the image's aspect ratio.

    Returns:
        A view with data `scores` (classes,); or `parent_B`, `depth_B` (L,) and `affinity_B` (H, W) for each block B; or
        `field_S` (H, W) for each stage S.

    Raises:
        ValueError: an argument that is not allowed, an image that cannot be read, weights that do not fit.
        CheckpointError: the file of weights is damaged, or not plain data.
    """
    pixels, notes = read_image(image)
    classifier = load_classifier(model, weights, scan)
    notes += classifier.notes
    width, height = classifier.input_size(pixels, size)
    notes.append(f"The model sees {width} × {height} pixels.")
    draw = {"classes": _classes, "trees": _trees, "receptive fields": _fields}[show]
    view = draw(classifier, pixels, stage=stage, point=point, scale=scale, size=size)
    view.figure.suptitle(classifier.title, fontsize=11)
    view.notes[:0] = notes
    return view


@torch.no_grad()
def _classes(classifier: Classifier, pixels: np.ndarray, size: int, **_: object) -> View:
    scores = class_scores(classifier, pixels, size)
    picture = shown(pixels)
    figure, ((photo, bars),) = make_figure(picture, 1, 2, 9.0)
    show_image(photo, picture)
    best = draw_classes(bars, classifier, scores)
    return View(figure, {"scores": scores}, f"The most probable classes of {classifier.title}: {best}.")


@torch.no_grad()
def class_scores(classifier: Classifier, pixels: np.ndarray, size: int) -> np.ndarray:
    """The probability of each class."""
    return classifier.net(classifier.prepare(pixels, size)).softmax(-1)[0].numpy()


def draw_classes(axes: Axes, classifier: Classifier, scores: np.ndarray, count: int = 5) -> str:
    """Bars of the most probable classes, and the same in words."""
    best = np.argsort(-scores, kind="stable")[:count]
    names = [_short(classifier.classes[int(index)]) for index in best]
    words = [f"{name}: {100 * score:.1f} %" for name, score in zip(names, scores[best], strict=True)]
    bars = axes.barh(range(len(best)), 100 * scores[best], color="#56b4e9", height=0.7)
    axes.set(xlim=(0, 100 * scores[best].max()), yticks=[], xlabel="probability in %")
    for bar, label in zip(bars, words, strict=True):
        axes.annotate(label, (0, bar.get_y() + bar.get_height() / 2), (6, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return ", ".join(words)


def _short(name: str, length: int = 24) -> str:
    name = name.split(",")[0]
    return name if len(name) <= length else f"{name[: length - 1]}…"


@torch.no_grad()
def _trees(classifier: Classifier, pixels: np.ndarray, stage: int, point: Point, scale: str, size: int) -> View:
    blocks, picture, data = calls_of(classifier, pixels, size, stage), shown(pixels), {}
    columns = min(len(blocks), 5)
    lines = -(-len(blocks) // columns)
    figure, axes = make_figure(picture, 2 * lines, columns)
    for panel in axes.flat:
        panel.set_axis_off()
    for number, call in enumerate(blocks):
        line, column = divmod(number, columns)
        top, bottom = axes[2 * line, column], axes[2 * line + 1, column]
        top.set_axis_on()
        bottom.set_axis_on()
        height, width = call.x.shape[1:3]
        what = "tree"
        if getattr(call.mixer, "metric", None) is None:
            paths = len(call.scans())
            what = "path" if paths == 1 else f"path 1 of {paths}"
        titles = f"block {number + 1}: {what}, {height} × {width}", "affinity to the point"
        drawn, arrays = show_tree_and_affinity((top, bottom), picture, call, point, scale, titles)
        data |= {f"{name}_{number + 1}": array for name, array in arrays.items()}
    figure.colorbar(drawn, ax=axes[1::2, -1], label="affinity", pad=0.02)
    drawn_panels = [panel for panel in axes.flat if panel.axison]
    alt = f"Trees and affinity maps of the {len(blocks)} block(s) of stage {stage} of {classifier.title}."
    return View(figure, data, alt, [], [(panel, picture.shape[:2]) for panel in drawn_panels])


def _fields(classifier: Classifier, pixels: np.ndarray, point: Point, size: int, **_: object) -> View:
    images, picture, data = classifier.prepare(pixels, size), shown(pixels), {}
    stages = len(classifier.net.stages)
    lines = -(-stages // 2)
    figure, grid = make_figure(picture, lines, -(-stages // lines), 9.0)
    axes = grid.ravel()[:stages]
    for panel in grid.ravel()[stages:]:
        panel.remove()
    sizes = []
    for stage, panel in enumerate(axes):
        field = receptive_field(classifier.net, images, stage, point)
        data[f"field_{stage + 1}"] = field
        height, width = picture.shape[:2]
        drawn = panel.imshow(
            np.maximum(field, _FAINTEST), cmap=MAP_COLOURS, norm=LogNorm(_FAINTEST, 1), extent=(0, width, height, 0)
        )
        sizes.append(f"stage {stage + 1}: 90 % in {100 * field_area(field, 0.9):.1f} %")
        finish(
            panel,
            picture,
            [point],
            f"stage {stage + 1}\n90 % in {100 * field_area(field, 0.9):.1f} % of the image",
            MAP_POINT,
        )
    figure.colorbar(drawn, ax=list(axes), label="gradient, relative to the largest", pad=0.02, shrink=0.8)
    alt = f"Effective receptive fields of {classifier.title}. {'; '.join(sizes)} of the image."
    return View(figure, data, alt, [], [(panel, picture.shape[:2]) for panel in axes])


SPEC = Spec(
    "model",
    "Model",
    "What a model makes of the image: its five most probable classes, the trees and affinities of every block, and its "
    "receptive fields. A click on the picture moves the point.",
    plot_model,
    (
        IMAGE,
        *model_fields(),
        Choice("show", "Show", options=SHOWS),
        STAGE,
        POINT,
        SCALE,
        SIZE,
    ),
    main=9,
    clicks=("point",),
)
