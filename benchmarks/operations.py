"""Milliseconds of the tree operations on a GPU, at the sizes of GrootV-Tiny's four stages and at large maps.

    python benchmarks/operations.py

The scan is set against its floor: the time in which each of its tensors (three forward: x, decay, h; six backward:
grad, x, decay, h, dx, ddecay) would pass through memory once, at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from report import copy_bandwidth, graph_milliseconds, publish, table

import grootvl_ops

STAGES = [(128, 56, 56, 160), (128, 28, 28, 320), (128, 14, 14, 640), (128, 7, 7, 1280)]
LARGE = [(2, 200, 336, 160), (16, 128, 128, 160), (1, 512, 512, 160), (1, 2048, 2048, 32)]


def measure(shape: tuple[int, int, int, int], bandwidth: float, dtype: torch.dtype) -> list[str]:
    """A row of the table for maps (B, H, W, D)."""
    batch, height, width, channels = shape
    ops = torch.ops.grootvl_ops
    sets = 2 if batch > 1 else 1  # more data than the cache holds, so that every call reads memory
    maps = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(sets)]
    weights = [grootvl_ops.edge_weights(m) for m in maps]
    trees = [grootvl_ops.build_tree_from_grid(w, height, width) for w in weights]
    x, grad = ([torch.randn_like(m).flatten(1, 2) for m in maps] for _ in range(2))
    decay = [torch.rand_like(v) for v in x]
    floor = 1e3 * x[0].nbytes / bandwidth
    times = [
        graph_milliseconds([partial(ops.edge_weights, m, "cosine") for m in maps]),
        graph_milliseconds([partial(ops.grid_tree, w, height, width, 0) for w in weights]),
        graph_milliseconds([partial(grootvl_ops.tree_scan, *args) for args in zip(x, decay, trees, strict=True)]),
        graph_milliseconds(
            [partial(ops.tree_scan_backward, g, v, a, *t) for g, v, a, t in zip(grad, x, decay, trees, strict=True)]
        ),
    ]
    edges, tree, forward, backward = times
    return [
        f"{batch}×{height}×{width}",
        channels,
        str(dtype).removeprefix("torch."),
        f"{edges:.3f}",
        f"{tree:.3f}",
        f"{forward:.3f} ({forward / (3 * floor):.1f} ×)",
        f"{backward:.3f} ({backward / (6 * floor):.1f} ×)",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in STAGES + LARGE:
            rows.append(measure(shape, bandwidth, dtype))
            torch.cuda.empty_cache()
    head = ["maps", "channels", "dtype", "edge weights", "tree and order", "scan forward", "scan backward"]
    text = (
        "Milliseconds, medians of CUDA graph replays, random features; in brackets the ratio to the floor of three "
        f"(forward) and six (backward) tensors at the measured copy bandwidth of {bandwidth / 1e12:.2f} TB/s."
    )
    publish(
        "Tree operations on a GPU",
        "operations",
        [text, table(head, rows)],
        "python benchmarks/operations.py",
        args.commit,
    )


if __name__ == "__main__":
    main()
