"""Hooks of training and evaluation runs of every task."""

import math
import random
import resource
from functools import partial

import numpy as np
import torch
from mmengine.device import is_cuda_available
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner


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

    A resumed run then draws the same numbers as an uninterrupted one, in every process, without the states of
    generators in the checkpoint. The hook calls `set_epoch(seed, epoch)` of data sets that have it. For others it seeds
    the loader's worker processes when they start, which makes epochs repeatable unless `persistent_workers` keeps the
    processes alive.
    """

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the data loader and the data set's transforms."""
        loader = runner.train_dataloader
        key = runner.seed, runner.iter, runner.rank
        seed_generators(*key)
        if loader.num_workers > 0:
            loader.worker_init_fn = partial(_seed_worker, key)
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(runner.seed, runner.epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Seed the random numbers of the model."""
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
            FloatingPointError: a loss is NaN or infinite; the message gives the iteration, the epoch and all losses.
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
    """Before a run starts, compare data and model by the number of classes, and training and validation by the classes.

    For models with `num_classes` and data sets whose `metainfo` has `classes`. All checks raise ValueError.
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
                f"training and validation data have different classes, so that the same number "
                f"means different classes; only in one of them: {differing[:10]}"
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
class ThroughputHook(Hook):
    """Log images per second of all processes together, and on CPUs the peak memory in MiB (on GPUs mmengine logs it).

    The throughput is a mean over the window of the log and includes data loading.
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
