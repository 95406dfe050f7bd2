"""What several processes of a run must have alike."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from ensdistill.config.configs import Command
from ensdistill.config.recipes import find_recipe
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.rank_guards.agreement import refuse_difference, require_same_options


def test_the_first_difference_and_whose_it_is_are_named():
    alike = {"--seed": 0, "--out": None}
    refuse_difference([alike, dict(alike)])
    with pytest.raises(UserError, match="--out: got None in processes 0, 2, 3 and 1 more, a in process 1; expected"):
        refuse_difference([alike, {"--seed": 0, "--out": "a", "x": 1}, alike, alike, alike])
    with pytest.raises(UserError, match="new: got unknown in process 0, 1 in process 1; expected the same"):
        refuse_difference([alike, alike | {"new": 1}])


def test_every_process_refuses_options_that_differ():
    store, errors = dist.HashStore(), {}

    def compare(rank: int) -> None:
        try:
            require_same_options(store, rank, 3, {"--seed": rank // 2})
        except UserError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=compare, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert errors.keys() == {0, 1, 2} and len(set(errors.values())) == 1
    assert errors[0].startswith("--seed: got 0 in processes 0, 1, 1 in process 2; expected the same in all processes")


def test_options_are_compared_by_the_names_that_people_type():
    command = Command(config=find_recipe("digits"))
    options = command.shared_options()
    assert options["--teacher.batch-size"] == command.config.teacher.batch_size and options["--out"] is None
    other = dataclasses.replace(command, threads=3, out=Path("a"), resume=True)
    differs = {name for name, value in other.shared_options().items() if value != options[name]}
    assert differs == {"--out", "--resume"}
