"""Settings of all tests of models."""

import pytest
import torch


@pytest.fixture(autouse=True)
def full_precision():
    """Convolutions on a GPU in float32, as the golden outputs were made, not in TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
