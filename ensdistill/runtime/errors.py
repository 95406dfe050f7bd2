"""Errors that a user can mend: one class, one way out of every command."""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FAILED = (errno.EIO, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV, errno.ESTALE)
_FORBIDDEN = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.ETXTBSY),
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


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's `main`: a `UserError` becomes one line on stderr and exit code 2, a `RunFailed` exit code 1.

    What a disk refuses is one line and 2 wherever it was noticed; Ctrl-C is 130, as the shell has it. Warnings are a
    line. What a terminal's encoding lacks is printed as `?`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *where, **more: f"warning: {message}\n"
    try:
        return main() or 0
    except (UserError, RunFailed) as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno not in _OF_DISKS_ALONE:
            raise
        place = "output" if error.filename is None else os.fsdecode(error.filename)
        print(f"error: {place}: {disk_refusal(error)}", file=sys.stderr)
        return 2
