"""Training steps of Mask R-CNN on one GPU at the published sizes, with GrootV and with a peer of timm's.

    python benchmarks/detection.py                               # 2 x 3 x 800 x 1344, float16 by AMP, against Swin-T
    python benchmarks/detection.py --models grootv_tiny grootv_small --steps 30

Every model runs through configs/detection/mask-rcnn_grootv-tiny_fpn_1x_coco.py: forward, losses, backward and
optimizer, on a GPU in mixed precision. The images are noise with random boxes and masks. They are the same in every
step, so the losses fall.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import timm
import torch
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from report import publish, shown_arguments, table
from torch import Tensor

import grootv.openmmlab  # noqa: F401  before mmdet, which looks for mmcv's operations when it is imported

CONFIG = Path(__file__).parents[1] / "configs" / "detection" / "mask-rcnn_grootv-tiny_fpn_1x_coco.py"
PEER = "swin_tiny_patch4_window7_224"


@MODELS.register_module()
class TimmFeatures(BaseModule):
    """The feature maps of a timm model for images of `size` (height, width), as NCHW."""

    def __init__(self, name: str, size: tuple[int, int], drop_path_rate: float) -> None:
        super().__init__()
        # Swin's masks and padding depend on the size of the image; other models do not take the argument.
        sized = {"img_size": size, "strict_img_size": False} if name.startswith("swin") else {}
        self.model = timm.create_model(name, features_only=True, drop_path_rate=drop_path_rate, **sized)
        self.channels = self.model.feature_info.channels()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of the four stages."""
        maps = self.model(x)
        return [
            (map.permute(0, 3, 1, 2) if map.shape[-1] == channels else map).contiguous()
            for map, channels in zip(maps, self.channels, strict=True)
        ]


def make_batch(images: int, height: int, width: int, objects: int = 8) -> dict:
    """A batch in the form of mmdet's data loader: noise, and boxes with elliptic masks at random places."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    inputs, samples = [], []
    for _ in range(images):
        centres = rng.uniform((0.2 * height, 0.2 * width), (0.8 * height, 0.8 * width), (objects, 2))
        radii = rng.uniform(0.03, 0.18, (objects, 2)) * height
        masks = np.stack(
            [
                ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
                for (cy, cx), (ry, rx) in zip(centres, radii, strict=True)
            ]
        )
        image = rng.integers(0, 160, (3, height, width), dtype=np.uint8)
        labels = rng.integers(0, 80, objects)
        for mask, label in zip(masks, labels, strict=True):
            image[label % 3][mask] += 90
        corners = np.concatenate([centres - radii, centres + radii], 1)[:, [1, 0, 3, 2]]
        shape = (height, width)
        sample = DetDataSample(metainfo={"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.tensor(corners, dtype=torch.float32)),
            labels=torch.tensor(labels),
            masks=BitmapMasks(masks.astype(np.uint8), height, width),
        )
        inputs.append(torch.from_numpy(image))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def build(name: str, size: tuple[int, int]) -> tuple[torch.nn.Module, object]:
    """Mask R-CNN of the config on the named timm model, and its optimizer wrapper."""
    config = Config.fromfile(CONFIG)
    init_default_scope("mmdet")
    rate = config.model.backbone.drop_path_rate
    if name.startswith("grootv_"):
        config.model.backbone.update(arch=name.removeprefix("grootv_"), init_cfg=None)
    else:
        config.model.backbone = {"type": "TimmFeatures", "name": name, "size": size, "drop_path_rate": rate}
    backbone = MODELS.build(config.model.backbone)
    config.model.neck.in_channels = list(getattr(backbone, "channels", None) or backbone.out_channels)
    model = MODELS.build(config.model)
    model.init_weights()
    model.train().to("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():  # mixed precision is slow on CPUs, where this script runs only as a trial
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    return model, build_optim_wrapper(model, config.optim_wrapper)


def measure(name: str, batch: dict, size: tuple[int, int], steps: int, warmup: int) -> dict[str, float]:
    """Images a second over the last `steps`, peak memory in GiB, and the loss at the start and at the end."""
    torch.manual_seed(0)
    model, optimizer = build(name, size)
    cuda = torch.cuda.is_available()
    losses = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for step in range(warmup + steps):
        if step == warmup:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
        losses.append(model.train_step(batch, optimizer)["loss"].detach())
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    values = torch.stack(losses).float()
    if not values.isfinite().all():
        raise FloatingPointError(f"{name}: the loss of step {int((~values.isfinite()).nonzero()[0])} is not finite")
    return {
        "images": steps * len(batch["inputs"]) / seconds,
        "memory": torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan"),
        "first": float(values[0]),
        "last": float(values[-5:].mean()),
    }


def main() -> None:
    """Parse the arguments, measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["grootv_tiny", "grootv_small", "grootv_base"])
    parser.add_argument("--peer", default=PEER)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    size = tuple(args.size)
    batch = make_batch(args.batch, *size)
    rows, peer = [], None
    for name in [args.peer, *args.models]:
        result = measure(name, batch, size, args.steps, args.warmup)
        peer = peer or result["images"]
        cells = [name, f"{result['images']:.2f} ({result['images'] / peer:.2f} ×)", f"{result['memory']:.1f}"]
        rows.append([*cells, f"{result['first']:.2f}", f"{result['last']:.2f}"])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    head = ["backbone", "images/s", "peak GiB", "first loss", "mean of the last five"]
    precision = "mixed precision" if torch.cuda.is_available() else "float32"
    text = (
        f"Mask R-CNN with FPN, training steps of {args.batch} × 3 × {size[0]} × {size[1]} in {precision}: forward, "
        f"losses, backward and AdamW, the same batch in all {args.warmup + args.steps} steps; the first {args.warmup} "
        f"are not timed. In brackets the ratio to {args.peer} in the same run."
    )
    command = " ".join(["python benchmarks/detection.py", *shown_arguments()])
    publish("Mask R-CNN training", "detection", [text, table(head, rows)], command, args.commit)


if __name__ == "__main__":
    main()
