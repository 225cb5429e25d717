"""All blocks of a stage as one operation, against the same blocks one by one."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import grootv  # noqa: F401  registers the models
from grootv.layers.norms import path_factors
from grootv.models import joined_blocks

SIZE = 64


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch) -> str:
    """On CUDA in half precision, where models have it; on CPUs in float64, where the test lifts the condition."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu":
        monkeypatch.setattr(joined_blocks, "joins_products", lambda x: True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return request.param


@pytest.fixture
def joined(monkeypatch) -> list[int]:
    """How many blocks each call of the operation computed."""
    counts: list[int] = []
    operation = joined_blocks.grootvl_ops.tree_blocks

    def counted(x, normed, blocks, *args, **kwargs):
        counts.append(len(blocks))
        return operation(x, normed, blocks, *args, **kwargs)

    monkeypatch.setattr(joined_blocks.grootvl_ops, "tree_blocks", counted)
    return counts


def make_model(device: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("grootv_nano", num_classes=7, depths=(1, 2, 2, 1), **kwargs).to(device)
    if device == "cuda":
        return model
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"  # what the operation takes for a GELU, which half precision cannot tell
    return model.double()


def step(model: nn.Module, device: str) -> list[Tensor]:
    """Logits and gradients of a training step, with the same random numbers in every call."""
    torch.manual_seed(1)
    images = torch.randn(3, 3, SIZE, SIZE).to(device, torch.float32 if device == "cuda" else torch.float64)
    with torch.autocast(device, torch.float16, enabled=device == "cuda"):
        logits = model(images)
    grads = torch.autograd.grad(logits.double().square().sum(), list(model.parameters()))
    return [logits.detach(), *grads]


def apart(model: nn.Module) -> nn.Module:
    """A copy whose blocks have a hook that changes nothing, so that they are called."""
    model = copy.deepcopy(model)
    for stage in model.stages:
        for block in stage.blocks:
            block.mlp.register_forward_hook(lambda *_: None)
    return model


def factors_of_modules(blocks: list[nn.Module], branch: Tensor) -> Tensor | None:
    """With the random numbers that calls of the modules draw."""
    found = [path_factors(path, branch) for block in blocks for path in (block.drop_path1, block.drop_path2)]
    if all(factors is None for factors in found):
        return None
    return torch.stack([branch.new_ones(len(branch)) if factors is None else factors for factors in found])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drop_path_rate": 0.5},
        {"tree_per": "stage", "metric": "manhattan"},
        {"root": "last", "output_stride": 16},
    ],
    ids=["published", "drop", "stage", "root"],
)
def test_same_results(device, joined, options, monkeypatch):
    monkeypatch.setattr(joined_blocks, "_path_factors", factors_of_modules)
    model = make_model(device, **options).train()
    found = step(model, device)
    assert joined == [1, 2, 2, 1]
    expected = step(apart(model), device)
    assert len(joined) == 4
    # The same kernels in half precision, but for sums over blocks, which have another order.
    tolerance = 2e-3 if device == "cuda" else 1e-9
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance * max(float(wanted.abs().max()), 1e-6))
    assert all(map(torch.equal, found, step(model, device)))


def test_stochastic_depth(device):
    """Each path of each block drops its share of the images, of its own choice, and scales the others."""
    model = make_model(device, drop_path_rate=0.6).train()
    blocks = [block for stage in model.stages for block in stage.blocks]
    blocks[2].drop_path1.scale_by_keep = False
    blocks[2].drop_path2.drop_prob = 1.0
    count = 40000
    for dtype in (torch.float16, torch.float32, torch.float64):
        torch.manual_seed(3)
        factors = joined_blocks._path_factors(blocks, torch.empty(count, 1, dtype=dtype, device=device))
        assert factors.shape == (2 * len(blocks), count)
        assert factors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        paths = [path for block in blocks for path in (block.drop_path1, block.drop_path2)]
        for i, (of_path, path) in enumerate(zip(factors, paths, strict=True)):
            share = 1 - getattr(path, "drop_prob", 0.0)
            kept = of_path != 0
            assert abs(float(kept.double().mean()) - share) <= 5 * (share * (1 - share) / count) ** 0.5
            scale = torch.tensor(1.0 if i == 4 else share, dtype=factors.dtype)
            assert (of_path[kept] == (1 / scale).to(device)).all()
        # Of both paths of the last block, 0.4 are kept, and 0.16 together.
        both = float(((factors[-1] != 0) & (factors[-2] != 0)).double().mean())
        assert abs(both - 0.16) <= 5 * (0.16 * 0.84 / count) ** 0.5
    assert joined_blocks._path_factors(blocks[:1], torch.empty(3, device=device)) is None
    assert joined_blocks._path_factors([block.eval() for block in blocks], torch.empty(3, device=device)) is None


def test_inference_and_its_features(device, joined):
    model = make_model(device).eval()
    images = torch.randn(2, 3, SIZE, SIZE).to(device, torch.float32 if device == "cuda" else torch.float64)
    with torch.autocast(device, torch.float16, enabled=device == "cuda"):
        with torch.inference_mode():
            logits = model(images)
            features = model.forward_intermediates(images, intermediates_only=True)
            expected = apart(model)(images)
        torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(model(images).detach(), logits, rtol=1e-2, atol=1e-3)
    assert joined == [1, 2, 2, 1] * 3 and [map.shape[-1] for map in features] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    "name",
    [
        *("mixer", "mlp", "norm1", "norm2", "drop_path1", "drop_path2", "mlp.fc1", "mlp.act", "mlp.fc2"),
        *(
            f"mixer.{layer}"
            for layer in ("in_proj", "conv", "act", "x_proj", "dt_proj", "h_norm", "out_norm", "out_proj")
        ),
        "",
    ],
)
def test_hooks_run(device, joined, name):
    """A hook of any module in a block is called as always, and may change what it sees."""
    model = make_model(device).eval()
    module = model.stages[1].blocks[1].get_submodule(name)
    called = []
    module.register_forward_hook(lambda _, __, output: called.append(output) or output * 0)
    with torch.no_grad(), torch.autocast(device, torch.float16, enabled=device == "cuda"):
        model(torch.randn(1, 3, SIZE, SIZE).to(device, next(model.parameters()).dtype))
    assert len(called) == 1 and joined == [1, 2, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "mlp", nn.Linear(*[block.mlp.fc1.in_features] * 2)),
        lambda block: setattr(block.mixer, "scans", lambda guide: type(block.mixer).scans(block.mixer, guide)),
        lambda block: setattr(block.mixer, "direction", "up"),
        lambda block: setattr(block.mixer.h_norm, "eps", 1e-3),
        lambda block: setattr(block.norm2, "eps", 1e-3),
        lambda block: setattr(block.mixer.out_proj, "bias", nn.Parameter(torch.ones(block.mixer.dim))),
        lambda block: setattr(block.mixer, "in_proj", nn.Sequential(block.mixer.in_proj)),
        lambda block: setattr(block.mlp, "act", nn.ReLU()),
    ],
    ids=["mlp", "scans", "direction", "mixer eps", "eps", "bias", "layer", "activation"],
)
def test_changed_blocks_are_computed_one_by_one(device, joined, change):
    model = make_model(device).eval()
    change(model.stages[2].blocks[1])
    model.to(device, next(model.parameters()).dtype)
    with torch.no_grad(), torch.autocast(device, torch.float16, enabled=device == "cuda"):
        model(torch.randn(1, 3, SIZE, SIZE).to(device, next(model.parameters()).dtype))
    assert joined == [1, 2, 1]
