"""Training steps of detectors and segmentors, in this process."""

from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import torch
from dense_helpers import TASKS, build_runner, make_data, skip_without, write_dense_config
from mmengine.registry import init_default_scope
from training_helpers import ROOT


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
    # Under autocast the norms after a stage give float32 or bfloat16, by PyTorch's own rules.
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
        # In the published code the decay's logarithm and the step's bias have two dimensions, so they decay.
        decays = name.endswith((".A_log", ".dt_proj.bias"))
        exempt = not decays and (name.endswith((".bias", ".D_skip")) or parameter.ndim == 1)
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
