"""The comparison of the scans: equal sizes, what augmentation keeps, and runs that continue and end in a report."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


@pytest.fixture
def tool(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare_scans

    return compare_scans


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file as of `make_emoji`: two classes, the colours red and blue."""
    encoded = []
    for number in range(12):
        out = io.BytesIO()
        Image.new("RGB", (128, 128), ("red", "blue")[number % 2]).save(out, "WEBP", lossless=True)
        encoded.append(out.getvalue())
    np.savez(
        tmp_path / "emoji.npz",
        images=np.frombuffer(b"".join(encoded), np.uint8),
        ends=np.cumsum([len(image) for image in encoded]),
        labels=np.arange(12) % 2,
        subjects=np.array([f"subject {number}" for number in range(12)]),
        artists=np.array(["somebody"] * 12),
        splits=np.array(["train"] * 6 + ["subjects"] * 2 + ["artist"] * 4),
        classes=np.array(["red", "blue"]),
    )
    return tmp_path / "emoji.npz"


def test_all_rows_have_about_the_same_number_of_parameters(tool):
    sizes = {row: sum(p.numel() for p in tool.make(row, 68).parameters()) for row in tool.ROWS}
    scans = {row for row, options in tool.ROWS.items() if options["model_name"] == "grootv_nano" and row != "SS2D"}
    assert len(scans) == 9 and {sizes[row] for row in scans} == {sizes["tree"]}
    assert all(0.88 < size / sizes["tree"] < 1.12 for size in sizes.values())


def test_augmentation_keeps_grey_grey_and_follows_its_seed(tool):
    grey = torch.full((4, 3, 16, 16), 200, dtype=torch.uint8)
    result = tool.augmented(grey, torch.Generator().manual_seed(0))
    assert result.std((1, 2, 3)).max() < 1e-5 and result[:, 0, 0, 0].std() > 0.05
    noise = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    first, again = (tool.augmented(noise, torch.Generator().manual_seed(1)) for _ in range(2))
    other = tool.augmented(noise, torch.Generator().manual_seed(2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    left = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    left[..., :8] = 255
    half = tool.augmented(left, torch.Generator().manual_seed(0))
    mirrored = half[..., :4].mean((1, 2, 3)) < half[..., -4:].mean((1, 2, 3))
    assert 16 < mirrored.sum() < 48


@pytest.mark.parametrize(
    ("values", "found"),
    [((1.0, 1.2, 0.8), "shows"), ((-1.0, -1.2, -0.8), "reversed"), ((1.0, -0.4, 0.5), "inside the noise")],
)
def test_the_verdict_is_that_of_an_interval_over_the_seeds(tool, values, found):
    """The half width of the 95 % interval of three seeds is 4.30 standard errors: 0.50 and 1.77 here."""
    rows = {"tree": [{"seed": i, "artist": 50 + v} for i, v in enumerate(values)]}
    rows["cross"] = [{"seed": i, "artist": 50.0} for i in reversed(range(3))]
    assert tool.verdict(rows, "tree", "cross", "artist").endswith(found)


def test_runs_continue_and_end_in_a_report(tool, data, tmp_path, monkeypatch):
    page = tmp_path / "scans.md"
    page.write_text("Before.\n\n<!-- measured -->\n\nOld.\n\n<!-- end of measured -->\n\nAfter.\n")
    monkeypatch.setattr(tool, "PAGE", page)
    monkeypatch.setattr(tool, "PICTURES", tmp_path)
    monkeypatch.setattr(sys.modules[tool.publish.__module__], "RESULTS", tmp_path / "results")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["compare_scans.py", *arguments, "--work-dir", str(tmp_path / "runs")])
        tool.main()

    rows = ("--rows", "tree", "cross", "--batch", "4")
    run("train", str(data), "--seeds", "1", "--steps", "2", *rows)
    before = (tmp_path / "runs" / "tree-0.json").stat().st_mtime_ns
    run("train", str(data), "--seeds", "2", "--steps", "2", *rows)
    assert (tmp_path / "runs" / "tree-0.json").stat().st_mtime_ns == before
    run("speed", *rows)
    run("report")
    runs = json.loads((tmp_path / "results" / "scans-cpu.json").read_text())["runs"]
    assert {(run["row"], run["seed"]) for run in runs} == {(row, seed) for row in ("tree", "cross") for seed in (0, 1)}
    weights = torch.load(tmp_path / "runs" / "cross.pth")
    tool.make("cross", 2).load_state_dict({name: value.float() for name, value in weights.items()})
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "Old." not in text
    assert "| cross | " in text and "tree − cross" in text and "images/scans.png" in text
