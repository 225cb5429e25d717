"""Weights that the authors of the models released: where they are, and under which file name configs look for them.

This project hosts no weights. `python -m grootv.weights NAME` fetches these files.
"""

from dataclasses import dataclass
from typing import Any

from timm.models import resolve_pretrained_cfg

__all__ = ["FOLDER", "RELEASES", "Release", "require_weights"]

# Where the configs look for the files, from the folder in which a command runs.
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Release:
    """One released file.

    Args:
        family: The family of models, whose authors released the file.
        file: The name that the file gets here.
        url: The address to open in a browser. An address that answers with the file itself also belongs in the
            model's timm configuration: `timm.create_model(NAME, pretrained=True)` then fetches it.
    """

    family: str
    file: str
    url: str


def _on_drive(family: str, file: str, drive_id: str) -> Release:
    return Release(family, file, f"https://drive.google.com/file/d/{drive_id}/view")


def _on_github(family: str, file: str) -> Release:
    return Release(family, file, f"https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/{file}")


# By the names of timm's models.
RELEASES = {
    "grootv_tiny": _on_drive("GrootV", "grootv_tiny.pth", "1OIiMBxk92WhPssRg0pv0U5y8ZBtHq2eQ"),
    "grootv_small": _on_drive("GrootV", "grootv_small.pth", "1G6DdEI3JDSltfbmZmcqz79rxM1t01K_8"),
    "grootv_base": _on_drive("GrootV", "grootv_base.pth", "1-8rwMVinj_fV9YMlzx6fGwdjxyLcjd3w"),
    "vmamba_tiny_s1l8": _on_github("VMamba", "vssm1_tiny_0230s_ckpt_epoch_264.pth"),
    "vmamba_small_s1l20": _on_github("VMamba", "vssm1_small_0229s_ckpt_epoch_240.pth"),
    "vmamba_base_s1l20": _on_github("VMamba", "vssm1_base_0229s_ckpt_epoch_225.pth"),
    "vmamba_tiny_s2l5": _on_github("VMamba", "vssm_tiny_0230_ckpt_epoch_262.pth"),
    "vmamba_small_s2l15": _on_github("VMamba", "vssm_small_0229_ckpt_epoch_222.pth"),
    "vmamba_base_s2l15": _on_github("VMamba", "vssm_base_0229_ckpt_epoch_237.pth"),
}


def require_weights(
    name: str, pretrained_cfg: str | dict[str, Any] | None = None, pretrained_cfg_overlay: dict[str, Any] | None = None
) -> str:
    """Where timm has weights to load for `pretrained=True`.

    Args:
        name: A model of timm's registry.
        pretrained_cfg, pretrained_cfg_overlay: As of `timm.create_model`.

    Returns:
        The file or the address, or "the state dict" if the configuration holds the weights themselves.

    Raises:
        RuntimeError: neither a file nor an address is known. The message says how to get weights.
    """
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    if cfg.has_weights or cfg.state_dict:
        return "the state dict" if cfg.state_dict else str(cfg.file or cfg.hf_hub_id or cfg.url)
    if name in RELEASES:
        raise RuntimeError(
            f"pretrained=True needs a file of weights for {name}. Fetch the released one with "
            f"`python -m grootv.weights {name}`, and load it with "
            f'pretrained_cfg_overlay=dict(file="{FOLDER}/{RELEASES[name].file}"). '
            "pretrained=False gives random weights."
        )
    raise RuntimeError(
        f"pretrained=True needs a file of weights for {name}, of which none is released (there are files for "
        f"{', '.join(RELEASES)}). Load one of your own with pretrained_cfg_overlay=dict(file=PATH). "
        "pretrained=False gives random weights."
    )
