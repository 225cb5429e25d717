"""Fetches weights that the authors of the models released, and checks them.

    python -m grootv.weights grootv_tiny

The file is stored in the folder `checkpoints`, where the configs look for it. A file beside it records its SHA-256. A
broken transfer is continued, also by the next run. A file appears under its name only when it is complete, readable,
and fits the model. A good file that is already there is kept.
"""

import argparse
import contextlib
import fcntl
import hashlib
import inspect
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm

from .models.checkpoint import unwrap
from .models.released import FOLDER, RELEASES, Release
from .models.safe_loading import CheckpointError, read_checkpoint

__all__ = ["FetchError", "Weights", "check", "fetch"]

_INSTALL_COMMAND = 'pip install "grootv[weights]"'
_TIMEOUT = 60  # seconds without a byte
_RETRIES = 3


class FetchError(RuntimeError):
    """A file could not be fetched or is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Weights:
    """A file of released weights.

    Args:
        path: Where it is.
        release: Where it comes from.
        sha256: The SHA-256 of its bytes, as 64 hexadecimal digits.
        size: Its length in bytes.
        fetched: Whether it was fetched now; False if it was already there.
    """

    path: Path
    release: Release
    sha256: str
    size: int
    fetched: bool


def fetch(name: str, folder: str | Path = FOLDER) -> Weights:
    """Fetch the released weights of a model, unless they are already there.

    The SHA-256 is recorded in a file beside the weights, in the format of `sha256sum`. A file of another SHA-256 is
    refused as long as this record is there.

    Args:
        name: A model of timm's registry, one of `grootv.models.released.RELEASES`.
        folder: Where to store the file; it is made if it does not exist.

    Raises:
        ValueError: no weights of this name are released.
        ImportError: gdown is not installed, or is too old.
        FetchError: the source cannot be reached or gives something else, another file is there already, or another
            process is fetching it. The message says what to do. The bytes of a broken transfer stay for the next call.
        OSError: the folder cannot be written.
    """
    if name not in RELEASES:
        raise ValueError(f"name must be one of {list(RELEASES)}, got {name!r}")
    release = RELEASES[name]
    target = Path(folder) / release.file
    record = target.with_name(f"{target.name}.sha256")
    recorded = record.read_text().partition(" ")[0] if record.is_file() else None

    if target.exists():
        digest = _sha256(target)
        if recorded is None:
            try:
                check(target, name)
            except ValueError as error:
                raise FetchError(
                    f"{target} exists, but {error}. Remove or rename it, and run this command again."
                ) from error
            _write_record(record, digest, target.name)
        elif digest != recorded:
            raise FetchError(
                f"{target} has changed since its SHA-256 was recorded: it is {digest}, {record} says {recorded}. "
                f"Remove {target} to fetch it again. If the change is yours, remove {record}."
            )
        return Weights(target, release, digest, target.stat().st_size, fetched=False)

    by_hand = (
        f"To get it by hand, open {release.url} in a browser, save the file as {target}, and run this command again: "
        "it then checks the file."
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with _partial_folder(target) as partial:
        try:
            fetched = _fetch_intact(name, release, partial)
        except ValueError as error:
            raise FetchError(f"{release.url} does not give the weights of {name}: {error}. {by_hand}") from error
        except _TransferError as error:
            again = "Run this command again to continue the transfer. " if _received(partial) else ""
            raise FetchError(f"{release.url} could not be fetched: {error}. {again}{by_hand}") from error
        digest = _sha256(fetched)
        if recorded not in (None, digest):
            fetched.unlink()
            raise FetchError(
                f"The file at {release.url} has changed: its SHA-256 is {digest}, {record} says {recorded}. "
                f"Find out why before you use it. To accept the new file, remove {record} and run this command again."
            )
        size = fetched.stat().st_size
        _write_record(record, digest, target.name)
        os.replace(fetched, target)
    return Weights(target, release, digest, size, fetched=True)


def check(path: Path, name: str) -> None:
    """Check that a file is complete, can be read without running code from it, and fits a model.

    Args:
        path: The file.
        name: A model of timm's registry.

    Raises:
        ValueError: it is not from `torch.save`, is damaged, holds objects that are not plain data, or has other
            parameters than the model.
    """
    try:
        content = read_checkpoint(path)
    except CheckpointError as error:
        raise ValueError(error.reason) from error
    weights = unwrap(content)
    if not weights:
        raise ValueError("it holds no state dict")
    try:
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights})
    except RuntimeError as error:
        raise ValueError(_one_line(error)) from error


class _TransferError(Exception):
    """A transfer did not come to its end.

    Args:
        message: Why.
        refused: Whether the reason is the source's answer to a request for bytes, and not the connection.
    """

    def __init__(self, message: str, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


@contextlib.contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, of this process alone, for what was received; it stays as long as there is some."""
    partial = target.with_name(f".{target.name}.part")
    partial.mkdir(exist_ok=True)
    with (partial / "lock").open("w") as lock:
        # On file systems without locks, the checks still refuse what two processes have mixed up.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FetchError(f"Another process is fetching {target}. Wait until it has ended.") from None
        try:
            yield partial
        finally:
            if not _received(partial):
                shutil.rmtree(partial)


def _received(partial: Path) -> int:
    """How many bytes of a broken transfer the folder holds."""
    return sum(path.stat().st_size for path in partial.glob("*.part"))


def _fetch_intact(name: str, release: Release, partial: Path) -> Path:
    """Fetch the file into `partial` and check it."""
    received = _received(partial)
    try:
        return _fetch_once(name, release, partial)
    except (_TransferError, ValueError) as error:
        useless = isinstance(error, ValueError) or (error.refused and _received(partial) == received)
        if not (received and useless):
            raise
    # The source does not continue an earlier transfer, or has another file by now.
    for path in partial.glob("*.part"):
        path.unlink()
    return _fetch_once(name, release, partial)


def _fetch_once(name: str, release: Release, partial: Path) -> Path:
    fetched = partial / release.file
    _download(release.url, fetched)
    try:
        check(fetched, name)
    except ValueError:
        fetched.unlink()
        raise
    shutil.copymode(partial / "lock", fetched)  # gdown's files can be read by their owner alone
    with fetched.open("rb+") as file:
        os.fsync(file.fileno())
    return fetched


def _download(url: str, path: Path) -> None:
    """Fetch `url` by gdown, which knows Google Drive's pages, and continue what an earlier transfer left."""
    try:
        import gdown
    except ImportError as error:
        raise ImportError(f"fetching weights needs gdown: pip install gdown, or {_INSTALL_COMMAND}") from error
    if "retries" not in inspect.signature(gdown.download).parameters:
        raise ImportError(
            f"fetching weights needs gdown 6.3 or later: pip install --upgrade gdown, or {_INSTALL_COMMAND}"
        )
    try:
        gdown.download(url, str(path), use_cookies=False, resume=True, timeout=_TIMEOUT, retries=_RETRIES)
    except gdown.exceptions.FileURLRetrievalError as error:
        # Its message repeats the address; the page's own words are in the error that it was made from.
        reason = _one_line(error.__context__ or error)
        raise _TransferError(f"Google Drive answers with a page instead of the file: {reason}", False) from error
    except gdown.exceptions.DownloadError as error:
        # What follows the first line names the file of the bytes received.
        raise _TransferError(str(error).splitlines()[0].rstrip("."), refused=error.__cause__ is None) from error
    except OSError as error:
        if error.errno is not None:  # of the disk; those of the network have none
            raise
        raise _TransferError(_one_line(error), False) from error
    except (AssertionError, AttributeError, LookupError, ValueError) as error:
        # gdown reads pages that may change at any time.
        raise _TransferError(f"gdown does not understand the source's answer ({error!r})", False) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _write_record(record: Path, digest: str, name: str) -> None:
    temporary = record.with_name(f".{record.name}.{os.getpid()}")
    try:
        temporary.write_text(f"{digest}  {name}\n")
        os.replace(temporary, record)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 if all files are there, 1 if one could not be fetched."""
    parser = argparse.ArgumentParser(
        prog="python -m grootv.weights", description="Fetch weights that the authors of the models released."
    )
    parser.add_argument("names", nargs="+", choices=RELEASES, metavar="NAME", help=f"one of {', '.join(RELEASES)}")
    parser.add_argument("--folder", default=FOLDER, help="where to store the files (default: %(default)s)")
    args = parser.parse_args(arguments)
    failed = False
    for name in args.names:
        try:
            weights = fetch(name, args.folder)
        except (FetchError, ImportError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{weights.path}: {weights.size:,} bytes, {'fetched' if weights.fetched else 'already there'}")
        print(f"  source   {weights.release.url}, of the authors of {weights.release.family}")
        print(f"  SHA-256  {weights.sha256}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
