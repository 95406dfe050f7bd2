"""Every way to compute one training step: this program's, and what users could do instead.

A provider makes a `Run` of a `Problem`: `run(images_BHWC, labels_B)` does a step and gives its measures, `run.student`
is the network in training, `run.shown` the images x' of the latest step. All start alike and draw alike, so
`agreement` can compare what they compute before anybody times them.

| provider | order of work | how |
|---|---|---|
| `official-order` | official, 32 F | eager, fp32, contiguous, member by member |
| `official-order-tf32` | official | the same, with TF32 convolutions (GPU) |
| `official-order-amp` | official | the same, under autocast to bf16 |
| `pruned` | ours, 22 F | eager modules, channels_last: the `reference` backend |
| `compiled`, `compiled-vmap` | ours | torch.compile and one CUDA graph; teachers by loop, and by vmap |
| `library`, `triton`, `auto` | ours | the backends of these names; `auto` on a CPU: modules side by side on its cores |
| `tuned` | ours | `auto` as far as it was measured before, `triton` elsewhere: measures nothing |

F: one forward of one network over the batch, at E = 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bench.rivals.agreement import Agreement, agreement, bounds
from bench.rivals.compiled import Compiled
from bench.rivals.official import OfficialOrder
from bench.rivals.ours import Ours
from bench.rivals.problem import Problem, Run
from ensdistill.runtime.environment import Precision

__all__ = ["PROVIDERS", "Agreement", "Problem", "Provider", "Run", "agreement", "bounds"]


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute a step."""

    make: Callable[[Problem], Run]
    """Function that makes a run of a problem, which is left as it is."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """Precisions of the problems that it stands for."""
    needs_gpu: bool = False
    """True: on a CPU it is too slow to time, or the same as another."""
    compiles: bool = False
    """True: on a CPU it takes part where it is named, for it takes minutes to start."""


PROVIDERS = {
    "official-order": Provider(make=OfficialOrder, precisions=("fp32",)),
    "official-order-tf32": Provider(make=partial(OfficialOrder, tf32=True), precisions=("fp32",), needs_gpu=True),
    "official-order-amp": Provider(make=OfficialOrder, precisions=("bf16",)),
    "pruned": Provider(make=partial(Ours, backend="reference")),
    "compiled": Provider(make=partial(Compiled, stacked=False), compiles=True),
    "compiled-vmap": Provider(make=partial(Compiled, stacked=True), compiles=True),
    "library": Provider(make=partial(Ours, backend="library")),
    "triton": Provider(make=partial(Ours, backend="triton"), needs_gpu=True),
    "auto": Provider(make=partial(Ours, backend="auto")),
    "tuned": Provider(make=partial(Ours, backend="tuned"), needs_gpu=True),
}
