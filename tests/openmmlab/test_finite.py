"""Numbers that are not finite: no score, no best checkpoint and no saved weights come of them."""

import math
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import numpy as np
import torch
from dense_helpers import build_runner, make_data, skip_without, write_dense_config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from training_helpers import write_config, write_images

from grootv.openmmlab.classification.metrics import TopKAccuracy
from grootv.openmmlab.runtime.finite import FiniteValuesHook, finite_metrics, require_finite_weights

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and the config of a small classification run, one epoch of four iterations."""
    folder = tmp_path_factory.mktemp("finite")
    write_images(folder / "data", "train", 12, seed=0)
    write_images(folder / "data", "val", 4, seed=1)
    write_config(folder, folder / "data", "train_cfg.update(max_epochs=1)\n")
    return folder


def spoil(module: torch.nn.Module, name: str, value: float = NAN) -> None:
    with torch.no_grad():
        module.get_parameter(name).view(-1)[0] = value


@pytest.mark.parametrize("value", [NAN, INF])
def test_accuracy_has_no_rank_for_scores_that_are_not_finite(value: float) -> None:
    scores = torch.rand(4, 3)
    scores[2, 0] = scores[3, 0] = value
    samples = [{"scores": s, "target": 0, "index": 5 + number} for number, s in enumerate(scores)]
    with pytest.raises(FloatingPointError, match="2 of the 4 images of a batch, the first image 7 of the data set"):
        TopKAccuracy(topk=(1,)).process({}, samples)


@pytest.mark.parametrize("how", ["test", "validation"])
def test_a_classifier_that_computes_nan_is_not_evaluated(small: Path, tmp_path: Path, how: str) -> None:
    runner = build_runner(small / "small.py", tmp_path / f"nan_{how}")
    spoil(runner.model, "backbone.stem.conv1.weight")
    with pytest.raises(FloatingPointError, match=r"not finite for 8 of the 8 images of a batch, the first .*circle/0"):
        runner.test() if how == "test" else runner.val()


def test_a_segmentor_that_computes_nan_is_not_evaluated(tmp_path: Path) -> None:
    skip_without("segmentation")
    config = write_dense_config(tmp_path, "segmentation", make_data("segmentation", tmp_path / "data"))
    runner = build_runner(config, tmp_path / "nan_segmentation")
    assert runner.test()
    spoil(runner.model, "decode_head.conv_seg.weight")
    with pytest.raises(FloatingPointError, match=r"not finite for 1 of the 1 images of a batch, the first .*\.jpg"):
        runner.test()


def test_a_detector_that_computes_nan_is_not_evaluated(tmp_path: Path) -> None:
    skip_without("detection")
    config = write_dense_config(tmp_path, "detection", make_data("detection", tmp_path / "data"))
    runner = build_runner(config, tmp_path / "nan_detection", **{"model.test_cfg.rcnn.score_thr": 0})
    sound = {name: value.clone() for name, value in runner.model.state_dict().items()}
    for weight in (
        "backbone.model.stem.conv1.weight",
        "rpn_head.rpn_cls.bias",
        "roi_head.bbox_head.fc_cls.bias",
        "roi_head.bbox_head.fc_reg.bias",
        "roi_head.mask_head.conv_logits.bias",
    ):
        runner.model.load_state_dict(sound)
        spoil(runner.model, weight)
        with pytest.raises(FloatingPointError, match=r"not finite for 4 of the 4 images of a batch, the first .*\.jpg"):
            runner.test()
    runner.model.load_state_dict(sound)
    assert runner.test()


class SpoilHook(Hook):
    """Make a weight NaN when training ends, after the last loss was computed."""

    priority = "VERY_HIGH"

    def __init__(self, averages: bool) -> None:
        self.averages = averages

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == runner.max_iters and not self.averages:
            spoil(runner.model, "backbone.head.fc.weight")

    def after_train_epoch(self, runner) -> None:
        if self.averages:
            ema = next(hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model"))
            spoil(ema.module, "backbone.head.fc.weight", INF)


@pytest.mark.parametrize("averages", [False, True])
def test_weights_that_are_not_finite_are_not_saved(small: Path, tmp_path: Path, averages: bool) -> None:
    runner = build_runner(small / "small.py", tmp_path / f"spoiled_{averages}")
    runner.register_hook(SpoilHook(averages))
    with pytest.raises(FloatingPointError, match=r"no checkpoint was written .*head\.fc\.weight \(1 of 72 values\)"):
        runner.train()
    assert not list(tmp_path.rglob("*.pth"))


def test_timm_weights_that_are_not_finite_are_not_written(small: Path, tmp_path: Path) -> None:
    runner = build_runner(small / "small.py", tmp_path / "timm")
    runner.train()
    written = tmp_path / "timm/timm_weights.pth"
    before = written.read_bytes()
    for hook in runner.hooks:
        if hasattr(hook, "ema_model"):
            spoil(hook.ema_model.module, "backbone.stem.conv1.weight")
    with pytest.raises(FloatingPointError, match=r"timm_weights\.pth was not written: .*stem\.conv1\.weight"):
        runner.call_hook("after_train")
    assert written.read_bytes() == before


def test_masks_of_minus_infinity_are_weights_like_others() -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -INF]))
    require_finite_weights(model.state_dict(), model, "nothing")
    model.mask[0] = NAN
    with pytest.raises(FloatingPointError, match="the first mask"):
        require_finite_weights(model.state_dict(), model, "nothing")


@pytest.mark.parametrize(("rule", "value"), [("greater", INF), ("less", -INF), ("less", NAN)])
def test_no_best_checkpoint_by_a_metric_that_is_not_finite(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, rule: str
) -> None:
    monkeypatch.setattr(TopKAccuracy, "compute_metrics", lambda self, results: {"top1": value})
    changes = {"default_hooks.checkpoint.rule": rule}
    build_runner(small / "small.py", tmp_path / f"best_{rule}_{value}", **changes).train()
    assert not list(tmp_path.rglob("best_*.pth"))
    monkeypatch.setattr(TopKAccuracy, "compute_metrics", lambda self, results: {"top1": 50.0})
    build_runner(small / "small.py", tmp_path / f"then_{rule}_{value}", **changes).train()
    assert len(list(tmp_path.rglob("best_*.pth"))) == 1


def test_metrics_that_are_not_finite_count_as_none_whatever_their_type() -> None:
    metrics = {"a": NAN, "b": np.float32("inf"), "c": np.float64("-inf"), "d": np.float32(1.5), "e": 2, "f": "text"}
    assert finite_metrics(metrics) == {"a": None, "b": None, "c": None, "d": 1.5, "e": 2, "f": "text"}


def test_validation_losses_that_are_not_finite_stop_the_run() -> None:
    hook = FiniteValuesHook()
    hook.after_val_epoch(None, {"val_loss": 1.0, "mIoU": NAN})
    with pytest.raises(FloatingPointError, match="losses of the evaluation are not finite: val_loss=nan"):
        hook.after_val_epoch(None, {"val_loss": NAN, "mIoU": 3.0})
    with pytest.raises(FloatingPointError, match="val_loss=inf"):
        hook.after_test_epoch(None, {"val_loss": np.float32("inf")})


class MaskingModel(BaseModel):
    """A model whose head excludes a class by minus infinity, as some detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_head = torch.nn.Identity()

    def forward(self, inputs: torch.Tensor, mode: str = "predict") -> list[dict]:
        return [{"scores": scores.softmax(0)} for scores in self.cls_head(inputs)]


def test_heads_may_exclude_classes_by_minus_infinity() -> None:
    from types import SimpleNamespace

    hook, model = FiniteValuesHook(), MaskingModel()
    runner = SimpleNamespace(model=model, val_dataloader=SimpleNamespace(dataset=None))
    hook.before_val_epoch(runner)
    inputs = torch.tensor([[0.0, -INF], [1.0, 2.0]])
    hook.before_val_iter(runner, 0, {"indices": torch.tensor([-1, -1])})
    model(inputs)
    inputs[1, 0] = INF
    with pytest.raises(FloatingPointError, match="1 of the 2 images of a batch, the first image 1 of the batch"):
        model(inputs)
