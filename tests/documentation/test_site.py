"""The documentation site: what a strict build finds, and what the built pages hold."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from training_helpers import ROOT

PYTHON = ROOT / ".venv-docs" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="needs the environment that `make docs` sets up")
SOURCES = ["mkdocs.yml", "docs", "notebooks", "benchmarks", "configs", "grootv", "grootl", "ops", "tests", "tools"]
SOURCES += ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE", "Makefile"]
SOURCES += ["constraints.txt", "constraints-integrations.txt", "constraints-docs.txt", "pyproject.toml"]


def build(checkout: Path) -> subprocess.CompletedProcess:
    command = [str(PYTHON), "-m", "mkdocs", "build", "--strict"]
    environment = {"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the site is made of."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def site(checkout: Path) -> Path:
    result = build(checkout)
    assert result.returncode == 0, result.stderr[-3000:]
    return checkout / "build" / "site"


@pytest.mark.slow
def test_pages_and_search(site: Path) -> None:
    """README is the home page, the results and notebooks are pages, links to sources lead to pages that show them."""
    home = (site / "index.html").read_text()
    assert "images/tree_and_affinity.png" in home and 'href="source/constraints.txt.html"' in home
    assert (site / "images/tree_and_affinity.png").read_bytes() == (
        ROOT / "docs/images/tree_and_affinity.png"
    ).read_bytes()
    results = {path.stem for path in (ROOT / "benchmarks/results").glob("*.md")}
    assert {path.stem for path in (site / "benchmarks/results").glob("*.html")} == results
    scan = (site / "source/grootv/layers/tree_ssm.py.html").read_text()
    assert "class TreeSSM" in re.sub("<[^>]*>", "", scan)
    assert "tree_scan" in (site / "search/search_index.js").read_text()
    assert "grootvl_ops.tree_scan" in (site / "api/operations.html").read_text()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text()
        pictures = re.findall(rf'src="({notebook.stem}_files/[^"]*)"', page)
        assert pictures and all((site / "notebooks" / picture).is_file() for picture in pictures)


@pytest.mark.slow
def test_reading_fetches_nothing_from_other_hosts(site: Path) -> None:
    for path in site.rglob("*.html"):
        for tag, address in re.findall(
            r"<(\w+)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)", path.read_text()
        ):
            assert tag == "a", (path, tag, address)
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", path.read_text()), path


@pytest.mark.slow
def test_faults_end_a_strict_build(checkout: Path, site: Path) -> None:
    """Each of these faults is named. `site` is built before, so that the faults are the only ones."""
    with (checkout / "docs/faq.md").open("a") as page:
        page.write("\n[a](no-such-page.md) [b](speed.md#no-such-part) [c](../grootv/no_such_file.py)\n")
        page.write('\n<img src="https://example.org/picture.png">\n')
    (checkout / "docs/forgotten.md").write_text("# A page that the navigation leaves out\n")
    with (checkout / "grootv/visualization.py").open("a") as file:
        file.write("\n\ndef plot_nothing(axes):\n    return axes\n")
    (checkout / "grootv/extra").mkdir()
    (checkout / "grootv/extra/__init__.py").write_text('__all__ = ["thing"]\n\n\ndef thing():\n    """A thing."""\n')
    result = build(checkout)
    assert result.returncode != 0
    for fault in (
        "no-such-page.md", "no-such-part", "no_such_file.py", "example.org/picture.png", "forgotten.md",
        "grootv.visualization.plot_nothing has no docstring", "thing is exported by grootv.extra",
    ):  # fmt: skip
        assert fault in result.stderr, fault
