"""Skips the language tests where transformers is not installed."""

import importlib.util

REASON = "needs transformers: pip install 'grootv[language]'"

collect_ignore_glob = []
if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    return f"tests/language: skipped, {REASON}" if collect_ignore_glob else None
