"""Triton kernels, each beside its plain PyTorch reference, behind one function.

Triton is imported when a kernel first runs, so that a machine without it (a CPU, a Mac) can import this file; there,
and on a CPU tensor, the reference runs. With TRITON_INTERPRET=1 the kernels themselves run on the CPU, for testing.

Try it:  python -c "import torch, kernels; print(kernels.read_sum(torch.ones(1 << 20)).sum())"

Sources: the Triton tutorials (https://triton-lang.org).
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def have_triton() -> bool:
    """Whether Triton kernels can run here: the package is there, and a GPU or Triton's interpreter."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(x: Tensor) -> bool:
    """Whether a kernel should run on this tensor, rather than its reference."""
    return have_triton() and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


# -------------------------------------------------------------------------------------------------------- read_sum
READ_BLOCK, READ_PROGRAMS = 8192, 2048


def read_sum_reference(x: Tensor) -> Tensor:
    """The sum of float32 [N] as partial sums float32 [P] in no particular grouping."""
    return x.sum()[None]


def read_sum(x: Tensor) -> Tensor:
    """Partial sums float32 [P] of a float32 vector [N]: every byte is read once, almost none written.

    What it takes is the machine's read bandwidth, the limit that decoding is measured against.
    """
    if not use_triton(x):
        return read_sum_reference(x)
    out = torch.empty(READ_PROGRAMS, device=x.device)
    _read_sum_kernel()[(READ_PROGRAMS,)](x, out, x.numel(), BLOCK=READ_BLOCK, num_warps=8)
    return out


@functools.cache
def _read_sum_kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, out, n, BLOCK: tl.constexpr):
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
            i = start.to(tl.int64) + tl.arange(0, BLOCK)
            total += tl.load(x + i, mask=i < n, other=0.0)
        tl.store(out + tl.program_id(0), tl.sum(total))

    return kernel


# --------------------------------------------------------------------------------------------- linears of few rows
def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., K] @ (weight int8 [N, K] * scale float32 [N]).T -> [..., N] in x's dtype."""
    return (F.linear(x, weight.to(x.dtype)).float() * scale).to(x.dtype)


def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., K] @ (weight float8_e4m3fn [N, K] * scale float32 [N]).T -> [..., N] in x's dtype."""
    return (F.linear(x, weight.to(x.dtype)).float() * scale).to(x.dtype)


def linear_int4(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x [..., K] @ W.T -> [..., N] in x's dtype, W = (nibble - zero) * scale.

    weight uint8 [N, K/2], the even column in the low nibble; scale, zero float16 [N, K/groupsize].
    """
    q = torch.stack([weight & 15, weight >> 4], dim=-1).view(*scale.shape, -1)
    w = (q.float() - zero[..., None].float()) * scale[..., None].float()
    return F.linear(x, w.flatten(-2).to(x.dtype))
