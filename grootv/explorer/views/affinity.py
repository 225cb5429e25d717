"""Affinity maps of several scans or models beside each other."""

from __future__ import annotations

import numpy as np
import torch

from grootv.visualization import SCANS, lab_features, scan_affinity

from ..inputs import load_classifier, read_image
from ..view import Choice, Number, Point, Points, Spec, View
from ._shared import (
    BLOCK,
    GRID,
    IMAGE,
    SCALE,
    SIZE,
    SOURCE,
    STAGE,
    affinity_of,
    calls_of,
    make_figure,
    model_fields,
    pixel_of,
    show_affinity,
    show_image,
    shown,
)
from .tree import grid_of

ALONE = "no"


@torch.no_grad()
def plot_affinity(
    image: str = "china",
    source: str = "colours",
    points: tuple[Point, ...] = ((0.4, 0.62),),
    grid: int = 64,
    temperature: float = 30.0,
    scale: str = "log",
    model: str = "grootv_nano",
    weights: str = "",
    scan: str = "tree",
    second: str = "yes",
    model2: str = "grootv_nano",
    weights2: str = "",
    scan2: str = "raster",
    stage: int = 1,
    block: int = 1,
    size: int = 224,
) -> View:
    """How much of what a pixel contributes reaches each other pixel in a scan (affinity maps of arXiv 2406.02395).

    All maps have one colour scale, and are 1 at the chosen pixel. Maps of several scans are their mean.

    Args:
        image: A sample's name or a file's path.
        source: "colours": each scan decays by exp(-colour difference / temperature) between two pixels, for
            illustration (`grootv.visualization.scan_affinity`). "model": with the decays of a model
            (`grootv.visualization.mixer_affinity`).
        points: Rows and columns of the chosen pixels, from 0 to 1.
        grid: Colours are on a grid of about `grid`² pixels.
        temperature: Colour difference in CIE Lab over which an affinity falls to 1/e.
        scale: "log" or "linear".
        model, weights, scan, stage, block, size: See `plot_model`.
        second: Whether another model stands beside the first, "yes" or "no".
        model2, weights2, scan2: Of that model.

    Returns:
        A view with data `affinity` (points, scans or models, H, W), or one array for each model if their maps differ in
        size, `affinity_1` and `affinity_2`; and `points`.

    Raises:
        ValueError: an argument that is not allowed, or an image that cannot be read.
    """
    pixels, notes = read_image(image)
    columns: dict[str, list[np.ndarray]] = {}
    if source == "colours":
        height, width = grid_of(pixels, grid)
        features = lab_features(pixels, height, width)
        for name in SCANS:
            columns[f"{name} scan"] = [
                scan_affinity(features, pixel_of(point, height, width), temperature, name).numpy() for point in points
            ]
        notes.append(f"Decays for illustration: exp(−ΔE / {temperature:g}), the same rule in every scan.")
    else:
        chosen = [(model, weights, scan), (model2, weights2, scan2)][: 1 if second == ALONE else 2]
        for number, each in enumerate(chosen, 1):
            classifier = load_classifier(*each)
            call = calls_of(classifier, pixels, size, stage, block)[block - 1]
            title = classifier.title.replace(", ", "\n", 1)
            columns[f"{number}: {title}" if len(chosen) > 1 else title] = [affinity_of(call, point) for point in points]
            notes += [note for note in classifier.notes if note not in notes]
        notes.append(f"The maps are those of stage {stage}, block {block}.")
    picture = shown(pixels)
    panels = len(columns) + 1
    if len(points) == 1:  # then there is room for two lines of larger panels
        lines = -(-panels // 3)
        figure, axes = make_figure(picture, lines, -(-panels // lines), 10.0)
    else:
        figure, axes = make_figure(picture, len(points), panels)
    for panel in axes.flat[panels * len(points) :]:
        panel.remove()
    axes = axes.ravel()[: panels * len(points)].reshape(len(points), panels)
    for number, (line, point) in enumerate(zip(axes, points, strict=True)):
        show_image(line[0], picture, [point], "chosen pixel" if number == 0 else "")
        for panel, (title, maps) in zip(line[1:], columns.items(), strict=True):
            drawn = show_affinity(panel, picture, maps[number], point, scale, title if number == 0 else "")
    figure.colorbar(drawn, ax=list(axes.flat), label="affinity", pad=0.02, shrink=0.8)
    arrays = [np.stack(maps) for maps in columns.values()]
    if len({array.shape for array in arrays}) == 1:
        data = {"affinity": np.stack(arrays, 1)}
    else:
        data = {f"affinity_{number}": array for number, array in enumerate(arrays, 1)}
    return View(
        figure,
        data | {"points": np.array(points), "columns": np.array(list(columns))},
        f"Affinity maps of {len(points)} chosen pixel(s). Columns: {'; '.join(columns)}.".replace("\n", ", "),
        notes,
        [(panel, picture.shape[:2]) for panel in axes.flat],
    )


SPEC = Spec(
    "affinity",
    "Affinity",
    "How much of what a pixel contributes reaches each other pixel. A click on the picture chooses a pixel; up to four "
    "stay.",
    plot_affinity,
    (
        IMAGE,
        SOURCE,
        Points("points", "Chosen pixels", "Rows and columns in percent, such as 20, 30; 70, 60", many=True),
        SCALE,
        GRID,
        Number("temperature", "Temperature", "Colour difference over which an affinity falls to 1/e", 1.0, 200.0, 1.0),
        *model_fields(),
        Choice("second", "Second model", "Beside the first", ("yes", ALONE)),
        *model_fields("2", "Second model"),
        STAGE,
        BLOCK,
        SIZE,
    ),
    main=6,
    clicks=("points",),
)
