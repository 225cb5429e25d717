"""GrootV and VMamba as timm models: what timm's own test suite asks of every model, and what it leaves open."""

import copy
import re
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.optim.optim_factory import param_groups_weight_decay
from torch import nn

import grootv
import grootvl_ops
from grootv.layers import scans
from grootv.models import GrootV, VMamba
from grootv.models.backbone import HierarchicalBackbone

SIZES = {
    "grootv_tiny": 29_958_600,
    "grootv_small": 51_331_624,
    "grootv_base": 90_597_096,
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_base_s1l20": 86_614_504,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_base_s2l15": 88_557_800,
}
DIMS, DEPTHS = (16, 32, 48, 64), (1, 2, 2, 1)


@pytest.fixture(params=["grootv", "vmamba"])
def family(request):
    """A family of models, for what timm asks of each."""
    return request.param


def small(family: str = "grootv", **kwargs) -> HierarchicalBackbone:
    torch.manual_seed(0)
    model_cls = {"grootv": GrootV, "vmamba": VMamba}[family]
    return model_cls(**{"dims": DIMS, "depths": DEPTHS, "num_classes": 10, **kwargs})


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]


def test_nano_has_about_three_million_parameters(family):
    model = timm.create_model(f"{family}_nano", device="meta")
    assert 2.4e6 < sum(p.numel() for p in model.parameters()) < 3.5e6


def test_registered_by_import_and_nothing_heavy_is_imported():
    heavy = ("mmengine", "mmcv", "mmdet", "mmseg", "matplotlib", "sklearn", "skimage")
    code = "import sys, grootv, timm; print(timm.list_models(['grootv*', 'vmamba*']));"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [str(sorted([*SIZES, "grootv_nano", "vmamba_nano"])), "[]"]
    assert grootv.__version__


def test_initial_values():
    model = timm.create_model("grootv_nano")
    mixer = model.stages[2].blocks[1].mixer
    inner = mixer.A_log.numel()
    assert torch.equal(mixer.A_log, torch.zeros(inner))
    assert torch.equal(mixer.D_skip, torch.ones(inner))
    for linear in (mixer.in_proj, mixer.out_proj, model.stages[0].blocks[0].mlp.fc1, model.head.fc):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.fc.bias.abs().max() == 0
    # Uniform distributions: their bound, and a standard deviation of bound / sqrt(3).
    for weight, bound in ((mixer.dt_proj.weight, mixer.dt_rank**-0.5), (mixer.x_proj.weight, inner**-0.5)):
        assert bound * 0.95 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    dt = nn.functional.softplus(mixer.dt_proj.bias)
    assert dt.min() > 0.999e-3 and dt.max() < 1.001e-1
    assert dt.log().mean().item() == pytest.approx(-4.605, abs=0.3)  # the middle between log 1e-3 and log 1e-1
    conv = model.stages[1].downsample.conv.weight
    assert conv.std().item() == pytest.approx((3 * conv[0].numel()) ** -0.5, rel=0.1)  # PyTorch's default


def test_weights_after_the_meta_device(family):
    model = small(family, device="meta", dtype=torch.float64).to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(tensor).all() for tensor in (*model.parameters(), *model.buffers()))
    expected = small(family, dtype=torch.float64)
    for (name, actual), value in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert actual.shape == value.shape
        assert actual.std().nan_to_num().item() == pytest.approx(value.std().nan_to_num().item(), rel=0.5), name
    assert torch.isfinite(model(image(1, 3, 64, 64).double())).all()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"metric": "dot"}, "metric must be one of .*'dot'"),
        ({"root": "middle"}, "root must be one of .*'middle'"),
        ({"tree_per": "model"}, "tree_per must be one of .*'model'"),
        ({"dims": (16, 32)}, r"dims and depths .*\(16, 32\)"),
        ({"output_stride": 24}, "output_stride must be 4, 8, 16 or 32, got 24"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model("grootv_nano", not_an_argument=1, device="meta")


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 300), (64, 64), (75, 33), (224, 32)])
def test_any_input_size(family, size):
    model = small(family).eval()
    with torch.no_grad():
        features, stages = model.forward_intermediates(image(2, 3, *size))
        logits = model(image(2, 3, *size))
    for i, (stage, dim) in enumerate(zip(stages, DIMS, strict=True)):
        assert stage.shape == (2, dim, *(-(-side // (4 * 2**i)) for side in size))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_input_channels(family, channels):
    model = small(family, in_chans=channels).eval()
    assert model(image(1, channels, 32, 48)).shape == (1, 10)


def test_batch_entries_do_not_mix(family):
    model = small(family).eval()
    images = image(3, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(x[None]) for x in images]), rtol=1e-5, atol=1e-6)


def test_memory_format_does_not_matter(family):
    model = small(family).eval()
    images = image(2, 3, 40, 56)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(model(images.contiguous(memory_format=torch.channels_last)), expected)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_other_dtypes(family, dtype, bound):
    model = small(family).eval()
    images = image(2, 3, 64, 64)
    expected = model(images)
    cast = copy.deepcopy(model).to(dtype)
    made = small(family, dtype=dtype).eval()
    made.load_state_dict(cast.state_dict())
    for other in (cast, made):
        logits = other(images.to(dtype))
        assert logits.dtype == dtype
        assert (logits.float() - expected).norm() < bound * expected.norm()
    logits.float().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == dtype, name
        assert torch.isfinite(parameter.grad).all(), name


def test_autocast_is_near_float32(family):
    model = small(family).eval()
    images = image(2, 3, 64, 64)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.stages[0].blocks[0].mixer.in_proj(images.new_ones(1, DIMS[0])).dtype == torch.bfloat16
        logits = model(images)
        assert model.forward_features(images).dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()
    logits.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_scan_under_autocast_is_computed_in_float32():
    """From bfloat16 inputs the results are exact but for their last rounding, half a step of one part in 128: a step
    size or a sum in bfloat16 would be off by more than a percent."""
    mixer = small().stages[0].blocks[0].mixer
    x, z = image(2, 1, 12, mixer.D_skip.numel()).bfloat16()
    projected = image(1, 12, mixer.dt_rank + 2).bfloat16()
    along = [(grootvl_ops.build_tree(x.view(1, 3, 4, -1)), "both")]
    with torch.autocast("cpu", torch.bfloat16):
        actual = mixer.selective_scan(x, z, projected, along)
    expected = mixer.selective_scan(x.double(), z.double(), projected.double(), along)
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() < 0.004 * expected.norm()


def test_tree_per_stage_builds_one_tree_a_stage(monkeypatch):
    built = []
    build = scans._build_tree
    monkeypatch.setattr(scans, "_build_tree", lambda x, *args: built.append(x.shape) or build(x, *args))
    images = image(2, 3, 64, 64)
    shared, own = small(tree_per="stage").eval(), small().eval()
    own.load_state_dict(shared.state_dict())
    outputs = shared(images)
    assert len(built) == len(DEPTHS)
    built.clear()
    other = own(images)
    assert len(built) == sum(DEPTHS)
    assert not torch.allclose(outputs, other)
    # In stages of one block there is nothing to share.
    single = {"depths": (1, 1, 1, 1)}
    shared, own = small(tree_per="stage", **single).eval(), small(**single).eval()
    own.load_state_dict(shared.state_dict())
    assert torch.equal(shared(images), own(images))


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"tree_per": "stage"}, {"drop_path_rate": 0.5, "drop_rate": 0.2}, {"family": "vmamba", "drop_path_rate": 0.5}],
)
def test_grad_checkpointing_changes_nothing(kwargs):
    model = small(**kwargs).train()
    recomputing = copy.deepcopy(model)
    recomputing.set_grad_checkpointing()
    images = image(4, 3, 48, 80)
    losses = []
    for m in (model, recomputing):
        torch.manual_seed(5)
        losses.append(m(images).square().sum())
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, p), q in zip(model.named_parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_drop_path_grows_from_first_to_last_block(family):
    model = small(family, drop_path_rate=0.5)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.5, sum(DEPTHS)).tolist())


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_forward_intermediates(family, output_fmt):
    model = small(family).eval()
    images = image(2, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_features(images)
        features, every = model.forward_intermediates(images, output_fmt=output_fmt)
        assert torch.equal(features, expected)
        assert torch.equal(model.forward_head(features), model(images))
        channel = output_fmt.index("C")
        assert [m.shape[channel] for m in every] == list(DIMS)
        last = every[-1] if output_fmt == "NCHW" else every[-1].permute(0, 3, 1, 2)
        assert torch.equal(last, expected)
        for indices, chosen in ((2, every[2:]), ([0, 2], [every[0], every[2]]), ([-3], [every[1]])):
            for stop_early in (False, True):
                features, some = model.forward_intermediates(
                    images, indices=indices, norm=True, stop_early=stop_early, output_fmt=output_fmt
                )
                only = model.forward_intermediates(
                    images, indices=indices, stop_early=stop_early, output_fmt=output_fmt, intermediates_only=True
                )
                for a, b, c in zip(some, only, chosen, strict=True):
                    assert torch.equal(a, c) and torch.equal(b, c)
                if not stop_early:
                    assert torch.equal(features, expected)
    with pytest.raises(AssertionError, match="NCHW or NHWC"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_modules_pass_on_nchw_maps_of_channels_last_memory(family, device):
    """As ConvNeXt's modules do, and a map that leaves a module is the result of its last layer: nothing is copied."""
    model, images = small(family).eval().to(device), image(2, 3, 64, 96).to(device)
    layers = {"stem": model.stem.norm2, "stages.1.downsample": model.stages[1].downsample.norm}
    for i, stage in enumerate(model.stages):
        layers[f"stages.{i}"] = stage.norm if family == "grootv" else None
        layers |= {f"stages.{i}.blocks.{j}": None for j in range(len(stage.blocks))}
    outputs: dict[str, torch.Tensor] = {}
    memory: dict[nn.Module, int] = {}
    for name, last in layers.items():
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
        if last is not None:
            last.register_forward_hook(lambda layer, inputs, output: memory.update({layer: output.data_ptr()}))
    with torch.no_grad():
        features, stages = model.forward_intermediates(images)
        nhwc = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    for name, output in outputs.items():
        assert output.shape[0] == 2 and output.is_contiguous(memory_format=torch.channels_last), name
        if layers[name] is not None:
            assert output.data_ptr() == memory[layers[name]], name
    for i, (stage, twin) in enumerate(zip(stages, nhwc, strict=True)):
        assert stage.shape == outputs[f"stages.{i}"].shape == (2, DIMS[i], 16 // 2**i, 24 // 2**i)
        torch.testing.assert_close(stage.permute(0, 2, 3, 1), twin)
        assert twin.is_contiguous()
    assert features is stages[-1]


class Depthwise(nn.Conv2d):
    """A mixer that knows nothing of trees, for which finer maps have the coarser ones in them."""

    def __init__(self, dim: int, dilation: int = 1, device=None, dtype=None) -> None:
        super().__init__(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("output_stride, reductions", [(16, [4, 8, 16, 16]), (8, [4, 8, 8, 8]), (4, [4, 4, 4, 4])])
def test_output_stride(output_stride, reductions):
    """Every second pixel of a dilated stage is a pixel of the strided one, as long as mixers see a window only."""
    coarse = small(mixer=Depthwise).double().eval()
    fine = small(mixer=Depthwise, output_stride=output_stride).double().eval()
    fine.load_state_dict(coarse.state_dict())
    assert [info["reduction"] for info in fine.feature_info] == reductions
    images = image(2, 3, 64, 96).double()
    maps = fine.forward_intermediates(images, intermediates_only=True)
    expected = coarse.forward_intermediates(images, intermediates_only=True)
    for i, (actual, e) in enumerate(zip(maps, expected, strict=True)):
        step = 4 * 2**i // reductions[i]
        assert actual.shape[2:] == (64 // reductions[i], 96 // reductions[i])
        torch.testing.assert_close(actual[:, :, ::step, ::step], e)

    for family in ("grootv", "vmamba"):
        finer = small(family, output_stride=output_stride).eval()
        finer.load_state_dict(small(family).state_dict())
        assert finer(images.float()).shape == (2, 10)
        dilations = {module.dilation[0] for module in finer.modules() if isinstance(module, nn.Conv2d)}
        assert max(dilations) == 32 // output_stride


def test_blocks_take_maps_of_any_memory(family):
    """A block called by itself, on a map that is not channels-last in memory."""
    block = small(family).stages[1].blocks[0].eval()
    x = image(2, DIMS[1], 6, 8)
    torch.testing.assert_close(block(x), block(x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("indices", [[0], [1, 2], 1, [-1]])
def test_pruning_leaves_no_unused_parameter(family, indices):
    model = small(family)
    images = image(2, 3, 64, 64)
    expected = model.eval().forward_intermediates(images, indices=indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices)
    pruned = model.forward_intermediates(images, indices=taken, intermediates_only=True)
    for a, b in zip(pruned, expected, strict=True):
        assert torch.equal(a, b)
    assert model(images).shape[1] == model.num_features == DIMS[taken[-1]]
    model.train()
    sum(m.sum() for m in model.forward_intermediates(images, indices=taken, intermediates_only=True)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.reset_classifier(3, "avg")
    assert model.eval()(images).shape == (2, 3)


def test_pruning_may_keep_the_head(family):
    model = small(family).eval()
    images = image(1, 3, 64, 64)
    expected = model(images)
    model.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("feature_cls", [None, "list", "dict", "hook", "getter", "fx"])
def test_features_only(family, feature_cls):
    kwargs = {"feature_cls": feature_cls} if feature_cls else {}
    whole = timm.create_model(f"{family}_nano").eval()
    model = timm.create_model(f"{family}_nano", features_only=True, out_indices=(1, 3), **kwargs).eval()
    state = whole.state_dict()
    renamed = {}
    for name in model.state_dict():
        plain = name.removeprefix("model.").removeprefix("body.").removeprefix("graph_module.")
        for i in range(4):
            plain = plain.replace(f"stages_{i}.", f"stages.{i}.")
        renamed[name] = state[plain]
    model.load_state_dict(renamed)
    assert model.feature_info.channels() == [64, 256]
    assert model.feature_info.reduction() == [8, 32]
    images = image(1, 3, 64, 96)
    outputs = model(images)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    expected = whole.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    for output, e in zip(outputs, expected, strict=True):
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(output, e)


def test_features_only_trains_with_checkpointing(family):
    model = timm.create_model(f"{family}_nano", features_only=True, feature_cls="getter")
    model.model.set_grad_checkpointing()
    sum(m.mean() for m in model(image(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_classifier(family):
    model = small(family, drop_rate=0.3).eval()
    images = image(2, 3, 64, 64)
    assert model.get_classifier() is model.head.fc
    features = model.forward_features(images)
    hidden = model.forward_head(features, pre_logits=True)
    width = DIMS[-1] * 3 // 2 if family == "grootv" else DIMS[-1]
    assert hidden.shape == (2, model.head_hidden_size) == (2, width)
    assert torch.equal(model.get_classifier()(hidden), model(images))
    model.reset_classifier(4)
    assert model.num_classes == 4 and model(images).shape == (2, 4)
    assert model.head.fc.weight.requires_grad
    model.reset_classifier(0)
    assert torch.equal(model(images), hidden)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, width, 2, 2)
    model.reset_classifier(5, "catavgmax")
    assert model(images).shape == (2, 5)
    assert model.head_hidden_size == 2 * width
    for pool in ("max", "avgmax"):
        assert small(family, global_pool=pool).eval()(images).shape == (2, 10)
    assert not any(module.training for module in model.modules())


def test_parameter_groups_by_depth(family):
    model = small(family)
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(fine) == {name for name, _ in model.named_parameters()}
    order = [fine["stem.conv1.weight"]]
    for i, depth in enumerate(DEPTHS):
        order += [fine[f"stages.{i}.blocks.{j}.mixer.in_proj.weight"] for j in range(depth)]
        assert fine[f"stages.{i}.blocks.0.norm1.weight"] == fine[f"stages.{i}.blocks.0.mlp.fc2.bias"]
        if i:
            assert fine[f"stages.{i - 1}.blocks.0.norm1.weight"] < fine[f"stages.{i}.downsample.conv.weight"]
            assert fine[f"stages.{i}.downsample.conv.weight"] <= fine[f"stages.{i}.blocks.0.norm1.weight"]
        if family == "grootv":
            assert fine[f"stages.{i}.norm.weight"] >= fine[f"stages.{i}.blocks.{depth - 1}.norm1.weight"]
    order.append(fine["head.fc.weight"])
    assert order == sorted(set(order))
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 6  # stem, four stages, head

    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(model.head.fc.weight)] == 1.0
    assert scale[id(model.stem.conv1.weight)] == min(scale.values())


def test_no_weight_decay(family):
    model = small(family)
    names = model.no_weight_decay()
    assert names == {name for name, _ in model.named_parameters() if name.endswith(".D_skip")}
    decayed, undecayed = set(), set()
    for group in param_groups_weight_decay(model, 0.05, no_weight_decay_list=names):
        (decayed if group["weight_decay"] else undecayed).update(map(id, group["params"]))
    for name, p in model.named_parameters():
        # What has one dimension; VMamba's parameters of the scan have one for the directions, too.
        plain = "norm" in name or name.endswith(("bias", "A_log") if family == "grootv" else ".bias") or name in names
        assert id(p) in (undecayed if plain else decayed), name


def test_configuration():
    for name in (*SIZES, "grootv_nano", "vmamba_nano"):
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.input_size, cfg.num_classes, cfg.interpolation) == ((3, 224, 224), 1000, "bicubic")
        assert cfg.crop_pct == pytest.approx(224 / 256)
        released = name.startswith("vmamba") and name != "vmamba_nano"
        assert bool(cfg.has_weights) == released  # none are hosted here
        file = r"https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1?_(tiny|small|base)_0\w+\.pth"
        assert not released or re.fullmatch(file, cfg.url)[1] == name.split("_")[1]


def test_pretrained_without_a_file_names_the_command() -> None:
    with pytest.raises(RuntimeError, match="`python -m grootv.weights grootv_tiny`.*checkpoints/grootv_tiny.pth"):
        timm.create_model("grootv_tiny", pretrained=True)
    with pytest.raises(RuntimeError, match="`python -m grootv.weights grootv_base`"):
        timm.create_model("grootv_base", pretrained=True, features_only=True)
    with pytest.raises(RuntimeError, match="for grootv_nano, of which none is released .*grootv_tiny.*file=PATH"):
        timm.create_model("grootv_nano", pretrained=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{}, {"tree_per": "stage"}, {"root": "first"}])
def test_cuda_training_under_autocast(kwargs, dtype):
    model = small(**kwargs).cuda().train()
    recomputing = copy.deepcopy(model)
    recomputing.set_grad_checkpointing()
    images = image(4, 3, 64, 96).cuda()
    losses = []
    for m in (model, recomputing):
        with torch.autocast("cuda", dtype):
            losses.append(m(images).float().square().mean())
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, p), q in zip(model.named_parameters(), recomputing.parameters(), strict=True):
        assert torch.isfinite(p.grad).all(), name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
