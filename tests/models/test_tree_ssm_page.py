"""The examples of docs/tree-ssm.md run as they stand, with the compiled operations and without them."""

import shutil
from pathlib import Path

import pytest
from documentation_helpers import examples, run_example
from training_helpers import ROOT

import grootvl_ops

EXAMPLES = examples(ROOT / "docs" / "tree-ssm.md")
CHECKS = """
if "y" in globals(): assert y.isfinite().all()
if "mix" in globals(): assert mix.grad.abs() > 0
"""


@pytest.mark.parametrize("operations", ["as installed", "reference"])
def test_examples(operations: str, tmp_path: Path) -> None:
    """All of them in one Python, each with its own names."""
    if operations == "as installed":
        operations = grootvl_ops.backend("cpu")
    else:
        installed = Path(grootvl_ops.__file__).parent
        shutil.copytree(installed, tmp_path / "grootvl_ops", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    code = "".join(f"exec({example + CHECKS!r}, {{}})\n" for example in EXAMPLES)
    result = run_example(code, tmp_path, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == operations
    assert ("runs its slow reference" in result.stderr) == (operations == "reference")
