"""Layers for other networks: mixers against a plain recomputation, and with submodules that are more than plain."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from model_helpers import double
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

import grootvl_ops
from grootv.layers import LayerNorm, PathSSM, SelectiveSSM, TreeSSM, spanning_tree
from grootv.layers.bypass import is_plain
from grootv.layers.norms import PromotedLayerNorm
from grootv.models import GrootV, VMamba
from grootvl_ops import Tree, build_tree, path_tree

DIM, SIZE = 20, (3, 4)  # dt_proj then has a rank of 2


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
