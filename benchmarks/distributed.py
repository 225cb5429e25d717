"""Training throughput on all GPUs of a host against one of them, with DistributedDataParallel and NCCL.

    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py

First one process trains alone while the others wait, then all of them together, each on a batch of its own. Forward,
loss, backward and optimizer, float16 by autocast.
"""

from __future__ import annotations

import argparse
import os

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from report import event_milliseconds, publish, shown_arguments, table
from torch import nn

import grootv  # noqa: F401 (registers the models)


def step_milliseconds(model: nn.Module, batch: int, repeats: int) -> float:
    """Median time of a training step."""
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    labels = torch.randint(1000, (batch,), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(images), labels)
        (loss * 1024.0).backward()  # as a gradient scaler would
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return event_milliseconds(step, repeats, warmup=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="grootv_tiny")
    parser.add_argument("--batch", type=int, default=128, help="images of each GPU")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = timm.create_model(args.model).cuda().train()
    alone = step_milliseconds(model, args.batch, args.repeats) if rank == 0 else 0.0
    dist.barrier()
    wrapped = nn.parallel.DistributedDataParallel(
        model, device_ids=[torch.cuda.current_device()], gradient_as_bucket_view=True
    )
    together = step_milliseconds(wrapped, args.batch, args.repeats)
    if rank == 0:
        rows = [
            [1, f"{1e3 * args.batch / alone:.0f}", "1.00 ×"],
            [world, f"{1e3 * world * args.batch / together:.0f}", f"{world * alone / together:.2f} ×"],
        ]
        text = f"{args.model}, {args.batch} images of 224 × 224 on each GPU, float16 by autocast, with AdamW."
        launcher = f"torchrun --standalone --nproc-per-node {world} benchmarks/distributed.py"
        command = " ".join([launcher, *shown_arguments()])
        sections = [text, table(["GPUs", "images/s", "speed-up"], rows)]
        name = "distributed" if args.batch == 128 else f"distributed-batch-{args.batch}"
        publish("Training on several GPUs", name, sections, command, args.commit)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
