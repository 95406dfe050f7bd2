"""Listing of folders of image files: every file once, hidden ones left out, and an error for what cannot be read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ensdistill.data.dataset import DATASET_FILE
from ensdistill.data.sources.base import readable
from ensdistill.runtime.errors import UserError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
)
NO_IMAGES = frozenset({".txt", ".json", ".xml", ".csv", ".tsv", ".md", ".html", ".log", ".db", ".ini", ".yaml", ".yml"})
"""Endings of files that often lie among images and are none."""
LEFT_OUT = frozenset({"__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
"""Folders that operating systems and file servers make; like names that begin with a dot, they hold nobody's data."""


class Entries(NamedTuple):
    """Sorted names of what a folder holds."""

    folders: list[str]
    """Sub-folders, links to folders among them."""
    images: list[str]
    """Files with the ending of an image, links to files among them."""
    links: list[str]
    """Images that are links."""
    others: list[str]
    """Files with other endings."""


def list_folder(path: Path) -> Entries:
    """List a folder; hidden names, `LEFT_OUT` and files that are no images are left out.

    Raises:
        UserError: a folder that may not be read, a link to nothing, an image that is no regular file, a name that is
            not UTF-8.
    """
    entries = Entries([], [], [], [])
    try:
        with os.scandir(path) as found:
            for entry in sorted(found, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name in LEFT_OUT:
                    continue
                is_image = os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
                if entry.is_dir():
                    entries.folders.append(_checked(path, entry.name))
                elif entry.is_file():
                    if is_image:
                        entries.images.append(_checked(path, entry.name))
                        entries.links.extend([entry.name] if entry.is_symlink() else [])
                    else:
                        entries.others.append(entry.name)
                elif not os.path.exists(entry.path):
                    raise UserError(f"{readable(entry.path)}: a link to nothing; mend or remove it")
                elif is_image:
                    raise UserError(
                        f"{readable(entry.path)}: no regular file, but a pipe, socket or device; expected an image: "
                        "remove it"
                    )
    except OSError as error:
        place = readable(error.filename or path)
        raise UserError(
            f"{place}: cannot be read ({error.strerror}); expected folders and images that you may read"
        ) from error
    return entries


def _checked(folder: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{readable(folder)}: the name of {os.fsencode(name)!r} in it is not UTF-8; rename it"
        ) from None
    return name


def class_folders(path: Path) -> list[str]:
    """Names of a folder's sub-folders, sorted; hidden ones are left out, and data sets that were prepared in it."""
    folders = list_folder(path).folders if path.is_dir() else []
    return [name for name in folders if not (path / name / DATASET_FILE).is_file()]


def holds_images(path: Path) -> bool:
    """Tell whether an image lies in a folder or below it."""
    waiting, seen = [path], set()
    while waiting:
        folder = waiting.pop()
        stat = folder.stat()
        if (stat.st_dev, stat.st_ino) not in seen:  # a link may lead round for ever
            seen.add((stat.st_dev, stat.st_ino))
            entries = list_folder(folder)
            if entries.images:
                return True
            waiting += [folder / name for name in entries.folders]
    return False


class Walk:
    """Lists the images of one data set, folder by folder, and refuses to list any of them twice."""

    def __init__(self) -> None:
        self._place_of: dict[tuple[int, int], Path] = {}
        self._entries: dict[Path, Entries] = {}

    def images(self, path: Path) -> list[Path]:
        """List the image files below a folder, sorted by path.

        Raises:
            UserError: there is none, one that cannot be read, or a link to a folder that was listed already.
        """
        images = sorted(self._below(path))
        if not images:
            raise UserError(
                f"{path}: no image; expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}, or no such folder"
            )
        return images

    def _below(self, path: Path) -> list[Path]:
        entries = self._entries[path] = list_folder(path)
        stat = path.stat()
        other = self._place_of.setdefault((stat.st_dev, stat.st_ino), path)
        if other != path:
            raise UserError(
                f"{path}: the same folder as {other}, through a link; expected each image once: remove the link"
            )
        return [path / name for name in entries.images] + [
            image for name in entries.folders for image in self._below(path / name)
        ]

    def left_out(self) -> list[str]:
        """Say which files were left out that can be images, by their endings: one line or none."""
        endings = Counter(
            os.path.splitext(name)[1].lower() for entries in self._entries.values() for name in entries.others
        )
        unusual = {ending: num for ending, num in endings.most_common() if ending not in NO_IMAGES}
        if not unusual:
            return []
        found = ", ".join(f"{num:,} {ending or 'without an ending'}" for ending, num in list(unusual.items())[:4])
        return [f"files that have no ending of an image are left out: {found}"]

    def refuse_links_within(self) -> None:
        """Refuse a link to an image that was listed itself. Links to files elsewhere are as good as copies.

        Raises:
            UserError: there is one.
        """
        links = [path / name for path, entries in self._entries.items() for name in entries.links]
        if not links:
            return
        listed = {
            os.path.join(os.path.realpath(path), name): path / name
            for path, entries in self._entries.items()
            for name in set(entries.images).difference(entries.links)
        }
        for link in links:
            target = listed.get(os.path.realpath(link))
            if target is not None:
                raise UserError(f"{link}: a link to {target}; expected each image once: remove the link")
