"""A test that asks for `device` runs on each device at hand, one that asks for `ops` on both implementations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from implementations import Operations, Reference

import grootvl_ops


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="session", params=[Operations, Reference], ids=["operations", "reference"])
def ops(request: pytest.FixtureRequest) -> type[Operations] | type[Reference]:
    return request.param


@pytest.fixture
def compiled_device(device: str) -> str:
    """A device that compiled kernels serve, for what would take the reference too long or that only kernels promise."""
    if grootvl_ops.backend(device) != "compiled":
        pytest.skip(f"no compiled kernels for {device}")
    return device


@pytest.fixture
def cuda_kernels() -> str:
    if not torch.cuda.is_available() or grootvl_ops.backend("cuda") != "compiled":
        pytest.skip("no CUDA device, or no compiled kernels for it")
    return "cuda"


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, and the largest integer, so that no result can rely on memory that nobody wrote."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
