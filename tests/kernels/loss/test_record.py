"""Records of steps: each goes into its own row, and the device counts the step."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_launches_alike_on_meta

from ensdistill.kernels.loss.record import record
from ensdistill.kernels.philox import counter_of


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize(("networks", "count"), [(1, 5), (1, 1), (3, 4), (4, 2)])
def test_each_step_has_its_row(kernel, networks, count, device):
    T = 4
    table = torch.full((T, networks, count), -1.0, dtype=torch.float64, device=device)
    counter = counter_of(2**63, 6, 11, device)
    expected = table.cpu().clone()
    generator = torch.Generator().manual_seed(0)
    for step in range(6, 6 + T + 2):  # past the table's end
        values = [torch.randn(networks, generator=generator) for _ in range(count)]
        given = [(value if networks > 1 else value[0]).to(device) for value in values]
        record(table, counter, given, kernel=kernel)
        expected[step % T] = torch.stack(values, -1).double()
        assert torch.equal(table.cpu(), expected)  # and no other row
    assert counter.tolist() == [-(2**63), 6 + T + 2, 11]


def test_on_meta(device):
    table, counter = torch.zeros(2, 1, 2, dtype=torch.float64, device=device), counter_of(0, 0, 0, device)
    values = [torch.ones((), device=device)] * 2
    assert_launches_alike_on_meta(record, table, counter, values, kernel=True, writes=(table, counter))


def test_what_does_not_fit_is_refused(device):
    table, counter = torch.zeros(2, 1, 2, dtype=torch.float64, device=device), counter_of(0, 0, 0, device)
    one = torch.zeros((), device=device)
    with pytest.raises(ValueError, match="values: expected 2 of at most 5, got 1"):
        record(table, counter, [one])
    with pytest.raises(ValueError, match="values: expected 1 values each"):
        record(table, counter, [one, torch.zeros(2, device=device)])
    with pytest.raises(ValueError, match="table: expected contiguous float64"):
        record(table.float(), counter, [one, one])
    with pytest.raises(ValueError, match="counter: expected an int64 tensor"):
        record(table, counter[:2], [one, one])
