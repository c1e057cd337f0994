"""What decoding on a GPU takes from kernels, behind one function each: which of them runs where, and their modules.

    linear      x [..., K] through a weight as it is stored (bf16, int8, fp8, int4), streamed for few rows, with
                RMSNorm before it and bias, gate or residual add after it in the same kernel
    attend      a few new tokens a row: RoPE, the write to the KV cache, and attention split over the context
    layers      for a compiler, all layers of a model for a few new tokens: one operator that calls the above
    route, experts, weighted
                a mixture of experts for few rows, without asking the host which
    top_k       the k largest of each row of logits, sorted, with their ids
    embed       what the first layer takes: tokens' rows of the embedding, and the angles of their positions
    rms_norm, gated, rotated_queries, dequantized
                what a long prompt needs between its matrix products, each in one pass over memory
    read_sum    reads memory and does nothing else: the bandwidth that all of this is measured against

`fuse(model)` swaps modules that use them into the seams of a model's layers, and makes the model one of a class
with `FusedModel`. The kernels are in files by job, each beside its plain PyTorch reference: kernels_linear.py,
kernels_experts.py, kernels_attend.py, kernels_one_pass.py and kernels_top_k.py in Triton, some of them again, for GPUs
since Hopper, in kernels_cuda.py. Triton is imported when a kernel is first wanted, so that a machine without it can
import these files; there, and on a CPU, the references run. Under TRITON_INTERPRET=1 the kernels run on the CPU, for
tests.

Try it:  TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py

Sources: https://pytorch.org/tutorials/advanced/python_custom_ops.html (operators), and those of each file of kernels.
"""

import functools
import itertools
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels_attend
import kernels_experts
import kernels_linear
import kernels_one_pass
import kernels_top_k
from kernels_attend import ATTEND_ROWS, embed_reference, rotated_queries_reference
from kernels_experts import experts_reference, route_reference, weighted_reference
from kernels_linear import fits_gemv, linear_reference
from kernels_one_pass import (  # noqa: F401 (also what others take from here)
    KINDS,
    activate,
    dequantize,
    dequantized_reference,
    gated_reference,
    join_scales,
    rms_norm_reference,
    split_scales,
)
from kernels_top_k import MAX_TOP_K

SMALL_M = 16  # rows up to which weights are streamed; beyond, matrix products are bound by arithmetic

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


# -------------------------------------------------------------------------------------------------------- read_sum
def read_sum(x: Tensor) -> Tensor:
    """Partial sums float32 [P] of a float32 vector [N]: every byte is read once, almost none written."""
    if not use_triton(x):
        return x.sum()[None]
    return kernels_one_pass.read_sum(x)


# ---------------------------------------------------------------------------------------------------------- linear
def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [..., K] @ W.T -> [..., N] in x's dtype, sums in float32, W stored as `dequantize` says.

    Few rows stream the weight; more rows are a matrix product with the weight dequantized.
    """
    if use_triton(x):
        if not torch.compiler.is_compiling():
            _triton()  # registers the operators; `fuse` did so for a model
        if few_rows(x, weight):
            return torch.ops.hotloop.linear(x, weight, scale, None, None, None, 0.0, 0.0, "")
        if scale is not None:
            return F.linear(x, torch.ops.hotloop.dequantized(weight, scale, x.dtype))
    return linear_reference(x, weight, scale)


@functools.cache
def _kernels_cuda() -> ModuleType | None:
    """kernels_cuda.py, which is faster on some GPUs; None where this file was copied without it."""
    try:
        import kernels_cuda
    except ImportError:
        return None
    return kernels_cuda


def _quantized_m() -> int:
    """SMALL_M of quantized weights: kernels_cuda.py goes over them several times sooner than they are dequantized."""
    cuda = _kernels_cuda() if torch.cuda.is_available() else None
    here = cuda is not None and cuda.available(torch.device("cuda", torch.cuda.current_device()))
    return cuda.MAX_ROWS * cuda.MAX_PASSES if here else SMALL_M


_quantized_m._dynamo_marked_constant = True  # as have_triton


def exchange(device: torch.device) -> type | None:
    """kernels_cuda.Exchange, for sums over several GPUs; None where it cannot be compiled."""
    cuda = _kernels_cuda()
    return cuda.Exchange if cuda and cuda.has_nvrtc(device) else None


def _linear(x, weight, scale, bias, norm, residual, eps, offset, activation) -> Tensor:
    """The operator hotloop::linear: `linear_reference` of few rows in one kernel, or one a pass over the weight."""
    if not use_triton(x):  # the model has moved to a CPU
        return linear_reference(x, weight, scale, bias, norm, residual, eps, offset, activation)
    if _kernels_cuda() and _kernels_cuda().supports(x, weight, scale, bias, norm, residual, bool(activation)):
        return _kernels_cuda().linear(x, weight, scale, bias, norm, residual, eps, offset, activation)
    if not few_rows(x):  # its columns are not those that kernels_cuda.py takes
        return linear_reference(x, weight, scale, bias, norm, residual, eps, offset, activation)
    K = x.shape[-1]
    M, N = x.numel() // K, weight.shape[0] // (2 if activation else 1)
    if weight.dtype == torch.uint8 and M == 2:  # one after the other takes two thirds of what the tensor cores take
        rows = [x.view(2, K), [None] * 2 if residual is None else residual.view(2, N)]
        each = [_linear(v, weight, scale, bias, norm, r, eps, offset, activation) for v, r in zip(*rows, strict=True)]
        return torch.stack(each).view(*x.shape[:-1], N)
    return kernels_linear.linear(x, weight, scale, bias, norm, residual, eps, offset, activation)


# ---------------------------------------------------------------------------------------------------------- attend
def _attend(qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, count, q_norm, k_norm, group, scale, softcap,
            window, eps, offset) -> Tensor:  # fmt: skip
    """The operator hotloop::attend, see FusedAttention. Mutates the caches; `count` is zero before and after."""
    if _kernels_cuda() and _kernels_cuda().supports_attend(qkv, pos, k_cache, v_cache, group, (q_norm, k_norm)):
        return _kernels_cuda().attend(
            qkv, cos, sin, pos, k_cache, v_cache, count, q_norm, k_norm, group, scale, softcap, window, eps, offset
        )
    return kernels_attend.attend(
        qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, count, q_norm, k_norm, group, scale, softcap, window,
        eps, offset,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- experts
def _experts(x, weight, scale, expert, norm, eps, offset, activation, early) -> Tensor:
    """The operator hotloop::experts by the faster kernel."""
    cuda = _kernels_cuda()
    faster = cuda and cuda.supports_experts(x, weight, scale, expert, norm, bool(activation))
    run = cuda.experts if faster else kernels_experts.experts
    return run(x, weight, scale, expert, norm, eps, offset, activation, early)


# ----------------------------------------------------------------------------------------------------------- top_k
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


def _known_to_inductor() -> bool:
    """Tell Inductor to call the operators that follow the head, with tensors of any strides.

    It would find out when it first meets one. But PyTorch 2.11 then also prints, for a log, what the operator's input
    was computed from, what that was computed from, and so on: of operators alone, each of which takes x twice, that
    doubles with every layer.
    """
    from torch._inductor.lowering import lowerings, make_fallback

    for name in ("top_k", "all_gather"):
        operator = getattr(torch.ops.hotloop, name, None)
        if operator is not None and operator.default not in lowerings:
            make_fallback(operator.default)
    return True


_known_to_inductor._dynamo_marked_constant = True  # dynamo calls it, and takes the result


# ----------------------------------------------------------------------------------------------------- the modules
def stored(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, scale) of a plain or quantized linear, as `linear` takes them."""
    words = getattr(linear, "scale_zero", None)
    return linear.weight, getattr(linear, "scale", None) if words is None else words


def few_rows(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether x has so few rows that linears stream their weights, or the linear of this weight does."""
    quantized = weight is not None and weight.dtype.itemsize == 1 and x.dtype == torch.bfloat16
    return x.numel() // x.shape[-1] <= (_quantized_m() if quantized else SMALL_M)


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


def norm_linear(norm: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """norm -> linear, in one kernel for few rows."""
    if not few_rows(x, linear.weight):
        return linear(norm(x))
    return torch.ops.hotloop.linear(x, *stored(linear), linear.bias, norm.weight, None, norm.eps, norm.offset, "")


class FusedNormLinear(nn.Module):
    """`norm_linear`. Made from model.NormLinear."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.norm, self.linear = plain.norm, plain.linear

    def forward(self, x: Tensor) -> Tensor:
        return norm_linear(self.norm, self.linear, x)


class FusedNormGateUp(nn.Module):
    """norm -> gate and up -> act(gate) * up, in one kernel for few rows. Made from model.NormGateUp."""

    def __init__(self, plain: nn.Module, activation: str):
        super().__init__()
        self.norm, self.linear, self.name = plain.norm, plain.linear, activation

    def forward(self, x: Tensor) -> Tensor:
        if not few_rows(x, self.linear.weight):
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
        self.linear_sum = getattr(plain, "linear_sum", None)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        few = few_rows(y, self.linear.weight)
        if few and self.linear_sum:
            return self.linear_sum(y, *stored(self.linear), self.linear.bias, x)
        residual = x if self.adds_residual else None
        if few:
            z = torch.ops.hotloop.linear(y, *stored(self.linear), self.linear.bias, None, residual, 0.0, 0.0, "")
        else:
            z = self.linear(y) if residual is None else residual + self.linear(y)
        return z if self.all_reduce is None else self.all_reduce(z)


class FusedMoE(nn.Module):
    """norm -> router -> the best experts, each by one kernel for gate and up and one for down -> their weighted sum and
    the residual, for few rows: the host is not asked which. Made from model.MoE, or from tp.ReducedMoE."""

    most_rows = SMALL_M

    def __init__(self, plain: nn.Module, activation: str, device: torch.device):
        self.__dict__ = plain.__dict__  # one state, two forwards
        # A function, not a method: that would be a circle, in which all experts stay until gc.collect.
        self.branch = plain.branch if hasattr(plain, "branch") else type(plain).experts
        self.name, self.all_reduce = activation, getattr(plain, "all_reduce", None)
        # Programs of a row that have finished. The kernel leaves zeros.
        self.register_buffer("count", torch.zeros(self.most_rows, dtype=torch.int32, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() // x.shape[-1] > self.most_rows or not use_triton(x):
            y = self.branch(self, x)
            return x + (y if self.all_reduce is None else self.all_reduce(y))
        n, operators = self.norm, torch.ops.hotloop
        norm = (n.weight, n.eps, n.offset)
        weight, expert = operators.route(x, self.router.weight, *norm, self.count, self.top, self.norm_weights)
        y = operators.experts(x, *stored(self.gate_up), expert, *norm, self.name, False)
        y = operators.experts(y, *stored(self.down), expert, None, 0.0, 0.0, "", True)
        if self.all_reduce is None:
            return operators.weighted(y, weight, x)
        return x + self.all_reduce(operators.weighted(y, weight, None)).view_as(x)


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

    def forward(self, qkv: Tensor, rope, input_pos: Tensor, slots: Tensor | int | None) -> Tensor:
        cache, many = self.cache, qkv.shape[1] * self.group > ATTEND_ROWS
        if slots is None or not use_triton(qkv):
            return self.any_length(qkv, rope, input_pos, slots)
        norms = (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
        eps, offset = (0.0, 0.0) if self.q_norm is None else (self.q_norm.eps, self.q_norm.offset)
        if many:
            q = torch.ops.hotloop.rotated_queries(
                qkv, *rope, input_pos, cache.k, cache.v, cache.k_scale, cache.v_scale, *norms, self.group, eps, offset
            )
            return self.attended(q.transpose(1, 2), input_pos, slots)
        return torch.ops.hotloop.attend(
            qkv, *rope, input_pos, cache.k, cache.v, cache.k_scale, cache.v_scale, self.count, *norms,
            self.group, self.scale, self.softcap or 0.0, self.window or 0, eps, offset,
        )  # fmt: skip


class FusedModel:
    """What model.Transformer does before and after its layers, in one kernel each; and for a compiler, all layers as
    one operator. `fuse` makes a model one of both."""

    def take_number(self) -> None:
        """Be known by the lowest free number: what compilers keep on disk has it, and is to serve the next process."""
        self.number = next(n for n in itertools.count() if n not in _models)
        _models[self.number] = self

    def __setstate__(self, state: dict) -> None:  # of a copy (copy.copy, copy.deepcopy), which is another model
        super().__setstate__(state)
        self.take_number()

    def embed(self, tokens: Tensor, pos: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """As model.Transformer.embed; the plain one where the embedding is trained."""
        embedding, scale = self.tok_embeddings, self.args.embedding_scale
        if not use_triton(embedding.weight) or (torch.is_grad_enabled() and embedding.weight.requires_grad):
            return super().embed(tokens, pos)
        ropes = [self.rope] if self.rope_local is None else [self.rope, self.rope_local]
        start, all_reduce = getattr(embedding, "start", 0), getattr(embedding, "all_reduce", None)
        x, angles = torch.ops.hotloop.embed(
            tokens, embedding.weight, start, scale, pos, [r.inv_freq for r in ropes], [r.factor for r in ropes]
        )
        return x if all_reduce is None else all_reduce(x), angles[0].unbind(), angles[-1].unbind()

    def run_layers(self, x: Tensor, rope, rope_local, pos: Tensor, slots: Tensor | int | None) -> Tensor:
        """As model.Transformer.run_layers. Where the kernels leave nothing between them to compile, a compiler need
        not go through each layer, which takes seconds: it sees one operator."""
        attention = self.layers[0].attention
        few = few_rows(x) and x.shape[1] * attention.group <= ATTEND_ROWS
        if torch.compiler.is_compiling() and self.all_kernels and few and slots is not None and use_triton(x):
            return torch.ops.hotloop.layers(x, rope, rope_local, pos, attention.count, self.number)
        return super().run_layers(x, rope, rope_local, pos, slots)

    def head(self, x: Tensor) -> Tensor:
        """As model.Transformer.head."""
        if torch.compiler.is_compiling():
            _known_to_inductor()
        return norm_linear(self.norm, self.output, x)


_models: weakref.WeakValueDictionary[int, FusedModel] = weakref.WeakValueDictionary()


def _layers(x: Tensor, rope: list[Tensor], rope_local: list[Tensor], pos: Tensor, count: Tensor, number: int) -> Tensor:
    """The operator hotloop::layers: FusedModel.run_layers of few rows, each of which reads its own length, so that any
    slots will do. Weights and caches are the model's, not arguments. `count`, an attention's, is there to be declared
    as changed, which it is: that keeps a compiler from dropping or moving calls, since caches change with them."""
    model = _models[number]
    return super(FusedModel, model).run_layers(x, rope, rope_local, pos, model.slots)


@functools.cache
def _fused(plain: type) -> type:
    return type(f"Fused{plain.__name__}", (FusedModel, plain), {})


def fuse(model: nn.Module) -> None:
    """Swap the kernels' modules into the seams of every layer, and what comes before and after them, of a model on
    a GPU, whose class changes too.

    Where Triton or a new enough GPU is missing, or a layer has something the kernels lack (a norm on the branch), the
    plain modules stay. Parameters are shared, and so state dict names do not change.
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
        if layer.is_moe:
            stacks = (layer.moe.gate_up, layer.moe.down)
            if all(fits_gemv(e.in_features, KINDS.get(e.weight.dtype, "float")) for e in stacks):
                layer.moe = FusedMoE(layer.moe, model.args.activation, model.tok_embeddings.weight.device)
        else:
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
    model.__class__ = _fused(type(model))
    branches = [b for layer in model.layers for b in (layer.out, layer.moe if layer.is_moe else layer.down)]
    model.all_kernels = all(isinstance(layer.attention, FusedAttention) for layer in model.layers) and all(
        isinstance(b, FusedLinearResidual | FusedMoE) and b.all_reduce is None for b in branches
    )
    model.take_number()


# --------------------------------------------------------------------------------------------------- the operators
# CUDA graphs and torch.compile take them as they are. Of a long prompt the matrix products go to libraries; what is
# between them is bound by memory, and each pass of plain PyTorch counts: a norm makes about five in float32, a rotation
# a dozen. What Inductor compiles keeps the plain norm and gate, of which it fuses more.
def _either(kernel: Callable, reference: Callable) -> Callable:
    """An operator: the kernel, or where that cannot run (the model has moved to a CPU) what it computes."""
    return lambda x, *others: (kernel if use_triton(x) else reference)(x, *others)


@functools.cache
def _triton() -> torch.library.Library:
    """Import Triton, define the kernels, register the operators; once."""
    for file in (kernels_one_pass, kernels_linear, kernels_experts, kernels_attend, kernels_top_k):
        file.triton_programs()
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
    library.define(
        "layers(Tensor x, Tensor[] rope, Tensor[] rope_local, Tensor pos, Tensor(a!) count, int number) -> Tensor"
    )
    library.define(
        "route(Tensor x, Tensor router, Tensor? norm, float eps, float offset, Tensor(a!) count, int top, "
        "bool normalized) -> (Tensor, Tensor)"
    )
    library.define(
        "experts(Tensor x, Tensor weight, Tensor? scale, Tensor expert, Tensor? norm, float eps, float offset, "
        "str activation, bool early) -> Tensor"
    )
    library.define("weighted(Tensor y, Tensor weight, Tensor? residual) -> Tensor")
    library.define("top_k(Tensor logits, int k) -> (Tensor, Tensor)")
    library.define(
        "embed(Tensor tokens, Tensor weight, int start, float scale, Tensor pos, Tensor[] inv_freq, float[] factors) "
        "-> (Tensor, Tensor)"
    )
    library.define("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor")
    library.define("gated(Tensor gate_up, str activation) -> Tensor")
    library.define(
        "rotated_queries(Tensor qkv, Tensor cos, Tensor sin, Tensor pos, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? q_norm, Tensor? k_norm, int group, float eps, "
        "float offset) -> Tensor"
    )
    library.define("dequantized(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor")
    operators = {
        "linear": _linear,
        "attend": _attend,
        "layers": _layers,
        "route": _either(kernels_experts.route, route_reference),
        "experts": _either(_experts, experts_reference),
        "weighted": _either(kernels_experts.weighted, weighted_reference),
        "top_k": _either(kernels_top_k.top_k, torch.topk),
        "embed": _either(kernels_attend.embed, embed_reference),
        "rms_norm": _either(kernels_one_pass.rms_norm, rms_norm_reference),
        "gated": _either(kernels_one_pass.gated, gated_reference),
        "rotated_queries": _either(kernels_attend.rotated_queries, rotated_queries_reference),
        "dequantized": _either(kernels_one_pass.dequantized, dequantized_reference),
    }
    for name, operator in operators.items():
        library.impl(name, operator, "CompositeExplicitAutograd")

    @torch.library.register_fake("hotloop::linear", lib=library)
    def linear_shape(x, weight, scale, bias, norm, residual, eps, offset, activation):
        return x.new_empty(*x.shape[:-1], weight.shape[0] // (2 if activation else 1))

    @torch.library.register_fake("hotloop::attend", lib=library)
    def attend_shape(qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, count, q_norm, k_norm, group, *more):
        return qkv.new_empty(*qkv.shape[:2], k_cache.shape[1] * group * k_cache.shape[3])

    @torch.library.register_fake("hotloop::layers", lib=library)
    def layers_shape(x, rope, rope_local, pos, count, number):
        return x.new_empty(x.shape)

    @torch.library.register_fake("hotloop::route", lib=library)
    def route_shape(x, router, norm, eps, offset, count, top, normalized):
        N = x.numel() // x.shape[-1]
        return x.new_empty(N, top), x.new_empty(N, top, dtype=torch.int64)

    @torch.library.register_fake("hotloop::experts", lib=library)
    def experts_shape(x, weight, scale, expert, norm, eps, offset, activation, early):
        return x.new_empty(expert.numel(), weight.shape[1] // (2 if activation else 1))

    @torch.library.register_fake("hotloop::weighted", lib=library)
    def weighted_shape(y, weight, residual):
        return y.new_empty(weight.shape[0], y.shape[1]) if residual is None else residual.new_empty(residual.shape)

    @torch.library.register_fake("hotloop::top_k", lib=library)
    def top_k_shape(logits, k):
        return logits.new_empty(len(logits), k), logits.new_empty(len(logits), k, dtype=torch.int64)

    @torch.library.register_fake("hotloop::embed", lib=library)
    def embed_shape(tokens, weight, start, scale, pos, inv_freq, factors):
        angles = pos.new_empty(len(factors), 2, *pos.shape, 1, inv_freq[0].shape[0], dtype=torch.float32)
        return weight.new_empty(*tokens.shape, weight.shape[1]), angles

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

    return library
