"""Runs each way through the CUDA kernels once, for compute-sanitizer, which is slow:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool racecheck --kernel-name kns=grootvl python ops/tests/sanitize.py
    compute-sanitizer --tool initcheck --show-backtrace no python ops/tests/sanitize.py

memcheck and synccheck go as racecheck. initcheck goes without the kernels' names, since it takes what other kernels
write for uninitialised otherwise.
"""

import argparse

import torch

import grootvl_ops

DEVICE = "cuda"
# Sums on chip, whole trees, runs, sections of runs; rows copied in chunks of 16 bytes, and rows that cannot be.
SCANS = [
    (2, 7, 7, 40, torch.float32),
    (20, 17, 16, 864, torch.float32),
    (2, 20, 21, 40, torch.float32),
    (1, 96, 97, 33, torch.float32),
    (2, 20, 21, 40, torch.float16),
    (1, 96, 97, 40, torch.float16),
]
# One pixel, a row, trees in shared memory, and in global memory, whose blocks work in teams.
GRIDS = [(3, 1, 1), (3, 1, 50), (3, 17, 16), (2, 56, 56), (2, 130, 131)]
# Channels of which 4, 8, 16 and 32 lanes take a share, and such as are read one at a time.
FEATURES = [(8, torch.float32), (32, torch.float32), (128, torch.bfloat16), (1024, torch.float16), (33, torch.float64)]
# Teams of a warp, of the usual size and of a whole block; channels that are read four or eight at a time, or singly.
NORMS = [
    (40, torch.float32),
    (33, torch.float32),
    (1280, torch.float16),
    (1001, torch.float16),
    (4000, torch.float32),
]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A leaf of the graph; its values come from the CPU, to spare the sanitizer other kernels than ours."""
    return torch.randn(*shape, dtype=dtype).to(DEVICE).requires_grad_()


def sanitize_scans() -> None:
    for batch, height, width, channels, dtype in SCANS:
        tree = grootvl_ops.build_tree(randn(batch, height, width, 8))
        maps = (batch, height * width, channels)
        x, decay, dt = (randn(*shape, dtype=dtype) for shape in (maps, maps, (*maps[:2], 4)))
        parameters = [randn(*shape) for shape in ((channels, 4), (channels,), (channels,))]
        input_weight = randn(*maps[:2], dtype=dtype)
        for direction in grootvl_ops.DIRECTIONS:
            grootvl_ops.tree_scan(x, decay.sigmoid(), tree, direction).sum().backward()
            grootvl_ops.selective_scan(x, dt, *parameters, input_weight, tree, direction).sum().backward()


def sanitize_trees() -> None:
    for channels, dtype in FEATURES:
        for metric in ("cosine", "euclidean", "manhattan"):
            grootvl_ops.edge_weights(randn(2, 17, 19, channels, dtype=dtype), metric)
    for batch, height, width in GRIDS:
        weights = grootvl_ops.edge_weights(randn(batch, height, width, 8))
        root = height * width // 2
        grootvl_ops.build_tree_from_grid(weights, height, width, root)
        edges = grootvl_ops.grid_edges(height, width).to(DEVICE)
        grootvl_ops.build_tree_from_edges(edges, weights, height * width, root)


def sanitize_norms() -> None:
    for channels, dtype in NORMS:
        h, x, z = (randn(2, 61, channels, dtype=dtype) for _ in range(3))
        parameters = [randn(channels) for _ in range(5)]
        grootvl_ops.gated_norm(h, x, z, randn(2, 61, dtype=dtype), *parameters).sum().backward()
        for result in (torch.float32, torch.float16):
            grootvl_ops.layer_norm(x, *parameters[:2], dtype=result).sum().backward()


PARTS = {"scans": sanitize_scans, "trees": sanitize_trees, "norms": sanitize_norms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    args = parser.parse_args()
    torch.manual_seed(0)
    for part in args.parts:
        PARTS[part]()
        torch.cuda.synchronize()
        print(f"{part}: done")


if __name__ == "__main__":
    main()
