"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from training_helpers import environment

pytest.importorskip("gradio", reason="the explorer needs Gradio")
pytest.importorskip("playwright", reason="browser tests need Playwright")

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60
if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt-get install chromium", allow_module_level=True)
expect.set_options(timeout=SECONDS * 1000)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image, a damaged one, and a file that is no checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "damaged.png").write_bytes((folder / "noise.png").read_bytes()[:200])
    (folder / "text.pth").write_text("no weights")
    return folder


@pytest.fixture(scope="module")
def address(files: Path) -> Iterator[str]:
    """Of an explorer that may read `files`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "grootv.explorer", "--port", str(port), "--folder", str(files)]
    temporary = files / "temporary"
    temporary.mkdir()
    variables = {**environment(), "TMPDIR": str(temporary)}
    server = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(3 * SECONDS):
            try:
                urlopen(url, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        output, _ = server.communicate(timeout=30)
    assert "Traceback" not in output, output
    assert not [path for path in temporary.rglob("*") if path.is_file()], "uploads or pictures stay on the disk"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a webcam
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            arguments.append("--no-sandbox")  # the sandbox needs rights that containers do not give
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(params=[1280])
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": request.param, "height": 900}, accept_downloads=True)
    context.set_default_timeout(SECONDS * 1000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    context.close()
    assert not problems


def picture(page: Page, tab: str = "tree") -> Locator:
    return page.locator(f"#{tab}-picture img")


def query(page: Page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def new_picture(page: Page, old: str | None, tab: str = "tree") -> str:
    """Wait for another picture than `old`, and return its address."""
    expect(picture(page, tab)).to_be_visible()
    if old is not None:
        expect(picture(page, tab)).not_to_have_attribute("src", old)
    return picture(page, tab).get_attribute("src")


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_role("listbox", name=label).or_(page.get_by_label(label, exact=True)).first.click()
    page.get_by_role("option", name=option, exact=True).click()


def click_at(page: Page, x: float, y: float, tab: str = "tree") -> None:
    """Click on the picture at parts of its width and height."""
    picture(page, tab).scroll_into_view_if_needed()
    box = picture(page, tab).bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_the_page_opens_with_a_picture_and_asks_no_other_host(page: Page, address: str) -> None:
    hosts = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(address)
    new_picture(page, None)
    assert hosts - {""} == {urlsplit(address).netloc}
    assert "spanning tree" in picture(page).get_attribute("alt")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"


def test_every_control_has_a_name_and_the_tabs_follow_the_keyboard(page: Page, address: str) -> None:
    page.goto(address)
    new_picture(page, None)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, a')].filter(e => e.offsetParent
             && !(e.innerText || e.ariaLabel || e.title || e.labels?.length || e.closest('label')
                  || e.getAttribute('aria-labelledby') || e.querySelector('img[alt]')?.alt
                 )).map(e => e.outerHTML.slice(0, 200))"""
    )
    assert not nameless
    page.get_by_role("tab", name="Language").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt")).to_be_visible()
    page.get_by_label("Prompt").fill("A tree")
    page.locator("#language-draw").focus()
    page.keyboard.press("Enter")
    new_picture(page, None, "language")
    expect(page.locator("#language-status")).to_contain_text("random weights")


def test_clicks_move_the_root_and_the_zoom_and_the_link_shows_the_same(page: Page, address: str) -> None:
    page.goto(address)
    first = new_picture(page, None)
    click_at(page, 0.3, 0.3)
    second = new_picture(page, first)
    page.wait_for_url(re.compile("root="))
    row, column = (float(number) for number in query(page)["root"].split(","))
    # The image fills the picture except for the title, the colour bar and margins.
    assert 20 < row < 35 and 25 < column < 40
    assert page.get_by_label("Root").first.input_value() == query(page)["root"]

    page.get_by_label("Centre of the zoom").last.check()
    zoom = page.locator("#tree-zoom input[type=number]")
    zoom.fill("4")
    zoom.press("Tab")
    choose(page, "Metric", "cosine")
    click_at(page, 0.6, 0.6)
    new_picture(page, second)
    page.wait_for_url(re.compile("zoom=4"))
    assert query(page).keys() == {"tab", "root", "zoom", "centre", "metric"}

    other = page.context.new_page()
    other.goto(page.url)
    new_picture(other, None)
    assert other.get_by_label("Root").first.input_value() == query(page)["root"]
    with other.expect_download() as theirs, page.expect_download() as ours:
        other.get_by_text("Download data (npz)").first.click()
        page.get_by_text("Download data (npz)").first.click()
    with np.load(ours.value.path()) as ours, np.load(theirs.value.path()) as theirs:
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_an_upload_is_drawn_and_its_files_and_its_python_agree(
    page: Page, address: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    page.goto(address)
    first = new_picture(page, None)
    page.locator("#upload input[type=file]").set_input_files(files / "noise.png")
    expect(page.locator("#upload img")).to_be_visible()
    page.locator("#tree-draw").click()
    new_picture(page, first)
    page.wait_for_url(re.compile("tab=tree"))
    content = {}
    for kind, name in (("png", "PNG"), ("svg", "SVG"), ("npz", "data (npz)")):
        with page.expect_download() as download:
            page.locator("#tree-files").get_by_text(f"Download {name}").click()
        assert download.value.suggested_filename == f"tree.{kind}"
        content[kind] = Path(download.value.path())
    with Image.open(content["png"]) as image:
        assert image.format == "PNG" and image.width > 500
    assert b"<svg" in content["svg"].read_bytes()[:2000]

    page.locator("#tree-copy").click()
    expect(page.get_by_text("Copied.").first).to_be_visible()
    code = page.evaluate("navigator.clipboard.readText()")
    monkeypatch.chdir(tmp_path)
    shutil.copy(files / "noise.png", tmp_path)
    (tmp_path / "copied.py").write_text(code)
    runpy.run_path("copied.py")
    with np.load("tree.npz") as ours, np.load(content["npz"]) as theirs:
        assert int(ours["height"]) * int(ours["width"]) == len(ours["parent"])
        np.testing.assert_array_equal(ours["parent"], theirs["parent"])
    assert content["png"].stat().st_size == Path("tree.png").stat().st_size


# An image of two colours into the clipboard.
COPY_IMAGE = """async () => {
  const canvas = new OffscreenCanvas(90, 60), context = canvas.getContext("2d")
  for (const [colour, side] of [["red", 90], ["blue", 30]]) {
    context.fillStyle = colour
    context.fillRect(0, 0, side, side)
  }
  const image = await canvas.convertToBlob({type: "image/png"})
  await navigator.clipboard.write([new ClipboardItem({"image/png": image})])
}"""


@pytest.mark.parametrize("source", ["camera", "clipboard"])
def test_images_of_a_webcam_and_of_the_clipboard_are_drawn(page: Page, address: str, source: str) -> None:
    page.context.grant_permissions(["camera", "clipboard-read", "clipboard-write"], origin=address)
    page.goto(address)
    first = new_picture(page, None)
    if source == "camera":
        page.get_by_label("Capture from camera").click()
        page.get_by_role("button", name="Click to Access Webcam").click()
        # Before the first frame a capture does nothing.
        page.wait_for_function("document.querySelector('#upload video')?.videoWidth > 0")
        page.locator("#upload").get_by_label("capture photo").click()
    else:
        page.evaluate(COPY_IMAGE)
        page.get_by_label("Paste from clipboard").click()
    expect(page.locator("#upload img")).to_be_visible()
    page.locator("#tree-draw").click()
    new_picture(page, first)
    with page.expect_download() as download:
        page.get_by_text("Download data (npz)").first.click()
    with np.load(download.value.path()) as data:
        assert abs(data["width"] / data["height"] - {"camera": 4 / 3, "clipboard": 3 / 2}[source]) < 0.05


def test_two_users_at_once_get_their_own_pictures(page: Page, address: str) -> None:
    page.goto(f"{address}/?image=flower")
    other = page.context.new_page()
    other.goto(f"{address}/?image=chelsea")
    old = [new_picture(each, None) for each in (page, other)]
    for each in (page, other):
        each.locator("#tree-draw").click()
    new = [new_picture(each, before) for each, before in zip((page, other), old, strict=True)]
    assert len({*old, *new}) == 4
    page.wait_for_url(re.compile("image=flower"))
    other.wait_for_url(re.compile("image=chelsea"))


def test_affinities_gather_points(page: Page, address: str) -> None:
    page.goto(f"{address}/?tab=affinity&image=coffee")
    first = new_picture(page, None, "affinity")
    click_at(page, 0.1, 0.2, "affinity")
    new_picture(page, first, "affinity")
    page.wait_for_url(re.compile("points="))
    assert query(page)["points"].count(";") == 1 and query(page)["image"] == "coffee"


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("tab=model&weights=text.pth", "text.pth.*not in a folder"),
        ("tab=model&weights={files}/text.pth", "Checkpoint .*text.pth cannot be used: it is damaged"),
        ("tab=model&weights={files}/none.pth", "none.pth does not exist"),
        ("tab=tree&image=/etc/passwd", "is no sample"),
        ("tab=tree&zoom=banana", "Zoom: 'banana' is not a number from 1 to 16"),
        ("tab=language&prompt=", "The prompt is empty"),
        ("tab=dense", "Choose a config"),
        ("tab=nothing", "names the tab 'nothing', which does not exist"),
    ],
)
def test_errors_are_sentences_on_the_page(page: Page, address: str, files: Path, link: str, words: str) -> None:
    page.goto(f"{address}/?{link.format(files=files)}")
    alert = page.get_by_role("alert").locator("visible=true").first
    expect(alert).to_contain_text(re.compile(words))
    assert "Traceback" not in page.content()


def test_a_damaged_upload_is_a_sentence_and_the_page_goes_on(page: Page, address: str, files: Path) -> None:
    page.goto(address)
    new_picture(page, None)
    page.locator("#upload input[type=file]").set_input_files(files / "damaged.png")
    expect(page.locator("#upload img")).to_have_count(1)
    page.locator("#tree-draw").click()
    expect(page.get_by_role("alert").first).to_contain_text("The image damaged.png cannot be read: it is damaged")
