"""Classification configs: they contain the published recipe, and describe models that can be built."""

from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import timm
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS
from training_helpers import ROOT

import grootv.openmmlab  # noqa: F401  registers what the configs name
from grootv.layers.path_ssm import PATH_SCANS
from grootv.layers.tree_ssm import ROOTS
from grootvl_ops import METRICS

IN1K = sorted((ROOT / "configs/classification").glob("*_in1k.py"))
DROP_PATH = {
    "grootv_tiny": 0.1,
    "grootv_small": 0.3,
    "grootv_base": 0.5,
    "vmamba_tiny_s1l8": 0.2,
    "vmamba_small_s1l20": 0.3,
    "vmamba_base_s1l20": 0.5,
    "vmamba_tiny_s2l5": 0.2,
    "vmamba_small_s2l15": 0.3,
    "vmamba_base_s2l15": 0.6,
}


@pytest.mark.parametrize("path", IN1K, ids=lambda path: path.stem)
def test_imagenet_recipe_is_the_published_one(path: Path) -> None:
    cfg = Config.fromfile(path)
    backbone = cfg.model.backbone
    assert path.stem.startswith(backbone.model_name.replace("_", "-"))
    assert backbone.drop_path_rate == DROP_PATH[backbone.model_name]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-3, 0.05)
    assert cfg.auto_scale_lr == {"enable": True, "base_batch_size": 1024} and cfg.train_dataloader.batch_size == 128
    assert cfg.optim_wrapper.clip_grad.max_norm == 5.0 and cfg.train_cfg.max_epochs == 300
    mixup = cfg.model.data_preprocessor.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert mixup.label_smoothing == 0.1
    assert cfg.model.data_preprocessor.random_erasing == {"probability": 0.25, "mode": "pixel"}
    transform = cfg.train_dataloader.dataset.transform
    assert transform.auto_augment == "rand-m9-mstd0.5-inc1" and transform.interpolation == "bicubic"
    validation = cfg.val_dataloader.dataset.transform
    assert validation.input_size / validation.crop_pct == 256
    assert [hook.momentum for hook in cfg.custom_hooks if hook.type == "EMAHook"] == [1e-4]


@pytest.mark.parametrize("path", [*IN1K, ROOT / "configs/classification/grootv-nano_digits.py"], ids=lambda p: p.stem)
def test_configs_build_their_models(path: Path) -> None:
    cfg = Config.fromfile(path)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert model.num_classes == cfg.model.backbone.num_classes


def test_the_ablation_differs_in_one_argument() -> None:
    """Each row has the recipe and the parameters of the model that it is a row of, and one argument of its own."""
    tiny = Config.fromfile(ROOT / "configs/classification/grootv-tiny_8xb128_in1k.py")
    options = {}
    for path in IN1K:
        name = path.stem.removesuffix("_8xb128_in1k").removeprefix("grootv-tiny-")
        if path.stem.startswith("grootv-tiny-"):
            cfg = Config.fromfile(path)
            backbone = cfg.model.backbone
            options[name] = {key: backbone.pop(key) for key in backbone.keys() - tiny.model.backbone.keys()}
            assert cfg.to_dict() == tiny.to_dict()
    assert options == {
        **{scan: {"scan": scan} for scan in PATH_SCANS},
        **{metric: {"metric": metric} for metric in METRICS if metric != "cosine"},
        **{f"root-{root}": {"root": root} for root in ROOTS if root != "all"},
        "tree-per-stage": {"tree_per": "stage"},
    }


def test_every_size_is_there() -> None:
    assert {Config.fromfile(path).model.backbone.model_name for path in IN1K} == DROP_PATH.keys()


def test_metafile_names_every_imagenet_config_with_its_size() -> None:
    models = yaml.safe_load((ROOT / "configs/classification/metafile.yml").read_text())["Models"]
    assert sorted(ROOT / model["Config"] for model in models) == IN1K
    for model in models:
        backbone = Config.fromfile(ROOT / model["Config"]).model.backbone
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in timm.create_model(**backbone).parameters())
        assert model["Metadata"]["Parameters"] == count
