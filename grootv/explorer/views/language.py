"""The tree over a prompt, and the next token with and without it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..inputs import RANDOM
from ..view import Number, PathText, Spec, Text, View

MAX_TOKENS = 160
BARS = 8
INSTALL = "pip install 'grootv[language]'"


@torch.no_grad()
def plot_language(
    prompt: str = "The leaves of a tree are joined to its root.",
    folder: str = "",
    layer: int = 1,
    tree_scale: float = 0.3,
) -> View:
    """The tree that GrootL scans over the tokens of a prompt, and the next token's probabilities (paper, section 3.3).

    Args:
        prompt: At most `MAX_TOKENS` tokens.
        folder: Of a Mamba or GrootL in transformers' format, with its tokenizer. Empty for a small model with random
            weights, whose tokens are bytes.
        layer: From 1.
        tree_scale: The tree's part in GrootL's outputs. Mamba has 0.

    Returns:
        A view with data `tokens` (L,), `parent` (L,) of the tree, and `mamba` and `grootl` (vocabulary,), the next
        token's probabilities with the same weights.

    Raises:
        ValueError: no prompt, or a longer one; a layer that the model does not have; a folder of no such model.
        ImportError: transformers is not installed.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty. Write some words.")
    if folder and not Path(folder).expanduser().is_dir():
        raise ValueError(f"The folder {folder} does not exist.")
    tokenizer, model = _load(str(Path(folder).expanduser()) if folder else "")
    from grootl.visualization import draw_arcs, prompt_trees

    ids = tokenizer(prompt, return_tensors="pt").input_ids
    length, layers = ids.shape[1], model.config.num_hidden_layers
    if length > MAX_TOKENS:
        raise ValueError(f"The prompt has {length} tokens. At most {MAX_TOKENS} can be shown.")
    if not 1 <= layer <= layers:
        raise ValueError(f"The model has {layers} layers. There is no layer {layer}.")
    parents = prompt_trees(model, ids)[layer - 1].parent[0].tolist()
    tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
    next_token = {"Mamba": _next_token(model, ids, 0.0), "GrootL": _next_token(model, ids, tree_scale)}

    figure = Figure(figsize=(max(8.0, 0.24 * length), 7.4), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1, 1.3, 1.6))
    chain = [max(0, token - 1) for token in range(length)]
    above = [figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, :])]
    draw_arcs(above, tokens, [chain, parents], ["chain of Mamba", f"tree of GrootL, layer {layer}"])
    shown = np.argsort(-np.maximum(*next_token.values()), kind="stable")[:BARS]
    labels = [repr(tokenizer.decode([token])).replace("$", r"\$") for token in shown]
    axes = figure.add_subplot(grid[2, :])
    for offset, (name, colour) in zip((-0.2, 0.2), (("Mamba", "#56b4e9"), ("GrootL", "#d55e00")), strict=True):
        values = 100 * next_token[name][shown]
        bars = axes.barh(np.arange(len(shown)) + offset, values, 0.38, color=colour, label=name)
        axes.bar_label(bars, [f"{value:.1f} %" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(shown)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="probability of the next token in %")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    best = {name: repr(tokenizer.decode([int(values.argmax())])) for name, values in next_token.items()}
    notes = [] if folder else [f"A small Mamba has {RANDOM}. Its tokens are bytes."]
    data = {"tokens": np.array(tokens), "parent": np.array(parents)}
    return View(
        figure,
        data | {name.lower(): values for name, values in next_token.items()},
        f"Arcs from each of {length} tokens to its parent, and the next token's probabilities. Most probable: "
        + ", ".join(f"{token} for {name}" for name, token in best.items())
        + ".",
        notes,
    )


def _next_token(model: Any, ids: torch.Tensor, tree_scale: float) -> np.ndarray:
    own = model.config.tree_scale
    try:
        model.config.tree_scale = tree_scale
        return model(ids, use_cache=False).logits[0, -1].float().softmax(-1).numpy()
    finally:
        model.config.tree_scale = own


@lru_cache(maxsize=1)
def _load(folder: str) -> tuple[Any, Any]:
    """Tokenizer and model."""
    try:
        from transformers import AutoTokenizer

        from grootl import GrootLConfig, GrootLForCausalLM
        from grootl.finetuning import load_model
        from grootl.sample_data import train_tokenizer
    except ImportError as error:
        raise ImportError(f"Language models need transformers and peft ({error}): {INSTALL}") from error
    if folder:
        try:
            return AutoTokenizer.from_pretrained(folder), load_model(folder, tree_scale=0.3).eval()
        except Exception as error:  # what transformers raises depends on the file that is wrong
            reason = " ".join(str(error).split())[:240]
            raise ValueError(f"The folder {folder} has no Mamba or GrootL with its tokenizer ({reason}).") from error
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GrootLConfig(hidden_size=64, num_hidden_layers=4, state_size=16, vocab_size=257)
        return train_tokenizer([], 257), GrootLForCausalLM(config).eval()


SPEC = Spec(
    "language",
    "Language",
    "The tree that GrootL scans over the tokens of a prompt, and which token follows with it and without it.",
    plot_language,
    (
        Text("prompt", "Prompt", f"At most {MAX_TOKENS} tokens", lines=3, limit=2000),
        PathText(
            "folder", "Folder of a Mamba or GrootL", "In transformers' format; empty: a small one, random weights"
        ),
        Number("layer", "Layer", "From 1", 1, 64, 1),
        Number("tree_scale", "Share of the tree", "Published: 0.3", 0.0, 2.0, 0.05),
    ),
    main=4,
)
