"""What the command lines of tools/train.py and tools/test.py share."""

import argparse
import importlib
import os
import pickle
import time
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner as MMEngineRunner

from grootv.models.safe_loading import TRUST_VARIABLE

from .runner import Runner


class OptionsAction(argparse.Action):
    """Collect `KEY=VALUE` arguments in a dict.

    A value is a number, true, false, None, a list `[A, B]` or `A,B`, a tuple `(A, B)`, or text, which keeps its spaces.
    Quotes around a value are removed.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        options = dict(getattr(namespace, self.dest) or {})
        for value in values:
            key, equals, text = value.partition("=")
            if not key or not equals:
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {value!r}")
            options[key] = _parse_value(text)
        setattr(namespace, self.dest, options)


def _parse_value(text: str) -> Any:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]:
        text = text[1:-1]
    if text[:1] + text[-1:] in ("[]", "()"):
        items = [_parse_value(item) for item in _split(text[1:-1])]
        return tuple(items) if text[0] == "(" else items
    items = _split(text)
    if len(items) > 1:
        return [_parse_value(item) for item in items]
    if text == "None":
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _split(text: str) -> list[str]:
    """The parts of `text` between the commas outside of brackets; none for empty text or behind a last comma."""
    items, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return items if items[-1].strip() else items[:-1]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the config and the options that every run has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="path of the config")
    parser.add_argument("--work-dir", help="where logs and checkpoints go; default: work_dirs/<name of the config>")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=OptionsAction,
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
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="let checkpoints and pickles run any code that is in them; needed for old files with objects that are not "
        "plain data. Only for files of people whose programs you would run",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const=True,
        choices=["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        metavar="MODE",
        help="compile the backbone with torch.compile, in MODE or as the config's `compile` says",
    )
    # Some versions of torchrun pass this option.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """Load the config and apply the options of `make_parser` to it and to the environment."""
    if args.trust_checkpoint:
        os.environ[TRUST_VARIABLE] = "1"
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    cfg.merge_from_dict(args.cfg_options)
    if args.compile:
        cfg.compile = cfg.get("compile") or True
    if isinstance(args.compile, str):
        cfg.compile = {**(cfg.compile if isinstance(cfg.compile, dict) else {}), "mode": args.compile}
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
    return cfg


def build_runner(cfg: Config) -> MMEngineRunner:
    """Build the runner that `cfg.runner_type` names, or by default this project's `Runner`."""
    import_yapf()
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


def import_yapf(seconds: float = 10.0) -> None:
    """Import yapf, with which mmengine writes a config; wait while a file that it reads is not whole.

    The first import in an environment writes yapf's grammar to the user's cache. Processes that start at the same time,
    one for each GPU, may read this file too early.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            importlib.import_module("yapf")
            return
        except (EOFError, pickle.UnpicklingError):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
