"""Fast linears of few rows for the CPU, in C++ (kernels_cpu.cpp), each beside its plain PyTorch reference.

Decoding reads each weight once for each token, so these kernels are made to run at the memory's read bandwidth.
The C++ is compiled when a kernel is first wanted (a few seconds, once for a machine) and cached; without a compiler,
or with HOTLOOP_NO_CPP=1, the references run and give the same numbers. Nothing is built or imported on import.

Shapes: x [..., K] bfloat16 or float32, y [..., N] in x's dtype, bias [N]. Sums are in float32, and activations are
never quantized. Weights: bf16 [N, K]; int8 [N, K] with a float32 scale [N]; int4 as `pack_int4` makes it.

Try it:  python -c "import torch, kernels_cpu as k; print(k.available());
         print(k.linear_bf16(torch.ones(1, 64), torch.ones(8, 64, dtype=torch.bfloat16)))"

Sources: PyTorch's stable ABI (docs.pytorch.org, "LibTorch Stable ABI"); kernels_cpu.cpp names those of the kernels.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to so many rows of x, in bfloat16 and in float32, a kernel beats dequantising and F.linear: measured with AVX-512's
# bf16 products, and without them (AVX2), where both compute in float32.
MAX_ROWS = {"bf16": (16, 16), "int8": (96, 48), "int4": (96, 48)}
MAX_ROWS_PLAIN = 32
SLOW_ROWS = 8  # in bf16 without oneDNN, up to which F.linear beats one in float32, whose weights are made anew
# Bytes of weights to dequantise at once: their memory is then reused, where that of a larger tensor is mapped anew each
# time, which takes longer than dequantising.
DEQUANTIZE = 1 << 24


# ----------------------------------------------------------------------------------------------------------- build
def available() -> bool:
    """Whether the C++ kernels can run; builds them at the first call. Never raises: one line on stderr says why not."""
    return _load() is None


# What torch.compiler.assume_constant_result sets; the decorator itself imports torch._dynamo, a second of every start.
available._dynamo_marked_constant = True


@functools.cache
def _load() -> str | None:
    """Builds if need be, loads, registers. Returns None, or what went wrong (told on stderr once)."""
    if os.environ.get("HOTLOOP_NO_CPP") == "1":
        return "switched off"
    try:
        torch.ops.load_library(_build())
        _register()
        return None
    except Exception as error:  # whatever it is, the references still work
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"hotloop: no C++ CPU kernels, slower ones run instead ({reason})", file=sys.stderr)
        return reason


def _build() -> str:
    """Compiles kernels_cpu.cpp unless the cache has it; returns the library's path.

    The compiler is called directly: torch.utils.cpp_extension takes a second to import, and its lock file outlives
    a killed process. Here the lock dies with its process, and a rename makes the library appear whole or not at all.
    """
    source = Path(__file__).with_name("kernels_cpu.cpp")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler: install g++ or set CXX")
    torch_dir = Path(torch.__file__).parent
    command = [*compiler.split(), "-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-w", str(source)]
    command += [f"-I{torch_dir}/include", f"-L{torch_dir}/lib", "-ltorch_cpu", "-lc10"]
    command += os.environ.get("HOTLOOP_CXXFLAGS", "").split()
    # -march=native makes the library this CPU's own: a home directory shared between machines needs one for each.
    key = repr((command, source.read_bytes(), torch.__version__, _cpu_flags()))
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hotloop" / "cpp"
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default).expanduser()
    library = cache / f"kernels_cpu_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        import fcntl

        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():  # another process may have built it meanwhile
                unfinished = library.with_suffix(f".{os.getpid()}.tmp")
                try:
                    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
                    if done.returncode:
                        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["failed"]
                        raise RuntimeError(f"{compiler}: {errors[0]}")
                    unfinished.rename(library)
                finally:
                    unfinished.unlink(missing_ok=True)
    return str(library)


@functools.cache
def _cpu_flags() -> str:
    """The instruction sets of this CPU, as the system names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


_library: torch.library.Library | None = None


def _register() -> None:
    """The operators for experts; and of all of them shapes and dtypes for torch.compile, which then keeps each as one
    call."""
    global _library
    _library = torch.library.Library("hotloop", "FRAGMENT")
    for name, arguments in EXPERTS.items():
        _library.define(f"{name}({arguments}, Tensor expert) -> Tensor")
        _library.impl(name, _each_expert(globals()[name.replace("experts", "linear")]), "CPU")

    def linear(x, w, *args):
        return x.new_empty(*x.shape[:-1], w.shape[-2])

    for kind in ("bf16", "int8", "int4"):
        torch.library.register_fake(f"hotloop::linear_{kind}", linear)
        torch.library.register_fake(f"hotloop::experts_{kind}", linear)
    torch.library.register_fake("hotloop::dequantize_int8", lambda w, scale, dtype: torch.empty_like(w, dtype=dtype))
    torch.library.register_fake(
        "hotloop::dequantize_int4", lambda w, scales, groupsize, K, dtype: w.new_empty(w.shape[0], K, dtype=dtype)
    )


# --------------------------------------------------------------------------------------------------------- linears
def linear_bf16(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ w.T for w bfloat16 [N, K] contiguous."""
    if _few_rows(x, "bf16"):
        return torch.ops.hotloop.linear_bf16(x.contiguous(), w, _float(bias))
    if x.dtype == w.dtype and (not x.is_cpu or _fast_bf16() or x.numel() <= SLOW_ROWS * x.shape[-1]):
        return F.linear(x, w, None if bias is None else bias.to(x.dtype))
    return _blocks(x, w.shape[0], bias, lambda n, dtype: w[n].to(dtype))


def linear_int8(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ (w * scale[:, None]).T for w int8 [N, K] and scale float32 [N], contiguous."""
    if _few_rows(x, "int8"):
        return torch.ops.hotloop.linear_int8(x.contiguous(), w, scale, _float(bias))
    return _blocks(x, w.shape[0], bias, lambda n, dtype: dequantize_int8(w[n], scale[n], dtype))


def linear_int4(x: Tensor, w: Tensor, scales: Tensor, groupsize: int, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ ((q - zero) * scale).T for w, scales of `pack_int4`."""
    if _few_rows(x, "int4"):
        return torch.ops.hotloop.linear_int4(x.contiguous(), w, scales, groupsize, _float(bias))
    K = x.shape[-1]
    return _blocks(x, w.shape[0], bias, lambda n, dtype: dequantize_int4(w[n], scales[n], groupsize, K, dtype))


# Stacks of linears, [E, N, K] and the like, each row of x through its own: names and what they take.
EXPERTS = {
    "experts_bf16": "Tensor x, Tensor w",
    "experts_int8": "Tensor x, Tensor w, Tensor scale",
    "experts_int4": "Tensor x, Tensor w, Tensor scales, int groupsize",
}


def _each_expert(linear: Callable) -> Callable:
    """An operator: row n of x [N, K] through matrix expert[n] of a stack; a matrix that serves several is read once."""

    def run(x: Tensor, *stored) -> Tensor:
        *stored, expert = stored
        rows, each = {}, expert.tolist()  # expert -> its rows
        for n, e in enumerate(each):
            rows.setdefault(e, []).append(n)
        at = {e: [t[e] if isinstance(t, Tensor) else t for t in stored] for e in rows}
        if len(rows) == len(each) > 0:  # of one token: each has an expert of its own
            return torch.cat([linear(row, *at[e]) for row, e in zip(x.split(1), each, strict=True)])
        y = x.new_empty(len(x), stored[0].shape[-2])
        for e, mine in rows.items():
            y[mine] = linear(x[mine], *at[e])
        return y

    return run


def max_rows(kind: str, dtype: torch.dtype) -> int:
    """The most rows of x in this dtype for which the kernel of this kind runs, where it can."""
    return MAX_ROWS[kind][dtype == torch.float32] if _has_bf16_products() else MAX_ROWS_PLAIN


def _has_bf16_products() -> bool:
    return "avx512_bf16" in _cpu_flags()


_has_bf16_products._dynamo_marked_constant = True  # as for `available`


def _few_rows(x: Tensor, kind: str) -> bool:
    return x.numel() <= max_rows(kind, x.dtype) * x.shape[-1] and x.is_cpu and available()


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _fast_bf16() -> bool:
    """Whether PyTorch multiplies matrices in bf16 at the speed of float32 at least: where oneDNN does it."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # built without it
        return False


_fast_bf16._dynamo_marked_constant = True


def _blocks(x: Tensor, N: int, bias: Tensor | None, weight: Callable[[slice, torch.dtype], Tensor]) -> Tensor:
    """F.linear whose weight comes in blocks of output channels; in float32 where bf16 products would be slow."""
    dtype = x.dtype if _fast_bf16() else torch.float32
    step = max(DEQUANTIZE // (x.shape[-1] * dtype.itemsize), 1)
    blocks = [slice(n, n + step) for n in range(0, N, step)]
    bias, rows = None if bias is None else bias.to(dtype), x.to(dtype)
    y = [F.linear(rows, weight(n, dtype), None if bias is None else bias[n]).to(x.dtype) for n in blocks]
    return y[0] if len(y) == 1 else torch.cat(y, dim=-1)


# ------------------------------------------------------------------------------------------------- int4's packing
def pack_int4(w: Tensor, scale: Tensor, zero: Tensor, groupsize: int) -> tuple[Tensor, Tensor]:
    """Canonical int4 -> what the kernel streams: (w uint8 [N, C/2], scales int32 [N, C/groupsize]), C = K up to 256s.

    w uint8 [N, K/2] has the even column in the low nibble; scale, zero float16 [N, K/groupsize], groupsize 32, 64 or
    128. Columns of a block of 256 go where one instruction wants them together (see Int4 in kernels_cpu.cpp): column
    16 j + 8 l + 2 k + e of the block becomes nibble k of 16-bit half 2 j + e of line l. A group's word in `scales`
    has the scale's bits in its upper half and the zero's in its lower.
    """
    if groupsize not in (32, 64, 128) or 2 * w.shape[1] != groupsize * scale.shape[1]:
        raise ValueError(f"groupsize {groupsize} with w {list(w.shape)} and scale {list(scale.shape)}: it must be 32, "
                         "64 or 128, and divide the columns")  # fmt: skip
    pad = -w.shape[1] % 128
    w, scale, zero = F.pad(w, (0, pad)), *(F.pad(t, (0, 2 * pad // groupsize)) for t in (scale, zero))
    q = torch.stack([w & 15, w >> 4], dim=-1).view(w.shape[0], -1, 16, 2, 4, 2)  # n, block, j, l, k, e
    q = q.permute(0, 1, 3, 2, 5, 4)  # n, block, l, j, e, k: a half's nibbles are last
    packed = (q[..., 0::2] | q[..., 1::2] << 4).reshape(w.shape)
    bits = [t.to(torch.float16).contiguous().view(torch.int16).int() for t in (scale, zero)]
    return packed, bits[0] << 16 | bits[1] & 0xFFFF


def unpack_int4(w: Tensor, scales: Tensor, groupsize: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_int4`: canonical w, scale, zero of K columns."""
    q = torch.stack([w & 15, w >> 4], dim=-1).view(w.shape[0], -1, 2, 16, 2, 4)  # n, block, l, j, e, k
    q = q.permute(0, 1, 3, 2, 5, 4).reshape(w.shape[0], -1)[:, :K]
    bits = [t[:, : K // groupsize].short().view(torch.float16) for t in (scales >> 16, scales)]
    return q[:, 0::2] | q[:, 1::2] << 4, *bits


# ---------------------------------------------------------------------------------------------------- dequantising
def dequantize_int8(w: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """w int8 [N, K] * scale float32 [N] -> [N, K] in bfloat16 or float32."""
    if w.is_cpu and available():
        return torch.ops.hotloop.dequantize_int8(w, scale, dtype)
    return (w * scale[:, None]).to(dtype)


def dequantize_int4(w: Tensor, scales: Tensor, groupsize: int, K: int, dtype: torch.dtype) -> Tensor:
    """w, scales of `pack_int4` -> [N, K] in bfloat16 or float32."""
    if w.is_cpu and available():
        return torch.ops.hotloop.dequantize_int4(w, scales, groupsize, K, dtype)
    w, scale, zero = unpack_int4(w, scales, groupsize, K)
    q = torch.stack([w & 15, w >> 4], dim=-1).view(*scale.shape, groupsize)
    return ((q - zero[..., None].float()) * scale[..., None].float()).flatten(-2).to(dtype)


# ------------------------------------------------------------------------------------------------------- the model
class StreamedLinear(torch.nn.Linear):
    """A bfloat16 nn.Linear that streams its weight for few rows, and for many is not slower than a float32 one; made
    from one, sharing its parameters."""

    def __init__(self, plain: torch.nn.Linear):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear_bf16(x, self.weight, self.bias)


class StreamedExperts(torch.nn.Module):
    """The same for a stack of bias-free linears, weight bfloat16 [E, out, in]. Made from model.ExpertLinear."""

    def __init__(self, plain: torch.nn.Module):
        super().__init__()
        self.n_experts, self.in_features, self.out_features = plain.n_experts, plain.in_features, plain.out_features
        self.weight = plain.weight

    def one(self, x: Tensor, e: int) -> Tensor:
        """All rows of x [N, in] through expert e -> [N, out]."""
        return linear_bf16(x, self.weight[e])

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        if not x.is_cpu:  # the model has moved
            return torch.bmm(self.weight[expert], x[:, :, None])[:, :, 0]
        return torch.ops.hotloop.experts_bf16(x, self.weight, expert)


def fuse(model: torch.nn.Module) -> None:
    """Swap modules that stream in for the plain bfloat16 linears of a model on the CPU; parameters and names stay."""
    for name, module in list(model.named_modules()):
        weight, swap = getattr(module, "weight", None), None
        if not isinstance(weight, torch.nn.Parameter) or weight.dtype != torch.bfloat16:
            continue
        if type(module) is torch.nn.Linear and (available() or not _fast_bf16()):
            swap = StreamedLinear
        if weight.ndim == 3 and available():
            swap = StreamedExperts
        if swap:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, swap(module))
