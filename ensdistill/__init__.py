"""Distil an ensemble of image classifiers into one network.

`Distiller` trains in a loop of your own. Its pieces: `perturbed` shows a batch where teachers disagree,
`distillation_loss` is the loss, `to_batch_ensemble(network, members)` turns a network into a BatchEnsemble student,
`check_members` tries it, and `average_members(student)` gives the plain network back. `load_network(path)` gives a
network that a run wrote. `python -m ensdistill.fast_train` runs a whole job.

A name is imported when it is asked for, so that `import ensdistill` is quick and needs nothing but PyTorch's presence.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

# Before PyTorch loads OpenMP: waiting threads that spin make two threads on a busy machine several times slower than
# one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from ensdistill.runtime.releases import check_releases
from ensdistill.runtime.stop import killed_while_loading

if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0] if sys.argv else "") == "ensdistill":
    killed_while_loading()  # `python -m ensdistill.…` or the console script, of which this is imported first
check_releases()  # before an import fails for want of what an older release lacks

if TYPE_CHECKING:
    from ensdistill.formats.hub import load_network
    from ensdistill.models.batch_ensemble import average_members, check_members, to_batch_ensemble
    from ensdistill.own_loop.distiller import Distiller
    from ensdistill.own_loop.pieces import distillation_loss, perturbed
    from ensdistill.runtime.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "Distiller",
    "UserError",
    "average_members",
    "check_members",
    "distillation_loss",
    "load_network",
    "perturbed",
    "to_batch_ensemble",
]

_PLACES = {
    "Distiller": "ensdistill.own_loop.distiller",
    "UserError": "ensdistill.runtime.errors",
    "average_members": "ensdistill.models.batch_ensemble",
    "check_members": "ensdistill.models.batch_ensemble",
    "distillation_loss": "ensdistill.own_loop.pieces",
    "load_network": "ensdistill.formats.hub",
    "perturbed": "ensdistill.own_loop.pieces",
    "to_batch_ensemble": "ensdistill.models.batch_ensemble",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ensdistill' has no attribute '{name}'")
    globals()[name] = found = getattr(importlib.import_module(_PLACES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
