"""Parameter groups for models with a timm backbone, the published learning rate schedule, and mixed precision."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper, _ParamScheduler
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, PARAM_SCHEDULERS
from timm.models import group_parameters
from torch import nn


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate for each parameter in a backbone that `model` is or contains.

    The backbone's layers are those of its `group_matcher` (timm's convention). What comes last has factor 1: the
    backbone's own classifier if `model` is nothing but the backbone, or else all other parameters, which are not in
    the result; each layer before has `decay` times the factor of the one after it (BEiT, arXiv 2106.08254, appendix).

    Args:
        model: a timm model, or any module that contains one or several.
        decay: factor from one layer to the one before it.

    Returns:
        Factor by parameter name.

    Raises:
        ValueError: nothing in `model` has a `group_matcher`.
    """
    backbones: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{other}.") or other == "" for other in backbones)
        if callable(getattr(module, "group_matcher", None)) and not nested:
            backbones[name] = module
    if not backbones:
        raise ValueError(f"layer_decay needs a backbone with timm's group_matcher, and {type(model).__name__} has none")
    layers: dict[str, int] = {}
    depths: dict[str, int] = {}
    for prefix, module in backbones.items():
        own = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
        for name, layer in own.items():
            full_name = f"{prefix}.{name}" if prefix else name
            layers[full_name], depths[full_name] = layer, max(own.values())
    has_others = any(name not in layers for name, _ in model.named_parameters())
    return {name: decay ** (depths[name] - layer + has_others) for name, layer in layers.items()}


def names_without_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that take no weight decay.

    Those are parameters of one dimension and biases, except what a module's `also_weight_decay()` names, and what a
    module's `no_weight_decay()` (timm's convention) names.
    """
    exempt = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1 or name.endswith(".bias")}
    for method, change in (("also_weight_decay", exempt.difference_update), ("no_weight_decay", exempt.update)):
        for prefix, module in model.named_modules():
            if callable(getattr(module, method, None)):
                change(f"{prefix}.{name}" if prefix else name for name in getattr(module, method)())
    return exempt


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """The published learning rate schedules: a linear warm-up, then a cosine that began at step 0 (GrootV), or that
    begins after the warm-up (VMamba).

        lr(t) = start + (peak - start) t / warmup                                       for t < warmup
        lr(t) = floor + (peak - floor) (1 + cos(pi (t - begin) / (end - begin))) / 2    for warmup <= t < end

    With begin = 0 the rate steps from the peak down to the cosine at t = warmup, as with timm's `CosineLRScheduler`
    without `warmup_prefix`. Each parameter group has its own peak: the learning rate with which the optimizer was made.
    Start and floor are fractions of it, so that `auto_scale_lr` and layer decay scale all three alike.

    Args:
        optimizer: whose parameter groups are scheduled.
        end: steps of the cosine.
        warmup: steps of the warm-up, less than `end`.
        cosine_after_warmup: begin = warmup instead of 0, timm's `warmup_prefix`.
        start_ratio: start / peak.
        floor_ratio: floor / peak.
        by_epoch: whether a step is an epoch; with `convert_to_iter_based=True` in a config, `end` and `warmup` count
            epochs and the rate changes with each iteration.
        last_step, verbose: as of mmengine's schedulers.

    Raises:
        ValueError: `warmup` is negative or not less than `end`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | OptimWrapper,
        end: int,
        warmup: int = 0,
        cosine_after_warmup: bool = False,
        start_ratio: float = 0.0,
        floor_ratio: float = 0.0,
        by_epoch: bool = True,
        last_step: int = -1,
        verbose: bool = False,
    ) -> None:
        if not 0 <= warmup < end:
            raise ValueError(f"warmup must be at least 0 and less than end={end}, got {warmup}")
        self.warmup = warmup
        self.cosine_begin = warmup if cosine_after_warmup else 0
        self.start_ratio = start_ratio
        self.floor_ratio = floor_ratio
        super().__init__(optimizer, "lr", end=end, last_step=last_step, by_epoch=by_epoch, verbose=verbose)

    @classmethod
    def build_iter_from_epoch(
        cls, *args, end: int, epoch_length: int, warmup: int = 0, by_epoch: bool = True, **kwargs
    ) -> "WarmupCosineLR":
        """The scheduler by iterations, from `end` and `warmup` in epochs of `epoch_length` iterations."""
        return cls(*args, end=end * epoch_length, warmup=warmup * epoch_length, by_epoch=False, **kwargs)

    def _get_value(self) -> list[float]:
        step = self.last_step
        if step < self.warmup:
            ratio = self.start_ratio + (1 - self.start_ratio) * step / self.warmup
        else:
            done = (step - self.cosine_begin) / (self.end - self.cosine_begin)
            ratio = self.floor_ratio + (1 - self.floor_ratio) * (1 + math.cos(math.pi * done)) / 2
        return [peak * ratio for peak in self.base_values]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Optimizer for any model that is or contains a timm backbone: classifier, detector or segmentor.

    :func:`names_without_weight_decay` says which parameters take no weight decay. With
    `paramwise_cfg=dict(layer_decay=...)` the learning rate falls from layer to layer towards the input
    (:func:`layer_scales`), and with `paramwise_cfg=dict(backbone_lr_mult=...)` it is another for the whole backbone;
    parameters outside the backbone keep the base rate.

    Args:
        optim_wrapper_cfg: config of the wrapper, with `optimizer`.
        paramwise_cfg: `layer_decay` and `backbone_lr_mult` (floats, default 1: off).
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        unknown = paramwise_cfg.keys() - {"layer_decay", "backbone_lr_mult"}
        if unknown:
            raise ValueError(
                f"paramwise_cfg has unknown keys {sorted(unknown)}; known are layer_decay and backbone_lr_mult"
            )
        # Not empty, for otherwise mmengine puts all parameters into one group.
        paramwise_cfg.setdefault("layer_decay", 1.0)
        paramwise_cfg.setdefault("backbone_lr_mult", 1.0)
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        if self.base_lr is None:
            raise ValueError("optim_wrapper.optimizer needs an lr")

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs) -> None:
        """Append the parameter groups of `module` to `params`: one for each learning rate and weight decay."""
        decay, factor = self.paramwise_cfg["layer_decay"], self.paramwise_cfg["backbone_lr_mult"]
        scales = layer_scales(module, decay) if (decay, factor) != (1, 1) else {}
        exempt = names_without_weight_decay(module)
        groups: dict[tuple[float, float], dict] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            key = factor * scales[name] if name in scales else 1.0, 0.0 if name in exempt else self.base_wd or 0.0
            group = groups.setdefault(key, {"params": [], "lr": self.base_lr * key[0], "weight_decay": key[1]})
            group["params"].append(parameter)
        params.extend(groups.values())


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision on a CPU: bfloat16 autocast in the forward pass; no loss scaling, which bfloat16 does not need.

    It stands in for mmengine's `AmpOptimWrapper`, which needs a GPU.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and no gradient synchronisation on the way of gradient accumulation."""
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


@OPTIM_WRAPPERS.register_module()
class GPUAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's `AmpOptimWrapper`, which also logs the steps that it skips.

    Loss scaling multiplies the loss by a scale, so that small gradients do not vanish in float16. Where a gradient
    overflows, the step is skipped and the scale halved. Such steps have no gradient norm: mmengine logs NaN for them,
    and its mean over the last iterations then hides the norms of all others. Here the log has these instead:

    - `grad_norm`: of the steps that were done;
    - `skipped_steps`: number of skipped steps since the start of the run, also over interruptions;
    - `grad_scale`: the scale.

    Raises:
        FloatingPointError: in training, `max_skipped` steps in a row were skipped. By then the scale is too small for
            an overflow, so the gradients themselves are not finite, and the run would go on without learning.
    """

    max_skipped = 50

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._updated = False
        self._skipped_in_a_row = 0
        self.optimizer.register_step_post_hook(self._note_update)

    def _note_update(self, *_) -> None:
        self._updated = True

    def step(self, **kwargs) -> None:
        """Update the parameters, or skip the step, and log which."""
        scale = self.loss_scaler.get_scale()
        self._updated = False
        super().step(**kwargs)
        new_scale = self.loss_scaler.get_scale()
        # Fused optimizers are always called and skip the step themselves; the scale tells.
        skipped = not self._updated or new_scale < scale
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        total = self.message_hub.runtime_info.get("skipped_steps", 0) + skipped
        self.message_hub.update_info("skipped_steps", total)
        self.message_hub.update_scalar("train/skipped_steps", total)
        self.message_hub.update_scalar("train/grad_scale", new_scale)
        if self._skipped_in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f"mixed precision skipped {self._skipped_in_a_row} steps in a row, because gradients are not finite "
                f"even at a scale of {new_scale:g}: train in bfloat16 (optim_wrapper.dtype='bfloat16') or float32"
            )

    def _clip_grad(self) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        if not parameters:
            return
        norm = self.clip_func(parameters, **self.clip_grad_kwargs)
        if norm is not None and math.isfinite(norm):
            self.message_hub.update_scalar(f"train/{self.grad_name}", float(norm))
