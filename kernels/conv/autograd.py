"""Gradients of `member_conv`: its own input and weight gradients, and plain PyTorch for what is element-wise.

    du = [y > 0] ∘ (dy + a·dz' + dΣ + 2·y·dΣ²)              dz' = [z > 0] ∘ dz
    dbias = Σ du,  dresidual = du,  da = Σ y·dz',  db = Σ dz'                       over a member's pixels
    dw = the weight gradient of (x', du),  dx = the input gradient of du, through the prologue where there is one

Gradients of rows are added over the members that use them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.conv.shapes import sizes
from ensdistill.kernels.conv.weight_gradient.operation import member_conv_weight_gradient
from ensdistill.kernels.epilogue import rows


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, ctx.stride, members, pa, pb, bias, residual, ctx.relu, sa, _, ctx.keep_y, _, ctx.sums, _, ctx.out_dtype, _ = (
        inputs
    )
    y, z = output[:2]
    needs_y = ctx.relu or sa is not None or ctx.sums
    # without a stored y the backward computes it again, and needs all that made it
    again = needs_y and not ctx.keep_y
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.bias_shape = None if bias is None else bias.shape
    ctx.save_for_backward(
        x,
        w,
        members,
        pa,
        pb,
        bias if again else None,
        residual if again else None,
        sa,
        y if needs_y and ctx.keep_y else None,
        z if sa is not None else None,
    )
    ctx.set_materialize_grads(False)


def backward(ctx: Any, dy: Any, dz: Any, dsums: Any, dbits: Any) -> tuple[Any, ...]:
    x, w, members, pa, pb, bias, residual, sa, y, z = ctx.saved_tensors
    needs = ctx.needs_input_grad
    M, B, H, W, _, OH, OW, CO = sizes(x, w, ctx.stride, members)
    prologue = None if pa is None else (pa, pb)
    if y is None and (ctx.relu or sa is not None or ctx.sums):
        epilogue = (bias, residual, ctx.relu, None, None, True, True, False, 0)
        y = torch.ops.ensdistill.member_conv(x, w, ctx.stride, members, pa, pb, *epilogue, ctx.out_dtype, [])[0]

    def by_row(v_MC: Tensor, like: tuple[int, ...]) -> Tensor:
        """Per-member sums -> the gradient of the rows (E, C) or (1, C)."""
        if like[0] == 1:
            return v_MC.sum(0, keepdim=True)
        return v_MC if members is None else v_MC.new_zeros(like).index_add_(0, members, v_MC)

    dsa = dsb = dbias = dresidual = dpa = dpb = dx = dw = None
    du = x.new_zeros((M, B, OH, OW, CO), dtype=torch.float32) if dy is None or not ctx.keep_y else dy.float()
    if dz is not None and sa is not None:
        dz = dz * (z > 0)
        dsa = by_row((dz.float() * y).sum((1, 2, 3)), sa.shape)
        dsb = by_row(dz.sum((1, 2, 3), dtype=torch.float32), sa.shape)
        du = du + rows(sa, members) * dz
    if dsums is not None and ctx.sums:
        # every tile's gradient counts for the pixels of that tile: only sums over T are of use, so T's share one
        dtotal = dsums[:, 0]
        du = du + dtotal[:, 0][:, None, None, None] + 2 * dtotal[:, 1][:, None, None, None] * y
    if ctx.relu:
        du = du * (y > 0)
    if needs[7]:
        dresidual = du.to(ctx.residual_dtype)
    if needs[6]:
        dbias = by_row(du.sum((1, 2, 3)), ctx.bias_shape)
    du = du.to(x.dtype).contiguous()
    if needs[1]:
        of_members = (
            None
            if prologue is None
            else tuple(
                vector if members is None or vector.shape[0] == 1 else vector.index_select(0, members)
                for vector in prologue
            )
        )
        dw_MKKIO = member_conv_weight_gradient(x, du, kernel=w.shape[1], stride=ctx.stride, prologue=of_members)
        dw = dw_MKKIO if members is None else dw_MKKIO.new_zeros(w.shape).index_add_(0, members, dw_MKKIO)
        dw = dw.to(w.dtype)
    if needs[0] or needs[4] or needs[5]:
        common: dict[str, Any] = {"size": (H, W), "stride": ctx.stride, "members": members}
        if prologue is None:
            dx, _ = member_conv_input_gradient(du, w, shared=x.ndim == 4, **common)
        elif x.ndim == 5:
            dx, total = member_conv_input_gradient(du, w, norm=(x, pa, pb), scale=pa, **common)
            assert total is not None
            total = total.sum(1)
            dpa, dpb = by_row(total[:, 1], pa.shape), by_row(total[:, 0], pb.shape)
        else:
            v, _ = member_conv_input_gradient(du, w, out_dtype=torch.float32, **common)
            v = v * (rows(pa, members) * x.float() + rows(pb, members) > 0)
            dpa, dpb = by_row((v * x).sum((1, 2, 3)), pa.shape), by_row(v.sum((1, 2, 3)), pb.shape)
            dx = (rows(pa, members) * v).sum(0).to(x.dtype)
    return dx, dw, None, None, dpa, dpb, dbias, dresidual, None, dsa, dsb, None, None, None, None, None, None
