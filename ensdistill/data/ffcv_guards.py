"""FFCV without its surprises: one import that works, and global thread counts that stay as they were.

FFCV takes seconds to import, so nothing imports it at module level but the modules that are loaded on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ensdistill.runtime.environment import usable_cores
from ensdistill.runtime.errors import UserError

_NUMBA_VARIABLES = ("NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_THREADING_LAYER_PRIORITY")


def import_ffcv() -> types.ModuleType:
    """Import FFCV on the first call, which takes seconds. Every module that uses it calls this first.

    Raises:
        UserError: it is not installed, or a library that it is linked to is missing.
    """
    loaded = sys.modules.get("ffcv")
    if loaded is not None:
        return loaded
    with kept_thread_counts(), _distutils_stand_in():
        try:
            return importlib.import_module("ffcv")
        except ImportError as error:
            raise UserError(
                f"ffcv: cannot be imported ({error}), and it reads every data set; run `make setup` to build it"
            ) from error


@contextmanager
def kept_thread_counts() -> Iterator[None]:
    """Keep PyTorch's and numba's thread counts as they were: FFCV sets both, for the whole process."""
    torch_threads = torch.get_num_threads()
    try:
        import numba  # a second by itself

        numba_threads = numba.get_num_threads()  # starts them
    except ValueError as error:
        named = {key: value for key in _NUMBA_VARIABLES if (value := os.environ.get(key)) is not None}
        raise UserError(
            f"numba: cannot start its threads ({' '.join(str(error).split()).rstrip('.')}); "
            + (f"unset {' and '.join(f'{k}={v}' for k, v in named.items())}" if named else "install numba anew")
        ) from error
    try:
        yield
    finally:
        numba.set_num_threads(numba_threads)
        torch.set_num_threads(torch_threads)  # last: numba's OpenMP layer sets OpenMP's own count, which PyTorch reads


def num_cores() -> int:
    """Number of cores that this process may use, at most as many as numba's thread pool was made for."""
    import numba

    return min(usable_cores(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


@contextmanager
def _distutils_stand_in() -> Iterator[None]:
    """Lend FFCV the name that it imports from distutils and never uses, where Python has none (from 3.12 on)."""
    try:
        importlib.import_module("distutils.log")
    except ImportError:
        package, log = types.ModuleType("distutils"), types.ModuleType("distutils.log")
        package.log = log  # type: ignore[attr-defined]
        log.warn = print  # type: ignore[attr-defined]
        lent: dict[str, types.ModuleType] = {"distutils": package, "distutils.log": log}
    else:
        lent = {}
    missing = object()
    before = {name: sys.modules.get(name, missing) for name in lent}
    sys.modules.update(lent)
    try:
        yield
    finally:  # others ask whether distutils exists
        for name, module in before.items():
            if module is missing:
                del sys.modules[name]
            else:
                sys.modules[name] = module  # type: ignore[assignment]
