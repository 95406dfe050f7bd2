"""BatchNorm applied, with residual, ReLU and packed bits, against its reference in float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import agrees, assert_launches_alike_on_meta, doubled, error
from norm_inputs import SHAPES, TYPES, activations, vectors

from ensdistill.kernels.epilogue import unpack_bits_ref
from ensdistill.kernels.norm.apply import batch_norm_apply, batch_norm_apply_ref

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


# Measured: fp32 3.8e-8 to 1.0e-7, bf16 1.8e-3 to 3.2e-3, both equal to the reference.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("per_member", "relu", "residual", "bits"),
    [(False, True, None, 0), (True, True, "same", 1), (True, False, "float32", 0), (False, True, "same", "all")],
)
def test_apply(shape, dtype, per_member, relu, residual, bits, device):
    M, C = shape[0], shape[-1]
    x = activations(shape, dtype, device)
    scale, shift = vectors(M if per_member else 1, C, device=device)
    other = None if residual is None else activations(shape, dtype if residual == "same" else torch.float32, device, 3)
    bits = M if bits == "all" else bits
    z, packed = batch_norm_apply(x, scale, shift, relu=relu, residual=other, bits=bits)
    ref, _ = batch_norm_apply_ref(x, scale, shift, relu=relu, residual=other)
    x_64, scale_64, shift_64, other_64 = doubled(x, scale, shift, other)
    truth, _ = batch_norm_apply_ref(x_64, scale_64, shift_64, relu=relu, residual=other_64)
    agrees(z, ref, truth, 1e-7)
    if bits:
        assert packed.shape == (bits, *shape[1:-1], -(-C // 8))
        assert torch.equal(unpack_bits_ref(packed, C), z[:bits] > 0)
        assert torch.equal(
            unpack_bits_ref(packed, 8 * packed.shape[-1])[..., C:].any(), torch.tensor(False, device=device)
        )
    else:
        assert packed is None


def test_apply_passes_nan_on(device):
    x = activations((1, 2, 5, 16), torch.float32, device)
    x[0, 1, 2, 3] = float("nan")
    z, _ = batch_norm_apply(x, *vectors(1, 16, device=device))
    assert torch.equal(z.isnan(), x.isnan())


@pytest.mark.gpu
def test_past_two_to_the_31_values(device):
    shape = (5, 128, 64, 64, 1024)
    x = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
    assert x.numel() > 2**31
    scale, shift = vectors(1, 1024, device=device)
    z, packed = batch_norm_apply(x, scale, shift, bits=5)
    ref, _ = batch_norm_apply_ref(x[-1:, -1:], scale, shift)
    assert error(z[-1:, -1:], ref.double()) < 2**-8
    assert torch.equal(unpack_bits_ref(packed[-1, -1], 1024), z[-1, -1] > 0)


def test_on_meta(device):
    x = activations((2, 3, 3, 2, 20), torch.bfloat16, device)
    scale, shift = vectors(2, 20, device=device)
    assert_launches_alike_on_meta(batch_norm_apply, x, scale, shift, residual=x.float(), bits=1)
    assert_launches_alike_on_meta(batch_norm_apply, x, scale[:1], shift[:1], relu=False)


def test_bad_arguments():
    x, vector, scale = torch.rand(2, 3, 4, 5), torch.rand(5), torch.rand(1, 5)

    def bad(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

    bad("x: expected a contiguous float32 or bfloat16", batch_norm_apply, x.double(), scale, scale)
    bad("x: expected a contiguous", batch_norm_apply, x.transpose(1, 2), scale, scale)
    bad(r"scale: expected contiguous float32 \(1, 5\) or \(2, 5\)", batch_norm_apply, x, vector, scale)
    bad("shift: expected the shape of scale", batch_norm_apply, x, scale, torch.rand(2, 5))
    bad(r"residual: expected .* \(2, 3, 4, 5\)", batch_norm_apply, x, scale, scale, residual=x[:1])
    bad("bits: expected 0 without ReLU", batch_norm_apply, x, scale, scale, relu=False, bits=1)
    bad("bits: expected .* at most the members", batch_norm_apply, x, scale, scale, bits=3)
