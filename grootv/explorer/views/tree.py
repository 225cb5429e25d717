"""The minimum spanning tree over an image."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

from grootv.visualization import draw_tree, lab_features, tree_depths
from grootvl_ops import METRICS, build_tree

from ..inputs import load_classifier, read_image
from ..view import Choice, Number, Point, Points, Spec, View
from ._shared import BLOCK, GRID, IMAGE, SIZE, SOURCE, STAGE, calls_of, finish, model_fields, pixel_of, shown


@torch.no_grad()
def plot_tree(
    image: str = "china",
    source: str = "colours",
    metric: str = "euclidean",
    grid: int = 64,
    root: Point = (0.5, 0.5),
    color_by: str = "depth",
    zoom: float = 1.0,
    centre: Point = (0.5, 0.5),
    model: str = "grootv_nano",
    weights: str = "",
    scan: str = "tree",
    stage: int = 1,
    block: int = 1,
    size: int = 224,
) -> View:
    """The minimum spanning tree of an image's colours or of a model's features (arXiv 2406.02395, section 3.2).

    Args:
        image: A sample's name or a file's path.
        source: "colours": CIE Lab on a grid of about `grid`² pixels. "model": the features on which the mixer of a
            stage and block builds its tree.
        metric: Dissimilarity of neighbouring pixels.
        root: Row and column, from 0 to 1. It changes depths, and not which pixels are joined.
        color_by: "depth" or "subtree", see `grootv.visualization.draw_tree`.
        zoom, centre: The part of the image that is shown: 1 / zoom of its height and width around a point.
        model, weights, scan, stage, block, size: See `plot_model`.

    Returns:
        A view with data `parent`, `depth` and `subtree_size` (L,), and `height` and `width` of the map.

    Raises:
        ValueError: an argument that is not allowed, or an image that cannot be read.
    """
    pixels, notes = read_image(image)
    if source == "colours":
        height, width = grid_of(pixels, grid)
        features = lab_features(pixels, height, width)
        title = f"Colours (CIE Lab), {height} × {width} pixels"
    else:
        classifier = load_classifier(model, weights, scan)
        call = calls_of(classifier, pixels, size, stage, block)[block - 1]
        features = call.features()
        height, width = features.shape[1:3]
        title = f"{classifier.title}: stage {stage}, block {block}, {height} × {width} pixels"
        notes += classifier.notes
        own = getattr(call.mixer, "metric", None)
        if own is None:
            notes.append("This mixer scans along paths. The tree is that of its features.")
        elif own != metric:
            notes.append(f"The mixer itself uses the metric {own}.")
    row, column = pixel_of(root, height, width)
    tree = build_tree(features, metric, row * width + column)
    depths = tree_depths(tree)[0].numpy()

    picture = shown(pixels) if zoom < 2 else pixels
    ratio = picture.shape[0] / picture.shape[1]
    drawn_width = min(9.0, max(3.5, 7.0 / ratio))
    figure = Figure(figsize=(drawn_width, min(max(1.6, (drawn_width - 1) * ratio), 9.0) + 0.6), layout="constrained")
    axes = figure.subplots()
    lines = draw_tree(axes, picture, tree, height, width, color_by)
    finish(axes, picture, [], f"{title}; root: square")
    if zoom > 1:
        lines.set(linewidths=np.asarray(lines.get_linewidth()) * zoom**0.5)
        top, bottom = _part(picture.shape[0], zoom, centre[0])
        axes.set(xlim=_part(picture.shape[1], zoom, centre[1]), ylim=(bottom, top))
    labels = {"depth": "depth (edges to the root)", "subtree": "pixels below the edge"}
    figure.colorbar(lines, ax=axes, label=labels[color_by], pad=0.02)
    data = {"parent": tree.parent[0].numpy(), "depth": depths, "subtree_size": tree.subtree_size[0].numpy()}
    return View(
        figure,
        data | {"height": np.array(height), "width": np.array(width)},
        f"Minimum spanning tree over the image. {title}, metric {metric}, root at row {row} and column {column}. "
        f"The deepest pixel is {depths.max()} edges from the root.",
        notes,
        [(axes, picture.shape[:2])],
    )


def _part(length: int, zoom: float, centre: float) -> tuple[float, float]:
    """Start and end of 1 / zoom of a length around a place from 0 to 1, within the length."""
    part = length / zoom
    start = min(max(centre * length - part / 2, 0), length - part)
    return start, start + part


def grid_of(image: np.ndarray, grid: int) -> tuple[int, int]:
    """Height and width of a grid of about grid² cells of the image's aspect ratio, at most as fine as the image."""
    height, width = image.shape[:2]
    scale = min(1.0, grid / (height * width) ** 0.5)
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    return min(rows, height), min(columns, width)


SPEC = Spec(
    "tree",
    "Tree",
    "The minimum spanning tree joins neighbouring pixels that look alike. A click on the picture moves the root, or "
    "the centre of the zoom.",
    plot_tree,
    (
        IMAGE,
        SOURCE,
        Choice("metric", "Metric", "Dissimilarity of neighbouring pixels", METRICS),
        GRID,
        Points("root", "Root", "Row and column in percent"),
        Choice("color_by", "Colour", "What the colour of an edge shows", ("depth", "subtree")),
        Number("zoom", "Zoom", "", 1.0, 16.0, 0.5),
        Points("centre", "Centre of the zoom", "Row and column in percent"),
        *model_fields(),
        STAGE,
        BLOCK,
        SIZE,
    ),
    main=8,
    clicks=("root", "centre"),
)
