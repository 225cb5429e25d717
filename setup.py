"""Installs grootv; its metadata is in pyproject.toml.

The compiled operations, grootvl_ops, are a distribution of their own in ops/: `pip install ./ops .` installs both.
"""

from setuptools import setup

setup()
