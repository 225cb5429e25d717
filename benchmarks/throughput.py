"""Images a second of GrootV and a peer of timm's on one GPU, in one run.

    python benchmarks/throughput.py                                  # all sizes against swin_tiny, batch 128, 224 x 224
    python benchmarks/throughput.py --models grootv_tiny --batch 2 --size 800 1344

Inference in inference mode; training is forward, loss and backward, without an optimizer. float32 lets matrix products
use TF32, float16 is autocast.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from report import event_milliseconds, publish, shown_arguments, table
from torch import nn

import grootv  # noqa: F401 (registers the models)

PEER = "swin_tiny_patch4_window7_224"


class Run:
    """One model with a batch of images, on the GPU."""

    def __init__(self, name: str, batch: int, size: tuple[int, int], compiled: bool = False) -> None:
        peer_size = {"img_size": size} if name == PEER and size != (224, 224) else {}
        model: nn.Module = timm.create_model(name, **peer_size).cuda().to(memory_format=torch.channels_last)
        self.model = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        self.images = torch.randn(batch, 3, *size, device="cuda").contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (batch,), device="cuda")

    def infer(self, half: bool) -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=half):
            self.model(self.images)

    def train(self, half: bool) -> None:
        with torch.autocast("cuda", torch.float16, enabled=half):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        (loss * 1024.0).backward()  # as a gradient scaler would
        self.model.zero_grad(set_to_none=True)

    def throughput(self, training: bool, half: bool, repeats: int) -> tuple[float, float]:
        """Images a second, and the peak memory in GiB."""
        self.model.train(training)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = self.train if training else self.infer
        milliseconds = event_milliseconds(lambda: step(half), repeats, warmup=3)
        return 1e3 * len(self.images) / milliseconds, torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["grootv_tiny", "grootv_small", "grootv_base"])
    parser.add_argument("--peer", default=PEER)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, nargs="+", default=[224], help="side of square images, or height and width")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    if len(args.size) > 2:
        parser.error(f"--size takes one or two numbers, got {args.size}")
    size = height, width = args.size[0], args.size[-1]

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    rows = []
    peer: list[float] = []
    for name in [args.peer, *args.models]:
        run = Run(name, args.batch, size, args.compile)
        cells = [name]
        for i, (training, half) in enumerate([(False, False), (False, True), (True, False), (True, True)]):
            images, memory = run.throughput(training, half, args.repeats)
            if name == args.peer:
                peer.append(images)
            cells.append(f"{images:.0f} ({images / peer[i]:.2f} ×)")
        cells.append(f"{memory:.1f}")
        rows.append(cells)
        del run
        torch.cuda.empty_cache()
    head = [
        "model",
        "inference float32",
        "inference float16",
        "training float32",
        "training float16",
        "GiB, training float16",
    ]
    text = (
        f"Images a second, batch {args.batch}, {height} × {width}, in brackets the ratio to {args.peer} in the "
        "same run. Training is forward, loss and backward. float32 with TF32 matrix products, float16 by autocast."
    )
    name = "throughput" + ("-compiled" if args.compile else "")
    if (args.batch, *size) != (128, 224, 224):
        name += f"-{args.batch}x{height}" + (f"x{width}" if width != height else "")
    title = "Throughput on a GPU" + (" with torch.compile" if args.compile else "")
    command = " ".join(["python benchmarks/throughput.py", *shown_arguments()])
    publish(title, name, [text, table(head, rows)], command, args.commit)


if __name__ == "__main__":
    main()
