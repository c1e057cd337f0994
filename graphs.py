"""Steps compiled, and as CUDA graphs: a decode step, and the prefill of a short prompt, each replayed with one launch.

    python generate.py --compile --prompt "def fibonacci(n):"     # on a GPU these are what runs

A graph reads and writes fixed memory, and knows its shapes: hence buffers of its own, one graph for each size, and
cache slots in few sizes. The file imports nothing of the repository: what is captured is passed in.

Sources: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import functools
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------------ slots of the cache
def reads_own_length(model: nn.Module) -> bool:
    """Whether decode attention finds each row's length on the device, whatever slots it is given."""
    return getattr(model.layers[0].attention, "reads_own_length", False)


def slots_for(model: nn.Module, length: int) -> Tensor:
    """The cache slots to attend to for a context of `length` tokens: rounded up, by at most a quarter beyond 1,024.

    Coarse steps keep the number of CUDA graphs (one for each size) small; attention reads what is rounded up too.
    """
    step = max(256 if model.slots.is_cuda else 64, 1 << max(0, length.bit_length() - 3))
    return model.slots[: -(-length // step) * step]


def graph_slots(model: nn.Module, length: int) -> Tensor:
    """`slots_for`, but one size for all where attention does not look at it: fewer graphs."""
    return model.slots if reads_own_length(model) else slots_for(model, length)


# ---------------------------------------------------------------------------------------------------------- compiling
def compile_step(step: Callable, slots_at: int, dynamic: bool | None = False) -> Callable:
    """`step` by torch.compile, for all context lengths at once. slots_at: where among its arguments `slots` is. As it
    is on a GPU for which nothing can be compiled here: it may still be captured.

    dynamic: False, and each number of rows and tokens is a program of its own; None, and from the second on they share.
    """

    @functools.cache
    def compiled(cuda: bool) -> Callable:
        # The first lets Inductor's matrix-vector kernels stream; the second draws the same numbers as eager code.
        options = {"coordinate_descent_tuning": True, "fallback_random": True}
        if cuda and not _triton_compiles():
            return step
        if cuda:  # few kernels are left to Inductor, and a process would wait 10 s at its end for a pool of workers
            options["compile_threads"] = 1
        return torch.compile(step, fullgraph=True, dynamic=dynamic, options=options)

    def run(*args):
        slots = args[slots_at]
        torch._dynamo.mark_dynamic(slots, 0)
        return compiled(slots.is_cuda)(*args)

    return run


def _triton_compiles() -> bool:
    """Whether Triton, which Inductor needs on a GPU, is there, knows this GPU and finds a C compiler. kernels.py, which
    asks for newer GPUs and says what is missing, is not imported here."""
    from torch.utils._triton import has_triton

    return has_triton() and bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


# ---------------------------------------------------------------------------------------------------------- capturing
class GraphedDecode:
    """A decode step captured as a CUDA graph for each batch size and number of slots, the first time it is met.

    The graph reads token and position from buffers of its own and leaves the next ones there, so that a step is one
    launch; mode="reduce-overhead" does the same but checks and copies its inputs each time, 0.3 ms for a small model.
    """

    def __init__(self, step: Callable):
        self.step, self.graphs, self.buffers = step, {}, {}  # step: as generate.advance

    def __call__(self, model, token, input_pos, slots, sample):
        """As generate.decode_one_token; the tensors returned are overwritten by the next call."""
        if reads_own_length(model):
            slots = model.slots
        if token.shape[0] not in self.buffers:
            self.buffers[token.shape[0]] = token.clone(), input_pos.clone()
        buffers = self.buffers[token.shape[0]]
        if token is not buffers[0]:
            buffers[0].copy_(token)
            buffers[1].copy_(input_pos)
        memory = [b.data_ptr() for b in sample.buffers()] if isinstance(sample, nn.Module) else []
        # What is reallocated needs a new graph, and so do another model and sampler, which are kept for their ids.
        sizes = (token.shape[0], slots.shape[0], model.max_batch_size, model.max_seq_len)
        key = (id(model), id(sample), *sizes, *memory)
        if key not in self.graphs:
            self.graphs[key] = self.capture(model, buffers, slots, sample), model, sample
        self.graphs[key][0].replay()
        return buffers

    def capture(self, model, buffers, slots, sample) -> torch.cuda.CUDAGraph:
        """Compile and warm up on a side stream, with the sampler's memory as it was afterwards, then record."""
        kept = {name: b.clone() for name, b in sample.named_buffers()} if isinstance(sample, nn.Module) else {}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step(model, buffers[0].clone(), buffers[1].clone(), slots, sample)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(model, *buffers, slots, sample)
        for name, b in kept.items():
            sample.get_buffer(name).copy_(b)
        return graph


class GraphedPrefill:
    """A prefill captured for short chunks as a CUDA graph, the second time one of its size is met: of each number of
    tokens up to 8, since rows so few cost by their number, and of each power of two beyond.

    A chunk is filled up to that size by repeating its last token at its own position, which changes nothing. Long ones
    run eagerly: there the device is the slower one, and graphs for every length would take its memory.
    """

    EXACT, LARGEST = 8, 512

    def __init__(self, prefill: Callable, most_rows: int | None = None):
        """most_rows: of a batch, beyond which a model cannot be captured, since it waits for the device."""
        self.prefill, self.graphs, self.pool = prefill, {}, torch.cuda.graph_pool_handle()
        self.most_rows = most_rows

    def __call__(self, model, tokens, input_pos, slots):
        """As generate.prefill; the logits returned are overwritten by the next call."""
        B, T = tokens.shape
        size = T if T <= self.EXACT else 1 << (T - 1).bit_length()
        if size > self.LARGEST or (self.most_rows is not None and B * size > self.most_rows):
            return self.prefill(model, tokens, input_pos, slots)
        # By the number that precedes them there would be a graph for each; and filled up they are not in order.
        if isinstance(slots, int) and (slots or T < size):
            slots = slots_for(model, slots + T)
        if T < size:
            repeated = torch.arange(size, device=tokens.device).clamp(max=T - 1)
            tokens, input_pos = tokens[:, repeated], input_pos[:, repeated]
        read = slots if isinstance(slots, int) else slots.shape[0]
        key = (id(model), B, size, read, model.max_batch_size, model.max_seq_len)
        if key not in self.graphs:
            self.graphs[key] = None
            return self.prefill(model, tokens, input_pos, slots)
        if self.graphs[key] is None:
            buffers, graph = (tokens.clone(), input_pos.clone()), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                logits = self.prefill(model, *buffers, slots)
            self.graphs[key] = graph, buffers, logits, model
        graph, buffers, logits, _ = self.graphs[key]
        buffers[0].copy_(tokens)
        buffers[1].copy_(input_pos)
        graph.replay()
        return logits
