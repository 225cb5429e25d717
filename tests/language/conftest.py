"""Skips a file of language tests where a package that it needs is not installed."""

import importlib.util
from pathlib import Path

import pytest

# Besides transformers and peft, which all need.
FURTHER = {
    "test_evaluation": ("lm_eval",),
    "test_finetuning": ("datasets",),
    "test_instructions": ("datasets",),
    "test_language_demo": ("lm_eval",),
}


class SkippedModule(pytest.Module):
    """A file of tests whose imports would fail."""

    missing: list[str]

    def collect(self):
        pytest.skip(f"needs {', '.join(self.missing)}: pip install '.[language]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    packages = ("transformers", "peft", *FURTHER.get(module_path.stem, ()))
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    module = SkippedModule.from_parent(parent, path=module_path)
    module.missing = missing
    return module
