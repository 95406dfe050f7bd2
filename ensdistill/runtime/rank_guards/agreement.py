"""What all processes of a run must have alike: their options, their data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ensdistill.runtime.errors import UserError, first_names
from ensdistill.runtime.rank_guards import Store

_PATIENCE = timedelta(seconds=10)


def refuse_difference(each: Sequence[Mapping[str, Any]]) -> None:
    """Check that all mappings, one a process, have the same entries.

    Raises:
        UserError: the first entry that differs, and which processes have what.
    """
    for name in dict.fromkeys(name for values in each for name in values):
        who: dict[str, list[str]] = {}
        for rank, values in enumerate(each):
            who.setdefault(str(values.get(name, "unknown")), []).append(str(rank))
        if len(who) > 1:
            found = ", ".join(f"{value} in {_processes(ranks)}" for value, ranks in who.items())
            raise UserError(
                f"{name}: got {found}; expected the same in all processes: start them with one command, on the same "
                "files"
            )


def require_same_options(store: Store, rank: int, size: int, options: Mapping[str, Any]) -> None:
    """Check that all processes have the same options (JSON values), before they have anything in common but a store.

    Raises:
        UserError: the first that differs.
    """
    store.set(f"options/{rank}", json.dumps(options))
    each = [json.loads(store.get(f"options/{r}")) for r in range(size)]
    store.set(f"compared/{rank}", "")
    try:
        refuse_difference(each)
    except UserError:
        with contextlib.suppress(dist.DistError):  # the store may end with this process: others have read it first
            store.wait([f"compared/{r}" for r in range(size)], _PATIENCE)
        raise


def _processes(ranks: list[str]) -> str:
    return f"process {ranks[0]}" if len(ranks) == 1 else f"processes {first_names(ranks)}"
