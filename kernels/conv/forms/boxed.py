"""Forms that fetch boxes, behind one door for the forward and the input gradient of stride 1."""

from __future__ import annotations

from torch import Tensor

from ensdistill.kernels.conv.arguments import Affine
from ensdistill.kernels.conv.forms import boxes, rows
from ensdistill.kernels.conv.tiles import PERSISTENT, ROWS, Tile, persistent_sums
from ensdistill.kernels.epilogue import Epilogue


def num_tiles(B: int, H: int, W: int, tile: Tile) -> int:
    """T, the tiles of pixels of a member with B images of H × W pixels."""
    if tile.form == ROWS:
        return rows.num_tiles(B, H, W, tile)
    return persistent_sums(B, H, W, tile) if tile.form == PERSISTENT else boxes.num_tiles(B, H, W, tile)


def launch_boxed(
    x: Tensor,
    w_EKKIO: Tensor,
    members: Tensor | None,
    prologue: Affine | None,
    epilogue: Epilogue,
    *,
    M: int,
    transposed: bool,
    tile: Tile,
) -> None:
    """Convolve x with w, or `transposed` dy with w flipped, into the epilogue's outputs; PERSISTENT: no prologue."""
    if tile.form == PERSISTENT:
        from ensdistill.kernels.conv.forms.persistent import launch_persistent  # not in every Triton

        launch_persistent(x, w_EKKIO, members, epilogue, M=M, transposed=transposed, tile=tile)
        return
    launch_form = rows.launch_rows if tile.form == ROWS else boxes.launch_boxes
    launch_form(x, w_EKKIO, members, prologue, epilogue, M=M, transposed=transposed, tile=tile)
