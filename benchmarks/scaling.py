"""Time and memory of the tree and the scan from tiny maps to millions of pixels, as a picture.

    python benchmarks/scaling.py          # writes docs/images/scaling.png and benchmarks/results/scaling-MACHINE.md

All sizes have about the same number of values, which fills the GPU; they differ in the number and the size of trees.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from operations import measure
from report import copy_bandwidth, hardware, publish, table

import grootvl_ops

SIDES = (7, 14, 28, 56, 112, 224, 448, 1000, 2000)
VALUES = 1 << 27  # of each map
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "scaling.png"


def peak_memory(shape: tuple[int, int, int, int]) -> float:
    """Bytes per value of the map that tree and scan need besides their inputs, forward and backward."""
    features = torch.randn(shape, device="cuda")
    x, decay = (torch.rand(shape, device="cuda").flatten(1, 2).requires_grad_() for _ in range(2))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grootvl_ops.tree_scan(x, decay, grootvl_ops.build_tree(features)).sum().backward()
    return (torch.cuda.max_memory_allocated() - before) / features.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bandwidth = copy_bandwidth()
    results = []
    for side in SIDES:
        channels = 32 * max(1, min(20, VALUES // (64 * side * side * 32)))
        batch = max(1, VALUES // (side * side * channels))
        shape = (batch, side, side, channels)
        times = measure(shape, bandwidth, torch.float32, sets=1)
        torch.cuda.empty_cache()
        values = batch * side * side * channels
        per_pixel = 1e6 * (times.edges + times.tree) / (batch * side * side)
        per_value = (1e6 * times.forward / values, 1e6 * times.backward / values)
        results.append((shape, per_pixel, *per_value, peak_memory(shape)))
        torch.cuda.empty_cache()
    pixels = [shape[1] ** 2 for shape, *_ in results]
    _, tree, forward, backward, memory = zip(*results, strict=True)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.loglog(pixels, [1e3 * t for t in forward], "o-", label="scan forward, a value")
    left.loglog(pixels, [1e3 * t for t in backward], "o-", label="scan backward, a value")
    left.loglog(pixels, [1e3 * t for t in tree], "s--", label="weights, tree and order, a pixel")
    left.set(xlabel="pixels of a map", ylabel="picoseconds", title=f"Time, float32, on {hardware()}")
    left.legend()
    right.semilogx(pixels, memory, "o-", color="tab:green")
    right.set(xlabel="pixels of a map", ylabel="bytes a value", title="Memory beside the inputs, forward and backward")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)

    best_forward, best_backward, best_tree = min(forward), min(backward), min(tree)
    rows = [
        [f"{b}×{h}×{w}×{d}", f"{1e3 * t:.1f} ({t / best_tree:.1f} ×)", f"{1e3 * f:.2f} ({f / best_forward:.1f} ×)",
         f"{1e3 * g:.2f} ({g / best_backward:.1f} ×)", f"{m:.1f}"]
        for (b, h, w, d), t, f, g, m in results
    ]  # fmt: skip
    head = ["maps", "weights, tree, order", "scan forward", "scan backward", "memory"]
    text = (
        "Picoseconds, of the tree a pixel, of the scan a value (a pixel and channel), float32; in brackets the ratio "
        "to the best size. Memory: peak beside the inputs, forward and backward, bytes a value."
    )
    title = "Tree and scan from small to large maps"
    publish(title, "scaling", [text, table(head, rows)], "python benchmarks/scaling.py", args.commit)


if __name__ == "__main__":
    main()
