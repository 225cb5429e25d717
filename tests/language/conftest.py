"""Skips the language tests where transformers is not installed."""

import importlib.util
from pathlib import Path

import pytest

MISSING = [name for name in ("transformers", "peft", "lm_eval", "datasets") if importlib.util.find_spec(name) is None]


class SkippedModule(pytest.Module):
    """A file of tests whose imports would fail."""

    def collect(self):
        pytest.skip(f"needs {', '.join(MISSING)}: pip install '.[language]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return SkippedModule.from_parent(parent, path=module_path) if MISSING else None
