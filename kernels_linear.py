"""Linears of up to 16 rows: the stored weight (bf16, int8, fp8, int4) is streamed once. Two kernels, and the reference.

    gemv        one row, by each multiprocessor's plain arithmetic
    small       up to 16 rows, by tensor cores

Each has RMSNorm before the product, and bias, gate or residual add after it, in the same kernel.

Try it:  TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py -k linear

Sources: Stream-K (arXiv 2301.03598), "Who Says Elephants Can't Run" (arXiv 2211.10017).
"""

import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels_one_pass
import kernels_overlap
from kernels_one_pass import KINDS, dequantize, gated_reference, has_fp8, rms_norm_reference
from kernels_overlap import overlaps


def linear_reference(x, weight, scale=None, bias=None, norm=None, residual=None, eps=0.0, offset=0.0,
                     activation="") -> Tensor:  # fmt: skip
    """What `linear` computes, in plain PyTorch."""
    if norm is not None:
        x = rms_norm_reference(x, norm, eps, offset)
    # The scale goes on the result: the integers are exact in bf16. Not in fp16, where their sums overflow.
    if scale is not None and scale.ndim == 1 and x.dtype != torch.float16:
        y = (F.linear(x, weight.to(x.dtype)).float() * scale).to(x.dtype)
    else:
        y = F.linear(x, dequantize(weight, scale).to(x.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    if activation:
        y = gated_reference(y, activation)
    return y if residual is None else residual + y


# Of `gemv`, by kind and the largest K that it is for: warps, rows of W at a time and pipeline stages; measured on an
# H200 (benchmarks/NOTES.md).
CONFIGS = {
    "float": {2048: (4, 8, 3), 8192: (4, 4, 3), 16384: (8, 2, 4), 32768: (16, 2, 3)},
    "int8": {2048: (4, 8, 3), 8192: (4, 4, 3), 16384: (8, 4, 3), 32768: (16, 4, 3)},
    "fp8": {2048: (4, 8, 2), 8192: (4, 4, 2), 16384: (8, 4, 3), 32768: (16, 2, 3)},
    "int4": {2048: (4, 8, 3), 8192: (4, 4, 3), 16384: (8, 2, 3), 32768: (16, 2, 3)},
}
# The same for rows with a matrix each, where that differs.
CONFIGS_OF_EXPERTS = {"float": {1024: (1, 4, 3)}, "int8": {1024: (1, 8, 2)}, "fp8": {}, "int4": {1024: (2, 4, 3)}}


def linear(x, weight, scale, bias, norm, residual, eps, offset, activation) -> Tensor:
    """What `linear_reference` computes, in one kernel, for up to 16 rows."""
    K = x.shape[-1]
    M, N = x.numel() // K, weight.shape[0] // (2 if activation else 1)
    kind = KINDS.get(weight.dtype, "float")
    no_fp8 = kind == "fp8" and x.dtype != torch.bfloat16 and x.is_cuda and not has_fp8(x.device)
    if no_fp8 and M > 1:  # Triton converts fp8 since Ada only
        return linear_reference(x, weight, scale, bias, norm, residual, eps, offset, activation)
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    if M == 1 and fits_gemv(K, kind):
        gemv(x, weight, scale, bias, norm, residual, y, eps, offset, activation)
        return y
    # float32 has no tensor cores that are exact: tiles are small enough for registers.
    exact = x.dtype == torch.float32
    BM, (warps, BN, BK, stages) = 8 if M <= 8 else 16, (4, 32, 64, 2) if exact else SMALL_CONFIGS[M > 8][kind]
    while 16 < BK >= K:  # Triton 3.6 cannot compile a pipeline of a single step
        BK //= 2
    group = K // scale.shape[-1] if kind == "int4" else 0
    part, count = _workspace(x.device)
    data = weight.view(torch.uint8) if kind == "fp8" else weight
    tensors = (x.contiguous(), data, scale, bias, norm, residual, y)
    tricks = x.dtype == torch.bfloat16 and x.is_cuda
    settings = dict(
        KIND=kind, GROUP=group, ACTIVATION=activation, BM=BM, BN=BN, BK=group or BK, STAGES=stages, TRICKS=tricks,
        num_warps=warps,
    )  # fmt: skip
    tiles = -(-weight.shape[0] // BN) * -(-K // (group or BK))
    _launch(triton_programs().small, tensors, (part, count, M, N, K, eps, offset), settings, tiles)
    return y


def fits_gemv(K: int, kind: str) -> bool:
    """Whether `gemv` takes matrices of K columns: it reads them in words, and keeps x in registers."""
    return K <= max(CONFIGS[kind]) and (kind == "float" or K % 4 == 0)


def gemv(x, weight, scale, bias, norm, residual, y, eps, offset, activation, expert: Tensor | None = None,
         early: bool = False) -> None:  # fmt: skip
    """`linear` of one row x [..., K], into y [..., N].

    expert: int64, as many as y has rows. weight and scale are then stacks, and row r of y is of matrix expert[r] and of
    row r of x, or where x has fewer, of the one that serves as many of y as the others. early: it is older than what
    the kernel before this one writes.
    """
    K, N, R = x.shape[-1], y.shape[-1], y.numel() // y.shape[-1]
    kind = KINDS.get(weight.dtype, "float")
    configs = CONFIGS[kind] if expert is None else CONFIGS_OF_EXPERTS[kind] | CONFIGS[kind]  # the smallest first
    warps, rows, stages = next(c for limit, c in configs.items() if limit >= K)
    rows = max(1, rows // 2) if activation else rows
    words = weight if kind == "float" else weight.view(torch.int32)
    packed = x.dtype == torch.bfloat16 and (norm is None or norm.dtype == torch.bfloat16)
    settings = dict(
        KIND=kind, GROUP=K // scale.shape[-1] if kind == "int4" else 0, ACTIVATION=activation,
        EXACT=x.dtype == torch.float32, PACKED=packed, BN=rows, BK=1 << (K - 1).bit_length(), STAGES=stages,
        SHARED=R * K // x.numel(), EARLY=early, num_warps=warps,
    )  # fmt: skip
    tensors = (x, words, scale, bias, norm, residual, y)
    _launch(triton_programs().gemv, tensors, (expert, N, K, eps, offset), settings, -(-N // rows), R)


def _launch(kernel, tensors: tuple, more: tuple, settings: dict, tiles: int, rows: int = 1) -> None:
    """As many programs of a kernel as fill the GPU, evenly over the rows that have their own; at most one a tile."""
    x, _, _, bias, norm, residual, y = tensors
    overlap = overlaps(x.device)
    settings |= dict(OVERLAP=overlap, launch_pdl=overlap)
    dtypes = [t if t is None else t.dtype for t in (x, bias, norm, residual)]
    key = (kernel, x.device, x.shape[-1], y.shape[-1], tiles, rows, *settings.values(), *dtypes)
    if key not in _programs:
        compiled = kernel.warmup(*tensors, *more, **settings, grid=(1,)) if x.is_cuda else None
        _programs[key] = max(1, programs_for(compiled, tiles * rows, x.device) // rows)
    kernel[_programs[key], rows](*tensors, *more, **settings)


# Of `small`, for up to 8 rows and for 16: warps, rows of W and columns at a time (of int4 a group), pipeline stages.
SMALL_CONFIGS = (
    {"float": (8, 64, 128, 4), "int8": (4, 64, 256, 4), "fp8": (4, 64, 256, 3), "int4": (8, 512, 0, 4)},
    {"float": (8, 64, 128, 4), "int8": (4, 32, 256, 4), "fp8": (4, 64, 128, 4), "int4": (8, 128, 0, 4)},
)


@functools.cache
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the programs of `small` leave for one another; the kernels of a device run one after another.

    Room for two tiles [512, 16] of 8 programs a multiprocessor, and for a count a tile, which the kernel leaves zero.
    """
    n = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return torch.empty(n * 8 * 2 * 512 * 16, device=device), torch.zeros(1 << 16, dtype=torch.int32, device=device)


_programs: dict[tuple, int] = {}  # by all that a kernel's compiled form and its work depend on


def programs_for(compiled, tiles: int, device: torch.device) -> int:
    """How many persistent programs shall walk over `tiles`: as many as fit, or a few less where that divides better.

    Filling the GPU matters: programs that start while the kernel before them ends go where there is room, and would
    else crowd on some multiprocessors and leave others idle.
    """
    if compiled is None:  # under the interpreter
        return min(tiles, 4)
    compiled._init_handles()  # how many registers it takes is known only once it is loaded
    p = torch.cuda.get_device_properties(device)
    warps, registers = compiled.metadata.num_warps, -(-compiled.n_regs // 8) * 8
    fit = min(
        p.regs_per_multiprocessor // (32 * warps * registers),
        p.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024),
        p.max_threads_per_multi_processor // (32 * warps),
    )
    n = p.multi_processor_count
    evenness = {i: tiles / (i * n) / -(-tiles // (i * n)) for i in range(max(1, fit - 2), max(1, fit) + 1)}
    return min(tiles, n * max(evenness, key=lambda i: (round(evenness[i], 1), i)))


# ----------------------------------------------------------------------------------------------- the Triton programs
@functools.cache
def triton_programs() -> SimpleNamespace:
    """Import Triton and define the kernels of this file; once."""
    # Kernels look up what they use among the names of their file.
    global tl, INTERPRETED, wait_for_input, activated, as_numbers, centered_nibbles
    global four, byte_at, dp4a, largest, digits, by_place, weight_rows, finish, arrive
    import triton
    import triton.language as tl

    kernels_one_pass.triton_programs(), kernels_overlap.triton_programs()  # which define what is imported here
    from kernels_one_pass import INTERPRETED, activated, as_numbers, centered_nibbles
    from kernels_overlap import wait_for_input

    @triton.jit
    def four(x, norm, j, mask, offset, PACKED: tl.constexpr):
        """Elements 4j ... 4j + 3 of x, times the norm's weight where there is one; and the raw ones' sum of squares."""
        if PACKED:  # four bf16 in a 64-bit load; their bits are float32's upper half
            v = tl.load(x.to(tl.pointer_type(tl.int64)) + j, mask=mask, other=0)
            a, b = v.to(tl.int32), (v >> 32).to(tl.int32)
            x0, x1 = (a << 16).to(tl.float32, bitcast=True), (a & -65536).to(tl.float32, bitcast=True)
            x2, x3 = (b << 16).to(tl.float32, bitcast=True), (b & -65536).to(tl.float32, bitcast=True)
        else:
            x0 = tl.load(x + 4 * j, mask=mask, other=0.0).to(tl.float32)
            x1 = tl.load(x + 4 * j + 1, mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(x + 4 * j + 2, mask=mask, other=0.0).to(tl.float32)
            x3 = tl.load(x + 4 * j + 3, mask=mask, other=0.0).to(tl.float32)
        squares = x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
        if norm is not None:
            n0, n1, n2, n3, _ = four(norm, None, j, mask, 0.0, PACKED)
            x0, x1, x2, x3 = x0 * (n0 + offset), x1 * (n1 + offset), x2 * (n2 + offset), x3 * (n3 + offset)
        return x0, x1, x2, x3, squares

    @triton.jit
    def byte_at(q, i: tl.constexpr, KIND: tl.constexpr):
        """Byte i of each word as a float: int8 (offset by 128) as 1 + byte 2^-15, e4m3 as its value times 2^-120."""
        if KIND == "fp8":  # sign, exponent and mantissa moved to float32's places
            return (((q << (24 - 8 * i)) >> 4) & -2014314496).to(tl.float32, bitcast=True)  # 0x87F00000
        if INTERPRETED:
            return (((q >> (8 * i) & 0xFF) << 8) | 0x3F800000).to(tl.float32, bitcast=True)
        asm: tl.constexpr = "prmt.b32 $0, $1, 0x3F800000, $2;"  # bytes 0, i, 0x80 and 0x3F in one instruction
        u = tl.inline_asm_elementwise(asm, "=r,r,r", [q, 0x7604 + 16 * i], dtype=tl.int32, is_pure=True, pack=1)
        return u.to(tl.float32, bitcast=True)

    @triton.jit
    def dp4a(a, b, c):
        """c + the dot product of the four signed bytes of a and of b."""
        if INTERPRETED:
            for i in tl.static_range(4):
                c += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
            return c
        asm: tl.constexpr = "dp4a.s32.s32 $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)

    @triton.jit
    def largest(a, b, c, d):
        return tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))

    @triton.jit
    def digits(v):
        """Integers, given as floats below 2^21, as three signed bytes each: v = d0 + 256 d1 + 65536 d2."""
        # Adding 1.5 * 2^23 leaves the integer in the mantissa; adding 128 to each byte makes it unsigned, the last
        # exclusive or signed again.
        return ((v + 12582912.0).to(tl.int32, bitcast=True) + (0x00808080 - 0x4B400000)) ^ 0x00808080

    @triton.jit
    def by_place(t0, t1, t2, t3):
        """Four numbers' digits -> the words of their lowest, middle and highest digits."""
        if INTERPRETED:
            low = (t0 & 255) | ((t1 & 255) << 8) | ((t2 & 255) << 16) | ((t3 & 255) << 24)
            middle = ((t0 >> 8) & 255) | (t1 & 65280) | ((t2 & 65280) << 8) | ((t3 & 65280) << 16)
            high = ((t0 >> 16) & 255) | ((t1 >> 8) & 65280) | (t2 & 16711680) | ((t3 & 16711680) << 8)
            return low, middle, high
        asm: tl.constexpr = """{ .reg .b32 a, b, c, d;
            prmt.b32 a, $3, $4, 0x5140; prmt.b32 b, $5, $6, 0x5140;
            prmt.b32 c, $3, $4, 0x0062; prmt.b32 d, $5, $6, 0x0062;
            prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; prmt.b32 $2, c, d, 0x5410; }"""
        return tl.inline_asm_elementwise(
            asm, "=r,=r,=r,r,r,r,r", [t0, t1, t2, t3], dtype=(tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )

    @triton.jit
    def gemv(
        x, w, scale, bias, norm, residual, y, expert, N, K: tl.constexpr, eps, offset, KIND: tl.constexpr,
        GROUP: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr,
        BK: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """One row of x: each program keeps all of it (normalized) in registers and walks over rows of W, BN at a time.

        The walk is pipelined: the next rows are on their way while these are summed; and the first of them are sent for
        before x is waited for, while the kernel before this one still runs. Quantized weights are read as 32-bit words.
        A byte becomes a float by placing its bits in the mantissa of 1.0, one instruction instead of a slow conversion;
        what that adds, a multiple of x, is subtracted lane by lane, where it is small (EXACT, for float32 x: before the
        product). Nibbles are multiplied as integers, four to an instruction: the x of each group become integers of
        15 bits (EXACT: 20), relative to the group's largest, and these two or three signed bytes.

        With experts, the grid's second axis are rows of y, each with a matrix of its own; SHARED of them have one row
        of x. Whose matrix that is may have been found by the kernel before this one, unless it was EARLY.
        """
        R: tl.constexpr = BN * 2 if ACTIVATION != "" else BN
        r = tl.arange(0, R)
        begin = tl.program_id(0) * BN
        inv = 1.0
        if expert is not None:
            if not EARLY:
                wait_for_input(OVERLAP)
            row = tl.program_id(1)
            # Which, from L2: L1 may remember an earlier layer's if this comes before the wait. And its first row.
            which = tl.load(expert + row, cache_modifier=".cg")
            first = which * (N * 2 if ACTIVATION != "" else N)
            w += first * (K if KIND == "float" else K // 8 if KIND == "int4" else K // 4)
            if scale is not None:
                scale += first * (K // GROUP if KIND == "int4" else 1)
            x += row // SHARED * K
            y += row * N
        # x: four vectors, or the words of its digits; what to subtract, or the groups' exponents and sums
        if KIND == "float":
            k = tl.arange(0, BK)
            mk = k < K
            x0 = tl.zeros([BK], tl.float32)
        elif KIND == "int4":
            W: tl.constexpr = GROUP // 8  # words a group
            group = tl.arange(0, BK // GROUP)
            j = group[:, None] * W + tl.arange(0, W)[None, :]
            mg, mk = group < K // GROUP, j < K // 8
            x0 = tl.zeros([BK // GROUP, W], tl.int32)
            x1, x2, x3, x4, x5 = x0, x0, x0, x0, x0
            unit, sum_x = tl.zeros([BK // GROUP], tl.float32), tl.zeros([BK // GROUP], tl.float32)
        else:
            j = tl.arange(0, BK // 4)
            mk = j < K // 4
            x0 = tl.zeros([BK // 4], tl.float32)
            x1, x2, x3, excess = x0, x0, x0, x0
            ONE: tl.constexpr = 1.00390625 if KIND == "int8" else 0.0  # what a weight of 0 looks like
            BIAS: tl.constexpr = ONE if EXACT else 0.0
        for n0 in tl.range(begin, N, tl.num_programs(0) * BN, num_stages=STAGES):
            n = n0 + tl.arange(0, BN)
            if ACTIVATION != "":  # gate and up in turn
                rows = tl.minimum(n0 + r // 2, N - 1) + (r % 2) * N
            else:
                rows = tl.minimum(n0 + r, N - 1)
            at = rows.to(tl.int64)
            if KIND == "float":
                q = tl.load(w + at[:, None] * K + k[None, :], mask=mk[None, :], other=0.0)
            elif KIND == "int4":
                q = tl.load(w + at[:, None, None] * (K // 8) + j[None, :, :], mask=mk[None, :, :], other=0)
                sz = tl.load(scale + at[:, None] * (K // GROUP) + group[None, :], mask=mg[None, :], other=0)
            else:
                q = tl.load(w + at[:, None] * (K // 4) + j[None, :], mask=mk[None, :], other=0)
            if n0 == begin:
                if expert is None or EARLY:
                    wait_for_input(OVERLAP)
                if KIND == "float":
                    x0 = tl.load(x + k, mask=mk, other=0.0).to(tl.float32)
                    if norm is not None:
                        inv = tl.rsqrt(tl.sum(x0 * x0) / K + eps)
                        x0 *= (tl.load(norm + k, mask=mk, other=0.0).to(tl.float32) + offset) * inv
                elif KIND == "int4":
                    a0, a1, a2, a3, squares = four(x, norm, 2 * j, mk, offset, PACKED)
                    a4, a5, a6, a7, more = four(x, norm, 2 * j + 1, mk, offset, PACKED)
                    if norm is not None:
                        inv = tl.rsqrt(tl.sum(tl.sum(squares + more, 1)) / K + eps)
                    top = largest(largest(a0, a1, a2, a3), a4, a5, tl.maximum(tl.abs(a6), tl.abs(a7)))
                    # 2^e is the largest power of two in a group, and the unit 2^(e - 13) or 2^(e - 19)
                    PLACES: tl.constexpr = 19 if EXACT else 13
                    e = tl.maximum(tl.max(top, 1).to(tl.int32, bitcast=True) & 0x7F800000, 0x20000000)
                    unit = (e - PLACES * 0x00800000).to(tl.float32, bitcast=True)
                    up = ((127 + PLACES) * 0x00800000 - (e - 127 * 0x00800000)).to(tl.float32, bitcast=True)[:, None]
                    x0, x1, x2 = by_place(digits(a0 * up), digits(a2 * up), digits(a4 * up), digits(a6 * up))
                    x3, x4, x5 = by_place(digits(a1 * up), digits(a3 * up), digits(a5 * up), digits(a7 * up))
                    # of the rounded ones, so that what rounding does is multiplied by weights, not by nibbles
                    ones = tl.full([BK // GROUP, W], 0x01010101, tl.int32)
                    p = dp4a(ones, x5, dp4a(ones, x2, tl.zeros([BK // GROUP, W], tl.int32))) << 8
                    p = dp4a(ones, x4, dp4a(ones, x1, p)) << 8
                    p = dp4a(ones, x3, dp4a(ones, x0, p))
                    sum_x = tl.sum(p, 1).to(tl.float32) * unit
                else:
                    x0, x1, x2, x3, squares = four(x, norm, j, mk, offset, PACKED)
                    # 2^15; or 2^60, and again at the end: in two steps, away from float32's subnormals
                    up = 32768.0 if KIND == "int8" else 1152921504606846976.0
                    if norm is not None:
                        up *= tl.rsqrt(tl.sum(squares) / K + eps)
                    x0, x1, x2, x3 = x0 * up, x1 * up, x2 * up, x3 * up
                    excess = (ONE - BIAS) * (x0 + x1 + x2 + x3)
            if KIND == "float":
                d = tl.sum(q.to(tl.float32) * x0[None, :], 1)
            elif KIND == "int4":
                low, high = q & 0x0F0F0F0F, (q >> 4) & 0x0F0F0F0F
                p = tl.zeros([R, BK // GROUP, W], tl.int32)
                if EXACT:
                    p = dp4a(high, x5[None, :, :], dp4a(low, x2[None, :, :], p)) << 8
                p = dp4a(high, x4[None, :, :], dp4a(low, x1[None, :, :], p)) << 8
                p = dp4a(high, x3[None, :, :], dp4a(low, x0[None, :, :], p))
                s = (sz & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                z = (sz >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                d = tl.sum((tl.sum(p, 2).to(tl.float32) * unit[None, :] - z * sum_x[None, :]) * s, 1) * inv
            else:
                if KIND == "int8":
                    q = q ^ -2139062144  # 0x80808080: from -128 ... 127 to 0 ... 255
                p = (byte_at(q, 0, KIND) - BIAS) * x0[None, :] - excess[None, :]
                p += (byte_at(q, 1, KIND) - BIAS) * x1[None, :]
                p += (byte_at(q, 2, KIND) - BIAS) * x2[None, :]
                p += (byte_at(q, 3, KIND) - BIAS) * x3[None, :]
                d = tl.sum(p, 1) * tl.load(scale + rows)
                if KIND == "fp8":
                    d *= 1152921504606846976.0
            if bias is not None:
                d += tl.load(bias + rows).to(tl.float32)
            if ACTIVATION != "":
                gate, up = tl.split(tl.reshape(d, [BN, 2]))
                d = activated(gate, ACTIVATION) * up
            if residual is not None:
                d += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(y + n, d.to(y.dtype.element_ty), mask=n < N)

    @triton.jit
    def weight_rows(tile, N, ACTIVATION: tl.constexpr, BN: tl.constexpr):
        """The rows of W in a tile: BN outputs, or gate and up of half as many in turn. N outputs."""
        r = tl.arange(0, BN)
        if ACTIVATION != "":
            return tl.minimum(tile * (BN // 2) + r // 2, N - 1) + (r % 2) * N
        return tl.minimum(tile * BN + r, N - 1)

    @triton.jit
    def finish(
        acc, tile, scale, bias, residual, y, M, N, KIND: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr,
        BN: tl.constexpr,
    ):  # fmt: skip
        """Sums [BN, BM] of a tile -> scale, bias, activation or residual, and out."""
        rows, m = weight_rows(tile, N, ACTIVATION, BN), tl.arange(0, BM)
        if scale is not None and KIND != "int4":
            acc *= tl.load(scale + rows)[:, None]
        if bias is not None:
            acc += tl.load(bias + rows).to(tl.float32)[:, None]
        if ACTIVATION != "":
            gate, up = tl.split(tl.permute(tl.reshape(acc, [BN // 2, 2, BM]), [0, 2, 1]))
            acc = activated(gate, ACTIVATION) * up
            n = tile * (BN // 2) + tl.arange(0, BN // 2)
        else:
            n = tile * BN + tl.arange(0, BN)
        at, mask = m[None, :] * N + n[:, None], (n < N)[:, None] & (m < M)[None, :]
        if residual is not None:
            acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)

    @triton.jit
    def arrive(
        part, count, tile, done, per, scale, bias, residual, y, M, N, STEPS: tl.constexpr, KIND: tl.constexpr,
        ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        """Count `done` steps of a tile that several programs share; the last of them to arrive adds their parts."""
        if tl.atomic_add(count + tile, done, sem="acq_rel") + done == STEPS:
            r, m = tl.arange(0, BN), tl.arange(0, BM)
            acc = tl.zeros([BN, BM], tl.float32)
            for j in tl.range(tile * STEPS // per, (tile * STEPS + STEPS - 1) // per + 1):
                theirs = part + (j * 2 + (tile != j * per // STEPS).to(tl.int32)) * BN * BM
                acc += tl.load(
                    theirs + r[:, None] * BM + m[None, :], mask=(m < M)[None, :], other=0.0, cache_modifier=".cg"
                )
            tl.store(count + tile, 0)
            finish(acc, tile, scale, bias, residual, y, M, N, KIND, ACTIVATION, BM, BN)

    @triton.jit(do_not_specialize=["M"])  # one program for all numbers of rows
    def small(
        x, w, scale, bias, norm, residual, y, part, count, M, N, K: tl.constexpr, eps, offset, KIND: tl.constexpr,
        GROUP: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
        STAGES: tl.constexpr, OVERLAP: tl.constexpr, TRICKS: tl.constexpr,
    ):  # fmt: skip
        """2 ... BM rows: tensor cores, with the weights as the tall operand and the rows of x padded to BM.

        Stream-K (arXiv 2301.03598): the tiles of BN rows of W, of STEPS steps each, are one sequence that is cut into
        equal shares, one a program, so that small matrices fill the GPU too. A tile that is shared is left in `part`,
        and finished by the last of its programs. A step is BK columns of W; of int4 one group.
        """
        STEPS: tl.constexpr = (K + BK - 1) // BK
        EVEN: tl.constexpr = K % BK == 0
        dtype: tl.constexpr = x.dtype.element_ty
        steps = tl.cdiv(N * (2 if ACTIVATION != "" else 1), BN) * STEPS
        per = tl.cdiv(steps, tl.num_programs(0))
        start = tl.program_id(0) * per
        end = tl.minimum(start + per, steps)
        r, m, k = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BK)
        mm = m < M
        wait_for_input(OVERLAP)
        if start < end:
            inv = tl.full([BM], 1.0, tl.float32)
            if norm is not None:
                squares = tl.zeros([BM, 512], tl.float32)
                for k0 in tl.range(0, K, 512, num_stages=4):
                    c = k0 + tl.arange(0, 512)
                    v = tl.load(x + m[:, None] * K + c[None, :], mask=mm[:, None] & (c < K)[None, :], other=0.0)
                    squares += v.to(tl.float32) * v.to(tl.float32)
                inv = tl.rsqrt(tl.sum(squares, 1) / K + eps)
            mine = part + tl.program_id(0) * 2 * BN * BM + r[:, None] * BM + m[None, :]
            acc = tl.zeros([BN, BM], tl.float32)
            for u in tl.range(start, end, num_stages=STAGES):
                tile, step = u // STEPS, u % STEPS
                rows = weight_rows(tile, N, ACTIVATION, BN).to(tl.int64)
                if KIND == "int4":
                    H: tl.constexpr = GROUP // 2
                    h = tl.arange(0, H)
                    q = tl.load(w + rows[:, None] * (K // 2) + step * H + h[None, :])
                    sz = tl.load(scale + rows * (K // GROUP) + step)
                    c = step * GROUP + 2 * h
                    even = tl.load(x + m[None, :] * K + c[:, None], mask=mm[None, :], other=0.0)
                    odd = tl.load(x + m[None, :] * K + c[:, None] + 1, mask=mm[None, :], other=0.0)
                    if norm is not None:
                        n0 = (tl.load(norm + c).to(tl.float32) + offset)[:, None] * inv[None, :]
                        n1 = (tl.load(norm + c + 1).to(tl.float32) + offset)[:, None] * inv[None, :]
                        even, odd = (even.to(tl.float32) * n0).to(dtype), (odd.to(tl.float32) * n1).to(dtype)
                    low, high = centered_nibbles(q, dtype, TRICKS)
                    ones = tl.full([BN, H], 1.0, dtype)  # the sum of x, where the tensor cores leave the products
                    d = tl.dot(high, odd, tl.dot(low, even, input_precision="ieee"), input_precision="ieee")
                    sum_x = tl.dot(ones, odd, tl.dot(ones, even, input_precision="ieee"), input_precision="ieee")
                    s = (sz & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                    z = (sz >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) - 8
                    acc += s[:, None] * (d - z[:, None] * sum_x)
                else:
                    c = step * BK + k
                    if EVEN:
                        q = tl.load(w + rows[:, None] * K + c[None, :])
                        v = tl.load(x + m[None, :] * K + c[:, None], mask=mm[None, :], other=0.0)
                    else:
                        q = tl.load(w + rows[:, None] * K + c[None, :], mask=(c < K)[None, :], other=0)
                        v = tl.load(x + m[None, :] * K + c[:, None], mask=mm[None, :] & (c < K)[:, None], other=0.0)
                    if norm is not None:
                        weight = (tl.load(norm + c, mask=c < K, other=0.0).to(tl.float32) + offset)[:, None]
                        v = (v.to(tl.float32) * weight * inv[None, :]).to(dtype)
                    acc = tl.dot(as_numbers(q, dtype, KIND, TRICKS), v, acc, input_precision="ieee")
                if step == STEPS - 1:
                    if u - STEPS + 1 >= start:
                        finish(acc, tile, scale, bias, residual, y, M, N, KIND, ACTIVATION, BM, BN)
                    else:
                        tl.store(mine, acc, mask=mm[None, :])
                    acc = tl.zeros([BN, BM], tl.float32)
            head, tail = start // STEPS, (end - 1) // STEPS
            if end % STEPS != 0:
                tl.store(mine + (tail != head).to(tl.int32) * BN * BM, acc, mask=mm[None, :])
            tl.debug_barrier()  # all of the program's stores come before its arrival is counted
            if (start % STEPS != 0) | ((head == tail) & (end % STEPS != 0)):
                done = tl.minimum(end, head * STEPS + STEPS) - start
                arrive(
                    part, count, head, done, per, scale, bias, residual, y, M, N, STEPS, KIND, ACTIVATION, BM, BN
                )
            if (tail != head) & (end % STEPS != 0):
                done = end - tail * STEPS
                arrive(
                    part, count, tail, done, per, scale, bias, residual, y, M, N, STEPS, KIND, ACTIVATION, BM, BN
                )

    return SimpleNamespace(gemv=gemv, small=small)
