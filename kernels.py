"""Triton kernels for decoding on a GPU, each beside its plain PyTorch reference, behind one function.

    linear      x [..., K] through a weight as it is stored (bf16, int8, fp8, int4), streamed once for up to 16 rows;
                for one row with RMSNorm before it and bias, gate or residual add after it in the same kernel
    attend      one new token a row: RoPE, the write to the KV cache, and attention split over the context
    read_sum    reads memory and does nothing else: the bandwidth that all of this is measured against

`fuse(model)` swaps modules that use them into a model's five seams. Triton is imported when a kernel is first wanted,
so that a machine without it can import this file; there, and on a CPU, the references run. Under TRITON_INTERPRET=1
the kernels run on the CPU, for tests.

Try it:  TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py

Sources: Flash-Decoding (https://pytorch.org/blog/flash-decoding/), online softmax (arXiv 1805.02867), and for turning
integers into floats by their bits rather than by conversion instructions: "Who Says Elephants Can't Run" (2211.10017).
"""

import functools
import os
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_M = 16  # rows up to which weights are streamed once; beyond, matrix products are bound by arithmetic


_found_triton: bool | None = None  # not functools.cache, which torch.compile would look through


def have_triton() -> bool:
    """Whether kernels can run here: Triton is installed, and there is a GPU that it knows, or its interpreter."""
    global _found_triton
    if _found_triton is None:
        _found_triton = _find_triton()
    return _found_triton


# What torch.compiler.assume_constant_result sets; the decorator itself imports torch._dynamo, a second of every start.
have_triton._dynamo_marked_constant = True


def _find_triton() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":
        if not torch.cuda.is_available():
            return False
        if torch.cuda.get_device_capability() < (8, 0):
            print("kernels: this GPU is older than compute capability 8.0, plain PyTorch runs instead", file=sys.stderr)
            return False
    try:
        import triton  # noqa: F401
    except ImportError:
        print("kernels: Triton is not installed, plain PyTorch runs instead", file=sys.stderr)
        return False
    return True


def use_triton(x: Tensor) -> bool:
    """Whether a kernel should run on this tensor, rather than its reference."""
    return (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and have_triton()


# ---------------------------------------------------------------------------------------------------- the references
def dequantize(weight: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """A stored weight as the float32 matrix [N, K] that it stands for.

    bf16, fp16 or float32 [N, K] with no scale; int8 or float8_e4m3fn [N, K] with scale float32 [N]; int4 as uint8
    [N, K/2] (even column in the low nibble) with scale and zero float16 [N, K/groupsize]: W = (nibble - zero) * scale.
    """
    if scale is None:
        return weight.float()
    if zero is None:
        return weight.float() * scale[:, None]
    q = torch.stack([weight & 15, weight >> 4], dim=-1).view(*scale.shape, -1).float()
    return ((q - zero[..., None].float()) * scale[..., None].float()).flatten(1)


def activate(name: str, gate: Tensor) -> Tensor:
    """The activation of that name, as model.ACTIVATIONS has it."""
    return F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")


def linear_reference(x, weight, scale=None, zero=None, bias=None, norm=None, residual=None, eps=0.0, offset=0.0,
                     activation="") -> Tensor:  # fmt: skip
    """What `linear` computes, in plain PyTorch."""
    if norm is not None:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        x = (h * (norm.float() + offset)).to(x.dtype)
    # The scale goes on the result: the integers are exact in bf16. Not in fp16, where their sums overflow.
    if scale is not None and zero is None and x.dtype != torch.float16:
        y = (F.linear(x, weight.to(x.dtype)).float() * scale).to(x.dtype)
    else:
        y = F.linear(x, dequantize(weight, scale, zero).to(x.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    if activation:
        gate, up = y.chunk(2, dim=-1)
        y = activate(activation, gate) * up
    return y if residual is None else residual + y


# -------------------------------------------------------------------------------------------------------- read_sum
READ_BLOCK, READ_PROGRAMS = 8192, 2048


def read_sum(x: Tensor) -> Tensor:
    """Partial sums float32 [P] of a float32 vector [N]: every byte is read once, almost none written."""
    if not use_triton(x):
        return x.sum()[None]
    out = torch.empty(READ_PROGRAMS, device=x.device)
    _triton().read_sum[(READ_PROGRAMS,)](x, out, x.numel(), BLOCK=READ_BLOCK, num_warps=8)
    return out


# ---------------------------------------------------------------------------------------------------------- linear
def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """x [..., K] @ W.T -> [..., N] in x's dtype, sums in float32, W stored as `dequantize` says.

    Up to 16 rows stream the weight once; more rows are a matrix product with the weight dequantized.
    """
    if use_triton(x) and x.numel() // x.shape[-1] <= SMALL_M:
        if not torch.compiler.is_compiling():
            _triton()  # registers the operator; `fuse` did so for a model
        return torch.ops.hotloop.linear(x, weight, scale, zero, None, None, None, 0.0, 0.0, "")
    return linear_reference(x, weight, scale, zero)


def _config(kind: str, K: int) -> dict:
    """Warps, rows at a time, programs a multiprocessor and pipeline stages of `gemv`; from benchmarks/NOTES.md."""
    warps = 4 if K <= 8192 else 8 if K <= 16384 else 16
    if kind == "float":
        return dict(num_warps=warps, BN=2, programs=8, STAGES=2)
    if kind == "int4":
        return dict(num_warps=warps, BN=2, programs=4, STAGES=3)
    return dict(num_warps=warps, BN=2, programs=6, STAGES=4)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _linear(x, weight, scale, zero, bias, norm, residual, eps, offset, activation) -> Tensor:
    """The operator hotloop::linear: `linear_reference` in one kernel; norm, bias and so on for one row only."""
    K = x.shape[-1]
    M, N = x.numel() // K, weight.shape[0] // (2 if activation else 1)
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    kind = {torch.uint8: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(weight.dtype, "float")
    group = K // scale.shape[1] if zero is not None else 0
    if M > 1:
        BN, BK = 64, 128
        _triton().small[(-(-N // BN),)](
            x, weight, scale, zero, y, M, N, K, KIND=kind, GROUP=group, BM=16, BN=BN, BK=BK, num_warps=4, num_stages=4
        )
        return y
    config = _config(kind, K)
    rows = config["BN"] = max(1, config["BN"] // 2) if activation else config["BN"]
    programs = min(config.pop("programs") * _multiprocessors(x.device), -(-N // rows))
    words = weight if kind == "float" else weight.view(torch.int32)
    _triton().gemv[(programs,)](
        x, words, scale, zero, bias, norm, residual, y, N, K, eps, offset, KIND=kind, GROUP=group,
        ACTIVATION=activation, EXACT=x.dtype == torch.float32, BK=1 << (K - 1).bit_length(), **config,
    )  # fmt: skip
    return y


# ---------------------------------------------------------------------------------------------------------- attend
ATTEND_BLOCK = 64  # slots at a time


def _attend(qkv, cos, sin, pos, k_cache, v_cache, count, q_norm, k_norm, group, scale, softcap, window, eps, offset):
    """The operator hotloop::attend, see FusedAttention. Mutates the caches; `count` is zero before and after."""
    qkv, pos = qkv.contiguous(), pos.contiguous()
    B = qkv.shape[0]
    K, S, D = k_cache.shape[1:]
    GP = max(16, 1 << (group - 1).bit_length())  # tl.dot wants 16 rows
    # Enough programs to fill the GPU at long contexts; those with nothing to do at a short one return at once.
    splits = max(1, min(64, 264 // (B * K), -(-S // ATTEND_BLOCK)))
    y = torch.empty(B, 1, K * group * D, dtype=qkv.dtype, device=qkv.device)
    part = torch.empty(B * K * splits * GP * (D + 2), device=qkv.device)
    _triton().attend[(B * K, splits)](
        qkv, cos, sin, pos, q_norm, k_norm, k_cache, v_cache, part, count, y, S, scale, softcap, eps, offset,
        window, K=K, G=group, GP=GP, D=D, SPLITS=splits, BS=ATTEND_BLOCK, SOFTCAP=softcap > 0, WINDOW=window > 0,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return y


# ----------------------------------------------------------------------------------------------------- the modules
def stored(linear: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weight, scale, zero) of a plain or quantized linear, as `dequantize` takes them."""
    return linear.weight, getattr(linear, "scale", None), getattr(linear, "zero", None)


def one_row(x: Tensor) -> bool:
    """Whether x is a single vector."""
    return x.numel() == x.shape[-1]


class FusedLinear(nn.Linear):
    """nn.Linear whose weight is streamed for few rows; made from one, sharing its parameters."""

    def __init__(self, plain: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None and x.numel() // x.shape[-1] <= SMALL_M:
            return linear(x, self.weight)
        return F.linear(x, self.weight, self.bias)


class FusedNormLinear(nn.Module):
    """norm -> linear; in one kernel for one row. Made from model.NormLinear."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.norm, self.linear = plain.norm, plain.linear

    def forward(self, x: Tensor) -> Tensor:
        if not one_row(x):
            return self.linear(self.norm(x))
        n = self.norm
        return torch.ops.hotloop.linear(
            x, *stored(self.linear), self.linear.bias, n.weight, None, n.eps, n.offset, ""
        )


class FusedNormGateUp(nn.Module):
    """norm -> gate and up -> act(gate) * up; in one kernel for one row. Made from model.NormGateUp."""

    def __init__(self, plain: nn.Module, activation: str):
        super().__init__()
        self.norm, self.linear, self.activation, self.name = plain.norm, plain.linear, plain.activation, activation

    def forward(self, x: Tensor) -> Tensor:
        if not one_row(x):
            gate, up = self.linear(self.norm(x)).chunk(2, dim=-1)
            return self.activation(gate) * up
        n = self.norm
        return torch.ops.hotloop.linear(
            x, *stored(self.linear), self.linear.bias, n.weight, None, n.eps, n.offset, self.name
        )


class FusedLinearResidual(nn.Module):
    """x + linear(y); in one kernel for one row. Made from model.LinearResidual without a post_norm."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.linear = plain.linear
        # Where the columns are split over ranks, their results are summed, and one of them adds the residual.
        self.all_reduce, self.adds_residual = getattr(plain, "all_reduce", None), getattr(plain, "adds_residual", True)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        residual = x if self.adds_residual else None
        if one_row(y):
            z = torch.ops.hotloop.linear(y, *stored(self.linear), self.linear.bias, None, residual, 0.0, 0.0, "")
        else:
            z = self.linear(y) if residual is None else residual + self.linear(y)
        return z if self.all_reduce is None else self.all_reduce(z)


class FusedAttention(nn.Module):
    """model.Attention whose decode step (one token a row) is one kernel; longer inputs go through the plain one.

    The context is split over programs by each row's own length, read on the device: cost follows the context, one
    compiled graph serves all lengths. The G query heads of a kv head share a program, so K and V are read once.
    """

    def __init__(self, plain: nn.Module, device: torch.device):
        self.__dict__ = plain.__dict__  # one state (norms, cache, settings), two forwards
        self.any_length, self.reads_own_length = plain.forward, True
        # Programs of a kv head that have finished; room for any batch that the grid allows. The kernel leaves zeros.
        self.register_buffer("count", torch.zeros(4096, dtype=torch.int32, device=device), persistent=False)

    def forward(self, qkv: Tensor, rope, input_pos: Tensor, slots: Tensor | None) -> Tensor:
        if slots is None or qkv.shape[1] != 1:
            return self.any_length(qkv, rope, input_pos, slots)
        norms = (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
        eps, offset = (0.0, 0.0) if self.q_norm is None else (self.q_norm.eps, self.q_norm.offset)
        return torch.ops.hotloop.attend(
            qkv, *rope, input_pos, self.cache.k, self.cache.v, self.count, *norms,
            self.group, self.scale, self.softcap or 0.0, self.window or 0, eps, offset,
        )  # fmt: skip


def fuse(model: nn.Module) -> None:
    """Swap the kernels' modules into the five seams of every layer, and into the head, of a model on a GPU.

    Where Triton or a new enough GPU is missing, or a layer has something the kernels lack (a norm on the branch,
    experts), the plain modules stay. Parameters are shared, and so state dict names do not change.
    """
    if not use_triton(model.tok_embeddings.weight):
        return
    _triton()  # registers the operators, which torch.compile must not do
    for layer in model.layers:
        layer.attention = FusedAttention(layer.attention, model.tok_embeddings.weight.device)
        layer.qkv = FusedNormLinear(layer.qkv)
        if layer.out.post_norm is None:
            layer.out = FusedLinearResidual(layer.out)
        if not layer.is_moe:
            layer.gate_up = FusedNormGateUp(layer.gate_up, model.args.activation)
            if layer.down.post_norm is None:
                layer.down = FusedLinearResidual(layer.down)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.endswith("router"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FusedLinear(module))


# ----------------------------------------------------------------------------------------------- the Triton programs
@functools.cache
def _triton() -> SimpleNamespace:
    """Import Triton, define the kernels, register the operators hotloop::linear and hotloop::attend; once."""
    global tl, x_at, byte_at, nibble_at, head_norm  # kernels look up what they use among the names of this module
    import triton
    import triton.language as tl

    @triton.jit
    def read_sum(x, out, n, BLOCK: tl.constexpr):
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
            i = start + tl.arange(0, BLOCK).to(tl.int64)
            total += tl.load(x + i, mask=i < n, other=0.0)
        tl.store(out + tl.program_id(0), tl.sum(total))

    @triton.jit
    def x_at(x, norm, i, mask, offset):
        """Elements i of the vector x, times the norm's weight where there is one."""
        v = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
        if norm is not None:
            v *= tl.load(norm + i, mask=mask, other=0.0).to(tl.float32) + offset
        return v

    @triton.jit
    def byte_at(q, i: tl.constexpr, KIND: tl.constexpr):
        """Byte i of each word as a float: int8 (offset by 128) as 1 + byte 2^-15, e4m3 as its value times 2^-120."""
        if KIND == "fp8":  # sign, exponent and mantissa moved to float32's places
            return (((q << (24 - 8 * i)) >> 4) & -2014314496).to(tl.float32, bitcast=True)  # 0x87F00000
        if i == 0:
            u = q << 8
        else:
            u = q >> (8 * (i - 1))
        return ((u & 0xFF00) | 0x3F800000).to(tl.float32, bitcast=True)

    @triton.jit
    def nibble_at(q, i: tl.constexpr):
        """Nibble i of each word as 1 + nibble 2^-12, 2^-8 or 2^-4: three shifts serve all eight."""
        if i < 3:
            u = q << 11
        elif i < 6:
            u = q >> 1
        else:
            u = q >> 13
        return ((u & (15 << (11 + 4 * (i % 3)))) | 0x3F800000).to(tl.float32, bitcast=True)

    @triton.jit
    def gemv(
        x, w, scale, zero, bias, norm, residual, y, N, K: tl.constexpr, eps, offset, KIND: tl.constexpr,
        GROUP: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """One row of x: each program keeps all of it (normalized) in registers and walks over rows of W, BN at a time.

        The walk is pipelined: the next rows are on their way while these are summed. Quantized weights are read as
        32-bit words. A byte or nibble becomes a float by placing its bits in the mantissa of 1.0, one instruction
        instead of a slow conversion; what that adds, a multiple of x, is subtracted lane by lane, where it is small
        (EXACT, for float32 x: before the product).
        """
        R: tl.constexpr = BN * 2 if ACTIVATION != "" else BN
        r, k = tl.arange(0, R), tl.arange(0, BK)
        inv = 1.0
        if norm is not None:
            v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            inv = tl.rsqrt(tl.sum(v * v) / K + eps)
        if KIND == "float":
            g = x_at(x, norm, k, k < K, offset) * inv
        elif KIND == "int4":
            W: tl.constexpr = GROUP // 8  # words a group
            group = tl.arange(0, BK // GROUP)
            mg = group < K // GROUP
            j = group[:, None] * W + tl.arange(0, W)[None, :]
            mj = j < K // 8
            g0, g1 = x_at(x, norm, 8 * j, mj, offset) * inv, x_at(x, norm, 8 * j + 1, mj, offset) * inv
            g2, g3 = x_at(x, norm, 8 * j + 2, mj, offset) * inv, x_at(x, norm, 8 * j + 3, mj, offset) * inv
            g4, g5 = x_at(x, norm, 8 * j + 4, mj, offset) * inv, x_at(x, norm, 8 * j + 5, mj, offset) * inv
            g6, g7 = x_at(x, norm, 8 * j + 6, mj, offset) * inv, x_at(x, norm, 8 * j + 7, mj, offset) * inv
            sum_x = tl.sum(g0 + g1 + g2 + g3 + g4 + g5 + g6 + g7, 1)[None, :]
            g0, g3, g6 = g0 * 4096, g3 * 4096, g6 * 4096
            g1, g4, g7 = g1 * 256, g4 * 256, g7 * 256
            g2, g5 = g2 * 16, g5 * 16
            BIAS: tl.constexpr = 1.0 if EXACT else 0.0
            excess = (1.0 - BIAS) * tl.sum(g0 + g1 + g2 + g3 + g4 + g5 + g6 + g7, 1)[None, :]
        else:
            j = tl.arange(0, BK // 4)
            mj = j < K // 4
            # 2^15; or 2^60, and again at the end: in two steps, away from float32's subnormals
            inv *= 32768.0 if KIND == "int8" else 1152921504606846976.0
            g0, g1 = x_at(x, norm, 4 * j, mj, offset) * inv, x_at(x, norm, 4 * j + 1, mj, offset) * inv
            g2, g3 = x_at(x, norm, 4 * j + 2, mj, offset) * inv, x_at(x, norm, 4 * j + 3, mj, offset) * inv
            ONE: tl.constexpr = 1.00390625 if KIND == "int8" else 0.0  # what a weight of 0 looks like
            BIAS: tl.constexpr = ONE if EXACT else 0.0
            excess = (ONE - BIAS) * (g0 + g1 + g2 + g3)[None, :]
        for n0 in tl.range(tl.program_id(0) * BN, N, tl.num_programs(0) * BN, num_stages=STAGES):
            n = n0 + tl.arange(0, BN)
            if ACTIVATION != "":  # gate and up in turn
                rows = tl.minimum(n0 + r // 2, N - 1) + (r % 2) * N
            else:
                rows = tl.minimum(n0 + r, N - 1)
            rows = rows.to(tl.int64)
            if KIND == "float":
                weight = tl.load(w + rows[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
                d = tl.sum(weight.to(tl.float32) * g[None, :], 1)
            elif KIND == "int4":
                q = tl.load(w + rows[:, None, None] * (K // 8) + j[None, :, :], mask=mj[None, :, :], other=0)
                at = rows[:, None] * (K // GROUP) + group[None, :]
                s = tl.load(scale + at, mask=mg[None, :], other=0.0).to(tl.float32)
                z = tl.load(zero + at, mask=mg[None, :], other=0.0).to(tl.float32)
                p = (nibble_at(q, 0) - BIAS) * g0[None, :, :] + (nibble_at(q, 1) - BIAS) * g1[None, :, :]
                p += (nibble_at(q, 2) - BIAS) * g2[None, :, :] + (nibble_at(q, 3) - BIAS) * g3[None, :, :]
                p += (nibble_at(q, 4) - BIAS) * g4[None, :, :] + (nibble_at(q, 5) - BIAS) * g5[None, :, :]
                p += (nibble_at(q, 6) - BIAS) * g6[None, :, :] + (nibble_at(q, 7) - BIAS) * g7[None, :, :]
                d = tl.sum((tl.sum(p, 2) - excess - z * sum_x) * s, 1)
            else:
                q = tl.load(w + rows[:, None] * (K // 4) + j[None, :], mask=mj[None, :], other=0)
                if KIND == "int8":
                    q = q ^ -2139062144  # 0x80808080: from -128 ... 127 to 0 ... 255
                p = (byte_at(q, 0, KIND) - BIAS) * g0[None, :] + (byte_at(q, 1, KIND) - BIAS) * g1[None, :]
                p += (byte_at(q, 2, KIND) - BIAS) * g2[None, :] + (byte_at(q, 3, KIND) - BIAS) * g3[None, :]
                d = tl.sum(p - excess, 1) * tl.load(scale + rows)
                if KIND == "fp8":
                    d *= 1152921504606846976.0
            if bias is not None:
                d += tl.load(bias + rows).to(tl.float32)
            if ACTIVATION != "":
                gate, up = tl.split(tl.reshape(d, [BN, 2]))
                if ACTIVATION == "silu":
                    gate = gate / (1 + tl.exp(-gate))
                elif ACTIVATION == "gelu_tanh":
                    e = tl.exp(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # 2 sqrt(2 / pi)
                    gate = gate * (1 - 1 / (e + 1))
                else:
                    gate = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
                d = gate * up
            if residual is not None:
                d += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(y + n, d.to(y.dtype.element_ty), mask=n < N)

    @triton.jit(do_not_specialize=["M"])  # one program for all numbers of rows
    def small(
        x, w, scale, zero, y, M, N, K: tl.constexpr,
        KIND: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        """2 ... BM rows: tensor cores, with the weights as the tall operand and the rows padded to BM."""
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        rows = tl.minimum(n, N - 1).to(tl.int64)
        m = tl.arange(0, BM)
        acc = tl.zeros([BN, BM], tl.float32)
        if KIND == "int4":
            H: tl.constexpr = GROUP // 2  # bytes a group
            BG: tl.constexpr = BK // GROUP
        for k0 in tl.range(0, K, BK):
            if KIND == "int4":
                group = k0 // GROUP + tl.arange(0, BG)
                mg = group < K // GROUP
                j = group[:, None] * H + tl.arange(0, H)[None, :]
                mj = mg[:, None] & (j >= 0)
                q = tl.load(w + rows[:, None, None] * (K // 2) + j[None, :, :], mask=mj[None, :, :], other=0)
                at = rows[:, None] * (K // GROUP) + group[None, :]
                s = tl.load(scale + at, mask=mg[None, :], other=0.0).to(tl.float32)[:, :, None]
                z = tl.load(zero + at, mask=mg[None, :], other=0.0).to(tl.float32)[:, :, None]
                low = tl.reshape((((q & 15).to(tl.float32) - z) * s).to(x.dtype.element_ty), [BN, BK // 2])
                high = tl.reshape((((q >> 4).to(tl.float32) - z) * s).to(x.dtype.element_ty), [BN, BK // 2])
                c = k0 + 2 * tl.arange(0, BK // 2)
                mask = (m < M)[None, :] & (c < K)[:, None]
                even = x + m[None, :] * K + c[:, None]
                acc = tl.dot(low, tl.load(even, mask=mask, other=0.0), acc, input_precision="ieee")
                acc = tl.dot(high, tl.load(even + 1, mask=mask, other=0.0), acc, input_precision="ieee")
            else:
                k = k0 + tl.arange(0, BK)
                q = tl.load(w + rows[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
                mask = (m < M)[None, :] & (k < K)[:, None]
                rhs = tl.load(x + m[None, :] * K + k[:, None], mask=mask, other=0.0)
                acc = tl.dot(q.to(x.dtype.element_ty), rhs, acc, input_precision="ieee")
        if scale is not None and KIND != "int4":
            acc *= tl.load(scale + rows)[:, None]
        tl.store(
            y + m[None, :] * N + n[:, None], acc.to(y.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :]
        )

    @triton.jit
    def head_norm(a, b, weight, i, D: tl.constexpr, eps, offset, dtype: tl.constexpr):
        """RMSNorm of heads given as two halves, [R, D/2] each, rounded to the model's dtype as the plain one is."""
        inv = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        a = a * inv * (tl.load(weight + i).to(tl.float32) + offset)[None, :]
        b = b * inv * (tl.load(weight + D // 2 + i).to(tl.float32) + offset)[None, :]
        return a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)

    @triton.jit
    def attend(
        qkv, cos, sin, pos, q_norm, k_norm, k_cache, v_cache, part, count, y, S, scale, softcap, eps, offset, window,
        K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr,
        SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Program (row b and kv head, split): its share of the context for all G query heads, two halves of D apart.

        The program that holds the newest slot writes K and V there first. The last program of a kv head to finish
        (counted by an atomic) combines the splits: a second kernel would cost a launch a layer.
        """
        b, kv, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
        dtype: tl.constexpr = k_cache.dtype.element_ty
        P: tl.constexpr = D // 2
        p = tl.load(pos + b)
        first = p * 0
        if WINDOW:
            first = tl.maximum(p + 1 - window, 0)
        chunk = tl.cdiv(tl.cdiv(p + 1 - first, SPLITS), BS) * BS
        start = first + split * chunk
        end = tl.minimum(start + chunk, p + 1)
        if start < end:
            g, i, d = tl.arange(0, GP), tl.arange(0, P), tl.arange(0, D)
            mg = (g < G)[:, None]
            row = qkv + b * (K * (G + 2) * D)
            c, s = tl.load(cos + b * P + i)[None, :], tl.load(sin + b * P + i)[None, :]
            head = (kv * G + g)[:, None]
            qa = tl.load(row + head * D + i[None, :], mask=mg, other=0.0).to(tl.float32)
            qb = tl.load(row + head * D + P + i[None, :], mask=mg, other=0.0).to(tl.float32)
            if q_norm is not None:
                qa, qb = head_norm(qa, qb, q_norm, i, D, eps, offset, dtype)
            q1, q2 = (qa * c - qb * s).to(dtype), (qb * c + qa * s).to(dtype)
            base = (b * K + kv).to(tl.int64) * S * D
            if end == p + 1:
                k_row = row + (K * G + kv) * D
                ka, kb = tl.load(k_row + i)[None, :].to(tl.float32), tl.load(k_row + P + i)[None, :].to(tl.float32)
                if k_norm is not None:
                    ka, kb = head_norm(ka, kb, k_norm, i, D, eps, offset, dtype)
                slot = base + p.to(tl.int64) * D
                tl.store(k_cache + slot + i[None, :], (ka * c - kb * s).to(dtype))
                tl.store(k_cache + slot + P + i[None, :], (kb * c + ka * s).to(dtype))
                tl.store(v_cache + slot + d, tl.load(row + (K * G + K + kv) * D + d))
                tl.debug_barrier()  # the loop below reads them back
            top = tl.full([GP], -float("inf"), tl.float32)
            total = tl.zeros([GP], tl.float32)
            acc = tl.zeros([GP, D], tl.float32)
            for t0 in tl.range(start, end, BS):
                t = t0 + tl.arange(0, BS)
                m = t < end
                at = base + t.to(tl.int64) * D
                k1 = tl.load(k_cache + at[None, :] + i[:, None], mask=m[None, :], other=0.0)
                k2 = tl.load(k_cache + at[None, :] + P + i[:, None], mask=m[None, :], other=0.0)
                v = tl.load(v_cache + at[:, None] + d[None, :], mask=m[:, None], other=0.0)
                scores = tl.dot(q1, k1, input_precision=PRECISION) + tl.dot(q2, k2, input_precision=PRECISION)
                scores *= scale
                if SOFTCAP:  # softcap * tanh(scores / softcap)
                    scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
                scores = tl.where(m[None, :], scores, -float("inf"))
                new = tl.maximum(top, tl.max(scores, 1))
                e, fade = tl.exp(scores - new[:, None]), tl.exp(top - new)
                total = total * fade + tl.sum(e, 1)
                acc = acc * fade[:, None] + tl.dot(e.to(dtype), v, input_precision=PRECISION)
                top = new
            n = tl.cdiv(p + 1 - first, chunk)  # splits that have anything to do
            out = y + (b * K * G + head) * D + d[None, :]
            if n == 1:
                tl.store(out, (acc / total[:, None]).to(y.dtype.element_ty), mask=mg)
            else:
                cell = part + (b * K + kv) * SPLITS * GP * (D + 2)  # a split: acc [GP, D], top [GP], total [GP]
                mine = cell + split * GP * (D + 2)
                tl.store(mine + g[:, None] * D + d[None, :], acc)
                tl.store(mine + GP * D + g, top)
                tl.store(mine + GP * D + GP + g, total)
                tl.debug_barrier()  # all of the program's stores come before its arrival is counted
                if tl.atomic_add(count + b * K + kv, 1, sem="acq_rel") == n - 1:
                    top = tl.full([GP], -float("inf"), tl.float32)
                    total = tl.zeros([GP], tl.float32)
                    acc = tl.zeros([GP, D], tl.float32)
                    for j in tl.range(0, n):
                        theirs = cell + j * GP * (D + 2)
                        top_j = tl.load(theirs + GP * D + g, cache_modifier=".cg")
                        new = tl.maximum(top, top_j)
                        fade, gain = tl.exp(top - new), tl.exp(top_j - new)
                        total = total * fade + tl.load(theirs + GP * D + GP + g, cache_modifier=".cg") * gain
                        a = tl.load(theirs + g[:, None] * D + d[None, :], cache_modifier=".cg")
                        acc = acc * fade[:, None] + a * gain[:, None]
                        top = new
                    tl.store(out, (acc / total[:, None]).to(y.dtype.element_ty), mask=mg)
                    tl.store(count + b * K + kv, 0)

    library = torch.library.Library("hotloop", "FRAGMENT")
    library.define(
        "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? zero, Tensor? bias, Tensor? norm, Tensor? residual, "
        "float eps, float offset, str activation) -> Tensor"
    )
    library.define(
        "attend(Tensor qkv, Tensor cos, Tensor sin, Tensor pos, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor(c!) count, Tensor? q_norm, Tensor? k_norm, int group, float scale, float softcap, int window, "
        "float eps, float offset) -> Tensor"
    )
    library.impl("linear", _linear, "CompositeExplicitAutograd")
    library.impl("attend", _attend, "CompositeExplicitAutograd")

    @torch.library.register_fake("hotloop::linear", lib=library)
    def linear_shape(x, weight, scale, zero, bias, norm, residual, eps, offset, activation):
        return x.new_empty(*x.shape[:-1], weight.shape[0] // (2 if activation else 1))

    @torch.library.register_fake("hotloop::attend", lib=library)
    def attend_shape(qkv, cos, sin, pos, k_cache, v_cache, count, q_norm, k_norm, group, *settings):
        return qkv.new_empty(qkv.shape[0], 1, k_cache.shape[1] * group * k_cache.shape[3])

    return SimpleNamespace(read_sum=read_sum, gemv=gemv, small=small, attend=attend, library=library)
