"""The page in the browser: controls from `Spec`, pictures from the views, files and links beside them."""

from __future__ import annotations

import contextlib
import html
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from fastapi import FastAPI, HTTPException, Response
from PIL import Image

from . import view as fields
from .inputs import SAMPLES
from .view import FORMATS, Spec, View, clicked_point
from .views import SPECS
from .views.compare import SAME

__all__ = ["make_app"]

_logger = logging.getLogger(__name__)

QUEUE_SIZE = 32
KEPT_VIEWS = 16
"""Views whose files can be downloaded; the oldest are dropped."""
MAX_UPLOAD = "64mb"
_SAMPLE_CHOICES = [(title, name) for name, title in SAMPLES.items()]
_TYPES = {"png": "image/png", "svg": "image/svg+xml", "npz": "application/octet-stream"}
_CSS = """
.gradio-container { max-width: 1500px !important; }
.status p { margin: 0.3em 0; }
.status .error { border-left: 5px solid #d55e00; padding: 0.5em 0.8em; background: #d55e0022; font-weight: 600; }
.status .note { border-left: 5px solid #0072b2; padding: 0.2em 0.8em; }
.gradio-container { --block-info-text-color: #595959; --block-label-text-color: #404040; }
.dark .gradio-container, .gradio-container.dark { --block-info-text-color: #b8b8b8; --block-label-text-color: #d4d4d4; }
.files a { display: inline-block; margin: 0.2em 0.6em 0.2em 0; padding: 0.35em 0.9em; border: 1px solid currentColor;
  border-radius: 6px; text-decoration: none; }
.files a:focus-visible, button:focus-visible { outline: 3px solid #0072b2 !important; outline-offset: 2px; }
.picture img { cursor: crosshair; }
.picture .icon-button-wrapper { z-index: 2; }
@media (max-width: 600px) {
  .picture button, .picture .image-container, .picture .image-frame { justify-content: flex-start; overflow-x: auto; }
  .picture img { min-width: 620px; max-width: none; }
}
"""
_SET_URL = "query => { history.replaceState(null, '', query || location.pathname); return []; }"
_COPY = """async code => {
  const say = text => { document.querySelectorAll('.copied').forEach(place => place.textContent = text); };
  try { await navigator.clipboard.writeText(code); say('Copied.'); }
  catch { say('The browser does not allow copying here: select the text and copy it.'); }
  setTimeout(() => say(''), 4000);
  return [];
}"""


class KeptViews:
    """The last views, by names that nobody can guess, for downloads. Their pictures are files in a folder."""

    def __init__(self, folder: Path, limit: int = KEPT_VIEWS) -> None:
        self._folder, self._limit = folder, limit
        self._views: OrderedDict[str, tuple[str, View]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, name: str, view: View) -> tuple[str, Path]:
        """The key of a view, and its picture."""
        key = uuid.uuid4().hex
        picture = self._picture(key, name)
        picture.write_bytes(view.encode("png"))
        with self._lock:
            self._views[key] = name, view
            while len(self._views) > self._limit:
                old, (old_name, _) = self._views.popitem(last=False)
                self._picture(old, old_name).unlink(missing_ok=True)
        return key, picture

    def file(self, key: str, kind: str) -> tuple[str, bytes]:
        """Name and content of a file of a view; KeyError if it is no longer kept."""
        with self._lock:
            name, view = self._views[key]
            content = self._picture(key, name).read_bytes() if kind == "png" else None
        return f"{name}.{kind}", content or view.encode(kind)

    def _picture(self, key: str, name: str) -> Path:
        return self._folder / f"{name}-{key}.png"


@dataclass(frozen=True)
class Folders:
    """The folders in which the page may read files."""

    allowed: Sequence[Path]

    def check(self, spec: Spec, arguments: dict[str, Any]) -> None:
        """Raise ValueError, with a sentence, for a path outside of them."""
        for each in spec.fields:
            path = arguments[each.name]
            if isinstance(each, fields.PathText) and path:
                resolved = Path(path).expanduser().resolve()
                if not any(resolved.is_relative_to(folder.resolve()) for folder in self.allowed):
                    named = ", ".join(map(str, self.allowed))
                    raise ValueError(
                        f"{each.label}: {path} is not in a folder that this explorer may read ({named}). "
                        "Start it with --folder FOLDER to add one."
                    )


def sentence(error: Exception) -> str:
    """What the page says about an error: its own sentence, or for a fault of the program where details are."""
    if isinstance(error, ValueError | OSError | ImportError) or type(error).__name__.endswith("CheckpointError"):
        text = " ".join(str(error).split()).rstrip(".")
        return f"{text[:1].upper()}{text[1:]}."
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        return "This needs more memory than the machine has. Choose a smaller image, input size or model."
    return f"The explorer failed ({type(error).__name__}). The output of the command that started it has the details."


def _status(notes: Sequence[str], error: str = "") -> str:
    if error:
        return f'<div role="alert"><p class="error">{html.escape(error)}</p></div>'
    return '<div role="status">' + "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes) + "</div>"


def _links(key: str, spec: Spec) -> str:
    links = (
        f'<a href="files/{key}.{kind}" download="{spec.name}.{kind}">Download {name}</a>'
        for kind, name in zip(FORMATS, ("PNG", "SVG", "data (npz)"), strict=True)
    )
    return "".join(links)


class Tab:
    """The controls of a view, and what happens when they are used."""

    def __init__(self, spec: Spec, page: Page) -> None:
        self.spec, self.page = spec, page
        self.controls: dict[str, gr.components.Component] = {}
        self.uploads: dict[str, gr.Image] = {}

    def build(self) -> None:
        """Make the components."""
        spec = self.spec
        gr.Markdown(spec.intro)
        if any(each.name == "image" for each in spec.fields):
            self.controls["image"], self.uploads["image"] = self.page.sample, self.page.upload
        main, rest = spec.fields[: spec.main], spec.fields[spec.main :]
        with gr.Row(equal_height=False):
            for each in main:
                self._control(each)
        if rest:
            title = "Models and more settings" if any(each.name == "model" for each in rest) else "More settings"
            with gr.Accordion(title, open=False), gr.Row(equal_height=False):
                for each in rest:
                    self._control(each)
        with gr.Row():
            self.button = gr.Button("Draw", variant="primary", elem_id=f"{spec.name}-draw", min_width=120)
            labels = {each.name: each.label for each in spec.fields}
            self.click = gr.Radio(
                [(labels[name], name) for name in spec.clicks],
                value=next(iter(spec.clicks), None),
                label="A click on the picture sets",
                visible=len(spec.clicks) > 1,
                elem_id=f"{spec.name}-click",
            )
        self.status = gr.HTML(_status(()), elem_classes="status", elem_id=f"{spec.name}-status")
        self.picture = gr.Image(
            label=spec.title,
            show_label=False,
            interactive=False,
            type="filepath",
            format="png",
            buttons=["fullscreen"],
            elem_id=f"{spec.name}-picture",
            elem_classes="picture",
        )
        self.files = gr.HTML("", elem_classes="files", elem_id=f"{spec.name}-files")
        with gr.Accordion("The Python that made this", open=False):
            self.code = gr.Code(language="python", label="Python", interactive=False, elem_id=f"{spec.name}-code")
        self.copy = gr.Button("Copy the Python that made this", size="sm", elem_id=f"{spec.name}-copy")
        gr.HTML('<span class="copied" role="status"></span>')
        self.boxes = gr.State([])
        self.query = gr.Textbox(visible=False)

    def _control(self, each: fields.Field) -> None:
        if each.name in self.controls:
            return
        value = each.write(self.spec.defaults[each.name])
        elem_id = f"{self.spec.name}-{each.name}"
        common = {"label": each.label, "info": each.info or None, "elem_id": elem_id, "min_width": 200}
        if isinstance(each, fields.Choice):
            control = gr.Dropdown(list(each.options), value=value, filterable=len(each.options) > 6, **common)
        elif isinstance(each, fields.Number):
            limits = {"minimum": each.low, "maximum": each.high, "step": each.step}
            control = gr.Slider(value=self.spec.defaults[each.name], **limits, **common)
        elif isinstance(each, fields.Image):
            control = gr.Dropdown([(SAME, SAME), *_SAMPLE_CHOICES], value=SAME, **common)
            self.uploads[each.name] = _upload(f"{each.label}: your own", f"{elem_id}-upload")
        else:
            control = gr.Textbox(value=value, lines=getattr(each, "lines", 1), **common)
        self.controls[each.name] = control

    def connect(self) -> None:
        """Say what the components do."""
        inputs = [*self.controls.values(), *self.uploads.values()]
        outputs = [self.picture, self.status, self.files, self.code, self.boxes, self.query]
        # One at a time: a request has all cores, and the others wait in the bounded queue.
        work = {"concurrency_id": "work", "concurrency_limit": 1, "show_progress_on": self.picture}
        self.draw: dict[str, Any] = {"fn": self.run, "inputs": inputs, "outputs": outputs, **work, **_PRIVATE}
        triggers = [self.button.click]
        triggers += [box.submit for box in self.controls.values() if isinstance(box, gr.Textbox)]
        show = {"fn": None, "inputs": self.query, "js": _SET_URL, **_PRIVATE}
        gr.on(triggers, **self.draw).then(**show)
        self.copy.click(None, self.code, js=_COPY, **_PRIVATE)
        if self.spec.clicks:
            points = [self.controls[name] for name in self.spec.clicks]
            places = [self.boxes, self.picture, self.click, *points]
            clicked = self.picture.select(self.clicked, places, points, show_progress="hidden", **_PRIVATE)
            clicked.success(**self.draw).then(**show)

    def run(self, *values: Any, progress: gr.Progress = gr.Progress()) -> tuple:  # noqa: B008 (Gradio's way)
        """Draw the view of the controls' values, or say in a sentence why that is not possible."""
        spec = self.spec
        texts = {name: _text(value) for name, value in zip(self.controls, values, strict=False)}
        uploads = dict(zip(self.uploads, values[len(self.controls) :], strict=True))
        try:
            progress(0.05, desc="Reading")
            arguments = spec.read({**texts, **{name: path for name, path in uploads.items() if path}})
            self.page.folders.check(spec, arguments)
            shown = {name: Path(path).name for name, path in uploads.items() if path}
            _require_samples(spec, {**arguments, **dict.fromkeys(shown, SAME)})
            progress(0.2, desc="Computing")
            made = spec.function(**arguments)
            progress(0.7, desc="Drawing")
            key, picture = self.page.views.keep(spec.name, made)
        except Exception as error:
            if "has the details" in (said := sentence(error)):
                _logger.exception("%s failed", spec.name)
            else:
                _logger.info("%s: %s", spec.name, said)
            return None, _status((), said), "", "", [], ""
        # Images that were uploaded have no place in a link. Elsewhere, the file has the name that it had there.
        linked = {**arguments, **{name: spec.defaults[name] for name in shown}}
        comment = f"{', '.join(shown.values())}: what you uploaded, in the folder in which this runs." if shown else ""
        return (
            gr.Image(str(picture), alt_text=made.alt),
            _status(made.notes),
            _links(key, spec),
            spec.code({**arguments, **shown}, comment),
            made.boxes(),
            "?" + urlencode({"tab": spec.name, **spec.write(linked)}),
        )

    def clicked(self, event: gr.SelectData, boxes: list, picture: str, name: str | None, *texts: str) -> Any:
        """The texts of the point fields after a click on the picture."""
        with Image.open(picture) as file:
            width, height = file.size
        point = clicked_point(boxes, event.index[0] / width, event.index[1] / height)
        if point is None:
            raise gr.Error("Click inside a panel that shows the image.", print_exception=False)
        by_name = {each.name: each for each in self.spec.fields if isinstance(each, fields.Points)}
        changed = [
            by_name[each].add(text, point) if each == (name or each) else gr.skip()
            for each, text in zip(self.spec.clicks, texts, strict=True)
        ]
        return changed if len(changed) > 1 else changed[0]  # Gradio takes a list for one output as its value


_PRIVATE: dict[str, Any] = {"api_visibility": "private"}


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)


def _upload(label: str, elem_id: str) -> gr.Image:
    """An image that is handed over as a file, unread: a damaged one becomes a sentence of `inputs.read_image`."""
    image = gr.Image(
        label=label,
        sources=["upload", "clipboard", "webcam"],
        type="filepath",
        height=220,
        elem_id=elem_id,
        buttons=[],
    )
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


class Page:
    """The whole page."""

    def __init__(self, folders: Sequence[Path], pictures: Path) -> None:
        self.folders, self.views = Folders(folders), KeptViews(pictures)
        self.blocks = gr.Blocks(
            title="GrootV explorer", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
        )
        with self.blocks:
            gr.Markdown("# GrootV explorer\nTrees, affinities and predictions of your own images and sentences.")
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    self.sample = gr.Dropdown(
                        _SAMPLE_CHOICES,
                        value="china",
                        label="Sample image",
                        info="From scikit-learn and scikit-image",
                        elem_id="image",
                    )
                    self.upload = _upload("Your own image", "upload")
                    gr.Markdown(
                        "Upload, paste or take a picture. Images of more than 4 megapixels are made smaller. They stay "
                        "on the machine that runs this page."
                    )
                with gr.Column(scale=4, min_width=320), gr.Tabs() as self.tabs_row:
                    self.tabs = {}
                    for spec in SPECS.values():
                        with gr.Tab(spec.title, id=spec.name):
                            self.tabs[spec.name] = Tab(spec, self)
                            self.tabs[spec.name].build()
            for tab in self.tabs.values():
                tab.connect()
            self._load_link()

    def _load_link(self) -> None:
        controls = [control for tab in self.tabs.values() for name, control in tab.controls.items() if name != "image"]
        statuses = [tab.status for tab in self.tabs.values()]
        asked = gr.Textbox(visible=False)
        outputs = [asked, self.tabs_row, self.sample, *controls, *statuses]
        loaded = self.blocks.load(self.read_link, None, outputs, show_progress="hidden", **_PRIVATE)
        for name, tab in self.tabs.items():
            # The page opens with a picture: that of the link's tab.
            only = loaded.then(_require_equal, [asked, gr.State(name)], None, show_progress="hidden", **_PRIVATE)
            only.success(**tab.draw)

    def read_link(self, request: gr.Request) -> list[Any]:
        """The tab and the values of all controls that a link names."""
        query = dict(request.query_params)
        asked = query.pop("tab", "tree")
        error = "" if asked in self.tabs else f"The link names the tab {asked!r}, which does not exist."
        asked = asked if asked in self.tabs else "tree"
        spec, values = SPECS[asked], {}
        known = {each.name: each for each in spec.fields}
        try:
            arguments = spec.read({name: text for name, text in query.items() if name in known})
            _require_samples(spec, arguments)
            for name in query.keys() & known.keys():
                number = isinstance(known[name], fields.Number)
                values[name] = arguments[name] if number else known[name].write(arguments[name])
        except ValueError as problem:
            error = f"The link cannot be shown as it is. {problem}"
        controls = [
            values.get(name, gr.skip()) if tab.spec.name == asked else gr.skip()
            for tab in self.tabs.values()
            for name in tab.controls
            if name != "image"
        ]
        statuses = [_status((), error) if error and name == asked else gr.skip() for name in self.tabs]
        # A link with an error shows the error, and no picture that it did not mean.
        return ["" if error else asked, gr.Tabs(selected=asked), values.get("image", gr.skip()), *controls, *statuses]


def _require_equal(asked: str, name: str) -> None:
    if asked != name:
        raise _NotAskedError


def _require_samples(spec: Spec, arguments: dict[str, Any]) -> None:
    """Raise ValueError for an image that is the path of a file on this machine."""
    for each in spec.fields:
        if isinstance(each, fields.Image) and arguments[each.name] not in (*SAMPLES, SAME):
            raise ValueError(f"{each.label}: {arguments[each.name]!r} is no sample. Upload your own image.")


class _NotAskedError(gr.Error):
    """Ends a chain of events silently."""

    def __init__(self) -> None:
        super().__init__("", visible=False, print_exception=False)


def make_app(folders: Sequence[Path] = (Path(),)) -> FastAPI:
    """The application.

    Args:
        folders: In which the page may read weights, configs and models. Configs in them are run as Python.
    """
    # Readable by this user alone, and removed at the end: what people upload and what is drawn of it.
    files = Path(tempfile.mkdtemp(prefix="grootv-explorer-"))
    os.environ["GRADIO_TEMP_DIR"] = str(files / "gradio")
    pictures = files / "pictures"
    pictures.mkdir()
    page = Page([Path(folder) for folder in folders], pictures)
    page.blocks.queue(max_size=QUEUE_SIZE, default_concurrency_limit=4)

    @contextlib.asynccontextmanager
    async def remove_files(_: FastAPI) -> AsyncIterator[None]:
        yield
        shutil.rmtree(files, ignore_errors=True)

    app = FastAPI(lifespan=remove_files, docs_url=None, openapi_url=None)

    @app.get("/files/{key}.{kind}")
    def file(key: str, kind: str) -> Response:
        if kind not in FORMATS:
            raise HTTPException(404, f"Files are {', '.join(FORMATS)}.")
        try:
            name, content = page.views.file(key, kind)
        except KeyError:
            raise HTTPException(404, "This picture is no longer kept. Draw it again on the page.") from None
        disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(content, media_type=_TYPES[kind], headers=disposition)

    # System fonts: the page fetches nothing from other hosts.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        theme=theme,
        css=_CSS,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[str(pictures)],
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
    )
