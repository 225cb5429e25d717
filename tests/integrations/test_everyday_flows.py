"""What people do with any model that they took from timm, on GrootV, VMamba and, as controls, on ConvNeXt and Swin.

All of it reaches into submodules: it replaces them, changes their weights, or waits for their calls.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from everyday_models import each_model, images, make
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

TARGETS = torch.tensor([0, 3])


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def train(model: nn.Module, steps: int = 3, part: slice = slice(None)) -> list[float]:
    """Losses of a few steps on one batch, or on a part of it."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images(device=device)[part]), TARGETS[part].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs, convolutions in float32 round to TF32 by default, too coarsely for these comparisons."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def join(device: str, folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Join a group of processes."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)


@pytest.fixture
def process_group(device: str, tmp_path: Path) -> Iterator[None]:
    join(device, tmp_path)
    yield
    dist.destroy_process_group()


def lora(model: nn.Module, init: str | bool = True) -> nn.Module:
    peft = pytest.importorskip("peft")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=init)
    return peft.get_peft_model(model, config)


# Adapters


@each_model
def test_lora_on_all_linear_layers_trains(name: str, device: str) -> None:
    model = make(name, device)
    expected = model(images(device=device))
    adapted = lora(model)
    torch.testing.assert_close(adapted(images(device=device)), expected, rtol=1e-4, atol=1e-5)
    losses = train(adapted, 4)
    assert losses[-1] < losses[0]
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * len([n for n, _ in adapted.named_modules() if n.endswith("base_layer")])
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.any()] == []


@each_model
@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_lora_that_splits_the_weights_keeps_outputs(name: str, device: str, init: str) -> None:
    model = make(name, device)
    expected = model(images(device=device))
    torch.testing.assert_close(lora(model, init)(images(device=device)), expected, rtol=1e-4, atol=1e-5)


@each_model
def test_merging_lora_keeps_outputs(name: str, device: str) -> None:
    adapted = lora(make(name, device), init="gaussian")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    expected = adapted(images(device=device))
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(images(device=device)), expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(adapted.merge_and_unload()(images(device=device)), expected, rtol=1e-4, atol=1e-5)


@each_model
@pytest.mark.parametrize("adapted", [False, True], ids=["whole model", "adapters"])
def test_distributed_training(name: str, device: str, adapted: bool, process_group: None) -> None:
    model = make(name, device).train()
    twin = copy.deepcopy(model)
    if adapted:
        torch.manual_seed(0)
        model = lora(model)
        torch.manual_seed(0)
        twin = lora(twin)
    assert train(DistributedDataParallel(model)) == pytest.approx(train(twin), rel=1e-4)


def train_one_rank(rank: int, device: str, folder: Path) -> None:
    """One of two processes, on half of the batch: it saves its losses and adapters."""
    here = f"{device}:{rank}" if device == "cuda" else device
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.backends.cudnn.allow_tf32 = False
    join(device, folder, rank, world_size=2)
    model = lora(make("grootv_nano", here))
    losses = train(DistributedDataParallel(model), part=slice(rank, rank + 1))
    torch.save((losses, adapters(model)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def adapters(model: nn.Module) -> list[Tensor]:
    return [p.detach().cpu() for p in model.parameters() if p.requires_grad]


@pytest.mark.slow
def test_distributed_training_of_adapters_by_two_processes(device: str, tmp_path: Path) -> None:
    """Each with half of the batch, on GPUs with one for each: equal to one process with all of it."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.multiprocessing.spawn(train_one_rank, (device, tmp_path), nprocs=2)
    (losses, trained), (other_losses, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = lora(make("grootv_nano", device))
    expected = train(model)
    assert [sum(pair) / 2 for pair in zip(losses, other_losses, strict=True)] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
    for one, two, alone in zip(trained, other, adapters(model), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-6)


# Weights that are made anew in each forward pass


@each_model
def test_pruning(name: str, device: str) -> None:
    model = make(name, device)
    permanent = copy.deepcopy(model)
    for pruned in (model, permanent):
        for layer in linear_layers(pruned):
            prune.l1_unstructured(layer, "weight", amount=0.5)
    assert train(model) == pytest.approx(train(permanent), rel=1e-4)  # several backward passes
    for layer in linear_layers(permanent):
        prune.remove(layer, "weight")
        assert (layer.weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(model(images(device=device)), permanent(images(device=device)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@each_model
def test_old_weight_norm(name: str, device: str) -> None:
    """It writes its weights in a hook before each call: the result is that of the weights of this step."""
    model = make(name, device)
    expected = model(images(device=device))
    for layer in linear_layers(model):
        nn.utils.weight_norm(layer)
    torch.testing.assert_close(model(images(device=device)), expected, rtol=1e-4, atol=1e-5)
    losses = train(model, 4)
    assert losses[-1] < losses[0]
    outputs = model(images(device=device))
    for layer in linear_layers(model):
        nn.utils.remove_weight_norm(layer)
    torch.testing.assert_close(outputs, model(images(device=device)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each_model
def test_dynamic_quantisation(name: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("PyTorch's dynamic quantisation is for CPUs")
    model = make(name, device)
    expected = model(images(device=device))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert not linear_layers(quantised)
    error = (quantised(images(device=device)) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


# Calls of submodules


@each_model
def test_hooks_fire_on_every_module(name: str, device: str) -> None:
    model, called, passed = make(name, device), set(), set()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
        module.register_full_backward_hook(lambda *_, path=path: passed.add(path))
    model(images(device=device).requires_grad_()).sum().backward()
    containers = (nn.Sequential, nn.ModuleList)
    expected = {path for path, module in model.named_modules() if not isinstance(module, containers)}
    assert expected - called == set() and expected - passed == set()


@each_model
def test_offloading(name: str, device: str) -> None:
    """Weights are on the meta device, but while their module is called."""
    accelerate = pytest.importorskip("accelerate")
    model = make(name, device)
    expected = model(images(device=device))
    accelerate.cpu_offload(model, execution_device=device)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with torch.no_grad():
        torch.testing.assert_close(model(images(device=device)), expected, rtol=1e-4, atol=1e-5)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@each_model
def test_sharding_every_linear_layer(name: str, device: str, process_group: None) -> None:
    """FSDP2: the weights of a layer are whole only while it is called."""
    model = make(name, device)
    twin = copy.deepcopy(model)
    mesh = dist.init_device_mesh(device, (1,))
    for layer in linear_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert train(model) == pytest.approx(train(twin), rel=1e-4)


# Other layers in their place


class Doubled(nn.Module):
    """A layer around another, without `weight` and `bias`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@each_model
def test_replaced_norms(name: str, device: str) -> None:
    for replacement in (lambda norm: nn.Identity(), lambda norm: nn.RMSNorm(norm.normalized_shape)):
        model = make(name, device)
        norms = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
        norms = [(path, m) for path, m in norms if "2d" not in type(m).__name__]  # those of the last dimension
        expected = model(images(device=device))
        for path, norm in norms:
            model.set_submodule(path, replacement(norm).to(device))
        outputs = model(images(device=device))
        assert outputs.shape == expected.shape and torch.isfinite(outputs).all()
        assert not torch.allclose(outputs, expected)
        assert train(model, 2)


@each_model
def test_replaced_linear_layers(name: str, device: str) -> None:
    """Without bias, inside another layer, and each of them has its effect."""
    model = make(name, device)
    expected = model(images(device=device))
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for path in paths:
        changed = copy.deepcopy(model)
        layer = changed.get_submodule(path)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = layer.weight
        for other in (plain, Doubled(layer)):
            changed.set_submodule(path, other)
            same = other is plain and layer.bias is None
            assert torch.equal(changed(images(device=device)), expected) == same, path
    for path in paths:
        model.set_submodule(path, Doubled(model.get_submodule(path)))
    assert torch.isfinite(model(images(device=device))).all() and train(model, 2)
