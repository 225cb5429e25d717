"""torch.compile in runs of every task."""

import torch
from mmengine.logging import print_log
from torch import nn


def compile_backbone(model: nn.Module, options: bool | dict) -> None:
    """Compile the backbone of a classifier, detector or segmentor in place, when it is called first.

    The backbone stays the same module: its parameters keep their names, also in checkpoints, and copies of it, such as
    averaged weights, are not compiled. Losses, heads and the optimizer are not compiled either: in dense tasks they
    depend on the number of objects. By torch.compile's default, the graph for a first size of images is followed by
    graphs whose height and width are symbols; further sizes then need no compilation.

    Args:
        model: what has a `backbone`, or wraps such a model as `module`, as in augmentation at test time.
        options: True, or a dict of arguments of `torch.compile`, such as `mode` and `dynamic`.

    Raises:
        TypeError: `options` is neither.
        ValueError: the model has no backbone.
    """
    if options is not True and not isinstance(options, dict):
        raise TypeError(f"compile must be True, False or a dict of arguments of torch.compile, got {options!r}")
    owner = getattr(model, "module", model)
    if not isinstance(getattr(owner, "backbone", None), nn.Module):
        raise ValueError(f"compile: {type(owner).__name__} has no backbone")
    options = {} if options is True else options
    # Batch statistics of several processes are computed outside of graphs, as in GlooSyncBatchNorm2d.
    if not getattr(nn.SyncBatchNorm.forward, "_torchdynamo_disable", False):
        nn.SyncBatchNorm.forward = torch.compiler.disable(nn.SyncBatchNorm.forward)
    owner.backbone.compile(**options)
    shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
    print_log(f"The backbone will be compiled by torch.compile({shown}) in its first steps.", logger="current")
