"""A golden file whose header promises more than its bytes is refused before room is made for it."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from ensdistill.formats.golden import Golden
from ensdistill.runtime.errors import UserError


def test_an_array_larger_than_its_file_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", buffer.getvalue() + bytes(64))
    with pytest.raises(UserError, match=r"images\.npy is an array of shape \(1099511627776, 3\) in"):
        Golden(tmp_path / "x.npz")
