"""Linears of a few rows, also of experts, and attention of a few new tokens, for Hopper GPUs and newer, in CUDA C++
(linear_cuda.cu, attend_cuda.cu): kernels.py runs them wherever `supports` and its like say so, and Triton elsewhere.
And sums of small tensors over several GPUs (exchange_cuda.cu), which tp.py runs where they are faster than NCCL's.

What Triton cannot be told: which warps copy weights and which compute, so that copies never wait; int8 weights, and
int4 ones for up to 4 rows, multiplied by tensor cores as the integers that they are; loads that begin before the kernel
before this one has ended, and stay in registers. The C++ is compiled by NVRTC, which every CUDA build of PyTorch brings
along, in half a second a variant, when it is first wanted, and kept in the user's cache directory; no compiler need be
installed. Nothing is loaded on import.

Try it (on such a GPU):  python -c "import torch, kernels_cuda as k; x = torch.ones(2, 256, device='cuda').bfloat16();
                         print(k.linear(x, torch.ones(8, 256, device='cuda').bfloat16()))"

Sources: the CUDA driver API (cuLaunchKernelEx, cuTensorMapEncodeTiled) and NVRTC's, both called through ctypes.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = {torch.bfloat16: 0, torch.float8_e4m3fn: 1, torch.int8: 2, torch.uint8: 3}
MAX_ROWS = 8  # of x, in one pass over the weight
MAX_PASSES = 4  # over a quantized one, for which other ways take longer (benchmarks/NOTES.md); of bf16 one
COLUMNS = (64, 128, 128, 256)  # by kind: what columns must be a multiple of, 128 bytes
ACTIVATIONS = {"": 0, "silu": 1, "gelu_tanh": 2, "gelu": 3}
TILE_ROWS, FLIGHT = 16, 4096  # as in linear_cuda.cu: rows of a tile, bytes of each that are on their way at most
PLACES = {1: 0, 2: 4, 4: 2}  # for tiles' sums that each other block sends, of so many blocks
MAX_COLUMNS, MAX_PANELS = 32768, 8
SPLIT, SPLIT_PAIRS = 28672, 65536  # rows times columns of x from which on two blocks share tiles
REGISTERS = 4096  # columns of x that fit into registers, of int4
MAX_MATRICES = 64  # that rows of y have, of a stack
MAX_STAGES = (5, 5, 5, 3)  # by kind; more take memory from the L1 cache, and are slower


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernel can run on a device: a GPU of compute capability 9.0 or more, with NVRTC at hand."""
    return has_nvrtc(device) and _overlaps(device)


def supports(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None,
             norm: Tensor | None = None, residual: Tensor | None = None, pairs: bool = False) -> bool:  # fmt: skip
    """Whether `linear` should take these: bf16, so few rows, and columns and addresses that fill its copies.

    pairs: with an activation.
    """
    kind, K = KINDS.get(weight.dtype), x.shape[-1]
    rows = x.numel() // K
    if kind is None or not 0 < rows <= MAX_ROWS * (MAX_PASSES if kind else 1) or K > MAX_COLUMNS or K % COLUMNS[kind]:
        return False
    if not available(x.device) or any(t is not None and t.dtype != torch.bfloat16 for t in (x, bias, norm, residual)):
        return False
    if (scale is None) != (kind == 0) or (kind and scale.dtype != (torch.int32 if kind == 3 else torch.float32)):
        return False
    for t in (weight, scale, bias, norm):
        if t is not None and (t.device != x.device or not t.is_contiguous() or t.data_ptr() % 16):
            return False
    if x.is_contiguous() and x.data_ptr() % 16:  # else it is copied
        return False
    group = K // scale.shape[1] if kind == 3 else 32
    if kind == 3 and (group not in (32, 64, 128) or K % (8 * group)):
        return False
    each = {min(MAX_ROWS, rows - first) for first in range(0, rows, MAX_ROWS)}
    return all(_plan(kind, group, M, weight.shape[0] // (1 + pairs), K, pairs, x.device).fits() for M in each)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None,
           norm: Tensor | None = None, residual: Tensor | None = None, eps: float = 0.0, offset: float = 0.0,
           activation: str = "", exchange: "Exchange | None" = None) -> Tensor:  # fmt: skip
    """`kernels.linear_reference` for what `supports` accepts: x bf16 [..., K] -> bf16 [..., N].

    exchange: of GPUs each of which has some of the columns; then y is the residual, which must be there and the same on
    all of them, plus the sum over them of what each computes, in float32, and rounded once. See `Exchange.linear`. Not
    with a norm or an activation, which need all columns.

    The weight is read once for each 8 rows. Sums in float32. x meets int8 and int4 weights as 15-bit integers, relative
    to the largest of 128 columns, or of 32; fp8 ones as fp16, relative to the largest of 128; int4 ones, of more than 4
    rows, as fp16, relative to the largest of 128 or 256. Of a row of x that is not finite, but for bf16 weights, all
    results are nan. x may still be on its way from the kernel before this one. Raises RuntimeError where the driver or
    the compiler reports an error.
    """
    K = x.shape[-1]
    rows, N = x.numel() // K, weight.shape[0] // (2 if activation else 1)
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    for first in range(0, rows, MAX_ROWS):
        some = [None if t is None else t.view(rows, -1)[first : first + MAX_ROWS] for t in (x, residual, y)]
        _pass(*some, weight, scale, bias, norm, eps, offset, activation, exchange)
    return y if exchange is None else exchange.collect(residual, y)


def supports_experts(x: Tensor, weight: Tensor, scale: Tensor | None, expert: Tensor, norm: Tensor | None,
                     pairs: bool) -> bool:  # fmt: skip
    """Whether `experts` should take these: as `supports` of the stack, with outputs that fill tiles, of up to two rows.

    Of more rows it multiplies all with each matrix, and does not find that some have one in common.
    """
    K, outputs = x.shape[-1], weight.shape[1] // (1 + pairs)
    rows, scales = x.numel() // K, None if scale is None else scale.flatten(0, 1)
    if rows > 2 or expert.numel() > MAX_MATRICES or outputs % (TILE_ROWS // (1 + pairs)):
        return False
    if not supports(x, weight.flatten(0, 1), scales, None, norm, None, pairs):
        return False
    kind = KINDS[weight.dtype]
    group = K // scale.shape[-1] if kind == 3 else 32
    return _plan(kind, group, rows, expert.numel() * outputs, K, pairs, x.device, True).fits()


def experts(x: Tensor, weight: Tensor, scale: Tensor | None, expert: Tensor, norm: Tensor | None, eps: float,
            offset: float, activation: str, early: bool) -> Tensor:  # fmt: skip
    """The operator hotloop::experts (see kernels_experts.experts) for what `supports_experts` accepts; in one launch,
    and by the arithmetic of `linear`."""
    K, outputs = x.shape[-1], weight.shape[1] // (2 if activation else 1)
    x, expert = x.contiguous().view(-1, K), expert.contiguous()
    y = torch.empty(expert.numel(), outputs, dtype=x.dtype, device=x.device)
    stack = _Experts(expert.data_ptr(), outputs, len(y) // len(x), early)
    _pass(x, None, y.view(1, -1), weight.flatten(0, 1), scale, None, norm, eps, offset, activation, None, stack)
    return y


class _Experts(ctypes.Structure):  # as in linear_cuda.cu
    _fields_ = [("of", ctypes.c_void_p), ("outputs", ctypes.c_int), ("shared", ctypes.c_int), ("early", ctypes.c_int)]


def _pass(x, residual, y, weight, scale, bias, norm, eps, offset, activation, exchange, stack=None) -> None:
    """`linear` of up to MAX_ROWS rows, x [M, K] -> y [M, N], all contiguous; one launch. Of a stack of weights, one
    behind the other, y [1, N] is all rows side by side."""
    (M, K), N = x.shape, y.shape[1]
    kind = KINDS[weight.dtype]
    group = K // scale.shape[-1] if kind == 3 else 32
    words = _Words() if exchange is None else exchange.linear_words
    plan = _plan(kind, group, M, N, K, bool(activation), x.device, stack is not None)
    # Copies take their time by the piece, of at most 128 bytes: 32 scales and zeros, where there are whole ones.
    wide = kind == 3 and not any(columns // group % 32 for columns in (K, plan.own, plan.chunk * 2))
    groups = 32 if wide else 8
    maps = _maps(weight.data_ptr(), scale.data_ptr() if kind == 3 else 0, kind, group, groups, len(weight), K, plan)
    pointers = [None if kind == 3 else scale, x, bias, norm, *((residual, y) if exchange is None else (None, None))]
    values = [maps, *pointers, M, N, K, eps, offset, ACTIVATIONS[activation], plan.stages, plan.panels]
    values += [_tickets(x.device)[next(_turns) % TURNS] if plan.dynamic else None, words]
    options = (f"KIND={kind}", f"GROUP={group}", f"ROOM={plan.room}", f"CHUNK={plan.chunk}", f"WARPS={plan.warps}")
    options += f"WORDS={groups}", f"SPLIT={plan.split}", f"ONE={int(plan.one)}"
    options += (f"WORLD={1 if exchange is None else exchange.world}",)
    if stack is not None:
        options, values = (*options, "EXPERTS=1"), [*values, stack]
    function = _function("linear", options, x.device)
    blocks = _clusters(options, plan, x.device) * plan.split
    _launch(function, (blocks, 1), plan.threads, plan.shared, values, x.device, cluster=plan.split)


HEAD_DIMS, MAX_TOKENS, MAX_COUNTS = (64, 128), 8, 4096
ATTEND_WARPS, ATTEND_ROWS, SPAN = 16, 8, 256  # of a block, as in attend_cuda.cu; slots that are worth a block


def supports_attend(qkv: Tensor, pos: Tensor, k_cache: Tensor, v_cache: Tensor, group: int,
                    norms: tuple[Tensor | None, ...] = ()) -> bool:  # fmt: skip
    """Whether `attend` should take these: bf16, few new tokens, heads of a size that there is a kernel for."""
    (B, T), (K, _, D) = qkv.shape[:2], k_cache.shape[1:]
    if D not in HEAD_DIMS or not 0 < T <= MAX_TOKENS or B * K * -(-group * T // ATTEND_ROWS) > MAX_COUNTS:
        return False
    if not available(qkv.device) or qkv.dtype != torch.bfloat16:
        return False
    if T == 1 and not pos.is_contiguous():  # the kernel does not wait for a copy of it
        return False
    others = [t for t in (k_cache, v_cache, *norms) if t is not None]
    return all(
        t.dtype == qkv.dtype and t.device == qkv.device and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in others
    )


def attend(qkv, cos, sin, pos, k_cache, v_cache, count, q_norm, k_norm, group, scale, softcap, window, eps, offset):
    """The operator hotloop::attend (see kernels.FusedAttention) for what `supports_attend` accepts.

    qkv bf16 [B, T, (H + 2K) D], cos and sin float32 [B, T, 1, D/2], all of which may be on their way from the kernel
    before this one; pos int64 [B, T], all within the cache, which may be so if T > 1, else it is older; caches bf16
    [B or more, K, S, D], which are written to, and whose slots before a row's first position are older than that
    kernel; count int32 [MAX_COUNTS], zero before and after. -> bf16 [B, T, H D].
    """
    B, T = qkv.shape[:2]
    K, S, D = k_cache.shape[1:]
    qkv, cos, sin, pos = qkv.contiguous(), cos.contiguous(), sin.contiguous(), pos.contiguous()
    # Enough blocks to fill the GPU at long contexts; those with nothing to do at a short one return at once.
    blocks = B * K * -(-group * T // ATTEND_ROWS)
    splits = max(1, min(64, _multiprocessors(qkv.device) // blocks, -(-S // SPAN)))
    y = torch.empty(B, T, K * group * D, dtype=qkv.dtype, device=qkv.device)
    part = torch.empty(blocks * splits * ATTEND_ROWS * (D + 2), device=qkv.device)
    values = [qkv, cos, sin, pos, q_norm, k_norm, k_cache, v_cache, part, count, y, T, K, group, S]
    values += [scale, softcap, window, eps, offset]
    function = _function("attend", (f"D={D}",), qkv.device)
    shared = ATTEND_WARPS * ATTEND_ROWS * (D + 2) * 4  # what each warp has summed
    _launch(function, (blocks, splits), ATTEND_WARPS * 32, shared, values, qkv.device)
    return y


EXCHANGE_THREADS, MAX_WORLD = 256, 8  # as in exchange_cuda.cu


class _Words(ctypes.Structure):  # as in linear_cuda.cu
    _fields_ = [("of", ctypes.c_uint64 * MAX_WORLD), ("number", ctypes.c_void_p), ("rank", ctypes.c_int),
                ("room", ctypes.c_int)]  # fmt: skip


class Exchange:
    """Sums over GPUs that can write to each other's memory, and tensors of all of them side by side.

    words: int64 memory of this GPU, zeros, that all can write to; addresses: of this memory on each rank, as seen from
    here. All ranks must make the same calls in the same order, from one stream each, at most `limit` bytes at a time;
    a GPU waits for ever for one that does not. RuntimeError: too many ranks, or the kernels do not compile.
    """

    def __init__(self, words: Tensor, addresses: list[int], rank: int):
        if len(addresses) > MAX_WORLD:
            raise RuntimeError(f"{len(addresses)} GPUs exchange words: at most {MAX_WORLD} can")
        self.words, self.rank, self.world = words, rank, len(addresses)
        self.memory = (ctypes.c_uint64 * MAX_WORLD)(*addresses)
        self.room = words.numel() // (2 * self.world * 2)  # pieces of 8 bytes, each of which takes two words
        self.limit = 8 * self.room
        self.state = torch.tensor([1, 0], dtype=torch.int32).to(words.device)
        self.linear_words = _Words(self.memory, self.state.data_ptr(), rank, self.room)
        if words.is_cuda:  # compiled now: later the others would be waiting
            self.function(torch.bfloat16), self.function(torch.float32), self.collector()

    def __call__(self, x: Tensor, gather: bool = False) -> Tensor:
        """x bf16 or float32 of all ranks -> their sum, the same bits on each, of x's shape; or [world, *x.shape]."""
        x = x.contiguous()
        x = x.clone() if x.data_ptr() % 8 else x
        y = x.new_empty(self.world, *x.shape) if gather else torch.empty_like(x)
        n = x.nbytes // 8
        values = [x, y, self.memory, self.rank, self.world, n, self.room, int(gather), self.state]
        _launch(self.function(x.dtype), (-(-n // EXCHANGE_THREADS), 1), EXCHANGE_THREADS, 0, values, x.device)
        return y

    def linear(self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor) -> Tensor:
        """residual + the sum over GPUs of `linear`, bf16 [..., N], the same bits on each; where all of them
        `supports_linear`, and of a residual that it `sends`."""
        return linear(x, weight, scale, bias, None, residual, exchange=self)

    def collect(self, residual: Tensor, y: Tensor) -> Tensor:
        """y = residual + the sum of what a linear has written into the memory of all; both bf16 and contiguous."""
        n = y.numel() // 2
        values = [residual, y, self.memory, self.rank, self.world, n, self.room, self.state]
        _launch(self.collector(), (-(-n // EXCHANGE_THREADS), 1), EXCHANGE_THREADS, 0, values, y.device)
        return y

    def collector(self) -> ctypes.c_void_p:
        """The kernel that `collect` runs."""
        return _function("exchange", ("BF16=1",), self.words.device, "collect")

    def sends(self, x: Tensor) -> bool:
        """Whether a linear that `supports_linear` may send its results where they are of x's shape and dtype.

        It depends on nothing that may differ between ranks.
        """
        rows, fits = x.numel() // x.shape[-1], x.numel() <= 2 * self.room
        return x.dtype == torch.bfloat16 and rows <= MAX_ROWS and fits and x.numel() % 2 == 0

    @staticmethod
    def supports_linear(weight: Tensor, scale: Tensor | None, bias: Tensor | None, K: int) -> bool:
        """Whether `linear` has a kernel for this weight of K columns, whatever the rows of x."""
        x = torch.zeros(MAX_ROWS, K, dtype=torch.bfloat16, device=weight.device)
        return all(supports(x[:M], weight, scale, bias) for M in range(1, MAX_ROWS + 1))

    def function(self, dtype: torch.dtype) -> ctypes.c_void_p:
        """The kernel for a dtype."""
        return _function("exchange", (f"BF16={int(dtype == torch.bfloat16)}",), self.words.device)

    def supports(self, x: Tensor) -> bool:
        """Whether x can be exchanged: whole pieces of 8 bytes, of a dtype that is summed, and no more than fits.

        It depends on nothing that may differ between ranks.
        """
        return x.dtype in (torch.bfloat16, torch.float32) and x.nbytes % 8 == 0 < x.nbytes <= self.limit


def has_nvrtc(device: torch.device) -> bool:
    """Whether kernels can be compiled for a device here."""
    return device.type == "cuda" and torch.version.cuda is not None and _libraries() is not None


TURNS = 64  # counters of tiles: kernels that overlap have different ones
_turns = itertools.count()


@functools.cache
def _tickets(device: torch.device) -> Tensor:
    """Tiles taken and blocks that have ended, of each turn; the kernels of a device run one after another."""
    return torch.zeros(TURNS, 2, dtype=torch.int32, device=device)


class Plan(NamedTuple):
    """How blocks share the work, and how one uses its shared memory."""

    split: int  # blocks that share tiles, each of which takes some of the columns
    own: int  # columns of a block
    chunk: int  # bytes that are copied of a row at a time
    one: bool  # int4: whether a block's columns are one chunk; x stays in registers then
    room: int  # rows of x that the variant has room for
    warps: int  # that multiply
    threads: int  # of these warps, of the one that sends for weights, and of those that finish sums
    stages: int  # of weights
    panels: int  # parts of x's columns that are there one after another
    dynamic: bool  # whether blocks take tiles as they are ready for them, rather than an even share
    shared: int  # bytes in all

    def fits(self) -> bool:
        """A vocabulary may be so large, or shared memory so small, that there is no room for a ring, or much of x."""
        return self.stages >= max(3, FLIGHT // self.chunk) and self.panels <= MAX_PANELS


@functools.cache
def _plan(kind: int, group: int, M: int, N: int, K: int, pairs: bool, device: torch.device,
          stacked: bool = False) -> Plan:  # fmt: skip
    """One block to a multiprocessor, as few panels as leave room for four stages; laid out as linear_cuda.cu does."""
    room, most = next(r for r in (1, 2, 4, 8) if M <= r), _shared_memory(device)
    unit = 8 * group if kind == 3 else COLUMNS[kind]  # columns that go together
    # Where there is much of x, a block prepares a part of it; not where tiles are short, which it makes shorter still.
    split = 2 if room > 1 and room * K >= (SPLIT_PAIRS if pairs else SPLIT) and K >= 2 * unit else 1
    as_fp16 = kind == 3 and room == 8
    if kind == 3 and room >= 4 and K > 2 * REGISTERS and 3 * -(-K // unit // 4) * unit < K:
        split = 4  # x stays in registers then, or more of it is there at a time
    elif as_fp16 and K <= REGISTERS:  # it does so anyway, and is prepared soon
        split = 1
    own = -(-K // unit // split) * unit
    chunk = 1024 if own * 128 // COLUMNS[kind] <= 1024 else 2048
    warps, finishers = 8 if room == 1 else 16, 1 + (room >= 4)
    threads = 32 * (warps + 1 + finishers)
    stage = TILE_ROWS * chunk + (TILE_ROWS * chunk * 8 // group if kind == 3 else 0) + 24
    in_chunk = chunk * COLUMNS[kind] // 128  # columns
    chunks = -(-own // in_chunk)
    one = kind == 3 and chunks == 1
    step, blocks = TILE_ROWS // (2 if pairs else 1), _multiprocessors(device) // split
    rounds = N // (step * blocks)
    fewest = _fewest(blocks, split)
    # An even share of what does not go round is better where it spares each block half of a tile.
    dynamic = split == 1 and (rounds >= 4 or (rounds > 0 and (pairs or -(-(N % (step * blocks)) // blocks) > 8)))
    plans = []
    for panels in range(1, chunks + 1):
        columns = -(-chunks // panels) * in_chunk
        row, bank = 2 * columns if kind < 2 else columns, 32 if kind == 3 else 16
        x = (M if kind < 2 else 2 * M) * (row + (bank - row) % 128)
        units = room * columns // (32 if kind == 3 else 128) * (8 if kind == 3 else 4) * (kind > 0)
        if as_fp16:  # and what undoes that x is relative to its largest
            x = 0 if one else columns // in_chunk * (room * 2 * in_chunk + warps * room * 4)
        parts = 2 * warps * TILE_ROWS * room * 4
        sums = warps * 128  # of squares
        sums += (PLACES[split] * max(1, room // 2) + finishers) * 128 * (split - 1)  # and what other blocks send
        totals = (N // (step * fewest) + 1) * TILE_ROWS * room * 4 if panels > 1 else 0
        base = x + units + parts + sums + totals + 32 * (1 + finishers)  # barriers of two tiles in turn, and of places
        base += 4 * MAX_MATRICES * stacked
        stages = min(MAX_STAGES[kind] * 2048 // chunk, (most - base) // stage)
        if columns * (panels - 1) < own:  # the last panel is not empty
            shared = base + stages * stage
            own_pace = panels == 1 and dynamic
            plans.append(Plan(split, own, chunk, one, room, warps, threads, stages, panels, own_pace, shared))
    return max(plans, key=lambda plan: (min(plan.stages, 4 * 2048 // chunk), -plan.panels, plan.stages))


# ------------------------------------------------------------------------------------------- compilation and launch
class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


def _cluster(blocks: int) -> _Attribute:
    """CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION."""
    attribute = _Attribute(id=4)
    attribute.value[:3] = blocks, 1, 1
    return attribute


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("n_attributes", ctypes.c_uint),
    ]  # fmt: skip


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"kernels_cuda: {what} failed with error {status}")


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """(NVRTC, the CUDA driver), or None where they are not found."""
    try:
        # PyTorch's own stub is linked against NVRTC, and knows where it is.
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so")), ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends: programmatic dependent launch, since Hopper."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _fewest(clusters: int, split: int) -> int:
    """At least so many are launched of clusters that all multiprocessors would hold.

    Multiprocessors come in pairs; of fours some are left over, since a cluster's are neighbours: 12 of an H200's 132.
    """
    return clusters if split < 4 else max(1, clusters * 3 // 4)


@functools.cache
def _clusters(options: tuple[str, ...], plan: Plan, device: torch.device) -> int:
    """How many clusters of blocks, one to a multiprocessor, to launch: as many as run at a time."""
    count, most = ctypes.c_int(), _multiprocessors(device) // plan.split
    if (fewest := _fewest(most, plan.split)) == most:
        return most
    config = _Config(grid=(most * plan.split, 1, 1), block=(plan.threads, 1, 1), shared=plan.shared, n_attributes=1)
    config.attributes = ctypes.pointer(_cluster(plan.split))
    with torch.cuda.device(device):
        found = _libraries()[1].cuOccupancyMaxActiveClusters(
            ctypes.byref(count), _function("linear", options, device), ctypes.byref(config)
        )
    _check(found, "cuOccupancyMaxActiveClusters")
    return max(min(count.value, most), fewest)


@functools.cache
def _maps(weight: int, scale: int, kind: int, group: int, groups: int, rows: int, K: int, plan: Plan) -> ctypes.Array:
    """What each block of a cluster copies from a weight and, of int4, its scales and zeros, at these addresses."""
    maps, pitch = [], K * 128 // COLUMNS[kind]
    for begin in range(0, plan.split * plan.own, plan.own):
        end = min(begin + plan.own, K)
        first, last = (i * 128 // COLUMNS[kind] for i in (begin, end))
        maps.append(_tensor_map(weight + first, rows, pitch, last - first, 128, plan.chunk // 128))
    for begin in range(0, plan.split * plan.own, plan.own) if kind == 3 else ():
        end, count = min(begin + plan.own, K), plan.chunk * 2 // group // groups
        width = (end - begin) // group * 4
        maps.append(_tensor_map(scale + begin // group * 4, rows, K // group * 4, width, 4 * groups, count))
    return (ctypes.c_ubyte * (256 * plan.split)).from_buffer_copy(b"".join(maps).ljust(256 * plan.split, b"\0"))


def _tensor_map(pointer: int, rows: int, pitch: int, row_bytes: int, box_bytes: int, count: int) -> ctypes.Array:
    """How a matrix of bytes is copied: boxes of 8 rows and `box_bytes` (32 or 128) of each, `count` of them at a time,
    their 16-byte words permuted by the row, so that threads that read a column of rows meet no bank twice."""
    buffer = (ctypes.c_ubyte * 192)()
    result = (ctypes.c_ubyte * 128).from_buffer(buffer, -ctypes.addressof(buffer) % 64)  # aligned to 64 bytes
    sizes = (ctypes.c_uint64 * 3)(box_bytes, rows, row_bytes // box_bytes)
    strides = (ctypes.c_uint64 * 2)(pitch, box_bytes)
    box, ones = (ctypes.c_uint32 * 3)(box_bytes, 8, count), (ctypes.c_uint32 * 3)(1, 1, 1)
    swizzle = {32: 1, 128: 3}[box_bytes]  # CU_TENSOR_MAP_SWIZZLE_32B, _128B
    # Of bytes, three dimensions; in the end: not interleaved, swizzled, no more brought into L2, zeros beyond the end.
    status = _libraries()[1].cuTensorMapEncodeTiled(
        result, 0, 3, ctypes.c_void_p(pointer), sizes, strides, box, ones, 0, swizzle, 0, 0
    )
    _check(status, "cuTensorMapEncodeTiled")
    return result


@functools.cache
def _module(file: str, options: tuple[str, ...], device: torch.device) -> ctypes.c_void_p:
    """A variant of a file's kernels, compiled and loaded on a device."""
    module = ctypes.c_void_p()
    nvrtc, cuda = _libraries()
    major, minor = torch.cuda.get_device_capability(device)
    cubin = _machine_code(nvrtc, f"{file}_cuda.cu", [*(f"-D{o}" for o in options), f"-arch=sm_{major}{minor}"])
    with torch.cuda.device(device):
        _check(cuda.cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
    return module


@functools.cache
def _function(file: str, options: tuple[str, ...], device: torch.device, name: str = "") -> ctypes.c_void_p:
    """A kernel of a file, by default the one of the file's name."""
    function, fixed = ctypes.c_void_p(), ctypes.c_int()
    module, cuda = _module(file, options, device), _libraries()[1]
    with torch.cuda.device(device):
        _check(cuda.cuModuleGetFunction(ctypes.byref(function), module, (name or file).encode()), "cuModuleGetFunction")
        # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, and _MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(cuda.cuFuncGetAttribute(ctypes.byref(fixed), 1, function), "cuFuncGetAttribute")
        _check(cuda.cuFuncSetAttribute(function, 8, _shared_memory(device) - fixed.value), "cuFuncSetAttribute")
    return function


def _argument(value):
    """A kernel's parameter of a tensor (its address), None, a number, or a ctypes object, which it is already."""
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    kind = {int: ctypes.c_int, float: ctypes.c_float, type(None): ctypes.c_void_p}.get(type(value))
    return kind(value) if kind else value


def _launch(function: ctypes.c_void_p, grid: tuple[int, int], threads: int, shared: int, values: list, device,
            cluster: int = 1) -> None:  # fmt: skip
    """Launch a kernel that may start while the one before it ends, with `shared` bytes of shared memory a block, in
    clusters of that many blocks."""
    values = [_argument(v) for v in values]
    parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    attributes = (_Attribute * 2)(_cluster(cluster), _Attribute(id=6))
    attributes[1].value[0] = 1  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    first = 0 if cluster > 1 else 1
    config = _Config(
        grid=(*grid, 1), block=(threads, 1, 1), shared=shared, stream=torch.cuda.current_stream(device).cuda_stream,
        attributes=ctypes.pointer(attributes[first]), n_attributes=2 - first if _overlaps(device) else 0,
    )  # fmt: skip
    with torch.cuda.device(device):
        _check(_libraries()[1].cuLaunchKernelEx(ctypes.byref(config), function, parameters, None), "cuLaunchKernelEx")


def _machine_code(nvrtc: ctypes.CDLL, file: str, options: list[str]) -> bytes:
    """A file beside this one, compiled now or, from the same source by the same compiler, before."""
    source, version = Path(__file__).with_name(file).read_bytes(), (ctypes.c_int * 2)()
    _check(nvrtc.nvrtcVersion(ctypes.byref(version), ctypes.byref(version, 4)), "nvrtcVersion")
    key = hashlib.sha256(repr((source, options, *version)).encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hotloop" / "cuda"
    except RuntimeError:  # a user without a home
        return _compile(nvrtc, file, source, options)
    kept = cache / f"{Path(file).stem}_{key}.cubin"
    with contextlib.suppress(OSError):
        digest, cubin = (whole := kept.read_bytes())[:32], whole[32:]
        if hashlib.sha256(cubin).digest() == digest:  # not what a crash has left
            return cubin
    cubin = _compile(nvrtc, file, source, options)
    with contextlib.suppress(OSError):  # where it cannot be kept, it will be compiled again
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as unfinished:
            try:
                unfinished.write(hashlib.sha256(cubin).digest() + cubin)
                unfinished.flush()
                os.replace(unfinished.name, kept)
            finally:
                Path(unfinished.name).unlink(missing_ok=True)
    return cubin


def _compile(nvrtc: ctypes.CDLL, file: str, source: bytes, options: list[str]) -> bytes:
    """C++ of a file of that name -> machine code."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, file.encode(), 0, None, None)
    _check(created, "nvrtcCreateProgram")
    given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    if nvrtc.nvrtcCompileProgram(program, len(options), given):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{file} does not compile: {log.value.decode()}")
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    cubin = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw
