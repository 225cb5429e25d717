"""Data sets, metrics, optimizer, hooks and configs of classification, each by itself."""

import importlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine")

import numpy as np
import timm
import torch
import yaml
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import METRICS, MODELS
from mmengine.runner import CheckpointLoader
from PIL import Image
from torch import nn
from training_helpers import CLASSES, ROOT, write_images

import grootv  # noqa: F401  registers the models
from grootv.openmmlab.checkpoint import AtomicCheckpointHook, AtomicLocalBackend, find_intact_checkpoint, is_intact
from grootv.openmmlab.classifier import ImagePreprocessor, TimmClassifier
from grootv.openmmlab.datasets import (
    DamagedDataError,
    ImageClassificationDataset,
    StreamedClassificationDataset,
)
from grootv.openmmlab.hooks import IterationSeedHook, draw_learning_curve, read_scalars
from grootv.openmmlab.metrics import TopKAccuracy
from grootv.openmmlab.optim import TimmOptimWrapperConstructor, layer_scales, names_without_weight_decay

IN1K = sorted((ROOT / "configs/classification").glob("grootv-*_in1k.py"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root, "train", 4, seed=0)
    return root


def nano(**kwargs) -> nn.Module:
    return timm.create_model("grootv_nano", num_classes=3, dims=(8, 16), depths=(1, 2), **kwargs)


# Data


def test_items_are_uint8_images_with_class_and_place(images: Path) -> None:
    dataset = ImageClassificationDataset(str(images), "train", transform={"input_size": 24})
    assert len(dataset) == 12 and dataset.metainfo["classes"] == CLASSES
    item = dataset[5]
    assert item["inputs"].shape == (3, 24, 24) and item["inputs"].dtype == torch.uint8
    assert item["targets"] == 1 and item["indices"] == 5


def test_augmentation_depends_on_seed_epoch_and_index_alone(images: Path) -> None:
    arguments = {"root": str(images), "split": "train", "is_training": True, "transform": {"input_size": 24}}
    dataset, other = ImageClassificationDataset(**arguments), ImageClassificationDataset(**arguments)
    dataset.set_epoch(7, 3)
    other.set_epoch(7, 3)
    before = torch.get_rng_state()
    first = dataset[2]["inputs"]
    assert torch.equal(before, torch.get_rng_state()), "the process's own random numbers must not be used up"
    torch.rand(5)
    other[4]
    assert torch.equal(first, other[2]["inputs"])
    other.set_epoch(7, 4)
    assert not torch.equal(first, other[2]["inputs"])


def test_damaged_images_are_named_and_limited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, "train", 4, seed=0)
    cut = tmp_path / "train/circle/1.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (tmp_path / "train/square/0.png").write_text("no image")
    training = ImageClassificationDataset(str(tmp_path), "train", is_training=True, max_damaged=2)
    assert training[1]["indices"] == 2, "the next readable image takes the place of a damaged one"
    assert training[1]["targets"] == 0
    assert training[4]["indices"] == 5
    evaluation = ImageClassificationDataset(str(tmp_path), "train", max_damaged=1)
    assert evaluation[1]["targets"] == -1 and evaluation[1]["indices"] == 1
    with pytest.raises(DamagedDataError, match=r"square/0\.png is damaged .* 2 damaged images, and max_damaged=1"):
        evaluation[4]


def test_tar_files_and_torchvision_sets_are_read_through_timm(images: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(images / "train", arcname=".")
    tar = ImageClassificationDataset(str(tmp_path / "train.tar"), "")
    assert len(tar) == 12 and tar[0]["inputs"].shape == (3, 224, 224)
    folder = ImageClassificationDataset(str(images / "train"), name="torch/image_folder")
    assert len(folder) == 12 and folder[11]["targets"] == 2 and folder.metainfo["classes"] == CLASSES


def test_missing_folder_is_named_with_what_is_there(images: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"validation does not exist: .* holds \['train'\]"):
        ImageClassificationDataset(str(images), "validation")
    with pytest.raises(FileNotFoundError, match="does not exist either"):
        ImageClassificationDataset(str(images / "nowhere"), "train")


def test_preprocessor_normalises_and_mixes_in_training_only() -> None:
    preprocessor = ImagePreprocessor(
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.5), mixup={"mixup_alpha": 1.0, "num_classes": 3}
    )
    inputs = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    data = {"inputs": inputs, "targets": torch.tensor([0, 1, 2, 0]), "indices": torch.arange(4)}
    plain = preprocessor(dict(data))
    expected = (inputs[:, 2].double() / 255 - 0.3) / 0.5
    torch.testing.assert_close(plain["inputs"][:, 2].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(plain["targets"], data["targets"])
    mixed = preprocessor(dict(data), training=True)
    assert mixed["targets"].shape == (4, 3) and torch.allclose(mixed["targets"].sum(1), torch.ones(4))
    odd = {name: value[:3] for name, value in data.items()}
    with pytest.raises(ValueError, match="must be even, got 3"):
        preprocessor(odd, training=True)


def test_lasting_loader_processes_follow_the_epoch_and_share_damage(tmp_path: Path) -> None:
    write_images(tmp_path, "train", 4, seed=0)
    (tmp_path / "train/circle/0.png").write_text("no image")
    dataset = ImageClassificationDataset(
        str(tmp_path), "train", is_training=True, max_damaged=1, transform={"input_size": 24}
    )
    reference = ImageClassificationDataset(
        str(tmp_path), "train", is_training=True, max_damaged=1, transform={"input_size": 24}
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(1, epoch)
        reference.set_epoch(1, epoch)
        batches = torch.cat([batch["inputs"] for batch in loader])
        assert torch.equal(batches, torch.stack([reference[index]["inputs"] for index in range(12)]))
    assert dataset.damaged.nonzero().flatten().tolist() == [0]


class RandomItems(torch.utils.data.Dataset):
    """Items as OpenMMLab's pipelines make them: from the generators of the process that loads them."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([np.random.rand(), random.random(), torch.rand(1).item()])


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_any_data_set_are_repeatable_and_differ(workers: int) -> None:
    loader = torch.utils.data.DataLoader(RandomItems(), batch_size=1, num_workers=workers)
    hook = IterationSeedHook()

    def epoch(iteration: int, rank: int) -> torch.Tensor:
        hook.before_train_epoch(
            SimpleNamespace(train_dataloader=loader, train_loop=None, seed=3, iter=iteration, rank=rank)
        )
        return torch.cat(list(loader))

    first = epoch(6, 0)
    assert torch.equal(first, epoch(6, 0)) and len(first.unique()) == first.numel()
    for other in (epoch(12, 0), epoch(6, 1)):
        assert not torch.isin(first, other).any()


# Metrics


def predictions(scores: torch.Tensor, targets: list[int], indices: list[int]) -> list[dict]:
    return [{"scores": s, "target": t, "index": i} for s, t, i in zip(scores, targets, indices, strict=True)]


def test_accuracy_counts_every_image_once() -> None:
    torch.manual_seed(0)
    scores = torch.rand(40, 10)
    targets = torch.randint(0, 10, (40,))
    metric = METRICS.build({"type": "TopKAccuracy", "topk": (1, 5)})
    indices = list(range(40))
    metric.process({}, predictions(scores, targets.tolist(), indices))
    metric.process({}, predictions(scores[:3], targets[:3].tolist(), indices[:3]))  # padding of a sampler
    metric.process({}, predictions(scores[:1], [-1], [40]))  # a damaged image
    top = scores.topk(5).indices
    result = metric.evaluate(7)
    assert result["accuracy/top1"] == pytest.approx(100 * (top[:, 0] == targets).double().mean().item())
    assert result["accuracy/top5"] == pytest.approx(100 * (top == targets[:, None]).any(1).double().mean().item())


def test_equal_scores_do_not_count_as_right() -> None:
    metric = TopKAccuracy(topk=(1,))
    metric.process({}, predictions(torch.full((4, 4), 0.25), [0, 1, 2, 3], [0, 1, 2, 3]))
    assert metric.evaluate(4) == {"accuracy/top1": 25.0}


# Model


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_any_timm_model_trains(name: str) -> None:
    torch.manual_seed(0)
    model = TimmClassifier({"model_name": name, "num_classes": 3}, loss={"type": "LabelSmoothingCrossEntropy"})
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    size = model.backbone.default_cfg["input_size"]
    loss = model(torch.rand(2, *size), torch.tensor([0, 2]), torch.tensor([0, 1]), mode="loss")["loss"]
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is not None for parameter in model.parameters())


def test_binary_cross_entropy_takes_mixed_targets() -> None:
    model = TimmClassifier(
        {"model_name": "test_resnet", "num_classes": 3},
        loss={"type": "BinaryCrossEntropy"},
        data_preprocessor={"type": "ImagePreprocessor", "mixup": {"num_classes": 3}},
    )
    data = {
        "inputs": torch.randint(0, 256, (2, 3, 64, 64)),
        "targets": torch.tensor([0, 1]),
        "indices": torch.arange(2),
    }
    assert model(**model.data_preprocessor(data, True), mode="loss")["loss"].isfinite()


def test_mixup_must_have_the_models_classes() -> None:
    preprocessor = {"type": "ImagePreprocessor", "mixup": {"num_classes": 4}}
    with pytest.raises(ValueError, match="num_classes is 4, but the model has 3"):
        TimmClassifier({"model_name": "test_resnet", "num_classes": 3}, data_preprocessor=preprocessor)


def test_released_checkpoints_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint with the official names, filled by the golden rule, gives the golden logits."""
    golden = ROOT / "tests/golden"
    monkeypatch.syspath_prepend(golden)
    fill = importlib.import_module("fill")
    shapes = json.loads((golden / "official_names.json").read_text())["grootv_tiny"]
    integers = {name: torch.tensor(0) for name in shapes if name.endswith("num_batches_tracked")}
    official = fill.fill({name: torch.empty(shape) for name, shape in shapes.items()} | integers)
    model = TimmClassifier({"model_name": "grootv_tiny"}).eval()
    model.load_state_dict(model.convert_checkpoint({"model": official}))
    again = model.convert_checkpoint({"state_dict": model.state_dict()})
    assert again.keys() == model.state_dict().keys()
    with torch.inference_mode():
        logits = model(fill.image(7, 2, 224, 224))
    expected = torch.load(golden / "grootv_tiny.pt", weights_only=True)["logits"]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


# Optimizer


class Detector(BaseModel):
    """A backbone of timm inside something larger."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"body": nano()})
        self.neck = nn.Conv2d(16, 4, 3)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return inputs


def test_weight_decay_spares_norms_biases_and_what_the_modules_name() -> None:
    model = TimmClassifier({"model_name": "grootv_nano", "num_classes": 3, "dims": (8, 16), "depths": (1, 1)})
    wrapper = TimmOptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 0.1, "weight_decay": 0.05}})(model)
    decayed = {id(p) for group in wrapper.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert all(name.endswith((".weight", ".A_log", ".dt_proj.bias")) for name in names)
    assert not any("norm" in name or "D_skip" in name for name in names)
    assert any("A_log" in name for name in names) and any("dt_proj.bias" in name for name in names)
    assert any("in_proj" in name for name in names) and any("stem.conv1" in name for name in names)
    covered = [id(p) for group in wrapper.optimizer.param_groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())


def test_layer_decay_of_a_classifier_agrees_with_timm() -> None:
    from timm.optim import param_groups_layer_decay

    backbone = nano()
    groups = param_groups_layer_decay(backbone, layer_decay=0.7)
    expected = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = layer_scales(nn.ModuleDict({"backbone": backbone}), 0.7)
    for name, parameter in backbone.named_parameters():
        assert scales[f"backbone.{name}"] == pytest.approx(expected[id(parameter)])
    assert len(set(expected.values())) > 3


def test_layer_decay_inside_a_detector_leaves_the_rest_at_the_base_rate() -> None:
    model = Detector()
    config = {"optimizer": {"type": "AdamW", "lr": 0.1, "weight_decay": 0.05}}
    wrapper = TimmOptimWrapperConstructor(config, {"layer_decay": 0.5})(model)
    rates = {id(p): group["lr"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    assert rates[id(model.neck.weight)] == rates[id(model.neck.bias)] == 0.1
    body = model.backbone["body"]
    assert max(rates[id(p)] for p in body.parameters()) == pytest.approx(0.05)
    assert rates[id(body.stem.conv1.weight)] < rates[id(body.stages[1].blocks[0].mlp.fc1.weight)] < 0.1
    exempt = names_without_weight_decay(model)
    assert "backbone.body.stages.1.blocks.0.mixer.D_skip" in exempt and "neck.bias" in exempt
    assert "backbone.body.stages.1.blocks.0.mixer.A_log" not in exempt and "neck.weight" not in exempt


def test_optimizer_constructor_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="group_matcher"):
        layer_scales(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"unknown keys \['norm_decay'\]"):
        TimmOptimWrapperConstructor({"optimizer": {"type": "SGD", "lr": 1}}, {"norm_decay": 0})


# Checkpoints


def test_a_flipped_bit_and_a_cut_file_are_noticed(tmp_path: Path) -> None:
    state = {"weights": torch.arange(10000.0)}
    for number in (1, 2, 10, 11):
        torch.save(state, tmp_path / f"epoch_{number}.pth")
    torch.save(state, tmp_path / "best_accuracy_top1_epoch_12.pth")
    path = tmp_path / "epoch_11.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    cut = tmp_path / "epoch_10.pth"
    cut.write_bytes(cut.read_bytes()[:-1000])
    assert not is_intact(path) and not is_intact(cut) and not is_intact(tmp_path / "none.pth")
    assert find_intact_checkpoint(tmp_path) == str(tmp_path / "epoch_2.pth")
    assert find_intact_checkpoint(tmp_path / "empty") is None


def test_no_changed_bit_gives_other_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {f"weights{number}": torch.randn(4) for number in range(3)}
    path = tmp_path / "epoch_1.pth"
    torch.save(state, path)
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        content = bytearray(good)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        if is_intact(path):
            loaded = torch.load(path)
            assert all(torch.equal(loaded[name], value) for name, value in state.items()), position
    directory_flag = good.rindex(b"PK\x01\x02") + 38
    path.write_bytes(good[:directory_flag] + b"\x10" + good[directory_flag + 1 :])
    assert not is_intact(path)


def test_a_failed_write_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = AtomicLocalBackend()
    backend.put(b"good", tmp_path / "epoch_1.pth")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        backend.put(b"better", tmp_path / "epoch_1.pth")
    assert (tmp_path / "epoch_1.pth").read_bytes() == b"good"


def test_checkpoints_with_more_than_tensors_load(tmp_path: Path) -> None:
    """Runs keep their message hub in them, which torch.load refuses by default."""
    torch.save({"meta": {"history": HistoryBuffer([1.0, 2.0], [1, 1])}}, tmp_path / "epoch_1.pth")
    content = CheckpointLoader.load_checkpoint(str(tmp_path / "epoch_1.pth"), map_location="cpu")
    assert content["meta"]["history"].mean() == 1.5
    with pytest.raises(FileNotFoundError, match=r"epoch_2\.pth"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "epoch_2.pth"))


def test_one_checkpoint_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        AtomicCheckpointHook(max_keep_ckpts=1)


# Learning curve


def test_learning_curve_joins_the_runs_of_a_work_dir(tmp_path: Path) -> None:
    first = [{"lr": 1, "loss": 2.0, "iter": 1, "step": 1}, {"lr": 1, "loss": 1.5, "iter": 2, "step": 2}]
    second = [{"lr": 1, "loss": 1.4, "iter": 2, "step": 2}, {"accuracy/top1": 50.0, "time": 1.0, "step": 1}]
    for name, entries in (("20260101_000000", first), ("20260101_000001", second)):
        folder = tmp_path / name / "vis_data"
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text("\n".join(map(json.dumps, entries)) + '\n{"loss": 1')
    training, validation = read_scalars(tmp_path)
    assert [training[step]["loss"] for step in sorted(training)] == [2.0, 1.4]
    assert validation[1]["accuracy/top1"] == 50.0
    with Image.open(draw_learning_curve(tmp_path, iterations_per_epoch=2)) as picture:
        assert picture.width > 400


# Configs


@pytest.mark.parametrize("path", IN1K, ids=lambda path: path.stem)
def test_imagenet_recipe_is_the_published_one(path: Path) -> None:
    cfg = Config.fromfile(path)
    size = path.stem.split("_")[0].removeprefix("grootv-")
    assert cfg.model.backbone.model_name == f"grootv_{size}"
    assert cfg.model.backbone.drop_path_rate == {"tiny": 0.1, "small": 0.3, "base": 0.5}[size]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-3, 0.05)
    assert cfg.auto_scale_lr == {"enable": True, "base_batch_size": 1024} and cfg.train_dataloader.batch_size == 128
    assert cfg.optim_wrapper.clip_grad.max_norm == 5.0 and cfg.train_cfg.max_epochs == 300
    mixup = cfg.model.data_preprocessor.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert mixup.label_smoothing == 0.1
    assert cfg.model.data_preprocessor.random_erasing == {"probability": 0.25, "mode": "pixel"}
    transform = cfg.train_dataloader.dataset.transform
    assert transform.auto_augment == "rand-m9-mstd0.5-inc1" and transform.interpolation == "bicubic"
    validation = cfg.val_dataloader.dataset.transform
    assert validation.input_size / validation.crop_pct == 256
    assert [hook.momentum for hook in cfg.custom_hooks if hook.type == "EMAHook"] == [1e-4]


@pytest.mark.parametrize("path", [*IN1K, ROOT / "configs/classification/grootv-nano_digits.py"], ids=lambda p: p.stem)
def test_configs_build_their_models(path: Path) -> None:
    cfg = Config.fromfile(path)
    model = MODELS.build(cfg.model)
    assert model.num_classes == cfg.model.backbone.num_classes


# Streams and Hugging Face, where their packages are installed


def test_webdataset_shards_stream_by_epoch(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    images = tmp_path / "images"
    write_images(images, "train", 4, seed=0)
    (tmp_path / "shards").mkdir()
    with webdataset.TarWriter(str(tmp_path / "shards/train-0000.tar")) as shard:
        for number, path in enumerate(sorted(images.rglob("*.png"))):
            shard.write({"__key__": f"{number:03d}", "png": path.read_bytes(), "cls": CLASSES.index(path.parent.name)})
    arguments = {"name": "wds/shapes", "root": str(tmp_path / "shards"), "transform": {"input_size": 24}}
    stream = StreamedClassificationDataset(**arguments, split="train-{0000..0000}.tar|12")
    items = list(stream)
    assert len(items) == len(stream) == 12
    assert sorted(item["targets"] for item in items) == [0] * 4 + [1] * 4 + [2] * 4
    assert items[0]["inputs"].dtype == torch.uint8 and items[0]["inputs"].shape == (3, 24, 24)

    def epoch(number: int) -> torch.Tensor:
        training = StreamedClassificationDataset(
            **arguments, split="train-{0000..0000}.tar|12", is_training=True, batch_size=4
        )
        training.set_epoch(0, number)
        return torch.stack([item["inputs"] for item in training])

    assert torch.equal(epoch(1), epoch(1)) and not torch.equal(epoch(1), epoch(2))


def test_hugging_face_data_sets_are_read_through_timm(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_images(tmp_path / "images", "train", 2, seed=0)
    dataset = ImageClassificationDataset(
        str(tmp_path / "cache"), "train", name=f"hfds/{tmp_path / 'images'}", transform={"input_size": 24}
    )
    assert len(dataset) == 6 and dataset[5]["targets"] == 2 and dataset.metainfo["classes"] == CLASSES


def test_metafile_names_every_imagenet_config_with_its_size() -> None:
    models = yaml.safe_load((ROOT / "configs/classification/metafile.yml").read_text())["Models"]
    assert sorted(ROOT / model["Config"] for model in models) == IN1K
    for model in models:
        name = Config.fromfile(ROOT / model["Config"]).model.backbone.model_name
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        assert model["Metadata"]["Parameters"] == count
