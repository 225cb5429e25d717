"""Pictures of trees, affinities and predictions."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

import numpy as np
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra, minimum_spanning_tree
from training_helpers import environment

from grootv import GrootV
from grootv.layers import SS2D, PathSSM, TreeSSM
from grootv.visualization import (
    RIGHT,
    WRONG,
    draw_tree,
    field_area,
    lab_features,
    mixer_affinity,
    mixer_calls,
    plot_detections,
    plot_predictions,
    plot_segmentation,
    plot_tree_and_affinity,
    receptive_field,
    scan_affinity,
    tree_depths,
)
from grootvl_ops import build_tree, path_tree, selective_scan

GRID = (7, 9)
PATHS = {length: path_tree(torch.arange(length)) for length in (1, 4)}


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (21, 36, 3)).astype(np.uint8)


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(1, *GRID, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_importing_the_model_imports_no_plotting() -> None:
    code = "import sys, grootv; assert not {'matplotlib', 'skimage', 'grootv.visualization'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_lab_features_are_means_over_cells_in_lab() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    image[:2, :3] = 255
    image[:2, 3:] = (255, 0, 0)
    image[2:, :3] = (119, 119, 119)
    image[2:, 3::2] = (0, 0, 240)  # with the black of the third column between them: (0, 0, 160) on average
    # CIE Lab of white, sRGB red, the middle grey and the darker blue, under D65.
    expected = [[[100, 0, 0], [53.24, 80.09, 67.20]], [[50.03, 0, 0], [18.09, 55.89, -76.12]]]
    features = lab_features(image, 2, 2)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[0], torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.1)


def test_affinity_of_the_tree_scan_is_the_product_of_decays_along_the_path(features: torch.Tensor) -> None:
    height, width = GRID
    flat = features.reshape(-1, 3).numpy()
    numbers = np.arange(height * width).reshape(GRID)
    ends = np.concatenate(
        [
            np.stack([numbers[:-1], numbers[1:]], -1).reshape(-1, 2),
            np.stack([numbers[:, :-1], numbers[:, 1:]], -1).reshape(-1, 2),
        ]
    )
    weights = np.linalg.norm(flat[ends[:, 0]] - flat[ends[:, 1]], axis=1)
    spanning = minimum_spanning_tree(coo_matrix((weights, ends.T), shape=(len(flat), len(flat))).tocsr())
    row, column, temperature = 3, 5, 2.5
    distances = dijkstra(spanning, directed=False, indices=numbers[row, column])
    affinity = scan_affinity(features.requires_grad_(), (row, column), temperature)
    assert not affinity.requires_grad and affinity.dtype == torch.float64
    np.testing.assert_allclose(affinity, np.exp(-distances / temperature).reshape(GRID), rtol=1e-6)


def test_affinity_of_the_bidirectional_scan_follows_the_rows(features: torch.Tensor) -> None:
    flat = features.reshape(-1, 3).numpy()
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(flat, axis=0), axis=1))])
    affinity = scan_affinity(features, (2, 4), 0.7, "bidirectional")
    np.testing.assert_allclose(affinity.ravel(), np.exp(-np.abs(along - along[2 * GRID[1] + 4]) / 0.7), rtol=1e-9)


def test_depths_count_the_steps_to_the_root() -> None:
    tree = build_tree(torch.randn(2, 6, 8, 4, generator=torch.Generator().manual_seed(1)), root=20)
    for parents, depths in zip(tree.parent.tolist(), tree_depths(tree).tolist(), strict=True):
        for vertex, depth in enumerate(depths):
            steps = 0
            while vertex != 20:
                vertex, steps = parents[vertex], steps + 1
            assert steps == depth


@pytest.mark.parametrize("color_by", ["depth", "subtree"])
def test_the_drawn_tree_spans_the_grid_on_the_photograph(photo: np.ndarray, color_by: str) -> None:
    height, width = GRID
    tree = build_tree(lab_features(photo, height, width), "euclidean")
    axes = Figure().subplots()
    lines = draw_tree(axes, photo, tree, height, width, color_by)
    segments = np.stack(lines.get_segments())
    assert segments.shape == (height * width - 1, 2, 2)
    cells = segments / (36 / width, 21 / height)  # a cell of the grid is 4 x 3 pixels of the photograph
    assert np.allclose(np.abs(cells[:, 0] - cells[:, 1]).sum(1), 1), "between neighbours of the grid"
    numbers = np.floor(cells).astype(int) @ (1, width)
    links = coo_matrix((np.ones(len(numbers)), numbers.T), shape=(height * width,) * 2)
    assert np.isfinite(dijkstra(links.tocsr(), directed=False, indices=0)).all(), "every pixel is reached"
    children = numbers[:, 0]
    assert (tree.parent[0][children].numpy() == numbers[:, 1]).all()
    values = tree_depths(tree) if color_by == "depth" else tree.subtree_size
    assert (lines.get_array() == values[0][children].numpy()).all()
    assert (np.diff(lines.get_linewidths()) >= 0).all() and (np.diff(tree.subtree_size[0][children].numpy()) >= 0).all()


def test_a_tree_of_one_pixel_can_be_drawn(photo: np.ndarray) -> None:
    assert not draw_tree(Figure().subplots(), photo, PATHS[1], 1, 1).get_segments()


@pytest.mark.parametrize("make", [TreeSSM, partial(PathSSM, scan="cross")], ids=["tree", "cross"])
@pytest.mark.parametrize("d_state", [1, 2])
def test_the_affinity_of_a_mixer_is_its_answer_to_an_impulse(make: Callable, d_state: int) -> None:
    """Measured on the mixer itself: how its states change with the input weight B of one pixel."""
    torch.manual_seed(0)
    mixer, (row, column) = make(8, d_state=d_state, dtype=torch.float64), (2, 3)
    x = torch.randn(1, *GRID, 8, dtype=torch.float64)
    features, _ = mixer.expand_input(x)
    flat, pixel = features.flatten(1, 2), row * GRID[1] + column
    dt, b, _ = mixer.x_proj(flat).split([mixer.dt_rank, d_state, d_state], dim=-1)
    weights = (mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log)

    def states(b: torch.Tensor) -> torch.Tensor:
        b = b.squeeze(-1) if d_state == 1 else b
        return sum(selective_scan(flat, dt, *weights, b, tree, way) for tree, way in mixer.scans(features))

    b = b.clone()
    b[:, pixel] += 1
    change = (states(b) - states(b - torch.nn.functional.one_hot(torch.tensor(pixel), b.shape[1])[None, :, None]))[0]
    delta = torch.nn.functional.softplus(mixer.dt_proj(dt))[0, pixel]
    expected = (change.view(len(change), -1, d_state) / (delta * flat[0, pixel])[:, None]).mean((1, 2)).view(GRID)
    torch.testing.assert_close(mixer_affinity(mixer, x, (row, column)), expected.detach())


def test_the_picture_of_a_photograph_shows_both_affinities(photo: np.ndarray, tmp_path: Path) -> None:
    figure = plot_tree_and_affinity(photo, (2, 3), *GRID, temperature=40.0, credit="Photograph: its author.")
    features = lab_features(photo, *GRID)
    shown = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    for scan in ("tree", "bidirectional"):
        np.testing.assert_array_equal(
            shown[f"Affinity to it: {scan} scan"], scan_affinity(features, (2, 3), 40.0, scan)
        )
    np.testing.assert_array_equal(shown["Photograph and chosen pixel"], photo)
    assert "for illustration" in figure.get_supxlabel() and figure.get_supxlabel().endswith("its author.")
    figure.savefig(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert min(image.size) > 500 and len(image.convert("RGB").getcolors(1 << 24)) > 500


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 8, 3)])
def test_wrong_predictions_are_marked(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6], [0.55, 0.45]])
    figure = plot_predictions(images, scores, np.array([0, 1, 1, 1, 1]), ["cat", "dog"], columns=3, title="Pets")
    shown = [axes for axes in figure.axes if axes.images]
    assert figure.get_suptitle() == "Pets" and len(figure.axes) == 6
    assert [axes.get_title() for axes in shown] == ["cat (90%)", "dog (80%)", "cat (70%)", "dog (60%)", "cat (55%)"]
    assert [axes.get_xlabel() for axes in shown] == ["", "", "is dog", "", "is dog"]
    frames = [to_hex(axes.spines["left"].get_edgecolor()) for axes in shown]
    assert frames == [RIGHT, RIGHT, WRONG, RIGHT, WRONG]
    for axes, image in zip(shown, images, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), image)


def check_text_is_whole(figure: Figure) -> None:
    """No text is cut by the border of the picture."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        for text in (*axes.texts, axes.title):
            box = text.get_window_extent()
            inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
            assert inside and box.y1 <= figure.bbox.y1, text.get_text()


def test_detections_beside_the_truth(photo: np.ndarray) -> None:
    """Titles, a box and a readable label for each object, also for objects in the corners, masks, and no object."""
    boxes = np.array([[0, 0, 9, 7], [28, 15, 36, 21], [10, 5, 20, 15]])
    masks = np.zeros((3, 21, 36), bool)
    masks[2, 5:15, 10:20] = True
    truth = {"boxes": boxes, "labels": np.array([0, 1, 1]), "masks": masks}
    figure = plot_detections(photo, truth, {**truth, "scores": np.array([0.999, 0.5, 0.3])}, ["cat", "dog"])
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("truth", "prediction")
    assert sorted(text.get_text() for text in left.texts) == ["cat", "dog", "dog"]
    assert sorted(text.get_text() for text in right.texts) == ["cat  100 %", "dog  30 %", "dog  50 %"]
    drawn = sorted((patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) for patch in left.patches)
    assert drawn == [(0, 0, 9, 7), (10, 5, 10, 10), (28, 15, 8, 6)]
    overlay = left.images[1].get_array()  # the largest object comes first
    assert ((overlay[..., 3] > 0) == masks[2]).all()
    check_text_is_whole(figure)
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int)}
    assert not plot_detections(photo, truth, empty, ["cat", "dog"]).axes[1].texts


def test_segmentation_beside_the_truth(photo: np.ndarray) -> None:
    """The largest region of a class has its name, within it; pixels without a class stay grey."""
    truth = np.zeros((21, 36), int)
    truth[:3, 10:20] = truth[5:15, 20:36] = 1
    truth[:3, :3] = 255
    figure = plot_segmentation(photo, truth, np.ones_like(truth), ["ground", "cat"])
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("truth", "prediction")
    assert [text.get_text() for text in left.texts] == ["ground", "cat"]
    assert [text.get_text() for text in right.texts] == ["cat"]
    assert left.texts[1].get_position()[1] >= 5
    for text in left.texts:
        column, row = text.get_position()
        assert truth[row, column] == ["ground", "cat"].index(text.get_text())
    coloured = sum(image.get_array()[..., 3] > 0 for image in left.images[1:])
    assert (coloured == (truth != 255)).all()
    check_text_is_whole(figure)


IMAGE = np.zeros((8, 8, 3), np.uint8)
BOXES = {"boxes": np.zeros((2, 4)), "labels": np.array([0, 2])}
FEATURES = torch.zeros(1, 4, 4, 3)
SCORES = np.full((2, 3), 0.3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lab_features(IMAGE[..., 0], 2, 2), ValueError, r"image must be \(H, W, 3\), got \[8, 8\]"),
        (lambda: lab_features(IMAGE / 255, 2, 2), TypeError, "image must be uint8, got float64"),
        (lambda: lab_features(IMAGE, 9, 2), ValueError, "image's 8 x 8, got 9 x 2"),
        (lambda: lab_features(IMAGE, 2, 0), ValueError, "got 2 x 0"),
        (lambda: scan_affinity(FEATURES[0], (0, 0), 1.0), ValueError, r"must be \(1, H, W, C\), got \[4, 4, 3\]"),
        (lambda: scan_affinity(FEATURES, (0, 4), 1.0), ValueError, r"on the 4 x 4 map, got \(0, 4\)"),
        (lambda: scan_affinity(FEATURES, (-1, 0), 1.0), ValueError, r"got \(-1, 0\)"),
        (lambda: scan_affinity(FEATURES, (0, 0), 0.0), ValueError, "temperature must be positive, got 0"),
        (lambda: scan_affinity(FEATURES, (0, 0), float("nan")), ValueError, "temperature must be positive, got nan"),
        (lambda: scan_affinity(FEATURES, (0, 0), 1.0, "zigzag"), ValueError, "scan must be one of .*, got .zigzag."),
        (
            lambda: mixer_affinity(TreeSSM(4), torch.zeros(4, 4, 4), (0, 0)),
            ValueError,
            r"x must be \(1, H, W, 4\), got",
        ),
        (lambda: mixer_affinity(TreeSSM(3), FEATURES, (4, 0)), ValueError, r"on the 4 x 4 map, got \(4, 0\)"),
        (lambda: draw_tree(Figure().subplots(), IMAGE, PATHS[4], 2, 3), ValueError, r"2 x 3 = 6 .* \[1, 4\]"),
        (lambda: draw_tree(Figure().subplots(), IMAGE, PATHS[4], 2, 2, "age"), ValueError, "got 'age'"),
        (lambda: plot_predictions(IMAGE[0], SCORES, [0, 1], "abc"), ValueError, r"images must be .*, got \[8, 3\]"),
        (lambda: plot_predictions(np.zeros((2, 8, 8)), SCORES, [0, 1], "abc"), TypeError, "uint8, got float64"),
        (lambda: plot_predictions(IMAGE[:2], SCORES, [0, 1], "abcd"), ValueError, r"\[2, 4\] .* got \[2, 3\]"),
        (lambda: plot_predictions(IMAGE[:2], SCORES, [0, 3], "abc"), ValueError, r"from 0 to 2, got \[0, 3\]"),
        (lambda: plot_predictions(IMAGE[:2], SCORES, [0, 1], "abc", 0), ValueError, "columns must be at least 1"),
        (lambda: plot_detections(IMAGE, BOXES, BOXES, "ab"), ValueError, r"from 0 to 1, got \[0, 2\]"),
        (lambda: plot_detections(IMAGE, {**BOXES, "labels": [0]}, BOXES, "ab"), ValueError, "as many as the 2 boxes"),
        (lambda: plot_detections(IMAGE[0], BOXES, BOXES, "abc"), ValueError, r"image must be \(H, W, 3\)"),
        (lambda: plot_segmentation(IMAGE, SCORES, SCORES, "ab"), ValueError, r"must be \[8, 8\], got \[2, 3\]"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def decays_between(decays: np.ndarray, order: list[int], source: int) -> np.ndarray:
    """What arrives at each pixel of a unit impulse at `source` that follows a path downwards."""
    arrived = np.zeros_like(decays)
    value = 0.0
    for pixel in order:
        value = value * decays[pixel] + (1.0 if pixel == source else 0.0)
        arrived[pixel] = value
    return arrived


def cross_orders(height: int, width: int) -> list[list[int]]:
    rows = np.arange(height * width).reshape(height, width)
    return [order.tolist() for path in (rows.ravel(), rows.T.ravel()) for order in (path, path[::-1])]


def test_affinities_along_paths_follow_their_order(features: torch.Tensor) -> None:
    height, width = GRID
    flat = features.reshape(-1, 3).numpy()
    source = 3 * width + 4

    def along(order: list[int]) -> np.ndarray:
        entered = np.r_[order[0], order[:-1]]  # where the path comes from
        decays = np.empty(len(flat))
        decays[order] = np.exp(-np.linalg.norm(flat[order] - flat[entered], axis=1) / 2)
        return decays_between(decays, order, source).reshape(GRID)

    orders = cross_orders(height, width)
    np.testing.assert_allclose(scan_affinity(features, (3, 4), 2.0, "raster"), along(orders[0]))
    expected = sum(along(order) for order in orders) / 4
    np.testing.assert_allclose(scan_affinity(features, (3, 4), 2.0, "cross"), expected)


@pytest.mark.parametrize("d_state", [1, 2])
def test_affinity_of_vmambas_mixer_uses_the_parameters_of_each_direction(d_state: int) -> None:
    torch.manual_seed(0)
    mixer, x = SS2D(4, expand=2, d_state=d_state).double(), torch.randn(1, *GRID, 4, dtype=torch.float64)
    torch.nn.init.normal_(mixer.A_log)
    source = 2 * GRID[1] + 5
    u = mixer.act(mixer.conv(mixer.in_proj(x).permute(0, 3, 1, 2))).flatten(2)[0].T
    projected = mixer.x_proj(u).view(len(u), 4, -1)
    expected = np.zeros(len(u))
    # Row by row, column by column, then both backwards.
    for k, number in enumerate((0, 2, 1, 3)):
        steps = torch.nn.functional.softplus(projected[:, k, : mixer.dt_rank] @ mixer.dt_weight[k].T + mixer.dt_bias[k])
        for rates in mixer.A_log[k].exp().view(-1, d_state).T:
            decays = torch.exp(-rates * steps).detach().numpy()
            for channel in range(8):
                arrived = decays_between(decays[:, channel], cross_orders(*GRID)[number], source)
                expected += arrived / 8 / d_state
    np.testing.assert_allclose(mixer_affinity(mixer, x, (2, 5)), expected.reshape(GRID))


def test_mixer_calls_are_what_the_blocks_get(features: torch.Tensor) -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    for arguments in ({"tree_per": "stage"}, {"scan": "cross"}):
        model = GrootV(dims=(8, 16), depths=(2, 1), **arguments).eval()
        calls = mixer_calls(model, images)
        assert [len(stage) for stage in calls] == [2, 1]
        with torch.no_grad():
            x = model.stem(images)
            first = model.stages[0].blocks[0]
            torch.testing.assert_close(calls[0][0].x, first.norm1(x.permute(0, 2, 3, 1)))
        if "tree_per" in arguments:  # the second block scans the first's tree
            own, given = (calls[0][block].scans()[0][0] for block in (0, 1))
            assert torch.equal(own.parent, given.parent) and calls[0][1].tree is not None
        assert not any(len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(ValueError, match="the mixers Identity scan no trees"):
        mixer_calls(GrootV(dims=(8,), depths=(1,), mixer=lambda dim, **_: torch.nn.Identity()), images)


def test_the_receptive_field_of_a_convolution_is_its_square() -> None:
    class OneConvolution(torch.nn.Module):
        def forward_intermediates(self, image: torch.Tensor, **_: object) -> list[torch.Tensor]:
            weight = torch.ones(1, 3, 3, 3)
            return [torch.nn.functional.conv2d(image, weight, stride=2, padding=1).abs() + 1]

    field = receptive_field(OneConvolution(), torch.rand(9, 3, 16, 24), pixel=(0.5, 0.25))
    assert field.shape == (16, 24) and field.max() == 1
    np.testing.assert_array_equal(np.argwhere(field > 0), [(r, c) for r in (7, 8, 9) for c in (5, 6, 7)])
    assert field_area(field, 0.5) == pytest.approx(5 / (16 * 24))
    with pytest.raises(ValueError, match="two numbers from 0 to 1"):
        receptive_field(OneConvolution(), torch.rand(1, 3, 16, 24), pixel=(2, 0))
