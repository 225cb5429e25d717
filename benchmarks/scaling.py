"""Time and memory of the tree and the scan from tiny maps to millions of pixels, as a picture.

    python benchmarks/scaling.py          # writes docs/images/scaling.png and benchmarks/results/scaling-MACHINE.md
    python benchmarks/scaling.py --draw benchmarks/results/scaling-MACHINE.md     # draws the picture again

All sizes have about the same number of values, which fills the GPU; they differ in the number and the size of trees.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from matplotlib import ticker
from matplotlib.figure import Figure
from operations import measure
from report import copy_bandwidth, publish, table

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


def draw(report: str) -> Figure:
    """Time and memory over the number of pixels of a map, from the text of a report of this program."""
    hardware = re.search(r"Measured on (.*?);", report)[1]
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if re.match(r"\| \d+×", line)]
    pixels = [int(maps.split("×")[1]) ** 2 for maps, *_ in rows]
    tree, forward, backward, memory = zip(*([float(cell.split()[0]) for cell in row[1:]] for row in rows), strict=True)

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.loglog(pixels, tree, "s--", color="#009e73", label="weights, tree and order, a pixel")
    left.loglog(pixels, backward, "^-", color="#d55e00", label="scan backward, a value")
    left.loglog(pixels, forward, "o-", color="#0072b2", label="scan forward, a value")
    left.set(
        ylabel="time, picoseconds", title=f"Time, float32, on {hardware}", ylim=(min(forward) / 1.5, max(tree) * 1.5)
    )
    left.yaxis.set_major_formatter(ticker.ScalarFormatter())
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
    right.semilogx(pixels, memory, "o-", color="#000000")
    right.set(
        ylabel="memory, bytes a value",
        title="Memory beside the inputs,\nforward and backward",
        ylim=(0, 1.15 * max(memory)),
    )
    for axes in (left, right):
        axes.set_xlabel("pixels of a map")
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    parser.add_argument("--draw", type=Path, metavar="REPORT", help="only draw the picture, from an earlier report")
    args = parser.parse_args()
    if args.draw:
        draw(args.draw.read_text()).savefig(PICTURE, dpi=120)
        return
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
    best_tree, best_forward, best_backward = (min(row[column] for row in results) for column in (1, 2, 3))
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
    path = publish(title, "scaling", [text, table(head, rows)], "python benchmarks/scaling.py", args.commit)
    draw(path.read_text()).savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
