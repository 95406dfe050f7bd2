"""Every image is listed once; hidden files are left out; what cannot be read is refused in one line."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from data_sets import content_of, refused, write_images

from ensdistill.data.sources.walk import Walk, list_folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_images(tmp_path / "data" / name, 4)
    return tmp_path / "data"


def num_images(data: Path) -> int:
    return sum(len(split.labels) for split in content_of("folder", data).splits.values())


@pytest.mark.parametrize("target", [".", "..", "../b", "../../data/a"])
def test_links_to_folders_of_the_data_are_refused(data: Path, target: str) -> None:
    (data / "a" / "link").symlink_to(target)
    refused(lambda: num_images(data), "the same folder as", "through a link", "remove the link")


def test_links_to_files_of_the_data_are_refused(data: Path) -> None:
    (data / "a" / "link.png").symlink_to("../b/001.png")
    refused(lambda: num_images(data), "link.png: a link to", "b/001.png", "remove the link")


def test_a_split_that_is_a_link_to_another_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "train" / name, 4)
    (tmp_path / "test").symlink_to("train")
    refused(lambda: num_images(tmp_path), "the same folder as")


def test_links_to_places_elsewhere_are_followed(data: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", 3)
    (data / "c").symlink_to(tmp_path / "elsewhere")
    write_images(tmp_path / "store", 1)
    (data / "a" / "stored.png").symlink_to(tmp_path / "store" / "000.png")
    os.link(data / "b" / "000.png", data / "b" / "hard.png")
    assert num_images(data) == 4 + 4 + 3 + 1 + 1


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails", "#recycle"])
def test_hidden_folders_and_files_are_left_out(data: Path, name: str) -> None:
    for place in (data, data / "a", data / "a" / "deeper"):
        write_images(place / name, 2)
    write_images(data / "a" / "deeper", 1)
    (data / "a" / "._000.png").write_bytes(b"resources")
    (data / "a" / "Thumbs.db").write_bytes(b"thumbs")
    assert num_images(data) == 9
    assert content_of("folder", data).class_names == ("a", "b")


@pytest.mark.parametrize("place", [".", "a", "a/deeper"])
@pytest.mark.parametrize("name", ["gone", "gone.png", "round.png"])
def test_links_to_nothing_are_refused(data: Path, place: str, name: str) -> None:
    (data / place).mkdir(exist_ok=True)
    (data / place / name).symlink_to(name if name == "round.png" else "nowhere")
    refused(lambda: num_images(data), name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(data: Path) -> None:
    write_images(data / "a" / "deeper", 2)
    (data / "a" / "deeper").chmod(0)
    refused(lambda: num_images(data), "deeper: cannot be read (Permission denied)")
    (data / "a" / "deeper").chmod(0o700)


def test_an_error_of_a_folder_is_not_skipped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused(lambda: num_images(data), str(data / "b"), "cannot be read (Permission denied)")


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_files_that_are_none_are_refused(data: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data / "a")  # the path of a socket is short
    for name in ("x.png", "note.txt"):
        if kind == "pipe":
            os.mkfifo(name)
        else:
            socket.socket(socket.AF_UNIX).bind(name)
    refused(lambda: num_images(data), "x.png: no regular file")
    (data / "a" / "x.png").unlink()
    assert num_images(data) == 8


@pytest.mark.parametrize("name", [b"caf\xe9", b"caf\xe9.png"])
def test_names_that_are_not_utf8_are_refused(data: Path, name: bytes) -> None:
    place = os.fsencode(data / "a" if name.endswith(b"png") else data) + b"/" + name
    os.mkdir(place) if not name.endswith(b"png") else Path(os.fsdecode(place)).write_bytes(b"")
    refused(lambda: num_images(data), "caf\\xe9", "is not UTF-8; rename it")


def test_images_of_every_ending_are_listed_in_order(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.jfif", "c.txt", "c.PNG"):
        (tmp_path / name).write_bytes(b"")
    assert list_folder(tmp_path).images == ["a.jfif", "b.JPG", "c.PNG"]
    assert [image.name for image in Walk().images(tmp_path)] == ["a.jfif", "b.JPG", "c.PNG"]


def test_what_is_left_out_is_said(data: Path) -> None:
    assert "left out" not in content_of("folder", data).note
    for name in ("a/x.heic", "a/y.HEIC", "b/noname", "b/notes.txt", "b/.hidden"):
        (data / name).write_bytes(b"")
    write_images(data, 2)
    note = content_of("folder", data).note
    assert "files that have no ending of an image are left out: 2 .heic, 1 without an ending" in note
    assert f"2 images that lie beside the class folders of {data} are left out" in note
