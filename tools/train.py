#!/usr/bin/env python
"""Train what a config describes: a classifier, a detector or a segmentor."""

import argparse

from mmengine.config import Config

from grootv.openmmlab.runtime.command_line import build_runner, load_config, make_parser


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="continue a run: from CHECKPOINT, or by default from the last intact one in the work directory",
    )
    parser.add_argument("--amp", action="store_true", help="train in mixed precision")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate with the total batch, if the config does not do so already",
    )
    return parser.parse_args()


def training_config(args: argparse.Namespace) -> Config:
    """Load the config and apply the command line to it."""
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise SystemExit(f"--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size")
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
    return cfg


if __name__ == "__main__":
    build_runner(training_config(parse_args())).train()
