"""Kernels that pass over memory once, each beside its plain PyTorch reference; and what other kernels fuse of them.

    rms_norm, gated     what a long prompt needs between its matrix products
    dequantized         a stored weight as a matrix, for such a product
    read_sum            reads memory and does nothing else: the bandwidth that all kernels are measured against

Here is also how weights are stored (`dequantize`). The references run anywhere; the kernels where kernels.py finds that
they can.

Try it:  TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py -k "norm or gated or dequantized or read_sum"

Source, for turning integers into floats by their bits rather than by conversion instructions: "Who Says Elephants Can't
Run" (arXiv 2211.10017).
"""

import functools
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = {torch.uint8: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether Triton can convert e4m3 on a GPU."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


# ---------------------------------------------------------------------------------------------------- the references
def dequantize(weight: Tensor, scale: Tensor | None, zero: Tensor | None = None) -> Tensor:
    """A stored weight as the float32 matrix [N, K] that it stands for.

    bf16, fp16 or float32 [N, K] with no scale; int8 or float8_e4m3fn [N, K] with scale float32 [N]; int4 as uint8
    [N, K/2] (even column in the low nibble) with scale and zero float16 [N, K/groupsize], or both in one word as
    `join_scales` packs them: W = (nibble - zero) * scale.
    """
    if scale is None:
        return weight.float()
    if scale.dtype == torch.int32:
        scale, zero = split_scales(scale)
    if zero is None:
        return weight.float() * scale[:, None]
    q = torch.stack([weight & 15, weight >> 4], dim=-1).view(*scale.shape, -1).float()
    return ((q - zero[..., None].float()) * scale[..., None].float()).flatten(1)


def join_scales(scale: Tensor, zero: Tensor) -> Tensor:
    """int4's float16 scales and zeros -> one int32 word each, the scale in the low half: one load for a kernel."""
    return torch.stack([scale, zero], dim=-1).view(torch.int32)[..., 0]


def split_scales(words: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `join_scales`."""
    return words.contiguous().view(torch.float16).unflatten(-1, (-1, 2)).unbind(-1)


def activate(name: str, gate: Tensor) -> Tensor:
    """The activation of that name, as model.ACTIVATIONS has it."""
    return F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """What `rms_norm` computes, as model.RMSNorm does."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (weight.float() + offset)).to(x.dtype)


def gated_reference(gate_up: Tensor, activation: str) -> Tensor:
    """What `gated` computes, as model.NormGateUp does."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(activation, gate) * up


def dequantized_reference(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `dequantized` computes."""
    return dequantize(weight, scale).to(dtype)


# ------------------------------------------------------------------------------------------------------ the launchers
READ_BLOCK, READ_PROGRAMS = 8192, 2048


def read_sum(x: Tensor) -> Tensor:
    """Partial sums float32 [P] of a float32 vector [N]."""
    out = torch.empty(READ_PROGRAMS, device=x.device)
    triton_programs().read_sum[(READ_PROGRAMS,)](x, out, x.numel(), BLOCK=READ_BLOCK, num_warps=8)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """The operator hotloop::rms_norm: x [..., C] -> x / rms(x) * (offset + weight), in float32, in x's dtype."""
    x = x.contiguous()
    y, C = torch.empty_like(x), x.shape[-1]
    columns = 1 << (C - 1).bit_length()
    warps = max(1, min(16, columns // 512))
    triton_programs().rms_norm[(x.numel() // C,)](x, weight, y, eps, offset, C=C, BC=columns, num_warps=warps)
    return y


GATED_BLOCK = 1024  # outputs a program


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """The operator hotloop::gated: [..., 2 H], gates and then what they gate -> activation(gate) * up [..., H]."""
    H = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], H)
    grid = (y.numel() // H, -(-H // GATED_BLOCK))
    triton_programs().gated[grid](gate_up.contiguous(), y, H=H, ACTIVATION=activation, BLOCK=GATED_BLOCK, num_warps=4)
    return y


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The operator hotloop::dequantized: `dequantize` of a quantized weight, [N, K] in dtype, for a matrix product."""
    kind, columns = KINDS[weight.dtype], weight.shape[1]
    no_fp8 = kind == "fp8" and dtype != torch.bfloat16 and weight.is_cuda and not has_fp8(weight.device)
    if no_fp8:
        return dequantized_reference(weight, scale, dtype)
    K = 2 * columns if kind == "int4" else columns
    y = torch.empty(len(weight), K, dtype=dtype, device=weight.device)
    group = K // scale.shape[1] if kind == "int4" else 0
    block = min(4096, 1 << (K - 1).bit_length())
    grid = (-(-y.numel() // block),) if group else (len(weight), -(-K // block))
    data = weight.view(torch.uint8) if kind == "fp8" else weight
    tricks = dtype == torch.bfloat16 and weight.is_cuda
    triton_programs().dequantized[grid](
        data, scale, y, scale.numel(), K=K, KIND=kind, GROUP=group, BLOCK=block, TRICKS=tricks, num_warps=4
    )
    return y


# ----------------------------------------------------------------------------------------------- the Triton programs
@functools.cache
def triton_programs() -> SimpleNamespace:
    """Import Triton and define the kernels of this file; once."""
    # Kernels look up what they use among the names of their file.
    global tl, INTERPRETED, activated, as_numbers, centered_nibbles
    import triton
    import triton.language as tl

    INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # it knows no inline assembly

    @triton.jit
    def read_sum(x, out, n, BLOCK: tl.constexpr):
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
            i = start + tl.arange(0, BLOCK).to(tl.int64)
            total += tl.load(x + i, mask=i < n, other=0.0)
        tl.store(out + tl.program_id(0), tl.sum(total))

    @triton.jit
    def activated(v, ACTIVATION: tl.constexpr):
        if ACTIVATION == "silu":
            v = v / (1 + tl.exp(-v))
        elif ACTIVATION == "gelu_tanh":
            e = tl.exp(1.5957691216057308 * (v + 0.044715 * v * v * v))  # 2 sqrt(2 / pi)
            v = v * (1 - 1 / (e + 1))
        else:
            v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
        return v

    # In what follows, a branch that is not taken must not be reached either: Triton compiles what comes after a return.
    @triton.jit
    def as_numbers(q, dtype: tl.constexpr, KIND: tl.constexpr, TRICKS: tl.constexpr):
        """A tile of weights, int8 or e4m3 as bytes, in the dtype of x; the scale is left for the sums.

        TRICKS: to bf16 by moving bits, several to an instruction, where conversions would be the slowest part.
        """
        if KIND == "float":
            v = q.to(dtype)
        elif TRICKS:
            if KIND == "int8":  # 128 + the low seven bits, minus 128 or 256 by the sign bit: the same bits, two masks
                asm: tl.constexpr = """{ .reg .b32 p, r, s, t, minus_one;
                    mov.b32 minus_one, 0xBF80BF80; prmt.b32 p, $2, 0, 0x4140; prmt.b32 r, $2, 0, 0x4342;
                    lop3.b32 s, p, 0x00800080, 0x43004300, 0xEA; lop3.b32 t, r, 0x00800080, 0x43004300, 0xEA;
                    lop3.b32 p, p, 0x007F007F, 0x43004300, 0xEA; lop3.b32 r, r, 0x007F007F, 0x43004300, 0xEA;
                    fma.rn.bf16x2 $0, s, minus_one, p; fma.rn.bf16x2 $1, t, minus_one, r; }"""
            else:  # sign, exponent and mantissa moved to bf16's places, and 2^120 for what the exponents then differ by
                asm: tl.constexpr = """{ .reg .b32 a, b, s, t, k, z;
                    mov.b32 k, 0x7B807B80; mov.b32 z, 0x80008000;
                    prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424; shr.b32 s, a, 4; shr.b32 t, b, 4;
                    and.b32 s, s, 0x07F007F0; and.b32 t, t, 0x07F007F0;
                    lop3.b32 a, a, z, s, 0xEA; lop3.b32 b, b, z, t, 0xEA;
                    fma.rn.bf16x2 $0, a, k, z; fma.rn.bf16x2 $1, b, k, z; }"""
            v = tl.inline_asm_elementwise(asm, "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4)
        elif KIND == "int8":
            v = q.to(dtype)
        else:
            v = q.to(tl.float8e4nv, bitcast=True).to(dtype)
        return v

    @triton.jit
    def centered_nibbles(q, dtype: tl.constexpr, TRICKS: tl.constexpr):
        """Bytes of two nibbles -> (low - 8, high - 8)."""
        if TRICKS:
            asm: tl.constexpr = """{ .reg .b32 p, r, s, t, one, k;
                mov.b32 one, 0x3F803F80; mov.b32 k, 0xC308C308;
                prmt.b32 p, $4, 0, 0x4140; prmt.b32 r, $4, 0, 0x4342; shr.b32 s, p, 4; shr.b32 t, r, 4;
                lop3.b32 p, p, 0x000F000F, 0x43004300, 0xEA; lop3.b32 r, r, 0x000F000F, 0x43004300, 0xEA;
                lop3.b32 s, s, 0x000F000F, 0x43004300, 0xEA; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
                fma.rn.bf16x2 $0, p, one, k; fma.rn.bf16x2 $1, r, one, k;
                fma.rn.bf16x2 $2, s, one, k; fma.rn.bf16x2 $3, t, one, k; }"""
            low, high = tl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r", [q], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            low, high = ((q & 15).to(tl.int8) - 8).to(dtype), ((q >> 4).to(tl.int8) - 8).to(dtype)
        return low, high

    @triton.jit
    def rms_norm(x, weight, y, eps, offset, C: tl.constexpr, BC: tl.constexpr):
        """A program a row."""
        c = tl.arange(0, BC)
        at = tl.program_id(0).to(tl.int64) * C + c
        h = tl.load(x + at, mask=c < C, other=0.0).to(tl.float32)
        h *= tl.rsqrt(tl.sum(h * h) / C + eps)
        h *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32) + offset
        tl.store(y + at, h.to(y.dtype.element_ty), mask=c < C)

    @triton.jit
    def gated(x, y, H: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
        """Program (row, part of its H outputs)."""
        row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(x + row * 2 * H + i, mask=i < H, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * H + H + i, mask=i < H, other=0.0).to(tl.float32)
        tl.store(y + row * H + i, (activated(gate, ACTIVATION) * up).to(y.dtype.element_ty), mask=i < H)

    @triton.jit
    def dequantized(
        w, scale, y, groups, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
        TRICKS: tl.constexpr,
    ):  # fmt: skip
        """Program (row, part of its K columns); of int4, whose groups lie one behind the other, some of these."""
        dtype: tl.constexpr = y.dtype.element_ty
        if KIND == "int4":
            g = tl.program_id(0).to(tl.int64) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
            h, m = tl.arange(0, GROUP // 2), g < groups
            q = tl.load(w + (g * (GROUP // 2))[:, None] + h[None, :], mask=m[:, None], other=0)
            sz = tl.load(scale + g, mask=m, other=0)
            s = (sz & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)[:, None]
            z = (sz >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)[:, None] - 8
            low, high = centered_nibbles(q, dtype, TRICKS)
            v = tl.interleave((low.to(tl.float32) - z) * s, (high.to(tl.float32) - z) * s).to(dtype)
            tl.store(y + (g * GROUP)[:, None] + tl.arange(0, GROUP)[None, :], v, mask=m[:, None])
        else:
            row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            q = tl.load(w + row * K + i, mask=i < K, other=0)
            v = as_numbers(q, dtype, KIND, TRICKS).to(tl.float32) * tl.load(scale + row)
            tl.store(y + row * K + i, v.to(dtype), mask=i < K)

    return SimpleNamespace(read_sum=read_sum, rms_norm=rms_norm, gated=gated, dequantized=dequantized)
