"""Whole small runs of detectors and segmentors with the project's tools, and with those of mmdet and mmseg."""

import importlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine")

import torch
from dense_helpers import TASKS, build_runner, make_data, skip_without, write_dense_config
from mmengine.registry import init_default_scope
from PIL import Image
from training_helpers import KILLED, ROOT, environment, run_tool

from grootv.openmmlab import install_mmcv_ops

KILLER = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == int(os.environ.get("KILL_AT_ITERATION", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
"""
WITH_KILLER = """
custom_imports = dict(imports=[*_base_.custom_imports.imports, "killer"], allow_failed_imports=False)
custom_hooks = [*_base_.custom_hooks, dict(type="KillHook")]
"""
LAST = {"detection": "epoch_2.pth", "segmentation": "iter_6.pth"}


@pytest.fixture(scope="module", params=TASKS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run of tools/train.py: `task`, `folder`, `config`, `work_dir`, `log`, `checkpoint`."""
    skip_without(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "killer.py").write_text(KILLER)
    config = write_dense_config(folder, request.param, make_data(request.param, folder / "data"), WITH_KILLER)
    run_tool("train.py", config, "--work-dir", folder / "run", paths=(folder,))
    (log,) = (folder / "run").glob("*/*.log")
    checkpoint = folder / "run" / LAST[request.param]
    return SimpleNamespace(
        task=request.param, folder=folder, config=config, work_dir=log.parents[1], log=log, checkpoint=checkpoint
    )


def scalars(run: SimpleNamespace, work_dir: Path) -> list[dict]:
    lines = [
        line for path in sorted(work_dir.glob("*/vis_data/scalars.json")) for line in path.read_text().splitlines()
    ]
    return [json.loads(line) for line in lines]


def test_training_logs_evaluates_and_saves(run: SimpleNamespace) -> None:
    assert run.checkpoint.is_file()
    assert (run.work_dir / "learning_curve.png").is_file()
    entries = scalars(run, run.work_dir)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == {"detection": 8, "segmentation": 6}[run.task]
    assert all(0 < loss < 100 for loss in losses)
    metrics = {name for entry in entries for name in entry}
    assert {"detection": {"coco/bbox_mAP_50", "coco/segm_mAP_50"}, "segmentation": {"mIoU"}}[run.task] <= metrics
    assert "images_per_second" in metrics
    if run.task == "detection" and install_mmcv_ops():
        assert run.log.read_text().count("torchvision's nms and roi_align serve instead") == 1


def test_evaluation_with_augmentation_and_pictures(run: SimpleNamespace) -> None:
    folder = run.folder / "pictures"
    result = run_tool(
        "test.py", run.config, run.checkpoint, "--tta", "--show-dir", folder, "--work-dir", run.folder / "test",
        paths=(run.folder,),
    )  # fmt: skip
    assert ("coco/segm_mAP_50" if run.task == "detection" else "mIoU") in result.stdout
    pictures = sorted(folder.rglob("*.png" if run.task == "segmentation" else "*.jpg"))
    assert len(pictures) == 4
    width, height = Image.open(pictures[0]).size
    assert width == 2 * {128: 160, 160: 128}[height]  # ground truth and prediction side by side


def test_the_tools_of_the_package_run_the_config(run: SimpleNamespace) -> None:
    package = Path(importlib.import_module(TASKS[run.task]).__file__).parent
    command = [sys.executable, str(package / ".mim" / "tools" / "train.py"), str(run.config)]
    command += ["--work-dir", str(run.folder / "theirs"), "--cfg-options", "train_cfg.val_interval=100"]
    result = subprocess.run(command, env=environment(run.folder), capture_output=True, text=True, cwd=run.folder)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (run.folder / "theirs" / LAST[run.task]).is_file()


def test_a_killed_run_resumes(run: SimpleNamespace) -> None:
    work_dir = run.folder / "killed"
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(run.config), "--work-dir", str(work_dir)]
    env = {**environment(run.folder), "KILL_AT_ITERATION": "5"}
    assert subprocess.run(command, env=env, capture_output=True).returncode == KILLED
    begun = {"detection": ["epoch_1.pth"], "segmentation": ["iter_2.pth", "iter_4.pth"]}[run.task]
    assert sorted(path.name for path in work_dir.glob("*.pth")) == begun
    run_tool("train.py", run.config, "--work-dir", work_dir, "--resume", paths=(run.folder,))
    assert (work_dir / LAST[run.task]).is_file()
    steps = [
        entry["iter" if run.task == "detection" else "step"] for entry in scalars(run, work_dir) if "loss" in entry
    ]
    # The killed run logged four iterations; the second one goes on after the last checkpoint, that of the fourth.
    assert steps == [1, 2, 3, 4, *({"detection": [5, 6, 7, 8], "segmentation": [5, 6]}[run.task])]


def test_two_processes_train_and_evaluate_on_cpus(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PORT", str(free.getsockname()[1]))
    work_dir = run.folder / "two"
    length = {"detection": "train_cfg.max_epochs=1", "segmentation": "train_cfg.max_iters=2"}[run.task]
    options = ("--work-dir", work_dir, "--cfg-options", length, "train_cfg.val_interval=1")
    run_tool("dist_train.sh", run.config, 2, *options, paths=(run.folder,))
    entries = scalars(run, work_dir)
    assert sum("loss" in entry for entry in entries) == 2  # half of the iterations of an epoch, each of twice the batch
    assert any("mIoU" in entry or "coco/bbox_mAP" in entry for entry in entries)


@pytest.mark.parametrize("task", TASKS)
def test_mixed_precision_on_a_cpu(task: str, tmp_path: Path) -> None:
    skip_without(task)
    config = write_dense_config(tmp_path, task, make_data(task, tmp_path / "data"))
    changes = {"optim_wrapper.type": "AmpOptimWrapper", "optim_wrapper.loss_scale": "dynamic"}
    runner = build_runner(config, tmp_path / f"amp_{task}", **changes)
    loop = runner.build_train_loop(runner._train_loop)
    optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    dtypes = set()
    runner.model.backbone.register_forward_hook(lambda module, inputs, maps: dtypes.update(map.dtype for map in maps))
    losses = runner.model.train_step(next(iter(loop.dataloader)), optim_wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
    # The norms after a stage give float32 under autocast or the low precision, by PyTorch's own rules.
    assert type(optim_wrapper).__name__ == "CPUAmpOptimWrapper" and dtypes <= {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("task", TASKS)
def test_layer_decay_and_weight_decay_reach_the_backbone_alone(task: str, tmp_path: Path) -> None:
    skip_without(task)
    config = write_dense_config(tmp_path, task, make_data(task, tmp_path / "data"))
    runner = build_runner(config, tmp_path / f"decay_{task}", **{"optim_wrapper.paramwise_cfg.layer_decay": 0.5})
    groups = runner.build_optim_wrapper(runner.optim_wrapper).optimizer.param_groups
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    base_lr = runner.cfg.optim_wrapper.optimizer.lr
    base_decay = runner.cfg.optim_wrapper.optimizer.weight_decay
    for name, parameter in runner.model.named_parameters():
        group = group_of[id(parameter)]
        if not name.startswith("backbone."):
            assert group["lr"] == base_lr, name
        exempt = name.endswith((".bias", ".A_log", ".D_skip")) or "norm" in name.split(".")[-2] or parameter.ndim == 1
        assert group["weight_decay"] == (0 if exempt else base_decay), name
    # Four blocks of one stage each: the stem has four layers between itself and the heads.
    rates = {
        part: {
            group_of[id(p)]["lr"] for n, p in runner.model.named_parameters() if n.startswith(f"backbone.model.{part}")
        }
        for part in ("stem.", "stages.0.blocks.0.", "stages.3.blocks.0.")
    }
    backbone_lr = base_lr * {"detection": 1, "segmentation": 0.25}[task]  # the demonstration's heads learn faster
    assert rates["stages.3.blocks.0."] in ({backbone_lr * 0.5**2}, {backbone_lr * 0.5})
    assert max(rates["stem."]) < max(rates["stages.0.blocks.0."]) < max(rates["stages.3.blocks.0."])


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_falls_on_a_batch_seen_again(task: str, tmp_path: Path) -> None:
    skip_without(task)
    torch.manual_seed(0)
    config = write_dense_config(tmp_path, task, make_data(task, tmp_path / "data"))
    runner = build_runner(config, tmp_path / f"falls_{task}", **{"optim_wrapper.optimizer.lr": 5e-3})
    loop = runner.build_train_loop(runner._train_loop)
    optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    batch = next(iter(loop.dataloader))
    losses = [float(runner.model.train_step(batch, optim_wrapper)["loss"]) for _ in range(25)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("detection", "gfl_grootv-tiny_fpn_1x_coco.py"),
        ("segmentation", "grootv-tiny_segformer_8xb2-160k_ade20k-512x512.py"),
    ],
)
def test_another_head_trains_and_predicts(task: str, name: str) -> None:
    skip_without(task)
    from mmengine.config import Config
    from mmengine.registry import MODELS

    config = Config.fromfile(ROOT / "configs" / task / name)
    config.model.backbone.update(init_cfg=None, depths=(1, 1, 1, 1))
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    inputs = [torch.randint(0, 256, (3, 128, 160), dtype=torch.uint8) for _ in range(2)]
    if task == "detection":
        from mmdet.testing import demo_mm_inputs

        data = demo_mm_inputs(2, [[3, 128, 160], [3, 128, 96]], num_items=[2, 0])
    else:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        labels = [PixelData(data=torch.randint(0, 150, (1, 128, 160))) for _ in inputs]
        samples = [
            SegDataSample(gt_sem_seg=label, metainfo={"img_shape": (128, 160), "ori_shape": (128, 160)})
            for label in labels
        ]
        data = {"inputs": inputs, "data_samples": samples}
        model.data_preprocessor.size = (128, 160)
    data = model.data_preprocessor(data, training=True)
    losses = model(**data, mode="loss")
    total, _ = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    with torch.no_grad():
        predictions = model.eval()(**data, mode="predict")
    assert len(predictions) == 2
