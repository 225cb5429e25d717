"""What options of tools/train.py change in a config."""

import importlib.util
import sys
from types import ModuleType

import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config
from training_helpers import ROOT


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", ROOT / "tools" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("package", "config"),
    [
        ("mmdet", "detection/mask-rcnn_grootv-tiny_fpn_1x_coco.py"),
        ("mmseg", "segmentation/grootv-tiny_upernet_8xb2-160k_ade20k-512x512.py"),
    ],
)
def test_amp_changes_the_optimizer_wrapper_alone(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, package: str, config: str
) -> None:
    pytest.importorskip(package)
    path = ROOT / "configs" / config
    monkeypatch.setattr(sys, "argv", ["train.py", str(path), "--amp"])
    changed = tool.training_config(tool.parse_args())
    expected = Config.fromfile(path)
    expected.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    expected.update(launcher="none", work_dir=f"work_dirs/{path.stem}")
    assert changed.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/data/my images/a (1), b", ["/data/my images/a (1)", "b"]),
        ("/data/my images (copy)/set 1", "/data/my images (copy)/set 1"),
        ("'/data/my images'", "/data/my images"),
        ("a=b c", "a=b c"),
        ("3", 3),
        ("1e-3", 1e-3),
        ("TRUE", True),
        ("None", None),
        ("none", "none"),
        ("1,2", [1, 2]),
        ("[1, 2.5, a b]", [1, 2.5, "a b"]),
        ("[(1, 2), [a, b], c]", [(1, 2), ["a", "b"], "c"]),
        ("[3]", [3]),
        ("[]", []),
        ("", ""),
    ],
)
def test_values_of_options(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str, value: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "config.py", "--cfg-options", f"data.root={text}", "seed=1"])
    assert tool.parse_args().cfg_options == {"data.root": value, "seed": 1}


def test_an_option_without_a_value_is_named(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "config.py", "--cfg-options", "seed"])
    with pytest.raises(SystemExit):
        tool.parse_args()
    assert "--cfg-options: expected KEY=VALUE, got 'seed'" in capsys.readouterr().err
