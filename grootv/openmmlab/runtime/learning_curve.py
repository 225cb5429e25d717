"""The learning curve of a run of any task, drawn from the scalars that mmengine logged."""

import json
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

# What a reader of a curve looks for, most important first, with its name in the legend.
METRICS = {
    "accuracy/top1": "top-1 accuracy, %",
    "accuracy/top5": "top-5 accuracy, %",
    "coco/bbox_mAP": "box AP",
    "coco/segm_mAP": "mask AP",
    "coco/bbox_mAP_50": "box AP50",
    "mIoU": "mIoU, %",
    "mIoU_objects": "mIoU of objects, %",
    "aAcc": "pixel accuracy, %",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # of Okabe and Ito, for colour-blind people, too


@HOOKS.register_module()
class LearningCurveHook(Hook):
    """Draw `learning_curve.png` into the work directory at the end of a run: training loss and validation metrics.

    It reads the scalars that mmengine's `LocalVisBackend` wrote, including those from before an interruption.

    Args:
        metrics: names of the validation metrics to draw, None for the first three of `METRICS` that were logged, or
            without any of these for all.
    """

    priority = "VERY_LOW"

    def __init__(self, metrics: list[str] | None = None) -> None:
        self.metrics = metrics

    def after_train(self, runner: Runner) -> None:
        """Draw the curve."""
        if runner.rank == 0:
            by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
            draw_learning_curve(runner.work_dir, len(runner.train_dataloader) if by_epoch else None, self.metrics)


def read_scalars(work_dir: str | Path) -> tuple[dict[int, dict], dict[int, dict]]:
    """Scalars that the runs in `work_dir` logged: of training by iteration, of validation by step (epoch or iteration).

    If an interrupted run and the resumed one both logged a step, the entry of the resumed run counts.
    """
    training: dict[int, dict] = {}
    validation: dict[int, dict] = {}
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # a killed run can leave half a line
                continue
            if "loss" in entry:
                training[entry["iter"]] = entry
            else:
                validation[entry["step"]] = entry
    return training, validation


def _curve(validation: dict[int, dict], name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric, without COCO's -1 for "no such objects"."""
    return [(step, entry[name]) for step, entry in sorted(validation.items()) if entry.get(name, -1) != -1]


def _metrics_to_draw(validation: dict[int, dict]) -> list[str]:
    logged = {name for entry in validation.values() for name, value in entry.items() if isinstance(value, int | float)}
    known = [name for name in METRICS if name in logged and _curve(validation, name)]
    return known[:3] or sorted(logged - {"step", "time", "data_time"})


def draw_learning_curve(
    work_dir: str | Path, iterations_per_epoch: int | None = None, metrics: list[str] | None = None
) -> Path | None:
    """Draw `learning_curve.png` from the scalars in `work_dir`; see :class:`LearningCurveHook`.

    Args:
        work_dir: work directory of the run.
        iterations_per_epoch: if given, the axis shows epochs; otherwise iterations.
        metrics: names of the validation metrics, see :class:`LearningCurveHook`. Values of -1 are left out: COCO's mark
            for "no such objects".

    Returns:
        Path of the picture, or None if no scalars were logged.
    """
    from matplotlib.figure import Figure

    training, validation = read_scalars(work_dir)
    if not training:
        return None
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    loss_axes = figure.add_subplot()
    iterations = sorted(training)
    loss_axes.plot(
        [step / (iterations_per_epoch or 1) for step in iterations],
        [training[step]["loss"] for step in iterations],
        color="#777777",
        linewidth=1,
        label="training loss",
    )
    loss_axes.set(
        xlabel="epoch" if iterations_per_epoch else "iteration", ylabel="training loss", title="Learning curve"
    )
    loss_axes.grid(alpha=0.3)
    lines = list(loss_axes.lines)
    curves = {name: _curve(validation, name) for name in metrics or _metrics_to_draw(validation)}
    curves = {name: points for name, points in curves.items() if points}
    if curves:
        metric_axes = loss_axes.twinx()
        metric_axes.set_ylabel("validation")
        for number, (name, points) in enumerate(curves.items()):
            lines += metric_axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[number % len(COLOURS)],
                marker="os^Dv"[number % 5],
                label=f"{METRICS.get(name, name)} (last {points[-1][1]:.4g})",
            )
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False)
    path = Path(work_dir, "learning_curve.png")
    figure.savefig(path, dpi=120)
    return path
