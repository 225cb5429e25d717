"""Along which trees, and in which direction, a map is scanned.

Each function takes a map (B, H, W, C) and returns what a mixer scans: a list of trees over the L = H W pixels, each
with a direction of `grootvl_ops.selective_scan`. The mixer sums the results. A new scan is a new function here.
"""

import torch
from torch import Tensor

import grootvl_ops
from grootvl_ops import Tree

__all__ = ["bidirectional", "cross", "cross_paths", "raster", "root_pixel", "spanning_tree"]


def spanning_tree(
    features: Tensor, metric: str = "cosine", direction: str = "both", root: str = "first"
) -> list[tuple[Tree, str]]:
    """One scan, along the minimum spanning tree of the map (paper, section 3.2).

    Args:
        features: (B, H, W, C), floating point. No gradient passes through the choice of a tree.
        metric: Dissimilarity of neighbouring pixels: "cosine", "euclidean" or "manhattan".
        direction: "both": every pixel aggregates the whole map; "up": the subtree below it; "down": the path from the
            root to it.
        root: The pixel that is the root: "first" (top left) or "last" (bottom right). For "both" it does not matter.
    """
    return [(_build_tree(features, metric, root), direction)]


def raster(features: Tensor) -> list[tuple[Tree, str]]:
    """One scan of the pixels row by row: every pixel aggregates those before it.

    Args:
        features: (B, H, W, any channels), of which only the size and the device matter.
    """
    return [(_paths(features, False)[0], "down")]


def bidirectional(features: Tensor) -> list[tuple[Tree, str]]:
    """One scan of the pixels row by row in both directions: every pixel aggregates the whole map.

    The map's tree is one path. What passes between two neighbours on it decays alike in both directions, as along every
    tree, and no pixel counts twice.

    Args:
        features: (B, H, W, any channels), of which only the size and the device matter.
    """
    return [(_paths(features, False)[0], "both")]


def cross(features: Tensor) -> list[tuple[Tree, str]]:
    """The four scans of VMamba (arXiv 2401.10166, section 4.2): row by row, column by column, and both backwards.

    In each of them every pixel aggregates those before it, decayed at the pixel that the scan enters. Backwards is
    therefore another path, and not "up".

    Args:
        features: (B, H, W, any channels), of which only the size and the device matter.
    """
    return [(path, "down") for path in _paths(features, True)[:4]]


def cross_paths(features: Tensor) -> Tree:
    """The four paths of `cross` as one `Tree`, whose fields are (4, L), for `grootvl_ops.merged_scan`."""
    return _paths(features, True)[4]


def root_pixel(features: Tensor, root: str) -> int:
    """The row-major number of the pixel of a map (B, H, W, C) that is the root: "first" or "last"."""
    if root != "first" and root != "last":
        raise ValueError(f"root must be 'first' or 'last', got '{root}'")
    return features.size(1) * features.size(2) - 1 if root == "last" else 0


def _spanning_tree(features: Tensor, metric: str, root: str) -> Tree:
    return grootvl_ops.build_tree(features, metric, root_pixel(features, root))


def _path(order: Tensor, position: Tensor) -> Tree:
    """`grootvl_ops.path_tree` of an order and its inverse, (L,) int32, without a check for which CUDA would wait."""
    parent, size = order[(position - 1).clamp(min=0)], order.numel() - position
    return Tree(parent.unsqueeze(0), order.unsqueeze(0), size.unsqueeze(0))


def _make_paths(height: int, width: int, cross: bool, device: torch.device) -> list[Tree]:
    """The path row by row; for a cross scan also those column by column, and both backwards, in this order, and then
    all four as one tree."""
    length = height * width
    rows = torch.arange(length, dtype=torch.int32, device=device)
    if not cross:
        return [_path(rows, rows)]
    columns, position = rows.view(height, width).t().reshape(-1), rows.view(width, height).t().reshape(-1)
    last = length - 1
    paths = [
        _path(rows, rows),
        _path(columns, position),
        _path(rows.flip(0), last - rows),
        _path(columns.flip(0), last - position),
    ]
    together = Tree(
        torch.cat([path.parent for path in paths]),
        torch.cat([path.order for path in paths]),
        torch.cat([path.subtree_size for path in paths]),
    )
    return paths + [together]


# The paths of each size and device; the oldest are dropped when there are as many as multi-scale training has sizes.
_KEPT: dict[tuple[int, int, bool, torch.device], list[Tree]] = {}
_MAX_KEPT = 128


@torch.jit.unused
def _kept_paths(features: Tensor, cross: bool) -> list[Tree]:
    height, width, device = features.size(1), features.size(2), features.device
    key = (height, width, cross, device)
    paths = _KEPT.get(key)
    if paths is None:
        # The graph would own the memory, and during its capture nobody may wait.
        if features.is_cuda and torch.cuda.is_current_stream_capturing():
            return _make_paths(height, width, cross, device)
        with torch.inference_mode(False):  # autograd keeps no tensors that were made in inference mode
            # After this copy no stream has to wait for another before it reads them.
            made = _make_paths(height, width, cross, torch.device("cpu"))
            paths = [Tree(*(field.to(device) for field in path)) for path in made]
        while len(_KEPT) >= _MAX_KEPT:
            _KEPT.pop(next(iter(_KEPT)), None)
        _KEPT[key] = paths
    return paths


def _paths_of_size(features: Tensor, cross: bool) -> list[Tree]:
    """The paths of `_make_paths` over a map, made once for each size and device.

    Compilers, traces and transforms have tensors of their own, which nobody may keep. They make the paths in their
    graph.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (scripting leaves out only what stands alone under this condition)
        if not (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
        ):
            return _kept_paths(features, cross)
    paths = _make_paths(features.size(1), features.size(2), cross, features.device)
    # A trace of one image would find that one path is enough, and keep this for batches of more.
    batch = features.size(0)
    return [
        Tree(path.parent.expand(batch, -1), path.order.expand(batch, -1), path.subtree_size.expand(batch, -1))
        for path in paths[:4]
    ] + paths[4:]


# A traced call would keep the map size that it was traced with; scripted inside a trace, it takes any.
_build_tree = torch.jit.script_if_tracing(_spanning_tree)
_paths = torch.jit.script_if_tracing(_paths_of_size)
