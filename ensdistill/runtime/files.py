"""Files that are either whole or absent: written under a temporary name, synced, renamed. Folders with one writer."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ensdistill.runtime.errors import UserError, disk_refusal


def cache_folder() -> Path:
    """Return `$ENSDISTILL_CACHE`, by default `ensdistill` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("ENSDISTILL_CACHE"):
        return Path(os.path.expanduser(own))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "ensdistill"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the disk refuses within into one line that names `path`.

    Raises:
        UserError: `path` cannot be written: the disk is full, or has failed, or the place is not one to write to.
        OSError: of another file, which it names, or of no disk.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not _is_on_the_way(Path(os.fsdecode(error.filename)), Path(path)):
            raise
        if (refusal := disk_refusal(error)) is None:
            raise
        raise UserError(f"{path}: {refusal}") from error


def _is_on_the_way(found: Path, path: Path) -> bool:
    """Tell whether `found` is `path`, a temporary file beside it, or one of the folders above it."""
    return found == path or found in path.parents or (found.parent == path.parent and _is_temporary(found.name))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`, on failure deleted.

    What processes that were killed while they wrote into the folder have left is deleted too.

    Raises:
        UserError: as `writing`. `path` is then as it was before.
        OSError: as `writing`.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(path.parent)
        temporary, descriptor = _make_temporary(path)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)  # the rename itself must survive a lost machine
        finally:
            with suppress(OSError):  # a disk that has become read-only: the error that says so is on its way
                temporary.unlink(missing_ok=True)
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)
"""Names that `_make_temporary` gives."""


def _make_temporary(path: Path) -> tuple[Path, int]:
    """Create an empty file beside `path`, and a descriptor that locks it: whoever finds it unlocked may delete it."""
    while True:
        # no process number: two containers that share a folder may have the same
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(descriptor)
        with suppress(OSError):
            if os.path.samestat(os.stat(temporary), os.fstat(descriptor)):
                return temporary, descriptor
        os.close(descriptor)  # another process found it before it was locked


def delete_leftovers(folder: Path, pattern: str = "") -> None:
    """Delete the temporary files in `folder` whose processes have ended: no one else would, where nothing is rewritten.

    Args:
        pattern: the folders below it that are meant instead, as for `Path.glob`: `**/`.
    """
    for leftover in folder.glob(f"{pattern}.*.tmp"):
        if not _is_temporary(leftover.name):
            continue  # somebody else's
        with suppress(OSError):
            descriptor = os.open(leftover, os.O_RDWR)
            try:
                if _lock(descriptor):
                    leftover.unlink()
            finally:
                os.close(descriptor)


def _is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None


def _lock(descriptor: int) -> bool | None:
    """Lock an open file until all its descriptors are closed, at the latest by the end of the process.

    Returns:
        False where another process has locked it; None where its file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class FolderLock:
    """The right to write into a folder, from `lock_folder`: until it is let go of, or the process ends, however."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self.is_held = False
        """False where the file system knows no locks."""

    def close(self) -> None:
        """Let go of the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    __del__ = close


_locks: WeakValueDictionary[tuple[int, int], FolderLock] = WeakValueDictionary()


def lock_folder(folder: Path) -> FolderLock:
    """Lock `folder`, which is made if need be, by a file `.lock` in it; a process may do so repeatedly.

    Raises:
        UserError: another process has locked it, or it cannot be written.
    """
    place = folder / ".lock"
    with writing(place):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    lock, stat = FolderLock(descriptor), os.fstat(descriptor)
    if (ours := _locks.get((stat.st_dev, stat.st_ino))) is not None:
        return ours
    found = _lock(descriptor)
    if found is False:
        owner = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
        raise UserError(
            f"{folder}: another run is at work in this folder{f' ({owner})' if owner else ''}; wait until it ends, "
            "stop it, or choose another --out"
        )
    lock.is_held = found is True
    with suppress(OSError):  # a full disk: the lock holds without saying whose it is
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _locks[stat.st_dev, stat.st_ino] = lock
    return lock


def _let_go_in_child() -> None:
    """Close the copies that a forked process has: it may outlive the one whose locks they are."""
    for lock in list(_locks.values()):
        lock.close()
    _locks.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def parse_json(content: str | bytes) -> Any:
    """Parse JSON as programs write it, in UTF-8; every mistake in it is a `ValueError`.

    Python's own reader raises a `RecursionError` where lists lie too deep in each other, and takes halves of
    characters, which cannot be written or printed afterwards.

    Raises:
        ValueError: it is no JSON, nested too deep, or holds text that is none.
    """
    text = content.decode() if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
        if "\\u" in text or not text.isascii():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def read_json(path: Path) -> Any:
    """Read a file as `parse_json` does.

    Raises:
        ValueError: as there.
        OSError: it cannot be read.
    """
    return parse_json(path.read_bytes())


DIGEST_KEY = "sha256"


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add a hash of JSON values to them, under `DIGEST_KEY`: a file that is written so shows every change."""
    return {**values, DIGEST_KEY: _digest(values)}


def require_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Take the hash out of what `with_digest` made; files of earlier versions have none.

    Raises:
        ValueError: the values are not those that were hashed.
    """
    rest = {name: value for name, value in values.items() if name != DIGEST_KEY}
    if DIGEST_KEY in values and values[DIGEST_KEY] != _digest(rest):
        raise ValueError(f"its content is not what its {DIGEST_KEY} says")
    return rest


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def damaged_part(path: str | Path) -> str | None:
    """Name the first part of a zip archive whose bytes are not those that were written; None where all are.

    `torch.save` writes a CRC-32 for every part, and `torch.load` does not look at it. An archive in which no part fits
    was written without them (`torch.serialization.set_crc32_options(False)`).

    Raises:
        Exception: of many kinds; the archive's own tables are damaged.
    """
    with zipfile.ZipFile(path) as archive:
        names = [part.filename for part in archive.infolist() if part.file_size]
        damaged = [name for name in names if not _fits(archive, name)]
    return damaged[0] if damaged and len(damaged) < len(names) else None


def _fits(archive: zipfile.ZipFile, name: str) -> bool:
    with archive.open(name) as part:
        try:
            while part.read(1 << 20):
                pass
        except zipfile.BadZipFile:
            return False
    return True
