"""The k largest of each row of logits, sorted, with their ids: three kernels, beside torch.topk, which they replace.

torch.topk sorts whole rows of a large vocabulary. Here a bound is found first, among the largest of groups of logits;
the few that are not below it are collected; and each of them is put in its place.

Try it:  TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py -k top_k

Source: none but what was tried and measured (benchmarks/NOTES.md).
"""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

import kernels_overlap
from kernels_overlap import overlaps

MAX_TOP_K = 256  # the largest k of the kernels
GROUPS = 4 * MAX_TOP_K  # of a row's logits; of more groups than k, most of the k largest are alone in theirs
FOUND = 2048  # room for those that may be among the k largest, usually a tenth more than k
TOP_K_TILE = 4096  # logits a program


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The operator hotloop::top_k: the largest of each group; the logits not below the k-th of these; their order.

    A group is every GROUPS-th logit, because likely tokens are often neighbours. Any input is right, if slower: where
    the largest crowd in so few groups that there is no room for what is found.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    (B, V), stride, device = logits.shape, logits.stride(0), logits.device
    values, ids = logits.new_empty(B, k), torch.empty(B, k, dtype=torch.int64, device=device)
    best, found = (torch.empty(B, n, dtype=torch.int64, device=device) for n in (GROUPS, 2 * FOUND))
    count = torch.empty(2, B, dtype=torch.int32, device=device)
    rows = 1 << (-(-V // GROUPS) - 1).bit_length()
    columns = max(1, min(GROUPS, TOP_K_TILE // rows))
    tiles, overlap = GROUPS // columns, overlaps(device)
    settings = dict(R=rows, C=columns, G=GROUPS, OVERLAP=overlap, launch_pdl=overlap)
    t = triton_programs()
    t.group_maxima[B, tiles](logits, best, count, V, stride, **settings, num_warps=4)
    settings |= dict(ROOM=FOUND)
    # The search for the k-th ends a little early, which saves more than the few candidates that it adds cost.
    t.candidates[B, tiles](logits, best, found, count, V, stride, k, k + k // 16 + 8, **settings, num_warps=8)
    t.in_order[B, -(-k // 16) + 2](logits, found, count, values, ids, V, stride, k, tiles, **settings, num_warps=4)
    return values, ids


# ----------------------------------------------------------------------------------------------- the Triton programs
@functools.cache
def triton_programs() -> SimpleNamespace:
    """Import Triton and define the kernels of this file; once."""
    # Kernels look up what they use among the names of their file.
    global tl, wait_for_input, LOWEST, sort_keys, between, collect
    import triton
    import triton.language as tl

    kernels_overlap.triton_programs()  # which defines what is imported here
    from kernels_overlap import wait_for_input

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

    return SimpleNamespace(group_maxima=group_maxima, candidates=candidates, in_order=in_order)
