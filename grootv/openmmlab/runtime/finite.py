"""Numbers that are not finite stop a run: scores while it evaluates, validation losses, and weights before it saves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn


def float_tensors(value: object) -> Iterator[Tensor]:
    """All floating-point tensors in nested dicts, sequences and mmengine's data elements."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, BaseDataElement)):
        for part in value.values():
            yield from float_tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from float_tensors(part)


def require_finite_weights(weights: Mapping[str, Tensor], model: nn.Module, what: str) -> None:
    """Raise unless the weights of a model are finite.

    A buffer may be infinite, for masks hold minus infinity, but not NaN.

    Args:
        weights: state of `model`, or of averages of it, whose names begin with "module.".
        model: tells which of the names are buffers.
        what: what cannot be done with such weights; the message begins with it.

    Raises:
        FloatingPointError: names the first such tensor and says how many there are.
    """
    buffers = {name for name, _ in model.named_buffers()}
    bad = []
    for name, value in weights.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        wrong = value.isnan() if name.removeprefix("module.") in buffers else ~value.isfinite()
        if wrong.any():
            bad.append((name, int(wrong.sum()), value.numel()))
    if bad:
        name, count, size = bad[0]
        raise FloatingPointError(
            f"{what}: {len(bad)} of {len(weights)} tensors are not finite, the first {name} "
            f"({count} of {size} values); continue from an earlier checkpoint, with a lower learning rate"
        )


def finite_metrics(metrics: Mapping[str, object]) -> dict[str, object]:
    """The metrics with None for each number that is not finite: mmengine's `save_best` passes over None."""
    return {
        name: None if isinstance(value, Real) and not math.isfinite(value) else value for name, value in metrics.items()
    }


@HOOKS.register_module()
class FiniteValuesHook(Hook):
    """Stop an evaluation at scores that are not finite, and never save weights that are not.

    Metrics hide such scores: NaN is less than every threshold, so a detector that computes nothing else finds no
    object, and NaN is the largest class of a segmentor. So the hook looks at what the model gives for each image, and
    at what the heads of a detector give before any threshold. `Runner` has this hook in every run.
    """

    priority = "LOW"  # after EMAHook, which puts averages into the checkpoint, and before the hook that saves

    def __init__(self) -> None:
        self._handles: list = []
        self._names: list[str] = []

    def before_val_epoch(self, runner: Runner) -> None:
        """Look at the scores of a validation."""
        self._watch(_module(runner))

    def before_test_epoch(self, runner: Runner) -> None:
        """Look at the scores of a test."""
        self._watch(_module(runner))

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Note the names of the images."""
        self._names = list(_image_names(data_batch, runner.val_dataloader.dataset))

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Note the names of the images."""
        self._names = list(_image_names(data_batch, runner.test_dataloader.dataset))

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Check the validation losses."""
        self._end(metrics)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Check the losses of the test."""
        self._end(metrics)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the weights, and their averages where the run computes some.

        Raises:
            FloatingPointError: they are not finite.
        """
        for part in ("state_dict", "ema_state_dict"):
            require_finite_weights(checkpoint.get(part, {}), _module(runner), f"no checkpoint was written ({part})")

    def _watch(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            in_list = last.isdigit() and name.rpartition(".")[0].endswith("_head")
            if isinstance(module, BaseModel):
                self._handles.append(module.register_forward_hook(self._check_results))
            elif (last.endswith("_head") or in_list) and not isinstance(module, nn.ModuleList):
                self._handles.append(module.register_forward_hook(self._check_head))

    def _check_results(self, module: nn.Module, inputs: tuple, outputs: object) -> None:
        if isinstance(outputs, (list, tuple)):
            self._require(any(not tensor.isfinite().all() for tensor in float_tensors(output)) for output in outputs)

    def _check_head(self, module: nn.Module, inputs: tuple, outputs: object) -> None:
        bad = torch.zeros(len(self._names), dtype=torch.bool)
        for tensor in float_tensors(outputs):
            wrong = tensor.isnan() | tensor.isposinf()  # some heads exclude classes by minus infinity
            if wrong.any():
                # The outputs for regions do not tell the image.
                bad |= wrong.flatten(1).any(1).cpu() if len(wrong) == len(bad) and wrong.dim() > 1 else True
        self._require(bad.tolist())

    def _require(self, not_finite: Iterable[bool]) -> None:
        bad = [number for number, wrong in enumerate(not_finite) if wrong]
        if not bad:
            return
        self._remove()
        raise FloatingPointError(
            f"the evaluation was stopped: the model's scores are not finite for {len(bad)} of the "
            f"{len(self._names)} images of a batch, the first {self._names[bad[0]]}"
        )

    def _end(self, metrics: dict | None) -> None:
        self._remove()
        metrics = metrics or {}
        finite = finite_metrics(metrics)
        bad = [f"{name}={value}" for name, value in metrics.items() if "loss" in name and value is not finite[name]]
        if bad:
            raise FloatingPointError(f"the losses of the evaluation are not finite: {', '.join(bad)}")

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _module(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _image_names(data_batch: object, dataset: object) -> Iterator[str]:
    """What to call the images of a batch: their paths where the batch or the data set tells them, or their numbers."""
    batch = data_batch if isinstance(data_batch, Mapping) else {}
    samples = batch.get("data_samples") or []
    if samples and isinstance(samples[0], (list, tuple)):  # test-time augmentation: the same images several times
        samples = samples[0]
    indices = torch.as_tensor(batch.get("indices", [])).tolist()
    for number in range(max(len(samples), len(indices), 1)):
        if number < len(samples) and hasattr(samples[number], "img_path"):
            yield str(samples[number].img_path)
        elif number < len(indices) and indices[number] >= 0 and hasattr(dataset, "image_name"):
            yield dataset.image_name(indices[number])
        else:
            yield f"image {number} of the batch"
