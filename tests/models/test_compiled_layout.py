"""Compiled training leaves channels-last maps in their order."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_fw_bw_and_get_code

import grootv  # noqa: F401  registers the models

BUFFER = re.compile(r"empty_strided_\w+\(\((\d+), (\d+), (\d+), (\d+)\), \((\d+), (\d+), (\d+), (\d+)\)")


def wrong_buffers(code: str) -> list[str]:
    """Buffers (B, H, W, C) of square maps whose rows come last, as if they were (B, C, H, W)."""
    return [
        match[0]
        for match in BUFFER.finditer(code)
        if match[2] == match[3] != match[4] and match[6] == "1" and match[3] != "1"
    ]


def test_the_pattern_finds_a_map_in_the_wrong_order() -> None:
    assert wrong_buffers("empty_strided_cuda((2, 16, 16, 80), (20480, 1, 1280, 16), torch.float32)")
    assert not wrong_buffers("empty_strided_cuda((2, 16, 16, 80), (20480, 1280, 80, 1), torch.float32)")
    assert not wrong_buffers("empty_strided_cuda((2, 80, 16, 16), (20480, 1, 1280, 80), torch.float32)")


@pytest.mark.parametrize("name", ["grootv_tiny", "vmamba_tiny_s1l8"])
def test_no_map_is_copied_to_another_order(name: str) -> None:
    torch.compiler.reset()
    model = timm.create_model(name, depths=(1, 1, 1, 1)).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(compiled(images), torch.zeros(2, dtype=torch.long))

    _, codes = run_fw_bw_and_get_code(loss)
    assert len(codes) == 2  # forward and backward
    assert [wrong_buffers(code) for code in codes] == [[], []]
