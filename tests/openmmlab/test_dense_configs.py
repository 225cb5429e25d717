"""Detection and segmentation configs: they contain the published recipe and describe models that can be built."""

from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import torch
import yaml
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from model_helpers import VMAMBA_NAMES
from training_helpers import ROOT

from grootv.models.checkpoint import official_to_own

CONFIGS = sorted((ROOT / "configs" / "detection").glob("*.py")) + sorted(
    (ROOT / "configs" / "segmentation").glob("*.py")
)
VMAMBA = ("tiny-s1l8", "tiny-s2l5", "small-s2l15", "base-s2l15")
PACKAGES = {"detection": "mmdet", "segmentation": "mmseg"}
# Channels of the first stage, and drop path.
SIZES = {
    "GrootV nano": (32, 0.0),
    "GrootV tiny": (80, 0.2),
    "GrootV small": (96, 0.3),
    "GrootV base": (128, 0.6),
    "VMamba tiny_s1l8": (96, 0.2),
    "VMamba tiny_s2l5": (96, 0.2),
    "VMamba small_s2l15": (96, 0.3),
    "VMamba base_s2l15": (128, 0.6),
}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Config:
    pytest.importorskip(PACKAGES[request.param.parent.name])
    return Config.fromfile(request.param)


def test_the_model_builds_with_heads_that_fit_the_backbone(config: Config) -> None:
    init_default_scope(config.default_scope)
    config.model.backbone.init_cfg = None
    with torch.device("meta"):
        model = MODELS.build(config.model)
    backbone = config.model.backbone
    dim, drop_path_rate = SIZES[f"{backbone.type} {backbone.arch}"]
    assert f"{backbone.type}-{backbone.arch}_".lower().replace("_", "-") in f"{config.filename}_".replace("_", "-")
    assert backbone.drop_path_rate == drop_path_rate
    assert model.backbone.out_channels[-1] == 8 * dim
    takers = [model.neck.in_channels] if config.default_scope == "mmdet" else [model.decode_head.in_channels]
    assert [tuple(channels) for channels in takers] == [model.backbone.out_channels]
    if getattr(model, "auxiliary_head", None) is not None:
        assert model.auxiliary_head.in_channels == 4 * dim


def test_it_prints_completely_and_carries_nothing_of_another_backbone(config: Config) -> None:
    text = config.pretty_text
    assert Config.fromstring(text, ".py").to_dict() == config.to_dict()
    # Values of the base configs that must be replaced.
    for foreign in ("resnet", "ResNet", "torchvision://", "open-mmlab://", "SGD", "swin", "_delete_", "_scope_"):
        assert foreign not in text


def test_the_published_recipe(config: Config) -> None:
    if "digits" in config.filename:
        pytest.skip("the recipe of a demonstration")
    optimizer, steps = config.optim_wrapper.optimizer, config.train_dataloader.batch_size
    assert optimizer.type == "AdamW"
    assert steps * 8 == 16  # images per process on 8 GPUs
    warm_up, decay = config.param_scheduler
    if config.default_scope == "mmdet":
        epochs = 36 if "-3x_" in config.filename else 12
        assert config.train_cfg.max_epochs == decay.end == epochs
        assert (optimizer.lr, optimizer.weight_decay) == (1e-4, 0.05)
        assert decay.milestones == [epochs * 2 // 3 if epochs == 12 else 27, epochs - epochs // 12]
        resizes = [step for step in config.train_dataloader.dataset.pipeline if step.type == "RandomChoice"]
        assert len(resizes) == (epochs == 36)
    else:
        assert config.train_cfg.max_iters == decay.end == 160000
        assert (optimizer.lr, optimizer.weight_decay) == (6e-5, 0.01)
        warm_up_end, start = (1600, 1e-6) if config.model.backbone.type == "GrootV" else (1500, 6e-11)
        assert warm_up.end == decay.begin == warm_up_end
        assert warm_up.start_factor * optimizer.lr == pytest.approx(start)
        assert (decay.type, decay.power) == ("PolyLR", 1.0)
        assert config.model.data_preprocessor.size == (512, 512)


def test_weight_decay_of_vmamba_is_off_where_an_official_name_contains_norm() -> None:
    pytest.importorskip("mmdet")
    config = Config.fromfile(ROOT / "configs/detection/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py")
    init_default_scope("mmdet")
    config.model.backbone.init_cfg = None
    with torch.device("meta"):
        model = MODELS.build(config.model)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    official = {name for name in VMAMBA_NAMES["vssm1_tiny_0230s"] if not name.startswith("classifier.")}
    official |= {f"outnorm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    parameters = dict(model.backbone.model.named_parameters())
    assert parameters.keys() == {official_to_own(name) for name in official}
    for name in official:
        assert decay[id(parameters[official_to_own(name)])] == (0 if "norm" in name else 0.05), name
    heads = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    assert {decay[id(p)] for p in heads} == {0.05}


@pytest.mark.parametrize("task", PACKAGES)
def test_every_size_and_schedule_is_there(task: str) -> None:
    names = {path.stem for path in CONFIGS if path.parent.name == task}
    if task == "detection":
        schedules = ("1x", "ms-crop-3x")
        expected = {f"mask-rcnn_grootv-{s}_fpn_{x}_coco" for s in ("tiny", "small", "base") for x in schedules}
        expected |= {f"mask-rcnn_vmamba-{size}_fpn_{x}_coco" for size in VMAMBA[:3] for x in schedules}
        expected.add(f"mask-rcnn_vmamba-{VMAMBA[3]}_fpn_1x_coco")
    else:
        expected = {f"grootv-{size}_upernet_8xb2-160k_ade20k-512x512" for size in ("tiny", "small", "base")}
        expected |= {f"vmamba-{size}_upernet_8xb2-160k_ade20k-512x512" for size in VMAMBA}
    assert expected <= names


@pytest.mark.parametrize("task", PACKAGES)
def test_metafile_lists_the_configs_and_marks_published_figures(task: str) -> None:
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    assert f"configs/{task}/metafile.yml" in index["Import"]
    content = yaml.safe_load((ROOT / "configs" / task / "metafile.yml").read_text())
    collections = {collection["Name"] for collection in content["Collections"]}
    assert {ROOT / model["Config"] for model in content["Models"]} == {p for p in CONFIGS if p.parent.name == task}
    for model in content["Models"]:
        assert model["Name"] == Path(model["Config"]).stem
        assert model.get("In Collection", next(iter(collections))) in collections
        for result in model.get("Results", []):
            assert all("published" in name for name in result["Metrics"])
