"""How fast GrootV is on one GPU, in one table: models, dense sizes, latency, and the operations against their floors.

    python benchmarks/speed.py

The peer is timm's swin_tiny in the same run and precision (float16 by autocast). Where figures of the published
implementation are given, they were measured earlier, on another H200 with torch 2.11.
"""

from __future__ import annotations

import argparse

import torch
from operations import LARGE, STAGES, measure
from report import copy_bandwidth, graph_milliseconds, publish, table
from throughput import PEER, Run

# Images a second of the published implementation, float16, batch 128: inference and training.
PUBLISHED = {"grootv_tiny": (617, 302), "grootv_small": (458, 225), "grootv_base": (375, 177)}
PUBLISHED_TREE = {56: 15.0, 28: 6.0, 14: 6.0, 7: 5.1}  # milliseconds of tree and order


def model_rows(repeats: int) -> list[list[str]]:
    """Throughput and memory at batch 128, 224 x 224."""
    peer = Run(PEER, 128)
    peer_inference, peer_training = (peer.throughput(training, True, repeats) for training in (False, True))
    del peer
    rows = []
    for name, (published_inference, published_training) in PUBLISHED.items():
        run = Run(name, 128)
        (inference, _), (training, memory) = (run.throughput(t, True, repeats) for t in (False, True))
        for what, images, of_peer, published in (
            ("inference", inference, peer_inference[0], published_inference),
            ("training", training, peer_training[0], published_training),
        ):
            rows.append(
                [f"{name} {what}, batch 128", f"{images:.0f} images/s", f"{images / of_peer:.2f} × the images",
                 f"{images / published:.1f} × the images"]
            )  # fmt: skip
        rows.append([f"{name} training, memory", f"{memory:.1f} GiB", f"{memory / peer_training[1]:.2f} ×", ""])
    return rows


def dense_rows(repeats: int) -> list[list[str]]:
    """Times at the sizes of detection and segmentation."""
    rows = []
    for batch, size, training in ((2, (800, 1344), True), (16, (512, 512), True), (1, (2048, 2048), False)):
        times = []
        for name in (PEER, "grootv_tiny"):
            images, _ = Run(name, batch, size).throughput(training, True, repeats)
            times.append(1e3 * batch / images)
            torch.cuda.empty_cache()
        what = "training" if training else "inference"
        rows.append(
            [f"grootv_tiny {what}, {batch}×3×{size[0]}×{size[1]}", f"{times[1]:.1f} ms",
             f"{times[1] / times[0]:.2f} × the time", ""]
        )  # fmt: skip
    return rows


def latency_rows() -> list[list[str]]:
    """Batch 1, from replays of a CUDA graph: the time of the GPU without the host."""
    times = []
    for name in (PEER, "grootv_tiny"):
        run = Run(name, 1)
        run.model.eval()
        times.append(graph_milliseconds([lambda run=run: run.infer(True)], rounds=1))
    ratio = f"{times[1] / times[0]:.2f} × the time"
    return [["grootv_tiny latency, batch 1, CUDA graph", f"{times[1]:.2f} ms", ratio, ""]]


def operation_rows() -> list[list[str]]:
    """Tree and scan at the four stages of GrootV-Tiny, and on a detector's largest map."""
    bandwidth = copy_bandwidth()
    rows = []
    for shape in STAGES:
        side = shape[1]
        tree, scan = measure(shape, bandwidth, torch.bfloat16), measure(shape, bandwidth, torch.float32)
        name = f"128×{side}×{side}×{shape[3]}"
        built = tree.edges + tree.tree
        published = f"1/{PUBLISHED_TREE[side] / built:.0f} of the time"
        rows.append([f"weights + tree + order, bf16, {name}", f"{built:.3f} ms", "", published])
        for what, time, floor in (("forward", scan.forward, 3), ("backward", scan.backward, 6)):
            ratio = f"{time / (floor * scan.tensor):.2f} × its floor"
            rows.append([f"scan {what}, fp32, {name}", f"{time:.3f} ms", ratio, ""])
        torch.cuda.empty_cache()
    times = measure(LARGE[0], bandwidth, torch.float32)
    total = times.edges + times.tree + times.forward
    rows.append(["weights + tree + order + scan forward, fp32, 2×200×336×160", f"{total:.3f} ms", "", ""])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    rows = [*model_rows(args.repeats), *dense_rows(args.repeats), *latency_rows(), *operation_rows()]
    text = (
        f"float16 by autocast for models. The peer is {PEER} in the same run; the floor of a scan is its three "
        "(forward) or six (backward) tensors once through memory at the copy bandwidth measured in the same run. "
        "Published: the published implementation, measured earlier on an H200."
    )
    head = ["what", "measured", "against the peer or the floor", "against the published implementation"]
    publish("Speed on a GPU", "speed", [text, table(head, rows)], "python benchmarks/speed.py", args.commit)


if __name__ == "__main__":
    main()
