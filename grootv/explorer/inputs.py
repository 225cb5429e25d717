"""Images, models and weights for the views. What cannot be used is an error with a sentence that says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor

import grootv  # noqa: F401  registers the models
from grootv.images import to_rgb
from grootv.models.checkpoint import backbone_weights, official_to_own, unwrap
from grootv.models.grootv import SCANS
from grootv.models.safe_loading import read_checkpoint

MAX_PIXELS = 4_000_000
MAX_FILE_PIXELS = 100_000_000
MIN_SIDE = 32
"""Pixels of the shorter side of a model's input."""
SAMPLES = {
    "china": "Summer palace",
    "flower": "Flower",
    "chelsea": "Cat",
    "coffee": "Coffee",
    "astronaut": "Astronaut",
}
MODELS = tuple(timm.list_models(["grootv_*", "vmamba_*"]))
RANDOM = "random weights: this shows the model before any training"


def read_image(source: str | Path) -> tuple[np.ndarray, list[str]]:
    """An image of any aspect ratio as (H, W, 3) uint8, and what was done to it, in sentences.

    Args:
        source: One of `SAMPLES`, or the path of a file. Files of more than `MAX_PIXELS` pixels are made smaller.

    Raises:
        ValueError: it is damaged, no image, or larger than `MAX_FILE_PIXELS` pixels.
        OSError: the file cannot be read.
        ImportError: the package of the sample is not installed.
    """
    if str(source) in SAMPLES:
        return _sample(str(source)), []
    name = Path(source).name
    try:
        with Image.open(source) as file:
            width, height = file.size
            if width * height > MAX_FILE_PIXELS:
                raise ValueError(
                    f"The image {name} has {width} × {height} pixels. At most {MAX_FILE_PIXELS // 10**6} megapixels "
                    "are read: make it smaller first."
                )
            image = to_rgb(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"The image {name} is too large: make it smaller first.") from error
    except ValueError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"The image {name} does not exist. Samples are {', '.join(SAMPLES)}.") from error
    except Exception as error:  # Pillow's readers raise almost anything for wrong bytes
        raise ValueError(f"The image {name} cannot be read: it is damaged, or no image file.") from error
    size = image.size
    smaller = _limit(*size)
    if smaller == size:
        return np.asarray(image), []
    note = (
        f"The image has {size[0]} × {size[1]} pixels. It was made smaller, to {smaller[0]} × {smaller[1]} "
        f"({MAX_PIXELS // 10**6} megapixels)."
    )
    return np.asarray(image.resize(smaller, Image.Resampling.LANCZOS, reducing_gap=2)), [note]


def _limit(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, (MAX_PIXELS / (width * height)) ** 0.5)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _sample(name: str) -> np.ndarray:
    package = "scikit-learn" if name in ("china", "flower") else "scikit-image"
    try:
        if package == "scikit-learn":
            from sklearn.datasets import load_sample_image

            return load_sample_image(f"{name}.jpg")
        import skimage.data

        return getattr(skimage.data, name)()
    except ImportError as error:
        raise ImportError(f"The sample {name} needs {package}: pip install {package}") from error


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model with what is needed to use it."""

    net: Any
    classes: Sequence[str]
    mean: Tensor
    std: Tensor
    title: str
    notes: tuple[str, ...]

    def prepare(self, image: np.ndarray, size: int) -> Tensor:
        """The model's input (1, 3, H, W) of an image: about `size`² pixels of the image's aspect ratio, normalised."""
        resized = Image.fromarray(image).resize(self.input_size(image, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255
        return (pixels - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    @staticmethod
    def input_size(image: np.ndarray, size: int) -> tuple[int, int]:
        """Width and height of the input; sides of less than `MIN_SIDE` pixels become as long as this."""
        height, width = image.shape[:2]
        scale = size / (height * width) ** 0.5
        # The other side of very long images is limited too: work is bounded whatever the aspect ratio.
        return tuple(min(max(round(side * scale), MIN_SIDE), size**2 // MIN_SIDE) for side in (width, height))


def load_classifier(model: str, weights: str = "", scan: str = "tree") -> Classifier:
    """A model of this project with weights from a file or a training run's folder, or with random ones.

    Args:
        model: Its name in timm's registry, one of `MODELS`.
        weights: A file in any format that `docs/checkpoints.md` names, or the folder of a run of `tools/train.py`,
            whose config then says which model it is. Empty for random weights, always the same.
        scan: Of a GrootV. A file does not tell it.

    Raises:
        ValueError: an unknown model, a scan for VMamba, weights that do not fit, a folder of no classifier.
        CheckpointError: the file is damaged, or not plain data.
        OSError: the file cannot be read.
        ImportError: a run's folder, but mmengine is not installed.
    """
    if model not in MODELS:
        raise ValueError(f"The model {model!r} does not exist. Models are {', '.join(MODELS)}.")
    if scan not in SCANS:
        raise ValueError(f"The scan {scan!r} does not exist. Scans are {', '.join(SCANS)}.")
    if not weights:
        return _load(model, "", scan, 0)
    path = Path(weights).expanduser()
    if not path.exists():
        raise ValueError(f"The file or folder {weights} does not exist.")
    return _load(model, str(path), scan, path.stat().st_mtime_ns)


@lru_cache(maxsize=3)
def _load(model: str, weights: str, scan: str, changed: int) -> Classifier:
    """`changed`, the time when the weights were written, makes a new entry of the cache for new weights."""
    arguments: dict[str, Any] = {"model_name": model}
    if not model.startswith("vmamba"):
        arguments["scan"] = scan
    statistics: dict[str, Sequence[float]] = {}
    if weights and Path(weights).is_dir():
        weights, arguments, statistics = _read_run(Path(weights))
    net: Any
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if weights:
            content = read_checkpoint(weights)
            net, names = _fill(arguments, content, Path(weights).name)
        else:
            net, names = timm.create_model(**arguments), None
    own = net.pretrained_cfg
    mean, std = (torch.tensor(statistics.get(key, own[key])) for key in ("mean", "std"))
    of = "random weights" if not weights else Path(weights).name
    notes = () if weights else (f"{arguments['model_name']} has {RANDOM}.",)
    net = net.eval().requires_grad_(False)
    title = f"{arguments['model_name']}{_scan_of(arguments)}, {of}"
    return Classifier(net, names or _class_names(net.num_classes), mean, std, title, notes)


def _scan_of(arguments: dict) -> str:
    scan = arguments.get("scan", "tree")
    return "" if scan == "tree" else f" ({scan})"


def _fill(arguments: dict, content: dict, name: str) -> tuple[Any, Sequence[str] | None]:
    """A model with the weights in a file, and the names of its classes if the file has them."""
    try:
        own = {official_to_own(key): value for key, value in backbone_weights(content).items()}
    except ValueError as error:
        raise ValueError(f"{name} has no weights of GrootV or VMamba ({error}).") from error
    classifier = own.get("head.fc.weight")
    num_classes = arguments.get("num_classes", 1000) if classifier is None else len(classifier)
    try:
        net = timm.create_model(
            **{**arguments, "num_classes": num_classes, "in_chans": own["stem.conv1.weight"].shape[1]},
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": unwrap(content), "num_classes": num_classes},
        )
    except RuntimeError as error:
        raise ValueError(f"{name} does not fit {arguments['model_name']}: {_short(error)}.") from error
    if net.in_chans != 3:
        raise ValueError(f"{name} is of a model for images of {net.in_chans} channels. The explorer has three.")
    classes = (content.get("meta") or {}).get("dataset_meta", {}).get("classes")
    return net, classes if classes and len(classes) == num_classes else None


def _short(error: Exception, length: int = 240) -> str:
    """The end of an error's message that says why, not longer than a sentence or two."""
    text = " ".join(str(error).split()).split("does not fit the model: ")[-1].rstrip(".")
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0].rstrip(',')} and others"


def _read_run(folder: Path) -> tuple[str, dict, dict]:
    """Weights, timm's arguments, and mean and standard deviation of the classifier that a run trained."""
    try:
        from mmengine.config import Config

        from grootv.openmmlab.runtime.checkpoints import find_intact_checkpoint
    except ImportError as error:
        raise ImportError(f"A training run's folder needs mmengine ({error}): pip install 'grootv[train]'") from error
    configs = sorted(folder.glob("*.py"))
    if len(configs) != 1:
        raise ValueError(f"{folder} is no training run's folder: it has {len(configs)} configs (*.py) instead of one.")
    model = Config.fromfile(configs[0]).get("model", {})
    if model.get("type") != "TimmClassifier":
        raise ValueError(f"{folder} is the run of a {model.get('type', 'nothing')}, not of a classifier.")
    weights = folder / "timm_weights.pth"
    weights = weights if weights.exists() else find_intact_checkpoint(folder)
    if weights is None:
        raise ValueError(f"{folder} has no checkpoint yet.")
    arguments = {key: value for key, value in model.backbone.items() if key != "drop_path_rate"}
    preprocessor = model.get("data_preprocessor") or {}
    return str(weights), arguments, {key: preprocessor[key] for key in ("mean", "std") if key in preprocessor}


def _class_names(count: int) -> list[str]:
    if count == 1000:
        info = ImageNetInfo()
        return [str(info.index_to_description(index)) for index in range(count)]
    return [f"class {index}" for index in range(count)]
