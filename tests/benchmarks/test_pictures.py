"""The pictures of the benchmarks, drawn from the committed results: no marker is cut, no legend covers data."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from training_helpers import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A program of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        __import__(name)
        return sys.modules[name]

    return load


def check_nothing_is_cut(figure: Figure) -> int:
    """Every marker lies in its axes, no legend over axes, all text in the figure. Returns the number of markers."""
    figure.draw_without_rendering()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    count = 0
    for axes in figure.axes:
        box = axes.get_window_extent()
        for line in axes.lines:
            if line.get_marker() in ("None", "none", "", None):
                continue
            radius = line.get_markersize() / 2 * figure.dpi / 72
            for x, y in axes.transData.transform(line.get_xydata()):
                assert box.x0 + radius < x < box.x1 - radius and box.y0 + radius < y < box.y1 - radius, line.get_label()
                count += 1
        assert not any(legend.get_window_extent().overlaps(box) for legend in legends)
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()
    whole = figure.bbox
    for artist in legends:
        box = artist.get_window_extent()
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    return count


def test_scaling(load: Callable[[str], ModuleType]) -> None:
    reports = sorted(RESULTS.glob("scaling-*.md"))
    assert reports
    for report in reports:
        figure = load("scaling").draw(report.read_text())
        maps = report.read_text().count("\n| ") - 2  # without the head and the line below it
        assert check_nothing_is_cut(figure) == 4 * maps
        tree = next(line for line in figure.axes[0].lines if "tree" in line.get_label())
        assert f"| {tree.get_ydata()[0]:.1f} (" in report.read_text()


def test_scans(load: Callable[[str], ModuleType]) -> None:
    tool = load("compare_scans")
    reports = (json.loads(path.read_text()) for path in sorted(RESULTS.glob("scans-*.json")))
    results = next(report for report in reports if "speed" in report)  # not those of dense prediction
    by_row = {row: [run for run in results["runs"] if run["row"] == row] for row in tool.ROWS}
    by_row = {row: runs for row, runs in by_row.items() if runs}
    figure = tool.plot(by_row, results["speed"]["rows"])
    drawn = [row for row in by_row if "inference" in results["speed"]["rows"][row]]
    assert check_nothing_is_cut(figure) >= 2 * len(drawn)
    looks = set()
    for container in figure.axes[0].containers:
        line = container.lines[0]
        looks.add((to_rgb(line.get_color()), line.get_marker()))
    assert len(looks) == len(drawn), "no two rows look alike"


def test_the_colours_of_the_scans_differ_for_colour_blind_people(load: Callable[[str], ModuleType]) -> None:
    """Under simulated deuteranopia and protanopia (Machado and others, 2009, severity 1) they stay apart in CIE Lab."""
    rgb2lab = pytest.importorskip("skimage.color").rgb2lab
    deuteranopia = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    protanopia = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    colours = np.array([to_rgb(colour) for colour, _ in load("compare_scans").MARKS.values()])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    for matrix in (np.eye(3), deuteranopia, protanopia):
        seen = np.clip(linear @ np.transpose(matrix), 0, 1)
        seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
        lab = rgb2lab(seen[None])[0]
        distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(len(lab), 1)]
        assert distances.min() > 15, distances
