"""Files are whole or absent; errors are one line and their exit code is theirs."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

from ensdistill.runtime.errors import RunFailed, UserError, nearest, run_main
from ensdistill.runtime.files import (
    atomic_write,
    delete_leftovers,
    lock_folder,
    parse_json,
    require_digest,
    with_digest,
)


def test_content_appears_under_the_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "whole"
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EDQUOT, "no space left"),
        (errno.EACCES, "cannot be written"),
        (errno.EROFS, "cannot be written"),
        (errno.EFBIG, "larger than a file may be here"),
        (errno.EIO, r"the disk failed \(refused\)"),
        (errno.ENAMETOOLONG, "cannot be written"),
    ],
)
def test_what_the_disk_refuses_is_the_user_s_to_mend(tmp_path, number, message):
    with pytest.raises(UserError, match=f"file: {message}"), atomic_write(tmp_path / "file"):
        raise OSError(number, "refused")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_becomes_read_only_says_so(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(pathlib.Path, "unlink", read_only)
    monkeypatch.setattr(pathlib.Path, "replace", read_only)
    expected = pytest.raises(UserError, match=r"file: cannot be written \(Read-only file system\)")
    with expected, atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("whole")


def test_what_killed_processes_have_left_is_deleted_and_what_others_write_is_not(tmp_path):
    (tmp_path / f".file.{'1' * 16}.tmp").write_text("half")
    (tmp_path / f".another.{'2' * 16}.tmp").write_text("half")  # of a file that nobody may write again
    (tmp_path / ".other.12345.tmp").write_text("somebody else's")
    with atomic_write(tmp_path / "file") as first, atomic_write(tmp_path / "file") as second:
        assert first.exists() and second.exists() and first != second
        first.write_text("first")
        second.write_text("second")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.12345.tmp", "file"]
    assert (tmp_path / "file").read_text() == "first"


def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("whole")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


HOLDER = """
import os, sys, time
from pathlib import Path
from ensdistill.runtime.files import lock_folder
lock = lock_folder(Path(sys.argv[1]))
if os.fork():
    print(os.getpid(), flush=True)
time.sleep(60)  # the child too, which does not keep the lock
"""


def test_a_folder_has_one_process_at_a_time_until_that_ends(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert int(holder.stdout.readline()) == holder.pid
        owner = rf"run: another run is at work in this folder \(process {holder.pid} on .+\); wait until it ends"
        with pytest.raises(UserError, match=owner):
            lock_folder(folder)
        holder.kill()
        holder.wait()
        lock = lock_folder(folder)
        assert lock.is_held and lock_folder(folder) is lock  # one process may ask twice
        lock.close()
    finally:
        os.killpg(holder.pid, 9)
        holder.stdout.close()


def test_what_is_left_in_folders_below_is_deleted_and_nothing_else(tmp_path):
    left, name = tmp_path / "a" / "b" / f".x.y.{'0a' * 8}.tmp", tmp_path / "a" / f"x.{'0' * 16}.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    name.write_text("a name that we do not give")
    with atomic_write(tmp_path / "a" / "file") as temporary:
        temporary.write_text("whole")
        delete_leftovers(tmp_path, "*/")
        assert left.exists() and temporary.exists()
        delete_leftovers(tmp_path, "**/")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "file", name.name]


def test_errors_of_no_disk_pass(tmp_path):
    with pytest.raises(OSError, match="strange"), atomic_write(tmp_path / "file"):
        raise OSError(errno.ECHILD, "strange")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOSPC])
def test_an_error_of_another_file_is_not_blamed_on_the_one_that_is_written(tmp_path, number):
    other = tmp_path / "elsewhere" / "image.png"
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "file"):
        raise OSError(number, "refused", str(other))
    assert not isinstance(caught.value, UserError) and caught.value.filename == str(other)
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("name", ["file", ".", f".file.{'0' * 16}.tmp", f".file.{'0' * 16}.tmp".encode()])
def test_an_error_on_the_way_to_a_file_names_that_file(tmp_path, name):
    found = tmp_path / name if isinstance(name, str) else os.fsencode(tmp_path) + b"/" + name
    with pytest.raises(UserError, match=r"/file: cannot be written"), atomic_write(tmp_path / "file"):
        raise OSError(errno.EROFS, "Read-only file system", found)


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"), atomic_write(tmp_path / "folder" / "file"):
        pass


def raising(error):
    def main():
        raise error

    return main


def test_exit_codes(capsys):
    assert run_main(lambda: None) == 0 and run_main(lambda: 3) == 3
    assert run_main(raising(UserError("a: b"))) == 2
    assert run_main(raising(RunFailed("c"))) == 1
    assert capsys.readouterr().err == "error: a: b\nerror: c\n"
    assert run_main(raising(UserError("f: 'a\nb\x1b[0m" + 70_000 * "x" + "'; mend it"))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: f: 'a\\nb\\x1b[0mxxx") and error.endswith("x'; mend it\n")
    assert error.count("\n") == 1 and len(error) < 1300
    assert run_main(raising(OSError(errno.ENOSPC, "full", "metrics.jsonl"))) == 2
    assert capsys.readouterr().err.startswith("error: metrics.jsonl: no space left on the disk; free some")
    assert run_main(raising(OSError(errno.EIO, "Input/output error", b"weights"))) == 2
    assert capsys.readouterr().err.startswith("error: weights: the disk failed (Input/output error)")
    assert run_main(raising(KeyboardInterrupt())) == 130
    for error in (KeyError(), OSError(errno.EACCES, "strange", "x")):
        with pytest.raises(type(error)):
            run_main(raising(error))


def test_nearest():
    assert nearest("digts", ["digits", "other"]) == " (did you mean 'digits'?)"
    assert nearest("zzz", ["digits"]) == ""


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, r'"\ud800"', b'"\xff"', "\udc80", "{", b"\xef\xbb\xbf1"]
)
def test_json_that_no_program_writes_is_a_value_error(content):
    with pytest.raises(ValueError):
        parse_json(content)


def test_a_digest_shows_a_change_and_is_not_asked_of_earlier_files():
    values = {"b": [1, None, 0.1], "a": {"é": "x"}}
    written = parse_json(json.dumps(with_digest(values)))
    assert require_digest(written) == values == require_digest(values)
    with pytest.raises(ValueError, match="sha256"):
        require_digest(written | {"b": [1, None, 0.2]})
