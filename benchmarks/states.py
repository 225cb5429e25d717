"""Two ways to scan N states a channel on one GPU: by `selective_scan`, and by `tree_scan` over D N channels. Maps are
scanned in the direction "both", prompts "down".

    python benchmarks/states.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from report import event_milliseconds, publish, table
from torch import Tensor

import grootvl_ops
from grootvl_ops import Tree

# Images or sequences, height, width, channels and states: stages of GrootV-Tiny, and prompts of Mamba-130M.
SHAPES = [(16, 56, 56, 160, 4), (16, 14, 14, 640, 16), (8, 512, 1, 1536, 16), (4, 2048, 1, 1536, 16)]


def as_channels(x: Tensor, delta: Tensor, A_log: Tensor, B: Tensor, C: Tensor, tree: Tree, direction: str) -> Tensor:
    """`selective_scan` with step sizes for each channel, along D N channels."""
    step = F.softplus(delta.float()).unsqueeze(-1)
    decay = torch.exp(-torch.exp(A_log.float()) * step)
    source = step * B.float().unsqueeze(2) * x.float().unsqueeze(-1)
    h = grootvl_ops.tree_scan(source.flatten(2), decay.flatten(2), tree, direction).view(decay.shape)
    return (h * C.float().unsqueeze(2)).sum(-1).to(x.dtype)


def as_states(x: Tensor, delta: Tensor, A_log: Tensor, B: Tensor, C: Tensor, tree: Tree, direction: str) -> Tensor:
    return grootvl_ops.selective_scan(x, delta, None, None, A_log, B, tree, direction, C)


def measure(
    scan: Callable[..., Tensor], operands: list[Tensor], tree: Tree, direction: str, repeats: int
) -> tuple[float, float, float]:
    """Milliseconds of the forward pass and of both passes, and the peak memory in GiB beside the operands."""
    grad = torch.randn_like(operands[0])

    def train() -> None:
        torch.autograd.grad(scan(*operands, tree, direction), operands, grad)

    with torch.no_grad():
        forward = event_milliseconds(lambda: scan(*operands, tree, direction), repeats, warmup=3)
    both = event_milliseconds(train, repeats, warmup=3)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train()
    return forward, both, (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for batch, height, width, channels, states in SHAPES:
        length, direction = height * width, "down" if width == 1 else "both"
        tree = grootvl_ops.build_tree(torch.randn(batch, height, width, 16, device="cuda"))
        x, delta = (torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        B, C = (torch.randn(batch, length, states, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        A_log = torch.arange(1.0, states + 1, device="cuda").log().repeat(channels, 1)
        operands = [operand.requires_grad_() for operand in (x, delta, A_log, B, C)]
        with torch.no_grad():
            expected = as_channels(*operands, tree, direction).float()
            difference = (as_states(*operands, tree, direction).float() - expected).norm() / expected.norm()
        if not difference < 0.02:  # the precision of bfloat16
            raise SystemExit(f"the two ways differ by {difference:.3f} of the norm")
        for name, scan in (("selective_scan", as_states), ("tree_scan", as_channels)):
            forward, both, memory = measure(scan, operands, tree, direction, args.repeats)
            shape = f"{batch}×{height}×{width}×{channels}, {states} states"
            rows.append([shape, direction, name, f"{forward:.2f}", f"{both:.2f}", f"{memory:.2f}"])
            torch.cuda.empty_cache()
    text = "bfloat16. Milliseconds; memory is the peak beside the operands, forward and backward."
    head = ["maps", "direction", "operation", "forward", "forward and backward", "GiB"]
    publish("Several states", "states", [text, table(head, rows)], "python benchmarks/states.py", args.commit)


if __name__ == "__main__":
    main()
