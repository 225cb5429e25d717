#!/usr/bin/env python
"""Evaluate a checkpoint on the test data that a config describes."""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.evaluator import DumpResults

from grootv.openmmlab.runtime.command_line import build_runner, load_config, make_parser


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", help="path of the checkpoint")
    parser.add_argument("--out", metavar="FILE.pkl", help="write the predictions there")
    parser.add_argument("--show-dir", metavar="FOLDER", help="draw predictions beside the ground truth, to files there")
    parser.add_argument(
        "--tta", action="store_true", help="augment at test time, with the config's tta_model and tta_pipeline"
    )
    args = parser.parse_args()
    if not Path(args.checkpoint).is_file():
        problem = "is a folder, not a file" if Path(args.checkpoint).is_dir() else "does not exist"
        parser.error(f"checkpoint {args.checkpoint} {problem}")
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        parser.error(f"--out must end in .pkl or .pickle, got {args.out}")
    return args


def test_config(args: argparse.Namespace) -> Config:
    """Load the config and apply the command line to it."""
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.show_dir:
        _draw_predictions(cfg, Path(args.show_dir).absolute())
    if args.tta:
        if "tta_model" not in cfg or "tta_pipeline" not in cfg:
            raise SystemExit(f"--tta: {args.config} has no tta_model and tta_pipeline")
        cfg.model = dict(cfg.tta_model, module=cfg.model)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    return cfg


def _draw_predictions(cfg: Config, folder: Path) -> None:
    if cfg.get("default_scope") not in ("mmdet", "mmseg"):
        raise SystemExit("--show-dir: pictures are drawn for configs of detection and segmentation only")
    cfg.custom_hooks = [*cfg.get("custom_hooks", []), {"type": "PredictionPicturesHook", "folder": str(folder)}]


def main() -> None:
    args = parse_args()
    runner = build_runner(test_config(args))
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    runner.test()


if __name__ == "__main__":
    main()
