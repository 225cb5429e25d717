"""Defines the operations, and loads the compiled library with their kernels and gradients."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

from ._schemas import SCHEMAS

REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation ./ops"
PACKAGE = Path(__file__).parent

library = torch.library.Library("grootvl_ops", "DEF")
for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def built() -> dict[str, str | bool | None]:
    """What the compiled library was built with (torch, CUDA, architectures, compiler); empty where there is none."""
    try:
        record = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):  # none, or a damaged one
        return {}
    return record if isinstance(record, dict) and library_file() else {}


def library_file() -> Path | None:
    """The compiled library beside this file, or None."""
    return next((file for pattern in ("_C*.so", "_C*.pyd") for file in sorted(PACKAGE.glob(pattern))), None)


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _load() -> str | None:
    """Load the compiled library. Returns None, or in one sentence why there is none and how to fix that."""
    file = library_file()
    if file is None:
        return f"grootvl_ops was installed without its compiled library (no C++ compiler?); fix: `{REBUILD}`"
    torch_built = built().get("torch", "an unknown version")
    if _release(torch_built) != _release(torch.__version__):
        return (
            f"the compiled library {file.name} was built against torch {torch_built}, but torch {torch.__version__} is "
            f"installed; fix: `{REBUILD}`"
        )
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"the compiled library {file.name} could not be loaded ({error}); fix: `{REBUILD}`"
    return None


problem = _load()
"""Why the compiled library is not in use, in one sentence; None where it is."""

_warned: set[str] = set()


def has_kernels(device_type: str) -> bool:
    """Whether the compiled library has kernels for tensors on this type of device ("cpu", "cuda", ...)."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("grootvl_ops::tree_scan", key)


def backend(device: str | torch.device = "cpu") -> str:
    """What runs operations on `device`: "compiled" (the compiled library) or "reference" (plain PyTorch)."""
    return "compiled" if has_kernels(torch.device(device).type) else "reference"


def warn_reference(device_type: str) -> None:
    """Warn once for each type of device that the slow reference runs there."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    reason = problem or f"the compiled library has no kernels for {device_type} tensors (built for: {built()})"
    warnings.warn(f"grootvl_ops runs its slow reference for {device_type} tensors: {reason}", stacklevel=3)
