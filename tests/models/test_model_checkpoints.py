"""Loading released checkpoints, and saving and loading our own."""

import argparse
import logging
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from model_helpers import OFFICIAL_NAMES, official_names, official_state, shrink, vmamba_names
from packaging.version import Version
from timm.models._hub import save_for_hf

from grootv.models import GrootV, checkpoint_filter_fn
from grootv.models.released import RELEASES

# GrootV-Tiny in small.
SMALL = {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1)}


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return official_state(shrink(OFFICIAL_NAMES["grootv_tiny"], **SMALL, num_classes=1000))


def load(path: Path | str, **kwargs) -> GrootV:
    overlay = {"file": str(path)}
    return timm.create_model("grootv_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **kwargs)


def spot_check(model: GrootV, official: dict[str, torch.Tensor], head: bool = True) -> None:
    """Some parameters of each kind, by hand."""
    mixer, source = model.stages[2].blocks[1].mixer, "levels.2.blocks.1.TreeSSM"
    pairs = [
        (model.stem.norm1.bias, official["patch_embed.norm1.1.bias"]),
        (model.stem.conv2.weight, official["patch_embed.conv2.weight"]),
        (model.stages[0].norm.weight, official["levels.0.norm.0.weight"]),
        (model.stages[1].downsample.conv.weight, official["levels.0.downsample.conv.weight"]),
        (model.stages[3].downsample.norm.bias, official["levels.2.downsample.norm.1.bias"]),
        (model.stages[2].blocks[1].norm2.weight, official["levels.2.blocks.1.norm2.0.weight"]),
        (model.stages[2].blocks[1].mlp.fc1.bias, official["levels.2.blocks.1.mlp.fc1.bias"]),
        (mixer.x_proj.weight, official[f"{source}.x_proj_weight"][0]),
        (mixer.dt_proj.weight, official[f"{source}.dt_projs_weight"][0]),
        (mixer.dt_proj.bias, official[f"{source}.dt_projs_bias"][0]),
        (mixer.A_log, official[f"{source}.A_logs"][:, 0]),
        (mixer.D_skip, official[f"{source}.Ds"]),
        (mixer.conv.weight, official[f"{source}.conv2d.weight"]),
        (mixer.h_norm.weight, official[f"{source}.h_norm.weight"]),
        (mixer.out_norm.weight, official[f"{source}.out_norm.weight"]),
    ]
    if head:
        pairs += [
            (model.head.conv.weight, official["conv_head.0.weight"]),
            (model.head.norm.running_var, official["conv_head.1.0.running_var"]),
        ]
    for actual, expected in pairs:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("size", RELEASES)
def test_every_official_name_is_converted(size):
    model = timm.create_model(size, device="meta")
    official = {name: torch.empty(shape, device="meta") for name, shape in official_names(size).items()}
    converted = checkpoint_filter_fn(official, model)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in converted.items()} == expected


def other(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that must not be taken, because better ones are in the same file."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


WRAPPINGS = {
    "alone": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 300, "args": argparse.Namespace(lr=1e-3)},
    "state_dict": lambda s: {"state_dict": s, "optimizer": {"param_groups": []}},
    "DistributedDataParallel": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "torch.compile": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "EMA beside model": lambda s: {"model": other(s), "model_ema": s},
    "EMA beside state_dict": lambda s: {
        "state_dict": other(s),
        "state_dict_ema": {f"module.{k}": v for k, v in s.items()},
    },
    "several prefixes": lambda s: {"model": {f"_orig_mod.module.backbone.{k}": v for k, v in s.items()}},
    "detector": lambda s: {"state_dict": {f"backbone.{k}": v for k, v in s.items()} | {"neck.weight": torch.zeros(1)}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_checkpoints(wrapping, official, tmp_path):
    wrapped = WRAPPINGS[wrapping](official)
    model = timm.create_model("grootv_tiny", **SMALL)
    model.load_state_dict(checkpoint_filter_fn(wrapped, model))
    spot_check(model, official)
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    model = load(tmp_path / "checkpoint.pth")
    spot_check(model, official)
    assert torch.equal(model.head.fc.weight, official["head.weight"])


VMAMBA = {"dims": (16, 32), "depths": (1, 2), "expand": 1}


@pytest.fixture(scope="module")
def official_vmamba() -> dict[str, torch.Tensor]:
    return official_state(vmamba_names(16, (1, 2), 1))


def assert_vmamba(model: torch.nn.Module, official: dict[str, torch.Tensor]) -> None:
    """Some parameters of each kind, by hand, with the axes that the published code gives them."""
    mixer, source = model.stages[1].blocks[1].mixer, "layers.1.blocks.1.op"
    assert torch.equal(model.stem.conv1.weight, official["patch_embed.0.weight"])
    assert torch.equal(model.stem.norm2.bias, official["patch_embed.7.bias"])
    assert torch.equal(model.stages[1].downsample.conv.bias, official["layers.0.downsample.1.bias"])
    assert torch.equal(model.stages[1].blocks[1].norm1.weight, official["layers.1.blocks.1.norm.weight"])
    assert torch.equal(model.head.norm.weight, official["classifier.norm.weight"])
    for k in range(4):
        channels, projected = slice(32 * k, 32 * (k + 1)), slice(4 * k, 4 * (k + 1))
        assert torch.equal(mixer.x_proj.weight[projected], official[f"{source}.x_proj_weight"][k])
        assert torch.equal(mixer.dt_weight[k], official[f"{source}.dt_projs_weight"][k])
        assert torch.equal(mixer.dt_bias[k], official[f"{source}.dt_projs_bias"][k])
        assert torch.equal(mixer.A_log[k], official[f"{source}.A_logs"][channels, 0])
        assert torch.equal(mixer.D_skip[k], official[f"{source}.Ds"][channels])


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_checkpoints_of_vmamba(wrapping, official_vmamba):
    model = timm.create_model("vmamba_nano", **VMAMBA)
    model.load_state_dict(checkpoint_filter_fn(WRAPPINGS[wrapping](official_vmamba), model))
    assert_vmamba(model, official_vmamba)


def test_vmamba_as_convolutions_and_in_another_order(official_vmamba):
    linear = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    state = {name: v[..., None, None] if name.endswith(linear) else v for name, v in official_vmamba.items()}
    model = timm.create_model("vmamba_nano", **VMAMBA)
    model.load_state_dict(dict(sorted(state.items(), reverse=True)))
    assert_vmamba(model, official_vmamba)
    assert torch.equal(model.stages[0].blocks[0].mlp.fc1.weight, official_vmamba["layers.0.blocks.0.mlp.fc1.weight"])


def test_pretrained_vmamba_comes_from_its_authors(official_vmamba, tmp_path, monkeypatch):
    """With the name of the released file, and as the published training script writes it."""
    fetched = []

    def download(url: str, path: str, *args: object, **kwargs: object) -> None:
        fetched.append(url)
        config = OrderedDict(MODEL=OrderedDict(TYPE="vssm"))
        torch.save({"model": official_vmamba, "model_ema": official_vmamba, "config": config, "epoch": 264}, path)

    monkeypatch.setattr("timm.models._hub.download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for _ in range(2):  # the second time it is in the cache
        model = timm.create_model("vmamba_tiny_s1l8", pretrained=True, **VMAMBA)
        assert_vmamba(model, official_vmamba)
    file = "vssm1_tiny_0230s_ckpt_epoch_264.pth"
    assert fetched == [f"https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/{file}"]
    assert [path.name for path in tmp_path.rglob("*.pth")] == [file]


class RunsCode:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_files_of_an_address_are_data_with_early_releases_of_timm(official_vmamba, tmp_path, monkeypatch):
    """Their `download_cached_file` takes no folder. They read a file as code after a TypeError."""

    def download(url: str, check_hash: bool = True, progress: bool = False) -> str:
        return str(tmp_path / "file.pth")

    monkeypatch.setattr("timm.models._hub.download_cached_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save({"model": official_vmamba}, tmp_path / "file.pth")
    assert_vmamba(timm.create_model("vmamba_tiny_s1l8", pretrained=True, **VMAMBA), official_vmamba)
    torch.save({"model": official_vmamba, "more": RunsCode(tmp_path / "ran")}, tmp_path / "file.pth")
    with pytest.raises(RuntimeError, match="mkdir, which is not plain data"):
        timm.create_model("vmamba_tiny_s1l8", pretrained=True, **VMAMBA)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["x_proj_weight", "A_logs", "Ds", "dt_projs_weight"])
def test_vmamba_of_another_shape(damage, official_vmamba):
    name = f"layers.0.blocks.0.op.{damage}"
    model = timm.create_model("vmamba_nano", device="meta", **VMAMBA)
    with pytest.raises(RuntimeError, match="1 of another shape: stages.0.blocks.0.mixer"):
        checkpoint_filter_fn({**official_vmamba, name: official_vmamba[name][:3]}, model)


def test_a_file_of_the_other_family(official, official_vmamba):
    with pytest.raises(RuntimeError, match=r"missing.*unexpected"):
        checkpoint_filter_fn(official, timm.create_model("vmamba_nano", device="meta"))
    with pytest.raises(RuntimeError, match=r"missing.*unexpected"):
        checkpoint_filter_fn(official_vmamba, timm.create_model("grootv_nano", device="meta"))


@pytest.fixture(scope="module")
def file(official, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "grootv_tiny.pth"
    torch.save({"model": official}, path)
    return str(path)


def test_other_number_of_classes(file, official):
    for num_classes in (7, 0):
        model = load(file, num_classes=num_classes)
        spot_check(model, official)
    assert model.num_classes == 0


@pytest.mark.parametrize("channels", [1, 4])
def test_other_number_of_input_channels(file, official, channels):
    model = load(file, in_chans=channels)
    spot_check(model, official)
    weight = official["patch_embed.conv1.weight"]
    if channels == 1:  # one grey channel stands for three equal ones
        torch.testing.assert_close(model.stem.conv1.weight, weight.sum(1, keepdim=True))
    else:
        torch.testing.assert_close(model.stem.conv1.weight[:, :3], weight * 3 / 4)


@pytest.mark.parametrize("feature_cls", ["list", "getter"])
def test_features_of_a_checkpoint(file, official, feature_cls):
    model = load(file, features_only=True, feature_cls=feature_cls)
    name = "stages_2.norm.weight" if feature_cls == "list" else "model.stages.2.norm.weight"
    assert torch.equal(model.state_dict()[name], official["levels.2.norm.0.weight"])


def test_backbone_alone(official, tmp_path, caplog):
    backbone = {name: value for name, value in official.items() if "head" not in name}
    torch.save(backbone, tmp_path / "backbone.pth")
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path / "backbone.pth")
    assert "has no head" in caplog.text
    spot_check(model, official, head=False)
    assert torch.isfinite(model.head.fc.weight).all()


@pytest.mark.parametrize("num_classes", [1000, 7])  # timm loads strictly in the first case, leniently in the second
def test_a_file_that_does_not_fit(official, tmp_path, num_classes):
    damaged = dict(official)
    del damaged["levels.1.blocks.0.TreeSSM.A_logs"]
    damaged["levels.9.blocks.0.norm1.0.weight"] = torch.zeros(3)
    damaged["levels.0.blocks.0.mlp.fc2.bias"] = torch.zeros(81)
    torch.save(damaged, tmp_path / "damaged.pth")
    with pytest.raises(RuntimeError) as error:
        load(tmp_path / "damaged.pth", num_classes=num_classes)
    message = str(error.value)
    assert "1 missing: stages.1.blocks.0.mixer.A_log" in message
    assert "1 unexpected: stages.9.blocks.0.norm1.weight" in message
    assert "1 of another shape: stages.0.blocks.0.mlp.fc2.bias [81] instead of [16]" in message


def test_a_file_of_another_size():
    model = timm.create_model("grootv_small", device="meta")
    official = {name: torch.empty(shape, device="meta") for name, shape in OFFICIAL_NAMES["grootv_tiny"].items()}
    with pytest.raises(RuntimeError, match=r"80 missing.*and 60 more.*stem.conv1.bias \[40\] instead of \[48\]"):
        checkpoint_filter_fn(official, model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv1.weight": torch.zeros(1)}, "no GrootV or VMamba weights.*it begins with conv1.weight"),
        ({"epoch": 3}, "no GrootV or VMamba weights.*it begins with nothing"),
        (
            {f"{prefix}.stem.conv1.weight": torch.zeros(1) for prefix in ("teacher", "student")},
            r"several backbones.*\['teacher.', 'student.'\]",
        ),
    ],
    ids=("another model", "no weights", "two models"),
)
def test_a_file_without_one_model(content, message):
    with pytest.raises(RuntimeError, match=f"does not fit the model: {message}"):
        checkpoint_filter_fn(content, timm.create_model("grootv_nano", device="meta"))


class Payload:
    """What a file with weights should not hold."""


def test_files_with_code_are_refused(official, tmp_path):
    torch.save({"model": official, "payload": Payload()}, tmp_path / "code.pth")
    with pytest.raises(RuntimeError, match=r"code.pth cannot be used: it refers to .*Payload, which is not plain data"):
        load(tmp_path / "code.pth")


def test_loading_leaves_the_given_dictionary_as_it_was(official):
    before = dict(official)
    checkpoint_filter_fn(official, timm.create_model("grootv_tiny", device="meta", **SMALL))
    assert official.keys() == before.keys()
    assert all(official[name] is value for name, value in before.items())


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 0}, {"num_classes": 4, "in_chans": 2}])
def test_own_checkpoints_pass_unchanged(kwargs):
    model = timm.create_model("grootv_nano", **kwargs)
    state = dict(sorted(model.state_dict().items()))
    converted = checkpoint_filter_fn(state, model)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], value) for name, value in state.items())


@pytest.mark.parametrize("safe", [True, False])
def test_hub_round_trip(tmp_path, safe):
    if Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("timm before 1.0.31 does not read the folders that it writes")
    options = {"metric": "euclidean", "root": "first", "tree_per": "stage", "in_chans": 2}
    model = timm.create_model("grootv_nano", num_classes=6, **options).eval()
    model.reset_classifier(5, "max")
    save_for_hf(model, tmp_path, safe_serialization=safe)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (loaded.num_classes, loaded.in_chans) == (5, 2)
    mixer = loaded.stages[0].blocks[0].mixer
    assert (mixer.metric, mixer.root) == ("euclidean", "first")
    assert loaded.stages[0].share_tree
    images = torch.randn(2, 2, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    adapted = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=4)
    assert torch.equal(adapted.stages[3].norm.weight, model.stages[3].norm.weight)
    assert (adapted.num_classes, adapted.in_chans) == (3, 4)
