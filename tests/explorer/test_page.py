"""The explorer's page without a browser: files that it keeps, folders that it reads, and what it says."""

import subprocess
import sys
from pathlib import Path

import pytest
from training_helpers import environment

pytest.importorskip("gradio", reason="the explorer needs Gradio")

from fastapi.testclient import TestClient

from grootv.explorer import views
from grootv.explorer.page import KEPT_VIEWS, Folders, KeptViews, make_app, sentence
from grootv.explorer.views import SPECS
from grootv.models.safe_loading import DamagedCheckpointError


def test_only_the_last_views_are_kept(tmp_path: Path) -> None:
    kept = KeptViews(tmp_path)
    keys = [kept.keep("tree", views.plot_tree(grid=8))[0] for _ in range(KEPT_VIEWS + 2)]
    assert len(set(keys)) == len(keys) and len(list(tmp_path.iterdir())) == KEPT_VIEWS
    name, content = kept.file(keys[-1], "png")
    assert name == "tree.png" and content.startswith(b"\x89PNG")
    with pytest.raises(KeyError):
        kept.file(keys[0], "npz")


def test_files_that_are_gone_are_a_sentence() -> None:
    with TestClient(make_app()) as client:
        answer = client.get("/files/0123.png")
        assert answer.status_code == 404 and "Draw it again" in answer.text
        assert client.get("/files/0123.txt").status_code == 404


@pytest.mark.parametrize(
    "path", ["{outside}/x.pth", "{inside}/../x.pth", "{inside}/link/x.pth", "~/x.pth", "/etc/passwd"]
)
def test_paths_outside_of_the_folders_are_refused(path: str, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir(), outside.mkdir()
    (inside / "link").symlink_to(outside)
    spec = SPECS["model"]
    folders = Folders([inside])
    folders.check(spec, {**spec.defaults, "weights": str(inside / "x.pth")})
    with pytest.raises(ValueError, match="is not in a folder that this explorer may read"):
        folders.check(spec, {**spec.defaults, "weights": path.format(inside=inside, outside=outside)})


def test_errors_become_sentences() -> None:
    assert sentence(ValueError("it is wrong")) == "It is wrong."
    assert "x.pth cannot be used: it is damaged" in sentence(DamagedCheckpointError("x.pth", "it is damaged"))
    assert "more memory" in sentence(RuntimeError("DefaultCPUAllocator: not enough memory: you tried"))
    assert sentence(KeyError("secret")).startswith("The explorer failed (KeyError). The output of the command")


def test_importing_the_page_leaves_the_package_as_it_is() -> None:
    """Gradio writes stubs beside modules that subclass its components."""
    folder = Path(views.__file__).parents[1]
    assert not list(folder.rglob("*.pyi"))


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grootv.explorer", "--folder", str(tmp_path / "none")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "none is no folder" in done.stderr
