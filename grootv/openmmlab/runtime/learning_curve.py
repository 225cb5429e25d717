"""The learning curve of a run of any task, drawn from the scalars that mmengine logged."""

import json
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner


@HOOKS.register_module()
class LearningCurveHook(Hook):
    """Draw `learning_curve.png` into the work directory at the end of a run: training loss and validation metrics.

    It reads the scalars that mmengine's `LocalVisBackend` wrote, including those from before an interruption.

    Args:
        metrics: names of the validation metrics to draw, None for all.
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


def draw_learning_curve(
    work_dir: str | Path, iterations_per_epoch: int | None = None, metrics: list[str] | None = None
) -> Path | None:
    """Draw `learning_curve.png` from the scalars in `work_dir`; see :class:`LearningCurveHook`.

    Args:
        work_dir: work directory of the run.
        iterations_per_epoch: if given, the axis shows epochs; otherwise iterations.
        metrics: names of the validation metrics, None for all.

    Returns:
        Path of the picture, or None if no scalars were logged.
    """
    from matplotlib.figure import Figure

    training, validation = read_scalars(work_dir)
    if not training:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    loss_axes = figure.add_subplot()
    iterations = sorted(training)
    loss_axes.plot(
        [step / (iterations_per_epoch or 1) for step in iterations],
        [training[step]["loss"] for step in iterations],
        color="tab:gray",
        label="training loss",
    )
    loss_axes.set(xlabel="epoch" if iterations_per_epoch else "iteration", ylabel="training loss")
    loss_axes.grid(alpha=0.3)
    lines = list(loss_axes.lines)
    names = metrics or sorted(
        {name for entry in validation.values() for name, value in entry.items() if isinstance(value, int | float)}
        - {"step", "time", "data_time"}
    )
    if validation and names:
        metric_axes = loss_axes.twinx()
        metric_axes.set_ylabel("validation")
        for number, name in enumerate(names):
            points = [(step, entry[name]) for step, entry in sorted(validation.items()) if name in entry]
            if points:
                lines += metric_axes.plot(
                    *zip(*points, strict=True),
                    color=f"C{number}",
                    marker=".",
                    label=f"{name} (last {points[-1][1]:.4g})",
                )
    loss_axes.legend(handles=lines, loc="center right")
    path = Path(work_dir, "learning_curve.png")
    figure.savefig(path, dpi=120)
    return path
