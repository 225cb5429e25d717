"""The explorer's views without a browser: what they show, the links and the Python that repeat them, and errors."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

import timm
import torch
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from grootv.explorer import inputs, views
from grootv.explorer.inputs import load_classifier, read_image
from grootv.explorer.view import FORMATS, Number, Points, clicked_point
from grootv.explorer.views import SPECS
from grootv.models.safe_loading import CheckpointError
from grootv.visualization import lab_features
from grootvl_ops import build_tree

SMALL = {"size": 64}
DRAWN = {
    "tree": [{"grid": 16}, {"source": "model", "zoom": 2.0, "root": (0.1, 0.9), **SMALL}],
    "affinity": [
        {"grid": 16, "points": ((0.2, 0.3), (0.7, 0.6)), "scale": "linear"},
        {"source": "model", "model2": "vmamba_nano", **SMALL},
    ],
    "model": [{"show": show, **SMALL} for show in ("classes", "trees", "receptive fields")],
    "compare": [{"image2": "coffee", "stage": 2, **SMALL}],
    "language": [{"prompt": "A tree $x$.", "layer": 2}],
}


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


@pytest.mark.parametrize(("name", "changes"), [(name, changes) for name, cases in DRAWN.items() for changes in cases])
def test_the_python_of_a_view_makes_the_same_numbers(
    name: str, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "language":
        pytest.importorskip("transformers")
    spec = SPECS[name]
    arguments = {**spec.defaults, **changes}
    view = spec.function(**arguments)
    assert spec.read(spec.write(arguments)) == arguments, "a link changes the view"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "view.py").write_text(spec.code(arguments))
    runpy.run_path("view.py")
    with np.load(f"{name}.npz") as written:
        assert set(written.files) == set(view.data)
        for key, value in view.data.items():
            np.testing.assert_array_equal(written[key], value)
    assert Path(f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in Path(f"{name}.svg").read_bytes()
    random_weights = any("random weights" in note for note in view.notes)
    assert random_weights == (name in ("model", "compare", "language") or changes.get("source") == "model")


def test_the_root_changes_depths_and_no_edges(photograph: Path) -> None:
    trees = [views.plot_tree(str(photograph), grid=20, root=root).data for root in ((0.0, 0.0), (0.999, 0.5))]
    height, width = int(trees[0]["height"]), int(trees[0]["width"])
    assert abs(height * width - 400) < 25 and abs(height / width - 40 / 50) < 0.05
    edges = []
    for tree, root in zip(trees, (0, (height - 1) * width + width // 2), strict=True):
        parent = tree["parent"]
        assert parent[root] == root and tree["depth"][root] == 0
        others = np.delete(np.arange(len(parent)), root)
        assert (tree["depth"][others] == tree["depth"][parent[others]] + 1).all()
        edges.append({tuple(sorted(edge)) for edge in zip(others, parent[others], strict=True)})
    assert edges[0] == edges[1]
    ends = np.array(sorted(edges[0]))
    graph = coo_matrix((np.ones(len(ends)), ends.T), shape=(height * width,) * 2)
    assert connected_components(graph, directed=False)[0] == 1
    own = build_tree(lab_features(np.asarray(Image.open(photograph)), height, width), "euclidean")
    np.testing.assert_array_equal(own.parent[0].numpy(), trees[0]["parent"])


def test_a_click_is_the_point_that_the_figure_shows_there(photograph: Path) -> None:
    view = views.plot_tree(str(photograph), grid=16, zoom=4.0, centre=(0.3, 0.8))
    picture = view.encode("png")
    assert len(picture) > 1000
    ((axes, (height, width)),) = view.panels
    view.figure.set_dpi(110)
    for row, column in ((0.3, 0.8), (0.2, 0.9)):
        x, y = axes.transData.transform((column * width, row * height)) / view.figure.bbox.size
        assert clicked_point(view.boxes(), x, 1 - y) == pytest.approx((row, column), abs=1e-6)
    assert clicked_point(view.boxes(), 0.999, 0.001) is None


def test_all_affinity_maps_are_one_at_the_point_and_share_a_scale(photograph: Path) -> None:
    for changes in ({}, {"source": "model", "model2": "vmamba_nano", "size": 64}):
        view = views.plot_affinity(str(photograph), grid=12, points=((0.1, 0.1), (0.9, 0.4)), **changes)
        maps = view.data["affinity"]
        rows, columns = (
            (np.array([0.1, 0.9]) * maps.shape[2]).astype(int),
            (np.array([0.1, 0.4]) * maps.shape[3]).astype(int),
        )
        for number in range(2):
            np.testing.assert_allclose(maps[number, :, rows[number], columns[number]], 1, rtol=1e-5)
        assert maps.max() <= 1 + 1e-5 and maps.min() >= 0
        norms = {image.norm.vmin for axes in view.figure.axes for image in axes.images if image.get_array().ndim == 2}
        assert norms == {1e-3}


@pytest.mark.parametrize(("width", "height"), [(3000, 2000), (12_000, 500), (90, 3)])
def test_images_of_any_shape_are_drawn_and_large_ones_made_smaller(width: int, height: int, tmp_path: Path) -> None:
    Image.new("RGB", (width, height), (200, 60, 20)).save(tmp_path / "large.png")
    pixels, notes = read_image(tmp_path / "large.png")
    assert pixels.shape[0] * pixels.shape[1] <= 4_000_000
    assert bool(notes) == (width * height > 4_000_000)
    if notes:
        assert f"{width} × {height} pixels. It was made smaller, to {pixels.shape[1]} × {pixels.shape[0]}" in notes[0]
    assert abs(pixels.shape[1] / pixels.shape[0] / (width / height) - 1) < 0.01
    view = views.plot_tree(str(tmp_path / "large.png"), grid=12)
    assert view.encode("png")
    small = load_classifier("grootv_nano").prepare(pixels, 64)
    assert small.shape[2] * small.shape[3] <= 64 * 64 * 4 and min(small.shape[2:]) >= 32


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:150])
    return path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: read_image(damage(p)), "photograph.png cannot be read: it is damaged"),
        (lambda p: read_image("/tmp/none.png"), "none.png does not exist"),
        (lambda p: load_classifier("resnet50"), "'resnet50' does not exist. Models are grootv_base"),
        (lambda p: load_classifier("grootv_nano", str(p.parent / "none.pth")), "none.pth does not exist"),
        (lambda p: load_classifier("grootv_nano", str(p.parent)), "no training run's folder: it has 0 configs"),
        (
            lambda p: views.plot_tree(source="model", stage=2, block=3, size=64),
            "Stage 2 of grootv_nano.* has one block",
        ),
        (lambda p: views.plot_model(model="vmamba_nano", stage=5), "There is no stage 5"),
        (lambda p: views.plot_dense(), "Choose a config"),
        (lambda p: views.plot_dense(config="none.py"), "none.py does not exist"),
        (lambda p: views.plot_language(" "), "The prompt is empty"),
        (lambda p: views.plot_language("a", folder="/tmp/none"), "folder /tmp/none does not exist"),
        (lambda p: views.plot_language("a" * 161), "161 tokens. At most 160"),
        (lambda p: views.plot_language("a", layer=9), "There is no layer 9"),
        (lambda p: views.plot_tree(grid=8).save("tree.jpg"), r"must end in .png, .svg, .npz, got tree.jpg"),
        (lambda p: Number("zoom", "Zoom", "", 1, 16).parse("nan"), "Zoom: 'nan' is not a number from 1 to 16"),
        (lambda p: Points("root", "Root").parse("50, 101"), "'50, 101' is not a point such as"),
        (lambda p: SPECS["tree"].read({"metric": "x"}), "Metric: 'x' is not one of cosine"),
    ],
)
def test_errors_say_what_is_wrong(call: Callable, message: str, photograph: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(photograph)


def test_a_huge_image_is_refused_before_it_is_read(photograph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_FILE_PIXELS", 1000)
    with pytest.raises(ValueError, match="photograph.png has 50 × 40 pixels. At most 0 megapixels"):
        read_image(photograph)


def test_weights_come_from_files_of_every_form(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model("grootv_nano", num_classes=7).eval()
    own = model.state_dict()
    meta = {"dataset_meta": {"classes": tuple("abcdefg")}}
    forms = {
        "own": own,
        "half": {"model": {name: value.half() for name, value in own.items()}},
        "run": {"meta": meta, "state_dict": {f"backbone.{name}": value for name, value in own.items()}},
    }
    image = read_image("china")[0]
    for form, content in forms.items():
        torch.save(content, tmp_path / f"{form}.pth")
        classifier = load_classifier("grootv_nano", str(tmp_path / f"{form}.pth"))
        assert not classifier.notes and f"{form}.pth" in classifier.title
        x = classifier.prepare(image, 64)
        with torch.no_grad():
            torch.testing.assert_close(classifier.net(x), model(x), atol=2e-2 if form == "half" else 0, rtol=0)
    assert list(classifier.classes) == list("abcdefg")
    with pytest.raises(ValueError, match=r"own.pth does not fit grootv_tiny: \d+ missing"):
        load_classifier("grootv_tiny", str(tmp_path / "own.pth"))
    (tmp_path / "own.pth").write_bytes((tmp_path / "own.pth").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="own.pth cannot be used: it is incomplete or damaged"):
        load_classifier("grootv_nano", str(tmp_path / "own.pth"))


def test_a_training_runs_folder_says_which_model_it_is(tmp_path: Path) -> None:
    pytest.importorskip("mmengine")
    arguments = {"model_name": "grootv_nano", "num_classes": 3, "dims": (8, 16), "depths": (1, 2)}
    torch.save({"state_dict": timm.create_model(**arguments).state_dict()}, tmp_path / "timm_weights.pth")
    (tmp_path / "config.py").write_text(
        f"model = dict(type='TimmClassifier', backbone=dict({arguments}, drop_path_rate=0.1), "
        "data_preprocessor=dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))"
    )
    classifier = load_classifier("grootv_tiny", str(tmp_path))
    assert len(classifier.net.stages) == 2 and len(classifier.classes) == 3 and not classifier.notes
    white = classifier.prepare(np.full((64, 64, 3), 255, np.uint8), 64)
    torch.testing.assert_close(white, torch.full_like(white, 2.0))


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from grootv.explorer.views import dense, language

    for module in (language, dense):
        module._load.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "mmengine.config", None)
    with pytest.raises(ImportError, match=r"need transformers.*pip install 'grootv\[language\]'"):
        views.plot_language()
    (tmp_path / "config.py").touch()
    with pytest.raises(ImportError, match=r"need OpenMMLab's packages.*pip install 'grootv\[openmmlab\]'"):
        views.plot_dense(config=str(tmp_path / "config.py"))


def test_a_language_model_comes_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from grootl.sample_data import train_tokenizer

    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=24, num_hidden_layers=2, state_size=4, vocab_size=260)
    model = transformers.MambaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    train_tokenizer([], 257).save_pretrained(tmp_path)
    view = views.plot_language("The leaves", str(tmp_path), layer=2)
    ids = train_tokenizer([], 257)("The leaves", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).logits[0, -1].softmax(-1).numpy()
    np.testing.assert_allclose(view.data["mamba"], expected, atol=1e-6)
    assert np.abs(view.data["grootl"] - expected).max() > 1e-6
    assert view.data["parent"][-1] == ids.shape[1] - 1 and not view.notes


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_detectors_and_segmentors_are_drawn(task: str, tmp_path: Path) -> None:
    from dense_helpers import skip_without, write_dense_config

    skip_without(task)
    config = write_dense_config(tmp_path, task, tmp_path)
    view = views.plot_dense("flower", str(config), threshold=0.0)
    assert view.encode("png") and "random weights" in view.notes[0]
    if task == "detection":
        count = len(view.data["boxes"])
        assert count > 0 and len(view.data["scores"]) == len(view.data["labels"]) == count
        assert view.data["masks"].shape == (count, 427, 640)
        assert len(views.plot_dense("flower", str(config), threshold=1.0).data["boxes"]) == 0
    else:
        assert view.data["labels"].shape == (427, 640) and view.data["labels"].max() <= 10


def test_files_are_of_the_kinds_that_the_page_offers() -> None:
    view = views.plot_tree(grid=8)
    assert [bool(view.encode(kind)) for kind in FORMATS] == [True] * 3
