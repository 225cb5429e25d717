"""The command-line tools on a small model and data set: training, evaluation, several processes, mixed precision."""

import pickle
import re
import socket
from pathlib import Path

import pytest

pytest.importorskip("mmengine")

import timm
import torch
from PIL import Image
from training_helpers import run_tool, write_config, write_images

import grootv  # noqa: F401  registers the models

# Nothing is random in the model and the batches, so that runs with the same batches differ by rounding only.
DETERMINISTIC = """
model.update(backbone=dict(model_name="grootv_nano", num_classes=3, dims=(8, 16), depths=(1, 1)))
model.update(data_preprocessor=dict(type="ImagePreprocessor"))
auto_scale_lr = dict(enable=True, base_batch_size=8)
optim_wrapper.update(optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=0.01))
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_images(root, "train", 11, seed=0)
    write_images(root, "val", 5, seed=1)
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Config, work directory and log of one plain training run."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder, data)
    log = run_tool("train.py", config, "--work-dir", folder / "work").stdout
    return config, folder / "work", log


def accuracy(log: str) -> list[float]:
    return [float(value) for value in re.findall(r"accuracy/top1: ([\d.]+)", log)]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_training_learns_and_logs(run: tuple[Path, Path, str]) -> None:
    _, work_dir, log = run
    assert len(accuracy(log)) == 3
    line = next(line for line in log.splitlines() if "Epoch(train)" in line)
    for part in ("eta:", "images_per_second:", "memory:", "grad_norm:", "loss:"):
        assert part in line
    assert sorted(path.name for path in work_dir.glob("epoch_*.pth")) == [f"epoch_{n}.pth" for n in (1, 2, 3)]
    assert len(list(work_dir.glob("best_accuracy_top1_epoch_*.pth"))) == 1
    with Image.open(work_dir / "learning_curve.png") as picture:
        assert picture.width > 400
    assert list(work_dir.glob("*/vis_data/events.out.tfevents.*"))


def test_a_small_model_learns_the_classes(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data, DETERMINISTIC)
    log = run_tool(
        "train.py", config, "--work-dir", tmp_path / "work", "--cfg-options", "train_cfg.max_epochs=6"
    ).stdout
    assert accuracy(log)[-1] > 90


def test_evaluation_gives_what_validation_gave(run: tuple[Path, Path, str], tmp_path: Path) -> None:
    config, work_dir, log = run
    out = tmp_path / "predictions.pkl"
    tested = run_tool("test.py", config, work_dir / "epoch_3.pth", "--work-dir", tmp_path, "--out", out).stdout
    assert accuracy(tested) == accuracy(log)[-1:]
    predictions = pickle.loads(out.read_bytes())
    right = sum(int(prediction["scores"].argmax()) == prediction["target"] for prediction in predictions)
    assert 100 * right / 15 == pytest.approx(accuracy(tested)[0], abs=1e-3)


def test_exported_weights_are_the_averaged_ones_and_load_in_timm(run: tuple[Path, Path, str], tmp_path: Path) -> None:
    config, work_dir, log = run
    overlay = {"file": str(work_dir / "timm_weights.pth"), "num_classes": 3, "custom_load": False}
    model = timm.create_model(
        "grootv_nano", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, dims=(8, 16), depths=(1, 1)
    )
    checkpoint = torch.load(work_dir / "epoch_3.pth", weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"backbone.{name}"])
    average, current = checkpoint["state_dict"], checkpoint["ema_state_dict"]
    name = "backbone.stem.conv1.weight"
    assert not torch.equal(average[name], current[f"module.{name}"])
    tested = run_tool("test.py", config, work_dir / "timm_weights.pth", "--work-dir", tmp_path).stdout
    assert accuracy(tested) == accuracy(log)[-1:]


def test_a_compiled_run_resumes_and_ends_with_the_weights_of_a_plain_one(
    run: tuple[Path, Path, str], data: Path, tmp_path: Path
) -> None:
    """With averaged weights and clipped gradients, which the config has; without the C++ code, which takes long."""
    _, plain, _ = run
    extra = 'compile = dict(backend="aot_eager")\n'
    arguments = (write_config(tmp_path, data, extra), "--work-dir", tmp_path / "work", "--compile")
    compiled = run_tool("train.py", *arguments, "--cfg-options", "train_cfg.max_epochs=2").stdout
    assert "torch.compile(backend='aot_eager')" in compiled
    assert "resumed epoch: 2" in run_tool("train.py", *arguments, "--resume").stdout
    expected = torch.load(plain / "epoch_3.pth", weights_only=True)
    checkpoint = torch.load(tmp_path / "work/epoch_3.pth", weights_only=True)
    for kind in ("state_dict", "ema_state_dict"):
        assert checkpoint[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            torch.testing.assert_close(checkpoint[kind][name], value, rtol=1e-3, atol=1e-4)


def test_command_line_errors(run: tuple[Path, Path, str], tmp_path: Path) -> None:
    config, work_dir, _ = run
    assert "nothing.pth does not exist" in run_tool("test.py", config, tmp_path / "nothing.pth", code=2).stdout
    out = tmp_path / "predictions.txt"
    assert "must end in .pkl" in run_tool("test.py", config, work_dir / "epoch_3.pth", "--out", out, code=2).stdout
    assert "usage:" in run_tool("dist_train.sh", config, code=2).stdout
    assert "usage:" in run_tool("dist_test.sh", config, code=2).stdout
    assert "usage:" in run_tool("slurm_train.sh", config, code=2).stdout


def test_mixed_precision_on_a_cpu_is_bfloat16(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data, DETERMINISTIC)
    options = ("--cfg-options", "train_cfg.max_epochs=1")
    mixed = run_tool("train.py", config, "--work-dir", tmp_path / "mixed", "--amp", *options).stdout
    assert "Mixed precision on a CPU: bfloat16" in mixed
    run_tool("train.py", config, "--work-dir", tmp_path / "full", *options)
    weights = [
        torch.load(tmp_path / kind / "timm_weights.pth", weights_only=True)["state_dict"]["head.fc.weight"]
        for kind in ("mixed", "full")
    ]
    assert weights[0].dtype == torch.float32 and not torch.equal(*weights)
    torch.testing.assert_close(*weights, rtol=0.2, atol=0.02)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT", free_port())
    config = write_config(tmp_path, data, DETERMINISTIC)
    single = run_tool("train.py", config, "--work-dir", tmp_path / "one")
    options = ("--cfg-options", "train_dataloader.batch_size=4")
    double = run_tool("dist_train.sh", config, 2, "--work-dir", tmp_path / "two", *options)
    accumulated = (*options, "optim_wrapper.accumulative_counts=2")
    scaled = run_tool("train.py", config, "--work-dir", tmp_path / "accumulated", *accumulated)
    for result, factor in ((single, "1 processes x 8"), (double, "2 processes x 4"), (scaled, "1 processes x 4")):
        assert f"{factor} images" in result.stdout and "make 8: scaled by 1." in result.stdout
    assert accuracy(single.stdout) == accuracy(double.stdout)
    monkeypatch.setenv("PORT", free_port())
    compiled = ("--compile", *options, "compile.backend=aot_eager")
    run_tool("dist_train.sh", config, 2, "--work-dir", tmp_path / "compiled", *compiled)
    one, *others = (
        torch.load(tmp_path / kind / "epoch_2.pth", weights_only=True)["state_dict"]
        for kind in ("one", "two", "compiled")
    )
    for name, value in one.items():
        for other in others:
            torch.testing.assert_close(
                other[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )

    monkeypatch.setenv("PORT", free_port())
    checkpoint = tmp_path / "one/epoch_2.pth"
    tested = run_tool("dist_test.sh", config, checkpoint, 2, "--work-dir", tmp_path / "test", *compiled)
    assert accuracy(tested.stdout) == accuracy(single.stdout)[-1:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mixed_precision_on_a_gpu_trains_resumes_and_evaluates(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    arguments = (config, "--work-dir", tmp_path / "work", "--amp")
    log = run_tool("train.py", *arguments, gpu=True).stdout
    line = next(line for line in log.splitlines() if "Epoch(train)" in line)
    assert "memory:" in line and "images_per_second:" in line
    (tmp_path / "work/epoch_3.pth").unlink()
    resumed = run_tool("train.py", *arguments, "--resume", gpu=True).stdout
    assert "resumed epoch: 2" in resumed
    checkpoint = tmp_path / "work/epoch_3.pth"
    assert "loss_scaler" in torch.load(checkpoint, weights_only=True)["optimizer"]
    tested = run_tool("test.py", config, checkpoint, "--work-dir", tmp_path, gpu=True).stdout
    assert accuracy(tested) == accuracy(resumed)[-1:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one_with_twice_the_batch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, data, DETERMINISTIC)
    run_tool("train.py", config, "--work-dir", tmp_path / "one", gpu=True)
    options = ("--cfg-options", "train_dataloader.batch_size=4")
    compiled = ("--compile", *options, "compile.backend=aot_eager")
    for kind, arguments in (("two", options), ("compiled", compiled)):
        monkeypatch.setenv("PORT", free_port())
        run_tool("dist_train.sh", config, 2, "--work-dir", tmp_path / kind, *arguments, gpu=True)
    one, *others = (
        torch.load(tmp_path / kind / "epoch_2.pth", weights_only=True)["state_dict"]
        for kind in ("one", "two", "compiled")
    )
    for name, value in one.items():
        for other in others:
            torch.testing.assert_close(
                other[name], value, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )
