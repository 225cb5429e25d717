"""Steps of blocks that one operation computes: with the same result as the modules that they stand for."""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from model_helpers import double
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import grootvl_ops
from grootv.layers import SS2D, TreeSSM, selective_ssm
from grootv.layers.linear import call_linear, linear_of_whole_words
from grootv.models.backbone import Downsample, Mlp, Stage


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
