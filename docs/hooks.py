"""What the documentation site adds to the pages in docs/, so that each text exists once. mkdocs.yml names this file.

* README.md, CHANGELOG.md and other pages of the repository are pages of the site, and so are the measured results in
  benchmarks/results/ and the notebooks.
* A link to a file or folder of the repository leads to a page that shows it.
* A page that makes its reader's browser fetch something from another host is a warning, too.
* The pages of the API reference come from `extra.api` in mkdocs.yml. A public name without a docstring, or one
  that a package exports and no page shows, is a warning, which a strict build counts as an error.
"""

import logging
import os
import re
from pathlib import Path, PurePosixPath

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "configs/classification/README.md"]
RESULTS = "benchmarks/results"
PACKAGES = {"grootv": ROOT, "grootl": ROOT, "grootvl_ops": ROOT / "ops"}
LANGUAGES = {".py": "python", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".h": "cpp", ".yml": "yaml", ".sh": "bash"}
# Code, in which nothing is a link, or the target of a link.
CODE_OR_LINK = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`|(?<=\]\()(?P<target>[^)\s]+)(?=\))", re.DOTALL | re.MULTILINE)
log = logging.getLogger("mkdocs.hooks.repository")


def site_path(path: str) -> str:
    """Where the page of the file or folder `path` of the repository is among the sources of the site."""
    if path == "README.md":
        return "index.md"
    if path.endswith("/README.md"):
        return path.replace("/README.md", ".md")
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".ipynb"):
        return str(PurePosixPath(path).with_suffix(".md"))
    if path.endswith(".md"):
        return path
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def repository_path(file: File) -> str:
    """The inverse of `site_path`, for pages with links."""
    if not file.generated_by:
        return f"docs/{file.src_uri}"
    return next((path for path in PAGES if site_path(path) == file.src_uri), file.src_uri)


def targets(markdown: str, path: str) -> list[str]:
    """Files and folders of the repository that the page `path` links to."""
    links = (match["target"] for match in CODE_OR_LINK.finditer(markdown) if match["target"])
    files = (link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link))
    return [os.path.normpath(os.path.join(os.path.dirname(path), file)) for file in files]


def source_page(path: str) -> str:
    """A page that shows a file, or lists a folder."""
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
    if (ROOT / path).is_dir():
        return head + "\n".join(f"* [{name}]({name})" for name in visible(path)) + "\n"
    language = LANGUAGES.get(PurePosixPath(path).suffix, "text")
    return f"{head}~~~~~~ {language}\n{(ROOT / path).read_text()}\n~~~~~~\n"


def visible(folder: str) -> list[str]:
    """Names in a folder that belong to the sources, not to a build."""
    names = sorted(entry.name for entry in (ROOT / folder).iterdir())
    return [name for name in names if not re.match(r"[_.]*(pycache|DS_Store)|.*\.(so|pyc|pyd)$|_build\.json", name)]


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures."""
    exporter = MarkdownExporter()
    text, resources = exporter.from_filename(path, resources={"output_files_dir": f"{path.stem}_files"})
    return text, resources["outputs"]


def results() -> dict[Path, str]:
    """The reports in benchmarks/results/ with their titles; several of one title also have the names of their files."""
    reports = sorted((ROOT / RESULTS).glob("*.md"))
    titles = [re.search(r"^# (.*)$", path.read_text(), re.MULTILINE)[1] for path in reports]
    return {
        path: title if titles.count(title) == 1 else f"{title}: {path.stem}"
        for path, title in zip(reports, titles, strict=True)
    }


def results_page() -> str:
    """A table of everything in benchmarks/results/: what, where and when it was measured."""
    rows = []
    for path, title in results().items():
        text = " ".join(path.read_text().split())
        hardware = re.search(r"Measured on (?:an |one )?(.*?)(?:;| in one run|, \d+ cores)", text)[1]
        date = re.search(r"\d{4}-\d\d-\d\d", text)[0]
        rows.append(f"| [{title}](results/{path.name}) | {hardware} | {date} |")
    return (
        "# Benchmarks\n\nEach page shows what a program in [benchmarks](../benchmarks) wrote, with hardware, versions, "
        "commit and the command that measures it again. [speed.md](../docs/speed.md) explains the figures.\n\n"
        "| what | hardware | date |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def api_page(title: str, modules: list[str]) -> str:
    """A page of the API reference."""
    return f"# {title}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the results into the navigation, and check the docstrings."""
    for entry in config.nav:
        if "Benchmarks" in entry:
            entry["Benchmarks"] += [{title: f"{RESULTS}/{path.name}"} for path, title in results().items()]
    check_docstrings([module for _, modules in config.extra["api"].values() for module in modules])
    return config


def check_docstrings(modules: list[str]) -> None:
    """Warn of public functions, classes and methods of `modules` without docstring, and of exports on none of them."""
    loader = griffe.GriffeLoader(search_paths=list(PACKAGES.values()))
    packages = [loader.load(package) for package in PACKAGES]
    loader.resolve_aliases()
    shown = {member.canonical_path for module in modules for member in public(loader.modules_collection[module])}

    def check(item: griffe.Object) -> None:
        if not item.has_docstring:
            log.warning("%s:%s: %s has no docstring", item.filepath, item.lineno, item.path)
        if item.is_class:
            for member in item.members.values():
                if member.is_function and not member.name.startswith("_") and not inherits_docstring(item, member.name):
                    check(member)

    def find_hidden(package: griffe.Module) -> None:
        for name in package.exports or ():
            member = package[str(name)]
            if not member.is_module and member.canonical_path not in shown:
                log.warning("%s is exported by %s, and on no page of the API reference", name, package.path)
        for child in package.modules.values():
            if child.is_subpackage and not child.name.startswith("_"):
                find_hidden(child)

    for module in modules:
        for member in public(loader.modules_collection[module]):
            if member.is_function or member.is_class:
                check(member.final_target if member.is_alias else member)
    for package in packages:
        find_hidden(package)


def inherits_docstring(item: griffe.Class, method: str) -> bool:
    """Whether a base class in this project says what the method does."""
    return any(
        method in base.members and base.members[method].has_docstring or inherits_docstring(base, method)
        for base in item.resolved_bases
        if isinstance(base, griffe.Class)
    )


def public(module: griffe.Module) -> list[griffe.Object | griffe.Alias]:
    """What a page shows of a module: its exports, or what it defines under names without underscore."""
    if module.exports is not None:
        return [module[str(name)] for name in module.exports if not module[str(name)].is_module]
    return [item for item in module.members.values() if not item.is_alias and not item.name.startswith("_")]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""

    def add(src_uri: str, content: str | bytes) -> None:
        file = File.generated(config, src_uri, content=content)
        if file.src_uri in files.src_uris:
            files.remove(files.src_uris[file.src_uri])
        files.append(file)

    texts = {path: (ROOT / path).read_text() for path in PAGES}
    texts |= {f"{RESULTS}/{path.name}": path.read_text() for path in results()}
    texts["benchmarks/index.md"] = results_page()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(path)
        texts[f"notebooks/{path.name}"] = text
        for name, data in pictures.items():
            add(f"notebooks/{name}", data)
    for path, text in texts.items():
        add(site_path(path), text)
    for name, (title, modules) in config.extra["api"].items():
        add(f"api/{name}.md", api_page(title, modules))

    texts |= {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages() if file.abs_src_path}
    pending = {target for path, text in texts.items() for target in targets(text, path)}
    shown = set()
    while pending:
        path = pending.pop()
        if not (ROOT / path).exists() or site_path(path) in files.src_uris or path in shown:
            continue
        if path.startswith("docs/"):
            continue
        shown.add(path)
        add(site_path(path), source_page(path))
        if (ROOT / path).is_dir():
            pending |= {f"{path}/{name}" for name in visible(path)}
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their pages."""
    here = page.file.src_uri
    path = here.removeprefix("source/").removesuffix("/index.md") + "/x" if here.startswith("source/") else None
    path = path or repository_path(page.file)

    def replace(match: re.Match) -> str:
        target = match["target"]
        if not target or re.match(r"[a-z]+:|#", target):
            return match[0]
        file, _, anchor = target.partition("#")
        in_repository = os.path.normpath(os.path.join(os.path.dirname(path), file))
        if not (ROOT / in_repository).exists():
            return match[0]
        there = os.path.relpath(site_path(in_repository), os.path.dirname(here) or ".")
        return f"{there}#{anchor}" if anchor else there

    return CODE_OR_LINK.sub(replace, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn of scripts, styles, fonts, pictures and frames from other hosts, which a browser fetches by itself."""
    fetched = re.findall(
        r"<(?:script|img|iframe|source|video|audio)\b[^>]*?\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)", output
    )
    for link in re.findall(r"<link\b[^>]*>", output):
        if re.search(r"rel=[\"']?(stylesheet|preload|preconnect|icon|manifest)", link):
            fetched += re.findall(r"href=[\"']?((?:https?:)?//[^\"'\s>]+)", link)
    for address in fetched:
        log.warning("%s fetches %s from another host", page.file.src_uri, address)
    return output
