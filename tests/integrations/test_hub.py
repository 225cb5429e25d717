"""Models that are saved for a hub, pushed to one and loaded again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from everyday_models import images, make

import grootv

pytest.importorskip("huggingface_hub")


@pytest.mark.parametrize("options", [{}, {"tree_per": "stage", "root": "first"}])
def test_saved_models_load_with_their_options(tmp_path: Path, options: dict) -> None:
    model = make("grootv_nano", **options)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images()), model(images()))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    expected = model.forward_intermediates(images(), intermediates_only=True)
    for actual, e in zip(features(images()), expected, strict=True):
        torch.testing.assert_close(actual, e)


def test_pushed_models_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's snippet, run in a Python that has not imported grootv, gives the model."""
    folder = tmp_path / "name" / "model"

    class Hub:
        """A hub that keeps its repositories in a folder."""

        def __init__(self, **kwargs: object) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: object) -> object:
            return type("Url", (), {"repo_id": repo_id})()

        def file_exists(self, **kwargs: object) -> bool:
            return False

        def upload_folder(self, repo_id: str, folder_path: str, **kwargs: object) -> None:
            folder.parent.mkdir()
            Path(folder_path).rename(folder)
            Path(folder_path).mkdir()

    monkeypatch.setattr("timm.models._hub.HfApi", Hub)
    model = make("grootv_nano")
    timm.models.push_to_hf_hub(model, "name/model", model_card=grootv.model_card("name/model"))
    readme = (folder / "README.md").read_text()
    snippet = readme.split("```python\n")[1].split("```")[0]
    assert snippet.startswith("import grootv") and "hf-hub:name/model" in snippet
    assert "library_name: grootv\n" in readme and "2406.02395" in readme

    code = snippet.replace("hf-hub:name/model", f"local-dir:{folder}")
    torch.save(images(), tmp_path / "images.pt")
    code += f"import torch\nprint(model(torch.load({str(tmp_path / 'images.pt')!r})).tolist())\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    printed = torch.tensor(json.loads(result.stdout.splitlines()[-1]))
    torch.testing.assert_close(printed, model(images()), rtol=1e-4, atol=1e-5)
