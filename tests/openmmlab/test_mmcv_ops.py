"""The replacement for mmcv's compiled operations."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import torch
from dense_helpers import fake_package
from training_helpers import run_python

from grootv.openmmlab.dense import mmcv_ops


@pytest.fixture
def replacement(monkeypatch: pytest.MonkeyPatch) -> object:
    """`mmcv.ops` with the replacement; skips where mmcv has its compiled operations."""
    pytest.importorskip("mmcv")
    if not mmcv_ops.install_mmcv_ops():
        pytest.skip("mmcv has its compiled operations here")
    import mmcv.ops

    return mmcv.ops


def overlap(first: list[float], second: list[float], offset: int) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0]) + offset
    height = min(first[3], second[3]) - max(first[1], second[1]) + offset
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (first, second)]
    return both / (sum(areas) - both)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_nms_is_greedy_suppression(replacement, offset: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Numbers that all of the formats represent exactly.
    corners = torch.randint(0, 40, (60, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(4, 24, (60, 2), generator=generator)], 1).to(dtype)
    scores = (torch.randperm(60, generator=generator) / 64).to(dtype)
    expected: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[i].tolist(), boxes[j].tolist(), offset) <= 0.303 for j in expected):
            expected.append(i)
    assert 5 < len(expected) < 55
    kept_boxes, kept = replacement.nms(boxes, scores, 0.303, offset=offset)
    assert kept.tolist() == expected
    assert torch.equal(kept_boxes, torch.cat([boxes, scores[:, None]], 1)[expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_roi_align_averages_a_linear_map_to_its_value_at_the_middle(replacement, dtype: torch.dtype) -> None:
    """Bilinear interpolation is exact on a linear map, and an average of symmetric samples is the value between."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    maps = torch.stack([x, y, 2 * x - y]).expand(2, -1, -1, -1).to(dtype)
    rois = torch.tensor([[0, 8.0, 12.0, 64.0, 44.0], [1, 20.0, 4.0, 60.0, 36.0]], dtype=dtype)
    output = replacement.RoIAlign((4, 8), spatial_scale=0.5, sampling_ratio=0, aligned=True)(maps, rois)
    assert output.dtype == dtype
    for roi, pooled in zip(rois.double() * 0.5, output.double(), strict=True):
        _, left, top, right, bottom = roi.tolist()
        columns = left - 0.5 + (torch.arange(8, dtype=torch.float64) + 0.5) * (right - left) / 8
        rows = top - 0.5 + (torch.arange(4, dtype=torch.float64) + 0.5) * (bottom - top) / 4
        expected = torch.stack([columns.expand(4, 8), rows[:, None].expand(4, 8), 2 * columns - rows[:, None]])
        torch.testing.assert_close(pooled, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_roi_align_gradient(replacement) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 7, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2.0, 13.0, 9.0], [1, 0.0, 0.0, 5.5, 12.0], [0, 4.0, 4.0, 6.0, 7.0]]).double()
    layer = replacement.RoIAlign((3, 2), spatial_scale=0.5, sampling_ratio=2)
    assert torch.autograd.gradcheck(lambda m: layer(m, rois), (maps,))


@pytest.mark.parametrize(
    ("installed", "built"),
    [({"onedl-mmcv": "2.3.6"}, "onedl-mmcv onedl-mmcv"), ({"mmcv-lite": "2.1.0"}, "mmcv mmcv==2.1.0")],
)
def test_operations_are_compiled_for_the_line_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], built: str
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(mmcv_ops, "version", version)
    assert mmcv_ops.build_command().endswith(f"--no-binary {built}")


def test_what_torchvision_has_not_says_what_it_needs(replacement) -> None:
    maps, rois = torch.randn(1, 1, 8, 8), torch.tensor([[0, 0.0, 0.0, 4.0, 4.0]])
    with pytest.raises(RuntimeError, match="max-pooling needs mmcv's compiled operations.*pip install"):
        replacement.RoIAlign(2, pool_mode="max")(maps, rois)
    with pytest.raises(RuntimeError, match="torchvision has no replacement for softnms.*pip install"):
        replacement.soft_nms(torch.tensor([[0.0, 0, 4, 4]]), torch.ones(1))


def test_it_is_said_once(replacement) -> None:
    code = """
import torch, grootv.openmmlab
from mmcv.ops import RoIAlign, nms
for _ in range(3):
    nms(torch.tensor([[0.0, 0, 4, 4]]), torch.ones(1), 0.5)
    RoIAlign(2)(torch.randn(1, 1, 8, 8), torch.tensor([[0, 0.0, 0.0, 4.0, 4.0]]))
"""
    result = run_python(code)
    assert (result.stdout + result.stderr).count("torchvision's nms and roi_align replace them") == 1


def test_coming_too_late_is_said(replacement) -> None:
    result = run_python("import mmdet.structures, grootv.openmmlab")
    assert "mmdet was imported before grootv.openmmlab" in result.stdout + result.stderr
    result = run_python("import grootv.openmmlab, mmdet.structures")
    assert "mmdet was imported before" not in result.stdout + result.stderr


def test_compiled_operations_are_left_alone(tmp_path: Path) -> None:
    fake_package(tmp_path, "mmcv", _ext="nms = 'compiled'")
    code = "import grootv.openmmlab, mmcv._ext; print(mmcv._ext.nms, grootv.openmmlab.install_mmcv_ops())"
    assert run_python(code, tmp_path).stdout.split() == ["compiled", "False"]
