"""The PathSSM mixer: a selective state space model that scans the pixels along fixed paths."""

from torch import Tensor

from grootvl_ops import Tree

from .scans import bidirectional, cross, raster
from .selective_ssm import SelectiveSSM

__all__ = ["PATH_SCANS", "PathSSM"]

PATH_SCANS = ("raster", "bidirectional", "cross")


class PathSSM(SelectiveSSM):
    """State space model along paths that depend on the size of the map alone: `TreeSSM` with another order of pixels.

    What stands against the tree scan in the paper's ablation. Parameters, norms and gate are those of `TreeSSM`, so
    that the weights of one load into the other. One set of them serves every direction: a pixel has the same decay and
    the same input in all four scans of "cross", and one norm and one C follow their sum. VMamba has a set of its own
    for each direction, with a C before the sum: `grootv.models.vmamba`.

    Args:
        dim: Channels of the input and output.
        scan: "raster": row by row, so that every pixel aggregates those before it; "bidirectional": the same path in
            both directions; "cross": row by row, column by column, and both backwards. See `grootv.layers.scans`.
        expand: Inner channels per input channel.
        d_state: States of each inner channel.
        dilation: Of the depthwise convolution, for maps that are finer than those that the weights were trained on.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: an unknown scan; dim, expand, d_state or dilation less than 1.
    """

    def __init__(
        self,
        dim: int,
        scan: str = "raster",
        expand: int = 2,
        d_state: int = 1,
        dilation: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        if scan not in PATH_SCANS:
            raise ValueError(f"scan must be one of {PATH_SCANS}, got {scan!r}")
        super().__init__(dim, expand, d_state, dilation, device=device, dtype=dtype)
        self.scan = scan

    def scans(self, guide: Tensor) -> list[tuple[Tree, str]]:
        """The scans over a map of the size of `guide`."""
        if self.scan == "raster":
            return raster(guide)
        if self.scan == "bidirectional":
            return bidirectional(guide)
        return cross(guide)
