"""Distil an ensemble of image classifiers into one network.

`to_batch_ensemble(module, members)` turns a network into a BatchEnsemble student and `average_members(student)` back
into a plain one. `load_network(path)` gives a network that a run wrote. `python -m ensdistill.fast_train` runs a whole
job.
"""

import os

# Before PyTorch loads OpenMP: waiting threads that spin make two threads on a busy machine several times slower than
# one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from ensdistill.runtime.releases import check_releases

check_releases()  # before an import fails for want of what an older release lacks

from ensdistill.formats.hub import load_network  # noqa: E402
from ensdistill.models.batch_ensemble import average_members, to_batch_ensemble  # noqa: E402

__version__ = "0.1.0"
__all__ = ["average_members", "load_network", "to_batch_ensemble"]
