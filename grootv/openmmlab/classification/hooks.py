"""Hooks that only classification needs."""

import io
from pathlib import Path

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import weights_to_cpu

from grootv.models.checkpoint import find_wrapper

from ..runtime.checkpoints import AtomicLocalBackend
from ..runtime.finite import require_finite_weights
from .datasets import DamagedDataError


@HOOKS.register_module()
class DamagedImagesHook(Hook):
    """Apply the limit of damaged images to all processes of a distributed run together, at the end of each epoch.

    For data sets with `damaged`, a mask over their images, and `max_damaged`. Too many raise DamagedDataError.
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
                f"the processes of this run found {count} different damaged images, which the log names, "
                f"and max_damaged={dataset.max_damaged} allows no more"
            )


@HOOKS.register_module()
class TimmCheckpointHook(Hook):
    """Load released and timm checkpoints into a classifier, and write the trained weights in timm's form.

    At the end of a run `timm_weights.pth` in the work directory contains the backbone's weights, or their averages if
    the run computes averages. `timm.create_model(..., pretrained_cfg_overlay=dict(file=...))` loads it.
    """

    priority = "VERY_HIGH"

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Convert the parameter names of a released or timm checkpoint to the classifier's."""
        runner.logger.info(f"Loading the weights under {find_wrapper(checkpoint)!r}.")
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        checkpoint["state_dict"] = model.convert_checkpoint(checkpoint)

    def after_train(self, runner: Runner) -> None:
        """Write `timm_weights.pth`.

        Raises:
            FloatingPointError: the weights are not finite; an earlier file remains as it was.
        """
        if runner.rank != 0:
            return
        averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        backbone = (averages or [model])[0].backbone
        weights = weights_to_cpu(backbone.state_dict())
        require_finite_weights(weights, backbone, "timm_weights.pth was not written")
        buffer = io.BytesIO()
        torch.save({"state_dict": weights}, buffer)
        AtomicLocalBackend().put(buffer.getvalue(), Path(runner.work_dir, "timm_weights.pth"))
