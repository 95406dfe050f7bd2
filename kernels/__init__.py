"""Operations of the step, one a file: formula, shapes, bytes and FLOPs, plain PyTorch definition, Triton kernel.

All of them come from one assembler. Triton has a ptxas of its own, whose version is in the keys of its cache and is
read once a process. torch.compile, when it first compiles, names the ptxas of PyTorch's wheel to Triton: what compiles
after that would come from that one, under the same keys. PyTorch names its own only where none is named: so Triton's is
named here, before anything compiles. A `TRITON_PTXAS_PATH` that is set already counts.
"""

import os
from contextlib import suppress

from triton import knobs

with suppress(RuntimeError):  # a Triton for other devices has none
    os.environ.setdefault("TRITON_PTXAS_PATH", knobs.nvidia.ptxas.path)
