"""The TreeSSM mixer: a selective state space model that scans along a minimum spanning tree of its own input.

Paper: GrootVL / MambaTree, arXiv 2406.02395, section 3.2.
"""

from torch import Tensor

import grootvl_ops
from grootvl_ops import Tree

from .scans import spanning_tree
from .selective_ssm import SelectiveSSM

__all__ = ["ROOTS", "TreeSSM"]

# Which pixels are roots: the direction of the scan and the tree's root that make them so.
_ROOTS = {"all": ("both", "first"), "first": ("up", "first"), "last": ("up", "last")}
ROOTS = tuple(_ROOTS)


class TreeSSM(SelectiveSSM):
    """Tree state space model on channels-last maps (paper, section 3.2 and Algorithm 1).

    The mixer of GrootV, for any network with maps (B, H, W, dim), also in place of attention or a convolution. What it
    computes beside the choice of the tree: `SelectiveSSM`.

        mixer = TreeSSM(96)
        y = mixer(x)                  # (B, H, W, 96) along the minimum spanning tree of the mixer's own features
        y = mixer(x, guide=image)     # along that of another map of the same pixels, such as an image or depth
        y = mixer(x, tree=tree)       # along any tree over the H W pixels, of `grootvl_ops`

    Args:
        dim: Channels of the input and output.
        expand: Inner channels per input channel.
        d_state: States of each inner channel; published: 1.
        dilation: Of the depthwise convolution, for maps that are finer than those that the weights were trained on.
        metric: Dissimilarity of neighbouring pixels: "cosine", "euclidean" or "manhattan".
        root: "all": every pixel aggregates the whole map, as if it were the root; "first" or "last": the only root is
            the first or the last pixel, so that every pixel aggregates the subtree below it.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: an unknown metric or root; dim, expand, d_state or dilation less than 1.
    """

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        d_state: int = 1,
        metric: str = "cosine",
        root: str = "all",
        dilation: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        if metric not in grootvl_ops.METRICS:
            raise ValueError(f"metric must be one of {grootvl_ops.METRICS}, got {metric!r}")
        if root not in ROOTS:
            raise ValueError(f"root must be one of {ROOTS}, got {root!r}")
        super().__init__(dim, expand, d_state, dilation, device=device, dtype=dtype)
        self.metric = metric
        self.root = root
        self.direction, self.tree_root = _ROOTS[root]

    def scans(self, guide: Tensor) -> list[tuple[Tree, str]]:
        """One scan along the minimum spanning tree of `guide`."""
        return spanning_tree(guide, self.metric, self.direction, self.tree_root)

    def forward(
        self, x: Tensor, tree: Tree | None = None, guide: Tensor | None = None, built: list[Tree] | None = None
    ) -> Tensor:
        """Mix a map along a tree.

        Args:
            x: (B, H, W, dim).
            tree: A tree over the H W pixels, of batch size B or one, to scan along.
            guide: (B, H, W, any channels), the map on whose minimum spanning tree to scan. Without tree and guide it is
                the mixer's own features, those that are scanned.
            built: A list to which the tree that was built is appended, for other mixers to scan along.

        Returns:
            (B, H, W, dim).

        Raises:
            ValueError: both tree and guide, or one of another size.
        """
        if tree is not None and guide is not None:
            raise ValueError("give a tree or a guide on which to build one, not both")
        features, z = self.expand_sequence(x)
        if tree is not None:
            scans = [(tree, self.direction)]
        else:
            maps = features.view(x.size(0), x.size(1), x.size(2), features.size(2))
            scans = self.scans(self.check_guide(guide, maps))
            if built is not None:
                built.append(scans[0][0])
        return self.scan_sequence(features, z, scans).view(x.shape)
