"""Pictures of the trees over a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from grootvl_ops import Tree

from .modeling_grootl import GrootLForCausalLM, GrootLMixer
from .trees import prompt_edges, prompt_tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_arcs", "plot_arcs", "prompt_trees"]


@torch.no_grad()
def prompt_trees(model: GrootLForCausalLM, input_ids: Tensor) -> list[Tree]:
    """The tree that each layer builds over a prompt: input_ids (1, L), all of them prompt."""
    neighbours, length = model.config.neighbours, input_ids.shape[1]
    start = input_ids.new_zeros(1)
    edges = prompt_edges(start, start + length, length, neighbours)
    trees, seen, hooks = [], {}, []

    def keep_projection(module, inputs, output):
        seen["u"], seen["projected"] = inputs[0].float(), output.float()

    def keep_step(module, inputs, output):
        seen["delta"] = F.softplus(output.float())

    def build(mixer, *_):
        B = seen["projected"][..., mixer.time_step_rank :][..., : mixer.ssm_state_size]
        trees.append(prompt_tree(seen["delta"] * seen["u"], B, edges, neighbours))

    try:
        for mixer in model.modules():
            if isinstance(mixer, GrootLMixer):
                hooks.append(mixer.x_proj.register_forward_hook(keep_projection))
                hooks.append(mixer.dt_proj.register_forward_hook(keep_step))
                hooks.append(mixer.register_forward_hook(build))
        model(input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return trees


def plot_arcs(tokens: Sequence[str], parents: Sequence[Sequence[int]], titles: Sequence[str]) -> Figure:
    """Trees over a row of tokens, one below the other: an arc from each token to its parent, coloured by the number of
    edges from the root (a red point), on one scale for all trees.

    Args:
        tokens: L texts.
        parents: for each tree, the parent of each token; the root is its own.
        titles: of the trees.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.26 * len(tokens)), 2.2 * len(parents)), layout="constrained")
    draw_arcs(list(figure.subplots(len(parents), squeeze=False)[:, 0]), tokens, parents, titles)
    return figure


def draw_arcs(
    axes: Sequence[Axes], tokens: Sequence[str], parents: Sequence[Sequence[int]], titles: Sequence[str]
) -> None:
    """The trees of `plot_arcs`, each into axes of its own in one figure, with a colour bar beside them."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Arc

    all_depths = [[_depth(of_tree, token) for token in range(len(tokens))] for of_tree in parents]
    norm = Normalize(0, max(1, *map(max, all_depths)))
    for axis, of_tree, depths, title in zip(axes, parents, all_depths, titles, strict=True):
        for token, parent in enumerate(of_tree):
            span = abs(parent - token)
            colour = colormaps["viridis"](norm(depths[token]))
            if span:
                axis.add_patch(
                    Arc(((token + parent) / 2, 0), span, 0.9 * span, theta1=0, theta2=180, color=colour, linewidth=1.6)
                )
        root = [token for token, parent in enumerate(of_tree) if token == parent]
        axis.plot(root, [0] * len(root), "o", color="crimson", markersize=5)
        longest = max(abs(parent - token) for token, parent in enumerate(of_tree))
        axis.set(xlim=(-1, len(tokens)), ylim=(-0.1, 0.45 * max(longest, 1) + 0.3), yticks=[])
        axis.set_title(f"{title}: at most {max(depths)} edges to the root", fontsize=12, loc="left")
        labels = [token.replace("\n", "\\n").replace("$", r"\$") for token in tokens]
        axis.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=9)
        axis.spines[["top", "left", "right"]].set_visible(False)
    colours = ScalarMappable(norm, "viridis")
    bar = {"label": "edges from the root", "shrink": 0.8, "aspect": 30, "pad": 0.01}
    axes[0].figure.colorbar(colours, ax=axes, **bar)


def _depth(parents: Sequence[int], token: int) -> int:
    depth = 0
    while parents[token] != token:
        token, depth = parents[token], depth + 1
    return depth
