"""Hashes of what files hold, kept over runs while the files cannot have changed.

A change of a file's bytes, its name or its place sets the time of its inode's last change (ctime) to now, which no
program can set back, as it can the time of modification. So an equal place, inode, size, mtime and ctime mean equal
bytes, but for a change in the same tick of the clock, or through a memory map whose pages were not yet written back.
Both are ruled out by an age: hashes are kept only of files whose ctime is `MIN_AGE_NS` old when they are read, and only
on file systems that keep a ctime.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import time_ns as now

from ensdistill.data.image_files import parallel_map
from ensdistill.data.sources.base import readable
from ensdistill.runtime.environment import usable_cores
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write, cache_folder

MIN_AGE_NS = 60 * 10**9
KEEP_CTIME = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "nfs", "nfs4", "lustre", "ceph", "gpfs"}
)
"""File systems that set the ctime of an inode at every change."""


def content_hash(files: Sequence[tuple[str, Path]]) -> str:
    """Hash names and bytes of files, in order; a name stands for what the file is, such as train/cat/1.png.

    Raises:
        UserError: a file cannot be read.
    """

    def compute() -> str:
        digest = hashlib.sha256()
        threads = usable_cores()
        for (name, _), value in zip(files, parallel_map(_sha256, [path for _, path in files], threads), strict=True):
            digest.update(f"{len(os.fsencode(name))}:".encode() + os.fsencode(name) + bytes.fromhex(value))
        return digest.hexdigest()

    return _kept(files, compute)


def hash_named(files: Sequence[Path]) -> str:
    """Hash files of which each has a name of its own (`content_hash`)."""
    return content_hash([(file.name, file) for file in files])


def file_hash(path: Path) -> str:
    """Return sha256 of a file, as `sha256sum` does.

    Raises:
        UserError: it cannot be read.
    """
    return _kept([("sha256", path)], lambda: _sha256(path))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{readable(path)}: cannot be read ({error.strerror}); expected a file that you may read"
        ) from error


def _kept(files: Sequence[tuple[str, Path]], compute: Callable[[], str]) -> str:
    """Return what was computed before for these very files, or compute it and keep it where that is sound."""
    start = now()
    state, newest = _state(files)
    place = cache_folder() / "contents" / state
    if _keep_ctime(files) and start - newest > MIN_AGE_NS:
        with contextlib.suppress(OSError, ValueError):
            kept = place.read_text(encoding="ascii")
            if len(bytes.fromhex(kept)) == hashlib.sha256().digest_size:
                return kept
        value = compute()
        if _state(files)[0] == state:
            with contextlib.suppress(OSError, UserError), atomic_write(place) as temporary:
                temporary.write_text(value, encoding="ascii")
        return value
    return compute()


def _state(files: Sequence[tuple[str, Path]]) -> tuple[str, int]:
    """Hash the files' places, inodes, sizes and times, and return it with the latest ctime in nanoseconds."""
    digest, newest = hashlib.sha256(os.fsencode(os.getcwd())), 0
    for name, path in files:  # strings, since there may be a million
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(
                f"{readable(path)}: cannot be read ({error.strerror}); expected a file that you may read"
            ) from error
        numbers = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        digest.update(os.fsencode(f"{name}\0{path}\0{numbers}\n"))
        newest = max(newest, stat.st_ctime_ns)
    return digest.hexdigest(), newest


def _keep_ctime(files: Sequence[tuple[str, Path]]) -> bool:
    """Tell whether all files lie on file systems that keep a ctime."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    kind_of = {fields[1].replace("\\040", " "): fields[2] for fields in (line.split(" ") for line in lines)}
    folders = {os.path.dirname(path) for _, path in files} | {path for _, path in files if os.path.islink(path)}
    for folder in map(os.path.realpath, folders):
        mount = next(place for place in map(str, (Path(folder), *Path(folder).parents)) if place in kind_of)
        if kind_of[mount] not in KEEP_CTIME:
            return False
    return True
