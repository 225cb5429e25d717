"""Milliseconds of the tree operations on a GPU, at the sizes of GrootV-Tiny's four stages and at large maps.

    python benchmarks/operations.py

The scan is compared with its floor: the time to read or write each of its tensors once (three forward: x, decay, h; six
backward: grad, x, decay, h, dx, ddecay) at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import NamedTuple

import torch
from report import copy_bandwidth, graph_milliseconds, publish, table

import grootvl_ops

STAGES = [(128, 56, 56, 160), (128, 28, 28, 320), (128, 14, 14, 640), (128, 7, 7, 1280)]
LARGE = [(2, 200, 336, 160), (16, 128, 128, 160), (1, 512, 512, 160), (1, 2048, 2048, 32)]


class Times(NamedTuple):
    """Milliseconds of the operations on maps of one size, and of reading or writing one tensor of that size."""

    edges: float
    tree: float
    forward: float
    backward: float
    tensor: float


def measure(shape: tuple[int, int, int, int], bandwidth: float, dtype: torch.dtype, sets: int | None = None) -> Times:
    """Measure the operations on maps (B, H, W, D); `bandwidth` is the memory's, in bytes a second."""
    _, height, width, _ = shape
    ops = torch.ops.grootvl_ops
    sets = sets or (2 if shape[0] > 1 else 1)  # more data than the cache holds, so that every call reads memory
    maps = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(sets)]
    weights = [grootvl_ops.edge_weights(m) for m in maps]
    trees = [grootvl_ops.build_tree_from_grid(w, height, width) for w in weights]
    x, grad = ([torch.randn_like(m).flatten(1, 2) for m in maps] for _ in range(2))
    decay = [torch.rand_like(v) for v in x]
    return Times(
        graph_milliseconds([partial(ops.edge_weights, m, "cosine") for m in maps]),
        graph_milliseconds([partial(ops.grid_tree, w, height, width, 0) for w in weights]),
        graph_milliseconds([partial(grootvl_ops.tree_scan, *args) for args in zip(x, decay, trees, strict=True)]),
        graph_milliseconds(
            [partial(ops.tree_scan_backward, g, v, a, *t) for g, v, a, t in zip(grad, x, decay, trees, strict=True)]
        ),
        1e3 * x[0].nbytes / bandwidth,
    )


def measure_fused(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[float]:
    """Milliseconds of the selective scan, with discretisation, and of the gated norm, each forward and backward."""
    batch, height, width, channels = shape
    rank = max(channels // 32, 1)
    ops = torch.ops.grootvl_ops
    vector = torch.rand(channels, device="cuda")
    scans, norms = [], []
    for _ in range(2):
        features = torch.randn(shape, device="cuda", dtype=dtype)
        x, tree = features.flatten(1, 2), grootvl_ops.build_tree(features)
        projected = torch.randn(batch, height * width, rank + 2, device="cuda", dtype=dtype)
        weight = torch.randn(channels, rank, device="cuda")
        scans.append((x, projected[..., :rank], weight, vector - 5, vector, projected[..., rank], None, *tree))
        norms.append((x, x.flip(0), x.flip(1), projected[..., rank + 1], *[vector] * 5))
    statistics = [ops.gated_norm(*arguments, 1e-5)[1] for arguments in norms]
    return [
        graph_milliseconds([partial(ops.selective_scan, *a) for a in scans]),
        graph_milliseconds([partial(ops.selective_scan_backward, a[0], *a) for a in scans]),
        graph_milliseconds([partial(ops.gated_norm, *a, 1e-5) for a in norms]),
        graph_milliseconds(
            [partial(ops.gated_norm_backward, a[0], *a, s) for a, s in zip(norms, statistics, strict=True)]
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    rows, fused = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in STAGES + LARGE:
            times = measure(shape, bandwidth, dtype)
            batch, height, width, channels = shape
            name = [f"{batch}×{height}×{width}", channels, str(dtype).removeprefix("torch.")]
            rows.append(
                [
                    *name,
                    f"{times.edges:.3f}",
                    f"{times.tree:.3f}",
                    f"{times.forward:.3f} ({times.forward / (3 * times.tensor):.1f} ×)",
                    f"{times.backward:.3f} ({times.backward / (6 * times.tensor):.1f} ×)",
                ]
            )
            torch.cuda.empty_cache()
            if shape != LARGE[-1]:
                fused.append([*name, *(f"{t:.3f}" for t in measure_fused(shape, dtype))])
                torch.cuda.empty_cache()
    head = ["maps", "channels", "dtype", "edge weights", "tree and order", "scan forward", "scan backward"]
    text = (
        "Milliseconds, medians of CUDA graph replays, random features; in brackets the ratio to the floor of three "
        f"(forward) and six (backward) tensors at the measured copy bandwidth of {bandwidth / 1e12:.2f} TB/s."
    )
    fused_head = [*head[:3], "selective scan", "its backward", "gated norm", "its backward"]
    fused_text = "What the model calls: the scan with discretisation and projection of step sizes, and the gated norm."
    sections = [text, table(head, rows), fused_text, table(fused_head, fused)]
    publish("Tree operations on a GPU", "operations", sections, "python benchmarks/operations.py", args.commit)


if __name__ == "__main__":
    main()
