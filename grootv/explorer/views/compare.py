"""Two images or two models side by side."""

from __future__ import annotations

import torch

from ..inputs import load_classifier, read_image
from ..view import Image, Point, Spec, View
from ._shared import (
    BLOCK,
    IMAGE,
    POINT,
    SCALE,
    SIZE,
    STAGE,
    calls_of,
    make_figure,
    model_fields,
    show_tree_and_affinity,
    shown,
)
from .model import class_scores, draw_classes

SAME = "same image"


@torch.no_grad()
def plot_comparison(
    image: str = "china",
    image2: str = SAME,
    model: str = "grootv_nano",
    weights: str = "",
    scan: str = "tree",
    model2: str = "grootv_nano",
    weights2: str = "",
    scan2: str = "cross",
    stage: int = 1,
    block: int = 1,
    point: Point = (0.4, 0.62),
    scale: str = "log",
    size: int = 224,
) -> View:
    """Tree, affinity map and classes of two images, two models, or both, in two columns.

    Args:
        image, image2: A sample's name or a file's path; "same image" to compare models.
        model, weights, scan: Of the left column, see `plot_model`.
        model2, weights2, scan2: Of the right column.
        stage, block, point, scale, size: See `plot_model`.

    Returns:
        A view with data `parent_C` (L,), `depth_C` (L,), `affinity_C` (H, W) and `scores_C` (classes,) for both columns
        C.

    Raises:
        ValueError: an argument that is not allowed, an image that cannot be read, weights that do not fit.
        CheckpointError: a file of weights is damaged, or not plain data.
    """
    notes, data, panels, words = [], {}, [], []
    pictures = [read_image(image), read_image(image if image2 == SAME else image2)]
    figure, axes = make_figure(
        max((shown(pixels) for pixels, _ in pictures), key=lambda p: p.shape[0] / p.shape[1]), 3, 2, 10.0
    )
    sides = zip(pictures, ((model, weights, scan), (model2, weights2, scan2)), axes.T, strict=True)
    for number, ((pixels, done), arguments, (top, middle, bottom)) in enumerate(sides, 1):
        classifier = load_classifier(*arguments)
        call = calls_of(classifier, pixels, size, stage, block)[block - 1]
        height, width = call.x.shape[1:3]
        picture = shown(pixels)
        titles = f"{number}: {classifier.title}", f"affinity, {height} × {width}"
        drawn, arrays = show_tree_and_affinity((top, middle), picture, call, point, scale, titles)
        scores = class_scores(classifier, pixels, size)
        words.append(f"{classifier.title}: {draw_classes(bottom, classifier, scores)}")
        panels += [(top, picture.shape[:2]), (middle, picture.shape[:2])]
        notes += [note for note in (*done, *classifier.notes) if note not in notes]
        data |= {f"{name}_{number}": array for name, array in {**arrays, "scores": scores}.items()}
    figure.colorbar(drawn, ax=axes[1], label="affinity", pad=0.02)
    notes.append(f"Trees and affinities are those of stage {stage}, block {block}.")
    return View(figure, data, f"Two columns of tree, affinity map and classes. {'; '.join(words)}.", notes, panels)


SPEC = Spec(
    "compare",
    "Compare",
    "Two models on one image, or two images. A click on a tree or a map moves the point in both columns.",
    plot_comparison,
    (
        IMAGE,
        Image("image2", "Right image"),
        *model_fields("", "Left model"),
        *model_fields("2", "Right model"),
        STAGE,
        BLOCK,
        POINT,
        SCALE,
        SIZE,
    ),
    main=8,
    clicks=("point",),
)
