"""Small data sets made from images that the dependencies contain: nothing is downloaded."""

from .digits import export_digits

__all__ = ["export_digits"]
