"""Find missing files of a data set before training starts, not hours later."""

from __future__ import annotations

import logging
import os

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class DataFilesHook(Hook):
    """Check before training that every image and label file that the annotations name exists and is not empty.

    For mmdet's and mmseg's data sets, and all others with `get_data_info`. The first process checks for all processes;
    the 118,000 images of COCO take some seconds. Only paths on the local disk are checked.

    mmseg's data sets list the images with one suffix, `img_suffix`; the hook warns of other files beside them.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the training and the validation data.

        Raises:
            FileNotFoundError: files are missing or empty; the message names the first of them.
        """
        if runner.rank != 0:
            return
        _check(runner.train_dataloader.dataset, "train_dataloader")
        if runner.val_loop is not None:
            _check(runner.val_dataloader.dataset, "val_dataloader")


def _check(dataset: object, loader: str) -> None:
    if not hasattr(dataset, "get_data_info"):
        return
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    paths = (info.get(key) for info in infos for key in ("img_path", "seg_map_path"))
    bad = [path for path in paths if path and "://" not in path and not _has_content(path)]
    if bad:
        raise FileNotFoundError(
            f"{loader}: {len(bad)} files that the annotations name are missing or empty: {', '.join(bad[:5])}"
        )
    suffix, folder = getattr(dataset, "img_suffix", None), getattr(dataset, "data_prefix", {}).get("img_path")
    if suffix and folder and os.path.isdir(folder) and not getattr(dataset, "ann_file", ""):
        others = sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
        others = [path for path in others if not path.endswith(suffix)]
        if others:
            print_log(
                f"{loader}: {len(others)} files in {folder} do not end in img_suffix={suffix!r} and are left out, "
                f"the first: {others[0]}",
                logger="current",
                level=logging.WARNING,
            )


def _has_content(path: str) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) > 0
