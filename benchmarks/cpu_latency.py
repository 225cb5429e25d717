"""Latency of one image on the CPU: GrootV against a peer of timm's, measured alternately in one process.

    python benchmarks/cpu_latency.py                     # grootv_tiny against swin_tiny, 224 x 224, two threads
    python benchmarks/cpu_latency.py --model grootv_nano --peer mambaout_femto --size 160

Prints the median latencies and their ratio, and the share of the tree and scan operations in the model's forward pass.
Run it on a machine that does nothing else.
"""

import argparse
import statistics
import time

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import grootv  # noqa: F401 (registers the models)
import grootvl_ops


def alternate(models: list[nn.Module], image: Tensor, rounds: int, warmup: int = 3) -> list[float]:
    """Median milliseconds of each model's forward pass; the models take turns, so that all see the same machine."""
    times: list[list[float]] = [[] for _ in models]
    for i in range(warmup + rounds):
        for model, record in zip(models, times, strict=True):
            start = time.perf_counter()
            model(image)
            if i >= warmup:
                record.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


def operation_shares(model: nn.Module, image: Tensor, rounds: int = 5) -> dict[str, float]:
    """Share of each tree operation in the time of the model's forward pass."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            model(image)
    averages = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    return {
        event.key.removeprefix("grootvl_ops::"): event.cpu_time_total / total
        for event in averages
        if event.key.startswith("grootvl_ops::")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="grootv_tiny")
    parser.add_argument("--peer", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--size", type=int, default=224, help="side of the square image, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    image = torch.randn(1, 3, args.size, args.size)
    models = [timm.create_model(name).eval() for name in (args.model, args.peer)]
    with torch.inference_mode():
        latency, peer_latency = alternate(models, image, args.rounds)
        shares = operation_shares(models[0], image)

    print(f"torch {torch.__version__}, {args.threads} threads, float32, one image of {args.size} x {args.size}")
    print(f"operations: {grootvl_ops.backend('cpu')}")
    print(f"{args.model:32s} {latency:8.1f} ms (median of {args.rounds})")
    print(f"{args.peer:32s} {peer_latency:8.1f} ms")
    print(f"ratio {latency / peer_latency:.2f}")
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    print(f"tree and scan: {sum(shares.values()):.1%} of the forward pass ({parts})")


if __name__ == "__main__":
    main()
