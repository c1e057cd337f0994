"""Attention over the KV cache, of a few new tokens a row; what precedes it for many; what precedes all layers.

    embed               a token's row of the embedding, and the angles of its position, beside its plain reference
    attend              RoPE, the write to the cache, and attention split over the context; its reference is
                        model.Attention
    rotated_queries     RoPE and the write to the cache, beside its plain PyTorch reference

The cache is in the model's dtype or in e4m3, with a scale a head and slot.

Try it:  TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py -k "embed or attend or rotated"

Sources: Flash-Decoding (https://pytorch.org/blog/flash-decoding/), online softmax (arXiv 1805.02867).
"""

import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels_one_pass
import kernels_overlap
from kernels_one_pass import rms_norm_reference
from kernels_overlap import overlaps

EMBED_BLOCK = 1024  # columns a program
ATTEND_BLOCK = 64  # slots at a time
ATTEND_ROWS = 64  # new tokens times query heads a kv head, at most


def embed_reference(tokens: Tensor, weight: Tensor, start: int, scale: float, pos: Tensor, inv_freq: list[Tensor],
                    factors: list[float]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """tokens int [B, T], weight [n, C] of ids start ... start + n - 1, pos int [b, T], inv_freq float32 [D/2] each
    -> (x [B, T, C], their rows times scale in weight's dtype, zeros for all other ids; float32 [R, 2, b, T, 1, D/2],
    cosine and sine of pos * inv_freq, times their factor)."""
    local, n = tokens - start, weight.shape[0]
    x = F.embedding(local.clamp(0, n - 1), weight) * ((local >= 0) & (local < n))[..., None]
    angles = [(pos[..., None].float() * f)[:, :, None] for f in inv_freq]
    pairs = [torch.stack([a.cos(), a.sin()]) * factor for a, factor in zip(angles, factors, strict=True)]
    return x * torch.tensor(scale, dtype=x.dtype), torch.stack(pairs)


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


def attend(qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, count, q_norm, k_norm, group, scale, softcap,
           window, eps, offset) -> Tensor:  # fmt: skip
    """What kernels.FusedAttention calls as hotloop::attend. Mutates the caches; `count` is zero before and after."""
    B, T = qkv.shape[:2]
    # The kernel reads positions before it waits for the kernel before it. Those of one token are as old as the step;
    # others may have just been computed, or copied here.
    overlap = overlaps(qkv.device) and T == 1 and pos.is_contiguous()
    qkv, pos = qkv.contiguous(), pos.contiguous()
    K, S, D = k_cache.shape[1:]
    if k_scale is not None:
        k_cache, v_cache = k_cache.view(torch.int32), v_cache.view(torch.int32)
    rows, new = (max(16, 1 << (n - 1).bit_length()) for n in (group * T, T))  # tl.dot wants 16
    # Enough programs to fill the GPU at long contexts; those with nothing to do at a short one return at once.
    splits = max(1, min(64, 264 // (B * K), -(-S // ATTEND_BLOCK)))
    y = torch.empty(B, T, K * group * D, dtype=qkv.dtype, device=qkv.device)
    part = torch.empty(B * K * splits * rows * (D + 2), device=qkv.device)
    triton_programs().attend[(B * K, splits)](
        qkv, cos, sin, pos, q_norm, k_norm, k_cache, v_cache, k_scale, v_scale, part, count, y, S, T, scale, softcap,
        eps, offset, window, K=K, G=group, R=rows, TP=new, D=D, SPLITS=splits,
        SP=1 << (splits - 1).bit_length(), BS=min(ATTEND_BLOCK, 32) if D > 128 else ATTEND_BLOCK,
        SOFTCAP=softcap > 0, WINDOW=window > 0, PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        OVERLAP=overlap, num_warps=4 if rows * D <= 2048 else 8, launch_pdl=overlap,
    )  # fmt: skip
    return y


def embed(tokens: Tensor, weight: Tensor, start: int, scale: float, pos: Tensor, inv_freq: list[Tensor],
          factors: list[float]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator hotloop::embed: `embed_reference` in one kernel; one or two inv_freq."""
    tokens, pos = tokens.contiguous(), pos.contiguous()
    (n, C), R, H = weight.shape, len(inv_freq), inv_freq[0].shape[0]
    x = weight.new_empty(*tokens.shape, C)
    angles = torch.empty(R, 2, *pos.shape, 1, H, device=weight.device)
    M, P, parts, overlap = tokens.numel(), pos.numel(), -(-C // EMBED_BLOCK), overlaps(weight.device)
    triton_programs().embed[max(M, P), parts + R](
        tokens, weight, x, pos, inv_freq[0], inv_freq[-1], angles, start, n, scale, factors[0], factors[-1], M, P, C=C,
        H=H, PARTS=parts, BLOCK=EMBED_BLOCK, BH=1 << (H - 1).bit_length(), OVERLAP=overlap, launch_pdl=overlap,
        num_warps=4,
    )  # fmt: skip
    return x, angles


def rotated_queries(qkv, cos, sin, pos, k_cache, v_cache, k_scale, v_scale, q_norm, k_norm, group, eps,
                    offset) -> Tensor:  # fmt: skip
    """The operator hotloop::rotated_queries: qkv [B, T, (H + 2K) D] -> queries [B, T, H, D]; writes the caches.

    Queries and keys are normalized where there are weights [D], and rotated; keys and values go to slots pos [B, T] of
    caches [B or more, K, S, D], e4m3 where there are scales [B or more, K, S]. Attention reads them there: views of a
    cache need no copy.
    """
    (B, T), (K, S, D) = qkv.shape[:2], k_cache.shape[1:]
    q = qkv.new_empty(B, T, K * group, D)
    tokens = max(1, 2048 // D)  # a program; few enough for registers, and for many programs at short prompts
    if k_scale is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    triton_programs().rotated_queries[(-(-B * T // tokens), K)](
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), pos.contiguous(), q_norm, k_norm, k_cache, v_cache,
        k_scale, v_scale, q, B * T, T, S, eps, offset, G=group, D=D, BT=tokens, num_warps=4,
    )  # fmt: skip
    return q


# ----------------------------------------------------------------------------------------------- the Triton programs
@functools.cache
def triton_programs() -> SimpleNamespace:
    """Import Triton and define the kernels of this file; once."""
    # Kernels look up what they use among the names of their file.
    global tl, INTERPRETED, wait_for_input, as_numbers
    global head_norm, rotated, head_scale, as_e4m3, words_at, from_words, attended
    import triton
    import triton.language as tl

    kernels_one_pass.triton_programs(), kernels_overlap.triton_programs()  # which define what is imported here
    from kernels_one_pass import INTERPRETED, as_numbers
    from kernels_overlap import wait_for_input

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

    @triton.jit(do_not_specialize=["M", "P"])  # one program for all lengths
    def embed(
        tokens, weight, x, pos, inv_freq, inv_freq_local, angles, start, n, scale, factor, factor_local, M, P,
        C: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, BH: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Program (token, part): part of its row; beyond these, its position's angles, of one kind and of the other."""
        m, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        wait_for_input(OVERLAP)
        if part < PARTS:
            if m < M:
                i = part * BLOCK + tl.arange(0, BLOCK)
                token = tl.load(tokens + m).to(tl.int64) - start
                end = tl.where((token >= 0) & (token < n), C, 0)  # of other ids there is nothing here
                row = tl.load(weight + token * C + i, mask=i < end, other=0.0)
                factors = tl.full([BLOCK], scale, tl.float32).to(row.dtype)
                y = row.to(tl.float32) * factors.to(tl.float32)
                tl.store(x + m * C + i, y.to(row.dtype), mask=i < C)
        elif m < P:
            k, second = tl.arange(0, BH), part > PARTS
            frequency = tl.load((inv_freq_local if second else inv_freq) + k, mask=k < H, other=0.0)
            by = factor_local if second else factor
            angle = tl.load(pos + m).to(tl.float32) * frequency
            to = angles + ((part - PARTS) * 2 * P + m) * H + k
            tl.store(to, tl.cos(angle) * by, mask=k < H)
            tl.store(to + P * H, tl.sin(angle) * by, mask=k < H)

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

    return SimpleNamespace(embed=embed, attend=attend, rotated_queries=rotated_queries)
