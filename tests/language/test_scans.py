"""Trees over prompts and their scans against the definition in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from grootl import reference
from grootl.scans import MASKED_STEP, continue_scan, continued_length, prefix_scan, state_readers
from grootl.trees import chain_tree, prompt_edges, prompt_tree
from grootvl_ops import path_tree

D, N = 6, 3
CPU = torch.device("cpu")


def sequence(length, seed=0, dtype=torch.float64, batch=1):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return (
        normal(batch, length, D),
        normal(batch, length, D) * 2 - 1,
        normal(D, N) * 0.5,
        normal(batch, length, N),
        normal(batch, length, N),
    )


def edges_of(u, prompt_length, neighbours=3, further=0):
    """`further`: tokens behind those of u."""
    batch, length, _ = u.shape
    start = torch.zeros(batch, dtype=torch.long)
    return prompt_edges(start, start + torch.as_tensor(prompt_length), length + further, neighbours)


def tree_of(u, dt, B, prompt_length, neighbours=3):
    return prompt_tree(F.softplus(dt) * u, B, edges_of(u, prompt_length, neighbours), neighbours)


def scan(u, dt, A_log, B, C, prompt_length, tree_scale, edge_decay, reads=False):
    """y and, if it is read, the last state, of prompts of some lengths; None for no tree."""
    further = N if reads else 0
    edges = None if prompt_length is None else edges_of(u, prompt_length, further=further)
    if reads:
        readers = state_readers(u.shape[0], D, N, CPU)
        u, dt, B_and_C = readers.append_to(u, dt, torch.cat((B, C), dim=-1))
        B, C = B_and_C.split(N, dim=-1)
    chain = chain_tree(u.shape[1], CPU)
    return prefix_scan(u, dt, A_log, B, C, chain, edges, 3, tree_scale, edge_decay, further)


def definition(u, dt, A_log, B, C, prompt_length, **options):
    return reference.prefix_scan(u[0], F.softplus(dt[0]), -A_log.exp(), B[0], C[0], prompt_length, **options)


@pytest.mark.parametrize("neighbours", [1, 2, 3, 5])
@pytest.mark.parametrize(("length", "prompt"), [(1, 1), (2, 2), (3, 3), (3, 1), (4, 4), (12, 12), (12, 7), (30, 25)])
def test_trees_are_those_of_the_definition(length, prompt, neighbours):
    u, dt, _, B, _ = sequence(length, seed=length + prompt)
    x = (F.softplus(dt) * u)[0, :, :, None] * B[0, :, None, :]
    assert tree_of(u, dt, B, prompt, neighbours).parent[0].tolist() == reference.parents(x, prompt, neighbours)


def test_of_equal_weights_the_later_tokens_win():
    """Equal inputs: all weights are equal, and the order of the edges alone decides."""
    length = 9
    u, B = torch.ones(1, length, D, dtype=torch.float64), torch.ones(1, length, N, dtype=torch.float64)
    x = u[0, :, :, None] * B[0, :, None, :]
    found = tree_of(u, torch.zeros_like(u), B, length).parent[0].tolist()
    assert found == reference.parents(x, length)
    assert found == [3, 4, 5, 6, 7, 8, 8, 8, 8]


def test_a_batch_has_the_trees_of_its_rows():
    u, dt, _, B, _ = sequence(20, batch=4)
    prompts = torch.tensor([20, 3, 11, 1])
    together = tree_of(u, dt, B, prompts)
    for row, prompt in enumerate(prompts.tolist()):
        alone = tree_of(u[row : row + 1], dt[row : row + 1], B[row : row + 1], prompt)
        for field, of_row in zip(together, alone, strict=True):
            assert torch.equal(field[row], of_row[0])


@pytest.mark.parametrize("length", [1, 2, 17])
def test_the_chain_is_the_path_through_all_tokens(length):
    for field, expected in zip(chain_tree(length, CPU), path_tree(torch.arange(length)), strict=True):
        assert torch.equal(field, expected) and field.dtype == expected.dtype


@pytest.mark.parametrize("edge_decay", ["next", "own"])
@pytest.mark.parametrize(("length", "prompt"), [(1, 1), (2, 1), (3, 3), (14, 14), (14, 5), (14, 1)])
def test_scan_and_final_state_meet_the_definition(length, prompt, edge_decay):
    u, dt, A_log, B, C = sequence(length, seed=prompt)
    options = {"tree_scale": 0.3, "edge_decay": edge_decay}
    expected, h, s = definition(u, dt, A_log, B, C, prompt, **options)
    y, nothing = scan(u, dt, A_log, B, C, prompt, **options)
    torch.testing.assert_close(y[0], expected)
    assert nothing is None
    y, state = scan(u, dt, A_log, B, C, prompt, **options, reads=True)
    torch.testing.assert_close(y[0], expected)
    state = state[0]
    if edge_decay == "next":
        torch.testing.assert_close(state, h + 0.3 * s)
    else:
        last = torch.exp(-A_log.exp() * F.softplus(dt[0, -1]).unsqueeze(-1))
        torch.testing.assert_close(state, torch.cat((h, last * s), dim=-1))


@pytest.mark.parametrize("edge_decay", ["next", "own"])
def test_gradients_are_those_of_the_definition(edge_decay):
    operands = [value.requires_grad_() for value in sequence(13)]
    options = {"tree_scale": 0.3, "edge_decay": edge_decay}
    weights = torch.linspace(-1, 1, 13 * D, dtype=torch.float64).view(13, D)
    ours = torch.autograd.grad((scan(*operands, 9, **options)[0][0] * weights).sum(), operands)
    expected = torch.autograd.grad((definition(*operands, 9, **options)[0] * weights).sum(), operands)
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("parts", [[1] * 8, [8], [1, 4, 3], [5, 1, 2]], ids=str)
@pytest.mark.parametrize(("tree_scale", "edge_decay"), [(0.3, "next"), (0.3, "own"), (0.0, "next")])
def test_tokens_that_follow_continue_the_state(parts, tree_scale, edge_decay):
    prompt, length = 7, 15
    u, dt, A_log, B, C = sequence(length)
    options = {"tree_scale": tree_scale, "edge_decay": edge_decay}
    expected = definition(u, dt, A_log, B, C, prompt, **options)[0]
    before = (value[:, :prompt] for value in (u, dt))
    _, state = scan(*before, A_log, B[:, :prompt], C[:, :prompt], prompt if tree_scale else None, **options, reads=True)
    found, at = [], prompt
    for part in parts:
        now = slice(at, at + part)
        chain = chain_tree(continued_length(part, N), CPU)
        y, state = continue_scan(u[:, now], dt[:, now], A_log, B[:, now], C[:, now], state, chain, **options)
        found.append(y)
        at += part
    torch.testing.assert_close(torch.cat(found, dim=1)[0], expected[prompt:])


def test_steps_of_very_different_size_lose_no_precision():
    """The scan takes a quotient of neighbouring steps: here they differ by a factor of up to 1e13, or by more."""
    u, dt, A_log, B, C = sequence(24, seed=2, dtype=torch.float32)
    dt = dt * 12
    dt[:, 5, :3] = -90
    operands = [value.requires_grad_() for value in (u, dt, A_log, B, C)]
    exact = [value.detach().double().requires_grad_() for value in operands]
    options = {"tree_scale": 0.3, "edge_decay": "next"}
    expected = definition(*exact, 24, **options)[0]
    found = scan(*operands, 24, **options)[0][0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.square().sum(), operands)
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_a_masked_step_passes_the_state_unchanged():
    u, dt, A_log, B, C = sequence(10, dtype=torch.float32)
    options = {"tree_scale": 0.3, "edge_decay": "next"}
    _, short = scan(u, dt, A_log, B, C, 10, **options, reads=True)
    u, dt = F.pad(u, (0, 0, 0, 4)), F.pad(dt, (0, 0, 0, 4), value=MASKED_STEP)
    B, C = (F.pad(value, (0, 0, 0, 4), value=1) for value in (B, C))
    _, padded = scan(u, dt, A_log, B, C, 10, **options, reads=True)
    torch.testing.assert_close(padded, short)
