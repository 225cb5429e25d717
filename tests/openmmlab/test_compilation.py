"""Backbones that runs compile."""

import copy

import pytest

pytest.importorskip("mmengine")

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from grootv.openmmlab.classification.classifier import TimmClassifier
from grootv.openmmlab.runtime.compilation import compile_backbone


class Wrapper(nn.Module):
    """As augmentation at test time wraps a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.fixture
def classifier() -> TimmClassifier:
    torch.manual_seed(0)
    return TimmClassifier({"model_name": "grootv_nano", "num_classes": 3, "dims": (8, 16), "depths": (1, 1)})


def test_a_compiled_backbone_keeps_names_values_and_gradients(classifier: TimmClassifier) -> None:
    plain = copy.deepcopy(classifier)
    counter = CompileCounterWithBackend("aot_eager")
    compile_backbone(Wrapper(classifier), {"backend": counter})
    names = list(plain.state_dict())
    targets = torch.tensor([0, 2])
    # Of images whose sizes vary, the first are compiled for themselves; later height and width are symbols.
    graphs = []
    for height, width in ((32, 32), (32, 48), (64, 32), (96, 48), (33, 47), (48, 96)):
        images = torch.rand(2, 3, height, width)
        losses = [model(images, targets, mode="loss")["loss"] for model in (classifier, plain)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        graphs.append(counter.frame_count)
    for ours, theirs in zip(classifier.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert graphs[0] == 1 and graphs[2:] == graphs[2:3] * 4 and graphs[-1] <= 3
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(images, targets, mode="loss")["loss"] for model in (classifier, plain)]
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)
    graphs.append(counter.frame_count)
    assert list(classifier.state_dict()) == names
    copy.deepcopy(classifier)(torch.rand(1, 3, 128, 64))
    assert counter.frame_count == graphs[-1], "copies, such as averaged weights, are not compiled"


def test_wrong_options_are_named(classifier: TimmClassifier) -> None:
    with pytest.raises(TypeError, match="compile must be True, False or a dict .*, got 'default'"):
        compile_backbone(classifier, "default")
    with pytest.raises(ValueError, match="compile: Linear has no backbone"):
        compile_backbone(nn.Linear(1, 1), True)
