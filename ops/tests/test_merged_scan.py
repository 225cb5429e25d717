"""Several selective scans in one call, against single ones in float64: the groups of merged_scan, and states."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_selective_scan import TOLERANCE, assert_near, state_operands, with_gradients
from torch import Tensor
from tree_makers import SHAPES, make_tree

import grootvl_ops
from grootvl_ops import Tree

library = torch.ops.grootvl_ops
ONE_SWEEP = pytest.mark.parametrize("direction", ["down", "up"])
NAMES = ("x", "dt", "dt_weight", "dt_bias", "A_log", "B", "C", "D_skip")


def merged_operands(batch: int, length: int, channels: int, rank: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """In the order of NAMES; step sizes from small ones to those where softplus is the identity."""
    parameter = dtype if dtype == torch.float64 else torch.float32
    biases = torch.linspace(-7, 3, channels).repeat(groups, 1)
    if channels > 1:
        biases[:, -1] = 30
    maps = [torch.randn(batch, length, channels), torch.randn(batch, length, groups, rank)]
    parameters = [torch.randn(groups, channels, rank), biases, torch.randn(groups, channels) / 2]
    weights = [torch.randn(batch, length, groups) for _ in range(2)]
    return [
        *(m.to(dtype) for m in maps),
        *(p.to(parameter) for p in parameters),
        *(w.to(dtype) for w in weights),
        torch.randn(channels).to(parameter),
    ]


def trees_of(groups: int, length: int) -> Tree:
    """A tree for each group: of another shape each, so that no group takes that of another one."""
    made = [make_tree(list(SHAPES)[k % len(SHAPES)], 1, length) for k in range(groups)]
    return Tree(*(torch.cat(fields) for fields in zip(*made, strict=True)))


def on(device: str, tree: Tree) -> Tree:
    return Tree(*(field.to(device) for field in tree))


def one_by_one(x, dt, dt_weight, dt_bias, A_log, B, C, D_skip, tree: Tree, direction: str) -> Tensor:
    """The definition, on tree scans of x scaled by PyTorch's operations."""
    y = D_skip * x
    for k in range(len(A_log)):
        delta = F.softplus(dt[:, :, k] @ dt_weight[k].T + dt_bias[k])
        of_group = Tree(*(field[k : k + 1].expand(len(x), -1) for field in tree))
        inputs, decay = delta * B[..., k, None] * x, torch.exp(-A_log[k].exp() * delta)
        y = y + C[..., k, None] * grootvl_ops.tree_scan(inputs, decay, of_group, direction)
    return y


def merged(*operands: Tensor, tree: Tree, direction: str, dtype: torch.dtype | None = None) -> Tensor:
    return grootvl_ops.merged_scan(*operands[:7], tree, direction, operands[7], dtype)


@ONE_SWEEP
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "batch, length, channels, rank, groups",
    [(1, 1, 1, 1, 1), (2, 3, 3, 2, 2), (3, 9, 32, 1, 4), (2, 40, 70, 3, 3), (1, 700, 40, 2, 4), (2, 9000, 8, 2, 2)],
)
def test_merged_scan(device, batch, length, channels, rank, groups, dtype, direction, poisoned_memory):
    """Also trees that are cut into runs and sections; the same bits each time."""
    tree, operands = trees_of(groups, length), merged_operands(batch, length, channels, rank, groups, dtype)
    grad = torch.randn(operands[0].shape).to(dtype)
    expected = with_gradients(one_by_one, [o.double() for o in operands], grad.double(), tree, direction)
    run = partial(
        with_gradients,
        partial(merged, tree=on(device, tree), direction=direction),
        [o.to(device) for o in operands],
        grad.to(device),
    )
    actual, *again = (run() for _ in range(3))
    assert [a.dtype for a in actual] == [dtype, *(o.dtype for o in operands)]
    assert_near(actual, expected, dtype)
    assert all(torch.equal(a, b) for results in again for a, b in zip(actual, results, strict=True))


@ONE_SWEEP
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_result_in_float32(device, dtype, direction):
    """Sums that half precision cannot hold."""
    tree, operands = trees_of(3, 50), merged_operands(2, 50, 24, 2, 3, dtype)
    operands[-1] = torch.full((24,), 3e4)
    expected = one_by_one(*(o.double() for o in operands), tree, direction)
    y = merged(*(o.to(device) for o in operands), tree=on(device, tree), direction=direction, dtype=torch.float32)
    assert y.dtype == torch.float32
    assert_near([y], [expected], dtype)
    assert y.abs().max() > 6.6e4


@ONE_SWEEP
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length, channels", [(21, 5), (700, 33), (9000, 40)])
def test_states_in_one_launch(device, length, channels, dtype, direction):
    """Of one tree for a batch, cut into runs and sections; 9000 vertices take several launches in float64."""
    tree = make_tree("scattered", 1, length)
    operands, grad = state_operands(2, length, channels, 2, 3, dtype), torch.randn(2, length, channels).to(dtype)

    def by_state(x, dt, dt_weight, dt_bias, A_log, B, C):
        delta = F.softplus(dt @ dt_weight.T + dt_bias)
        return sum(
            C[..., n, None]
            * grootvl_ops.tree_scan(delta * B[..., n, None] * x, torch.exp(-A_log[:, n].exp() * delta), tree, direction)
            for n in range(3)
        )

    expected = with_gradients(by_state, [o.double() for o in operands], grad.double())
    there = on(device, tree)
    actual = with_gradients(
        lambda *o: grootvl_ops.selective_scan(*o[:6], there, direction, o[6]),
        [o.to(device) for o in operands],
        grad.to(device),
    )
    assert_near(actual, expected, dtype)


@ONE_SWEEP
def test_gradcheck(device, direction):
    tree = on(device, trees_of(2, 7))
    operands = [o.to(device).requires_grad_() for o in merged_operands(2, 7, 3, 2, 2, torch.float64)]
    assert torch.autograd.gradcheck(partial(merged, tree=tree, direction=direction), operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(device, dtype):
    tree = on(device, trees_of(2, 9))
    operands = [o.to(device) for o in merged_operands(2, 9, 3, 2, 2, dtype)]
    y, kept = library.merged_scan(*operands, *tree, "down", torch.float32, True)
    torch.library.opcheck(library.merged_scan_backward.default, (y, *operands, *tree, kept, "down"))
    torch.library.opcheck(library.merged_scan.default, (*operands, *tree, "up"))
    operands = [o.requires_grad_() for o in operands]
    torch.library.opcheck(library.merged_scan.default, (*operands, *tree, "down", torch.float32, True))
    with pytest.raises(ValueError, match="keep=True"):
        library.merged_scan(*operands, *tree, "down")


def test_operands_need_not_be_contiguous(device):
    """Slices of one projection, as a model gives them."""
    tree = on(device, trees_of(4, 17))
    operands = [o.to(device) for o in merged_operands(2, 17, 24, 3, 4, torch.float32)]
    expected = merged(*operands, tree=tree, direction="down")
    projected = torch.cat([operands[1], operands[5].unsqueeze(-1), operands[6].unsqueeze(-1)], -1)
    operands[1], operands[5], operands[6] = projected[..., :3], projected[..., 3], projected[..., 4]
    operands[0] = torch.stack([operands[0]] * 2, -1)[..., 1]
    for number in (2, 3, 4, 7):
        operands[number] = operands[number].repeat_interleave(2, -1)[..., ::2]
    torch.testing.assert_close(merged(*operands, tree=tree, direction="down"), expected, rtol=1e-5, atol=1e-5)


def test_memory_that_is_kept(device):
    """Nothing where no gradient is wanted."""
    tree = on(device, trees_of(2, 9))
    operands = [o.to(device) for o in merged_operands(2, 9, 3, 2, 2, torch.float32)]
    assert library.merged_scan(*operands, *tree, "down")[1].numel() == 0
    operands[0].requires_grad_()
    with torch.no_grad():
        assert not merged(*operands, tree=tree, direction="down").requires_grad
    assert merged(*operands, tree=tree, direction="down").requires_grad


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_merged_scan_refuses(device, number):
    tree = on(device, trees_of(2, 5))
    operands = [o.to(device) for o in merged_operands(2, 5, 3, 4, 2, torch.float32)]
    for bad in (operands[number][..., :0], operands[number].unsqueeze(0), operands[number].long()):
        with pytest.raises((ValueError, TypeError), match=NAMES[number] if number else None):
            merged(*operands[:number], bad, *operands[number + 1 :], tree=tree, direction="down")
    with pytest.raises(ValueError, match="device"):
        merged(*operands[:number], operands[number].to("meta"), *operands[number + 1 :], tree=tree, direction="down")


def test_merged_scan_refuses_directions_trees_and_dtypes(device):
    tree = on(device, trees_of(2, 5))
    operands = [o.to(device) for o in merged_operands(2, 5, 3, 4, 2, torch.float32)]
    with pytest.raises(ValueError, match="direction must be 'up' or 'down', got 'both'"):
        merged(*operands, tree=tree, direction="both")
    for wrong in (Tree(*(field[:1] for field in tree)), Tree(*(field[:, :4] for field in tree))):
        with pytest.raises(ValueError, match=r"the tree's fields must be \(K, L\)"):
            merged(*operands, tree=wrong, direction="down")
    with pytest.raises(TypeError, match="dtype must be"):
        merged(*operands, tree=tree, direction="down", dtype=torch.float16)
    with pytest.raises(ValueError, match="direction"):
        library.merged_scan(*operands, *tree, "sideways")


def test_no_pixels(device):
    tree = Tree(*(torch.empty(2, 4, dtype=torch.int32, device=device) for _ in range(3)))
    operands = [o.to(device) for o in merged_operands(0, 4, 3, 2, 2, torch.float32)]
    results = with_gradients(partial(merged, tree=tree, direction="down"), operands, operands[0])
    assert [r.shape for r in results] == [operands[0].shape, *(o.shape for o in operands)]
