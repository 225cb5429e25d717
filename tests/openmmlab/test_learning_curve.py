"""The learning curve, and the logged scalars from which it is drawn."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

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
