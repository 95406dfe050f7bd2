"""Files that are either whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ensdistill.runtime.errors import FULL_DISK, UserError


def cache_folder() -> Path:
    """Return `$ENSDISTILL_CACHE`, by default `ensdistill` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("ENSDISTILL_CACHE"):
        return Path(os.path.expanduser(own))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "ensdistill"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`, on failure deleted.

    Raises:
        UserError: the folder cannot be written, or the disk is full. `path` is then as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a lost machine
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise UserError(f"{path}: no space left on the disk; free some, or choose another folder") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); choose a folder you may write to"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


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
