#!/usr/bin/env python
"""Train a small detector or segmentor on handwritten digits in photographs, and draw its predictions for held-out ones.

It calls the ordinary tools with the configs for digits. As for COCO and ADE20K, the backbone starts from a classifier's
weights: those of tools/demo.py, which runs first if they are missing. It continues an interrupted run and reuses a
finished one, unless --fresh is given.
"""

import argparse
import json
import shutil
import time
from functools import partial
from pathlib import Path

from demo import run_tool
from PIL import Image

from grootv.openmmlab.runtime.checkpoints import find_intact_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "detection": ROOT / "configs/detection/mask-rcnn_grootv-nano_fpn_digits.py",
    "segmentation": ROOT / "configs/segmentation/grootv-nano_upernet_digits-128x128.py",
}
PRETRAINED = ROOT / "work_dirs/demo/training/timm_weights.pth"
METRICS = {
    "detection": {"coco/bbox_mAP_50": "box AP50", "coco/segm_mAP_50": "mask AP50"},
    "segmentation": {"mIoU_objects": "mIoU over the ten digits", "mIoU": "mIoU with the background"},
}
SHOWN = 6


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=CONFIGS)
    parser.add_argument("--out-dir", type=Path, help="default: work_dirs/demo-TASK")
    parser.add_argument("--data", type=Path, default=ROOT / "data/sample", help="default: %(default)s")
    parser.add_argument(
        "--pretrained",
        type=Path,
        default=PRETRAINED,
        metavar="CHECKPOINT",
        help="weights of the backbone; default: %(default)s",
    )
    parser.add_argument("--fresh", action="store_true", help="delete an earlier training and train again")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="replace entries of the config"
    )
    return parser.parse_args()


def overrides(task: str, data: Path, pretrained: Path) -> list[str]:
    """Overrides with which the task's config reads `data` and starts from the backbone in `pretrained`."""
    root = data.resolve() / {"detection": "coco", "segmentation": "ade"}[task]
    options = [f"{split}_dataloader.dataset.data_root={root}/" for split in ("train", "val", "test")]
    if task == "detection":
        annotations = root / "annotations" / "instances_val2017.json"
        options += [f"{split}_evaluator.ann_file={annotations}" for split in ("val", "test")]
    checkpoint = f"model.backbone.init_cfg.checkpoint={pretrained.resolve()}"
    return [*options, "model.backbone.init_cfg.type=Pretrained", checkpoint]


def make_sheet(folder: Path, sheet: Path, columns: int = 2, gap: int = 16) -> None:
    """Write the first pictures in `folder` to one picture, in rows of similar heights."""
    pictures = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))[:SHOWN]]
    pictures.sort(key=lambda picture: picture.height)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(picture.width for picture in pictures) + gap
    heights = [max(picture.height for picture in row) + gap for row in rows]
    canvas = Image.new("RGB", (columns * width - gap, sum(heights) - gap), "white")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            canvas.paste(picture, (column * width, sum(heights[:number])))
    canvas.save(sheet)


def main() -> None:
    """Make the data, train, evaluate, draw, and print where everything is."""
    args = parse_args()
    start = time.monotonic()
    run = partial(run_tool, threads=None)
    folder = (args.out_dir or ROOT / f"work_dirs/demo-{args.task}").resolve()
    if args.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    config = CONFIGS[args.task]
    options = ("--cfg-options", *overrides(args.task, args.data, args.pretrained), *args.cfg_options)
    if args.pretrained == PRETRAINED and not PRETRAINED.is_file():
        run("training the classifier for the backbone", "demo.py")
    run("data", "make_sample_data.py", args.data.resolve())
    run("training", "train.py", config, "--work-dir", folder, "--resume", *options)
    checkpoint = find_intact_checkpoint(folder)
    if checkpoint is None:
        raise SystemExit(f"demo: training wrote no checkpoint to {folder}")
    for old in ("evaluation", "pictures"):
        shutil.rmtree(folder / old, ignore_errors=True)
    evaluation = ("--work-dir", folder / "evaluation", "--show-dir", folder / "pictures")
    run("evaluation", "test.py", config, checkpoint, *evaluation, *options)
    sheet = folder / "predictions.png"
    make_sheet(folder / "pictures", sheet)
    (file,) = (folder / "evaluation").glob("*/*.json")
    metrics = json.loads(file.read_text())
    print(f"\ndemo: {(time.monotonic() - start) / 60:.1f} minutes. On held-out digits and photographs:")
    for key, name in METRICS[args.task].items():
        value = metrics[key] if args.task == "segmentation" else 100 * metrics[key]
        print(f"    {name:26s} {value:5.1f} %")
    print(f"    predictions, right of the truth                 {sheet}")
    print(f"    all of them                                     {folder / 'pictures'}")
    print(f"    learning curve                                  {folder / 'learning_curve.png'}")


if __name__ == "__main__":
    main()
