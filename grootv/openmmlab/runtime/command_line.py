"""What the command lines of tools/train.py and tools/test.py share."""

import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner as MMEngineRunner

from .runner import Runner


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the config and the options that every run has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="path of the config")
    parser.add_argument("--work-dir", help="where logs and checkpoints go; default: work_dirs/<name of the config>")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="replace entries of the config, e.g. train_dataloader.batch_size=64 or list='[1,2]'",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes of a distributed run were started",
    )
    # Some versions of torchrun pass this option.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """Load the config and apply the options of `make_parser` to it; set LOCAL_RANK if the launcher did not."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
    return cfg


def build_runner(cfg: Config) -> MMEngineRunner:
    """Build the runner that `cfg.runner_type` names, or by default this project's `Runner`."""
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
