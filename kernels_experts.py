"""A mixture of experts for a few tokens: which experts, each row through its own, and their weighted sum.

    route       a token's router logits -> its best experts and their weights, on the device: no host is asked
    experts     each row through its expert's matrix as it is stored (bf16, int8, fp8, int4), which is read once a row
    weighted    the sum of what a token's experts give, by weight, and the residual

Each beside its plain PyTorch reference; `experts` is kernels_linear.py's `gemv`, whose rows have a matrix each.

Shapes: N tokens, T experts a token of E; C, K, H features.

Try it:  TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py -k expert

Sources: Mixtral of Experts (arXiv 2401.04088).
"""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

import kernels_linear
import kernels_overlap
from kernels_linear import linear_reference
from kernels_overlap import overlaps


# ---------------------------------------------------------------------------------------------------- the references
def route_reference(logits: Tensor, top: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """What `route` computes, as model.MoE does."""
    weight, expert = logits.float().softmax(-1).topk(top, dim=-1)
    if normalized:
        weight = weight / weight.sum(-1, keepdim=True)
    return weight.to(logits.dtype), expert


def experts_reference(x, weight, scale, expert, norm=None, eps=0.0, offset=0.0, activation="") -> Tensor:
    """What `experts` computes, in plain PyTorch."""
    each = expert.flatten().tolist()
    rows = x.view(-1, 1, x.shape[-1]).repeat_interleave(len(each) // (x.numel() // x.shape[-1]), 0)
    around = (None, norm, None, eps, offset, activation)
    return torch.cat(
        [
            linear_reference(row, weight[e], None if scale is None else scale[e], *around)
            for row, e in zip(rows, each, strict=True)
        ]
    )


def weighted_reference(y: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """What `weighted` computes, but for a rounding of each product."""
    z = (y.view(*weight.shape, -1) * weight[..., None]).sum(1)
    return z if residual is None else residual + z.view_as(residual)


# ------------------------------------------------------------------------------------------------------ the launchers
def route(logits: Tensor, top: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The operator hotloop::route: logits [N, E] -> (weight [N, T] in their dtype, expert int64 [N, T]), best first.

    The weights are softmax's, of all experts or, normalized, of the chosen ones alone. Equal ones: the lower id first.
    """
    N, E = logits.shape
    weight, overlap = logits.new_empty(N, top), overlaps(logits.device)
    expert = torch.empty(N, top, dtype=torch.int64, device=logits.device)
    triton_programs().route[(N,)](
        logits, weight, expert, E=E, BE=1 << (E - 1).bit_length(), TOP=top, BT=1 << (top - 1).bit_length(),
        NORMALIZED=normalized, OVERLAP=overlap, launch_pdl=overlap, num_warps=1,
    )  # fmt: skip
    return weight, expert


def experts(x, weight, scale, expert, norm, eps, offset, activation) -> Tensor:
    """The operator hotloop::experts: row r of x [N, K], or of [N T, K], through matrix expert.flatten()[r] -> [N T, H].

    expert: int64 [N, T]; of x [N, K] a row serves all T of its token. weight: E matrices [E, H, K] or, with an
    activation, of gates and what they gate [E, 2 H, K], stored as kernels_one_pass.dequantize says with E in front, and
    so is scale. norm, eps, offset: of an RMSNorm before it, or None.
    """
    y = x.new_empty(expert.numel(), weight.shape[1] // (2 if activation else 1))
    kernels_linear.gemv(x, weight, scale, None, norm, None, y, eps, offset, activation, expert)
    return y


WEIGHTED_BLOCK = 512  # outputs a program


def weighted(y: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """The operator hotloop::weighted: y [N T, C], weight [N, T], residual [..., C] of N rows -> [N, C] or its shape."""
    N, top = weight.shape
    C, overlap = y.shape[1], overlaps(y.device)
    z = y.new_empty(N, C) if residual is None else torch.empty_like(residual)
    triton_programs().weighted[N, -(-C // WEIGHTED_BLOCK)](
        y, weight, residual, z, C=C, TOP=top, BLOCK=WEIGHTED_BLOCK, OVERLAP=overlap, launch_pdl=overlap, num_warps=4
    )
    return z


# ----------------------------------------------------------------------------------------------- the Triton programs
@functools.cache
def triton_programs() -> SimpleNamespace:
    """Import Triton and define the kernels of this file; once."""
    # Kernels look up what they use among the names of their file.
    global tl, wait_for_input
    import triton
    import triton.language as tl

    kernels_overlap.triton_programs()  # which defines what is imported here
    from kernels_overlap import wait_for_input

    @triton.jit
    def route(
        logits, weight, expert, E: tl.constexpr, BE: tl.constexpr, TOP: tl.constexpr, BT: tl.constexpr,
        NORMALIZED: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """A program a token: the best of what is left, as often as wanted."""
        row, e, t = tl.program_id(0), tl.arange(0, BE), tl.arange(0, BT)
        wait_for_input(OVERLAP)
        v = tl.load(logits + row * E + e, mask=e < E, other=-float("inf")).to(tl.float32)
        p = tl.exp(v - tl.max(v))
        total = tl.sum(p)
        p = tl.where(e < E, p / total, -1.0)
        chosen, which = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.int32)
        for i in tl.static_range(TOP):
            best = tl.max(p)
            at = tl.minimum(tl.min(tl.where(p == best, e, BE)), E - 1)  # NaN equals nothing; some matrix must be read
            chosen, which = tl.where(t == i, best, chosen), tl.where(t == i, at, which)
            p = tl.where(e == at, -1.0, p)
        if NORMALIZED:
            chosen /= tl.sum(chosen)
        chosen = tl.where(total == total, chosen, total)  # NaN, which a maximum passes over
        tl.store(weight + row * TOP + t, chosen.to(weight.dtype.element_ty), mask=t < TOP)
        tl.store(expert + row * TOP + t, which.to(tl.int64), mask=t < TOP)

    @triton.jit
    def weighted(
        y, weight, residual, z, C: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
    ):
        """Program (token, part of its C features)."""
        row, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        wait_for_input(OVERLAP)
        acc = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(TOP):
            v = tl.load(y + (row * TOP + i) * C + c, mask=c < C, other=0.0).to(tl.float32)
            acc += v * tl.load(weight + row * TOP + i).to(tl.float32)
        if residual is not None:
            acc += tl.load(residual + row * C + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(z + row * C + c, acc.to(z.dtype.element_ty), mask=c < C)

    return SimpleNamespace(route=route, weighted=weighted)
