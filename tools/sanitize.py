"""Runs each way through the CUDA kernels once, for compute-sanitizer, which is slow:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool racecheck --kernel-name kns=grootvl python tools/sanitize.py
    compute-sanitizer --tool initcheck --show-backtrace no python tools/sanitize.py

memcheck and synccheck take the same options as racecheck. initcheck does without the kernels' names: with them it does
not see what other kernels write, and reports it as uninitialised. racecheck needs many minutes for the scans; several
processes share the cases with `--share 1/8` to `--share 8/8`. On Hopper it stops with an internal error in products of
cuBLAS in half precision, which every second case of the mixers has: leave them out by `--parts mixers --share 1/6`,
then 3/6 and 5/6.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import grootvl_ops
from grootv.layers import SS2D, PathSSM, TreeSSM
from grootv.layers.path_ssm import PATH_SCANS
from grootvl_ops import Tree

DEVICE = "cuda"
# One kernel for a short tree, sums on chip, whole trees, runs, sections of runs; rows that are copied in chunks of 16
# bytes, and rows that cannot be.
SCANS = [
    (2, 7, 7, 40, torch.float32),
    (2, 14, 14, 40, torch.float16),
    (1, 15, 17, 33, torch.float64),
    (100, 7, 7, 40, torch.float32),
    (20, 17, 16, 864, torch.float32),
    (2, 20, 21, 40, torch.float32),
    (1, 96, 97, 33, torch.float32),
    (2, 20, 21, 40, torch.float16),
    (1, 96, 97, 40, torch.float16),
    (1, 20, 21, 33, torch.bfloat16),
    (1, 20, 21, 40, torch.float64),
]
# Vertices of paths and of forests: sums on chip, runs, sections of runs.
LENGTHS = [50, 420, 9312]
# One pixel, a row, trees in shared memory, and in global memory, whose blocks work in teams.
GRIDS = [(3, 1, 1), (3, 1, 50), (3, 17, 16), (2, 56, 56), (2, 130, 131)]
CLIPS = [(2, 1, 5, 7), (2, 4, 1, 1), (2, 5, 9, 10), (1, 9, 40, 41)]
# Channels of which 4, 8, 16 and 32 lanes take a share, and such as are read one at a time.
FEATURES = [(8, torch.float32), (32, torch.float32), (128, torch.bfloat16), (1024, torch.float16), (33, torch.float64)]
# Teams of a warp, of the usual size and of a whole block; channels that are read two, four or eight at a time, or
# singly.
NORMS = [
    (40, torch.float32),
    (33, torch.float32),
    (1280, torch.float16),
    (1001, torch.float16),
    (4000, torch.float32),
    (2048, torch.float64),
]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf of the graph; its values come from the CPU, to spare the sanitizer other kernels than ours."""
    return torch.randn(*shape, dtype=dtype).to(DEVICE).requires_grad_()


def misaligned(tensor: Tensor) -> Tensor:
    """A leaf with the same values, contiguous, that does not begin at a multiple of 16 bytes."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    memory[1:] = tensor.detach().cpu().flatten()
    return memory.to(DEVICE)[1:].view_as(tensor).requires_grad_()


def backward(result: Tensor, grad_of: Callable[[Tensor], Tensor] = lambda grad: grad) -> None:
    result.backward(grad_of(torch.randn(result.shape, dtype=result.dtype).to(DEVICE)).detach())


def forest(length: int) -> Tree:
    """Paths, and then a binary tree of half of the vertices."""
    half, path = length // 2, 70
    edges = [(vertex - 1, vertex) for vertex in range(half) if vertex % path]
    edges += [(half + (vertex - 1) // 2, half + vertex) for vertex in range(1, length - half)]
    weights = torch.ones(1, len(edges)).to(DEVICE)
    return grootvl_ops.build_tree_from_edges(torch.tensor(edges).to(DEVICE), weights, length)


def grid_tree(batch: int, height: int, width: int) -> Tree:
    return grootvl_ops.build_tree(randn(batch, height, width, 8))


def random_path(length: int) -> Tree:
    return grootvl_ops.path_tree(torch.randperm(length).to(DEVICE))


def scan(
    make_tree: Callable[[], Tree],
    channels: int,
    dtype: torch.dtype,
    direction: str,
    states: int | None = None,
    with_C: bool = False,
) -> None:
    """Both scans and their backward passes. `states`: None for one without an axis."""
    tree = make_tree()
    batch, length = tree.parent.shape
    axes = () if states is None else (states,)
    x, decay = (randn(batch, length, channels, dtype=dtype) for _ in range(2))
    dt = randn(batch, length, 4, dtype=dtype)
    parameters = [randn(*shape) for shape in ((channels, 4), (channels,), (channels, *axes))]
    B, C = (randn(batch, length, *axes, dtype=dtype) for _ in range(2))
    backward(grootvl_ops.tree_scan(x, decay.sigmoid(), tree, direction))
    backward(grootvl_ops.selective_scan(x, dt, *parameters, B, tree, direction, C if with_C else None))


def scan_misaligned() -> None:
    """A step size for each channel, and rows at addresses that allow no chunks."""
    tree = grid_tree(1, 20, 21)
    x, dt, decay = (misaligned(randn(1, 420, 40)) for _ in range(3))
    backward(grootvl_ops.tree_scan(x, decay, tree), misaligned)
    backward(grootvl_ops.selective_scan(x, dt, None, None, randn(40), randn(1, 420), tree), misaligned)


def many_states(make_tree: Callable[[], Tree], channels: int, dtype: torch.dtype, states: int) -> None:
    """States of which only the sum is asked for, by sweeps up and down; decays also with steps of their own."""
    tree = make_tree()
    batch, length = tree.parent.shape
    x, dt, decay_dt = (randn(batch, length, channels, dtype=dtype) for _ in range(3))
    B, C = (randn(batch, length, states, dtype=dtype) for _ in range(2))
    for direction in ("up", "down"):
        for steps in (None, decay_dt):
            A_log = randn(channels, states)
            backward(grootvl_ops.selective_scan(x, dt, None, None, A_log, B, tree, direction, C, steps))


def merged_scan(groups: int, length: int, channels: int, dtype: torch.dtype) -> None:
    """Several scans of one launch, each along its own path, in both directions, aligned and not."""
    path = grootvl_ops.path_tree(torch.stack([torch.randperm(length) for _ in range(groups)]).to(DEVICE))
    dt = randn(2, length, groups, 4, dtype=dtype)
    shapes = ((groups, channels, 4), (groups, channels), (groups, channels))
    parameters, skip = [randn(*shape) for shape in shapes], randn(channels)
    B, C = (randn(2, length, groups, dtype=dtype) for _ in range(2))
    x = randn(2, length, channels, dtype=dtype)
    for operand in (x, misaligned(x)):
        for direction in ("up", "down"):
            backward(grootvl_ops.merged_scan(operand, dt, *parameters, B, C, path, direction, skip))


Cases = Iterator[Callable[[], None]]


def scans() -> Cases:
    for direction in grootvl_ops.DIRECTIONS:
        for *grid, channels, dtype in SCANS:
            yield partial(scan, partial(grid_tree, *grid), channels, dtype, direction)
        for length in LENGTHS:
            yield partial(scan, partial(random_path, length), 40, torch.float32, direction, with_C=True)
            yield partial(scan, partial(random_path, length), 40, torch.float16, direction)
            yield partial(scan, partial(forest, length), 40, torch.float32, direction)
        for with_C in (False, True):
            yield partial(scan, partial(grid_tree, 1, 20, 21), 40, torch.float32, direction, 2, with_C)
    for length in LENGTHS:
        for channels, dtype in ((40, torch.float16), (33, torch.float32), (40, torch.float64)):
            yield partial(merged_scan, 3, length, channels, dtype)
    yield scan_misaligned


def states() -> Cases:
    for length in LENGTHS:
        for channels, dtype, count in ((13, torch.float32, 16), (40, torch.float16, 18), (33, torch.float64, 3)):
            yield partial(many_states, partial(forest, length), channels, dtype, count)


def weights(channels: int, dtype: torch.dtype, metric: str) -> None:
    """Edge weights of maps and of clips, and the cosines of a sequence."""
    grootvl_ops.edge_weights(randn(2, 17, 19, channels, dtype=dtype), metric)
    grootvl_ops.edge_weights(randn(2, 3, 9, 10, channels, dtype=dtype), metric)
    grootvl_ops.neighbour_cosines(randn(2, 61, channels, dtype=dtype), 5)


def grid(batch: int, height: int, width: int) -> None:
    """The tree of a map, from its grid and from its edges."""
    weights = grootvl_ops.edge_weights(randn(batch, height, width, 8))
    root = height * width // 2
    grootvl_ops.build_tree_from_grid(weights, height, width, root)
    edges = grootvl_ops.grid_edges(height, width).to(DEVICE)
    grootvl_ops.build_tree_from_edges(edges, weights, height * width, root)


def clip(*shape: int) -> None:
    grootvl_ops.build_tree(randn(*shape, 8))


def trees() -> Cases:
    for channels, dtype in FEATURES:
        for metric in grootvl_ops.METRICS:
            yield partial(weights, channels, dtype, metric)
    for size in GRIDS:
        yield partial(grid, *size)
    for shape in CLIPS:
        yield partial(clip, *shape)
    for length in LENGTHS:
        yield partial(forest, length)


def norm(channels: int, dtype: torch.dtype) -> None:
    """All norms of a map, aligned, misaligned and part of a larger one."""
    h, x, z = (randn(2, 61, channels, dtype=dtype) for _ in range(3))
    C, parameters = randn(2, 61, dtype=dtype), [randn(channels) for _ in range(5)]
    of_projection = randn(2, 61, 2 * channels, dtype=dtype)[..., channels:]  # a gate as the model gives it
    for maps, grad_of in (
        ((h, x, z), lambda grad: grad),
        ((h, x, of_projection), lambda grad: grad),
        ((misaligned(h), misaligned(x), misaligned(z)), misaligned),
    ):
        backward(grootvl_ops.gated_norm(*maps, C, *parameters), grad_of)
        operands = (*maps, C, *parameters)
        statistics = torch.ops.grootvl_ops.gated_norm(*operands, 1e-5)[1]
        for dz in (torch.empty_like(h), randn(2, 61, 2 * channels, dtype=dtype)[..., channels:]):
            torch.ops.grootvl_ops.gated_norm_backward_into(dz, h, *operands, statistics)
    results = (dtype,) if dtype == torch.float64 else (torch.float32, torch.float16)
    for result in results:
        backward(grootvl_ops.layer_norm(x, *parameters[:2], dtype=result))
        backward(grootvl_ops.layer_norm(misaligned(x), *parameters[:2], dtype=result), misaligned)
        factors = torch.rand(2).to(DEVICE)
        for maps in ((x, z), (misaligned(x), misaligned(z))):
            for total, normed in (
                grootvl_ops.add_layer_norm(*maps, *parameters[:2], dtype=result),
                grootvl_ops.add_layer_norm(*maps, *parameters[:2], dtype=result, factors=factors),
            ):
                (total.float() + normed).backward(x.detach().float())


def norms() -> Cases:
    for channels, dtype in NORMS:
        yield partial(norm, channels, dtype)


def mixer(make: Callable[..., torch.nn.Module], states: int, height: int, width: int, half: bool) -> None:
    """A mixer on one map. Without cuDNN, whose convolution initcheck reports."""
    with torch.backends.cudnn.flags(enabled=False), torch.autocast(DEVICE, torch.float16, enabled=half):
        backward(make(40, d_state=states).to(DEVICE)(randn(2, height, width, 40)))


def mixers() -> Cases:
    """One path for a batch, several directions, and operands that are slices of one projection."""
    for make in (TreeSSM, *(partial(PathSSM, scan=scan) for scan in PATH_SCANS), partial(SS2D, expand=2)):
        for states in (1, 2):
            for height, width in ((5, 7), (20, 21), (96, 97)):
                for half in (False, True):
                    yield partial(mixer, make, states, height, width, half)


def convolution(dtype: torch.dtype, *size: int) -> None:
    x, weight = randn(*size, dtype=dtype), randn(size[-1], 1, 3, 3)
    of_projection = randn(*size[:3], 2 * size[-1], dtype=dtype)[..., size[-1] :]
    for dilation in (1, 2):
        for view in (x, misaligned(x), of_projection):
            with torch.no_grad():
                grootvl_ops.depthwise_conv_silu(view, weight, dilation)
            leaves = view.detach().requires_grad_(), weight.clone().requires_grad_()
            grootvl_ops.depthwise_conv_silu(*leaves, dilation).sum().backward()
            rows = view.flatten(1, 2)
            before = torch.ops.grootvl_ops.depthwise_conv_silu(rows, weight, size[1], dilation, True)[1]
            for dx in (torch.empty_like(rows), of_projection.clone().flatten(1, 2)):
                torch.ops.grootvl_ops.depthwise_conv_silu_backward_into(
                    dx, rows, rows, before, rows, weight, size[1], dilation
                )


def convolutions() -> Cases:
    """Words of several channels and single ones, rows and columns beyond the edges, parts of a larger map, and blocks
    with several images."""
    for dtype in (torch.float64, torch.float32, torch.float16):
        for size in ((2, 7, 9, 40), (1, 1, 50, 3), (1, 33, 18, 8), (40, 7, 7, 1280)):
            yield partial(convolution, dtype, *size)


def mlp(dtype: torch.dtype, *size: int) -> None:
    operands = [misaligned(randn(*size, dtype=dtype)), randn(*size, dtype=dtype)]
    torch.ops.grootvl_ops.gelu_mlp_backward(*operands)
    torch.ops.grootvl_ops.gelu_mlp_backward(*reversed(operands))
    torch.ops.grootvl_ops.gelu_mlp_backward(*(operand.clone() for operand in operands))
    for operand in operands:
        torch.ops.grootvl_ops.bias_backward(operand)
    rows, columns = operands[0].shape
    for more in (0, 3, -1):
        sizes = [rows + more] * 2, [columns + more] * 2
        torch.ops.grootvl_ops.cast_weights_into(
            torch.ops.grootvl_ops.cast_weights(operands, *sizes, torch.float16), operands, True
        )
    torch.ops.grootvl_ops.sums_wait(operands[0])
    for operand in operands:
        torch.ops.grootvl_ops.bias_backward(operand)
    torch.ops.grootvl_ops.sums_run(operands[0])


def mlps() -> Cases:
    """Words of several values and single ones, rows and columns that fill no block, weights with zeros beside, sums at
    once and later."""
    for dtype in (torch.float64, torch.float32, torch.float16):
        for size in ((1, 1), (700, 24), (33, 1032), (5000, 9)):
            yield partial(mlp, dtype, *size)


PARTS: dict[str, Callable[[], Cases]] = {
    "convolutions": convolutions,
    "mlps": mlps,
    "scans": scans,
    "states": states,
    "trees": trees,
    "norms": norms,
    "mixers": mixers,
}


def share(text: str) -> tuple[int, int]:
    """The number of a share, from 0, and of all shares."""
    try:
        number, total = map(int, text.split("/"))
    except ValueError:
        number, total = 0, 0
    if not 1 <= number <= total:
        raise argparse.ArgumentTypeError(f"one share of several, such as 1/8 or 8/8, got {text!r}")
    return number - 1, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--share", type=share, default=(0, 1), metavar="I/N", help="every N-th case, from the I-th on")
    args = parser.parse_args()
    if not torch.cuda.is_available() or grootvl_ops.backend(DEVICE) != "compiled":
        raise SystemExit("there is nothing to check: no CUDA device, or no compiled kernels for it")
    first, step = args.share
    start = time.monotonic()
    for part in args.parts:
        cases = list(PARTS[part]())
        for number in range(first, len(cases), step):
            torch.manual_seed(number)
            cases[number]()
            torch.cuda.synchronize()
            print(f"{part} {number + 1} of {len(cases)}: done after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
