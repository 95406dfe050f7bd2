"""The console script: every command by its name, with the exit codes and usage of its module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ensdistill import __main__ as console
from ensdistill import __version__
from ensdistill.runtime import releases


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ensdistill", *arguments])
    return console.main()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_lists_the_commands(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: ensdistill COMMAND …"
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(console.COMMANDS)
    assert {"train", "evaluate", "predict", "export", "report", "verify", "tune", "bench"} <= set(listed)


def test_says_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_unknown_command_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "trian") == 2
    assert capsys.readouterr().err.startswith("error: ensdistill: no command 'trian' (did you mean 'train'?); expected")


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "predict", "export", "report", "verify", "tune", "roofline", "bench"]
)
def test_a_command_is_called_by_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, name, "--help")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f"usage: ensdistill {name} ")


def test_a_commands_error_is_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "train", "--recipe", "digit") == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 1, 143])
def test_exit_codes_pass_through(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensdistill.fast_train.main", lambda: code)
    assert call(monkeypatch, "train") == code


def test_the_bench_is_a_checkouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "__file__", str(tmp_path / "site-packages" / "ensdistill" / "__main__.py"))
    assert call(monkeypatch, "bench") == 2
    assert "run `python -m bench` in a checkout" in capsys.readouterr().err


def test_is_a_command_where_releases_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, is_command in (
        (["/usr/bin/python3", "/opt/bin/ensdistill", "train"], True),
        (["/usr/bin/python3", "/opt/bin/other", "train"], False),
        (["python", "-m", "ensdistill.tune"], True),
    ):
        monkeypatch.setattr(sys, "orig_argv", words)
        assert releases._is_command() == is_command
