"""Training throughput on all GPUs of a host against one of them, with DistributedDataParallel and NCCL.

    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py
    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --compile reduce-overhead

First one process trains alone while the others wait. Then all train together, each on its own batch. Forward,
loss, backward and optimizer, float16 by autocast.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from report import publish, shown_arguments, table
from throughput import Run, add_compile_option
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="grootv_tiny")
    parser.add_argument("--batch", type=int, default=128, help="images of each GPU")
    parser.add_argument("--repeats", type=int, default=9, help="of five batches in a row each")
    add_compile_option(parser)
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, world = dist.get_rank(), dist.get_world_size()
    run = Run(args.model, args.batch, compile=args.compile, adamw=True)
    alone = run.milliseconds(True, True, args.repeats) if rank == 0 else 0.0
    dist.barrier()
    run.model = nn.parallel.DistributedDataParallel(run.model, device_ids=[device], gradient_as_bucket_view=True)
    together = run.milliseconds(True, True, args.repeats)
    if rank == 0:
        rows = [
            [1, f"{1e3 * args.batch / alone:.0f}", "1.00 ×"],
            [world, f"{1e3 * world * args.batch / together:.0f}", f"{world * alone / together:.2f} ×"],
        ]
        compiled = f", torch.compile in mode {args.compile}" if args.compile else ""
        text = f"{args.model}, {args.batch} images of 224 × 224 on each GPU, float16 by autocast, with AdamW{compiled}."
        launcher = f"torchrun --standalone --nproc-per-node {world} benchmarks/distributed.py"
        command = " ".join([launcher, *shown_arguments()])
        sections = [text, table(["GPUs", "images/s", "speed-up"], rows)]
        name = "distributed" + ("" if args.batch == 128 else f"-batch-{args.batch}")
        name += f"-compile-{args.compile}" if args.compile else ""
        publish("Training on several GPUs", name, sections, command, args.commit)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
