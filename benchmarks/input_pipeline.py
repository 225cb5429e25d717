"""Images a second that the input pipeline of ImageNet training delivers, and where the time of an image goes.

    tools/make_imagenet_shaped.py data/shaped
    python benchmarks/input_pipeline.py data/shaped                         # 1, 2, 4 and 8 loader processes
    python benchmarks/input_pipeline.py data/shaped --workers 8 16 32 64

The pipeline is that of configs/classification/_base_/imagenet_224.py: JPEGs in folders, random crop, RandAugment, 224
pixels. It ends with the batch in the memory of the main process. The files were just written or read, so they are in
the cache of the file system.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image
from report import publish, shown_arguments, table
from torch.utils.data import DataLoader, Dataset

import grootv.openmmlab  # noqa: F401  registers the data sets
from grootv.images import to_rgb

CONFIG = Path(__file__).parents[1] / "configs" / "classification" / "_base_" / "imagenet_224.py"


def throughput(dataset: Dataset, workers: int, batch: int, seconds: float, pin_memory: bool) -> float:
    """Images a second of a loader, after the first batch of each process."""
    loader = DataLoader(
        dataset,
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
        pin_memory=pin_memory,
    )
    if len(loader) <= 3 * workers:
        raise SystemExit(f"{len(dataset)} images are too few for {workers} processes of batches of {batch}")
    done, began = 0, None
    while True:
        for i, data in enumerate(loader):
            if began is None:
                if i == workers:
                    began = time.perf_counter()
            else:
                done += len(data["inputs"])
                if time.perf_counter() - began > seconds:
                    return done / (time.perf_counter() - began)


def breakdown(dataset: Dataset, images: int) -> dict[str, float]:
    """Mean milliseconds of processor time of the steps for one image."""
    times: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call, *args):
        start = time.process_time()
        result = call(*args)
        times[name].append(1e3 * (time.process_time() - start))
        return result

    for index in torch.randperm(len(dataset))[:images].tolist():
        path = dataset.image_name(index)
        content = timed("read the file", Path(path).read_bytes)
        image = timed("decode (Pillow)", lambda content: to_rgb(Image.open(io.BytesIO(content))), content)
        for transform in dataset.transform.transforms:
            image = timed(type(transform).__name__, transform, image)
    return {name: statistics.fmean(values) for name, values in times.items()}


def main() -> None:
    """Parse the arguments, measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with train/CLASS/*.JPEG")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of loader processes")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=15, help="of each number of processes")
    parser.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    args = parser.parse_args()

    config = Config.fromfile(CONFIG).train_dataloader
    dataset = DATASETS.build({**config.dataset, "root": args.folder})
    sizes = [
        Image.open(dataset.image_name(index)).size for index in range(0, len(dataset), max(len(dataset) // 200, 1))
    ]
    kilobytes = (
        statistics.fmean(Path(dataset.image_name(i)).stat().st_size for i in range(min(len(dataset), 500))) / 1e3
    )
    parts = breakdown(dataset, 1000)
    total = sum(parts.values())
    rows = [[name, f"{value:.2f}", f"{100 * value / total:.0f} %"] for name, value in parts.items()]
    rows.append(["all", f"{total:.2f}", "100 %"])
    long, short = (statistics.median(map(side, sizes)) for side in (max, min))
    sections = [
        f"{len(dataset)} JPEGs of {long:.0f} × {short:.0f} pixels, "
        f"{kilobytes:.0f} kB in the mean; transforms of configs/classification/_base_/imagenet_224.py.",
        "Processor time of one image, mean of 1000:",
        table(["step", "ms", "share"], rows),
        f"Loader processes with batches of {args.batch}:",
    ]
    loaders = [
        [workers, f"{throughput(dataset, workers, args.batch, args.seconds, torch.cuda.is_available()):.0f}"]
        for workers in args.workers
    ]
    sections.append(table(["processes", "images/s"], loaders))
    command = " ".join(["python benchmarks/input_pipeline.py", *shown_arguments()])
    publish("The input pipeline of ImageNet training", "input-pipeline", sections, command, args.commit)


if __name__ == "__main__":
    main()
