"""Small data sets that the project makes for itself, from what its dependencies carry: nothing is downloaded."""

from .digits import export_digits

__all__ = ["export_digits"]
