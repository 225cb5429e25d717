"""Time to the first picture of the explorer, and its memory over many requests.

    python benchmarks/explorer.py                 # 200 requests
    python benchmarks/explorer.py --requests 20

Starts the explorer and uses it in Chromium as a person does: it measures from a click on "Draw" until the browser has
the picture, for an image of 224 x 224 pixels, and then draws views of changing tabs, images and settings, each of them
five times. Memory is the resident set of the server's process. Needs Playwright and Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from report import publish, table
from sklearn.datasets import load_sample_image

CASES = {
    "Tree, colours, grid 64": {"tab": "tree"},
    "Tree, colours, grid 224 (every pixel)": {"tab": "tree", "grid": "224"},
    "Affinity, colours": {"tab": "affinity"},
    "Affinity, two grootv_nano": {"tab": "affinity", "source": "model"},
    "Model, grootv_tiny, stage 1": {"tab": "model", "model": "grootv_tiny"},
    "Model, grootv_tiny, classes": {"tab": "model", "model": "grootv_tiny", "show": "classes"},
}
METRICS = ("cosine", "euclidean", "manhattan")
SAMPLES = ("china", "flower", "chelsea", "coffee", "astronaut")


def start(folder: str) -> tuple[subprocess.Popen, str]:
    """The explorer, when it answers, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "grootv.explorer", "--port", str(port), "--folder", folder]
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    address = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        try:
            urlopen(address, timeout=5).close()
            return server, address
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the explorer did not start")


def draw(page: Page, tab: str) -> float:
    """Seconds from a click on "Draw" until the browser has another picture."""
    old = page.locator(f"#{tab}-picture img").get_attribute("src")
    start = time.perf_counter()
    page.locator(f"#{tab}-draw").click()
    page.wait_for_function(
        """([tab, old]) => { const image = document.querySelector(`#${tab}-picture img`);
                             return image && image.src !== old && image.complete && image.naturalWidth; }""",
        arg=[tab, old],
        polling=20,
    )
    return time.perf_counter() - start


def open_view(page: Page, address: str, query: dict[str, str]) -> str:
    """Open a link and wait for its picture; returns the tab."""
    page.goto(f"{address}/?{urlencode(query)}")
    page.locator(f"#{query['tab']}-picture img").wait_for()
    return query["tab"]


def changing(number: int) -> dict[str, str]:
    """The query of one of many views."""
    tab = ("tree", "affinity", "model", "compare")[number % 4]
    query = {"tab": tab, "image": SAMPLES[number % 5], "stage": str(1 + number % 3)}
    if tab in ("tree", "affinity") and number % 8 < 4:
        query["source"] = "model"
    if tab == "tree":
        query["metric"] = METRICS[number % 3]
    return query


def megabytes(process: subprocess.Popen) -> float:
    """The resident set of a process."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the process has no resident set")


def measure(requests: int, repeats: int) -> list[str]:
    """The sections of the report."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        photograph = Path(folder, "photograph.png")
        Image.fromarray(load_sample_image("china.jpg")).resize((224, 224)).save(photograph)
        server, address = start(folder)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(120_000)
            times = []
            for case, query in CASES.items():
                tab = open_view(page, address, query)
                page.locator("#upload input[type=file]").set_input_files(photograph)
                page.locator("#upload img").wait_for()
                first, *later = [draw(page, tab) for _ in range(repeats + 1)]
                times.append((case, f"{first:.2f}", f"{statistics.median(later):.2f}", f"{max(later):.2f}"))
            curve = []
            for number in range(requests + 1):
                if number % max(1, requests // 10) == 0:
                    curve.append((number, f"{megabytes(server):.0f}"))
                view, repetition = divmod(number, 5)
                if repetition == 0:
                    tab = open_view(page, address, changing(view))
                else:
                    draw(page, tab)
        finally:
            browser.close()
            server.terminate()
            server.wait(30)
    head = ("view", "first, s", f"median of {repeats}, s", "largest, s")
    return [
        "## Time from a click to the picture, image of 224 × 224 pixels",
        table(head, times),
        "## Memory of the server (resident set) over requests: changing views, each drawn five times",
        table(("requests", "MB"), curve),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="of the curve of memory")
    parser.add_argument("--repeats", type=int, default=5, help="of each view")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    sections = measure(args.requests, args.repeats)
    sections.insert(0, f"Load of the machine before the measurement: {load:.1f}; after it: {os.getloadavg()[0]:.1f}.")
    publish("The explorer", "explorer", sections, "python benchmarks/explorer.py")


if __name__ == "__main__":
    main()
