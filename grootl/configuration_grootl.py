"""Configuration of GrootL: that of Mamba, and three settings of the tree."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MambaConfig

EDGE_DECAYS = ("next", "own")


@strict
class GrootLConfig(MambaConfig):
    """Configuration of `GrootLModel` and `GrootLForCausalLM`. It reads configurations of Mamba, too.

    Args:
        tree_scale: factor of the tree's part in the output, as a share of the chain's; 0.3 in the published model. With
            0 the model is Mamba.
        neighbours: how many preceding tokens each token of the prompt is joined to in the graph whose minimum spanning
            tree is scanned; 3 in the published model.
        edge_decay: which decay belongs to the edge between a token and its parent. "next": that of the token after
            it, as in the published code and for the published weights. "own": its own, as in the paper (Algorithm 2).
        kwargs: all arguments of `transformers.MambaConfig`.

    Raises:
        ValueError: a value that is not allowed.
    """

    model_type = "grootl"
    keys_to_ignore_at_inference = ["cache", "prompt_length"]

    tree_scale: float | int = 0.3
    neighbours: int = 3
    edge_decay: str = "next"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not math.isfinite(self.tree_scale) or self.tree_scale < 0:
            raise ValueError(f"tree_scale must be a finite number of at least 0, got {self.tree_scale}")
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {self.neighbours}")
        if self.edge_decay not in EDGE_DECAYS:
            raise ValueError(f"edge_decay must be one of {', '.join(EDGE_DECAYS)}, got '{self.edge_decay}'")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> tuple[dict, dict]:
        """The settings of a folder or a hub's model, which is GrootL or Mamba. Others raise ValueError."""
        settings, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = settings.get("model_type")
        if model_type not in ("grootl", "mamba"):
            found = "none" if model_type is None else f"'{model_type}'"
            raise ValueError(
                f"{pretrained_model_name_or_path} must have the model_type 'grootl' or 'mamba', got {found}. "
                "Of the published Mamba, take the models whose names end in -hf."
            )
        return {**settings, "model_type": cls.model_type}, kwargs
