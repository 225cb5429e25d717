"""Small data sets made from images that packages contain: the dependencies, and for emoji (`emoji.py`) those of npm."""

from .digits import export_digits

__all__ = ["export_digits"]
