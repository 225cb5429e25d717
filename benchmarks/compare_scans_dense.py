"""The scans side by side under a segmentor: UperNet of mmsegmentation on scenes of digits.

    python tools/make_sample_data.py data/sample
    python benchmarks/compare_scans_dense.py train --pretrained work_dirs/compare_scans --jobs 3
    python benchmarks/compare_scans_dense.py report

Runs configs/segmentation/grootv-nano_upernet_digits-128x128.py through tools/train.py for each scan and seed. What is
finished is left out, and what was stopped is continued. With `--pretrained`, backbones start from the weights that
`compare_scans.py train` left, else from random ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compare_scans import shown, the_only, trained_on, write
from report import circumstances, publish, table

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/segmentation/grootv-nano_upernet_digits-128x128.py"
SCANS = ("tree", "raster", "bidirectional", "cross")


def train(scan: str, seed: int, args: argparse.Namespace) -> None:
    """A file for a scan and a seed with the last evaluation, unless it is there."""
    path = args.work_dir / f"{scan}-{seed}.json"
    if path.exists():
        return
    folder = args.work_dir / f"{scan}-{seed}"
    roots = [f"{split}_dataloader.dataset.data_root={args.data.resolve()}" for split in ("train", "val", "test")]
    options = [f"model.backbone.scan={scan}", f"randomness.seed={seed}", *roots, *args.cfg_options]
    if args.pretrained:
        weights = (args.pretrained / f"{scan}.pth").resolve()
        options += ["model.backbone.init_cfg.type=Pretrained", f"model.backbone.init_cfg.checkpoint={weights}"]
    command = [sys.executable, ROOT / "tools/train.py", CONFIG, "--work-dir", folder, "--resume"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("a") as log:
        subprocess.run([*command, "--cfg-options", *options], check=True, stdout=log, stderr=subprocess.STDOUT)
    lines = [line for file in sorted(folder.glob("*/vis_data/scalars.json")) for line in file.read_text().splitlines()]
    last = [entry for entry in map(json.loads, lines) if "mIoU_objects" in entry][-1]
    result = {"scan": scan, "seed": seed, "digits": last["mIoU_objects"], "all": last["mIoU"], "steps": last["step"]}
    result |= {"pretrained": bool(args.pretrained), "circumstances": circumstances(args.commit)}
    write(path, result)
    print(f"{scan}, seed {seed}: {result['digits']:.2f} % and {result['all']:.2f} %", flush=True)


def train_all(args: argparse.Namespace) -> None:
    """Every scan and seed, seed by seed, so that an interrupted run has whole columns."""
    tasks = [(scan, seed) for seed in range(args.seeds) for scan in args.scans]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda task: train(*task, args), tasks))


def report(args: argparse.Namespace) -> None:
    """benchmarks/results/scans-dense-MACHINE.md, with its figures as .json."""
    runs = [json.loads(path.read_text()) for path in sorted(args.work_dir.glob("*-[0-9].json"))]
    steps, pretrained = the_only([(run["steps"], run["pretrained"]) for run in runs], "recipes")
    rows = []
    for scan in SCANS:
        found = [run for run in runs if run["scan"] == scan]
        if found:
            rows.append([scan, *(shown([run[key] for run in found]) for key in ("digits", "all")), len(found)])
    start = "the weights of its row in the comparison on emoji" if pretrained else "random weights"
    text = (
        "mIoU, as mean and standard error over the seeds, of UperNet on GrootV-Nano, scenes of digits on photographs, "
        f"after {steps} steps of 8 images of 128 × 128. The backbone starts from {start}. "
        f"{trained_on(runs)}"
    )
    head = ["scan", "mIoU over the ten digits, %", "mIoU with the background, %", "seeds"]
    command = "python benchmarks/compare_scans_dense.py train"
    sections = [textwrap.fill(text, 120), table(head, rows)]
    measured = runs[0]["circumstances"]
    path = publish("Scans side by side under UperNet", "scans-dense", sections, command, measured=measured)
    write(path.with_suffix(".json"), {"runs": runs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    trainer = commands.add_parser("train", help="train every scan with every seed")
    trainer.add_argument("--data", type=Path, default=Path("data/sample/ade"), help="folder of the scenes")
    trainer.add_argument("--scans", nargs="+", default=list(SCANS), choices=SCANS)
    trainer.add_argument("--seeds", type=int, default=3)
    trainer.add_argument("--pretrained", type=Path, help="--work-dir of compare_scans.py")
    trainer.add_argument("--jobs", type=int, default=1, help="processes beside each other")
    trainer.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="replace entries of the config"
    )
    trainer.add_argument("--commit", help="the commit to name in the results, where it cannot be asked from git")
    for command in (trainer, commands.add_parser("report", help="table and figures")):
        command.add_argument("--work-dir", type=Path, default=Path("work_dirs/compare_scans_dense"))
    args = parser.parse_args()
    {"train": train_all, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
