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
from ensdistill.runtime.files import atomic_write, lock_folder, parse_json, require_digest, with_digest


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
    (tmp_path / ".file.12345.tmp").write_text("half")
    (tmp_path / ".other.12345.tmp").write_text("half")
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


def test_other_errors_pass(tmp_path):
    with pytest.raises(OSError, match="strange"), atomic_write(tmp_path / "file"):
        raise OSError(errno.EIO, "strange")


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
    assert run_main(raising(OSError(errno.ENOSPC, "full", "metrics.jsonl"))) == 1
    assert capsys.readouterr().err == "error: metrics.jsonl: no space left on the disk; free some and go on\n"
    assert run_main(raising(KeyboardInterrupt())) == 130
    for error in (KeyError(), OSError(errno.EIO, "strange")):
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
