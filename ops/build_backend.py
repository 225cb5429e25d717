"""The build backend: that of setuptools, which needs PyTorch's headers only where none are installed."""

import importlib.machinery
import shutil
import sysconfig

from setuptools.build_meta import *  # noqa: F403

HEADERS = "torch>=2.10"


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    installed = importlib.machinery.PathFinder.find_spec("torch", [sysconfig.get_path("purelib")])
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
    return [] if installed or not compiler else [HEADERS]


get_requires_for_build_editable = get_requires_for_build_wheel
