"""GrootV in other people's training loops, and through timm's own parts and scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from everyday_models import images, make
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, NativeScaler, accuracy, freeze, reparameterize_model
from torch import Tensor

TARGETS = torch.tensor([0, 3])


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_lightning(precision: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make("grootv_nano")
            self.losses: list[float] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(), TARGETS), batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=4, precision=precision, accelerator="cpu", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    classifier = Classifier()
    trainer.fit(classifier, batches)
    assert classifier.losses[-1] < classifier.losses[0]
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {p.dtype for p in classifier.parameters()} == {dtype}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = make("grootv_nano").train()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(images()), TARGETS)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_timms_parts(tmp_path: Path) -> None:
    """What timm's train.py is made of: layer-wise rates, averaged weights, checkpoints and what loads them."""
    model = make("grootv_nano").train()
    model.set_grad_checkpointing()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8)
    average = ModelEmaV3(model, decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), TARGETS).backward()
        optimizer.step()
        average.update(model)
    saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path), max_history=1)
    saver.save_checkpoint(0, metric=1.0)
    for use_ema, source in ((False, model), (True, average.module)):
        loaded = make("grootv_nano")
        timm.models.load_checkpoint(loaded, str(tmp_path / "last.pth.tar"), use_ema=use_ema)
        torch.testing.assert_close(loaded(images()), source.eval()(images()))


def write_images(folder: Path) -> None:
    """Two splits of two classes, red and blue."""
    Image = pytest.importorskip("PIL.Image")
    for split in ("train", "validation"):
        for name, colour in (("a", "red"), ("b", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (72, 72), colour).save(folder / split / name / f"{i}.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_timms_data_task_and_metrics(tmp_path: Path) -> None:
    """What its train.py and validate.py do with a model: data as the model's configuration says, then accuracy."""
    write_images(tmp_path)
    model = make("grootv_nano").train()
    config = resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    loaders = {
        split: create_loader(
            create_dataset("", tmp_path, split=split), batch_size=4, is_training=split == "train", num_workers=0,
            device=torch.device("cpu"), use_prefetcher=False,
            **{name: config[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct")},
        )
        for split in ("train", "validation")
    }  # fmt: skip
    freeze(model, ["stem", "stages.0"])
    task = ClassificationTask(model, criterion_kwargs={"smoothing": 0.1}, verbose=False)
    optimizer = create_optimizer_v2(model, "adamw", lr=3e-3)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=6, warmup_epochs=1)
    scaler = NativeScaler(device="cpu")
    fixed = model.stages[0].blocks[0].mixer.dt_proj.weight.clone()
    for epoch in range(epochs):
        for inputs, targets in loaders["train"]:
            optimizer.zero_grad()
            loss = task(inputs, targets)["loss"]
            scaler(loss, optimizer, clip_grad=1.0, clip_mode="agc", parameters=model_parameters(model, True))
        scheduler.step(epoch + 1)
    assert torch.equal(model.stages[0].blocks[0].mixer.dt_proj.weight, fixed)

    model = reparameterize_model(model).eval()
    right = AverageMeter()
    for inputs, targets in loaders["validation"]:
        with torch.inference_mode():
            right.update(accuracy(model(inputs), targets)[0], len(targets))
    assert right.avg == 100


def test_running_a_script_that_takes_models_by_name(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    lines = ["import sys, timm, helper", "print(helper.WORD, len(timm.list_models(sys.argv[1])), sys.argv[1:])"]
    script.write_text("\n".join(lines))
    (tmp_path / "helper.py").write_text("WORD = 'beside'\n")
    command = [sys.executable, "-m", "grootv", str(script), "grootv_*", "--flag"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    count = len(timm.list_models("grootv_*"))
    assert result.stdout.splitlines()[-1] == f"beside {count} ['grootv_*', '--flag']"
    missing = subprocess.run([*command[:3], str(tmp_path / "none.py")], capture_output=True, text=True)
    assert missing.returncode == 1 and "there is no script" in missing.stderr


TIMM = os.environ.get("TIMM_REPOSITORY")
SCRIPTS = {
    "train.py": "{data} --model {model} --num-classes 2 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --model-ema "
    "-b 4 --img-size 64 --device cpu --workers 0 --output {out} --experiment run",
    "validate.py": "{data} --model {model} --num-classes 2 -b 4 --img-size 64 --device cpu --workers 0",
    "inference.py": "{data}/validation --model {model} --num-classes 2 -b 4 --img-size 64 --device cpu --workers 0 "
    "--topk 1 --results-dir {out}",
    "benchmark.py": "--model {model} --bench both -b 2 --img-size 64 --device cpu --precision float32 "
    "--num-bench-iter 2 --num-warm-iter 1",
}


@pytest.mark.slow
@pytest.mark.skipif(TIMM is None, reason="TIMM_REPOSITORY, the folder of timm's repository, is not set")
@pytest.mark.parametrize("script", SCRIPTS)
def test_timms_scripts(script: str, tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    (tmp_path / "out").mkdir()
    options = SCRIPTS[script].format(data=tmp_path / "data", out=tmp_path / "out", model="grootv_nano")
    command = [sys.executable, "-m", "grootv", str(Path(TIMM) / script), *options.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "nan" not in result.stdout.lower()
