"""Tensor parallelism: which part of each weight a rank holds, and the collectives between ranks.

    torchrun --nproc_per_node=2 generate.py --prompt "def fibonacci(n):"

A layer is split as in Megatron: QKV and gate/up by output rows (whole heads, each expert inside itself), output and
down projections by input columns, followed by an all-reduce; embedding and head by rows of the vocabulary. Activations
are the same on every rank, bit for bit, and so is every token: it is chosen from gathered data.

`init_dist` finds the other ranks, and `apply_tp` shards a model on the meta device. In a process that is alone both are
idle. A rank that dies or fails leaves the others waiting, unless lifeline.py watches.

Sources: Megatron-LM (arXiv 1909.08053), PyTorch's torch.distributed and symmetric memory documentation.
"""

import contextlib
import datetime
import functools
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Ranges = list[tuple[int, int]]  # [start, stop) along one dimension, in the order in which they are joined
Part = tuple[int, Ranges]  # of a tensor: (dimension, counted from the end; what is kept of it). Empty ranges: nothing.

# Module name suffix -> (which dimension of its weight [..., out, in] is split, what it is split over).
PLAN = {
    "tok_embeddings": ("rows", "vocab"),
    "output": ("rows", "vocab"),
    "qkv.linear": ("rows", "qkv"),
    "out.linear": ("columns", "heads"),
    "gate_up.linear": ("rows", "gate_up"),
    "down.linear": ("columns", "hidden"),
    "moe.gate_up": ("rows", "gate_up"),
    "moe.down": ("columns", "hidden"),
}
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)  # ranks compile and autotune apart; deaths are noticed otherwise
CONTROL_TIMEOUT = datetime.timedelta(days=30)  # ranks wait for what rank 0 reads from a terminal
EXCHANGE_LIMIT = 1 << 18  # bytes: the largest tensor that is tried without NCCL


# ----------------------------------------------------------------------------------------------------- the ranks
class Ranks:
    """This process among the others: rank, world (how many), local_rank (on this machine), and control messages.

    Made by `init_dist`. Control messages are Python objects over gloo, always, so that they work before and beside
    whatever the GPUs do.
    """

    def __init__(self, rank: int, world: int, local_rank: int, all_reduce: str = "auto"):
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self.mode = all_reduce
        self.exchange: Callable | None = None  # another way than NCCL, and up to how many elements it is faster
        self.exchanged: dict[torch.dtype, int] = {}
        with ended_by_signals():
            self.control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        self.library = _register_operators()

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank, given the one asked for. ValueError where there is none of that kind for it."""
        if device.type == "cpu":
            return device
        if device.type != "cuda":
            raise ValueError(f"--device {device}: under torchrun it must be cuda or cpu")
        if device.index is not None:
            raise ValueError(f"--device {device}: under torchrun each rank takes its own GPU; give --device cuda")
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", self.local_rank + 1)), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} ranks on a machine with {gpus} GPUs: give --nproc_per_node={gpus} or fewer")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def broadcast(self, value=None):
        """Rank 0's value, a Python object, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value) -> list:
        """Every rank's value, in order."""
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, decision: int) -> int:
        """Rank 0's decision, from 0 to 255. One byte: it is asked for before every token."""
        decided = torch.tensor([decision], dtype=torch.uint8)
        dist.broadcast(decided, src=0, group=self.control)
        return int(decided.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control)

    def check_same(self, what: str, value) -> None:
        """ValueError, on every rank, where a rank's value (told as text) is not rank 0's."""
        first, *others = self.gather(str(value))
        for rank, theirs in enumerate(others, 1):
            if theirs != first:
                i = next((i for i, (a, b) in enumerate(zip(first, theirs, strict=False)) if a != b), 0)
                i = max(0, i - 20)
                raise ValueError(f"ranks must read the same {what}: rank {rank} has ...{theirs[i : i + 80]}..., "
                                 f"rank 0 ...{first[i : i + 80]}...")  # fmt: skip

    def close(self) -> None:
        """Leave the others: call it when the work is done and every model and CUDA graph has been let go."""
        global _ranks
        self.barrier()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            stuck = threading.Timer(30, os._exit, [0])  # NCCL may wait for ever for what a graph had captured
            stuck.daemon = True
            stuck.start()
        dist.destroy_process_group()
        _ranks = None


_ranks: Ranks | None = None


def current() -> Ranks | None:
    """What `init_dist` returned; None: this process is alone."""
    return _ranks


def under_torchrun() -> bool:
    """Whether a launcher has made this process one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the process at once: it may wait in here for ranks that will never come, where Python's
    handlers are not reached and the launcher would kill it only after half a minute.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def init_dist(all_reduce: str = "auto") -> Ranks | None:
    """Join the other ranks, by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; None where there are none.

    all_reduce: "nccl", or "auto" to let `choose_all_reduce` measure what is faster on CUDA. ValueError: another word.
    """
    global _ranks
    if all_reduce not in ("auto", "nccl"):
        raise ValueError(f"--all_reduce {all_reduce}: not known; known: auto, nccl")
    if not under_torchrun() or _ranks is not None:
        return _ranks
    # NVLink multicast stays off, in NCCL and in symmetric memory: a fault in it takes the whole machine along.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with ended_by_signals():
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT)
    _ranks = Ranks(rank, world, int(os.environ.get("LOCAL_RANK", rank)), all_reduce)
    return _ranks


# ---------------------------------------------------------------------------------------------------- collectives
def _register_operators() -> torch.library.Library:
    """hotloop::all_reduce, all_gather, linear_sum: one opaque call each for torch.compile, whatever runs inside."""
    library = torch.library.Library("hotloop", "FRAGMENT")
    library.define("all_reduce(Tensor x) -> Tensor")
    library.define("all_gather(Tensor x) -> Tensor")
    library.define("linear_sum(Tensor y, Tensor weight, Tensor? scale, Tensor? bias, Tensor x) -> Tensor")
    library.impl("linear_sum", _linear_sum, "CompositeExplicitAutograd")
    library.impl("all_reduce", _all_reduce, "CompositeExplicitAutograd")
    library.impl("all_gather", _all_gather, "CompositeExplicitAutograd")
    contiguous = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    torch.library.register_fake("hotloop::all_reduce", contiguous, lib=library)
    torch.library.register_fake("hotloop::linear_sum", lambda y, weight, scale, bias, x: contiguous(x), lib=library)
    torch.library.register_fake("hotloop::all_gather", lambda x: x.new_empty(_ranks.world, *x.shape), lib=library)
    return library


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all ranks, the same bits on each, as a new tensor of x's shape and dtype."""
    return torch.ops.hotloop.all_reduce(x)


def all_gather(x: Tensor) -> Tensor:
    """x of every rank -> [world, *x.shape]. Shapes must agree."""
    return torch.ops.hotloop.all_gather(x)


def linear_sum(y: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    """x + the sum over ranks of linear(y), for few rows of y: what kernels.py runs instead of ReducedLinearResidual.

    Where sums of x's size are exchanged as words, the linear's kernel sends them itself. Only modules for which
    `agree_on_linear_sums` has left it in place may call it.
    """
    return torch.ops.hotloop.linear_sum(y, weight, scale, bias, x)


def _linear_sum(y: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    if exchanges(x.numel(), x.dtype) and _ranks.exchange.sends(x):  # alike on all ranks
        return _ranks.exchange.linear(y, weight, scale, bias, x)
    residual = x if _ranks.rank == 0 else None
    return _all_reduce(torch.ops.hotloop.linear(y, weight, scale, bias, None, residual, 0.0, 0.0, ""))


def agree_on_linear_sums(model: nn.Module, stored: Callable) -> None:
    """Let the linears of a model send their sums where those of all ranks can, and add up afterwards elsewhere.

    stored(linear) -> (weight, scale). Collective, after `choose_all_reduce`; nothing to agree on without an exchange.
    """
    if _ranks is None or _ranks.exchange is None:
        return
    modules = [m for m in model.modules() if getattr(m, "linear_sum", None)]
    able = [_ranks.exchange.supports_linear(*stored(m.linear), m.linear.bias, m.linear.in_features) for m in modules]
    for m, *each in zip(modules, *_ranks.gather(able), strict=True):
        if not all(each):
            m.linear_sum = None


def _all_reduce(x: Tensor) -> Tensor:
    if x.is_cpu:  # float32 sums: gloo would round to bfloat16 at every step
        y = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(y)
        return y.to(x.dtype)
    return _ranks.exchange(x) if _exchanges(x) else _nccl(x)


def exchanges(numel: int, dtype: torch.dtype) -> bool:
    """Whether tensors of that size go another way than NCCL, if they are whole pieces of 8 bytes."""
    return 0 < numel <= _ranks.exchanged.get(dtype, 0)


def _exchanges(x: Tensor) -> bool:
    return exchanges(x.numel(), x.dtype) and _ranks.exchange.supports(x)


def _nccl(x: Tensor) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y)
    return y


def _all_gather(x: Tensor) -> Tensor:
    if not x.is_cuda:
        y = x.new_empty(_ranks.world, *x.shape)
        dist.all_gather(list(y.unbind()), x.contiguous())
        return y
    if _exchanges(x):
        return _ranks.exchange(x, gather=True)
    y = x.new_empty(_ranks.world, *x.shape)
    dist.all_gather_into_tensor(y, x.contiguous())
    return y


def choose_all_reduce(width: int, dtype: torch.dtype, device: torch.device, make: Callable | None) -> None:
    """Measure NCCL against an exchange of words for 1 to 16 rows of `width`, and take what is faster from now on.

    In `dtype`, for activations, and in float32, for what sampling gathers. make(words, addresses, rank) -> what is
    called as kernels_cuda.Exchange is; None: there is no such thing here. Nothing to choose on a CPU, in float16, or
    with --all_reduce nccl. Collective: every rank calls it, before any CUDA graph is captured, and rank 0's measurement
    decides for all.
    """
    ranks = _ranks
    if ranks is None or device.type != "cuda" or ranks.mode == "nccl":
        return
    others = [i for i in range(ranks.world) if i != ranks.local_rank]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world)), socket.gethostname()  # two machines may have one name
    one_machine = set(ranks.gather(here)) == {(ranks.world, here[1])}
    linked = one_machine and all(torch.cuda.can_device_access_peer(ranks.local_rank, i) for i in others)
    if not all(ranks.gather(linked and make is not None)):
        return
    if ranks.exchange is None:
        exchange, reason = None, ""
        try:
            exchange = _make_exchange(make, device)
        except (RuntimeError, AttributeError, ImportError) as error:  # no peer access, an older PyTorch
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reasons = ranks.gather(reason)  # before any rank waits for another's words
        if not any(reasons) and not all(ranks.gather(_sums_are_right(exchange, device))):
            reasons = ["its sums differ from NCCL's or between ranks"]
        if any(reasons):
            if ranks.rank == 0:
                why = max(reasons, key=len)
                print(f"tp: NCCL reduces; symmetric memory cannot be used here: {why}", file=sys.stderr)
            return
        ranks.exchange = exchange
    for kind in sorted({dtype, torch.float32} - {torch.float16, *ranks.exchanged}, key=str):  # alike on all ranks
        ranks.exchanged[kind] = 0
        for rows in (1, 2, 4, 8, 16):
            x = torch.ones(rows * width, dtype=kind, device=device)
            if not ranks.exchange.supports(x):
                break
            # In turn and twice: something else may have kept the machine busy.
            ours, nccl = zip(*((_seconds(ranks.exchange, x), _seconds(_nccl, x)) for _ in range(2)), strict=True)
            if not ranks.agree(min(ours) < min(nccl)):
                break
            ranks.exchanged[kind] = x.numel()


def _make_exchange(make: Callable, device: torch.device) -> Callable:
    """An exchange through memory that all ranks can write to."""
    import torch.distributed._symmetric_memory as symm_mem

    words = symm_mem.empty(4 * _ranks.world * EXCHANGE_LIMIT // 8, dtype=torch.int64, device=device)
    addresses = symm_mem.rendezvous(words, dist.group.WORLD).buffer_ptrs
    words.zero_()
    torch.cuda.synchronize()  # nobody writes before all are zero: ranks compare notes after this
    return make(words, addresses, _ranks.rank)


def _sums_are_right(exchange: Callable, device: torch.device) -> bool:
    """Whether an exchange gives NCCL's sums, where these have no rounding, and the same bits on all ranks."""
    works = True
    for dtype in (torch.bfloat16, torch.float32):
        exact = torch.randint(-8, 8, (4096,), device=device).to(dtype)
        noise = exchange(torch.randn(4096, device=device).to(dtype))  # experts are chosen by such sums
        every = torch.empty(_ranks.world, 4096, dtype=dtype, device=device)
        dist.all_gather_into_tensor(every, noise)
        # All calls first: a rank that has seen enough would leave the others waiting.
        ours, theirs, gathered = exchange(exact), _nccl(exact), exchange(noise, gather=True)
        works &= torch.equal(ours, theirs) and torch.equal(gathered, every) and bool((every == noise).all())
    return works


def _seconds(work: Callable[[Tensor], Tensor], x: Tensor, calls: int = 50) -> float:
    """Seconds of one call: on CUDA of a graph of many, as decoding replays them; the median of five."""
    if not x.is_cuda:
        work(x)
        times = []
        for _ in range(calls):
            begin = time.perf_counter()
            work(x)
            times.append(time.perf_counter() - begin)
        return sorted(times)[len(times) // 2]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work(x)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    _ranks.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work(x)
    times = []
    for _ in range(6):
        _ranks.barrier()
        begin = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / calls)
    return sorted(times[1:])[2]


@torch.no_grad()
def communication_seconds(model: nn.Module, batch: int) -> float:
    """Seconds that sums over ranks add to one decode step: to a layer's output projection, twice a layer, and after the
    embedding. Each is measured in a chain of its like, where nothing else can hide it."""
    weight, layer = model.tok_embeddings.weight, model.layers[0]
    x = torch.zeros(batch, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    y = x.new_zeros(batch, 1, layer.out.linear.in_features)
    added = _seconds(lambda y: layer.out(y, x), y) - _seconds(layer.out.linear, y)
    return 2 * len(model.layers) * max(added, 0) + _seconds(all_reduce, x)


# ----------------------------------------------------------------------------------------------------- the sharding
def split(size: int, rank: int, world: int, unit: int = 1) -> tuple[int, int]:
    """[start, stop) of a rank's share of `size`, in whole units: all alike where that goes, else as even as it gets.

    ValueError where there are fewer units than ranks.
    """
    if size % (world * unit):
        unit = max(unit, math.gcd(size, 32)) if size // max(unit, math.gcd(size, 32)) >= world else unit
    n = size // unit
    if n < world or size % unit:
        raise ValueError(f"{size} columns in units of {unit} cannot be split over {world} ranks; use fewer ranks")
    return n * rank // world * unit, n * (rank + 1) // world * unit


def split_heads(n_heads: int, n_kv_heads: int, rank: int, world: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """([start, stop) of a rank's query heads, the same of its kv heads). Fewer kv heads than ranks are replicated.

    ValueError where heads would be uneven.
    """
    remedy = f"use a number of ranks that divides {math.gcd(n_heads, n_kv_heads) if n_kv_heads >= world else n_heads}"
    if n_heads % world:
        raise ValueError(f"{n_heads} heads cannot be split over {world} ranks; {remedy}")
    if n_kv_heads % world and world % n_kv_heads:
        raise ValueError(f"{n_kv_heads} kv heads cannot be split over {world} ranks; {remedy}")
    q = n_heads // world
    k = max(1, n_kv_heads // world)
    first = rank * n_kv_heads // world
    return (rank * q, (rank + 1) * q), (first, first + k)


def apply_tp(model: nn.Module, rank: int, world: int) -> dict[str, Part]:
    """Shard a whole model on the meta device -> for each entry of its state dict that is cut, the part of this rank.

    Entries that are not named are whole on every rank. Modules are replaced or shrunk in place; model.args stays that
    of the whole model. A quantized linear shards itself by its method `shard`. ValueError for heads or columns that
    cannot be split.
    """
    args = model.args
    (q0, q1), (k0, k1) = split_heads(args.n_heads, args.n_kv_heads, rank, world)
    D, q_rows, kv_rows = args.head_dim, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    downs = (m for name, m in model.named_modules() if name.endswith(("down.linear", "moe.down")))
    unit = max(getattr(m, "column_unit", 1) for m in downs)
    a, b = split(args.hidden_dim, rank, world, unit)
    vocab = split(args.vocab_size, rank, world)
    cuts = {
        "vocab": [vocab],
        "qkv": [(q0 * D, q1 * D), (q_rows + k0 * D, q_rows + k1 * D)]
        + [(q_rows + kv_rows + k0 * D, q_rows + kv_rows + k1 * D)],
        "heads": [(q0 * D, q1 * D)],
        "gate_up": [(a, b), (args.hidden_dim + a, args.hidden_dim + b)],
        "hidden": [(a, b)],
    }
    parts: dict[str, Part] = {}
    for name, module in list(model.named_modules()):
        style = next((s for suffix, s in PLAN.items() if name == suffix or name.endswith("." + suffix)), None)
        if style is None:
            continue
        dim, over = style
        try:
            cut = {dim: cuts[over]}
            mine, kept = (module.shard if hasattr(module, "shard") else _shard_plain(module))(**cut, bias=rank == 0)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        parts |= {f"{name}.{leaf}": part for leaf, part in kept.items()}
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, mine)
    model.tok_embeddings = ShardedEmbedding(model.tok_embeddings.weight, vocab[0])
    if args.tie_embeddings and isinstance(model.output, nn.Linear):
        model.output.weight = model.tok_embeddings.weight
    for layer in model.layers:
        layer.attention.group = (q1 - q0) // (k1 - k0)
        layer.out = ReducedLinearResidual(layer.out, rank)
        if layer.is_moe:
            layer.moe = ReducedMoE(layer.moe)
        else:
            layer.down = ReducedLinearResidual(layer.down, rank)
    model.logits = ShardedLogits(model.logits, args.vocab_size, rank, world)
    return parts


def _shard_plain(module: nn.Module) -> Callable:
    """The `shard` that nn.Linear, nn.Embedding and model.ExpertLinear lack; they are shrunk in place."""

    def shard(rows: Ranges | None = None, columns: Ranges | None = None, bias: bool = True):
        shape, parts = list(module.weight.shape), {}
        dim, ranges, attribute = (-2, rows, "out_features") if rows else (-1, columns, "in_features")
        shape[dim] = sum(b - a for a, b in ranges)
        parts["weight"] = dim, ranges
        module.weight = nn.Parameter(module.weight.new_empty(shape))
        if hasattr(module, attribute):
            setattr(module, attribute, shape[dim])
        if getattr(module, "bias", None) is not None:
            if rows:
                parts["bias"] = -1, rows
                module.bias = nn.Parameter(module.bias.new_empty(shape[-2]))
            elif not bias:  # the sum over ranks holds it once
                parts["bias"] = -1, []
                module.bias = None
        return module, parts

    return shard


def take(tensor: Tensor, part: Part | None) -> Tensor:
    """The part of a tensor, as a copy, so that the whole can go; None: the tensor."""
    if part is None:
        return tensor
    dim, ranges = part
    return torch.cat([tensor.narrow(dim, a, b - a) for a, b in ranges], dim=dim).contiguous()


class ShardedEmbedding(nn.Module):
    """Rows start, start + 1, ... of an embedding; the others add zero, so that a sum over ranks is the lookup."""

    def __init__(self, weight: nn.Parameter, start: int):
        super().__init__()
        self.weight, self.start, self.all_reduce = weight, start, all_reduce  # also for what takes its place

    def forward(self, tokens: Tensor) -> Tensor:
        local, n = tokens - self.start, self.weight.shape[0]
        x = F.embedding(local.clamp(0, n - 1), self.weight)
        return all_reduce(x * ((local >= 0) & (local < n))[..., None])


class ReducedLinearResidual(nn.Module):
    """x + the sum over ranks of linear(y), its norm after the sum. Made from model.LinearResidual.

    `all_reduce`, `linear_sum` and `adds_residual` are for what takes the place of this module: the sum of what the
    ranks compute holds the residual once if only one of them adds it.
    """

    def __init__(self, plain: nn.Module, rank: int):
        super().__init__()
        self.linear, self.post_norm = plain.linear, plain.post_norm
        self.all_reduce, self.linear_sum, self.adds_residual = all_reduce, linear_sum, rank == 0

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        y = self.all_reduce(self.linear(y))
        return x + (y if self.post_norm is None else self.post_norm(y))


class ReducedMoE(nn.Module):
    """x + the sum over ranks of what the shares of the experts give. Made from model.MoE."""

    def __init__(self, plain: nn.Module):
        self.__dict__ = plain.__dict__  # one state, another forward
        # Also for what takes its place. A function, not a method: that would be a circle, which only gc.collect frees.
        self.branch, self.all_reduce = type(plain).experts, all_reduce

    def forward(self, x: Tensor) -> Tensor:
        return x + self.all_reduce(self.branch(self, x))


class ShardedLogits:
    """model.logits: [B, T, C] -> [B, T, V], gathered; or, where `local` is set, this rank's part for `sample_shard`.

    Parts may differ in size; the shorter ones are padded with -inf to `width`. This rank's begins at id `start`.
    """

    def __init__(self, plain: Callable[[Tensor], Tensor], vocab_size: int, rank: int, world: int):
        self.plain, self.local = plain, False
        bounds = [split(vocab_size, r, world) for r in range(world)]
        self.sizes, self.start = [b - a for a, b in bounds], bounds[rank][0]
        self.width = max(self.sizes)
        self.pad = self.width - self.sizes[rank]

    def __call__(self, features: Tensor) -> Tensor:
        logits = self.plain(features)
        if self.pad:
            logits = F.pad(logits, (0, self.pad), value=-math.inf)
        if self.local:
            return logits
        every = all_gather(logits).unbind()
        return torch.cat([part[..., :n] for part, n in zip(every, self.sizes, strict=True)], dim=-1)


def sample_shard(sample: Callable, logits: Tensor, start: int, temperature: float, top_k: int | None,
                 everything: bool, largest: Callable = torch.topk) -> Tensor:  # fmt: skip
    """Sample from sharded logits [B, width], this rank's from id `start` on -> token ids [B, 1], the same on all ranks.

    sample(logits, noise) -> index [B, 1] is the rule. Only what can win is gathered: of each rank the best (greedy),
    the top_k, or, without filters, the winner of its own exponential race; all that there is where `everything` is
    set, for filters that need the whole distribution. The noise travels with its candidate, so that every rank decides
    from the same numbers, whatever its own generator holds. largest(logits, k) -> (values, ids): finds the top_k.
    """
    ids = None
    if temperature == 0:
        logits, ids = logits.max(-1, keepdim=True)
    elif top_k:
        logits, ids = largest(logits, min(top_k, logits.shape[-1]))
    values = logits.float()
    noise = torch.ones_like(values) if temperature == 0 else torch.empty_like(values).exponential_().clamp_min(1e-20)
    if ids is None:
        ids = torch.arange(values.shape[-1], device=values.device).expand_as(values)
        if not everything:  # p / noise is largest where log p - log noise is
            ids = (values / temperature - noise.log()).argmax(-1, keepdim=True)
            values, noise = values.gather(-1, ids), noise.gather(-1, ids)
    # Ids as float32 are exact below 2^24; a vocabulary has 2^18. One collective carries all.
    # A fourth number makes 16 bytes of a candidate, which is what an exchange wants.
    every = all_gather(torch.stack([values, (ids + start).float(), noise, noise], -1))  # [world, B, k, 4]
    values, ids, noise, _ = every.transpose(0, 1).flatten(1, 2).unbind(-1)
    return ids.gather(-1, sample(values, noise)).long()
