"""A mixture of experts for a few tokens: which experts, each row through its own, and their weighted sum.

    route       norm -> router -> a token's best experts and their weights, on the device: no host is asked
    experts     each row through its expert's matrix as it is stored (bf16, int8, fp8, int4), which is read once a row
    weighted    the sum of what a token's experts give, by weight, and the residual

Each beside its plain PyTorch reference; `experts` is kernels_linear.py's `gemv`, whose rows have a matrix each.

Shapes: N tokens, T experts a token of E; C, K, H features.

Try it:  TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py -k "expert or mixture"

Sources: Mixtral of Experts (arXiv 2401.04088).
"""

import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels_linear
import kernels_overlap
from kernels_linear import linear_reference
from kernels_one_pass import rms_norm_reference
from kernels_overlap import overlaps


# ---------------------------------------------------------------------------------------------------- the references
def route_reference(x, router, norm, eps, offset, count, top: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """What `route` computes, as model.MoE does: in x's dtype."""
    h = x.view(-1, x.shape[-1])
    h = h if norm is None else rms_norm_reference(h, norm, eps, offset)
    weight, expert = F.linear(h, router.to(h.dtype)).float().softmax(-1).topk(top, dim=-1)
    if normalized:
        weight = weight / weight.sum(-1, keepdim=True)
    return weight.to(x.dtype), expert


def experts_reference(x, weight, scale, expert, norm=None, eps=0.0, offset=0.0, activation="", early=False) -> Tensor:
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
def route(x, router, norm, eps, offset, count, top: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The operator hotloop::route: x [..., K] of N rows, router [E, K] -> (weight [N, T] in x's dtype, expert int64
    [N, T]), best first; of equal ones the lower id.

    norm, eps, offset: of an RMSNorm before the router, or None. The weights are softmax's, of all experts or,
    normalized, of the chosen ones alone. Sums are float32, and so are logits. count: int32 [N or more], zeros before
    and after.
    """
    K, E, device = x.shape[-1], router.shape[0], x.device
    x = x.contiguous()
    N, BN, BE, overlap = x.numel() // K, 4 if K <= 4096 else 1, 1 << (E - 1).bit_length(), overlaps(device)
    logits, weight = torch.empty(N, E, device=device), torch.empty(N, top, dtype=x.dtype, device=device)
    expert = torch.empty(N, top, dtype=torch.int64, device=device)
    triton_programs().route[N, -(-E // BN)](
        x, router, norm, eps, offset, logits, count, weight, expert, K=K, E=E, BK=1 << (K - 1).bit_length(), BN=BN,
        BE=BE, PART=min(BE, 32), TOP=top, NORMALIZED=normalized, OVERLAP=overlap, launch_pdl=overlap,
        num_warps=4 if K <= 4096 else 8,
    )  # fmt: skip
    return weight, expert


def experts(x, weight, scale, expert, norm, eps, offset, activation, early) -> Tensor:
    """The operator hotloop::experts: row r of x [N, K], or of [N T, K], through matrix expert.flatten()[r] -> [N T, H].

    expert: int64 [N, T]; of x [N, K] a row serves all T of its token. weight: E matrices [E, H, K] or, with an
    activation, of gates and what they gate [E, 2 H, K], stored as kernels_one_pass.dequantize says with E in front, and
    so is scale. norm, eps, offset: of an RMSNorm before it, or None. early: `expert` is older than what the kernel
    right before this one writes, so that matrices can be sent for while that one ends.
    """
    y = x.new_empty(expert.numel(), weight.shape[1] // (2 if activation else 1))
    kernels_linear.gemv(x.contiguous(), weight, scale, None, norm, None, y, eps, offset, activation, expert, early)
    return y


WEIGHTED_BLOCK = 512  # outputs a program


def weighted(y: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """The operator hotloop::weighted: y [N T, C], weight [N, T], residual [..., C] of N rows -> [N, C] or its shape."""
    y, residual = y.contiguous(), None if residual is None else residual.contiguous()
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
        x, router, norm, eps, offset, logits, count, weight, expert, K: tl.constexpr, E: tl.constexpr, BK: tl.constexpr,
        BN: tl.constexpr, BE: tl.constexpr, PART: tl.constexpr, TOP: tl.constexpr, NORMALIZED: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Program (token, BN experts): their logits. The last of a token's to have them finds each one's place."""
        row, k = tl.program_id(0), tl.arange(0, BK)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        w = tl.load(router + n[:, None] * K + k[None, :], mask=(n < E)[:, None] & (k < K)[None, :], other=0.0)
        inv = 1.0
        if norm is not None:
            scale = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32) + offset
        wait_for_input(OVERLAP)
        h = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        if norm is not None:
            inv = tl.rsqrt(tl.sum(h * h) / K + eps)
            h *= scale
        tl.store(logits + row * E + n, tl.sum(w.to(tl.float32) * h[None, :], 1) * inv, mask=n < E)
        tl.debug_barrier()  # all of the program's stores come before its arrival is counted
        if tl.atomic_add(count + row, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            tl.store(count + row, 0)
            e = tl.arange(0, BE)
            v = tl.load(logits + row * E + e, mask=e < E, other=-float("inf"), cache_modifier=".cg")
            p = tl.exp(v - tl.max(v))
            p /= tl.sum(p)
            mine = tl.where(v == v, v, float("inf"))  # NaN has a place, too
            place = tl.zeros([BE], tl.int32)  # how many are better
            for i in tl.static_range(0, BE, PART):
                f = i + tl.arange(0, PART)
                theirs = tl.load(logits + row * E + f, mask=f < E, other=-float("inf"), cache_modifier=".cg")
                theirs = tl.where(theirs == theirs, theirs, float("inf"))[None, :]
                better = (theirs > mine[:, None]) | ((theirs == mine[:, None]) & (f[None, :] < e[:, None]))
                place += tl.sum((better & (f < E)[None, :]).to(tl.int32), 1)
            chosen = (place < TOP) & (e < E)
            if NORMALIZED:
                p /= tl.sum(tl.where(chosen, p, 0.0))
            tl.store(weight + row * TOP + place, p.to(weight.dtype.element_ty), mask=chosen)
            tl.store(expert + row * TOP + place, e.to(tl.int64), mask=chosen)

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
