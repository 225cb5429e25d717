"""Errors while data are read name the file, which the readers of mmdet and mmseg do not always do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mmengine.dataset import Compose


class FileNamingPipeline(Compose):
    """A data set's pipeline whose errors name the image and the segmentation map that it was reading.

    Args:
        pipeline: the pipeline; its transforms are used, not copied.
    """

    def __init__(self, pipeline: Compose) -> None:
        self.transforms = pipeline.transforms

    def __call__(self, data: dict) -> dict | None:
        """Apply the transforms.

        Raises:
            RuntimeError: a transform raised an error whose message has no path of the image's files.
        """
        files = [str(data[key]) for key in ("img_path", "seg_map_path") if data.get(key)]
        try:
            return super().__call__(data)
        except Exception as error:
            if not files or any(file in str(error) for file in files):
                raise
            raise RuntimeError(f"{' with '.join(files)}: {type(error).__name__}: {error}") from error


def name_files(dataset: object) -> None:
    """Give a data set of mmengine's kind, and all that it wraps, a `FileNamingPipeline`."""
    if type(getattr(dataset, "pipeline", None)) is Compose:
        dataset.pipeline = FileNamingPipeline(dataset.pipeline)
    for part in (getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())):
        if part is not None:
            name_files(part)


@contextmanager
def naming_annotations(config: object) -> Iterator[None]:
    """Errors within the block name the annotation files (`ann_file`) of a config.

    Raises:
        RuntimeError: instead of an error whose message has none of them.
    """
    try:
        yield
    except Exception as error:
        files = list(_annotation_files(config))
        if not files or any(file in str(error) for file in files):
            raise
        raise RuntimeError(f"annotations {', '.join(files)}: {type(error).__name__}: {error}") from error


def _annotation_files(config: object) -> Iterator[str]:
    if isinstance(config, Mapping):
        file = config.get("ann_file")
        if file and isinstance(file, str):
            yield os.path.join(config.get("data_root") or "", file)
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for part in config:
            yield from _annotation_files(part)
