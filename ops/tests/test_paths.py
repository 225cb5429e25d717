"""Paths: the trees of sequences, against scans written as loops over the sequence."""

from __future__ import annotations

from pathlib import Path

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import grootvl_ops
from grootvl_ops import reference


def loop(x: Tensor, decay: Tensor, order: Tensor) -> Tensor:
    """h_t = x_t + a_t h_(t-1) along the order, (L,), the first h being x."""
    h, before = torch.empty_like(x), None
    for vertex in order.tolist():
        h[:, vertex] = x[:, vertex] if before is None else x[:, vertex] + decay[:, vertex] * h[:, before]
        before = vertex
    return h


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_path_is_the_tree_of_its_parents(device, data):
    orders = [data.draw(st.permutations(range(data.draw(st.shared(st.integers(1, 12), key="length")))))] * 2
    orders[1] = orders[1][::-1]
    length = len(orders[0])
    tree = grootvl_ops.path_tree(torch.tensor(orders, device=device))
    for b, order in enumerate(orders):
        parent = [0] * length
        for before, vertex in zip([order[0], *order], order, strict=False):
            parent[vertex] = before
        expected = oracles.parent_to_tree(parent, order)
        assert [field[b].tolist() for field in tree] == list(expected)
    for field in tree:
        assert (field.dtype, field.is_contiguous()) == (torch.int32, True)
    assert len({field.untyped_storage().data_ptr() for field in tree}) == 3


@pytest.mark.parametrize("length", [1, 2, 40, 700, 9000])
def test_down_a_path_is_the_scan_of_a_sequence(device, length):
    """Also on paths long enough to be cut into runs and sections."""
    order = torch.randperm(length)
    x, decay = torch.randn(2, length, 3, dtype=torch.float64), torch.rand(2, length, 3, dtype=torch.float64)
    tree = grootvl_ops.path_tree(order.to(device))
    assert tree.parent.shape == (1, length)
    down = grootvl_ops.tree_scan(x.to(device), decay.to(device), tree, "down")
    torch.testing.assert_close(down.cpu(), loop(x, decay, order), rtol=1e-12, atol=1e-12)
    # Up the reversed path is the same scan, but a vertex's decay is then that of the edge on its other side.
    backwards = grootvl_ops.path_tree(order.flip(0).to(device))
    shifted = torch.empty_like(decay)
    shifted[:, order.roll(1)] = decay[:, order]
    up = grootvl_ops.tree_scan(x.to(device), shifted.to(device), backwards, "up")
    torch.testing.assert_close(up.cpu(), loop(x, decay, order), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_one_path_for_a_batch(device, dtype):
    """A tree of batch size one is taken for each image: results and gradients are those of its copies."""
    order = torch.randperm(30).to(device, dtype)
    one, copies = grootvl_ops.path_tree(order), grootvl_ops.path_tree(order.expand(3, -1))
    results = []
    for tree in (one, copies):
        torch.manual_seed(1)
        x, decay = torch.randn(3, 30, 5, device=device), torch.rand(3, 30, 5, device=device)
        x.requires_grad_(), decay.requires_grad_()
        h = grootvl_ops.tree_scan(x, decay, tree, "down")
        results.append([h, *torch.autograd.grad(h.square().sum(), (x, decay))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "order, error, message",
    [
        (torch.tensor([0, 1, 1]), ValueError, "permutation of 0 to 2"),
        (torch.tensor([[0, 1, 2], [0, 1, 3]]), ValueError, "permutation of 0 to 2"),
        (torch.tensor([-1, 0, 1], dtype=torch.int32), ValueError, "permutation of 0 to 2"),
        (torch.tensor([2**40, 0, 1]), ValueError, "permutation of 0 to 2"),
        (torch.empty(0, dtype=torch.long), ValueError, "at least one vertex"),
        (torch.tensor(0), ValueError, "must be"),
        (torch.zeros(1, 2, 3, dtype=torch.long), ValueError, "must be"),
        (torch.tensor([0.0, 1.0]), TypeError, "int32 or int64"),
    ],
    ids=str,
)
def test_what_is_no_path(device, order, error, message):
    with pytest.raises(error, match=message):
        grootvl_ops.path_tree(order.to(device))


def test_paths_in_graphs(device):
    """Compiled without a break; the check still runs."""
    compiled = torch.compile(grootvl_ops.path_tree, fullgraph=True, backend="aot_eager")
    order = torch.randperm(9, device=device)
    assert all(torch.equal(a, b) for a, b in zip(compiled(order), grootvl_ops.path_tree(order), strict=True))
    with pytest.raises(ValueError, match="permutation"):
        compiled(torch.zeros_like(order))


def test_reference_is_what_runs(device):
    order = torch.randperm(11, device=device).expand(2, -1)
    assert all(torch.equal(a, b) for a, b in zip(reference.path_tree(order), grootvl_ops.path_tree(order), strict=True))


@pytest.mark.parametrize("case", ["scan_2_4_5_7", "scan_1_6_14_14", "scan_2_3_6_4_state3"])
def test_published_cross_scan(device, case):
    """The selective scan of VMamba's published code along its four paths, with all gradients; see golden/README.md."""
    golden = torch.load(Path(__file__).parent / "golden" / "cross_scan.pt", weights_only=True)[case]
    x = golden["x"].flatten(2).mT.to(device).requires_grad_()  # (B, L, D)
    height, width = golden["x"].shape[2:]
    rows = torch.arange(height * width)
    columns = rows.view(height, width).t().flatten()
    inputs = {
        name: golden[name].to(device).requires_grad_() for name in ("delta", "delta_bias", "A_logs", "Bs", "Cs", "Ds")
    }
    out = torch.zeros_like(x)
    for k, order in enumerate((rows, columns, rows.flip(0), columns.flip(0))):
        assert torch.equal(golden["x"].flatten(2)[..., order], golden["xs"][:, k])
        by_pixel = order.argsort().to(device)
        dt, B, C = (inputs[name][:, k].mT[:, by_pixel] for name in ("delta", "Bs", "Cs"))
        path = grootvl_ops.path_tree(order.to(device))
        A_log, bias = inputs["A_logs"][k], inputs["delta_bias"][k]
        y = grootvl_ops.selective_scan(x, dt, None, bias, A_log, B, path, "down", C) + inputs["Ds"][k] * x
        torch.testing.assert_close(y.mT[..., order.to(device)].cpu(), golden["ys"][:, k], rtol=1e-5, atol=1e-5)
        out = out + y
    torch.testing.assert_close(out.mT.unflatten(-1, (height, width)).cpu(), golden["out"], rtol=1e-5, atol=1e-5)
    out.backward(golden["go"].flatten(2).mT.to(device))
    gradients = {name: value.grad for name, value in inputs.items()} | {"x": x.grad.mT.unflatten(-1, (height, width))}
    for name, gradient in gradients.items():
        expected = golden[f"g_{name}"]
        assert (gradient.cpu() - expected).abs().max() < 1e-5 * expected.abs().max(), name
