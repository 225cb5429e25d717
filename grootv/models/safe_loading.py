"""Reads checkpoints and pickles as data: no code from a file runs, and a damaged file is an error that names it.

Every part of this project that reads a checkpoint calls `read_checkpoint`, and `guard_timm` puts it before timm's own
loading. Besides tensors and Python's containers, files may hold NumPy's numbers and arrays, the configuration of yacs
that published training scripts store, and the logged scalars of mmengine. They become plain data: none of these
packages' classes is made.
"""

import argparse
import codecs
import functools
import inspect
import io
import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import timm.models
import torch
import torch._utils

__all__ = [
    "TRUST_VARIABLE",
    "CheckpointError",
    "DamagedCheckpointError",
    "guard_timm",
    "read_checkpoint",
    "read_pickle",
    "trusts_files",
]

_logger = logging.getLogger(__name__)

TRUST_VARIABLE = "GROOTV_TRUST_FILES"
_NOT_DATA = (
    "which is not plain data and may run any code. "
    f"If you trust whoever made the file as you trust a program that you run, set the environment variable "
    f"{TRUST_VARIABLE}=1, or pass --trust-checkpoint to tools/train.py or tools/test.py"
)
_ZIP = b"PK\x03\x04"
# How files of PyTorch before 1.6 begin: a pickle of a fixed number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used.

    Args:
        path: The file.
        reason: Why, as a sentence about "it".
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"checkpoint {path} cannot be used: {reason}")
        self.reason = reason

    def __reduce__(self) -> tuple:
        return RuntimeError, self.args


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete or damaged, or no file that `torch.save` writes by default."""


def trusts_files() -> bool:
    """Whether the user has declared by `TRUST_VARIABLE` that all files may run code."""
    return os.environ.get(TRUST_VARIABLE, "0").lower() not in ("", "0", "false", "no")


def read_checkpoint(path: str | Path, map_location: Any = "cpu", file: BinaryIO | None = None) -> dict[str, Any]:
    """What a file of `torch.save` holds, read as data after a check of its checksums.

    NumPy's numbers become Python's. A configuration of yacs becomes an OrderedDict, with or without yacs. mmengine's
    histories of scalars become dicts of `log_history`, `count_history` and `max_length`.

    Files of PyTorch before 1.6 have no checksums; that is logged.

    Args:
        path: The file; `~` stands for the home folder.
        map_location: As of `torch.load`.
        file: The open file, if `path` is but its name.

    Raises:
        FileNotFoundError: it does not exist.
        DamagedCheckpointError: it is incomplete or damaged, or is no file of `torch.save`.
        CheckpointError: it is a folder, holds something other than a dict, or holds objects that are not plain data and
            `TRUST_VARIABLE` is not set.
    """
    if file is None:
        path = Path(path).expanduser()
        _require_file(path)
        # One open file from the check to the end: another process may replace the file.
        with path.open("rb") as opened:
            return read_checkpoint(path, map_location, opened)
    try:
        _require_intact(file, path)
    except (ValueError, OSError) as error:
        raise DamagedCheckpointError(path, _one_line(error)) from error
    try:
        content = _load(file, path, map_location)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # what wrong content raises depends on the content
        refused = re.search(r"GLOBAL (\S+)", str(error))  # torch's message goes on to tell how to allow it
        if refused:
            raise CheckpointError(path, f"it refers to {refused[1]}, {_NOT_DATA}") from error
        reason = f"it cannot be read as plain data ({type(error).__name__}: {_one_line(error)})"
        raise DamagedCheckpointError(path, reason) from error
    if not isinstance(content, dict):
        raise CheckpointError(path, f"it holds {_kind(content)} instead of a dict of weights")
    return content


def read_pickle(file: BinaryIO, name: str | Path | None = None) -> Any:
    """What a pickle of annotations, class names or results holds, read as data like a checkpoint.

    Args:
        file: The open file.
        name: What messages call it; None takes the name of `file`.

    Raises:
        pickle.UnpicklingError: it is damaged, or holds objects that are not plain data and `TRUST_VARIABLE` is not set.
    """
    called = name or getattr(file, "name", "the pickle")
    if trusts_files():
        _warn_of_trust(called)
        return pickle.load(file)
    try:
        return _plain(_Unpickler(file).load(), {})
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise pickle.UnpicklingError(f"{called} cannot be used: {_one_line(error)}") from error


def guard_timm() -> None:
    """Make timm read checkpoints by `read_checkpoint`.

    Newer releases of timm read them as data by themselves; for those before 1.0.26 this makes it the default. It adds
    the check of the checksums, the name of the file in every message, and the plain data of `read_checkpoint`, for all
    models of timm in this process. Files of safetensors and calls with `weights_only=False` stay timm's.
    """
    helpers: Any = timm.models._helpers
    hub: Any = timm.models._hub
    if getattr(helpers.load_state_dict, "is_guard", False):
        return
    own_load = hasattr(helpers, "_torch_load")  # earlier releases call torch.load
    unguarded_load: Callable[..., Any] = helpers._torch_load if own_load else torch.load
    unguarded_state_dict: Callable[..., Any] = helpers.load_state_dict
    unguarded_from_url: Callable[..., Any] = timm.models._builder.load_state_dict_from_url

    @functools.wraps(unguarded_load)
    def torch_load(checkpoint_path: Any, map_location: Any = "cpu", weights_only: bool = True, **kwargs: Any) -> Any:
        if weights_only and isinstance(checkpoint_path, str | os.PathLike):
            return read_checkpoint(Path(checkpoint_path), map_location)
        return unguarded_load(checkpoint_path, map_location=map_location, weights_only=weights_only, **kwargs)

    @functools.wraps(unguarded_state_dict)
    def load_state_dict(checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        _require_file(Path(checkpoint_path))  # timm's own error has no message
        return unguarded_state_dict(checkpoint_path, *args, **kwargs)

    @functools.wraps(unguarded_from_url)
    def load_state_dict_from_url(
        url: str,
        model_dir: str | Path | None = None,
        map_location: Any = None,
        progress: bool = True,
        check_hash: bool = False,
        weights_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not weights_only or kwargs:
            options = {"weights_only": weights_only, **kwargs}
            return unguarded_from_url(url, model_dir, map_location, progress, check_hash, **options)
        # Early releases know no cache_dir. They take a TypeError for a sign of an old PyTorch, and read as code.
        folder = {} if model_dir is None else {"cache_dir": model_dir}
        return read_checkpoint(hub.download_cached_file(url, check_hash, progress, **folder), map_location)

    load_state_dict.__dict__["is_guard"] = True
    if not own_load:
        for module in (helpers, hub):
            module.torch = _TorchWithLoad(torch_load)
        for function in (
            unguarded_state_dict,
            timm.models.load_checkpoint,
            hub.load_state_dict_from_hf,
            getattr(hub, "load_state_dict_from_path", unguarded_state_dict),
        ):
            defaults = inspect.signature(function).parameters.values()
            function.__defaults__ = tuple(
                True if parameter.name == "weights_only" else parameter.default
                for parameter in defaults
                if parameter.default is not parameter.empty
            )
    # The modules import these functions from one another by name.
    for module in (helpers, timm.models._builder, hub, timm.models):
        for function in (torch_load, load_state_dict, load_state_dict_from_url):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)


class _TorchWithLoad:
    """The module `torch` with another `load`, for modules that read checkpoints by `torch.load`."""

    def __init__(self, load: Callable) -> None:
        self.load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(path, "it is a folder, not a file")
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not path.is_file():
        raise CheckpointError(path, "it is not a regular file")


def _require_intact(file: BinaryIO, name: str | Path) -> None:
    """Raise ValueError unless the file is an archive of `torch.save` whose checksums are right, or an old file."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    beginning = file.read(1024)
    file.seek(0)
    if beginning.startswith(_LEGACY):
        _logger.info("%s has the format of PyTorch before 1.6, without checksums: damage is not noticed", name)
        return
    if not beginning:
        raise ValueError("it is empty")
    if beginning.lstrip().startswith(b"<"):
        raise ValueError("it is a web page, not a checkpoint")
    if not beginning.startswith(_ZIP):
        raise ValueError(f"it is damaged, or no file of torch.save ({size} bytes that begin with {beginning[:16]!r})")
    # torch.load does not compare the checksums of the records.
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            # The checksums do not cover the archive's directory, where one wrong bit marks a record as a folder.
            folders = [record.filename for record in archive.infolist() if record.external_attr & 0x10]
    except Exception as error:  # what a wrong byte in the structure raises depends on the byte
        raise ValueError(f"it is incomplete or damaged ({size} bytes: {_one_line(error)})") from error
    if damaged is not None:
        raise ValueError(f"it is damaged: the checksum of its record {damaged} is wrong")
    if folders:
        raise ValueError(f"it is damaged: its record {folders[0]} is marked as a folder")
    file.seek(0)


def _load(file: BinaryIO, path: str | Path, map_location: Any) -> Any:
    if trusts_files():
        _warn_of_trust(path)
        return torch.load(file, map_location=map_location, weights_only=False)
    plain_data = [(function, name) for name, function in _PLAIN_DATA.items()]
    # timm's training script stores its arguments.
    with torch.serialization.safe_globals([*plain_data, argparse.Namespace]):
        content = torch.load(file, map_location=map_location, weights_only=True)
    return _plain(content, {})


def _warn_of_trust(name: str | Path) -> None:
    _logger.warning("%s=%s: loading %s may run code from it", TRUST_VARIABLE, os.environ[TRUST_VARIABLE], name)


def _kind(content: Any) -> str:
    name = type(content).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


class _DType:
    """Stands for NumPy's dtype of numbers or strings while a file is read."""

    def __init__(self, name: str, align: bool = False, copy: bool = True) -> None:
        if not re.fullmatch(r"\?|[biufcSU]\d{1,6}", name):
            raise pickle.UnpicklingError(f"NumPy's type {name!r} is not plain data")
        self.value = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in (">", "<"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands for NumPy's array while a file is read."""

    def __init__(self) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


class _History:
    """Stands for mmengine's HistoryBuffer while a file is read."""

    state: dict[str, Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


def _array(data: bytes, dtype: _DType, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("NumPy's array has no type")
    return np.frombuffer(data, dtype.value).reshape(shape, order=order).copy(order)


def _from_buffer(data: bytes, dtype: _DType, shape: tuple[int, ...], order: Literal["C", "F"]) -> _Array:
    array = _Array()
    array.value = _array(data, dtype, shape, order)
    return array


def _empty_array(kind: type, shape: tuple[int, ...], typecode: bytes) -> _Array:
    return _Array()


def _number(dtype: _DType, data: bytes) -> Any:
    return _array(data, dtype, (1,), "C")[0].item()


def _no_bytes() -> bytes:
    """In place of `bytes`, by which pickles store bytes of length zero."""
    return b""


def _no_method(owner: type, name: str) -> None:
    """In place of `getattr`, by which mmengine stores the names of HistoryBuffer's methods."""
    if owner is not _History:
        raise pickle.UnpicklingError(f"getattr is not plain data (GLOBAL getattr of {owner!r})")


def _storage(data: bytes) -> Any:
    """In place of the function by which pickles without `torch.save` hold the numbers of tensors."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# What else than tensors and Python's containers a file may name, and what stands for it.
_PLAIN_DATA: dict[str, Callable] = {
    "yacs.config.CfgNode": OrderedDict,
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    "builtins.bytes": _no_bytes,
    "builtins.getattr": _no_method,
    "mmengine.logging.history_buffer.HistoryBuffer": _History,
    **{  # NumPy 1 and 2 call the same functions by different names
        f"numpy.{core}.{function}": replacement
        for core in ("core", "_core")
        for function, replacement in (
            ("multiarray.scalar", _number),
            ("multiarray._reconstruct", _empty_array),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}
# What pickles that torch.save did not write may name in addition.
_PICKLED = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": codecs.encode,  # by which pickles of protocol 2 store bytes
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage._load_from_bytes": _storage,
    **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, bytearray, complex, slice)},
}


class _Function:
    """A function that a pickle can call, and whose attributes it cannot set."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _Unpickler(pickle.Unpickler):
    """Python's unpickler with the names of `_PLAIN_DATA` and `_PICKLED` alone."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("__builtin__.", "builtins.")
        found = _PLAIN_DATA.get(path) or _PICKLED.get(path)
        if found is None:
            raise pickle.UnpicklingError(f"it refers to {path}, {_NOT_DATA}")
        return found if isinstance(found, type) else _Function(found)


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """`value` with what stood for other classes replaced; `done` is by the ids of containers, which may be shared."""
    if isinstance(value, _Array | _DType):
        return value.value
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, _History):
        state = _plain(value.state, done)
        done[id(value)] = {
            "log_history": torch.from_numpy(state["_log_history"]),
            "count_history": torch.from_numpy(state["_count_history"]),
            "max_length": state["max_length"],
        }
        return done[id(value)]
    if isinstance(value, dict):
        done[id(value)] = value
        for key, item in value.items():
            value[key] = _plain(item, done)
    elif isinstance(value, list):
        done[id(value)] = value
        value[:] = [_plain(item, done) for item in value]
    elif type(value) is tuple:
        return tuple([_plain(item, done) for item in value])
    return value
