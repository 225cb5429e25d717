"""VMamba against outputs of the published implementation, and against a plain recomputation for sizes and inputs that
these outputs do not cover."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import fill
from model_helpers import VMAMBA_NAMES, official_state, relative_error, vmamba_names
from torch import Tensor

from grootv.layers import SS2D
from grootv.models import VMamba
from grootv.models.checkpoint import fit_axes, official_to_own

GOLDEN = Path(__file__).parents[1] / "golden"
# Released sizes: channels of the first stage, depths and inner channels per channel, and the name of the file.
SIZES = {
    "vmamba_tiny_s1l8": (96, (2, 2, 8, 2), 1, "vssm1_tiny_0230s"),
    "vmamba_small_s1l20": (96, (2, 2, 20, 2), 1, "vssm1_small_0229s"),
    "vmamba_base_s1l20": (128, (2, 2, 20, 2), 1, "vssm1_base_0229s"),
    "vmamba_tiny_s2l5": (96, (2, 2, 5, 2), 2, "vssm_tiny_0230"),
    "vmamba_small_s2l15": (96, (2, 2, 15, 2), 2, "vssm_small_0229"),
    "vmamba_base_s2l15": (128, (2, 2, 15, 2), 2, "vssm_base_0229"),
}


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN / "vmamba_tiny.pt", weights_only=True)


def golden_model(device: str, scale: dict[str, float] | None = None) -> VMamba:
    state = official_state(VMAMBA_NAMES["vssm1_tiny_0230s"])
    for name, value in state.items():
        value *= next((factor for part, factor in (scale or {}).items() if part in name), 1.0)
    model = timm.create_model("vmamba_tiny_s1l8")
    model.load_state_dict(state)
    return model.to(device)


def test_golden_outputs(device, golden):
    model = golden_model(device).eval()
    with torch.no_grad():
        features, stages = model.forward_intermediates(fill.image(7, 2, 224, 224).to(device), output_fmt="NHWC")
        logits = model.forward_head(features)
    assert relative_error(logits, golden["logits"]) < 1e-4
    for stage, expected in zip(stages, golden["stages"], strict=True):
        assert relative_error(stage[:, ::4, ::4, ::8], expected) < 1e-4


def test_golden_outputs_of_small_activations(device, golden):
    """Where the eps of every norm shows: another one changes this by at least 2.5e-4."""
    parts = ("patch_embed.0", "patch_embed.5", "patch_embed.7", "downsample.1", "downsample.3")
    scale = dict.fromkeys((*parts, "conv2d", "out_proj", "fc2"), 0.02)
    with torch.no_grad():
        logits = golden_model(device, scale).eval()(fill.image(9, 1, 64, 64).to(device))
    assert relative_error(logits, golden["logits_small"]) < 1e-4


def test_golden_gradients(device, golden):
    model = golden_model(device).train()
    logits = model(fill.image(7, 2, 224, 224).to(device))
    (logits * torch.linspace(-1, 1, 1000, device=device)).sum().backward()
    parameters = dict(model.named_parameters())
    assert len(golden["grad_norms"]) == len(parameters)
    for name, norm in golden["grad_norms"].items():
        assert parameters[official_to_own(name)].grad.double().norm().item() == pytest.approx(norm, rel=1e-4), name
    for name in ("x_proj_weight", "A_logs", "Ds", "dt_projs_weight", "dt_projs_bias"):
        grad = parameters[official_to_own(f"layers.0.blocks.0.op.{name}")].grad
        assert relative_error(grad, golden[f"grad_{name}"].reshape(grad.shape)) < 1e-4, name


# A recomputation that shares nothing with the package: official names, plain NCHW maps, four sequences, and the scan as
# a loop over their pixels.


def sequences(x: Tensor) -> Tensor:
    """(B, ..., H, W) maps as the sequences of the four directions, (B, 4, ..., H W)."""
    rows, columns = x.flatten(-2), x.mT.flatten(-2)
    return torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], 1)


def summed_maps(y: Tensor, height: int, width: int) -> Tensor:
    """The sum, at each pixel, of the sequences (B, 4, ..., H W) of the four directions."""
    rows, columns = y[:, 0] + y[:, 2].flip(-1), y[:, 1] + y[:, 3].flip(-1)
    return rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).mT


def plain_ss2d(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """x: (B, C, H, W); p: parameters of a mixer by official names."""
    u = torch.einsum("dc,bchw->bdhw", p["in_proj.weight"], x)
    u = F.silu(F.conv2d(u, p["conv2d.weight"], padding=1, groups=u.shape[1]))
    xs, (height, width), channels = sequences(u), x.shape[2:], u.shape[1]  # xs: (B, 4, D, L)
    states = p["A_logs"].shape[1]
    rank = p["x_proj_weight"].shape[1] - 2 * states
    dt, B, C = torch.einsum("krd,bkdl->bkrl", p["x_proj_weight"], xs).split([rank, states, states], 2)
    raw = torch.einsum("kdr,bkrl->bkdl", p["dt_projs_weight"], dt) + p["dt_projs_bias"].unsqueeze(-1)
    delta, A = F.softplus(raw), -p["A_logs"].exp().view(4, channels, states)
    h, ys = 0.0, []
    for t in range(height * width):
        step = delta[..., t].unsqueeze(-1)  # (B, 4, D, 1)
        h = torch.exp(step * A) * h + step * B[..., t].unsqueeze(2) * xs[..., t].unsqueeze(-1)
        ys.append((h * C[..., t].unsqueeze(2)).sum(-1))
    y = summed_maps(torch.stack(ys, -1) + p["Ds"].view(4, channels, 1) * xs, height, width)
    y = F.layer_norm(y.movedim(1, -1), (channels,), p["out_norm.weight"], p["out_norm.bias"], 1e-5)
    return F.linear(y, p["out_proj.weight"]).movedim(-1, 1)


def plain_model(p: dict[str, Tensor], x: Tensor, depths: tuple[int, ...]) -> list[Tensor]:
    """What the blocks of each stage give, (B, C, H, W), and the logits."""

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, 1e-5).movedim(-1, 1)

    def halved(x: Tensor, conv: str, after: str) -> Tensor:
        return norm(F.conv2d(x, p[f"{conv}.weight"], p[f"{conv}.bias"], stride=2, padding=1), after)

    x = F.gelu(halved(x, "patch_embed.0", "patch_embed.2"))
    x = halved(x, "patch_embed.5", "patch_embed.7")
    outputs = []
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            op = {name.removeprefix(f"{block}.op."): value for name, value in p.items() if f"{block}.op." in name}
            x = x + plain_ss2d(op, norm(x, f"{block}.norm"))
            y = F.linear(norm(x, f"{block}.norm2").movedim(1, -1), p[f"{block}.mlp.fc1.weight"])
            y = F.gelu(y + p[f"{block}.mlp.fc1.bias"])
            x = x + F.linear(y, p[f"{block}.mlp.fc2.weight"], p[f"{block}.mlp.fc2.bias"]).movedim(-1, 1)
        outputs.append(x)
        if i < len(depths) - 1:
            x = halved(x, f"layers.{i}.downsample.1", f"layers.{i}.downsample.3")
    pooled = norm(x, "classifier.norm").mean((2, 3))
    return [*outputs, F.linear(pooled, p["classifier.head.weight"], p["classifier.head.bias"])]


@pytest.mark.parametrize("name", SIZES)
def test_official_names_follow_from_the_sizes(name):
    channels, depths, expand, file = SIZES[name]
    assert vmamba_names(channels, depths, expand) == VMAMBA_NAMES[file]


@pytest.mark.parametrize("name", SIZES)
def test_outputs_of_each_released_size(name):
    """On a rectangular image with odd maps."""
    _, depths, _, file = SIZES[name]
    state = official_state(VMAMBA_NAMES[file])
    model = timm.create_model(name, device="meta").to_empty(device="cpu").eval()
    model.load_state_dict(dict(state))
    image = fill.image(3, 1, 36, 52)
    with torch.no_grad():
        features, stages = model.forward_intermediates(image)
        outputs = [*stages, model.forward_head(features)]
        plain = plain_model(state, image, depths)
    for output, expected in zip(outputs, plain, strict=True):
        assert relative_error(output, expected) < 1e-4


def small(expand: int, device: str, dtype: torch.dtype) -> tuple[VMamba, dict[str, Tensor]]:
    state = official_state(vmamba_names(16, (1, 2), expand, 10))
    model = VMamba(dims=(16, 32), depths=(1, 2), expand=expand, num_classes=10)
    model.load_state_dict(dict(state))
    return model.to(device, dtype).eval(), {name: value.double() for name, value in state.items()}


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("size", [(32, 32), (40, 72), (75, 33), (17, 5), (1, 1)])
def test_outputs_of_other_inputs(size, dtype, bound, device):
    model, plain = small(1 + size[0] % 2, device, dtype)
    image = fill.image(size[0], 2, *size).double()
    with torch.no_grad():
        features, stages = model.forward_intermediates(image.to(device, dtype))
        outputs = [*stages, model.forward_head(features)]
    for output, expected in zip(outputs, plain_model(plain, image, (1, 2)), strict=True):
        assert output.dtype == dtype
        assert relative_error(output, expected) < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_gradients_of_other_inputs(dtype, bound, device):
    model, plain = small(2, device, dtype)
    image = fill.image(3, 2, 44, 36).double().requires_grad_()
    seen = image.detach().to(device, dtype).requires_grad_()
    weights = torch.linspace(-1, 1, 10).double()
    (model(seen) * weights.to(device, dtype)).sum().backward()
    for value in plain.values():
        value.requires_grad_()
    (plain_model(plain, image, (1, 2))[-1] * weights).sum().backward()
    assert relative_error(seen.grad, image.grad) < bound
    parameters = dict(model.named_parameters())
    assert len(parameters) == len(plain)
    for name, value in plain.items():
        grad = parameters[official_to_own(name)].grad
        assert relative_error(grad, value.grad.reshape(grad.shape)) < bound, name


@pytest.mark.parametrize("expand, d_state", [(1, 1), (2, 3)])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (6, 8)])
def test_mixer(size, expand, d_state, device):
    torch.manual_seed(0)
    mixer = SS2D(24, expand, d_state).to(device, torch.float64)
    for parameter in (mixer.A_log, mixer.D_skip, mixer.dt_bias):
        torch.nn.init.normal_(parameter, std=0.5)
    own = {name: value.detach().cpu() for name, value in mixer.named_parameters()}
    official = {}
    for name, shape in vmamba_names(24, (1,), expand, 1, d_state).items():
        if ".op." in name:
            value = own[official_to_own(name).split(".mixer.")[1]]
            official[name.split(".op.")[1]] = value.reshape(shape)
            assert torch.equal(fit_axes(official_to_own(name), value.reshape(shape), value.shape), value)
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    expected = plain_ss2d(official, x.movedim(-1, 1)).movedim(1, -1)
    assert relative_error(mixer(x.to(device)), expected) < 1e-10
