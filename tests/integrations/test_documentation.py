"""The examples of docs/integrations.md run as they stand, each in a Python of its own."""

from pathlib import Path

import pytest
from documentation_helpers import examples, missing_packages, packages, run_example
from training_helpers import ROOT

EXAMPLES = examples(ROOT / "docs" / "integrations.md")


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: "-".join(sorted(packages(code) - {"torch", "timm"})))
def test_example(code: str, tmp_path: Path) -> None:
    missing = missing_packages(code)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make test-integrations")
    result = run_example(code, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "False" not in result.stdout
