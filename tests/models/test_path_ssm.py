"""Scans along paths: against loops over the pixels, and made once for each size and device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grootv  # noqa: F401  registers the models
from grootv.layers import PathSSM, TreeSSM, bidirectional, cross, cross_paths, raster, scans
from grootv.layers.path_ssm import PATH_SCANS
from grootvl_ops import check_tree, path_tree

SIZES = [(3, 4), (4, 3), (1, 5), (5, 1), (1, 1)]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch) -> Iterator[dict]:
    monkeypatch.setattr(scans, "_KEPT", {})


def order_of(scan: str, height: int, width: int) -> list[Tensor]:
    """The order of the pixels in each direction, by walking over the map."""
    rows = [(i, j) for i in range(height) for j in range(width)]
    orders = [rows]
    if scan == "bidirectional":
        orders = [rows, rows[::-1]]
    if scan == "cross":
        columns = [(i, j) for j in range(width) for i in range(height)]
        orders = [rows, columns, rows[::-1], columns[::-1]]
    return [torch.tensor([i * width + j for i, j in order]) for order in orders]


def walk(scan: str, x: Tensor, decay: Tensor, height: int, width: int) -> Tensor:
    """(B, L, D): the sum over the directions of h_t = x_t + decay_t h_(t-1), each put back at its pixels. In both
    directions of one path, what passes between two pixels has the decay of the later one, and x counts once."""
    total = -x if scan == "bidirectional" else torch.zeros_like(x)
    for k, order in enumerate(order_of(scan, height, width)):
        entering = decay[:, order]
        if scan == "bidirectional" and k == 1:
            entering = entering.roll(1, dims=1)
        h, states = torch.zeros_like(x[:, 0]), []
        for t, pixel in enumerate(order):
            h = x[:, pixel] + entering[:, t] * h
            states.append(h)
        total = total + torch.stack(states, 1)[:, order.argsort()]
    return total


def plain(mixer: PathSSM, image: Tensor) -> Tensor:
    """What `mixer` computes, one state and one pixel after the other."""
    features, z = mixer.expand_input(image)
    x, N = features.flatten(1, 2), mixer.d_state
    dt, B, C = mixer.x_proj(x).split([mixer.dt_rank, N, N], dim=-1)
    delta, rates = F.softplus(mixer.dt_proj(dt)), mixer.A_log.exp().view(-1, N)
    h = [
        walk(mixer.scan, delta * B[..., [n]] * x, torch.exp(-rates[:, n] * delta), *image.shape[1:3]) for n in range(N)
    ]
    y = C * mixer.h_norm(h[0]) if N == 1 else mixer.h_norm(sum(C[..., [n]] * h[n] for n in range(N)))
    y = mixer.out_norm(y + mixer.D_skip * x) * F.silu(z.flatten(1, 2))
    return mixer.out_proj(y).unflatten(1, image.shape[1:3])


@pytest.mark.parametrize("d_state", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scan", PATH_SCANS)
def test_the_mixer_is_a_loop_over_the_pixels(scan, size, d_state):
    torch.manual_seed(0)
    mixer = PathSSM(8, scan, d_state=d_state, dtype=torch.float64)
    nn.init.normal_(mixer.A_log, std=0.5)
    image = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    weights, inputs = torch.randn_like(image), (image, *mixer.parameters())
    result, expected = mixer(image), plain(mixer, image)
    torch.testing.assert_close(result, expected)
    gradients, expected_gradients = (torch.autograd.grad((y * weights).sum(), inputs) for y in (result, expected))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_paths_are_those_of_the_operations(size):
    maps = torch.empty(2, *size, 1)
    for scan, function in (("raster", raster), ("bidirectional", bidirectional), ("cross", cross)):
        expected = order_of(scan, *size)[: 1 if scan == "bidirectional" else None]
        for (path, direction), order in zip(function(maps), expected, strict=True):
            assert all(map(torch.equal, path, path_tree(order)))
            assert all(field.dtype == torch.int32 and field.is_contiguous() for field in path)
            assert direction == ("both" if scan == "bidirectional" else "down")
            check_tree(path)


def test_paths_are_made_once_for_each_size_and_device():
    made = cross(torch.empty(2, 3, 4, 1))
    assert all(a is b for (a, _), (b, _) in zip(made, cross(torch.empty(7, 3, 4, 5)), strict=True))
    assert raster(torch.empty(1, 3, 4, 1))[0][0] is bidirectional(torch.empty(1, 3, 4, 1))[0][0]
    assert cross(torch.empty(2, 4, 3, 1))[0][0] is not made[0][0]
    assert cross(torch.empty(2, 3, 4, 1, device="meta"))[0][0].parent.is_meta
    together = [torch.cat(fields) for fields in zip(*(path for path, _ in made), strict=True)]
    assert all(map(torch.equal, cross_paths(torch.empty(2, 3, 4, 1)), together))
    assert len(scans._KEPT) == 4
    for width in range(1, 2 * scans._MAX_KEPT):
        raster(torch.empty(1, 1, width, 1))
    assert len(scans._KEPT) == scans._MAX_KEPT


def test_kept_paths_are_for_every_mode():
    """A path that was made in inference mode trains; under transforms and in graphs none is kept."""
    mixer, image = PathSSM(8, "cross").double(), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    with torch.inference_mode():
        mixer(image)
    mixer(image).sum().backward()
    parameters = dict(mixer.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(mixer, parameters, (torch.cat((image, image), 1),)).sum()

    torch.func.grad(loss)(parameters)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        mixer(mode.from_tensor(image[:, :2]))
    assert list(scans._KEPT) == [(3, 4, True, image.device)]
    assert all(type(field) is Tensor and not field.is_inference() for path, _ in cross(image) for field in path)


@pytest.mark.parametrize("scan", PATH_SCANS)
def test_the_scan_is_an_argument_of_the_model(scan):
    """The models differ in nothing but the order: their weights load into each other."""
    tree = timm.create_model("grootv_nano", dims=(16, 32), depths=(1, 1), num_classes=3).eval()
    model = timm.create_model("grootv_nano", dims=(16, 32), depths=(1, 1), num_classes=3, scan=scan).eval()
    assert all(block.mixer.scan == scan for stage in model.stages for block in stage.blocks)
    model.load_state_dict(tree.state_dict())
    assert tree.no_weight_decay() == model.no_weight_decay()
    images = torch.randn(2, 3, 50, 70)
    assert not torch.equal(model(images), tree(images))
    model.train()(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_on_one_row_both_directions_are_the_tree():
    """Where there is one tree only, the scan along it is the tree scan."""
    torch.manual_seed(0)
    tree, path = TreeSSM(8), PathSSM(8, "bidirectional")
    path.load_state_dict(tree.state_dict())
    row = torch.randn(2, 1, 9, 8)
    assert torch.equal(tree(row), path(row))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scan": "spiral"}, r"scan must be one of \('tree', 'raster', 'bidirectional', 'cross'\), got 'spiral'"),
        ({"scan": "raster", "metric": "euclidean"}, "metric and root .* no effect on scan='raster'"),
        ({"scan": "cross", "root": "last"}, "metric and root .* no effect on scan='cross'"),
        ({"scan": "cross", "tree_per": "stage"}, "tree_per='stage' needs a mixer that takes .*; PathSSM does not"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("grootv_nano", **options)
