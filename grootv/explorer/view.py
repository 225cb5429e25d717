"""What a view is: a function with named arguments, and how these become controls, a link, and Python.

`Spec` describes a function once. The page makes its controls from it, a link's query is read and written by it, and so
is the Python that draws the same picture again.
"""

from __future__ import annotations

import inspect
import io
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Point = tuple[float, float]
"""Row and column, as parts of the image's height and width from 0 to 1."""

FORMATS = ("png", "svg", "npz")
MAX_POINTS = 4
_DPI = 110
# Matplotlib's caches of fonts and text are not made for several threads.
_DRAWING = threading.Lock()


@dataclass(eq=False)
class View:
    """A figure, the numbers that it shows, and what to say about it."""

    figure: Figure
    data: dict[str, np.ndarray]
    alt: str
    """The picture in words, for those who do not see it."""
    notes: list[str] = field(default_factory=list)
    """What the reader has to know, such as that weights are random."""
    panels: list[tuple[Axes, tuple[int, int]]] = field(default_factory=list)
    """The axes that show an image, and its height and width in their units: where a click means a point."""

    def encode(self, kind: str) -> bytes:
        """The file of a kind, one of `FORMATS`."""
        file = io.BytesIO()
        if kind == "npz":
            np.savez_compressed(file, allow_pickle=False, **self.data)
        else:
            with _DRAWING:
                self.figure.savefig(file, format=kind, dpi=_DPI)
        return file.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the picture (.png, .svg) or the numbers (.npz).

        Raises:
            ValueError: another suffix.
        """
        kind = Path(path).suffix.removeprefix(".")
        if kind not in FORMATS:
            raise ValueError(f"the file's name must end in {', '.join('.' + kind for kind in FORMATS)}, got {path}")
        Path(path).write_bytes(self.encode(kind))

    def boxes(self) -> list[tuple[float, ...]]:
        """Where the panels are in the picture that `encode` has drawn: left, top, right and bottom as parts of it, then
        the columns and rows of the image, as parts of that, at these sides."""
        boxes = []
        for axes, (height, width) in self.panels:
            box = axes.get_position()
            (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
            shown = left / width, top / height, right / width, bottom / height
            boxes.append(tuple(map(float, (box.x0, 1 - box.y1, box.x1, 1 - box.y0, *shown))))
        return boxes


def clicked_point(boxes: Sequence[Sequence[float]], x: float, y: float) -> Point | None:
    """The point of the image at a place of the picture (parts of its width and height); None beside all panels."""
    for x0, y0, x1, y1, left, top, right, bottom in boxes:
        if x0 <= x <= x1 and y0 <= y <= y1:
            row = top + (y - y0) / (y1 - y0) * (bottom - top)
            column = left + (x - x0) / (x1 - x0) * (right - left)
            return min(max(row, 0.0), 1.0), min(max(column, 0.0), 1.0)
    return None


@dataclass(frozen=True)
class Field:
    """An argument of a view.

    Subclasses say which values it takes: `parse` reads one from text, `write` is the opposite.
    """

    name: str
    label: str
    info: str = ""

    def parse(self, text: str) -> Any:
        """The value. ValueError, with a sentence, for text that means none."""
        return text.strip()

    def write(self, value: Any) -> str:
        """The text of a value."""
        return str(value)


@dataclass(frozen=True)
class Text(Field):
    """Any text of at most `limit` characters."""

    lines: int = 1
    limit: int = 4000

    def parse(self, text: str) -> str:
        if len(text) > self.limit:
            raise ValueError(f"{self.label}: at most {self.limit} characters, got {len(text)}.")
        return text.strip("\n")


@dataclass(frozen=True)
class PathText(Field):
    """The path of a file or folder on the machine that the explorer runs on."""


@dataclass(frozen=True)
class Image(Field):
    """A sample's name or, from Python, the path of an image."""


@dataclass(frozen=True)
class Choice(Field):
    """One of `options`."""

    options: tuple[str, ...] = ()

    def parse(self, text: str) -> str:
        if text not in self.options:
            raise ValueError(f"{self.label}: {text!r} is not one of {', '.join(self.options)}.")
        return text


@dataclass(frozen=True)
class Number(Field):
    """A number from `low` to `high`; an integer where `step` is one."""

    low: float = 0
    high: float = 1
    step: float = 1

    def parse(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high:
            raise ValueError(f"{self.label}: {text!r} is not a number from {self.low:g} to {self.high:g}.")
        return round(value) if isinstance(self.step, int) else value

    def write(self, value: float) -> str:
        return f"{value:g}"


@dataclass(frozen=True)
class Points(Field):
    """Points of an image, written as percent of its height and width: "50, 50" or "20, 30; 70, 60"."""

    many: bool = False

    def parse(self, text: str) -> Any:
        try:
            points = [tuple(float(number) / 100 for number in point.split(",")) for point in text.split(";")]
        except ValueError:
            points = []
        limit = MAX_POINTS if self.many else 1
        if not 0 < len(points) <= limit or any(len(p) != 2 or not all(0 <= n <= 1 for n in p) for p in points):
            how = f"up to {MAX_POINTS} points such as 20, 30; 70, 60" if self.many else "a point such as 50, 50"
            raise ValueError(f"{self.label}: {text!r} is not {how}: row and column in percent from 0 to 100.")
        return tuple(points) if self.many else points[0]

    def write(self, value: Any) -> str:
        points = value if self.many else (value,)
        return "; ".join(f"{100 * row:.1f}, {100 * column:.1f}" for row, column in points)

    def add(self, text: str, point: Point) -> str:
        """The text after a click: the point itself, or where there may be many, the earlier ones and this one."""
        if not self.many:
            return self.write(point)
        try:
            earlier = self.parse(text)
        except ValueError:
            earlier = ()
        return self.write((*earlier, point)[-MAX_POINTS:])


@dataclass(frozen=True)
class Spec:
    """A view: the function that makes it, and the fields that are its arguments, in the order of the page."""

    name: str
    title: str
    intro: str
    function: Callable[..., View]
    fields: tuple[Field, ...]
    main: int
    """How many of the first fields are always in sight."""
    clicks: tuple[str, ...] = ()
    """The fields that a click on the picture can set."""

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The value of each field that the function takes by default."""
        parameters = inspect.signature(self.function).parameters
        return {field.name: parameters[field.name].default for field in self.fields}

    def read(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """Arguments from texts by field, such as a link's query; defaults for what is missing.

        Raises:
            ValueError: a text that means no value of its field.
        """
        return {
            each.name: each.parse(texts[each.name]) if each.name in texts else self.defaults[each.name]
            for each in self.fields
        }

    def write(self, arguments: Mapping[str, Any]) -> dict[str, str]:
        """The texts of arguments that are not the defaults: a link's query."""
        return {
            each.name: each.write(arguments[each.name])
            for each in self.fields
            if arguments[each.name] != self.defaults[each.name]
        }

    def code(self, arguments: Mapping[str, Any], comment: str = "") -> str:
        """Python that draws the view again and writes its three files."""
        lines = [f"    {name}={_literal(value)}," for name, value in arguments.items()]
        files = "\n".join(f'view.save("{self.name}.{kind}")' for kind in FORMATS)
        remark = f"# {comment}\n" if comment else ""
        return (
            f"{remark}from grootv.explorer import views\n\nview = views.{self.function.__name__}(\n"
            + "\n".join(lines)
            + f"\n)\n{files}\n"
        )


def _literal(value: Any) -> str:
    """Python for a value; floats with as many digits as a reader needs."""
    if isinstance(value, float):
        return f"{value:.6g}" if value != int(value) else repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
