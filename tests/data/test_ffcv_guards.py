"""FFCV is imported late, and says in one line where it cannot be."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ensdistill.data import ffcv_guards
from ensdistill.runtime.errors import UserError


def test_ffcv_is_imported_late() -> None:
    script = (
        "import sys, ensdistill.data.feed, ensdistill.data.prepare, ensdistill.data.sources.registry; "
        "print('ffcv' in sys.modules, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False False\n"


def test_ffcv_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(UserError, match=r"^ffcv: cannot be imported .*run `make setup`"):
        ffcv_guards.import_ffcv()


def test_distutils_is_lent_only_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distutils", None)
    monkeypatch.delitem(sys.modules, "distutils.log", raising=False)
    with ffcv_guards._distutils_stand_in():
        from distutils.log import warn

        assert callable(warn)
    assert sys.modules.get("distutils") is None and "distutils.log" not in sys.modules
