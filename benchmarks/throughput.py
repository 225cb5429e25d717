"""Images a second of GrootV, VMamba and a peer of timm's on one GPU, in one run.

    python benchmarks/throughput.py                 # GrootV and VMamba-Tiny against swin_tiny, batch 128, 224 x 224
    python benchmarks/throughput.py --models grootv_tiny --batch 2 --size 800 1344
    python benchmarks/throughput.py --models vmamba_tiny_s1l8 --precisions float16 --sides 56 112 224 448 512
    python benchmarks/throughput.py --models grootv_tiny --compile reduce-overhead --precisions float16

Inference in inference mode; training is forward, loss and backward, without an optimizer; its stochastic depth is 0.1.
float32 lets matrix products use TF32, float16 is autocast. The host does not wait for the GPU between batches, as in
training that reads its loss rarely.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from report import event_milliseconds, prepare, publish, shown_arguments, table
from torch import nn

import grootv  # noqa: F401 (registers the models)

PEER = "swin_tiny_patch4_window7_224"
# Of all models in training: timm's default for Swin, the recipe of GrootV-Tiny, and in some models timm's default is 0.
DROP_PATH_RATE = 0.1


class Run:
    """One model with a batch of images, on a GPU; `compile` is a mode of torch.compile.

    On a CPU, for trials of a script, half precision is bfloat16.
    """

    def __init__(
        self,
        name: str,
        batch: int,
        size: tuple[int, int] = (224, 224),
        compile: str | None = None,
        adamw: bool = False,
        device: str = "cuda",
    ) -> None:
        self.device = device
        self.half_dtype = torch.bfloat16 if device == "cpu" else torch.float16
        peer_size = {"img_size": size} if name.startswith("swin") and size != (224, 224) else {}
        model: nn.Module = timm.create_model(name, drop_path_rate=DROP_PATH_RATE, **peer_size)
        model = model.to(device, memory_format=torch.channels_last)
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True) if adamw else None
        self.model = torch.compile(model, fullgraph=True, dynamic=False, mode=compile) if compile else model
        self.images = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (batch,), device=device)

    def infer(self, half: bool) -> None:
        with torch.inference_mode(), torch.autocast(self.device, self.half_dtype, enabled=half):
            self.model(self.images)

    def train(self, half: bool) -> None:
        with torch.autocast(self.device, self.half_dtype, enabled=half):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        (loss * 1024.0).backward()  # as a gradient scaler would
        if self.optimizer is not None:
            self.optimizer.step()
        for parameter in self.parameters:  # as an optimizer does, without a search through the modules
            parameter.grad = None

    def milliseconds(self, training: bool, half: bool, repeats: int) -> float:
        """Median time of a batch."""
        self.model.train(training)
        step = self.train if training else self.infer
        return event_milliseconds(lambda: step(half), repeats, warmup=8, in_a_row=5)

    def throughput(self, training: bool, half: bool, repeats: int) -> tuple[float, float]:
        """Images a second, and the peak memory in GiB."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        images = 1e3 * len(self.images) / self.milliseconds(training, half, repeats)
        return images, torch.cuda.max_memory_allocated() / 2**30


def add_compile_option(parser: argparse.ArgumentParser) -> None:
    """--compile [MODE]."""
    modes = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    parser.add_argument("--compile", nargs="?", const="default", choices=modes, help="torch.compile, in this mode")


def publish_time_per_pixel(args: argparse.Namespace, pixels: int) -> None:
    """Nanoseconds a pixel of the input for images of several sizes, of about so many pixels in all."""
    rows = []
    for name in args.models:
        for precision in args.precisions:
            times: list[list[float]] = []
            batches = [max(1, pixels // side**2) for side in args.sides]
            for side, batch in zip(args.sides, batches, strict=True):
                run = Run(name, batch, (side, side), args.compile)
                milliseconds = [run.milliseconds(t, precision == "float16", args.repeats) for t in (False, True)]
                times.append([1e6 * ms / (batch * side**2) for ms in milliseconds])
                del run
                torch.cuda.empty_cache()
            best = [min(column) for column in zip(*times, strict=True)]
            for side, batch, of_side in zip(args.sides, batches, times, strict=True):
                cells = [f"{t:.2f} ({t / b:.2f} ×)" for t, b in zip(of_side, best, strict=True)]
                rows.append([f"{name}, {precision}", f"{batch}×{side}²", *cells])
    text = "Nanoseconds a pixel of the input; in brackets the ratio to the best size. Training: forward and backward."
    command = " ".join(["python benchmarks/throughput.py", *shown_arguments()])
    head = ["model", "images", "inference", "training"]
    publish("Time a pixel", "time-per-pixel", [text, table(head, rows)], command, args.commit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["grootv_tiny", "grootv_small", "grootv_base", "vmamba_tiny_s1l8"]
    )
    parser.add_argument("--peer", default=PEER)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, nargs="+", default=[224], help="side of square images, or height and width")
    parser.add_argument(
        "--sides", type=int, nargs="+", help="instead: the time a pixel of square images of these sides, as many of "
        "them as have the pixels of --batch images of --size"
    )  # fmt: skip
    parser.add_argument("--precisions", nargs="+", default=["float32", "float16"], choices=["float32", "float16"])
    parser.add_argument("--repeats", type=int, default=5, help="of five batches in a row each")
    add_compile_option(parser)
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    if len(args.size) > 2:
        parser.error(f"--size takes one or two numbers, got {args.size}")
    size = height, width = args.size[0], args.size[-1]

    prepare()
    if args.sides:
        publish_time_per_pixel(args, args.batch * height * width)
        return
    columns = [(training, precision) for training in (False, True) for precision in args.precisions]
    rows = []
    peer: list[float] = []
    for name in [args.peer, *args.models]:
        run = Run(name, args.batch, size, args.compile)
        cells = [name]
        for i, (training, precision) in enumerate(columns):
            images, memory = run.throughput(training, precision == "float16", args.repeats)
            if name == args.peer:
                peer.append(images)
            cells.append(f"{images:.0f} ({images / peer[i]:.2f} ×)")
        cells.append(f"{memory:.1f}")
        rows.append(cells)
        del run
        torch.cuda.empty_cache()
    head = ["model", *(f"{'training' if training else 'inference'} {precision}" for training, precision in columns)]
    head.append(f"GiB, {head[-1]}")
    text = (
        f"Images a second, batch {args.batch}, {height} × {width}, in brackets the ratio to {args.peer} in the "
        "same run. Training is forward, loss and backward. float32 with TF32 matrix products, float16 by autocast."
    )
    name = "throughput" + (f"-compile-{args.compile}" if args.compile else "")
    if (args.batch, *size) != (128, 224, 224):
        name += f"-{args.batch}x{height}" + (f"x{width}" if width != height else "")
    title = "Throughput on a GPU" + (f" with torch.compile, mode {args.compile}" if args.compile else "")
    command = " ".join(["python benchmarks/throughput.py", *shown_arguments()])
    publish(title, name, [text, table(head, rows)], command, args.commit)


if __name__ == "__main__":
    main()
