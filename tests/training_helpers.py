"""A small data set, a small config and ways to run the tools on them, for the tests of training."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
CLASSES = ("circle", "square", "stripes")


def write_images(root: Path, split: str, per_class: int, seed: int, classes: tuple[str, ...] = CLASSES) -> None:
    """Write PNG files of 32x32 pixels to `root/split/<class>/`: each class has its own colour, under noise."""
    generator = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 120, (32, 32, 3))
            pixels[..., label % 3] += 130
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


CONFIG = """
_base_ = ["{root}/configs/classification/_base_/runtime.py"]
model = dict(
    type="TimmClassifier",
    backbone=dict(model_name="grootv_nano", num_classes=3, dims=(8, 16), depths=(1, 1), drop_path_rate=0.2),
    data_preprocessor=dict(
        type="ImagePreprocessor",
        random_erasing=dict(probability=0.5, mode="pixel"),
        mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=3),
    ),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageClassificationDataset",
        root="{data}",
        split="train",
        is_training=True,
        transform=dict(input_size=32, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic"),
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageClassificationDataset", root="{data}", split="val", transform=dict(input_size=32, crop_pct=1.0)
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="TopKAccuracy", topk=(1, 2))
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=1)
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay=0.9),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=1, end=3, convert_to_iter_based=True),
]
custom_hooks = [*_base_.custom_hooks, dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1)]
default_hooks = dict(logger=dict(interval=2))
"""


def write_config(folder: Path, data: Path, extra: str = "") -> Path:
    """Write a config that trains a two-stage GrootV on `data` for three epochs; `extra` is appended to it."""
    path = folder / "small.py"
    path.write_text(CONFIG.format(root=ROOT, data=data) + extra)
    return path


def environment(*extra_paths: Path, gpu: bool = False) -> dict[str, str]:
    """Environment for a tool: this source tree, one thread, and no GPU unless `gpu`."""
    paths = [str(path) for path in (*extra_paths, ROOT)]
    # If the operations are not installed, they are imported from the source tree too.
    paths += [path for path in sys.path if path.endswith("ops")] + [os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
    }


def run_tool(
    *arguments: object, paths: tuple[Path, ...] = (), code: int | None = 0, gpu: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `tools/<first argument>` and check its exit code (None: any failure); output and errors are in `stdout`."""
    command = [str(ROOT / "tools" / str(arguments[0])), *map(str, arguments[1:])]
    if command[0].endswith(".py"):
        command.insert(0, sys.executable)
    try:
        result = subprocess.run(
            command,
            env=environment(*paths, gpu=gpu),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"no end after {error.timeout} s\n{(error.stdout or b'').decode()[-6000:]}") from None
    good = result.returncode != 0 if code is None else result.returncode == code
    assert good, f"exit code {result.returncode}\n{result.stdout[-6000:]}"
    return result


def run_python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter; its search path begins with `paths`."""
    return subprocess.run([sys.executable, "-c", code], env=environment(*paths), capture_output=True, text=True)


KILLED = -signal.SIGKILL
