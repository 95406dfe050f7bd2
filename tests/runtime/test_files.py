"""Files are whole or absent; errors are one line and their exit code is theirs."""

from __future__ import annotations

import errno

import pytest

from ensdistill.runtime.errors import RunFailed, UserError, nearest, run_main
from ensdistill.runtime.files import atomic_write


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
    ],
)
def test_what_the_disk_refuses_is_the_user_s_to_mend(tmp_path, number, message):
    with pytest.raises(UserError, match=f"file: {message}"), atomic_write(tmp_path / "file"):
        raise OSError(number, "refused")
    assert not list(tmp_path.iterdir())


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
    assert run_main(raising(OSError(errno.ENOSPC, "full", "metrics.jsonl"))) == 1
    assert capsys.readouterr().err == "error: metrics.jsonl: no space left on the disk; free some and go on\n"
    assert run_main(raising(KeyboardInterrupt())) == 130
    for error in (KeyError(), OSError(errno.EIO, "strange")):
        with pytest.raises(type(error)):
            run_main(raising(error))


def test_nearest():
    assert nearest("digts", ["digits", "other"]) == " (did you mean 'digits'?)"
    assert nearest("zzz", ["digits"]) == ""
