"""The learning curve, and the logged scalars from which it is drawn."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

from matplotlib.figure import Figure
from PIL import Image

from grootv.openmmlab.runtime.learning_curve import draw_learning_curve, read_scalars


def test_learning_curve_joins_the_runs_of_a_work_dir(tmp_path: Path) -> None:
    first = [{"lr": 1, "loss": 2.0, "iter": 1, "step": 1}, {"lr": 1, "loss": 1.5, "iter": 2, "step": 2}]
    second = [{"lr": 1, "loss": 1.4, "iter": 2, "step": 2}, {"accuracy/top1": 50.0, "time": 1.0, "step": 1}]
    for name, entries in (("20260101_000000", first), ("20260101_000001", second)):
        folder = tmp_path / name / "vis_data"
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text("\n".join(map(json.dumps, entries)) + '\n{"loss": 1')
    training, validation = read_scalars(tmp_path)
    assert [training[step]["loss"] for step in sorted(training)] == [2.0, 1.4]
    assert validation[1]["accuracy/top1"] == 50.0
    with Image.open(draw_learning_curve(tmp_path, iterations_per_epoch=2)) as picture:
        assert picture.width > 400


def drawn_figure(monkeypatch: pytest.MonkeyPatch, folder: Path, entries: list[dict], **kwargs: object) -> Figure:
    """The figure that is saved for a run that logged `entries`."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    (folder / "run" / "vis_data").mkdir(parents=True)
    (folder / "run" / "vis_data" / "scalars.json").write_text("\n".join(map(json.dumps, entries)))
    draw_learning_curve(folder, **kwargs)
    return figures[0]


def test_detection_draws_what_matters_without_the_mark_for_no_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {f"coco/{kind}_mAP_{size}": -1.0 for kind in ("bbox", "segm") for size in ("s", "m", "l")}
    values = {
        "coco/bbox_mAP": 0.3,
        "coco/segm_mAP": 0.25,
        "coco/bbox_mAP_50": 0.5,
        "coco/segm_mAP_50": 0.4,
        "time": 9.0,
    }
    entries = [{"loss": 2.0 / i, "iter": i, "step": i} for i in range(1, 5)]
    entries += [{**sizes, **values, "coco/segm_mAP": -1.0, "step": 2}, {**sizes, **values, "step": 4}]
    figure = drawn_figure(monkeypatch, tmp_path, entries)
    loss_axes, metric_axes = figure.axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in metric_axes.lines}
    assert curves == {
        "box AP (last 0.3)": [[2, 0.3], [4, 0.3]],
        "mask AP (last 0.25)": [[4, 0.25]],
        "box AP50 (last 0.5)": [[2, 0.5], [4, 0.5]],
    }
    assert loss_axes.get_xlabel() == "iteration" and loss_axes.get_ylabel() == "training loss"


def test_the_legend_is_beside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"loss": 1.0, "iter": 1, "step": 1}, {"accuracy/top1": 50.0, "accuracy/top5": 90.0, "step": 1}]
    figure = drawn_figure(monkeypatch, tmp_path, entries)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_metrics_that_nobody_knows_are_all_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"loss": 1.0, "iter": 1, "step": 1}, {"recall": 0.5, "precision": 0.25, "time": 1.0, "step": 1}]
    figure = drawn_figure(monkeypatch, tmp_path, entries)
    labels = [line.get_label() for line in figure.axes[1].lines]
    assert labels == ["precision (last 0.25)", "recall (last 0.5)"]
