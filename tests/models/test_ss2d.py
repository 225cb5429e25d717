"""SS2D, VMamba's mixer, as a layer: initial values, precision, and submodules that are more than plain. Its results are
compared with a plain recomputation in test_vmamba_golden.py."""

import pytest
import torch
from model_helpers import double
from torch import nn
from torch.nn.utils import prune

from grootv.layers import SS2D
from grootv.models import VMamba

DIM, SIZE = 20, (3, 4)


def make(**kwargs: object) -> SS2D:
    torch.manual_seed(0)
    return SS2D(DIM, **{"dtype": torch.float64, **kwargs})


def test_initial_values() -> None:
    torch.manual_seed(0)
    mixer = SS2D(256, expand=2, d_state=2)
    assert (mixer.dt_rank, mixer.x_proj.out_features) == (16, 4 * (16 + 2 * 2))
    assert torch.equal(mixer.A_log, torch.tensor([1.0, 2.0]).log().expand(4, 512, 2))
    assert torch.equal(mixer.D_skip, torch.ones(4, 512))
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    # Uniform distributions: their bound, and a standard deviation of bound / sqrt(3).
    for weight, bound in ((mixer.dt_weight, 16**-0.5), (mixer.x_proj.weight, 512**-0.5)):
        assert bound * 0.95 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    dt = nn.functional.softplus(mixer.dt_bias)
    assert dt.min() > 0.999e-3 and dt.max() < 1.001e-1
    assert dt.log().mean().item() == pytest.approx(-4.605, abs=0.1)  # the middle between log 1e-3 and log 1e-1
    assert mixer.out_norm.eps == 1e-5
    assert mixer.no_weight_decay() == {"D_skip"}


@pytest.mark.parametrize("name", ["in_proj", "conv", "act", "x_proj", "out_norm", "out_proj"])
def test_hooks_fire_once_for_each_submodule(name: str) -> None:
    mixer, seen = make(), []
    module = mixer.get_submodule(name)
    module.register_forward_hook(lambda m, *_: seen.append(m))
    module.register_full_backward_hook(lambda m, *_: seen.append(m))
    mixer(double(1, *SIZE, DIM).requires_grad_()).sum().backward()
    assert seen == [module, module]


def test_changed_submodules_are_called() -> None:
    """Pruned, and replaced by ones that compute the same in another way."""
    mixer, equal, x = make(), make(), double(2, *SIZE, DIM)
    prune.l1_unstructured(mixer.x_proj, "weight", amount=0.5)
    with torch.no_grad():
        equal.x_proj.weight.mul_(mixer.x_proj.weight_mask)
    mixer.out_norm = nn.LayerNorm(DIM, eps=1e-5, dtype=torch.float64)
    mixer.out_proj = nn.Sequential(mixer.out_proj, nn.Identity())
    torch.testing.assert_close(mixer(x), equal(x))
    assert not torch.allclose(mixer(x), make()(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("d_state", [1, 2])
def test_scripted(d_state: int) -> None:
    """Also in half precision, in which the sum over the directions is float32."""
    mixer, x = make(d_state=d_state), double(2, *SIZE, DIM)
    torch.testing.assert_close(torch.jit.script(mixer)(x), mixer(x))
    mixer, x = mixer.bfloat16(), x.bfloat16()
    torch.testing.assert_close(torch.jit.script(mixer)(x), mixer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_state", [1, 2])
def test_the_sum_of_the_directions_is_computed_in_float32(dtype: torch.dtype, d_state: int) -> None:
    """From half inputs it is exact but for the rounding of each scan, also where float16 has no number for it."""
    mixer = make(d_state=d_state)
    u = double(2, 12, DIM).to(dtype)
    projected = double(2, 12, mixer.x_proj.out_features).to(dtype)
    paths = mixer.paths(u.view(2, *SIZE, DIM))
    for skip in (1, 3e4):
        nn.init.constant_(mixer.D_skip, skip)
        y = mixer.selective_scan(u, projected, paths)
        expected = mixer.selective_scan(u.double(), projected.double(), paths)
        assert y.dtype == torch.float32 and expected.dtype == torch.float64
        assert (y - expected).norm() < 0.004 * expected.norm()
    assert expected.abs().max() > 65504


def test_double_precision_stays_under_autocast() -> None:
    mixer, x = make(), double(2, *SIZE, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    torch.testing.assert_close(y, mixer(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SS2D(0), "dim must be at least 1, got 0"),
        (lambda: SS2D(8, expand=0), "expand must be at least 1, got 0"),
        (lambda: SS2D(8, d_state=-1), "d_state must be at least 1, got -1"),
        (lambda: SS2D(8, dilation=0), "dilation must be at least 1, got 0"),
        (lambda: make()(double(2, 12, DIM)), r"x must be \(B, H, W, 20\), got \[2, 12, 20\]"),
        (lambda: make()(double(2, *SIZE, 8)), r"x must be \(B, H, W, 20\), got \[2, 3, 4, 8\]"),
        (lambda: VMamba(dims=(16,), depths=(1,), expand=0), "expand must be at least 1, got 0"),
        (lambda: VMamba(dims=(16,), depths=(1, 1)), r"dims and depths .*\(16,\)"),
        (lambda: VMamba(norm_layer="nonsense"), "timm knows no norm_layer 'nonsense'"),
        (lambda: VMamba(drop_path_rate=1.0), "drop_path_rate must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
