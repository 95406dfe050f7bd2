"""Errors that a user can mend: one class, one way out of every command."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence

from ensdistill.runtime.stop import raising_again

MAX_MESSAGE = 1200
"""Letters of an error; it quotes the values of files, which may be of any length."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FAILED = (errno.EIO, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV, errno.ESTALE)
_FORBIDDEN = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.ETXTBSY),
    *(errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP),  # /proc takes no folder
)
_OF_DISKS_ALONE = (*_FULL, *_FAILED, errno.EFBIG, errno.EROFS)
"""The errors that say of what a disk refused, wherever they come from."""


class UserError(ValueError):
    """A mistake in the input that its user can mend.

    The message is one line that names the input, what was found, what was expected and what to do.
    """


class RunFailed(RuntimeError):
    """A run that cannot go on, through no mistake in its input: one line: where it stopped and what is left."""


def disk_refusal(error: OSError) -> str | None:
    """Say why the disk refused to write, and what to do about it; None where it was no disk."""
    if error.errno in _FULL:
        return "no space left on the disk; free some, or choose another folder"
    if error.errno == errno.EFBIG:
        return "larger than a file may be here; raise the limit (`ulimit -f`), or choose another folder"
    if error.errno in _FAILED:
        return f"the disk failed ({error.strerror}); see to it (`dmesg`), or choose another folder"
    if error.errno in _FORBIDDEN:
        return f"cannot be written ({error.strerror}); choose a folder you may write to"
    return None


def nearest(name: str, choices: Iterable[str]) -> str:
    """The hint `` (did you mean 'x'?)`` for a misspelt `name`, or an empty string where nothing is close."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def first_names(names: Sequence[str], none: str = "nothing") -> str:
    """Show the first three names and how many more there are, or `none`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or none) + more


def one_line(text: str) -> str:
    """Make one line of a message that quotes what a file holds: what does not print is escaped, the middle cut out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 300]} […] {text[-290:]}"


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's `main`: a `UserError` becomes one line on stderr and exit code 2, a `RunFailed` exit code 1.

    What a disk refuses is one line and 2 wherever it was noticed; Ctrl-C is 130, as the shell has it. Warnings are a
    line. What a terminal's encoding lacks is printed as `?`.
    """
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *where, **more: f"warning: {message}\n"
    try:
        with raising_again():
            return _with_output(main) or 0
    except (UserError, RunFailed) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        return 1
    except OSError as error:
        if error.errno not in _OF_DISKS_ALONE:
            raise
        place = "output" if error.filename is None else os.fsdecode(error.filename)
        print(f"error: {place}: {disk_refusal(error)}", file=sys.stderr)
        return 2


def _with_output(main: Callable[[], int | None]) -> int | None:
    """Run `main` and flush what it printed; what nobody can read any more is let go of, whatever `main` raised."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BaseException:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # no descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _open_what_is_closed() -> None:
    """Give closed standard streams (`>&-`) to nothing: else a file that is written would get their descriptors."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
