"""What `show` hands on: images drawn alike whoever computes them, normalised where the networks share that."""

from __future__ import annotations

import pytest
import torch
from networks import small_state

from ensdistill.config.methods import SHOWN
from ensdistill.engine.networks import KernelNetworks
from ensdistill.engine.operations import LibraryOperations, Operations, TritonOperations
from ensdistill.kernels.images.augment import normalise_ref
from ensdistill.kernels.philox import counter_of
from ensdistill.training.step import show


def passes(method: str, operations: Operations, device: torch.device) -> KernelNetworks:
    """The teachers and the student of `small_state`, through member-batched passes."""
    modules = small_state(method)[0].networks
    assert modules.teachers is not None
    return KernelNetworks(modules.teachers.to(device), modules.student.to(device), "fp32", operations)


@pytest.mark.parametrize("shown", [name for name in SHOWN if name != "clean"])
def test_images_come_normalised_where_all_networks_share_that(shown):
    x_BCHW = torch.rand(4, 3, 9, 9).to(memory_format=torch.channels_last)
    cpu = torch.device("cpu")
    networks = passes(f"latentbe+{shown}", LibraryOperations(), cpu)
    draws = {"seed": 9, "step": 4, "counter": counter_of(9, 4, 0, cpu), "tau": 4.0}
    y_BCHW, z_BHWC = show(shown, x_BCHW, networks, **draws)
    assert networks.normalise is not None and z_BHWC is not None and z_BHWC.is_contiguous()
    assert torch.equal(z_BHWC, normalise_ref(y_BCHW.permute(0, 2, 3, 1), *networks.normalise, networks.dtype))
    assert show(shown, x_BCHW, small_state(f"latentbe+{shown}")[0].networks, **draws)[1] is None


def test_noise_is_the_counter_s_whoever_draws_it(device):
    x_BCHW = torch.rand(4, 3, 9, 9).to(memory_format=torch.channels_last)
    modules = small_state("kd+gaussian")[0].networks
    counter = counter_of(9, 4, 8, torch.device("cpu"))
    right, _ = show("gaussian", x_BCHW, modules, seed=9, step=4, counter=counter, tau=4.0)
    networks = passes("kd+gaussian", TritonOperations(), device)
    # the host's numbers are those of another step: a captured graph keeps the first
    y_BCHW, z_BHWC = show("gaussian", x_BCHW.to(device), networks, seed=1, step=2, counter=counter.to(device), tau=4.0)
    torch.testing.assert_close(y_BCHW.cpu(), right, rtol=0, atol=1.2e-7)
    assert z_BHWC is not None and not torch.equal(right, x_BCHW)
