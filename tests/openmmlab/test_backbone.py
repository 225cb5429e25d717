"""GrootV and VMamba behind OpenMMLab's contract for backbones."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import timm
import torch
from golden.fill import image
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from model_helpers import OFFICIAL_NAMES, VMAMBA_NAMES, official_state, relative_error, shrink, vmamba_names
from training_helpers import environment, run_tool, write_config, write_images

import grootv.openmmlab  # noqa: F401
from grootv.models.checkpoint import official_to_own

# Two stages with few channels, enough for most tests.
SMALL = {"type": "GrootV", "arch": "nano", "dims": (8, 16), "depths": (1, 2), "out_indices": (0, 1)}


def build(**changes: object) -> torch.nn.Module:
    return MODELS.build({**SMALL, **changes})


@pytest.mark.parametrize("size", [(64, 96), (33, 70), (5, 3)])
def test_maps_are_those_of_the_timm_model(size: tuple[int, int]) -> None:
    backbone = MODELS.build({"type": "GrootV", "arch": "nano", "drop_path_rate": 0.0}).eval()
    peer = timm.create_model("grootv_nano", features_only=True).eval()
    state = {name.replace("stages.", "stages_"): value for name, value in backbone.model.state_dict().items()}
    peer.load_state_dict(state)
    x = torch.randn(2, 3, *size)
    maps = backbone(x)
    for map, expected, channels, stride in zip(maps, peer(x), backbone.out_channels, (4, 8, 16, 32), strict=True):
        height, width = (-(-side // stride) for side in size)  # rounded up
        assert map.shape == (2, channels, height, width)
        assert map.is_contiguous()
        torch.testing.assert_close(map, expected)


def test_arguments_reach_the_model() -> None:
    scans = {block.mixer.scan for stage in build(scan="cross").model.stages for block in stage.blocks}
    assert scans == {"cross"}


def test_official_checkpoint_gives_the_published_features(tmp_path: Path) -> None:
    """The stage features of the published implementation, from a file with its names."""
    golden = torch.load(Path(__file__).parents[1] / "golden" / "grootv_tiny.pt")
    torch.save({"model": official_state(OFFICIAL_NAMES["grootv_tiny"])}, tmp_path / "official.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "official.pth")}
    backbone = MODELS.build({"type": "GrootV", "arch": "tiny", "init_cfg": init_cfg})
    backbone.init_weights()
    with torch.no_grad():
        maps = backbone.eval()(image(7, 2, 224, 224))
    for map, expected in zip(maps, golden["stages"], strict=True):
        taken = map.permute(0, 2, 3, 1)[:, ::4, ::4, ::8]
        assert (taken - expected).norm() / expected.norm() < 1e-4


def outnorms(channels: tuple[int, ...]) -> dict[str, list[int]]:
    """Official names and shapes of the norms that dense tasks add to VMamba's features."""
    return {f"outnorm{i}.{kind}": [c] for i, c in enumerate(channels) for kind in ("weight", "bias")}


def test_official_vmamba_gives_the_published_features(tmp_path: Path) -> None:
    """From a file with the names of a released detector or segmentor."""
    names = {name: shape for name, shape in VMAMBA_NAMES["vssm1_tiny_0230s"].items() if "classifier" not in name}
    state = official_state(names | outnorms((96, 192, 384, 768)))
    dense = {f"backbone.{name}": value for name, value in state.items()} | {"neck.weight": torch.zeros(1)}
    torch.save({"state_dict": dense}, tmp_path / "dense.pth")
    golden = torch.load(Path(__file__).parents[1] / "golden" / "vmamba_tiny.pt")["features"]
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "dense.pth")}
    for out_indices in ((0, 1, 2, 3), (1, 2)):
        backbone = MODELS.build({"type": "VMamba", "out_indices": out_indices, "init_cfg": init_cfg})
        backbone.init_weights()
        with torch.no_grad():
            maps = backbone.eval()(image(7, 2, 224, 224))
        for map, i in zip(maps, out_indices, strict=True):
            assert map.is_contiguous()
            assert relative_error(map.permute(0, 2, 3, 1)[:, ::4, ::4, ::8], golden[i]) < 1e-4


VMAMBA = {"type": "VMamba", "arch": "nano", "dims": (8, 16), "depths": (1, 2), "expand": 1, "out_indices": (0, 1)}


def test_a_classifier_of_vmamba_leaves_the_norms_of_the_features(tmp_path: Path) -> None:
    """Weights 1 and biases 0. A classifier leaves these norms in a file of dense tasks, and keeps its own head."""
    names = vmamba_names(8, (1, 2), 1, 5)
    torch.save({"model": official_state(names)}, tmp_path / "classifier.pth")
    backbone = MODELS.build(
        {**VMAMBA, "init_cfg": {"type": "Pretrained", "checkpoint": str(tmp_path / "classifier.pth")}}
    )
    backbone.init_weights()
    x, classifier = torch.randn(1, 3, 40, 56), timm.create_model("vmamba_nano", dims=(8, 16), depths=(1, 2), expand=1)
    classifier.reset_classifier(5)
    classifier.load_state_dict(official_state(names))
    features = classifier.forward_intermediates(x, intermediates_only=True)
    for map, feature in zip(backbone.eval()(x), features, strict=True):
        expected = torch.nn.functional.layer_norm(feature.movedim(1, -1), feature.shape[1:2], eps=1e-5).movedim(-1, 1)
        torch.testing.assert_close(map, expected)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in backbone.state_dict().items()}}, tmp_path / "dense.pth")
    kwargs = {"dims": (8, 16), "depths": (1, 2), "expand": 1, "num_classes": 5, "pretrained": True}
    loaded = timm.create_model("vmamba_nano", pretrained_cfg_overlay={"file": tmp_path / "dense.pth"}, **kwargs)
    assert torch.equal(loaded.stages[1].blocks[0].mixer.A_log, classifier.stages[1].blocks[0].mixer.A_log)


@pytest.mark.parametrize(
    "frozen_stages, frozen_norms", [(-1, []), (0, []), (1, ["outnorm0"]), (2, ["outnorm0", "outnorm1"])]
)
def test_frozen_stages_freeze_the_norms_of_their_features(frozen_stages: int, frozen_norms: list[str]) -> None:
    model = MODELS.build({**VMAMBA, "frozen_stages": frozen_stages}).train().model
    norms = {name: child for name, child in model.named_children() if name.startswith("outnorm")}
    assert len(norms) == 2
    assert [name for name, norm in norms.items() if not norm.training] == frozen_norms
    assert [name for name, norm in norms.items() if not norm.weight.requires_grad] == frozen_norms


@pytest.mark.parametrize("family", ["GrootV", "VMamba"])
def test_a_whole_model_loads_official_names(family: str) -> None:
    """As mmengine loads the checkpoint of a detector, whose other parameters have their own names."""
    if family == "VMamba":
        official = {n: s for n, s in vmamba_names(8, (1, 2), 1, 5).items() if "classifier" not in n} | outnorms((8, 16))
        config = VMAMBA
    else:
        names = shrink(OFFICIAL_NAMES["grootv_tiny"], (8, 16, 32, 64), (1, 2, 1, 1), 5)
        official = {name: shape for name, shape in names.items() if "head" not in name}
        config = {"type": "GrootV", "arch": "nano", "dims": (8, 16, 32, 64), "depths": (1, 2, 1, 1)}
    state = official_state(official)
    detector = torch.nn.ModuleDict({"backbone": MODELS.build(config), "neck": torch.nn.Linear(2, 2)})
    checkpoint = {f"backbone.{name}": value for name, value in state.items()} | {
        "neck.weight": torch.ones(2, 2),
        "neck.bias": torch.ones(2),
    }
    given = dict(checkpoint)
    for load in (detector.load_state_dict, partial(load_state_dict, detector, strict=True)):
        for parameter in detector.parameters():
            torch.nn.init.constant_(parameter, 7.0)
        load(checkpoint)
        loaded = dict(detector.backbone.model.named_parameters())
        assert len(loaded) == len(state)
        for name, value in state.items():
            assert torch.equal(loaded[official_to_own(name)].flatten(), value.flatten()), name
        assert (detector.neck.weight == 1).all()
    assert checkpoint.keys() == given.keys()
    del checkpoint[f"backbone.{next(name for name in state if name.endswith('.A_logs'))}"]
    with pytest.raises(RuntimeError, match=r"backbone\.model\.stages\.0\.blocks\.0\.mixer\.A_log"):
        detector.load_state_dict(checkpoint)


@pytest.mark.parametrize("package", ["mmdet", "mmseg"])
def test_either_package_alone_is_enough(package: str) -> None:
    """A process in which the other package cannot be imported builds the backbone from the package's registry."""
    pytest.importorskip(package)
    other = {"mmdet": "mmseg", "mmseg": "mmdet"}[package]
    code = f"""
import sys
sys.modules["{other}"] = None
from mmengine.config import Config
Config.fromstring('custom_imports = dict(imports=["grootv.openmmlab"], allow_failed_imports=False)', ".py")
from {package}.registry import MODELS
from mmengine.registry import DefaultScope
DefaultScope.get_instance("test", scope_name="{package}")
print(type(MODELS.build(dict(type="GrootV", arch="nano"))).__module__)
"""
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert result.stdout.split() == ["grootv.openmmlab.dense.backbone"], result.stderr


def test_import_of_the_model_alone_needs_no_openmmlab() -> None:
    code = "import sys; sys.modules['mmengine'] = None; import grootv, timm; timm.create_model('grootv_nano')"
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "huge"}, r"arch must be one of .'base', 'nano', 'small', 'tiny'., got 'huge'"),
        ({"out_indices": (0, 2)}, "out_indices must be increasing numbers of 0 to 1"),
        ({"out_indices": (-1, 0)}, "out_indices must be"),
        ({"out_indices": (1, 0)}, "out_indices must be"),
        ({"out_indices": ()}, "out_indices must be"),
        ({"frozen_stages": 3}, "frozen_stages must be from -1 .none. to 2, got 3"),
        ({"init_cfg": {"type": "Kaiming"}}, "init_cfg must be None or"),
        ({"pretrained": "x.pth"}, r"pretrained must be None.*init_cfg=dict.type=\"Pretrained\", checkpoint='x.pth'."),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="window_size"):
        build(window_size=7)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 2])
def test_frozen_stages_get_no_gradient_and_stay_in_evaluation_mode(frozen_stages: int) -> None:
    backbone = build(frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    sum(map.sum() for map in backbone(x)).backward()
    parts = {"model.stem.": 0, "model.stages.0.": 1, "model.stages.1.": 2}
    for prefix, number in parts.items():
        frozen = number <= frozen_stages
        parameters = [p for name, p in backbone.named_parameters() if name.startswith(prefix)]
        assert all((p.grad is None) == frozen and p.requires_grad != frozen for p in parameters)
        modules = [m for name, m in backbone.named_modules() if name.startswith(prefix)]
        assert all(module.training != frozen for module in modules)


def test_norm_eval_keeps_norms_in_evaluation_mode() -> None:
    modes = {type(m).__name__: m.training for m in build(norm_eval=True, drop_path_rate=0.5).train().modules()}
    assert not modes["LayerNorm"] and not modes["PromotedLayerNorm"]
    assert modes["DropPath"] and modes["TreeSSM"]


def test_checkpointing_recomputes_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 40, 56)
    torch.manual_seed(0)
    plain = build()
    checkpointed = build(with_cp=True)
    checkpointed.load_state_dict(plain.state_dict())
    calls = []
    block = type(checkpointed.model.stages[0].blocks[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    gradients = []
    for backbone in (plain, checkpointed):
        backbone.eval()
        sum(map.square().sum() for map in backbone(x)).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    assert len(calls) == 2 * 3  # each of the three blocks twice; without checkpointing, the stage passes them by
    for plain_gradient, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, plain_gradient)


def test_drop_path_rate_grows_to_what_is_asked_for() -> None:
    blocks = [block for stage in build(drop_path_rate=0.4).model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(0.4)


@pytest.mark.parametrize("out_indices", [(0,), (1,), (0, 1)])
def test_every_parameter_serves_the_outputs(out_indices: tuple[int, ...]) -> None:
    """Distributed training waits for a gradient of every parameter."""
    backbone = build(out_indices=out_indices)
    maps = backbone(torch.randn(1, 3, 32, 32))
    assert [map.shape[1] for map in maps] == [(8, 16)[i] for i in out_indices] == list(backbone.out_channels)
    sum(map.square().sum() for map in maps).backward()
    # A stage's last norm is used even if only a later stage is returned: the next stage reads its output.
    assert not [name for name, p in backbone.named_parameters() if p.grad is None]


def test_a_detection_batch_trains() -> None:
    backbone = MODELS.build({"type": "GrootV", "arch": "nano", "depths": (1, 1, 1, 1), "with_cp": True})
    maps = backbone(torch.randn(1, 3, 800, 1344))
    assert [tuple(map.shape[2:]) for map in maps] == [(200, 336), (100, 168), (50, 84), (25, 42)]
    sum(map.mean() for map in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize("in_channels", [1, 4])
def test_any_number_of_input_channels(in_channels: int) -> None:
    assert build(in_channels=in_channels)(torch.randn(1, in_channels, 32, 32))[0].shape == (1, 8, 8, 8)


class TestPretrained:
    """`init_cfg=dict(type="Pretrained")` with files of every kind."""

    @pytest.fixture
    def whole(self) -> torch.nn.Module:
        """A timm classifier with the sizes of `SMALL` and other weights."""
        torch.manual_seed(123)
        return timm.create_model("grootv_nano", dims=SMALL["dims"], depths=SMALL["depths"], num_classes=7)

    @staticmethod
    def load(path: Path, content: dict, prefix: str | None = None, **changes: object) -> torch.nn.Module:
        torch.save(content, path / "checkpoint.pth")
        init_cfg = {"type": "Pretrained", "checkpoint": str(path / "checkpoint.pth")}
        if prefix is not None:
            init_cfg["prefix"] = prefix
        backbone = build(init_cfg=init_cfg, **changes)
        backbone.init_weights()
        return backbone

    @staticmethod
    def assert_loaded(backbone: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
        state = backbone.model.state_dict()
        assert state
        assert all(torch.equal(value, expected[name]) for name, value in state.items())

    @pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "backbone.model.", "model."])
    @pytest.mark.parametrize("key", [None, "model", "state_dict"])
    def test_prefix_and_wrapper(self, whole: torch.nn.Module, tmp_path: Path, prefix: str, key: str | None) -> None:
        weights = {prefix + name: value for name, value in whole.state_dict().items()}
        if prefix:
            weights["neck.lateral_convs.0.conv.weight"] = torch.zeros(3)
        content = {key: weights, "epoch": 3} if key else weights
        self.assert_loaded(self.load(tmp_path, content), whole.state_dict())

    def test_a_file_without_head(self, whole: torch.nn.Module, tmp_path: Path) -> None:
        weights = {name: value for name, value in whole.state_dict().items() if not name.startswith("head.")}
        self.assert_loaded(self.load(tmp_path, weights), whole.state_dict())

    def test_averaged_weights_go_first(self, whole: torch.nn.Module, tmp_path: Path) -> None:
        other = {name: torch.zeros_like(value) for name, value in whole.state_dict().items()}
        content = {"state_dict": other, "state_dict_ema": whole.state_dict()}
        self.assert_loaded(self.load(tmp_path, content), whole.state_dict())

    def test_later_stages_are_left_in_the_file(self, whole: torch.nn.Module, tmp_path: Path) -> None:
        backbone = self.load(tmp_path, whole.state_dict(), out_indices=(0,))
        assert len(backbone.model.stages) == 1
        self.assert_loaded(backbone, whole.state_dict())

    def test_its_own_state(self, tmp_path: Path) -> None:
        backbone = build(out_indices=(0,))
        self.assert_loaded(self.load(tmp_path, backbone.state_dict(), out_indices=(0,)), backbone.model.state_dict())

    def test_prefix_chooses_between_two_backbones(self, whole: torch.nn.Module, tmp_path: Path) -> None:
        weights = {f"teacher.{name}": torch.zeros_like(value) for name, value in whole.state_dict().items()}
        weights |= {f"student.{name}": value for name, value in whole.state_dict().items()}
        self.assert_loaded(self.load(tmp_path, weights, prefix="student."), whole.state_dict())
        with pytest.raises(ValueError, match=r"prefix must be one of \['teacher.', 'student.'\]"):
            self.load(tmp_path, weights)
        with pytest.raises(ValueError, match="no GrootV or VMamba weights under the prefix 'neck.'"):
            self.load(tmp_path, weights, prefix="neck.")

    def test_a_missing_parameter_stops(self, whole: torch.nn.Module, tmp_path: Path) -> None:
        weights = whole.state_dict()
        del weights["stages.0.blocks.0.mixer.A_log"]
        with pytest.raises(RuntimeError, match=r"checkpoint.pth.*1 missing: stages\.0\.blocks\.0\.mixer\.A_log"):
            self.load(tmp_path, weights)

    def test_a_left_over_parameter_stops(self, whole: torch.nn.Module, tmp_path: Path) -> None:
        weights = {**whole.state_dict(), "stages.0.relative_position": torch.zeros(1)}
        with pytest.raises(RuntimeError, match=r"1 unexpected: stages\.0\.relative_position"):
            self.load(tmp_path, weights)

    def test_another_size_stops(self, whole: torch.nn.Module, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"of another shape: .*stem\.norm1\.weight \[4\] instead of \[5\]"):
            self.load(tmp_path, whole.state_dict(), dims=(10, 20))

    def test_another_model_stops(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no GrootV or VMamba weights.*it begins with conv1\.weight"):
            self.load(tmp_path, {"conv1.weight": torch.zeros(1)})

    def test_a_missing_file_stops(self) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere.pth"):
            build(init_cfg={"type": "Pretrained", "checkpoint": "nowhere.pth"}).init_weights()

    def test_the_checkpoint_of_a_classification_run(self, tmp_path: Path) -> None:
        """A checkpoint of tools/train.py contains the averaged weights and the run's whole state."""
        for split in ("train", "val"):
            write_images(tmp_path / "data", split, 8, seed=0)
        config = write_config(tmp_path, tmp_path / "data")
        run_tool("train.py", config, "--work-dir", tmp_path / "run", "--cfg-options", "train_cfg.max_epochs=1")
        checkpoint = tmp_path / "run" / "epoch_1.pth"
        content = torch.load(checkpoint, weights_only=True)
        changes = {"depths": (1, 1), "drop_path_rate": 0.0}
        backbone = build(init_cfg={"type": "Pretrained", "checkpoint": str(checkpoint)}, **changes)
        backbone.init_weights()
        averaged = {name.removeprefix("backbone."): value for name, value in content["state_dict"].items()}
        self.assert_loaded(backbone, averaged)
        latest = content["ema_state_dict"]["module.backbone.stages.0.norm.weight"]
        assert not torch.equal(backbone.model.stages[0].norm.weight, latest)
