"""Layers for other networks: mixers against a plain recomputation, and with submodules that are more than plain."""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import grootvl_ops
from grootv.layers import SS2D, LayerNorm, PathSSM, SelectiveSSM, TreeSSM, selective_ssm, spanning_tree
from grootv.layers.bypass import is_plain
from grootv.layers.linear import call_linear, linear_of_whole_words
from grootv.layers.norms import PromotedLayerNorm
from grootv.models import GrootV, VMamba
from grootv.models.backbone import Downsample, Mlp, Stage
from grootvl_ops import Tree, build_tree, path_tree

DIM, SIZE = 20, (3, 4)  # dt_proj then has a rank of 2


def double(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(kind: type[SelectiveSSM] = TreeSSM, **kwargs: object) -> SelectiveSSM:
    """A mixer in float64 whose parameters all have an effect."""
    torch.manual_seed(0)
    mixer = kind(DIM, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return mixer


class CrossSSM(SelectiveSSM):
    """Row by row and column by column, forwards: what somebody who adds a scan writes."""

    def scans(self, guide: Tensor) -> list[tuple[Tree, str]]:
        pixels = torch.arange(guide.shape[1] * guide.shape[2]).view(guide.shape[1:3])
        return [(path_tree(pixels.flatten()), "down"), (path_tree(pixels.T.flatten()), "down")]


def plain_scan(x: Tensor, decay: Tensor, tree: Tree, direction: str) -> Tensor:
    """The recurrences of `grootvl_ops.tree_scan`, vertex by vertex."""
    maps = []
    for b in range(x.shape[0]):
        parent, order = (field[b % len(field)].tolist() for field in (tree.parent, tree.order))
        h = list(x[b])
        if direction != "down":
            for v in reversed(order[1:]):
                h[parent[v]] = h[parent[v]] + decay[b, v] * h[v]
        if direction != "up":
            for v in order[1:]:
                a = decay[b, v]
                above = h[parent[v]] if direction == "down" else h[parent[v]] - a * h[v]
                h[v] = h[v] + a * above
        maps.append(torch.stack(h))
    return torch.stack(maps)


def plain_mixer(mixer: SelectiveSSM, x: Tensor, scans: list[tuple[Tree, str]] | None, metric: str = "cosine") -> Tensor:
    """What the docstring of `SelectiveSSM` says, along `scans`, or along the spanning tree of the features."""
    p = dict(mixer.named_parameters())
    B, H, W, _ = x.shape
    x, z = (x @ p["in_proj.weight"].T).chunk(2, dim=-1)
    D, states = x.shape[-1], mixer.d_state
    x = F.silu(F.conv2d(x.movedim(-1, 1), p["conv.weight"], padding=1, groups=D)).movedim(1, -1)
    scans = scans or [(build_tree(x, metric), "both")]
    x, z = x.flatten(1, 2), z.flatten(1, 2)
    projected = x @ p["x_proj.weight"].T
    dt, b, c = projected[..., : -2 * states], projected[..., -2 * states : -states], projected[..., -states:]
    delta = F.softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    rates = p["A_log"].view(D, states).exp()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    h = [
        sum(plain_scan(delta * b[..., [n]] * x, (-rates[:, n] * delta).exp(), tree, way) for tree, way in scans)
        for n in range(states)
    ]
    summed = sum(c[..., [n]] * h[n] for n in range(states))
    y = c * norm(h[0], "h_norm") if states == 1 else norm(summed, "h_norm")
    y = norm(y + p["D_skip"] * x, "out_norm") * F.silu(z)
    return (y @ p["out_proj.weight"].T).view(B, H, W, -1)


def assert_same(mixer: SelectiveSSM, actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Equal outputs, and equal gradients of inputs and parameters."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    go, leaves = double(*actual.shape, seed=9), (*inputs, *mixer.parameters())
    gradients = [torch.autograd.grad(output, leaves, go) for output in (actual, expected)]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("d_state", [1, 3])
@pytest.mark.parametrize("given", ["nothing", "guide", "tree", "tree of batch one"])
def test_tree_ssm_is_its_formula(given: str, d_state: int) -> None:
    mixer = make(d_state=d_state)
    x, guide = double(2, *SIZE, DIM).requires_grad_(), double(2, *SIZE, 3, seed=2)
    tree = build_tree(guide, "cosine")
    if given == "tree of batch one":
        tree = Tree(*(field[:1] for field in tree))
    arguments = {"nothing": {}, "guide": {"guide": guide}}.get(given, {"tree": tree})
    scans = None if given == "nothing" else [(tree, "both")]
    assert_same(mixer, mixer(x, **arguments), plain_mixer(mixer, x, scans), (x,))


@pytest.mark.parametrize("d_state", [1, 2])
def test_several_scans_are_summed(d_state: int) -> None:
    mixer = make(CrossSSM, d_state=d_state)
    x = double(2, *SIZE, DIM).requires_grad_()
    assert_same(mixer, mixer(x), plain_mixer(mixer, x, mixer.scans(x)), (x,))


def test_root_and_metric() -> None:
    x = double(2, *SIZE, DIM)
    guide = double(2, *SIZE, 3, seed=2)
    mixer = make(metric="manhattan", root="first")
    tree = build_tree(guide, "manhattan")
    torch.testing.assert_close(mixer(x, guide=guide), plain_mixer(mixer, x, [(tree, "up")]))


def test_the_tree_that_was_built_is_handed_out() -> None:
    mixer, x, guide = make(), double(2, *SIZE, DIM), double(2, *SIZE, 3, seed=2)
    built: list[Tree] = []
    output = mixer(x, guide=guide, built=built)
    assert len(built) == 1 and all(map(torch.equal, built[0], build_tree(guide)))
    assert torch.equal(mixer(x, built[0], None, built), output) and len(built) == 1  # a tree was given, none built


def test_initial_rates_of_several_states() -> None:
    mixer = TreeSSM(8, d_state=3)
    assert mixer.A_log.shape == (16, 3) and mixer.x_proj.out_features == mixer.dt_rank + 6
    torch.testing.assert_close(mixer.A_log.exp(), torch.tensor([1.0, 2, 3]).expand(16, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TreeSSM(0), ValueError, "dim must be at least 1, got 0"),
        (lambda: TreeSSM(8, expand=0), ValueError, "expand must be at least 1, got 0"),
        (lambda: TreeSSM(8, d_state=0), ValueError, "d_state must be at least 1, got 0"),
        (lambda: TreeSSM(8, dilation=0), ValueError, "dilation must be at least 1, got 0"),
        (lambda: TreeSSM(8, metric="dot"), ValueError, "metric must be one of .*'dot'"),
        (lambda: TreeSSM(8, root="middle"), ValueError, "root must be one of .*'middle'"),
        (lambda: spanning_tree(double(1, 2, 2, 3), root="all"), ValueError, "root must be .*, got 'all'"),
        (lambda: PathSSM(8, scan="tree"), ValueError, "scan must be one of .*'cross'.*, got 'tree'"),
        (lambda: PathSSM(0), ValueError, "dim must be at least 1, got 0"),
        (lambda: make()(double(2, 12, DIM)), ValueError, r"x must be \(B, H, W, 20\), got \[2, 12, 20\]"),
        (lambda: make()(double(2, *SIZE, 8)), ValueError, r"x must be \(B, H, W, 20\), got \[2, 3, 4, 8\]"),
        (
            lambda: make()(double(2, *SIZE, DIM), guide=double(2, 4, 3, 1)),
            ValueError,
            r"guide must be \(2, 3, 4, any number of channels\), got \[2, 4, 3, 1\]",
        ),
        (
            lambda: make()(double(2, *SIZE, DIM), guide=double(2, *SIZE)),
            ValueError,
            r"guide must be .*, got \[2, 3, 4\]",
        ),
        (
            lambda: make()(double(2, *SIZE, DIM), path_tree(torch.arange(13))),
            ValueError,
            r"tree's fields must be .*\[2, 12\].*got \[1, 13\]",
        ),
        (
            lambda: make()(double(2, *SIZE, DIM), path_tree(torch.arange(12)), double(2, *SIZE, 1)),
            ValueError,
            "a tree or a guide .* not both",
        ),
        (lambda: make(SelectiveSSM)(double(1, *SIZE, DIM)), NotImplementedError, "SelectiveSSM does not say along"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Submodules that are more than plain


class LowRank(nn.Module):
    """An adapter as fine-tuning libraries put around a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(double(1, base.in_features, seed=3))
        self.up = nn.Parameter(double(base.out_features, 1, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class LowRankLinear(nn.Linear):
    """The same as a subclass, with the base layer's weight under the usual name."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, dtype=base.weight.dtype)
        self.load_state_dict(base.state_dict())
        self.adapter = LowRank(base)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def prune_half(module: nn.Module) -> None:
    """Zeroes every second row of the weight, or every second value."""
    mask = torch.ones_like(module.weight)
    mask[::2] = 0
    prune.custom_from_mask(module, "weight", mask)


def hook_twice(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, __, output: 2 * output)


def pre_hook_twice(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


def offload(module: nn.Module) -> None:
    """Replaces the method of the object, as libraries that move weights in and out do."""
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def change_weight(module: nn.Module, change: object) -> None:
    with torch.no_grad():
        module.weight.copy_(change(module.weight))


def double_output(linear: nn.Module) -> None:
    with torch.no_grad():
        linear.weight.mul_(2)
        linear.bias.mul_(2)


# What is done to the mixer's dt_proj, and a change of the weights of a plain one that computes the same.
CHANGED_STEPS = {
    "LoRA": (
        lambda m: setattr(m, "dt_proj", LowRank(m.dt_proj)),
        lambda linear: change_weight(linear, lambda w: w + double(len(w), 1, seed=4) @ double(1, w.shape[1], seed=3)),
    ),
    "LoRA as a subclass": (
        lambda m: setattr(m, "dt_proj", LowRankLinear(m.dt_proj)),
        lambda linear: change_weight(linear, lambda w: w + double(len(w), 1, seed=4) @ double(1, w.shape[1], seed=3)),
    ),
    "pruning": (
        lambda m: prune_half(m.dt_proj),
        lambda linear: change_weight(linear, lambda w: w * (torch.arange(len(w)) % 2)[:, None]),
    ),
    "parametrization": (
        lambda m: parametrize.register_parametrization(m.dt_proj, "weight", Twice()),
        lambda linear: change_weight(linear, lambda w: 2 * w),
    ),
    "forward hook": (lambda m: hook_twice(m.dt_proj), double_output),
    "forward pre-hook": (
        lambda m: pre_hook_twice(m.dt_proj),
        lambda linear: change_weight(linear, lambda w: 2 * w),
    ),
    "replaced method": (lambda m: offload(m.dt_proj), double_output),
}


@pytest.mark.parametrize("d_state", [1, 2])
@pytest.mark.parametrize("name", CHANGED_STEPS)
def test_a_step_projection_with_more_than_weights_is_called(name: str, d_state: int, device: str) -> None:
    change, same = CHANGED_STEPS[name]
    mixer, equal = make(d_state=d_state), make(d_state=d_state)
    assert mixer.fuses_step
    change(mixer)
    same(equal.dt_proj)
    mixer, equal, x = (operand.to(device) for operand in (mixer, equal, double(2, *SIZE, DIM)))
    assert not mixer.fuses_step and equal.fuses_step
    output = mixer(x)
    torch.testing.assert_close(output, equal(x), rtol=1e-9, atol=1e-10)
    output.sum().backward()
    called = {n: p for n, p in mixer.dt_proj.named_parameters() if name != "LoRA as a subclass" or "adapter" in n}
    assert len(called) >= 2 and all(p.grad is not None and p.grad.norm() > 0 for p in called.values())


def test_a_step_projection_without_bias() -> None:
    mixer, equal = make(), make()
    mixer.dt_proj = nn.Linear(mixer.dt_rank, 2 * DIM, bias=False, dtype=torch.float64)
    with torch.no_grad():
        equal.dt_proj.weight.copy_(mixer.dt_proj.weight)
        equal.dt_proj.bias.zero_()
    x = double(2, *SIZE, DIM)
    assert mixer.fuses_step
    torch.testing.assert_close(mixer(x), equal(x), rtol=1e-9, atol=1e-10)


CHANGED_NORMS = {
    "pruning": (prune_half, lambda norm: change_weight(norm, lambda w: w * (torch.arange(len(w)) % 2))),
    "parametrization": (
        lambda norm: parametrize.register_parametrization(norm, "weight", Twice()),
        lambda norm: change_weight(norm, lambda w: 2 * w),
    ),
    "forward hook": (hook_twice, double_output),
}


@pytest.mark.parametrize("d_state", [1, 2])
@pytest.mark.parametrize("which", ["h_norm", "out_norm"])
@pytest.mark.parametrize("name", CHANGED_NORMS)
def test_norms_with_more_than_weights_are_called(name: str, which: str, d_state: int, device: str) -> None:
    change, same = CHANGED_NORMS[name]
    mixer, equal = make(d_state=d_state), make(d_state=d_state)
    change(getattr(mixer, which))
    same(getattr(equal, which))
    mixer, equal, x = (operand.to(device) for operand in (mixer, equal, double(2, *SIZE, DIM)))
    assert not mixer.fuses_norms and equal.fuses_norms
    output = mixer(x)
    torch.testing.assert_close(output, equal(x), rtol=1e-9, atol=1e-10)
    output.sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())


def test_norms_may_be_replaced() -> None:
    """By ones that compute the same in another way, and by none, which the formula tells."""
    mixer, x = make(), double(2, *SIZE, DIM)
    expected = mixer(x)
    for name in ("h_norm", "out_norm"):
        norm = nn.LayerNorm(2 * DIM, dtype=torch.float64)
        norm.load_state_dict(getattr(mixer, name).state_dict())
        setattr(mixer, name, norm)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-10)

    mixer.h_norm = mixer.out_norm = nn.Identity()
    h, values, z = double(3, 2, 12, 2 * DIM)
    C = double(2, 12)
    expected = (C[..., None] * h + mixer.D_skip * values) * F.silu(z)
    torch.testing.assert_close(mixer.norm_and_gate(h, values, z, C), expected, rtol=1e-9, atol=1e-10)
    assert torch.isfinite(mixer(x)).all()


def test_norms_of_different_eps() -> None:
    mixer = make()
    mixer.out_norm.eps = 0.1
    h, values, z = double(3, 2, 12, 2 * DIM)
    C = double(2, 12)
    y = C[..., None] * mixer.h_norm(h) + mixer.D_skip * values
    expected = F.layer_norm(y, y.shape[-1:], mixer.out_norm.weight, mixer.out_norm.bias, 0.1) * F.silu(z)
    torch.testing.assert_close(mixer.norm_and_gate(h, values, z, C), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["in_proj", "conv", "act", "x_proj", "dt_proj", "h_norm", "out_norm", "out_proj"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_fire_once_for_each_submodule(name: str, everywhere: bool, device: str) -> None:
    mixer, x = make().to(device), double(1, *SIZE, DIM).to(device).requires_grad_()
    expected = mixer(x)
    module, seen = getattr(mixer, name), []
    if everywhere:
        forward = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
        backward = torch.nn.modules.module.register_module_full_backward_hook(lambda m, *_: seen.append(m))
    else:
        forward = module.register_forward_hook(lambda m, *_: seen.append(m))
        backward = module.register_full_backward_hook(lambda m, *_: seen.append(m))
    try:
        output = mixer(x)
        output.sum().backward()
    finally:
        forward.remove()
        backward.remove()
    assert [m for m in seen if m is module] == [module, module]
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)
    assert mixer.fuses_step and mixer.fuses_norms


class Renamed(nn.Linear):
    pass


def adapted(case: str) -> nn.Module:
    """A linear layer of which a call does more than apply its weights."""
    layer = nn.Linear(2, 3)
    if case == "weight norm":
        return nn.utils.parametrizations.weight_norm(layer)
    if case == "old spectral norm":
        return nn.utils.spectral_norm(layer)
    if case == "pruned":
        return prune.l1_unstructured(layer, "weight", amount=2)
    if case == "quantised":  # as torchao's weights, and as distributed ones
        layer.weight = nn.Parameter(TwoTensor(torch.zeros(3, 2), torch.zeros(3, 2)), requires_grad=False)
    elif case == "forward hook":
        layer.register_forward_hook(lambda _, __, output: 2 * output)
    elif case == "hook before":
        layer.register_forward_pre_hook(lambda _, inputs: 2 * inputs[0])
    elif case == "another forward":
        layer.forward = lambda x: 2 * x
    elif case == "subclass":
        return Renamed(2, 3)
    return layer


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "case",
    ["plain", "weight norm", "old spectral norm", "pruned", "quantised", "forward hook", "hook before",
     "another forward", "subclass"],
)  # fmt: skip
def test_what_is_plain(case: str, compiled: bool) -> None:
    """Also as torch.compile sees it."""
    layer, x = adapted(case), torch.zeros(())

    def answer(x: Tensor) -> Tensor:
        return x + 1 if is_plain(layer, nn.Linear, x.device) else x

    torch.compiler.reset()
    found = torch.compile(answer, backend="eager", fullgraph=True)(x) if compiled else answer(x)
    assert found == (case == "plain")


def test_plain_is_of_a_kind_and_on_a_device() -> None:
    cpu = torch.device("cpu")
    assert is_plain(nn.Linear(2, 3, bias=False), nn.Linear, cpu)
    assert not is_plain(nn.Linear(2, 3), nn.Linear, torch.device("meta"))
    assert not is_plain(nn.Identity(), nn.Linear, cpu)
    assert not is_plain(nn.LayerNorm(3), PromotedLayerNorm, cpu)
    assert not is_plain(PromotedLayerNorm(3), nn.LayerNorm, cpu)


def test_pruning_that_was_made_permanent_is_plain_again() -> None:
    mixer = make()
    prune_half(mixer.dt_proj)
    prune.remove(mixer.dt_proj, "weight")
    assert mixer.fuses_step


# Other ways to run a mixer


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("d_state", [1, 2])
def test_scripted_mixers(d_state: int) -> None:
    x, guide, tree = double(2, *SIZE, DIM), double(2, *SIZE, 3), path_tree(torch.arange(12))
    mixer = make(d_state=d_state)
    scripted = torch.jit.script(mixer)
    for arguments in ((x,), (x, tree), (x, None, guide)):
        torch.testing.assert_close(scripted(*arguments), mixer(*arguments))
    assert "grootvl_ops::gated_norm" in str(scripted.inlined_graph)
    with pytest.raises(torch.jit.Error, match="not both"):
        scripted(x, tree, guide)
    mixer.dt_proj = LowRank(mixer.dt_proj)
    mixer.h_norm = nn.Identity()
    changed = torch.jit.script(mixer)
    assert "grootvl_ops::gated_norm" not in str(changed.inlined_graph)
    torch.testing.assert_close(changed(x), mixer(x))
    assert not torch.allclose(changed(x), scripted(x))


@pytest.mark.parametrize("hooked", [None, "dt_proj", "h_norm"])
def test_compiled_and_exported_mixers(hooked: str | None) -> None:
    torch.compiler.reset()
    mixer = make(d_state=2)
    if hooked is not None:
        hook_twice(getattr(mixer, hooked))
    x, tree = double(2, *SIZE, DIM), path_tree(torch.arange(12))
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for arguments in ((x,), (x, tree), (x, None, double(2, *SIZE, 3))):
        torch.testing.assert_close(compiled(*arguments), mixer(*arguments))
        exported = torch.export.export(mixer, arguments)
        torch.testing.assert_close(exported.module()(*arguments), mixer(*arguments))
        targets = {node.target for node in exported.graph.nodes}
        assert (torch.ops.grootvl_ops.gated_norm.default in targets) == (hooked != "h_norm")


def test_copies_keep_their_own_submodules() -> None:
    mixer = make()
    twin = copy.deepcopy(mixer)
    hook_twice(twin.dt_proj)
    assert mixer.fuses_step and not twin.fuses_step


# Norms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_norm_is_pytorchs(dtype: torch.dtype) -> None:
    norm, x = LayerNorm(DIM).to(dtype), double(2, *SIZE, DIM).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (DIM,), norm.weight, norm.bias, 1e-6))


@pytest.mark.parametrize("autocast_output", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_layer_norm_under_autocast(given: torch.dtype, autocast_output: bool) -> None:
    norm, x = LayerNorm(DIM, autocast_output=autocast_output), double(2, *SIZE, DIM).to(given)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    expected = F.layer_norm(x.double(), (DIM,), eps=1e-6)
    assert y.dtype == (torch.bfloat16 if autocast_output else torch.float32)
    torch.testing.assert_close(y.double(), expected, rtol=0.004 if autocast_output else 1e-5, atol=1e-5)


def test_double_precision_stays_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert LayerNorm(DIM, dtype=torch.float64)(double(2, DIM)).dtype == torch.float64


# Mixers and layers of a model


class Pool(nn.Module):
    """A mixer without a tree, and with an initialisation of its own."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.25)

    def no_weight_decay(self) -> set[str]:
        return {"weight"}

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean((1, 2), keepdim=True))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("mixer", [Pool, CrossSSM, partial(TreeSSM, expand=1, d_state=2)])
def test_models_take_any_mixer(mixer: object) -> None:
    model = GrootV(dims=(16, 32), depths=(1, 2), num_classes=5, mixer=mixer).eval()
    images = torch.randn(2, 3, 32, 40)
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if mixer is Pool:
        assert model.no_weight_decay() == {f"stages.{i}.blocks.{j}.mixer.weight" for i, j in ((0, 0), (1, 0), (1, 1))}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        model.init_weights()
        assert (model.stages[1].blocks[0].mixer.weight == 0.25).all()
    if mixer is not CrossSSM:  # TorchScript cannot make its paths
        torch.testing.assert_close(torch.jit.script(model)(images), model(images))


def test_trees_are_shared_only_by_mixers_that_take_them() -> None:
    GrootV(dims=(16,), depths=(2,), tree_per="stage", mixer=partial(TreeSSM, metric="euclidean"))
    with pytest.raises(ValueError, match="needs a mixer that takes `tree` and `built`; Pool does not"):
        GrootV(dims=(16,), depths=(2,), tree_per="stage", mixer=Pool)


@pytest.mark.parametrize("option", [{"scan": "cross"}, {"metric": "euclidean"}, {"root": "first"}, {"d_state": 2}])
def test_options_of_the_tree_beside_another_mixer_are_refused(option: dict) -> None:
    with pytest.raises(ValueError, match="scan, metric, root and d_state have no effect"):
        GrootV(dims=(16,), depths=(1,), mixer=Pool, **option)


def test_norm_and_activation_by_class_and_by_name() -> None:
    sizes = {"dims": (16, 32), "depths": (1, 1), "num_classes": 5}
    model = GrootV(**sizes, norm_layer=partial(nn.LayerNorm, eps=1e-6), act_layer=nn.SiLU).eval()
    kinds = {type(module) for name, module in model.named_modules() if ".mixer" not in name}
    assert nn.LayerNorm in kinds and LayerNorm not in kinds and nn.SiLU in kinds and nn.GELU not in kinds
    named = GrootV(**sizes, norm_layer="layernorm", act_layer="silu").eval()
    named.load_state_dict(model.state_dict())
    usual = GrootV(**sizes, act_layer=nn.SiLU).eval()
    usual.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 40)
    torch.testing.assert_close(named(images), model(images))
    torch.testing.assert_close(usual(images), model(images), rtol=1e-4, atol=1e-5)
    assert GrootV(**sizes, norm_layer="rmsnorm").eval()(images).shape == (2, 5)


class Scale(nn.Module):
    """A norm that takes neither device nor dtype, as timm's before 1.0.21."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("norm_layer", [Scale, "layernorm"])
@pytest.mark.parametrize("family", [GrootV, VMamba])
def test_norms_that_take_no_device_and_no_dtype(family: type[nn.Module], norm_layer: type[nn.Module] | str) -> None:
    sizes = {"dims": (16, 32), "depths": (1, 1), "num_classes": 5, "norm_layer": norm_layer}
    assert family(**sizes).eval()(torch.randn(2, 3, 32, 40)).shape == (2, 5)
    model = family(**sizes, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}


def test_the_operations_are_called_on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model has no second formula of its own: it asks the operations, which choose the kernel."""
    calls = []
    for name in ("layer_norm", "selective_scan", "gated_norm"):
        run = getattr(grootvl_ops, name)
        monkeypatch.setattr(grootvl_ops, name, lambda *a, name=name, run=run: calls.append(name) or run(*a))
    make()(double(1, *SIZE, DIM))
    LayerNorm(4)(torch.ones(4))
    assert calls == ["selective_scan", "gated_norm", "layer_norm"]


# Steps of blocks that are one operation


def make_stage(drop_path: float = 0.0, tree_per: str = "block") -> Stage:
    torch.manual_seed(0)
    return Stage(8, 16, 3, True, 4.0, [drop_path] * 3, tree_per=tree_per, dtype=torch.float64)


def hook(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Hooks that change nothing, and the list of the modules that were called."""
    called: list[nn.Module] = []
    for module in modules:
        module.register_forward_hook(lambda m, *_: called.append(m))
    return called


@pytest.mark.parametrize("tree_per", ["block", "stage"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("which", ["blocks", "norm1", "norm2", "drop_path1", "drop_path2", "norm", "mlp"])
def test_stages_call_what_has_hooks(which: str, drop_path: float, tree_per: str, device: str) -> None:
    """With the same result and gradients, the random choices of stochastic depth included."""
    fused, hooked = (make_stage(drop_path, tree_per).to(device) for _ in range(2))
    modules = [hooked.norm] if which == "norm" else list(hooked.blocks)
    if which not in ("norm", "blocks"):
        modules = [getattr(block, which) for block in modules]
    called = hook(modules)
    results = []
    for stage in (fused, hooked):
        x = double(6, 8, 6, 4).to(device).requires_grad_()
        torch.manual_seed(3)
        output = stage(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *stage.parameters()])])
    assert called == modules
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_stages_are_blocks_one_after_the_other(device: str) -> None:
    stage, x = make_stage().to(device), double(2, 8, 6, 4).to(device)
    expected = stage.downsample(x)
    for block in stage.blocks:
        expected = block(expected)
    expected = stage.norm(expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(stage(x), expected, rtol=1e-9, atol=1e-10)
    stage.grad_checkpointing = True
    torch.testing.assert_close(stage(x), expected, rtol=1e-9, atol=1e-10)


def test_images_that_skip_a_branch() -> None:
    """Stochastic depth of (almost) one: blocks are the identity."""
    stage = make_stage(0.999999)
    x = double(2, 8, 6, 4)
    expected = stage.norm(stage.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(stage.train()(x), expected)
    assert not torch.allclose(stage.eval()(x), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_gelu_of_the_product(dtype: torch.dtype, tolerance: float, autocast: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    mlp, x = Mlp(64, 256).cuda(), torch.randn(2, 5, 7, 64, device="cuda")
    exact = mlp.double()(x.double())
    mlp = mlp.to(torch.float32 if autocast else dtype)
    with torch.autocast("cuda", dtype, enabled=autocast):
        given = x if autocast else x.to(dtype)
        with torch.profiler.profile() as profile, torch.inference_mode():
            found = mlp(given)
        recorded = mlp(given)
    assert "aten::_addmm_activation" in {event.key for event in profile.key_averages()}
    assert found.dtype == recorded.dtype == dtype and recorded.requires_grad
    for result in (found, recorded):
        assert (result.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_in_place_on_a_cpu(approximate: str) -> None:
    mlp = Mlp(6, 24, act_layer=partial(nn.GELU, approximate=approximate))
    x = torch.randn(2, 3, 4, 6)
    given, exact, before = x.clone(), copy.deepcopy(mlp).double()(x.double()), []
    with torch.inference_mode(), torch.profiler.profile() as profile:
        found = mlp(x)
    assert "aten::gelu_" in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, given)
    mlp.fc1.register_forward_hook(lambda _, __, output: before.append(output))
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), found)
        assert torch.equal(before[0], F.linear(x, mlp.fc1.weight, mlp.fc1.bias))


def uses_onednn(model: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    with torch.profiler.profile() as profile:
        model(x)
    return "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
def test_large_products_by_onednn_on_a_cpu(bias: bool) -> None:
    layer, x = nn.Linear(96, 512, bias=bias), torch.randn(2, 7, 9, 96)
    exact = copy.deepcopy(layer).double()(x.double()).detach()
    call = partial(call_linear, layer)
    with torch.inference_mode():
        assert uses_onednn(call, x) and not uses_onednn(layer, x)
        for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
            torch.testing.assert_close(call(given).double(), exact, rtol=1e-5, atol=1e-6)
            assert call(given).is_contiguous()
        # Few rows, small products, and other kinds of numbers and tensors are those of the layer.
        assert not uses_onednn(call, x[0, :5]) and not uses_onednn(partial(call_linear, nn.Linear(96, 8)), x)
        torch.testing.assert_close(call(x[:0]), layer(x[:0]))
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x).dtype == torch.bfloat16 and not uses_onednn(call, x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not uses_onednn(call, x)
        as_subclass = call(x.as_subclass(Subclass))
        assert isinstance(as_subclass, Subclass) and not uses_onednn(call, x.as_subclass(Subclass))
    assert not uses_onednn(call, x) and call(x).requires_grad


class Subclass(Tensor):
    pass


def strided(values: Tensor) -> nn.Parameter:
    """The same values, not side by side in memory."""
    wide = torch.stack([values, torch.full_like(values, 7)], -1)
    return nn.Parameter(wide[..., 0], requires_grad=False)


@needs_onednn
@pytest.mark.parametrize("what", ["strided bias", "strided weight", "expanded bias", "subclass of bias"])
def test_unusual_weights_have_the_results_of_the_layer(what: str) -> None:
    layer, x = nn.Linear(96, 512), torch.randn(2, 7, 9, 96)
    if what == "expanded bias":
        layer.bias = nn.Parameter(torch.ones(1), requires_grad=False)
    elif what == "subclass of bias":
        layer.bias = nn.Parameter(layer.bias.detach().as_subclass(Subclass), requires_grad=False)
    else:
        name = what.split()[1]
        setattr(layer, name, strided(getattr(layer, name).detach()))
    mlp = Mlp(96, 512).eval()
    mlp.fc1 = layer
    with torch.inference_mode():
        torch.testing.assert_close(call_linear(layer, x), layer(x))
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(layer(x))))


@needs_onednn
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("weight", torch.ones(512, 95), "shapes cannot be multiplied"),
        ("weight", torch.ones(512, 97), "shapes cannot be multiplied"),
        ("weight", torch.ones(1, 512, 96), "2 dimensions"),
        ("bias", torch.ones(500), "must match"),
        ("bias", torch.ones(512, dtype=torch.float64), "dtype"),
        ("bias", torch.ones(512, dtype=torch.float16), "dtype"),
    ],
)
def test_weights_that_do_not_fit_raise_as_the_layer_does(name: str, value: Tensor, message: str) -> None:
    layer, x = nn.Linear(96, 512), torch.randn(2, 7, 9, 96)
    setattr(layer, name, nn.Parameter(value, requires_grad=False))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
        call_linear(layer, x)


@pytest.mark.parametrize("outputs", [1, 7, 8, 22])
def test_product_of_whole_words_is_that_of_the_layer_and_zeros(outputs):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(5, outputs, bias=False).double()
    found, expected = linear_of_whole_words(x, layer.weight), layer(x)
    assert found.shape == (2, 3, {1: 8, 7: 8, 8: 8, 22: 24}[outputs]) and not found[..., outputs:].any()
    torch.testing.assert_close(found[..., :outputs], expected)
    grad = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (x, layer.weight), grad)
    for results in zip(gradients, torch.autograd.grad(expected, (x, layer.weight), grad[..., :outputs]), strict=True):
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("d_state", [1, 2])
def test_mixer_in_whole_words_gives_the_same(monkeypatch, d_state):
    """What compiled graphs compute in half precision, here in float64."""
    torch.manual_seed(0)
    mixer = TreeSSM(40, d_state=d_state).double()
    x = torch.randn(2, 4, 5, 40, dtype=torch.float64, requires_grad=True)
    results, ranks = [], []
    selective_scan = grootvl_ops.selective_scan

    def recorded(x, dt, *others):
        ranks.append(dt.size(-1))
        return selective_scan(x, dt, *others)

    monkeypatch.setattr(grootvl_ops, "selective_scan", recorded)
    for whole in (False, True):
        monkeypatch.setattr(selective_ssm, "multiplies_whole_words", lambda *_, whole=whole: whole)
        y = mixer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    assert ranks == [3, 8]
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


class Conversions(TorchDispatchMode):
    """Lists the shapes of what is converted to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def test_autocast_converts_the_weight_of_both_halves_once() -> None:
    mixer, x = TreeSSM(12), torch.randn(2, 3, 4, 12)
    with torch.autocast("cpu", torch.bfloat16), Conversions() as conversions:
        out = mixer(x)
    assert [shape for shape in conversions.shapes if shape in ((48, 12), (24, 12))] == [(48, 12)]
    with Conversions() as conversions:
        out.float().sum().backward()
    assert [shape for shape in conversions.shapes if shape in ((48, 12), (24, 12))] == [(48, 12)]
    assert mixer.in_proj.weight.grad.dtype == torch.float32


@needs_onednn
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_in_the_product_on_a_cpu(approximate: str) -> None:
    mlp, x = Mlp(96, 512, act_layer=partial(nn.GELU, approximate=approximate)), torch.randn(2, 7, 9, 96)
    exact = copy.deepcopy(mlp).double()(x.double()).detach()
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x).double(), exact, rtol=1e-5, atol=1e-6)
        with torch.profiler.profile() as profile:
            mlp(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["mkldnn::_linear_pointwise"] == 2 and not {"aten::gelu", "aten::gelu_"} & counts.keys()


@needs_onednn
def test_modes_that_watch_operations_see_products() -> None:
    """Counters and interceptors know the products of PyTorch, not those of oneDNN."""
    mixer, x = TreeSSM(64).eval(), torch.randn(1, 16, 16, 64)

    class Watch(TorchFunctionMode):
        products = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.products += function is F.linear
            return function(*args, **(kwargs or {}))

    counted = []
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context, FlopCounterMode(display=False) as counter:
            mixer(x)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == counted[2] > 0
    with torch.inference_mode(), Watch() as watch:
        mixer(x)
    assert watch.products == 3  # in_proj, x_proj, out_proj
    with torch.inference_mode():
        assert uses_onednn(mixer, x)


@needs_onednn
@pytest.mark.parametrize("kind", [TreeSSM, SS2D])
@pytest.mark.parametrize("name", ["in_proj", "x_proj", "out_proj"])
def test_layers_with_hooks_are_called_not_multiplied_by_onednn(kind: type[nn.Module], name: str) -> None:
    mixer, x = kind(128).eval(), torch.randn(1, 16, 16, 128)
    with torch.inference_mode():
        expected = mixer(x)
        called = hook([getattr(mixer, name)])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)
    assert called == [getattr(mixer, name)]


@pytest.mark.parametrize("stride, dilation, bias", [(2, 1, False), (2, 1, True), (1, 2, False)])
@pytest.mark.parametrize("size", [(2, 4, 7, 6), (1, 4, 1, 1), (0, 4, 3, 3)], ids=str)
def test_convolution_as_a_product_of_patches(
    size: tuple[int, ...], stride: int, dilation: int, bias: bool, device: str
) -> None:
    down = Downsample(4, 84, stride=stride, dilation=dilation, bias=bias).to(device)
    x = torch.randn(size, device=device).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(down).double()(x.double()).detach()

    def operations(model: nn.Module) -> set[str]:
        with torch.inference_mode(), torch.profiler.profile() as profile:
            found = model(x)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
        assert found.permute(0, 2, 3, 1).is_contiguous()
        return {event.key for event in profile.key_averages()}

    assert ("aten::im2col" in operations(down)) == (device == "cpu")
    torch.testing.assert_close(down(x).double(), exact, rtol=1e-4, atol=1e-4)  # with gradients
    down.conv.register_forward_hook(lambda _, __, output: output)
    assert "aten::im2col" not in operations(down)


def test_large_maps_and_other_convolutions_are_called() -> None:
    x = torch.randn(1, 4, 20, 20)
    for conv in (
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(4, 800, 3, padding="same"),
        nn.Conv2d(4, 800, 3, padding=1, groups=2),
        nn.Conv2d(4, 800, 3, padding=1, padding_mode="reflect"),
    ):
        down = Downsample(4, conv.out_channels)
        down.conv = conv
        with torch.inference_mode():
            found = down(x)
            torch.testing.assert_close(found, down.norm(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
