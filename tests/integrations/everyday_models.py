"""The models of these tests: those of this package, and two models of timm that show what is usual, all small."""

import pytest
import timm
import torch
from torch import Tensor, nn

import grootv  # noqa: F401 (registers the models)

SIZES = {
    "grootv_nano": {"dims": (16, 32, 48, 64), "depths": (1, 2, 1, 1)},
    "vmamba_nano": {"dims": (16, 32, 48, 64), "depths": (1, 2, 1, 1)},
    "convnext_tiny": {"dims": (16, 32, 48, 64), "depths": (1, 2, 1, 1)},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4),
        "drop_path_rate": 0.0,
    },
}  # fmt: skip

each_model = pytest.mark.parametrize("name", SIZES)


def make(name: str, device: str = "cpu", **kwargs) -> nn.Module:
    """A model in evaluation mode, with random weights of a size that lets every layer change the outputs."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SIZES[name], "num_classes": 5, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().to(device)


def images(number: int = 2, device: str | torch.device = "cpu") -> Tensor:
    return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(device)
