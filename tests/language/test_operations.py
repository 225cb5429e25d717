"""How many operations a layer dispatches: of short prompts and in decoding, the host's time limits the speed."""

from collections.abc import Callable

import pytest
import torch
from language_helpers import GOLDEN, random_ids, small_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig, MambaForCausalLM

from grootl import GrootLForCausalLM
from grootl.modeling_grootl import GrootLMixer

# Measured with torch 2.11 on the CPU in bfloat16, which needs more conversions than float32.
MEASURED = {"prefill": 46, "without cache": 41, "decoding": 40, "training": 105}
# Releases of torch make the same function of a few operations more or less.
TOLERANCE = 4


class Count(TorchDispatchMode):
    """Counts the operations that do more than make a view."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.total += not (function.is_view or function is torch.ops.aten._unsafe_view.default)
        return function(*args, **(kwargs or {}))


def operations(model: nn.Module, kind: str, length: int) -> int:
    ids = random_ids(1, length)
    if kind == "training":
        with Count() as counter:
            model.train()(ids, labels=ids).loss.backward()
        return counter.total
    model.eval()
    with torch.no_grad():
        inputs, options = ids, {"use_cache": kind != "without cache"}
        if kind == "decoding":
            inputs, options["cache"] = ids[:, :1], model(ids, use_cache=True).cache
        with Count() as counter:
            model(inputs, **options)
    return counter.total


def operations_of_a_layer(make: Callable[[int], nn.Module], kind: str, length: int = 20) -> int:
    one, two = (operations(make(layers).bfloat16(), kind, length) for layers in (1, 2))
    return two - one


def grootl(layers: int, **changes) -> GrootLForCausalLM:
    return GrootLForCausalLM(small_config(num_hidden_layers=layers, **changes))


def grootl_with_more(layers: int) -> GrootLForCausalLM:
    """With operations more in each layer, and in training as many again for their gradients."""

    def add(module, inputs, output):
        for _ in range(2 * TOLERANCE + 1):
            output = output * 1
        return output

    model = grootl(layers)
    for module in model.modules():
        if isinstance(module, GrootLMixer):
            module.in_proj.register_forward_hook(add)
    return model


def mamba(layers: int) -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(**{**GOLDEN["config"], "num_hidden_layers": layers}))


@pytest.mark.parametrize("kind", MEASURED)
def test_a_layer_needs_no_more_operations_than_measured(kind):
    assert operations_of_a_layer(grootl, kind) <= MEASURED[kind] + TOLERANCE
    assert operations_of_a_layer(grootl_with_more, kind) > MEASURED[kind] + TOLERANCE  # control: the test can fail


def test_the_number_does_not_grow_with_the_prompt():
    """Unlike that of transformers' Mamba without fused kernels, which scans one token after the other."""
    ours, theirs = ([operations_of_a_layer(make, "prefill", length) for length in (20, 40)] for make in (grootl, mamba))
    assert ours[0] == ours[1]
    assert theirs[1] - theirs[0] > 20
    assert operations_of_a_layer(grootl, "decoding") <= operations_of_a_layer(mamba, "decoding")
