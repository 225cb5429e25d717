"""Defines the operations, and loads the compiled libraries: kernels for CPU and CUDA, and gradients."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from ._schemas import SCHEMAS

REBUILD = "pip install --force-reinstall --no-deps ./ops"
OLDEST_TORCH = (2, 10)  # the first with all of the stable ABI that the libraries use
PACKAGE = Path(__file__).parent

library = torch.library.Library("grootvl_ops", "DEF")
for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def built() -> dict[str, Any]:
    """How the compiled libraries were built: torch, CUDA, architectures, compiler, and the errors of those that failed.

    Empty where no build left a record.
    """
    try:
        record = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):  # none, or a damaged one
        return {}
    return record if isinstance(record, dict) else {}


def library_file(part: str) -> Path | None:
    """The compiled library of a part ("cpu", "cuda" or "autograd") beside this file, or None."""
    return next((file for suffix in ("so", "pyd") for file in sorted(PACKAGE.glob(f"_C_{part}.*{suffix}"))), None)


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _missing(part: str, otherwise: str) -> str:
    """Why the build left no library of a part: the compiler's first error, if it said one."""
    errors = built().get("errors")
    return (errors.get(part) if isinstance(errors, dict) else None) or otherwise


def _load(file: Path) -> str | None:
    """Load a compiled library. Returns None, or why that was not possible."""
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        return f"the compiled library {file.name} could not be loaded ({error}); fix: `{REBUILD}`"
    return None


def _load_cpu() -> str | None:
    if tuple(int(number) for number in _release(torch.__version__).split(".")) < OLDEST_TORCH:
        return f"it needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later, torch {torch.__version__} is installed"
    file = library_file("cpu")
    if file is None:
        reason = _missing("cpu", "no C++ compiler?")
        return f"grootvl_ops was installed without its compiled library ({reason}); fix: `{REBUILD}`"
    return _load(file)


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if problems["cpu"] is not None:
        return problems["cpu"]
    file = library_file("cuda")
    if file is None:
        reason = _missing("cuda", "no nvcc?")
        return f"grootvl_ops was installed without its CUDA part ({reason}); fix: `FORCE_CUDA=1 {REBUILD}`"
    cuda = str(built().get("cuda"))
    if cuda.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"the CUDA part was built for CUDA {cuda}, torch for CUDA {torch.version.cuda}; fix: `{REBUILD}`"
    return _load(file)


def _load_autograd() -> str | None:
    if problems["cpu"] is not None:
        return problems["cpu"]
    file = library_file("autograd")
    if file is None:
        return _missing("autograd", "the build left it out")
    torch_built = str(built().get("torch"))
    if _release(torch_built) != _release(torch.__version__):
        return f"built against torch {torch_built}; it fits this release only, and gradients take the host longer"
    return _load(file)


problems: dict[str, str | None] = {}
"""Why each compiled library is not in use, in one sentence; None where it is.

"cpu" and "cuda" have the kernels. "autograd" has the gradients in C++: it uses more than PyTorch's stable ABI, so it
fits one release of PyTorch, and gradients are registered in Python where it is not in use.
"""
problems["cpu"] = _load_cpu()
problems["cuda"] = _load_cuda()
problems["autograd"] = _load_autograd()

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
    reason = problems.get(device_type) or f"the compiled library has no kernels for {device_type} tensors"
    warnings.warn(f"grootvl_ops runs its slow reference for {device_type} tensors: {reason}", stacklevel=3)
