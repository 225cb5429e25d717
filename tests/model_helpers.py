"""Official parameter names, and checkpoints made up from them."""

import json
from pathlib import Path

import torch
from golden import fill
from torch import Tensor

OFFICIAL_NAMES: dict[str, dict[str, list[int]]] = json.loads(
    (Path(__file__).parent / "golden" / "official_names.json").read_text()
)


def official_state(names: dict[str, list[int]]) -> dict[str, Tensor]:
    """Parameters by official names, with the values that depend on their names alone."""
    state = {
        name: torch.zeros(shape, dtype=torch.long if name.endswith("num_batches_tracked") else torch.float32)
        for name, shape in names.items()
    }
    return fill.fill(state)


def shrink(names: dict[str, list[int]], dims: tuple[int, ...], depths: tuple[int, ...], num_classes: int):
    """Official names and shapes of a smaller model, made from those of GrootV-Tiny."""
    smaller = {}
    for name, shape in names.items():
        part = name.split(".")
        if part[0] == "levels" and part[2] == "blocks" and int(part[3]) >= depths[int(part[1])]:
            continue
        stage = int(part[1]) if part[0] == "levels" else {"patch_embed": 0}.get(part[0], 3)
        old, new = 80 * 2**stage, dims[stage]
        rank = {-(-old // 16): -(-new // 16), -(-old // 16) + 2: -(-new // 16) + 2}
        sizes = {old * k // 2: new * k // 2 for k in (1, 2, 3, 4, 8)} | {1000: num_classes}
        if "x_proj" in name or "dt_projs" in name:
            sizes |= rank
        smaller[name] = [sizes.get(size, size) for size in shape]
    return smaller
