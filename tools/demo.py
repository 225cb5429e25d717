#!/usr/bin/env python
"""Train a small GrootV on handwritten digits, test it on held-out ones, and draw its predictions and a tree.

It calls the ordinary tools with configs/classification/grootv-nano_digits.py, on data from scikit-learn. It continues
an interrupted run and reuses a finished one, unless --fresh is given.
"""

import argparse
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS
from sklearn.datasets import load_sample_image

import grootv.openmmlab  # noqa: F401  registers the data sets
from grootv.openmmlab.runtime.checkpoints import find_intact_checkpoint
from grootv.sample_data import export_digits
from grootv.visualization import plot_predictions, plot_tree_and_affinity

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/classification/grootv-nano_digits.py"
PHOTO, CREDIT = "china.jpg", "Photograph: danielbuechele, CC BY 2.0, from scikit-learn."
SKY = (25, 60)  # row and column of a pixel beside the tower, on the 64 x 96 grid
SHOWN_DIGITS = 60


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, default=ROOT / "work_dirs/demo", help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier training and train again")
    parser.add_argument(
        "--min-accuracy",
        type=float,
        default=97.0,
        metavar="PERCENT",
        help="exit with an error if the accuracy is lower; default: %(default)s",
    )
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="replace entries of the config"
    )
    return parser.parse_args()


def run_tool(step: str, tool: str, *arguments: object, threads: int | None = 1) -> None:
    """Run `tools/<tool>` of this checkout with this interpreter and show its output.

    Args:
        step: what the tool does here, for messages.
        tool: name of the file.
        arguments: of its command line.
        threads: that compute. One leaves the other core of a small machine to the process that loads the images; None
            leaves the choice to PyTorch.

    Raises:
        SystemExit: the tool failed.
    """
    print(f"demo: {step}", flush=True)
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    code = subprocess.run(command, env=environment).returncode
    if code != 0:
        raise SystemExit(
            f"demo: {step} failed with exit code {code}, see the output above. --fresh starts from the beginning. "
            f"The command was\n{shlex.join(command)}"
        )


def train(work_dir: Path, options: list[str]) -> Path:
    """Train, or continue an earlier training, and return the last checkpoint."""
    run_tool("training", "train.py", CONFIG, "--work-dir", work_dir, "--resume", "--cfg-options", *options)
    checkpoint = find_intact_checkpoint(work_dir)
    if checkpoint is None:
        raise SystemExit(f"demo: training wrote no checkpoint to {work_dir}")
    return Path(checkpoint)


def evaluate(checkpoint: Path, work_dir: Path, options: list[str]) -> tuple[float, list[dict]]:
    """Top-1 accuracy in percent as `tools/test.py` measures it on the held-out digits, and the predictions."""
    shutil.rmtree(work_dir, ignore_errors=True)
    out = work_dir / "predictions.pkl"
    arguments = ("--work-dir", work_dir, "--out", out, "--cfg-options", *options)
    run_tool("evaluation", "test.py", CONFIG, checkpoint, *arguments)
    (metrics,) = work_dir.glob("*/*.json")
    return json.loads(metrics.read_text())["accuracy/top1"], pickle.loads(out.read_bytes())


def choose_digits(scores: np.ndarray, targets: np.ndarray, count: int) -> np.ndarray:
    """Numbers of at most `count` predictions (N, C) to show: wrong ones first, then right ones of all classes."""
    wrong = scores.argmax(1) != targets
    right = np.flatnonzero(~wrong)
    shown = np.flatnonzero(wrong)[:count]
    room = min(count - len(shown), len(right))
    return np.concatenate([shown, right[np.linspace(0, len(right) - 1, room).astype(int)]])


def draw_digits(predictions: list[dict], data: Path, accuracy: float, path: Path) -> None:
    """Draw held-out digits with their predictions, as the model saw them."""
    dataset = DATASETS.build({**Config.fromfile(CONFIG).test_dataloader.dataset, "root": str(data)})
    scores = np.stack([np.asarray(prediction["scores"]) for prediction in predictions])
    targets = np.array([prediction["target"] for prediction in predictions])
    shown = choose_digits(scores, targets, SHOWN_DIGITS)
    images = np.stack([np.asarray(dataset[predictions[number]["index"]]["inputs"]) for number in shown])
    wrong = int((scores.argmax(1) != targets).sum())
    figure = plot_predictions(
        images.transpose(0, 2, 3, 1),
        scores[shown],
        targets[shown],
        dataset.metainfo["classes"],
        columns=12,
        title=f"{len(shown)} of {len(targets)} held-out digits, {accuracy:.1f} % right; "
        f"the wrong ones first ({min(wrong, len(shown))} of {wrong})",
    )
    figure.savefig(path, dpi=110)


def draw_photograph(path: Path) -> None:
    """Draw the tree of a photograph, and the affinities of two scans from a pixel of its sky."""
    plot_tree_and_affinity(load_sample_image(PHOTO), SKY, credit=CREDIT).savefig(path, dpi=100)


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    out_dir = args.out_dir.resolve()
    data, training, evaluation = (out_dir / name for name in ("digits", "training", "evaluation"))
    if args.fresh:
        shutil.rmtree(training, ignore_errors=True)
    try:
        export_digits(data)
    except FileExistsError as error:
        raise SystemExit(f"demo: {error}") from error
    roots = [f"{loader}_dataloader.dataset.root={data}" for loader in ("train", "val", "test")]
    options = [*roots, *args.cfg_options]
    checkpoint = train(training, options)
    accuracy, predictions = evaluate(checkpoint, evaluation, options)
    pictures = {
        "learning curve": training / "learning_curve.png",
        "held-out digits with predictions": out_dir / "digits.png",
        "tree of a photograph, and affinities": out_dir / "tree_and_affinity.png",
    }
    draw_digits(predictions, data, accuracy, pictures["held-out digits with predictions"])
    draw_photograph(pictures["tree of a photograph, and affinities"])

    files = {"data": data, "checkpoint": checkpoint, "weights for timm": training / "timm_weights.pth", **pictures}
    missing = [str(path) for path in files.values() if not path.exists()]
    if missing:
        raise SystemExit(f"demo: these files were not written: {', '.join(missing)}")
    print(f"\nGrootV-Nano on handwritten digits, {time.perf_counter() - start:.0f} s in all")
    print(f"accuracy on {len(predictions)} held-out digits: {accuracy:.2f} %")
    for name, path in files.items():
        print(f"{name + ':':38}{path}")
    if accuracy < args.min_accuracy:
        raise SystemExit(f"demo: the accuracy of {accuracy:.2f} % is below the {args.min_accuracy:g} % it should reach")


if __name__ == "__main__":
    main()
