"""Hooks of training and evaluation runs. Unless said otherwise they serve every task, not classification alone."""

import io
import json
import math
import random
import resource
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.device import is_cuda_available
from mmengine.dist import all_reduce
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.runner.checkpoint import weights_to_cpu

from .checkpoint import AtomicLocalBackend
from .datasets import DamagedDataError


def seed_generators(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators from the numbers in `key`."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _seed_worker(key: tuple[int, ...], worker: int) -> None:
    seed_generators(*key, worker)


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Make the random numbers of each iteration a function of the run's seed, the iteration and the process.

    So a run that resumes from a checkpoint draws the numbers that an unbroken one would have drawn, in every process,
    without any generator's state in the checkpoint. Data sets with `set_epoch(seed, epoch)` are told the epoch; for
    others the processes of the loader are seeded when they start, which makes epochs repeatable unless
    `persistent_workers` lets them go on.
    """

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed what the data loader draws, and the data set's transforms."""
        loader = runner.train_dataloader
        key = runner.seed, runner.iter, runner.rank
        seed_generators(*key)
        if loader.num_workers > 0:
            loader.worker_init_fn = partial(_seed_worker, key)
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(runner.seed, runner.epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Seed what the model draws."""
        seed_generators(runner.seed, runner.iter, runner.rank)


@HOOKS.register_module()
class InvalidLossHook(Hook):
    """Stop at the first loss that is NaN or infinite, before the next checkpoint is written."""

    priority = "VERY_HIGH"

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Check the losses of the iteration.

        Raises:
            FloatingPointError: with iteration, epoch and all losses.
        """
        losses = {
            name: float(torch.as_tensor(value).detach()) for name, value in (outputs or {}).items() if "loss" in name
        }
        if all(math.isfinite(value) for value in losses.values()):
            return
        values = ", ".join(f"{name}={value}" for name, value in losses.items())
        rates = ", ".join(f"{name}={value[0]:.3g}" for name, value in runner.optim_wrapper.get_lr().items())
        raise FloatingPointError(
            f"invalid loss at iteration {runner.iter + 1} (epoch {runner.epoch + 1}, "
            f"batch {batch_idx + 1}, process {runner.rank}): {values}; {rates}. "
            f"No checkpoint was written after it."
        )


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Compare the classes of the data with those of the model, and of training with validation, before a run starts.

    For models with `num_classes` and data sets whose `metainfo` has `classes`.
    """

    def before_train(self, runner: Runner) -> None:
        """Check training and validation data."""
        training = self._check(runner, runner.train_dataloader.dataset, "train_dataloader")
        if runner.val_loop is None:
            return
        validation = self._check(runner, runner.val_dataloader.dataset, "val_dataloader")
        if training and validation and training != validation:
            differing = sorted(set(training) ^ set(validation))
            raise ValueError(
                f"training and validation data have different classes, so that their numbers do not "
                f"agree; only in one of them: {differing[:10]}"
            )

    def before_val(self, runner: Runner) -> None:
        """Check validation data."""
        self._check(runner, runner.val_dataloader.dataset, "val_dataloader")

    def before_test(self, runner: Runner) -> None:
        """Check test data."""
        self._check(runner, runner.test_dataloader.dataset, "test_dataloader")

    @staticmethod
    def _check(runner: Runner, dataset: object, loader: str) -> tuple[str, ...] | None:
        classes = getattr(dataset, "metainfo", {}).get("classes")
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        num_classes = getattr(model, "num_classes", None)
        if classes and num_classes is not None and len(classes) != num_classes:
            raise ValueError(
                f"{loader} has {len(classes)} classes ({', '.join(map(str, classes[:5]))}, ...), "
                f"but the model has num_classes={num_classes}"
            )
        return classes


@HOOKS.register_module()
class DamagedImagesHook(Hook):
    """Hold the limit of damaged images for all processes of a distributed run together, at the end of each epoch.

    For data sets with `damaged`, a mask over their images, and `max_damaged`.
    """

    def after_train_epoch(self, runner: Runner) -> None:
        """Count over the training data."""
        self._count(runner, runner.train_dataloader.dataset)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Count over the validation data."""
        self._count(runner, runner.val_dataloader.dataset)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Count over the test data."""
        self._count(runner, runner.test_dataloader.dataset)

    @staticmethod
    def _count(runner: Runner, dataset: object) -> None:
        if not hasattr(dataset, "damaged"):
            return
        damaged = dataset.damaged.int()
        all_reduce(damaged, "max")
        count = int(damaged.sum())
        if count > dataset.max_damaged:
            raise DamagedDataError(
                f"the processes of this run met {count} different damaged images, which the log names, "
                f"and max_damaged={dataset.max_damaged} allows no more"
            )


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Log images per second of all processes together, and on CPUs the peak memory in MiB (on GPUs mmengine logs it).

    The throughput is over the window of the log, data loading included.
    """

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Update the scalars `images_per_second` and `memory`."""
        seconds = runner.message_hub.get_scalar("train/time").mean(runner.log_processor.window_size)
        images = len(data_batch["inputs"]) * runner.world_size
        runner.message_hub.update_scalar("train/images_per_second", images / seconds)
        if not is_cuda_available():
            peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            runner.message_hub.update_scalar("train/memory", peak_kib // 1024)


@HOOKS.register_module()
class LearningCurveHook(Hook):
    """Draw `learning_curve.png` into the work directory at the end of a run: training loss and validation metrics.

    The scalars are those that mmengine's `LocalVisBackend` wrote, also before an interruption.

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

    Where a run was resumed, what it logged replaces what the interrupted one had logged for the same step.
    """
    training: dict[int, dict] = {}
    validation: dict[int, dict] = {}
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
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
        work_dir: of the run.
        iterations_per_epoch: draw over epochs; None: over iterations.
        metrics: names of the validation metrics, None for all.

    Returns:
        The picture's path, or None if nothing was logged.
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


@HOOKS.register_module()
class TimmCheckpointHook(Hook):
    """For classifiers: load released and timm checkpoints, and write the trained weights as such.

    At the end of a run `timm_weights.pth` in the work directory holds the backbone's weights, the averaged ones where
    the run averages, in the form that `timm.create_model(..., pretrained_cfg_overlay=dict(file=...))` takes.
    """

    priority = "VERY_HIGH"

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Bring foreign parameter names into ours."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        checkpoint["state_dict"] = model.convert_checkpoint(checkpoint)

    def after_train(self, runner: Runner) -> None:
        """Write `timm_weights.pth`."""
        if runner.rank != 0:
            return
        averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        buffer = io.BytesIO()
        torch.save({"state_dict": weights_to_cpu((averages or [model])[0].backbone.state_dict())}, buffer)
        AtomicLocalBackend().put(buffer.getvalue(), Path(runner.work_dir, "timm_weights.pth"))
