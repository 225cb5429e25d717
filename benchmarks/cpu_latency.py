"""Latency of one image on the CPU: GrootV against a peer of timm's, in turns.

    python benchmarks/cpu_latency.py                     # grootv_tiny against swin_tiny, 224 x 224, two threads
    python benchmarks/cpu_latency.py --model grootv_nano --peer mambaout_femto --size 160

Each model has a process of its own, since models that share a process share a heap: what one of them gives back to the
system, the other has to ask for again. They take turns, so that both see the same machine. The weights pass through a
file, as in use. Prints the median latencies and their ratio, and the share of the operations of `grootvl_ops` in the
model's forward pass. Run it on a machine that does nothing else.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import time

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import grootv  # noqa: F401 (registers the models)
import grootvl_ops


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


def serve(name: str, size: int, threads: int) -> None:
    """Answer each line of the standard input with the milliseconds of a forward pass, and its end with the shares.

    The pass before is not counted: it wakes up the threads, and fills the caches that the other model has used.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    image, model = torch.randn(1, 3, size, size), timm.create_model(name).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    del file
    with torch.inference_mode():
        for _ in sys.stdin:
            model(image)
            start = time.perf_counter()
            model(image)
            print(1e3 * (time.perf_counter() - start), flush=True)
        print(json.dumps(operation_shares(model, image)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="grootv_tiny")
    parser.add_argument("--peer", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--size", type=int, default=224, help="side of the square image, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.size, args.threads)
        return

    names = (args.model, args.peer)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--serve", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    latencies: list[list[float]] = [[] for _ in names]
    for i in range(3 + args.rounds):  # three to warm up
        for process, record in zip(processes, latencies, strict=True):
            process.stdin.write("\n")
            process.stdin.flush()
            milliseconds = float(process.stdout.readline())
            if i >= 3:
                record.append(milliseconds)
    shares = json.loads(processes[0].communicate()[0])
    processes[1].communicate()

    latency, peer_latency = map(statistics.median, latencies)
    print(f"torch {torch.__version__}, {args.threads} threads, float32, one image of {args.size} x {args.size}")
    print(f"operations: {grootvl_ops.backend('cpu')}")
    print(f"{args.model:32s} {latency:8.1f} ms (median of {args.rounds})")
    print(f"{args.peer:32s} {peer_latency:8.1f} ms")
    print(f"ratio {latency / peer_latency:.2f}")
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    print(f"operations of grootvl_ops: {sum(shares.values()):.1%} of the forward pass ({parts})")


if __name__ == "__main__":
    main()
