"""Checkpoints of GrootV and VMamba: official parameter names, wrappers and prefixes of files, and whether a file fits.

Loading through timm, the OpenMMLab backbone and the classifier of training runs all read files through these functions.
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "backbone_weights",
    "belongs_to",
    "checkpoint_filter_fn",
    "find_prefixes",
    "find_wrapper",
    "fit_axes",
    "official_to_own",
    "unwrap",
]

_logger = logging.getLogger(__name__)

# The keys of a file that hold weights, best first: averaged weights come before the last ones. timm has the same order.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# The first parameter by its own and by its official names. What stands before it is the prefix of a file's names.
_FIRST_PARAMETERS = ("stem.conv1.weight", "patch_embed.conv1.weight", "patch_embed.0.weight")
_HEADS = ("head.", "conv_head.", "classifier.")
# timm adapts these to another number of input channels and of classes.
_ADAPTED = ("stem.conv1.weight", "head.fc.weight", "head.fc.bias")

# Official parameter names and ours, in the order of replacement. The names of the two families do not overlap.
_OFFICIAL_NAMES = (
    # VMamba
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"^layers\.(\d+\.blocks\.\d+)\.norm\.", r"stages.\1.norm1."),
    (r"^layers\.", "stages."),
    (r"\.op\.dt_projs_(weight|bias)$", r".mixer.dt_\1"),
    (r"\.op\.", ".mixer."),
    (r"^classifier\.norm\.", "head.norm."),
    (r"^classifier\.head\.", "head.fc."),
    # GrootV, and what both have
    (r"^patch_embed\.(conv|norm)(\d)\.(1\.)?", r"stem.\1\2."),
    (r"^levels\.", "stages."),
    (r"\.TreeSSM\.", ".mixer."),
    (r"\.mixer\.conv2d\.", ".mixer.conv."),
    (r"\.mixer\.x_proj_weight$", ".mixer.x_proj.weight"),
    (r"\.mixer\.dt_projs_(weight|bias)$", r".mixer.dt_proj.\1"),
    (r"\.mixer\.A_logs$", ".mixer.A_log"),
    (r"\.mixer\.Ds$", ".mixer.D_skip"),
    (r"\.(norm\d?)\.[01]\.(weight|bias)$", r".\1.\2"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^conv_head\.0\.", "head.conv."),
    (r"^conv_head\.1\.0\.", "head.norm."),
)


def official_to_own(name: str) -> str:
    """This project's name of the parameter that the published code calls `name`; names of this project stay."""
    # The official code counts a downsampler to the stage before it, timm to the stage that it begins.
    name = re.sub(r"^(?:levels|layers)\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", name)
    for pattern, replacement in _OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def unwrap(content: dict[str, Any]) -> dict[str, Any]:
    """The state dict in what a file holds: `content[find_wrapper(content)]`, or `content` itself."""
    wrapper = find_wrapper(content)
    return content if wrapper is None else content[wrapper]


def find_wrapper(content: dict[str, Any]) -> str | None:
    """The key under which a file holds the weights to load: the first of "state_dict_ema", "model_ema", "state_dict"
    and "model" that is there; None if `content` is a state dict itself."""
    return next((wrapper for wrapper in _WRAPPERS if isinstance(content.get(wrapper), dict)), None)


def find_prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the names of each backbone among `names`, such as "module." or "backbone."."""
    return [
        name.removesuffix(first) for name in names for first in _FIRST_PARAMETERS if f".{name}".endswith(f".{first}")
    ]


def backbone_weights(content: dict[str, Any], prefix: str | None = None) -> dict[str, Tensor]:
    """The weights of the one backbone, or whole model, in what a file holds, by names without a prefix.

    Args:
        content: What the file holds, see `unwrap`.
        prefix: What stands before the backbone's names; None finds it.

    Raises:
        ValueError: no GrootV or VMamba weights, or several backbones and no `prefix` to choose by.
    """
    weights = {name: value for name, value in unwrap(content).items() if isinstance(value, Tensor)}
    if prefix is None:
        prefixes = find_prefixes(weights)
        if not prefixes:
            raise ValueError(
                f"no GrootV or VMamba weights: no name ends with {' or '.join(_FIRST_PARAMETERS)}; "
                f"it begins with {', '.join(list(weights)[:3]) or 'nothing'}"
            )
        if len(prefixes) > 1:
            raise ValueError(f"several backbones; prefix must be one of {prefixes}")
        prefix = prefixes[0]
    elif not any(prefix + first in weights for first in _FIRST_PARAMETERS):
        raise ValueError(f"no GrootV or VMamba weights under the prefix {prefix!r}")
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def belongs_to(name: str, num_stages: int) -> bool:
    """Whether a parameter, by its own or its official name, is of the stem or the first `num_stages` stages."""
    if name.startswith(_HEADS):
        return False
    stage = re.match(r"stages\.(\d+)\.", official_to_own(name))
    return stage is None or int(stage[1]) < num_stages


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a checkpoint into the form that `model.load_state_dict` takes, and check that it fits.

    Official parameter names become this project's. The weights may stand under a key of `unwrap`, and their names may
    have a prefix, such as those of DistributedDataParallel, torch.compile or a detector. A checkpoint of a backbone
    alone, without any head, leaves the model the head it has. So it is with the norms that dense tasks add to VMamba's
    features, `outnorm0` to `outnorm3`; those that the model does not have are left in the file.

    Args:
        state_dict: What the file holds.
        model: The model to load it into, a `GrootV` or `VMamba`.

    Returns:
        Parameters and buffers by this project's names. The first convolution and the classifier may still have the
        number of input channels and classes of the file: timm adapts them.

    Raises:
        RuntimeError: no weights of these families, those of several backbones, names that are missing or unexpected, or
            shapes that differ.
    """
    try:
        weights = backbone_weights(state_dict)
    except ValueError as error:
        raise RuntimeError(f"the checkpoint does not fit the model: {error}") from error
    state_dict = {official_to_own(name): value for name, value in weights.items()}
    expected = model.state_dict()
    for part in ("head", "outnorm"):
        own = {name: value for name, value in expected.items() if name.startswith(part)}
        if own and not any(name.startswith(part) for name in state_dict):
            _logger.warning(f"The checkpoint has no {part}: the model keeps its own.")
            state_dict |= own
    state_dict = {
        name: fit_axes(name, value, expected[name].shape) if name in expected else value
        for name, value in state_dict.items()
        if name in expected or not name.startswith("outnorm")
    }
    _check_fit(state_dict, expected)
    return state_dict


def fit_axes(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A parameter in the `shape` that it has in this project, if it differs in its axes alone, or else as it is.

    The official code has axes of length one, for directions, states, and linear layers that are 1x1 convolutions. With
    four directions it joins the axes of direction and channel in A_log and D_skip, and separates that of direction in
    x_proj, where this project does the opposite.
    """
    joined = name.endswith((".A_log", ".D_skip", ".x_proj.weight")) and value.numel() == shape.numel()
    longer = [size for size in value.shape if size != 1] == [size for size in shape if size != 1]
    return value.reshape(shape) if joined or longer else value


def _check_fit(state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise unless only the classifier and the number of input channels differ: even where timm loads leniently."""
    missing = [name for name in expected if name not in state_dict and name not in _ADAPTED]
    unexpected = [name for name in state_dict if name not in expected and name not in _ADAPTED]
    misshaped = [
        f"{name} {list(value.shape)} instead of {list(expected[name].shape)}"
        for name, value in state_dict.items()
        if name in expected and name not in _ADAPTED and value.shape != expected[name].shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
    if any(names for _, names in problems):
        found = "; ".join(f"{len(names)} {kind}: {_enumerate(names)}" for kind, names in problems if names)
        raise RuntimeError(f"the checkpoint does not fit the model: {found}")


def _enumerate(names: list[str], limit: int = 20) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
