"""Fields and panels that several views have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from PIL import Image as PILImage

from grootv.models.grootv import SCANS
from grootv.visualization import MAP_COLOURS, MixerCall, draw_tree, mixer_affinity, mixer_calls, tree_depths

from ..inputs import MODELS, Classifier
from ..view import Choice, Field, Image, Number, PathText, Point, Points

IMAGE_POINT, MAP_POINT = "#c1272d", "#2ec4ff"
_SHOWN_PIXELS = 600_000
_LOWEST = 1e-3
_WIDEST = 6.0
"""Aspect ratio beyond which a panel no longer has the image's."""

IMAGE = Image("image", "Image")
POINT = Points("point", "Point", "Row and column in percent")
SIZE = Number("size", "Input size", "Side, in pixels", 64, 512, 32)
STAGE = Number("stage", "Stage", "1 is the finest", 1, 4, 1)
BLOCK = Number("block", "Block", "Of the stage", 1, 40, 1)
GRID = Number("grid", "Grid", "About grid² pixels", 8, 224, 8)
SOURCE = Choice("source", "Features", "Colours of the image (CIE Lab), or a model's own", ("colours", "model"))
SCALE = Choice("scale", "Colour scale", f"The logarithmic one begins at {_LOWEST:g}", ("log", "linear"))


def model_fields(suffix: str = "", label: str = "Model") -> tuple[Field, ...]:
    """The fields of one model."""
    return (
        Choice(f"model{suffix}", label, options=MODELS),
        PathText(
            f"weights{suffix}",
            f"Weights of {label[0].lower()}{label[1:]}",
            "File or run's folder; empty: random",
        ),
        Choice(f"scan{suffix}", f"Scan of {label[0].lower()}{label[1:]}", "Of GrootV alone", SCANS),
    )


def calls_of(classifier: Classifier, image: np.ndarray, size: int, stage: int, block: int = 1) -> list[MixerCall]:
    """What the mixers of a stage are called with for an image, by block.

    Raises:
        ValueError: the model has no such stage, or the stage no such block. Both count from 1.
    """
    calls = mixer_calls(classifier.net, classifier.prepare(image, size))
    if not 1 <= stage <= len(calls):
        raise ValueError(f"{classifier.title} has {len(calls)} stages. There is no stage {stage}.")
    if not 1 <= block <= len(calls[stage - 1]):
        count = len(calls[stage - 1])
        blocks = "one block" if count == 1 else f"{count} blocks"
        raise ValueError(f"Stage {stage} of {classifier.title} has {blocks}. There is no block {block}.")
    return calls[stage - 1]


def affinity_of(call: MixerCall, point: Point) -> np.ndarray:
    """The affinity map of a point, (H, W), with 1 at the point: the mean over the scans."""
    affinity = mixer_affinity(call.mixer, call.x, pixel_of(point, *call.x.shape[1:3]), call.tree)
    return (affinity / len(call.scans())).numpy()


def pixel_of(point: Point, height: int, width: int) -> tuple[int, int]:
    """The pixel of a map at a point."""
    return min(int(point[0] * height), height - 1), min(int(point[1] * width), width - 1)


def shown(image: np.ndarray) -> np.ndarray:
    """The image for a figure, which has fewer pixels than a photograph."""
    height, width = image.shape[:2]
    scale = (_SHOWN_PIXELS / (height * width)) ** 0.5
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(PILImage.fromarray(image).resize(size, PILImage.Resampling.BILINEAR))


def make_figure(image: np.ndarray, rows: int, columns: int, width: float = 11.0) -> tuple[Figure, np.ndarray]:
    """A figure of panels with the image's aspect ratio, and their axes (rows, columns)."""
    ratio = min(max(image.shape[0] / image.shape[1], 1 / _WIDEST), _WIDEST)
    panel = min(width / columns, 7.0 / ratio if rows == 1 else 4.5 / ratio)
    # Titles, the colour bar and its label need the same room however narrow the image is.
    figure = Figure(
        figsize=(max(panel * columns, 2.6 * columns) + 0.9, (panel * ratio + 0.45) * rows), layout="compressed"
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_image(axes: Axes, image: np.ndarray, points: Sequence[Point] = (), title: str = "") -> None:
    """A photograph with points marked."""
    axes.imshow(image)
    finish(axes, image, points, title, IMAGE_POINT)


def show_affinity(
    axes: Axes, image: np.ndarray, affinity: np.ndarray, point: Point, scale: str, title: str = ""
) -> AxesImage:
    """An affinity map in the place of the image."""
    height, width = image.shape[:2]
    norm = LogNorm(_LOWEST, 1) if scale == "log" else Normalize(0, 1)
    floor = _LOWEST if scale == "log" else 0
    drawn = axes.imshow(np.maximum(affinity, floor), cmap=MAP_COLOURS, norm=norm, extent=(0, width, height, 0))
    finish(axes, image, [point], title, MAP_POINT)
    return drawn


def show_tree_and_affinity(
    axes: Sequence[Axes], image: np.ndarray, call: MixerCall, point: Point, scale: str, titles: tuple[str, str]
) -> tuple[AxesImage, dict[str, np.ndarray]]:
    """Draw the first tree that a mixer scans along, and in a second panel the affinity map of a point.

    Returns:
        The drawn map, for a colour bar; and the arrays `parent` and `depth` (L,), and `affinity` (H, W).
    """
    tree, affinity = call.scans()[0][0], affinity_of(call, point)
    height, width = call.x.shape[1:3]
    draw_tree(axes[0], image, tree, height, width)
    finish(axes[0], image, [point], titles[0])
    drawn = show_affinity(axes[1], image, affinity, point, scale, titles[1])
    return drawn, {"parent": tree.parent[0].numpy(), "depth": tree_depths(tree)[0].numpy(), "affinity": affinity}


def finish(axes: Axes, image: np.ndarray, points: Sequence[Point], title: str, colour: str = IMAGE_POINT) -> None:
    """Mark points, take ticks away, set the title and the aspect ratio."""
    height, width = image.shape[:2]
    for number, (row, column) in enumerate(points, 1):
        place = column * width, row * height
        outline = [withStroke(linewidth=4, foreground="white" if colour == IMAGE_POINT else "black")]
        axes.plot(*place, "+", color=colour, markersize=14, markeredgewidth=2, path_effects=outline)
        if len(points) > 1:
            axes.annotate(str(number), place, (5, 5), textcoords="offset points", color=colour, weight="bold")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    if not 1 / _WIDEST <= height / width <= _WIDEST:
        axes.set_aspect("auto")
