"""What the pages of the repository show: the Python runs, the commands exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from documentation_helpers import PAGES, blocks, examples, missing_packages, run_example
from training_helpers import ROOT

# Pages whose examples have a test of their own: tests/models/test_tree_ssm_page.py and so on.
ELSEWHERE = {"tree-ssm.md", "integrations.md", "add-a-scan.md"}
RUN_HERE = [page for page in PAGES if page.name not in ELSEWHERE and examples(page)]


def test_the_pages_are_found() -> None:
    assert {"README.md", "faq.md", "quick-start.md", "from-vmamba-or-swin.md"} <= {page.name for page in RUN_HERE}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} >= ELSEWHERE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_says_what_it_is(page: Path) -> None:
    """A block without language would neither run nor be missed."""
    unknown = [block.code for block in blocks(page) if block.language not in ("", "python", "bash", "diff", "text")]
    assert not unknown
    assert not [block.code for block in blocks(page, "") if re.search(r"^(import|from) \w+", block.code, re.MULTILINE)]
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a block that begins or ends within a line"


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.name)
def test_python_runs_as_it_stands(page: Path, tmp_path: Path) -> None:
    """All examples of a page in one Python, each with names of its own."""
    runs = [code for code in examples(page) if not missing_packages(code)]
    if not runs:
        pytest.skip(f"needs {', '.join(missing_packages(''.join(examples(page))))}")
    result = run_example("".join(f"exec({code!r}, {{}})\n" for code in runs), tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


def commands(page: Path) -> list[list[str]]:
    """The words of the commands on a page, without comments."""
    lines = "\n".join(block.code for block in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def options_of(script: Path) -> str:
    """Source that names the options of a script, with what the tools share."""
    texts = [script, ROOT / "grootv/openmmlab/runtime/command_line.py", ROOT / "benchmarks/report.py"]
    passes_on = {"dist_train.sh": "train.py", "dist_test.sh": "test.py", "slurm_train.sh": "train.py"}
    if script.name in passes_on:
        texts.append(ROOT / "tools" / passes_on[script.name])
    return "".join(text.read_text() for text in texts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    """Targets of make, scripts and modules with their options, configs, and the extras of the distribution."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for words in commands(page):
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        for i, word in enumerate(words):
            if re.fullmatch(r"(tools|benchmarks)/\w+\.(py|sh)", word):
                assert (ROOT / word).is_file(), words
                source = options_of(ROOT / word)
                missing = [option for option in words[i + 1 :] if option.startswith("--") and option not in source]
                assert not missing, (words, missing)
            if re.fullmatch(r"configs/\S+\.py|tests/\S+\.py", word) and "snake" not in word:
                assert (ROOT / word).is_file(), words
            if word == "-m" and words[0].endswith("python"):
                assert importlib.util.find_spec(words[i + 1]) is not None, words
            for names in re.findall(r"^\.\[([\w,]+)\]$", word):
                assert set(names.split(",")) <= set(extras), words


def test_the_change_of_a_config_builds(tmp_path: Path) -> None:
    """The config of from-vmamba-or-swin.md over mmdetection's for Swin-T is a detector with GrootV."""
    pytest.importorskip("mmdet")
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    (code,) = (code for code in examples(ROOT / "docs/from-vmamba-or-swin.md") if "_base_" in code)
    (tmp_path / "config.py").write_text(code)
    config = Config.fromfile(tmp_path / "config.py")
    assert config.optim_wrapper.optimizer.lr == 1e-4 and "custom_keys" not in config.optim_wrapper.paramwise_cfg
    init_default_scope("mmdet")
    config.model.backbone.init_cfg = None
    with torch.device("meta"):
        detector = MODELS.build(config.model)
    assert type(detector.backbone).__name__ == "GrootV"
    assert tuple(config.model.neck.in_channels) == tuple(detector.backbone.out_channels)
