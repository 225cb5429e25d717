"""Effective receptive fields of the models of `compare_scans.py`, and affinity maps of their scans.

    python benchmarks/effective_receptive_field.py data/emoji.npz --work-dir work_dirs/compare_scans

The effective receptive field of the centre pixel of the last map (`grootv.visualization.receptive_field`), averaged
over images: before training, and after it, with the weights that `compare_scans.py train` left.

The affinity maps are those of the paper (arXiv 2406.02395): how much of what a chosen pixel contributes reaches each
pixel, in the last block of a stage of the trained models (`grootv.visualization.mixer_affinity`).

Writes docs/images/receptive_fields.png and docs/images/affinities.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from compare_scans import PICTURES, file_name, make, normalised
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from grootv.sample_data.emoji import load_emoji
from grootv.visualization import MAP_COLOURS, draw_tree, field_area, mixer_affinity, mixer_calls, receptive_field

ROWS = ("tree", "raster", "bidirectional", "cross", "VMamba", "MambaOut", "ConvNeXt")
AFFINITIES = ROWS[:4]
# Drawings by the artist that training has not seen, and a pixel of each: row and column, as parts of height and width.
POINTS = {"snail": (0.68, 0.72), "octopus": (0.3, 0.5), "sailboat": (0.8, 0.3)}


def load(row: str, num_classes: int, folder: Path | None) -> nn.Module:
    """The model of a row: trained, or without a folder with random weights."""
    torch.manual_seed(0)
    model = make(row, num_classes)
    if folder is not None:
        weights = torch.load(folder / f"{file_name(row)}.pth", map_location="cpu")
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


def draw_fields(rows: list[str], images: Tensor, num_classes: int, folder: Path) -> Figure:
    """A column for each row of the comparison: before training above, after it below."""
    figure = Figure(figsize=(1.7 * len(rows) + 0.8, 4.4), layout="constrained")
    lines = figure.subplots(2, len(rows), squeeze=False)
    for line, (title, source) in zip(lines, {"before training": None, "after training": folder}.items(), strict=True):
        for axes, row in zip(line, rows, strict=True):
            field = receptive_field(load(row, num_classes, source), images)
            drawn = axes.imshow(np.maximum(field, 1e-5), cmap=MAP_COLOURS, norm=LogNorm(1e-5, 1))
            axes.set(xticks=[], yticks=[], xlabel=f"90 % in {100 * field_area(field, 0.9):.0f} %\nof the image")
            areas = ", ".join(f"{100 * field_area(field, share):.1f}" for share in (0.5, 0.9, 0.99))
            print(f"{row}, {title}: 50, 90 and 99 % in {areas} % of the image")
        line[0].set_ylabel(title, fontsize=12)
    for axes, row in zip(lines[0], rows, strict=True):
        axes.set_title(row)
    figure.colorbar(drawn, ax=lines, label="gradient, relative to the largest", shrink=0.8, aspect=30)
    return figure


def draw_affinities(drawings: dict[str, np.ndarray], num_classes: int, folder: Path, stage: int) -> Figure:
    """A line for each drawing: the drawing and its tree in the trained model, then the affinities in every scan."""
    figure = Figure(figsize=(1.8 * (len(AFFINITIES) + 1) + 0.8, 1.85 * len(drawings) + 0.4), layout="constrained")
    models = {row: load(row, num_classes, folder) for row in AFFINITIES}
    lines = figure.subplots(len(drawings), len(AFFINITIES) + 1, squeeze=False)
    for line, (subject, drawing) in zip(lines, drawings.items(), strict=True):
        x = normalised(torch.from_numpy(drawing).permute(2, 0, 1)[None])
        side = drawing.shape[0]
        for axes, (row, model) in zip(line[1:], models.items(), strict=True):
            call = mixer_calls(model, x)[stage][-1]
            _, height, width, _ = call.x.shape
            pixel = int(POINTS[subject][0] * height), int(POINTS[subject][1] * width)
            affinity = mixer_affinity(call.mixer, call.x, pixel).numpy()
            drawn = axes.imshow(np.maximum(affinity / affinity.max(), 1e-3), cmap=MAP_COLOURS, norm=LogNorm(1e-3, 1))
            axes.plot(pixel[1], pixel[0], "+", color="#2ec4ff", markersize=12, markeredgewidth=1.5)
            axes.set(xticks=[], yticks=[])
            if row == "tree":
                with torch.no_grad():
                    ((tree, _),) = call.scans()
                draw_tree(line[0], drawing, tree, height, width)
                line[0].plot(POINTS[subject][1] * side, POINTS[subject][0] * side, "+", color="#c1272d", markersize=12)
                line[0].set_ylabel(subject, fontsize=12)
    for axes, title in zip(lines[0], (f"tree, {height} × {width}", *AFFINITIES), strict=True):
        axes.set_title(title if axes is lines[0, 0] else f"{title} scan")
    figure.colorbar(drawn, ax=lines, label="affinity, relative to the largest", shrink=0.8, aspect=30)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="file of tools/make_emoji.py")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/compare_scans"))
    parser.add_argument("--images", type=int, default=16, help="of the average of the receptive field")
    parser.add_argument("--size", type=int, default=256, help="side of the images of the receptive field")
    parser.add_argument("--stage", type=int, default=0, help="whose last block the affinities are of, from 0 to 3")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="whose fields are shown")
    args = parser.parse_args()
    missing = [row for row in {*args.rows, *AFFINITIES} if not (args.work_dir / f"{file_name(row)}.pth").exists()]
    if missing:
        parser.error(f"{args.work_dir} has no weights of {', '.join(missing)}")
    emoji = load_emoji(args.data, "artist")
    chosen = torch.randperm(len(emoji.labels), generator=torch.Generator().manual_seed(0))[: args.images]
    images = normalised(torch.from_numpy(emoji.images[chosen.numpy()]).permute(0, 3, 1, 2))
    images = F.interpolate(images, args.size, mode="bicubic", antialias=True)
    fields = draw_fields(args.rows, images, len(emoji.classes), args.work_dir)
    fields.savefig(PICTURES / "receptive_fields.png", dpi=110)
    drawings = {subject: emoji.images[emoji.subjects.index(subject)] for subject in POINTS}
    affinities = draw_affinities(drawings, len(emoji.classes), args.work_dir, args.stage)
    affinities.savefig(PICTURES / "affinities.png", dpi=110)


if __name__ == "__main__":
    main()
