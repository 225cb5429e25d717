"""Count parameters and FLOPs of a timm model, or of the detector, segmentor or classifier that a config describes.

    python tools/get_flops.py grootv_tiny                                                 at 224 x 224
    python tools/get_flops.py configs/detection/mask-rcnn_grootv-tiny_fpn_1x_coco.py --shape 800 1280
    python tools/get_flops.py configs/segmentation/grootv-tiny_upernet_8xb2-160k_ade20k-512x512.py --shape 512 2048

As in papers, a multiplication with its addition is one FLOP; the formulas are in `grootv.flops`. Tree and scan have
their own lines. A segmentor's auxiliary head, used in training only, counts for the parameters and not for the FLOPs.
A detector's second stage is counted for 1000 boxes and 100 masks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grootv.flops import (
    depthwise_convolution_flops,
    edge_weights_flops,
    merged_scan_flops,
    norm_flops,
    scan_flops,
    selective_scan_flops,
    step_projection_flops,
    two_norms_flops,
)

# What operations add to the parts of the table. PyTorch counts the others: convolutions and products.
_COUNTED: dict[torch._ops.OpOverloadPacket, dict[str, Callable[..., int]]] = {
    torch.ops.grootvl_ops.edge_weights: {"tree": edge_weights_flops},
    torch.ops.grootvl_ops.tree_scan: {"scan": scan_flops},
    torch.ops.grootvl_ops.selective_scan: {"scan": selective_scan_flops, "products": step_projection_flops},
    torch.ops.grootvl_ops.merged_scan: {"scan": merged_scan_flops, "products": step_projection_flops},
    torch.ops.grootvl_ops.gated_norm: {"norms": two_norms_flops},
    torch.ops.grootvl_ops.layer_norm: {"norms": norm_flops},
    torch.ops.grootvl_ops.add_layer_norm: {"norms": norm_flops},
    torch.ops.grootvl_ops.depthwise_conv_silu: {"convolutions": depthwise_convolution_flops},
    torch.ops.aten.native_layer_norm: {"norms": norm_flops},
    # What the counter takes batch normalisation apart into.
    torch.ops.aten._native_batch_norm_legit: {"norms": norm_flops},
    torch.ops.aten._native_batch_norm_legit_no_training: {"norms": norm_flops},
}


def count_flops(run: Callable[[], object]) -> dict[str, int]:
    """FLOPs of what `run` does, by "tree", "scan", "norms", "convolutions" and "products" (linear layers)."""
    flops = dict.fromkeys(("tree", "scan", "norms", "convolutions", "products"), 0)

    def adder(formulas: dict[str, Callable[..., int]]) -> Callable[..., int]:
        def add(*args: object, **kwargs: object) -> int:
            for part, formula in formulas.items():
                flops[part] += formula(*args, **kwargs)
            return 0  # nothing is left for the counter to add

        return add

    mapping = {operation: adder(formulas) for operation, formulas in _COUNTED.items()}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        run()
    for operation, number in counter.get_flop_counts()["Global"].items():
        part = "convolutions" if "conv" in str(operation) else "products"
        flops[part] += number // 2  # PyTorch counts multiplications and additions
    return flops


def build(model: str, shape: tuple[int, int]) -> tuple[nn.Module, Callable[[], object]]:
    """The model, with random weights, and a function that runs it on one image of `shape` (height, width).

    Models are on the meta device, which computes nothing, except detectors: they select boxes by values.
    """
    if not model.endswith(".py"):
        image = torch.empty(1, 3, *shape, device="meta")
        network = timm.create_model(model, device="meta").eval()
        return network, lambda: network(image)
    config = Config.fromfile(model)
    if "init_cfg" in config.model.get("backbone", {}):
        config.model.backbone.init_cfg = None
    scope = config.get("default_scope") or "mmengine"
    init_default_scope(scope)
    device = "cpu" if scope == "mmdet" else "meta"
    with torch.device(device):
        network = MODELS.build(config.model).eval()
    image = torch.zeros(1, 3, *shape, device=device)
    if scope != "mmdet":
        return network, lambda: network(image, mode="tensor")
    from mmdet.structures import DetDataSample

    metainfo = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), shape)
    sample = DetDataSample(metainfo={**metainfo, "scale_factor": (1.0, 1.0)})
    return network, lambda: network(image, [sample], mode="tensor")


def main() -> None:
    """Parse the arguments, count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a timm model, or path of a config")
    parser.add_argument("--shape", type=int, nargs=2, default=(224, 224), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args()
    network, run = build(args.model, tuple(args.shape))
    flops = count_flops(run)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{args.model} at {args.shape[0]} x {args.shape[1]}")
    print(f"parameters    {parameters / 1e6:9.2f} M")
    for part, number in flops.items():
        print(f"{part:13s} {number / 1e9:9.3f} G")
    print(f"FLOPs         {sum(flops.values()) / 1e9:9.2f} G")


if __name__ == "__main__":
    main()
