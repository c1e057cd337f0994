"""Triton kernels for decoding on a GPU, each beside its plain PyTorch reference, behind one function.

    linear      x [..., K] through a weight as it is stored (bf16, int8, fp8, int4), streamed once for up to 16 rows,
                with RMSNorm before it and bias, gate or residual add after it in the same kernel
    attend      a few new tokens a row: RoPE, the write to the KV cache, and attention split over the context
    top_k       the k largest of each row of logits, sorted, with their ids
    rms_norm, gated, rotated_queries, dequantized
                what a long prompt needs between its matrix products, each in one pass over memory
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
import shutil
import sys
from types import ModuleType, SimpleNamespace

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
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            print("kernels: Triton needs a C compiler (gcc or clang), plain PyTorch runs instead", file=sys.stderr)
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


def rotated_queries_reference(qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, q_norm, k_norm, group, eps,
                              offset) -> Tensor:  # fmt: skip
    """What `rotated_queries` computes, as model.Attention does. Mutates the caches."""
    heads = qkv.unflatten(-1, (-1, k_cache.shape[3]))
    K = heads.shape[2] // (group + 2)
    q, k, v = heads.split([K * group, K, K], dim=2)
    if q_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps, offset), rms_norm_reference(k, k_norm, eps, offset)
    halves = [x.float().chunk(2, dim=-1) for x in (q, k)]
    q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype) for a, b in halves)
    rows = torch.arange(len(pos), device=pos.device)[:, None]
    for x, cache, scales in (k, k_cache, k_scale), (v, v_cache, v_scale):
        if scales is not None:  # as model.to_fp8
            scale = (x.abs().amax(-1).float().clamp_min(2.0**-100) / 256).to(torch.bfloat16)
            x, scales[rows, :, pos] = x.float() / scale.float()[..., None], scale
        cache[rows, :, pos] = x.to(cache.dtype)
    return q


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
def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [..., K] @ W.T -> [..., N] in x's dtype, sums in float32, W stored as `dequantize` says.

    Up to 16 rows stream the weight once; more rows are a matrix product with the weight dequantized.
    """
    if use_triton(x):
        if not torch.compiler.is_compiling():
            _triton()  # registers the operators; `fuse` did so for a model
        if few_rows(x):
            return torch.ops.hotloop.linear(x, weight, scale, None, None, None, 0.0, 0.0, "")
        if scale is not None:
            return F.linear(x, torch.ops.hotloop.dequantized(weight, scale, x.dtype))
    return linear_reference(x, weight, scale)


# Of `gemv`, by kind and the largest K that it is for: warps, rows of W at a time and pipeline stages; measured on an
# H200 (benchmarks/NOTES.md).
CONFIGS = {
    "float": {2048: (4, 8, 3), 8192: (4, 4, 3), 16384: (8, 2, 4), 32768: (16, 2, 3)},
    "int8": {2048: (4, 8, 3), 8192: (4, 4, 3), 16384: (8, 4, 3), 32768: (16, 4, 3)},
    "fp8": {2048: (4, 8, 2), 8192: (4, 4, 2), 16384: (8, 4, 3), 32768: (16, 2, 3)},
    "int4": {2048: (4, 8, 3), 8192: (4, 4, 3), 16384: (8, 2, 3), 32768: (16, 2, 3)},
}
KINDS = {torch.uint8: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@functools.cache
def _has_fp8(device: torch.device) -> bool:
    """Whether Triton can convert e4m3 on a GPU."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends: programmatic dependent launch, since Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _kernels_cuda() -> ModuleType | None:
    """kernels_cuda.py, which is faster on some GPUs; None where this file was copied without it."""
    try:
        import kernels_cuda
    except ImportError:
        return None
    return kernels_cuda


def _linear(x, weight, scale, bias, norm, residual, eps, offset, activation) -> Tensor:
    """The operator hotloop::linear: `linear_reference` in one kernel, for up to 16 rows (in two for two of int4)."""
    K = x.shape[-1]
    M, N = x.numel() // K, weight.shape[0] // (2 if activation else 1)
    kind = KINDS.get(weight.dtype, "float")
    no_fp8 = kind == "fp8" and x.dtype != torch.bfloat16 and x.is_cuda and not _has_fp8(x.device)
    if not use_triton(x) or (no_fp8 and M > 1):  # the model has moved to a CPU; Triton converts fp8 since Ada only
        return linear_reference(x, weight, scale, bias, norm, residual, eps, offset, activation)
    if _kernels_cuda() and _kernels_cuda().supports(x, weight, scale, bias, norm, residual):
        return _kernels_cuda().linear(x, weight, scale, bias, norm, residual, eps, offset, activation)
    if kind == "int4" and M == 2:  # one after the other takes two thirds of what the tensor cores take
        rows = [x.view(2, K), [None] * 2 if residual is None else residual.view(2, N)]
        each = [_linear(v, weight, scale, bias, norm, r, eps, offset, activation) for v, r in zip(*rows, strict=True)]
        return torch.stack(each).view(*x.shape[:-1], N)
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    group = K // scale.shape[1] if kind == "int4" else 0
    overlap = _overlaps(x.device)
    settings = dict(KIND=kind, GROUP=group, ACTIVATION=activation, OVERLAP=overlap, launch_pdl=overlap)
    if M == 1 and K <= max(CONFIGS[kind]) and (kind == "float" or K % 4 == 0):  # in words, and K in registers
        warps, rows, stages = next(c for limit, c in CONFIGS[kind].items() if limit >= K)
        rows = max(1, rows // 2) if activation else rows
        words = weight if kind == "float" else weight.view(torch.int32)
        packed = x.dtype == torch.bfloat16 and (norm is None or norm.dtype == torch.bfloat16)
        arguments = (x, words, scale, bias, norm, residual, y, N, K, eps, offset)
        settings |= dict(
            EXACT=x.dtype == torch.float32, PACKED=packed, BN=rows, BK=1 << (K - 1).bit_length(), STAGES=stages,
            num_warps=warps,
        )  # fmt: skip
        kernel, tiles, BM = _triton().gemv, -(-N // rows), 1
    else:
        # float32 has no tensor cores that are exact: tiles are small enough for registers.
        exact = x.dtype == torch.float32
        BM, (warps, BN, BK, stages) = 8 if M <= 8 else 16, (4, 32, 64, 2) if exact else SMALL_CONFIGS[kind]
        while 16 < BK >= K:  # Triton 3.6 cannot compile a pipeline of a single step
            BK //= 2
        part, count = _workspace(x.device)
        data = weight.view(torch.uint8) if kind == "fp8" else weight
        arguments = (x.contiguous(), data, scale, bias, norm, residual, y, part, count, M, N, K, eps, offset)
        tricks = x.dtype == torch.bfloat16 and x.is_cuda
        settings |= dict(BM=BM, BN=BN, BK=group or BK, STAGES=stages, TRICKS=tricks, num_warps=warps)
        kernel, tiles = _triton().small, -(-weight.shape[0] // BN) * -(-K // (group or BK))
    dtypes = [t if t is None else t.dtype for t in (x, bias, norm, residual)]
    key = (x.device, BM, kind, N, K, group, activation, *dtypes)
    if key not in _programs:
        compiled = kernel.warmup(*arguments, **settings, grid=(1,)) if x.is_cuda else None
        _programs[key] = programs_for(compiled, tiles, x.device)
    kernel[(_programs[key],)](*arguments, **settings)
    return y


# Of `small`: warps, rows of W and columns at a time (of int4 a group), pipeline stages.
SMALL_CONFIGS = {"float": (8, 64, 128, 4), "int8": (4, 64, 256, 4), "fp8": (4, 64, 256, 3), "int4": (8, 512, 0, 4)}


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


# ---------------------------------------------------------------------------------------------------------- attend
ATTEND_BLOCK = 64  # slots at a time
ATTEND_ROWS = 64  # new tokens times query heads a kv head, at most


def _attend(qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, count, q_norm, k_norm, group, scale, softcap,
            window, eps, offset) -> Tensor:  # fmt: skip
    """The operator hotloop::attend, see FusedAttention. Mutates the caches; `count` is zero before and after."""
    if _kernels_cuda() and _kernels_cuda().supports_attend(qkv, pos, k_cache, v_cache, group, (q_norm, k_norm)):
        return _kernels_cuda().attend(
            qkv, cos, sin, pos, k_cache, v_cache, count, q_norm, k_norm, group, scale, softcap, window, eps, offset
        )
    B, T = qkv.shape[:2]
    # The kernel reads positions before it waits for the kernel before it. Those of one token are as old as the step;
    # others may have just been computed, or copied here.
    overlap = _overlaps(qkv.device) and T == 1 and pos.is_contiguous()
    qkv, pos = qkv.contiguous(), pos.contiguous()
    K, S, D = k_cache.shape[1:]
    if k_scale is not None:
        k_cache, v_cache = k_cache.view(torch.int32), v_cache.view(torch.int32)
    rows, new = (max(16, 1 << (n - 1).bit_length()) for n in (group * T, T))  # tl.dot wants 16
    # Enough programs to fill the GPU at long contexts; those with nothing to do at a short one return at once.
    splits = max(1, min(64, 264 // (B * K), -(-S // ATTEND_BLOCK)))
    y = torch.empty(B, T, K * group * D, dtype=qkv.dtype, device=qkv.device)
    part = torch.empty(B * K * splits * rows * (D + 2), device=qkv.device)
    _triton().attend[(B * K, splits)](
        qkv, cos, sin, pos, q_norm, k_norm, k_cache, v_cache, k_scale, v_scale, part, count, y, S, T, scale, softcap,
        eps, offset, window, K=K, G=group, R=rows, TP=new, D=D, SPLITS=splits,
        SP=1 << (splits - 1).bit_length(), BS=min(ATTEND_BLOCK, 32) if D > 128 else ATTEND_BLOCK,
        SOFTCAP=softcap > 0, WINDOW=window > 0, PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        OVERLAP=overlap, num_warps=4 if rows * D <= 2048 else 8, launch_pdl=overlap,
    )  # fmt: skip
    return y


# --------------------------------------------------------------------------------------------------------- prefill
# Of a long prompt the matrix products go to libraries. What is between them is bound by memory, and each pass of plain
# PyTorch counts: a norm makes about five in float32, a rotation a dozen. Operators, so that CUDA graphs and
# torch.compile take them; what Inductor compiles keeps the plain norm and gate, of which it fuses more.
def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """The operator hotloop::rms_norm: x [..., C] -> x / rms(x) * (offset + weight), in float32, in x's dtype."""
    if not use_triton(x):
        return rms_norm_reference(x, weight, eps, offset)
    x = x.contiguous()
    y, C = torch.empty_like(x), x.shape[-1]
    columns = 1 << (C - 1).bit_length()
    warps = max(1, min(16, columns // 512))
    _triton().rms_norm[(x.numel() // C,)](x, weight, y, eps, offset, C=C, BC=columns, num_warps=warps)
    return y


GATED_BLOCK = 1024  # outputs a program


def _gated(gate_up: Tensor, activation: str) -> Tensor:
    """The operator hotloop::gated: [..., 2 H], gates and then what they gate -> activation(gate) * up [..., H]."""
    if not use_triton(gate_up):
        return gated_reference(gate_up, activation)
    H = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], H)
    grid = (y.numel() // H, -(-H // GATED_BLOCK))
    _triton().gated[grid](gate_up.contiguous(), y, H=H, ACTIVATION=activation, BLOCK=GATED_BLOCK, num_warps=4)
    return y


def _rotated_queries(qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, q_norm, k_norm, group, eps,
                     offset) -> Tensor:  # fmt: skip
    """The operator hotloop::rotated_queries: qkv [B, T, (H + 2K) D] -> queries [B, T, H, D]; writes the caches.

    Queries and keys are normalized where there are weights [D], and rotated; keys and values go to slots pos [B, T] of
    caches [B or more, K, S, D], e4m3 where there are scales [B or more, K, S]. Attention reads them there: views of a
    cache need no copy.
    """
    if not use_triton(qkv):
        return rotated_queries_reference(
            qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, q_norm, k_norm, group, eps, offset
        )
    (B, T), (K, S, D) = qkv.shape[:2], k_cache.shape[1:]
    q = qkv.new_empty(B, T, K * group, D)
    tokens = max(1, 2048 // D)  # a program; few enough for registers, and for many programs at short prompts
    if k_scale is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    _triton().rotated_queries[(-(-B * T // tokens), K)](
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), pos.contiguous(), q_norm, k_norm, k_cache, v_cache,
        k_scale, v_scale, q, B * T, T, S, eps, offset, G=group, D=D, BT=tokens, num_warps=4,
    )  # fmt: skip
    return q


def _dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The operator hotloop::dequantized: `dequantize` of a quantized weight, [N, K] in dtype, for a matrix product."""
    kind, columns = KINDS[weight.dtype], weight.shape[1]
    no_fp8 = kind == "fp8" and dtype != torch.bfloat16 and weight.is_cuda and not _has_fp8(weight.device)
    if not use_triton(weight) or no_fp8:
        return dequantize(weight, scale).to(dtype)
    K = 2 * columns if kind == "int4" else columns
    y = torch.empty(len(weight), K, dtype=dtype, device=weight.device)
    group = K // scale.shape[1] if kind == "int4" else 0
    block = min(4096, 1 << (K - 1).bit_length())
    grid = (-(-y.numel() // block),) if group else (len(weight), -(-K // block))
    data = weight.view(torch.uint8) if kind == "fp8" else weight
    tricks = dtype == torch.bfloat16 and weight.is_cuda
    _triton().dequantized[grid](
        data, scale, y, scale.numel(), K=K, KIND=kind, GROUP=group, BLOCK=block, TRICKS=tricks, num_warps=4
    )
    return y


# ----------------------------------------------------------------------------------------------------------- top_k
MAX_TOP_K = 256  # the largest k of the kernels
GROUPS = 4 * MAX_TOP_K  # of a row's logits; of more groups than k, most of the k largest are alone in theirs
FOUND = 2048  # room for those that may be among the k largest, usually a tenth more than k
TOP_K_TILE = 4096  # logits a program


def top_k(logits: Tensor, k: int, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest of each row [B, V], k <= V -> (values [B, k] in logits' dtype, ids int64 [B, k]), largest first.

    As torch.topk, which runs where there is no kernel: NaN is largest. The kernels give ties in the order of their ids.
    sorted: False where the order does not matter to the caller, which saves torch.topk a sort.
    """
    small = k <= MAX_TOP_K and logits.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if small and use_triton(logits) and _registered():
        return torch.ops.hotloop.top_k(logits, k)
    return logits.topk(k, sorted=sorted)


def _registered() -> bool:
    """Register the operators, also while torch.compile traces a caller: it takes the result as a constant."""
    return _triton() is not None


_registered._dynamo_marked_constant = True  # as have_triton


def _top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The operator hotloop::top_k: the largest of each group; the logits not below the k-th of these; their order.

    A group is every GROUPS-th logit, because likely tokens are often neighbours. Any input is right, if slower: where
    the largest crowd in so few groups that there is no room for what is found.
    """
    if not use_triton(logits):
        return logits.topk(k)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    (B, V), stride, device = logits.shape, logits.stride(0), logits.device
    values, ids = logits.new_empty(B, k), torch.empty(B, k, dtype=torch.int64, device=device)
    best, found = (torch.empty(B, n, dtype=torch.int64, device=device) for n in (GROUPS, 2 * FOUND))
    count = torch.empty(2, B, dtype=torch.int32, device=device)
    rows = 1 << (-(-V // GROUPS) - 1).bit_length()
    columns = max(1, min(GROUPS, TOP_K_TILE // rows))
    tiles, overlap = GROUPS // columns, _overlaps(device)
    settings = dict(R=rows, C=columns, G=GROUPS, OVERLAP=overlap, launch_pdl=overlap)
    t = _triton()
    t.group_maxima[B, tiles](logits, best, count, V, stride, **settings, num_warps=4)
    settings |= dict(ROOM=FOUND)
    # The search for the k-th ends a little early, which saves more than the few candidates that it adds cost.
    t.candidates[B, tiles](logits, best, found, count, V, stride, k, k + k // 16 + 8, **settings, num_warps=8)
    t.in_order[B, -(-k // 16) + 2](logits, found, count, values, ids, V, stride, k, tiles, **settings, num_warps=4)
    return values, ids


# ----------------------------------------------------------------------------------------------------- the modules
def stored(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, scale) of a plain or quantized linear, as `linear` takes them."""
    words = getattr(linear, "scale_zero", None)
    return linear.weight, getattr(linear, "scale", None) if words is None else words


def few_rows(x: Tensor) -> bool:
    """Whether x has so few rows that its linears stream their weights."""
    return x.numel() // x.shape[-1] <= SMALL_M


def one_pass(*tensors: Tensor) -> bool:
    """Whether to run an operator for many rows: where no compiler fuses the plain form, and no gradient is wanted."""
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not (few_rows(tensors[0]) or torch.compiler.is_compiling() or trained)


class FusedLinear(nn.Linear):
    """nn.Linear whose weight is streamed for few rows; made from one, sharing its parameters."""

    def __init__(self, plain: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: Tensor) -> Tensor:
        if not few_rows(x):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.hotloop.linear(x, self.weight, None, self.bias, None, None, 0.0, 0.0, "")


class FusedNorm(nn.Module):
    """model.RMSNorm in one pass for many rows; of few it is part of a linear, or of what a compiler fuses."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.weight, self.eps, self.offset = plain.weight, plain.eps, plain.offset

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.ops.hotloop.rms_norm if one_pass(x, self.weight) else rms_norm_reference
        return norm(x, self.weight, self.eps, self.offset)


class FusedNormLinear(nn.Module):
    """norm -> linear, in one kernel for few rows. Made from model.NormLinear."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.norm, self.linear = plain.norm, plain.linear

    def forward(self, x: Tensor) -> Tensor:
        if not few_rows(x):
            return self.linear(self.norm(x))
        n = self.norm
        return torch.ops.hotloop.linear(
            x, *stored(self.linear), self.linear.bias, n.weight, None, n.eps, n.offset, ""
        )


class FusedNormGateUp(nn.Module):
    """norm -> gate and up -> act(gate) * up, in one kernel for few rows. Made from model.NormGateUp."""

    def __init__(self, plain: nn.Module, activation: str):
        super().__init__()
        self.norm, self.linear, self.name = plain.norm, plain.linear, activation

    def forward(self, x: Tensor) -> Tensor:
        if not few_rows(x):
            y = self.linear(self.norm(x))
            return (torch.ops.hotloop.gated if one_pass(y) else gated_reference)(y, self.name)
        n = self.norm
        return torch.ops.hotloop.linear(
            x, *stored(self.linear), self.linear.bias, n.weight, None, n.eps, n.offset, self.name
        )


class FusedLinearResidual(nn.Module):
    """x + linear(y), in one kernel for few rows. Made from model.LinearResidual without a post_norm."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.linear = plain.linear
        # Where the columns are split over ranks, their results are summed, and one of them adds the residual.
        self.all_reduce, self.adds_residual = getattr(plain, "all_reduce", None), getattr(plain, "adds_residual", True)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        residual = x if self.adds_residual else None
        if few_rows(y):
            z = torch.ops.hotloop.linear(y, *stored(self.linear), self.linear.bias, None, residual, 0.0, 0.0, "")
        else:
            z = self.linear(y) if residual is None else residual + self.linear(y)
        return z if self.all_reduce is None else self.all_reduce(z)


class FusedAttention(nn.Module):
    """model.Attention in one kernel for a few new tokens a row, at positions that follow one another (the last may be
    repeated). For more of them, one kernel for all that comes before attention itself; without a cache, the plain one.

    The context is split over programs by each row's own length, read on the device: cost follows the context, one
    compiled graph serves all lengths. The G query heads of a kv head share a program, so K and V are read once.
    """

    def __init__(self, plain: nn.Module, device: torch.device):
        self.__dict__ = plain.__dict__  # one state (norms, cache, settings), two forwards
        self.any_length, self.attended, self.reads_own_length = plain.forward, plain.attended, True
        # Programs of a kv head that have finished; room for any batch that the grid allows. The kernel leaves zeros.
        self.register_buffer("count", torch.zeros(4096, dtype=torch.int32, device=device), persistent=False)

    def forward(self, qkv: Tensor, rope, input_pos: Tensor, slots: Tensor | None) -> Tensor:
        T, cache, many = qkv.shape[1], self.cache, qkv.shape[1] * self.group > ATTEND_ROWS
        if slots is None or not use_triton(qkv):
            return self.any_length(qkv, rope, input_pos, slots)
        norms = (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
        eps, offset = (0.0, 0.0) if self.q_norm is None else (self.q_norm.eps, self.q_norm.offset)
        if many:
            q = torch.ops.hotloop.rotated_queries(
                qkv, *rope, input_pos, cache.k, cache.v, cache.k_scale, cache.v_scale, *norms, self.group, eps, offset
            )
            # Where no slots are to be attended to, the tokens are a context's first, and so are their own slots.
            own = cache.read(len(q), 0 if slots.shape[0] else T, q.dtype)
            return self.attended(q.transpose(1, 2), *own, input_pos, slots)
        return torch.ops.hotloop.attend(
            qkv, *rope, input_pos, cache.k, cache.v, cache.k_scale, cache.v_scale, self.count, *norms,
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
        D = layer.attention.head_dim
        if D >= 32 and D & (D - 1) == 0:  # a tile's sides are powers of two
            layer.attention = FusedAttention(layer.attention, model.tok_embeddings.weight.device)
        layer.qkv = FusedNormLinear(layer.qkv)
        if layer.out.post_norm is None:
            layer.out = FusedLinearResidual(layer.out)
        if not layer.is_moe:
            layer.gate_up = FusedNormGateUp(layer.gate_up, model.args.activation)
            if layer.down.post_norm is None:
                layer.down = FusedLinearResidual(layer.down)
    norm = type(model.norm)
    for name, module in list(model.named_modules()):
        swap = FusedLinear if type(module) is nn.Linear and not name.endswith("router") else None
        swap = FusedNorm if type(module) is norm else swap
        if swap:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, swap(module))


# ----------------------------------------------------------------------------------------------- the Triton programs
@functools.cache
def _triton() -> SimpleNamespace:
    """Import Triton, define the kernels, register the operators of this file; once."""
    # Kernels look up what they use among the names of this module.
    global tl, INTERPRETED, wait_for_input, four, byte_at, dp4a, largest, digits, by_place
    global activated, as_numbers, centered_nibbles, weight_rows, finish, arrive, head_norm, rotated, attended
    global head_scale, as_e4m3, words_at, from_words, LOWEST, sort_keys, between, collect
    import triton
    import triton.language as tl
    from triton.language.extra import cuda

    INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # it knows no inline assembly

    @triton.jit
    def read_sum(x, out, n, BLOCK: tl.constexpr):
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
            i = start + tl.arange(0, BLOCK).to(tl.int64)
            total += tl.load(x + i, mask=i < n, other=0.0)
        tl.store(out + tl.program_id(0), tl.sum(total))

    @triton.jit
    def wait_for_input(OVERLAP: tl.constexpr):
        """Programmatic dependent launch: until here, the kernel before this one may still run; from here on, the next
        one may start. What was written two kernels ago is complete even before this, because the kernel in between
        either waited like this before it let this one start, or is of another kind, which lets nothing start early.
        What the kernel right before this one wrote is complete only after this, whatever its kind.
        """
        if OVERLAP:
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()

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
    def activated(v, ACTIVATION: tl.constexpr):
        if ACTIVATION == "silu":
            v = v / (1 + tl.exp(-v))
        elif ACTIVATION == "gelu_tanh":
            e = tl.exp(1.5957691216057308 * (v + 0.044715 * v * v * v))  # 2 sqrt(2 / pi)
            v = v * (1 - 1 / (e + 1))
        else:
            v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
        return v

    @triton.jit
    def gemv(
        x, w, scale, bias, norm, residual, y, N, K: tl.constexpr, eps, offset, KIND: tl.constexpr, GROUP: tl.constexpr,
        ACTIVATION: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
        STAGES: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """One row of x: each program keeps all of it (normalized) in registers and walks over rows of W, BN at a time.

        The walk is pipelined: the next rows are on their way while these are summed; and the first of them are sent for
        before x is waited for, while the kernel before this one still runs. Quantized weights are read as 32-bit words.
        A byte becomes a float by placing its bits in the mantissa of 1.0, one instruction instead of a slow conversion;
        what that adds, a multiple of x, is subtracted lane by lane, where it is small (EXACT, for float32 x: before the
        product). Nibbles are multiplied as integers, four to an instruction: the x of each group become integers of
        15 bits (EXACT: 20), relative to the group's largest, and these two or three signed bytes.
        """
        R: tl.constexpr = BN * 2 if ACTIVATION != "" else BN
        r = tl.arange(0, R)
        begin = tl.program_id(0) * BN
        inv = 1.0
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

    @triton.jit
    def head_norm(a, b, weight, i, D: tl.constexpr, eps, offset, dtype: tl.constexpr):
        """RMSNorm of heads given as two halves, [R, D/2] each, rounded to the model's dtype as the plain one is."""
        inv = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        a = a * inv * (tl.load(weight + i).to(tl.float32) + offset)[None, :]
        b = b * inv * (tl.load(weight + D // 2 + i).to(tl.float32) + offset)[None, :]
        return a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)

    @triton.jit
    def rotated(a, b, cos, sin, weight, i, D: tl.constexpr, eps, offset, dtype: tl.constexpr):
        """Halves of heads [R, D/2] each, normalized where there is a weight, and rotated; in the model's dtype."""
        a, b = a.to(tl.float32), b.to(tl.float32)
        if weight is not None:
            a, b = head_norm(a, b, weight, i, D, eps, offset, dtype)
        return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)

    @triton.jit
    def head_scale(top):
        """model.to_fp8's scale of vectors whose largest elements are `top`; rounded to bf16 by its bits."""
        bits = (tl.maximum(top.to(tl.float32), 2.0**-100) / 256).to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & -65536).to(tl.float32, bitcast=True)

    @triton.jit
    def as_e4m3(x, scale):
        """Vectors [TP, N] over their scales as bytes of e4m3, rounded to the nearest."""
        x = tl.div_rn(x.to(tl.float32), tl.broadcast_to(scale[:, None], x.shape))
        if INTERPRETED:  # it loses the carry from mantissa to exponent, but converts well what is rounded already
            step = tl.maximum(tl.abs(x), 2.0**-6).to(tl.int32, bitcast=True) & 0x7F800000
            large = step.to(tl.float32, bitcast=True) * (1.5 * 2.0**20)
            x = (x + large) - large
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)

    @triton.jit
    def words_at(k_cache, v_cache, k_scale, v_scale, at, mask, D: tl.constexpr):
        """Keys [BS, D/8] twice and values [BS, D/4] of e4m3, four in a word, and their scales [BS]."""
        h, j = tl.arange(0, D // 8), tl.arange(0, D // 4)
        k = k_cache + (at * (D // 4))[:, None]
        k1 = tl.load(k + h[None, :], mask=mask[:, None], other=0)
        k2 = tl.load(k + D // 8 + h[None, :], mask=mask[:, None], other=0)
        v = tl.load(v_cache + (at * (D // 4))[:, None] + j[None, :], mask=mask[:, None], other=0)
        return k1, k2, v, tl.load(k_scale + at, mask=mask, other=0.0), tl.load(v_scale + at, mask=mask, other=0.0)

    @triton.jit
    def from_words(x, dtype: tl.constexpr):
        """Four e4m3 a word [N, M] -> numbers [N, 4M], exactly: in fp16, where two take one instruction, or float32."""
        if INTERPRETED:
            x0, x1 = (x & 255).to(tl.uint8), (x >> 8 & 255).to(tl.uint8)
            x2, x3 = (x >> 16 & 255).to(tl.uint8), (x >> 24 & 255).to(tl.uint8)
        else:
            asm: tl.constexpr = """{ .reg .b32 a, b; .reg .b16 l, h; mov.b32 {l, h}, $4;
                cvt.rn.f16x2.e4m3x2 a, l; cvt.rn.f16x2.e4m3x2 b, h; mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }"""
            fp16: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
            x0, x1, x2, x3 = tl.inline_asm_elementwise(asm, "=h,=h,=h,=h,r", [x], dtype=fp16, is_pure=True, pack=1)
        x = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(x.shape[0], 4 * x.shape[1])
        return as_numbers(x, dtype, "fp8" if INTERPRETED else "float", False)

    @triton.jit
    def attended(
        q1, q2, k1, k2, v, k_scale, v_scale, seen, top, total, acc, scale, softcap, SOFTCAP: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Online softmax: take some more keys [D/2, BS] twice and values [BS, D] into account, where seen [R, BS].

        Scales [BS] of keys and values, where they have some, go on the scores and on the probabilities.
        """
        scores = tl.dot(q1, k1, input_precision=PRECISION) + tl.dot(q2, k2, input_precision=PRECISION)
        scores *= scale
        if k_scale is not None:
            scores *= k_scale.to(tl.float32)[None, :]
        if SOFTCAP:  # softcap * tanh(scores / softcap)
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new == -float("inf"), 0.0, new)  # rows that have seen nothing yet
        e, fade = tl.exp(scores - base[:, None]), tl.exp(top - base)
        p = e
        if v_scale is not None:
            p = e * v_scale.to(tl.float32)[None, :]
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        return new, total * fade + tl.sum(e, 1), acc

    @triton.jit
    def attend(
        qkv, cos, sin, pos, q_norm, k_norm, k_cache, v_cache, k_scale, v_scale, part, count, y, S, T, scale, softcap,
        eps, offset, window, K: tl.constexpr, G: tl.constexpr, R: tl.constexpr, TP: tl.constexpr, D: tl.constexpr,
        SPLITS: tl.constexpr, SP: tl.constexpr, BS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
        PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Program (row b and kv head, split): its share of the context for G query heads of T new tokens.

        Keys and values of earlier steps are sent for before the input is waited for. The program of the last split
        takes the new tokens from the input itself, and writes them to the cache. The last program of a kv head to
        finish (counted by an atomic) combines the splits: a second kernel would cost a launch a layer.

        k_scale, v_scale: where the caches are e4m3. New tokens are then attended to as later steps will read them.
        """
        b, kv, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
        dtype: tl.constexpr = y.dtype.element_ty
        P: tl.constexpr = D // 2
        p = tl.load(pos + b * T)  # of the first new token: the slots before it are attended to
        first = p * 0
        if WINDOW:
            first = tl.maximum(p + 1 - window, 0)
        chunk = tl.maximum(tl.cdiv(tl.cdiv(p - first, SPLITS), BS), 1) * BS
        n = tl.maximum(tl.cdiv(p - first, chunk), 1)  # splits that have anything to do
        start = first + split * chunk
        end = tl.minimum(start + chunk, p)
        i, d, s = tl.arange(0, P), tl.arange(0, D), tl.arange(0, BS)
        row = (b * K + kv).to(tl.int64) * S
        base = row * D
        at = base + (start + s).to(tl.int64) * D
        m = start + s < end
        if k_scale is None:
            k1 = tl.load(k_cache + at[None, :] + i[:, None], mask=m[None, :], other=0.0)
            k2 = tl.load(k_cache + at[None, :] + P + i[:, None], mask=m[None, :], other=0.0)
            v = tl.load(v_cache + at[:, None] + d[None, :], mask=m[:, None], other=0.0)
        else:
            k1, k2, v, k_of, v_of = words_at(k_cache, v_cache, k_scale, v_scale, row + start + s, m, D)
        wait_for_input(OVERLAP)
        if split < n:
            r = tl.arange(0, R)  # token r // G, query head r % G of the kv head
            mr = r < G * T
            row_pos = tl.load(pos + b * T + r // G, mask=mr, other=0)
            token = qkv + b * T * (K * (G + 2) * D)
            q = token + ((r // G) * (K * (G + 2) * D) + (kv * G + r % G) * D)[:, None] + i[None, :]
            angle = ((b * T + r // G) * P)[:, None] + i[None, :]
            q1, q2 = rotated(
                tl.load(q, mask=mr[:, None], other=0.0), tl.load(q + P, mask=mr[:, None], other=0.0),
                tl.load(cos + angle, mask=mr[:, None], other=0.0), tl.load(sin + angle, mask=mr[:, None], other=0.0),
                q_norm, i, D, eps, offset, dtype,
            )  # fmt: skip
            if k_scale is not None:
                number: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
                q_of = head_scale(tl.maximum(tl.max(tl.abs(q1), 1), tl.max(tl.abs(q2), 1)))  # into fp16's range
                q1 = (q1.to(tl.float32) / q_of[:, None]).to(number)
                q2 = (q2.to(tl.float32) / q_of[:, None]).to(number)
                row_scale = (scale * q_of)[:, None]
                unit = tl.full([], 2.0**-120, tl.float32)  # acc is in units of the largest scale of values so far
            top = tl.full([R], -float("inf"), tl.float32)
            total = tl.zeros([R], tl.float32)
            acc = tl.zeros([R, D], tl.float32)
            for t0 in tl.range(start, end, BS, num_stages=1):
                slot = t0 + s
                seen = mr[:, None] & (slot < end)[None, :]
                if WINDOW:
                    seen = seen & (slot[None, :] > row_pos[:, None] - window)
                next_slot = slot + BS  # on their way while these are worked on
                at = base + next_slot.to(tl.int64) * D
                m = next_slot < end
                if k_scale is None:
                    next_k1 = tl.load(k_cache + at[None, :] + i[:, None], mask=m[None, :], other=0.0)
                    next_k2 = tl.load(k_cache + at[None, :] + P + i[:, None], mask=m[None, :], other=0.0)
                    next_v = tl.load(v_cache + at[:, None] + d[None, :], mask=m[:, None], other=0.0)
                    top, total, acc = attended(
                        q1, q2, k1, k2, v, None, None, seen, top, total, acc, scale, softcap, SOFTCAP, PRECISION
                    )
                else:
                    next_k1, next_k2, next_v, next_k_of, next_v_of = words_at(
                        k_cache, v_cache, k_scale, v_scale, row + next_slot, m, D
                    )
                    new_unit = tl.maximum(unit, tl.max(v_of.to(tl.float32), 0))
                    acc *= unit / new_unit
                    unit = new_unit
                    top, total, acc = attended(
                        q1, q2, tl.trans(from_words(k1, number)), tl.trans(from_words(k2, number)),
                        from_words(v, number), k_of, v_of.to(tl.float32) / unit, seen, top, total, acc, row_scale,
                        softcap, SOFTCAP, PRECISION,
                    )  # fmt: skip
                    k_of, v_of = next_k_of, next_v_of
                k1, k2, v = next_k1, next_k2, next_v
            if split == n - 1:
                t = tl.arange(0, TP)
                mt = t < T
                new_pos = tl.load(pos + b * T + t, mask=mt, other=0)
                before = tl.load(pos + b * T + t - 1, mask=mt & (t > 0), other=-1)
                k = token + (t * (K * (G + 2) * D) + (K * G + kv) * D)[:, None]
                turn = ((b * T + t) * P)[:, None] + i[None, :]
                own_k1, own_k2 = rotated(
                    tl.load(k + i[None, :], mask=mt[:, None], other=0.0),
                    tl.load(k + P + i[None, :], mask=mt[:, None], other=0.0),
                    tl.load(cos + turn, mask=mt[:, None], other=0.0),
                    tl.load(sin + turn, mask=mt[:, None], other=0.0),
                    k_norm, i, D, eps, offset, dtype,
                )  # fmt: skip
                own_v = tl.load(k + K * D + d[None, :], mask=mt[:, None], other=0.0)
                own = (base + new_pos.to(tl.int64) * D)[:, None]
                if k_scale is None:
                    tl.store(k_cache + own + i[None, :], own_k1, mask=mt[:, None])
                    tl.store(k_cache + own + P + i[None, :], own_k2, mask=mt[:, None])
                    tl.store(v_cache + own + d[None, :], own_v, mask=mt[:, None])
                else:
                    own_k_of = head_scale(tl.maximum(tl.max(tl.abs(own_k1), 1), tl.max(tl.abs(own_k2), 1)))
                    own_v_of = head_scale(tl.max(tl.abs(own_v), 1))
                    own_k1, own_k2 = as_e4m3(own_k1, own_k_of), as_e4m3(own_k2, own_k_of)
                    own_v = as_e4m3(own_v, own_v_of)
                    k_bytes, v_bytes = k_cache.to(tl.pointer_type(tl.uint8)), v_cache.to(tl.pointer_type(tl.uint8))
                    tl.store(k_bytes + own + i[None, :], own_k1, mask=mt[:, None])
                    tl.store(k_bytes + own + P + i[None, :], own_k2, mask=mt[:, None])
                    tl.store(v_bytes + own + d[None, :], own_v, mask=mt[:, None])
                    tl.store(k_scale + row + new_pos, own_k_of.to(tl.bfloat16), mask=mt)
                    tl.store(v_scale + row + new_pos, own_v_of.to(tl.bfloat16), mask=mt)
                # A token that only repeats the one before it is not seen twice.
                own_seen = mr[:, None] & (mt & (new_pos != before))[None, :] & (new_pos[None, :] <= row_pos[:, None])
                if WINDOW:
                    own_seen = own_seen & (new_pos[None, :] > row_pos[:, None] - window)
                if k_scale is None:
                    top, total, acc = attended(
                        q1, q2, tl.trans(own_k1), tl.trans(own_k2), own_v, None, None, own_seen, top, total, acc, scale,
                        softcap, SOFTCAP, PRECISION,
                    )  # fmt: skip
                else:
                    new_unit = tl.maximum(unit, tl.max(own_v_of, 0))
                    acc *= unit / new_unit
                    unit = new_unit
                    own_k1, own_k2 = as_numbers(own_k1, number, "fp8", False), as_numbers(own_k2, number, "fp8", False)
                    own_v = as_numbers(own_v, number, "fp8", False)
                    top, total, acc = attended(
                        q1, q2, tl.trans(own_k1), tl.trans(own_k2), own_v, own_k_of, own_v_of / unit, own_seen, top,
                        total, acc, row_scale, softcap, SOFTCAP, PRECISION,
                    )  # fmt: skip
            if k_scale is not None:
                acc *= unit
            out = y + (b * T + r // G)[:, None] * (K * G * D) + (kv * G + r % G)[:, None] * D + d[None, :]
            if n == 1:
                total = tl.where(mr, total, 1.0)
                tl.store(out, (acc / total[:, None]).to(y.dtype.element_ty), mask=mr[:, None])
            else:
                cell = part + (b * K + kv) * SPLITS * R * (D + 2)  # a split: acc [R, D], top [R], total [R]
                mine = cell + split * R * (D + 2)
                tl.store(mine + r[:, None] * D + d[None, :], acc, mask=mr[:, None])
                tl.store(mine + R * D + r, top)
                tl.store(mine + R * D + R + r, total)
                tl.debug_barrier()  # all of the program's stores come before its arrival is counted
                if tl.atomic_add(count + b * K + kv, 1, sem="acq_rel") == n - 1:
                    j = tl.arange(0, SP)
                    tops = cell + (j * R * (D + 2) + R * D)[:, None] + r[None, :]
                    mj = (j < n)[:, None]
                    top_j = tl.load(tops, mask=mj, other=-float("inf"), cache_modifier=".cg")
                    top = tl.max(top_j, 0)
                    top = tl.where(top == -float("inf"), 0.0, top)
                    total_j = tl.load(tops + R, mask=mj, other=0.0, cache_modifier=".cg")
                    total = tl.where(mr, tl.sum(total_j * tl.exp(top_j - top[None, :]), 0), 1.0)
                    acc = tl.zeros([R, D], tl.float32)
                    for other in tl.range(0, n, num_stages=3):
                        theirs = cell + other * R * (D + 2)
                        gain = tl.exp(tl.load(theirs + R * D + r, cache_modifier=".cg") - top)
                        a = tl.load(
                            theirs + r[:, None] * D + d[None, :], mask=mr[:, None], other=0.0, cache_modifier=".cg"
                        )
                        acc += a * gain[:, None]
                    tl.store(out, (acc / total[:, None]).to(y.dtype.element_ty), mask=mr[:, None])
                    tl.store(count + b * K + kv, 0)

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

    @triton.jit(do_not_specialize=["N", "T", "S"])  # one program for all lengths
    def rotated_queries(
        qkv, cos, sin, pos, q_norm, k_norm, k_cache, v_cache, k_scale, v_scale, q, N, T, S, eps, offset,
        G: tl.constexpr, D: tl.constexpr, BT: tl.constexpr,
    ):  # fmt: skip
        """Program (some of the N = B T tokens, kv head): its G query heads, its keys and its values."""
        kv, K = tl.program_id(1), tl.num_programs(1)
        dtype: tl.constexpr = q.dtype.element_ty
        P: tl.constexpr = D // 2
        n, i, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, P), tl.arange(0, D)
        m = (n < N)[:, None]
        angle = (n * P)[:, None] + i[None, :]
        c, s = tl.load(cos + angle, mask=m, other=0.0), tl.load(sin + angle, mask=m, other=0.0)
        token = n.to(tl.int64)[:, None]
        slot = tl.load(pos + n, mask=n < N, other=0).to(tl.int64)
        row = ((n // T).to(tl.int64) * K + kv) * S + slot
        own = (row * D)[:, None]
        k = qkv + token * ((G + 2) * D * K) + (G * K + kv) * D
        v = tl.load(k + K * D + d[None, :], mask=m, other=0.0)
        k1, k2 = tl.load(k + i[None, :], mask=m, other=0.0), tl.load(k + P + i[None, :], mask=m, other=0.0)
        k1, k2 = rotated(k1, k2, c, s, k_norm, i, D, eps, offset, dtype)
        if k_scale is not None:
            k_of = head_scale(tl.maximum(tl.max(tl.abs(k1), 1), tl.max(tl.abs(k2), 1)))
            v_of = head_scale(tl.max(tl.abs(v), 1))
            k1, k2, v = as_e4m3(k1, k_of), as_e4m3(k2, k_of), as_e4m3(v, v_of)
            tl.store(k_scale + row, k_of.to(tl.bfloat16), mask=n < N)
            tl.store(v_scale + row, v_of.to(tl.bfloat16), mask=n < N)
        tl.store(v_cache + own + d[None, :], v, mask=m)
        tl.store(k_cache + own + i[None, :], k1, mask=m)
        tl.store(k_cache + own + P + i[None, :], k2, mask=m)
        for j in tl.static_range(G):
            head = (kv * G + j) * D + i[None, :]
            x = qkv + token * ((G + 2) * D * K) + head
            q1, q2 = tl.load(x, mask=m, other=0.0), tl.load(x + P, mask=m, other=0.0)
            q1, q2 = rotated(q1, q2, c, s, q_norm, i, D, eps, offset, dtype)
            y = q + token * (G * D * K) + head
            tl.store(y, q1, mask=m)
            tl.store(y + P, q2, mask=m)

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

    LOWEST = tl.constexpr(-(1 << 63))

    @triton.jit
    def sort_keys(row, V, tile, R: tl.constexpr, C: tl.constexpr, G: tl.constexpr):
        """C of a row's G groups as int64 [R, C], larger for larger logits and among equal ones for lower ids.

        So no two are equal, and every number of largest ones is well defined. Beyond the row's end it is the lowest.
        """
        i = tl.arange(0, R)[:, None] * G + (tile * C + tl.arange(0, C))[None, :]
        v = tl.load(row + i, mask=i < V, other=0.0).to(tl.float32)
        bits = tl.where(v == 0, 0.0, v).to(tl.int32, bitcast=True)  # -0 is 0
        bits = tl.where(v != v, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))  # integers in the order of floats
        return tl.where(i < V, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - i).to(tl.int64), LOWEST)

    @triton.jit
    def between(low, high):
        return (low >> 1) + (high >> 1) + (low & high & 1)  # the sum itself may overflow

    @triton.jit
    def collect(keys, low, count, found, ROOM: tl.constexpr):
        """Append the keys from `low` on to `found`, in any order; beyond its room they are only counted."""
        there = keys >= low
        at = tl.atomic_add(count + tl.zeros(keys.shape, tl.int32), 1, mask=there, sem="relaxed")
        tl.store(found + at, keys, mask=there & (at < ROOM))

    @triton.jit
    def group_maxima(
        logits, best, count, V, stride, R: tl.constexpr, C: tl.constexpr, G: tl.constexpr, OVERLAP: tl.constexpr
    ):
        """Program (row, tile): the largest of each of C groups. And zeros, to count the row's candidates from."""
        b, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
        wait_for_input(OVERLAP)
        keys = sort_keys(logits + b * stride, V, tile, R, C, G)
        tl.store(best + b * G + tile * C + tl.arange(0, C), tl.max(keys, 0))
        if tile == 0:
            tl.store(count + b, 0)
            tl.store(count + tl.num_programs(0) + b, 0)

    @triton.jit(do_not_specialize=["k", "enough"])  # one program for all k
    def candidates(
        logits, best, found, count, V, stride, k, enough, R: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
        ROOM: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Program (row, tile): collect those of its logits that are not below (about) the k-th largest maximum.

        The k largest logits are not, because k maxima are not. Each program finds that bound by itself.
        """
        b, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
        keys = sort_keys(logits + b * stride, V, tile, R, C, G)  # written two kernels ago
        wait_for_input(OVERLAP)
        tops = tl.load(best + b * G + tl.arange(0, G), cache_modifier=".cg")
        # At least k are from `low` on, fewer are from `high` on. Groups may be empty, if V is small.
        high = tl.max(tops) + 1
        low = tl.min(tl.where(tops == LOWEST, high, tops))
        n = tl.sum((tops >= low).to(tl.int32))
        while n > enough:
            middle = between(low, high)
            m = tl.sum((tops >= middle).to(tl.int32))
            high = tl.where(m < k, middle, high)
            low, n = tl.where(m < k, low, middle), tl.where(m < k, n, m)
        collect(keys, low, count + b, found + b * 2 * ROOM, ROOM)

    @triton.jit(do_not_specialize=["k"])
    def in_order(
        logits, found, count, values, ids, V, stride, k, TILES, R: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
        ROOM: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Program (row, share): put its candidates in their places, which are the numbers of candidates above them."""
        b, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * 16
        step = tl.num_programs(1) * 16
        row, found, count = logits + b * stride, found + b * 2 * ROOM, count + b
        wait_for_input(OVERLAP)
        n = tl.load(count, cache_modifier=".cg")
        if n > ROOM:  # the largest crowd in few groups: one program searches again, slowly, among all logits of the row
            if start == 0:
                low, high = tl.full([], LOWEST + 1, tl.int64), tl.full([], -LOWEST - 1, tl.int64)
                while n > ROOM:
                    middle = between(low, high)
                    m = n * 0
                    for t in range(TILES):
                        m += tl.sum((sort_keys(row, V, t, R, C, G) >= middle).to(tl.int32))
                    high = tl.where(m < k, middle, high)
                    low, n = tl.where(m < k, low, middle), tl.where(m < k, n, m)
                found += ROOM  # other programs of the row may read the first count and room later than this
                for t in range(TILES):
                    collect(sort_keys(row, V, t, R, C, G), low, count + tl.num_programs(0), found, ROOM)
                tl.debug_barrier()
                step = 16
            else:
                n = 0
        i, j = tl.arange(0, 16), tl.arange(0, 256)
        for i0 in range(start, n, step):
            mine = tl.load(found + i0 + i, mask=i0 + i < n, other=0, cache_modifier=".cg")
            place = tl.zeros([16], tl.int32)
            for j0 in range(0, n, 256):
                theirs = tl.load(found + j0 + j, mask=j0 + j < n, other=LOWEST, cache_modifier=".cg")
                place += tl.sum((theirs[None, :] > mine[:, None]).to(tl.int32), 1)
            kept = (i0 + i < n) & (place < k)
            bits = (mine >> 32).to(tl.int32)
            value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            tl.store(values + b * k + place, value.to(values.dtype.element_ty), mask=kept)
            tl.store(ids + b * k + place, 0x7FFFFFFF - (mine & 0x7FFFFFFF), mask=kept)

    library = torch.library.Library("hotloop", "FRAGMENT")
    library.define(
        "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? norm, Tensor? residual, "
        "float eps, float offset, str activation) -> Tensor"
    )
    library.define(
        "attend(Tensor qkv, Tensor cos, Tensor sin, Tensor pos, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor(e!) count, Tensor? q_norm, Tensor? k_norm, int group, "
        "float scale, float softcap, int window, float eps, float offset) -> Tensor"
    )
    library.define("top_k(Tensor logits, int k) -> (Tensor, Tensor)")
    library.define("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor")
    library.define("gated(Tensor gate_up, str activation) -> Tensor")
    library.define(
        "rotated_queries(Tensor qkv, Tensor cos, Tensor sin, Tensor pos, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? q_norm, Tensor? k_norm, int group, float eps, "
        "float offset) -> Tensor"
    )
    library.define("dequantized(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor")
    for operator in (_linear, _attend, _top_k, _rms_norm, _gated, _rotated_queries, _dequantized):
        library.impl(operator.__name__[1:], operator, "CompositeExplicitAutograd")

    @torch.library.register_fake("hotloop::linear", lib=library)
    def linear_shape(x, weight, scale, bias, norm, residual, eps, offset, activation):
        return x.new_empty(*x.shape[:-1], weight.shape[0] // (2 if activation else 1))

    @torch.library.register_fake("hotloop::attend", lib=library)
    def attend_shape(qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, count, q_norm, k_norm, group, *more):
        return qkv.new_empty(*qkv.shape[:2], k_cache.shape[1] * group * k_cache.shape[3])

    @torch.library.register_fake("hotloop::top_k", lib=library)
    def top_k_shape(logits, k):
        return logits.new_empty(len(logits), k), logits.new_empty(len(logits), k, dtype=torch.int64)

    @torch.library.register_fake("hotloop::rms_norm", lib=library)
    def rms_norm_shape(x, weight, eps, offset):
        return x.new_empty(x.shape)

    @torch.library.register_fake("hotloop::gated", lib=library)
    def gated_shape(gate_up, activation):
        return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @torch.library.register_fake("hotloop::rotated_queries", lib=library)
    def rotated_queries_shape(qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, q_norm, k_norm, group, *more):
        return qkv.new_empty(*qkv.shape[:2], k_cache.shape[1] * group, k_cache.shape[3])

    @torch.library.register_fake("hotloop::dequantized", lib=library)
    def dequantized_shape(weight, scale, dtype):
        return weight.new_empty(len(weight), weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1), dtype=dtype)

    return SimpleNamespace(
        read_sum=read_sum, gemv=gemv, small=small, attend=attend, group_maxima=group_maxima,
        candidates=candidates, in_order=in_order, rms_norm=rms_norm, gated=gated, rotated_queries=rotated_queries,
        dequantized=dequantized, library=library,
    )  # fmt: skip
