"""The demonstration of classification, with a tiny model."""

import importlib.util
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mmengine")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

import numpy as np
from PIL import Image
from training_helpers import ROOT, environment


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_to_show_are_the_wrong_ones_and_then_some_of_all_classes(demo: ModuleType) -> None:
    targets = np.repeat(np.arange(10), 30)
    scores = np.eye(10)[targets]
    scores[[17, 250]] = np.eye(10)[[3, 4]]
    shown = demo.choose_digits(scores, targets, 40)
    assert shown[:2].tolist() == [17, 250] and len(set(shown.tolist())) == 40
    assert set(targets[shown[2:]]) == set(range(10))
    assert demo.choose_digits(scores, targets, 1).tolist() == [17]
    assert len(demo.choose_digits(scores, targets, 1000)) == 300
    all_wrong = np.roll(scores, 1, axis=1)
    assert demo.choose_digits(all_wrong, targets, 400).tolist() == list(range(300))


@pytest.fixture
def run_demo(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str | None, str]]:
    """Runs the demo with one epoch of a tiny model, elsewhere; gives why it ended (None: well), and its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tiny = ("model.backbone.dims=(8,16)", "model.backbone.depths=(1,1)", "train_cfg.max_epochs=1")

    def run(*arguments: str) -> tuple[str | None, str]:
        monkeypatch.setattr(sys, "argv", ["demo.py", "--out-dir", "demo", *arguments, "--cfg-options", *tiny])
        end = None
        try:
            demo.main()
        except SystemExit as error:
            end = error.code
        return end, capfd.readouterr().out

    return run


@pytest.mark.slow
def test_the_demo_draws_its_pictures_and_judges_the_accuracy(
    run_demo: Callable[..., tuple[str | None, str]], demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    end, log = run_demo()
    assert "is below the 97 % it should reach" in end, log
    measured = [float(value) for value in re.findall(r"accuracy/top1: ([\d.]+)", log)]
    reported = float(re.search(r"accuracy on 360 held-out digits: ([\d.]+) %", log)[1])
    assert reported == pytest.approx(measured[-1], abs=0.01) and reported < 97
    predictions = pickle.loads((out / "evaluation/predictions.pkl").read_bytes())
    right = [int(prediction["scores"].argmax()) == prediction["target"] for prediction in predictions]
    assert reported == pytest.approx(100 * np.mean(right), abs=0.01)
    for path in (out / "training/learning_curve.png", out / "digits.png", out / "tree_and_affinity.png"):
        assert str(path) in log
        with Image.open(path) as image:
            assert min(image.size) > 400

    # What is finished is used again; an accuracy that suffices makes a success.
    checkpoint = out / "training/epoch_1.pth"
    written = checkpoint.stat().st_mtime_ns
    monkeypatch.setattr(demo, "evaluate", lambda *_: (97.0, predictions))
    end, log = run_demo()
    assert end is None and checkpoint.stat().st_mtime_ns == written
    assert "resumed epoch: 1" in log and "Epoch(train)" not in log


def test_a_fresh_demo_forgets_the_training(
    run_demo: Callable[..., tuple[str | None, str]], demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "demo/training/epoch_1.pth"
    left.parent.mkdir(parents=True)
    left.touch()

    def stop(step: str, *_: object) -> None:
        raise SystemExit(f"{step} {left.exists()}")

    monkeypatch.setattr(demo, "run_tool", stop)
    assert run_demo()[0] == "training True"
    assert run_demo("--fresh")[0] == "training False"


def test_a_failing_step_ends_the_demo(
    run_demo: Callable[..., tuple[str | None, str]], demo: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"demo: evaluation failed with exit code 2(.|\n)*make_digits.py --unknown"):
        demo.run_tool("evaluation", "make_digits.py", "--unknown")
    (tmp_path / "demo/digits").mkdir(parents=True)
    (tmp_path / "demo/digits/notes.txt").touch()
    assert "does not hold the digits" in run_demo()[0]
