"""Prints as JSON what one step of the paper's recipe launches: name, lane, number; kernels, and PyTorch's operations.

A program of its own: launches are recorded where kernels are compiled, not interpreted.
"""

from __future__ import annotations

import json
from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

from ensdistill.aot.trace import compiling_for
from ensdistill.config.methods import Method
from ensdistill.config.recipes import find_recipe
from ensdistill.costs.dry_run import prepare_step
from ensdistill.engine.operations import TritonOperations
from ensdistill.kernels import launch
from ensdistill.runtime import streams

# What makes no node of a graph: views and memory.
NO_LAUNCH = frozenset(
    [
        "alias",
        "as_strided",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "new_empty",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "_reshape_alias",
        "_unsafe_view",
    ]
)


class CountLaunches(TorchDispatchMode):
    """PyTorch's own operations, by the lane that they run on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and name not in NO_LAUNCH:
            self.seen[name, streams.lane] += 1
        return function(*args, **(kwargs or {}))


def main() -> None:
    config = find_recipe("cifar100-wrn28x4")
    kernels: Counter[tuple[str, int]] = Counter()

    def record(kernel, grid, args, options):
        kernels[kernel.fn.__name__, streams.lane] += 1

    with compiling_for(90), launch.recording(record):
        run = prepare_step(config, Method.parse("latentbe+tdiv-sdiv"), config.student, TritonOperations())
        run()  # the first one makes what stays
        kernels.clear()
        with CountLaunches() as aten:
            run()
    rows = {"kernels": kernels, "aten": aten.seen}
    print(json.dumps({name: [[*key, n] for key, n in counts.items()] for name, counts in rows.items()}))


if __name__ == "__main__":
    main()
