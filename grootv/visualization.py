"""Pictures of what GrootV does: spanning trees over photographs, affinities of scans, and predictions.

Every `plot_*` function returns a `matplotlib.figure.Figure` that belongs to no window, so that no display is needed:
`figure.savefig(path)` writes it. Trees and scans are those of `grootvl_ops`. `import grootv` leaves this module out:
it needs matplotlib, and scikit-image for `lab_features`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import color_sequences, colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, LogNorm, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.typing import ColorType
from torch import Tensor
from torch.nn import functional

from grootv.layers import SS2D, SelectiveSSM, TreeSSM, bidirectional, cross, raster, spanning_tree
from grootvl_ops import Tree, build_tree, tree_scan

PATHS = {"raster": raster, "bidirectional": bidirectional, "cross": cross}
SCANS = ("tree", *PATHS)
# Perceptually uniform; without the light end for lines, which would be lost on the paled photograph.
LINE_COLOURS = ListedColormap(colormaps["plasma"](np.linspace(0, 0.88, 256)), name="plasma_without_yellow")
MAP_COLOURS = "magma"
CLASS_COLOURS = color_sequences["petroff10"]  # chosen so that colour-blind people tell them apart (arXiv 2107.02270)
WRONG, RIGHT = "#c1272d", "#333333"


def lab_features(image: np.ndarray, height: int, width: int) -> Tensor:
    """Colours of a photograph on a coarser grid of pixels: means over its cells, in CIE Lab.

    In Lab the Euclidean distance of two colours is about how different they look.

    Args:
        image: (H, W, 3) uint8, sRGB.
        height, width: of the grid, at most H and W.

    Returns:
        (1, height, width, 3) float32: features as `grootvl_ops.build_tree` takes them.

    Raises:
        ValueError: an image of another shape, or a grid that is empty or finer than the image.
        TypeError: an image that is not uint8.
    """
    from skimage.color import rgb2lab

    _check_image(image)
    if not (1 <= height <= image.shape[0] and 1 <= width <= image.shape[1]):
        raise ValueError(
            f"the grid must be from 1 x 1 to the image's {image.shape[0]} x {image.shape[1]}, got {height} x {width}"
        )
    channels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255
    cells = torch.nn.functional.adaptive_avg_pool2d(channels, (height, width))
    return torch.from_numpy(rgb2lab(cells[0].permute(1, 2, 0).numpy()).astype(np.float32))[None]


def tree_depths(tree: Tree) -> Tensor:
    """Number of edges from each vertex to its root: (B, L) int64."""
    ancestor = tree.parent.long()
    depths = (ancestor != torch.arange(ancestor.shape[1], device=ancestor.device)).long()
    for _ in range(ancestor.shape[1].bit_length()):  # the distance to `ancestor` doubles until that is the root
        depths = depths + depths.gather(1, ancestor)
        ancestor = ancestor.gather(1, ancestor)
    return depths


def scan_affinity(features: Tensor, pixel: tuple[int, int], temperature: float, scan: str = "tree") -> Tensor:
    """How strongly a scan lets each pixel feel a chosen one: the scan's answer to a unit impulse there.

    That is the kernel of the scan (arXiv 2406.02395, Algorithm 1 with every vertex as root): the product of the decays
    along the path between the two pixels, 1 at the chosen pixel itself. In a trained GrootV the decays are made from
    the input, one for each pixel and channel. Here, for illustration, an edge between i and j has the decay
    exp(-||f_i - f_j|| / temperature), by the same rule in every scan, so that the paths alone make the difference.

    Args:
        features: (1, H, W, C), floating point.
        pixel: row and column of the impulse.
        temperature: the feature distance over which a response falls to 1/e, positive.
        scan: "tree", along the minimum spanning tree of the features (Euclidean metric), or the paths of
            `grootv.layers`: "raster", "bidirectional" or "cross". The mean over the four scans of the last.

    Returns:
        (H, W) on the CPU, of the dtype of `features`, values in [0, 1], without gradient.

    Raises:
        ValueError: another shape, a pixel outside the map, a temperature that is not positive, an unknown scan.
    """
    if features.dim() != 4 or features.shape[0] != 1:
        raise ValueError(f"features must be (1, H, W, C), got {list(features.shape)}")
    _, height, width, channels = features.shape
    row, column = pixel
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"pixel must lie on the {height} x {width} map, got {tuple(pixel)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if scan not in SCANS:
        raise ValueError(f"scan must be one of {', '.join(map(repr, SCANS))}, got {scan!r}")
    features = features.detach().cpu()
    scans = PATHS[scan](features) if scan in PATHS else spanning_tree(features, "euclidean")
    flat = features.reshape(height * width, channels)
    impulse = torch.zeros_like(flat[:, 0])
    impulse[row * width + column] = 1
    response = torch.zeros_like(impulse)
    for tree, direction in scans:
        decays = torch.exp((flat - flat[tree.parent[0].long()]).norm(dim=1) / -temperature)
        response += tree_scan(impulse[None, :, None], decays[None, :, None], tree, direction).flatten() / len(scans)
    return response.view(height, width)


class MixerCall(NamedTuple):
    """A mixer of a model, and what it was called with."""

    mixer: SelectiveSSM | SS2D
    x: Tensor
    """(B, H, W, dim)."""
    tree: Tree | None
    """The tree that it was given, of another block of its stage."""

    def features(self) -> Tensor:
        """The features that the mixer scans, (B, H, W, D), and builds its tree on unless one is given."""
        if isinstance(self.mixer, SelectiveSSM):
            return self.mixer.expand_input(self.x)[0]
        return self.mixer.scanned_features(self.x)

    def scans(self) -> list[tuple[Tree, str]]:
        """The trees and directions of its scans."""
        if isinstance(self.mixer, SS2D):
            paths = self.mixer.paths(self.features())
            fields = zip(*(field.split(1) for field in (paths.parent, paths.order, paths.subtree_size)), strict=True)
            return [(Tree(*of_path), "down") for of_path in fields]
        if self.tree is not None and isinstance(self.mixer, TreeSSM):
            return [(self.tree, self.mixer.direction)]
        return self.mixer.scans(self.features())


@torch.no_grad()
def mixer_calls(model: Any, images: Tensor) -> list[list[MixerCall]]:
    """What the mixers of a model are called with, by stage and block.

    Args:
        model: a GrootV or VMamba with mixers `SelectiveSSM` or `SS2D`.
        images: (B, 3, H, W), normalised.

    Raises:
        ValueError: a model with other mixers.
    """
    mixers = [[block.mixer for block in stage.blocks] for stage in model.stages]
    calls: dict[Any, MixerCall] = {}

    def keep(mixer: Any, inputs: tuple, keywords: dict) -> None:
        calls[mixer] = MixerCall(mixer, inputs[0], keywords.get("tree"))

    others = {type(mixer).__name__ for stage in mixers for mixer in stage if not isinstance(mixer, SelectiveSSM | SS2D)}
    if others:
        raise ValueError(f"the mixers {', '.join(sorted(others))} scan no trees")
    handles = [mixer.register_forward_pre_hook(keep, with_kwargs=True) for stage in mixers for mixer in stage]
    try:
        model.stages(model.stem(images))
    finally:
        for handle in handles:
            handle.remove()
    return [[calls[mixer] for mixer in stage] for stage in mixers]


@torch.no_grad()
def mixer_affinity(mixer: SelectiveSSM | SS2D, x: Tensor, pixel: tuple[int, int], tree: Tree | None = None) -> Tensor:
    """How much of a contribution of the chosen pixel reaches each pixel in the scans of a mixer, which may be trained.

    The affinity maps of the paper (arXiv 2406.02395): as `scan_affinity`, but along the trees and directions that the
    mixer chooses for its input, and with its decays. The mean over channels and states, and the sum over scans.

    Args:
        mixer: `TreeSSM`, `PathSSM` or another `SelectiveSSM`, or `SS2D`.
        x: (1, H, W, dim), an input of the mixer.
        pixel: row and column of the impulse.
        tree: that the mixer is given to scan along, if it does not build its own.

    Returns:
        (H, W) on the CPU: at most 1, times the number of scans.

    Raises:
        ValueError: another shape, or a pixel outside the map.
    """
    if x.dim() != 4 or x.shape[0] != 1:
        raise ValueError(f"x must be (1, H, W, {mixer.dim}), got {list(x.shape)}")
    _, height, width, _ = x.shape
    row, column = pixel
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"pixel must lie on the {height} x {width} map, got {tuple(pixel)}")
    call = MixerCall(mixer, x, tree)
    flat = call.features().flatten(1, 2)
    projected = mixer.x_proj(flat)
    response = torch.zeros_like(flat[0, :, 0])
    for k, (scanned, direction) in enumerate(call.scans()):
        if isinstance(mixer, SS2D):  # parameters of its own for each scan
            start = k * (mixer.dt_rank + 2 * mixer.d_state)
            dt = projected[..., start : start + mixer.dt_rank]
            step = functional.linear(dt, mixer.dt_weight[k], mixer.dt_bias[k])
            rates = mixer.A_log[k].exp()
        else:
            step, rates = mixer.dt_proj(projected[..., : mixer.dt_rank]), mixer.A_log.exp()
        delta = functional.softplus(step)
        impulse = torch.zeros_like(delta)
        impulse[:, row * width + column] = 1
        for rate in rates.view(-1, mixer.d_state).unbind(1):
            response += tree_scan(impulse, torch.exp(-rate * delta), scanned, direction)[0].mean(-1) / mixer.d_state
    return response.view(height, width).cpu()


def receptive_field(
    model: Any, images: Tensor, stage: int | None = None, pixel: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """The effective receptive field (arXiv 1701.04128): how much a pixel of a map changes with each pixel of the image.

    The absolute gradient of the sum of the pixel's positive channels (the sum of all channels after a norm is
    constant), summed over the colours and averaged over images.

    Args:
        model: with timm's `forward_intermediates`.
        images: (B, 3, H, W), normalised.
        stage: whose map; None for the last.
        pixel: row and column, as parts of height and width from 0 to 1.

    Returns:
        (H, W), with a largest value of 1, or 0 everywhere where nothing has an influence.

    Raises:
        ValueError: a pixel outside the map.
    """
    if not all(0 <= place <= 1 for place in pixel):
        raise ValueError(f"pixel must be two numbers from 0 to 1, got {tuple(pixel)}")
    total = torch.zeros(images.shape[2:])
    for image in images.split(8):
        image = image.clone().requires_grad_()
        (features,) = model.forward_intermediates(
            image, indices=1 if stage is None else [stage], output_fmt="NCHW", intermediates_only=True
        )
        row, column = (min(int(place * size), size - 1) for place, size in zip(pixel, features.shape[2:], strict=True))
        (gradient,) = torch.autograd.grad(features[:, :, row, column].relu().sum(), image)
        total += gradient.abs().sum((0, 1)).cpu()
    return (total / total.max().clamp(min=torch.finfo(total.dtype).tiny)).numpy()


def field_area(field: np.ndarray, share: float) -> float:
    """The least part of the image, from 0 to 1, that has `share` of a receptive field."""
    ordered = np.sort(field.ravel())[::-1].cumsum()
    return (np.searchsorted(ordered, share * ordered[-1]) + 1) / field.size


def draw_tree(
    axes: Axes, image: np.ndarray, tree: Tree, height: int, width: int, color_by: str = "depth"
) -> LineCollection:
    """Draw a tree over the pixels of a map onto the photograph that it was built from.

    The photograph is paled, and the line from a vertex to its parent is the wider the more vertices hang below it.

    Args:
        axes: to draw into.
        image: (H, W, 3) uint8, sRGB.
        tree: one tree (B = 1) over height * width vertices, as of `grootvl_ops.build_tree(features)`.
        height, width: of the map.
        color_by: "depth", the number of edges to the root, or "subtree", the number of vertices below an edge.

    Returns:
        The lines, which a colour bar can be made of.

    Raises:
        ValueError: sizes that do not fit, or an unknown `color_by`.
        TypeError: an image that is not uint8.
    """
    _check_image(image)
    if tuple(tree.parent.shape) != (1, height * width):
        raise ValueError(
            f"tree must be one tree over {height} x {width} = {height * width} vertices, "
            f"got fields of {list(tree.parent.shape)}"
        )
    if color_by not in ("depth", "subtree"):
        raise ValueError(f"color_by must be 'depth' or 'subtree', got {color_by!r}")
    parent, size = tree.parent[0].cpu().numpy(), tree.subtree_size[0].cpu().numpy()
    rows, columns = np.divmod(np.arange(height * width), width)
    centres = np.stack([(columns + 0.5) * image.shape[1] / width, (rows + 0.5) * image.shape[0] / height], 1)
    shown = np.argsort(size, kind="stable")[:-1]  # the widest lines on top; the largest subtree is the root's
    values = (tree_depths(tree)[0].cpu().numpy() if color_by == "depth" else size)[shown]
    lines = LineCollection(
        list(np.stack([centres[shown], centres[parent[shown]]], 1)),
        array=values,
        norm=LogNorm() if color_by == "subtree" else None,
        cmap=LINE_COLOURS,
        linewidths=0.8 + 2.4 * np.log(size[shown]) / np.log(max(2, len(size))),
        capstyle="round",
    )
    grey = image.mean(2, keepdims=True)
    axes.imshow((255 - 0.35 * (255 - 0.3 * image - 0.7 * grey)).astype(np.uint8))
    axes.add_collection(lines, autolim=False)
    root = centres[parent == np.arange(len(parent))]
    axes.plot(*root.T, marker="s", markersize=7, color=WRONG, markeredgecolor="white", clip_on=False)
    axes.set(xticks=[], yticks=[])
    return lines


def plot_tree_and_affinity(
    image: np.ndarray,
    pixel: tuple[int, int],
    height: int = 64,
    width: int = 96,
    temperature: float = 30.0,
    credit: str = "",
) -> Figure:
    """A photograph, its minimum spanning tree, and the affinities of a tree scan and a bidirectional scan of the rows.

    The tree (arXiv 2406.02395, section 3.2) is that of the colours of the photograph, see :func:`lab_features`;
    GrootV builds its trees in the same way from the features of each block. For the affinities see
    :func:`scan_affinity`: their decays are made from colour differences for illustration, by one rule for both scans.

    Args:
        image: (H, W, 3) uint8, sRGB.
        pixel: row and column, on the grid, of the pixel whose affinities are shown.
        height, width: of the grid of pixels.
        temperature: the colour difference in CIE Lab over which an affinity falls to 1/e.
        credit: whom the photograph is by, for the caption.

    Raises:
        ValueError, TypeError: as :func:`lab_features` and :func:`scan_affinity`.
    """
    features = lab_features(image, height, width)
    affinities = {scan: scan_affinity(features, pixel, temperature, scan) for scan in ("tree", "bidirectional")}
    tree = build_tree(features, "euclidean")

    panel_width = 4.6
    panel_height = panel_width * image.shape[0] / image.shape[1]
    figure = Figure(figsize=(2 * panel_width + 1.2, 2 * panel_height + 1.05), layout="constrained")
    (photo_axes, tree_axes), affinity_axes = figure.subplots(2, 2)
    marker = {"marker": "+", "markersize": 14, "markeredgewidth": 2.2, "linestyle": "none"}

    photo_axes.imshow(image)
    scale = image.shape[0] / height, image.shape[1] / width
    photo_axes.plot((pixel[1] + 0.5) * scale[1], (pixel[0] + 0.5) * scale[0], color=WRONG, **marker)
    photo_axes.set_title("Photograph and chosen pixel")
    lines = draw_tree(tree_axes, image, tree, height, width)
    tree_axes.set_title(f"Spanning tree, {height} × {width} (square: root)")
    figure.colorbar(lines, ax=tree_axes, label="depth, edges to the root", pad=0.02)
    for axes, (scan, affinity) in zip(affinity_axes, affinities.items(), strict=True):
        # The extent puts the grid into the place of the photograph, whose aspect the cells may not divide into squares.
        drawn = axes.imshow(
            affinity.numpy(), cmap=MAP_COLOURS, vmin=0, vmax=1, extent=(0, image.shape[1], image.shape[0], 0)
        )
        axes.plot((pixel[1] + 0.5) * scale[1], (pixel[0] + 0.5) * scale[0], color="#2ec4ff", **marker)
        axes.set_title(f"Affinity to it: {scan} scan")
    figure.colorbar(drawn, ax=affinity_axes[1], label="product of decays along the path", pad=0.02)
    for axes in (photo_axes, *affinity_axes):
        axes.set(xticks=[], yticks=[])
    caption = (
        f"Decays for illustration: exp(−ΔE / {temperature:g}) between pixels of CIE Lab colour difference ΔE, the same "
        f"rule in both scans."
    )
    figure.supxlabel("\n".join(filter(None, (caption, credit))), fontsize=10, color="#555555")
    return figure


def plot_predictions(
    images: np.ndarray,
    scores: np.ndarray,
    targets: np.ndarray,
    classes: Sequence[str],
    columns: int = 10,
    title: str = "",
) -> Figure:
    """A grid of images, each under its predicted class and the score of it; wrong ones framed, with their true class.

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8, grey or sRGB.
        scores: (N, C) floating point, the probabilities of the classes.
        targets: (N,) integers, the true classes.
        classes: the C names.
        columns: images side by side.
        title: above the grid.

    Raises:
        ValueError: sizes that do not fit each other, targets that are no classes, columns less than 1.
        TypeError: images that are not uint8.
    """
    images, scores, targets = (np.asarray(value) for value in (images, scores, targets))
    count = len(images) if images.ndim else 0
    if images.ndim not in (3, 4) or count == 0 or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(f"images must be (N, H, W) or (N, H, W, 3) with N at least 1, got {list(images.shape)}")
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if scores.shape != (count, len(classes)):
        raise ValueError(
            f"scores must be (N, C) = {[count, len(classes)]} for {count} images and {len(classes)} classes, "
            f"got {list(scores.shape)}"
        )
    if targets.shape != (count,) or not np.isin(targets, np.arange(len(classes))).all():
        raise ValueError(f"targets must be {count} class numbers from 0 to {len(classes) - 1}, got {targets.tolist()}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.15 * columns, 1.45 * rows + 0.5), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat[count:]:
        axes.set_axis_off()
    for axes, image, score, target in zip(figure.axes, images, scores, targets, strict=False):
        predicted = int(score.argmax())
        wrong = predicted != target
        color = WRONG if wrong else RIGHT
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{classes[predicted]} ({score[predicted]:.0%})", color=color, fontsize=10, pad=3)
        if wrong:
            axes.set_xlabel(f"is {classes[target]}", color=color, fontsize=10, labelpad=2)
        axes.spines[:].set(color=color, linewidth=3 if wrong else 0.5)
    figure.suptitle(title, fontsize=12)
    return figure


def plot_detections(
    image: np.ndarray,
    truth: Mapping[str, np.ndarray],
    prediction: Mapping[str, np.ndarray],
    classes: Sequence[str],
) -> Figure:
    """Objects in an image, as annotated on the left and as predicted on the right.

    Args:
        image: (H, W, 3) uint8, sRGB.
        truth, prediction: "boxes" (N, 4), the left, upper, right and lower end in pixels, "labels" (N,), the numbers
            of the classes, and if there are some "scores" (N,) and "masks" (N, H, W) bool.
        classes: their names.

    Raises:
        ValueError: sizes that do not fit each other, or labels that are no classes.
        TypeError: an image that is not uint8.
    """
    figure, panels = _truth_and_prediction(image)
    for axes, found in zip(panels, (truth, prediction), strict=True):
        draw_detections(axes, image, found, classes)
    return figure


def draw_detections(axes: Axes, image: np.ndarray, found: Mapping[str, np.ndarray], classes: Sequence[str]) -> None:
    """One panel of `plot_detections`, into `axes`: objects in an image."""
    _check_image(image)
    boxes, labels = np.asarray(found["boxes"], float).reshape(-1, 4), np.asarray(found["labels"], int)
    masks, scores = found.get("masks"), found.get("scores")
    if any(part is not None and len(part) != len(boxes) for part in (labels, masks, scores)):
        raise ValueError(f"labels, masks and scores must be as many as the {len(boxes)} boxes")
    if not np.isin(labels, np.arange(len(classes))).all():
        raise ValueError(f"labels must be from 0 to {len(classes) - 1}, got {labels.tolist()}")
    axes.imshow(image)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in np.argsort(-areas, kind="stable").tolist():
        number = int(labels[i])
        colour = CLASS_COLOURS[number % len(CLASS_COLOURS)]
        if masks is not None:
            axes.imshow(_colour_where(np.asarray(masks[i], bool), colour, 0.55))
        left, top, right, bottom = boxes[i]
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, linewidth=2))
        name = classes[number] if scores is None else f"{classes[number]}  {100 * float(scores[i]):.0f} %"
        at_right, at_top = right > 0.8 * image.shape[1], top < 0.1 * image.shape[0]
        axes.text(
            right if at_right else left,
            max(top, 0),
            name,
            horizontalalignment="right" if at_right else "left",
            verticalalignment="top" if at_top else "bottom",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
            **_readable_on(colour),
        )
    axes.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))


def plot_segmentation(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, classes: Sequence[str]) -> Figure:
    """The classes of the pixels of an image, as annotated on the left and as predicted on the right.

    The largest region of each class has its name, if it covers half a percent of the image. It needs scikit-image and
    SciPy.

    Args:
        image: (H, W, 3) uint8, sRGB.
        truth, prediction: (H, W) integers, the numbers of the classes; other numbers are pixels without a class.
        classes: their names.

    Raises:
        ValueError: an image or maps of other shapes.
        TypeError: an image that is not uint8.
    """
    figure, panels = _truth_and_prediction(image)
    for axes, labels in zip(panels, (truth, prediction), strict=True):
        draw_segmentation(axes, image, labels, classes)
    return figure


def draw_segmentation(axes: Axes, image: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    """One panel of `plot_segmentation`, into `axes`: the classes of the pixels of an image."""
    from scipy.ndimage import distance_transform_edt
    from skimage.measure import label, regionprops

    _check_image(image)
    labels = np.asarray(labels)
    if labels.shape != image.shape[:2]:
        raise ValueError(f"truth and prediction must be {list(image.shape[:2])}, got {list(labels.shape)}")
    grey = image.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8)
    axes.imshow(grey)
    for number in range(len(classes)):
        if not (labels == number).any():
            continue
        colour = CLASS_COLOURS[number % len(CLASS_COLOURS)]
        axes.imshow(_colour_where(labels == number, colour, 0.6))
        region = max(regionprops(label(labels == number, connectivity=1)), key=lambda region: region.area)
        if region.area >= 0.005 * labels.size:
            depth = np.asarray(distance_transform_edt(np.pad(region.image, 1)))[1:-1, 1:-1]
            row, column = np.unravel_index(depth.argmax(), depth.shape) + np.array(region.bbox[:2])
            at = column / labels.shape[1]
            side = "left" if at < 0.2 else "right" if at > 0.8 else "center"
            outline = [patheffects.withStroke(linewidth=2.5, foreground="black")]
            place: dict[str, Any] = {"horizontalalignment": side, "verticalalignment": "center"}
            axes.text(column, row, classes[number], color="white", fontsize=11, path_effects=outline, **place)


def _truth_and_prediction(image: np.ndarray) -> tuple[Figure, np.ndarray]:
    """A figure with two panels for an image: the truth on the left, the prediction on the right."""
    width = 3.2
    height = width * min(2, image.shape[0] / image.shape[1])
    # Small images are enlarged, so that their labels can be read.
    dpi = np.clip(image.shape[1] / width, 120, 300)
    figure = Figure(figsize=(2 * width, height + 0.35), dpi=dpi, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, title in zip(panels, ("truth", "prediction"), strict=True):
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=14)
    return figure, panels


def _colour_where(mask: np.ndarray, colour: ColorType, opacity: float) -> np.ndarray:
    """(H, W, 4) floating point: the colour where `mask` is, transparent elsewhere."""
    return mask[..., None] * np.array(to_rgba(colour, opacity))


def _readable_on(colour: ColorType) -> dict[str, Any]:
    """The colour of text on a ground."""
    red, green, blue = to_rgb(colour)
    return {"color": "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white", "fontsize": 11}


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image must be (H, W, 3), got {list(image.shape)}")
    if image.dtype != np.uint8:
        raise TypeError(f"image must be uint8, got {image.dtype}")
