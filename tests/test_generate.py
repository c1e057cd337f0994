"""generate.py: sampling, the decode loop eager and compiled, stop strings, and the bundled model's golden text.

Try it:  python -m pytest tests/test_generate.py -k sample
         python tests/test_generate.py --write-golden      # after the weights of demo/ changed on purpose
"""

import copy
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))  # for --write-golden; pytest has it already

import kernels  # noqa: E402
from checkpoint import load_model  # noqa: E402
from generate import (  # noqa: E402
    Sampler,
    StopStrings,
    compile_decode,
    compile_prefill,
    complete,
    generate,
    prefill,
    sample,
    slots_for,
    warm_up,
)
from graphs import GraphedPrefill  # noqa: E402
from model import QUERY_BLOCK, flash_attends, from_fp8, pick_kv_dtype, to_fp8  # noqa: E402
from sampling import exponential, probabilities  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

DEMO = Path(__file__).parents[1] / "demo"
pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden.json"
GOLDEN_PROMPTS = ["def fibonacci(n):", "import os\nimport sys\n", "class Queue:\n    def __init__(self"]


def tokens(n: int, seed: int = 0, vocab: int = 97) -> list[int]:
    """A random prompt."""
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def columns(iterator) -> torch.Tensor:
    """What `generate` yields, as one tensor [B, N]."""
    return torch.stack(list(iterator), 1)


@torch.no_grad()
def greedy_by_full_forwards(model, prompt: list[int], n: int) -> list[int]:
    """The plainest loop there is: every token by a forward over everything, without a cache."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


# --------------------------------------------------------------------------------------------------------- sampling
DRAWS, V = 20_000, 12
FILTERS = [
    dict(temperature=1.0),
    dict(temperature=0.7),
    dict(temperature=2.0),
    dict(temperature=1.0, top_k=1),
    dict(temperature=1.3, top_k=4),
    dict(temperature=1.0, top_k=V),
    dict(temperature=1.0, top_k=5 * V),  # more than there are
    dict(temperature=1.0, top_p=0.01),  # always at least one
    dict(temperature=1.0, top_p=0.5),
    dict(temperature=1.0, top_p=0.9),
    dict(temperature=1.0, min_p=0.05),
    dict(temperature=1.5, min_p=0.3),
    dict(temperature=0.8, top_k=8, top_p=0.8),
    dict(temperature=1.2, top_k=9, top_p=0.95, min_p=0.1),
]


def logits_of(seed: int) -> torch.Tensor:
    """[1, V] in random order, from which no filter above makes a probability below half a percent or a near tie."""
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
    return torch.linspace(0, 2.75, V)[order][None] + 0.03 * torch.sin(torch.arange(V) * 2.3)


def plain_filter(logits: torch.Tensor, temperature, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """Probabilities [V] after the filters, written token by token."""
    p = (logits[0].double() / temperature).softmax(0).tolist()
    order = sorted(range(V), key=lambda i: -p[i])[: top_k or V]
    total, mass, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if top_p is None or mass < top_p:
            kept.append(i)
        mass += p[i] / total
    kept = [i for i in kept if p[i] >= (min_p or 0) * p[order[0]]]
    return torch.tensor([p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(V)])


def chi_square_is_plausible(counts: torch.Tensor, probs: torch.Tensor) -> bool:
    """Whether counts could have been drawn from probs: false once in about 30,000 true cases (z = 4)."""
    kept = probs > 0
    expected = probs[kept] * counts.sum()
    statistic = ((counts[kept] - expected) ** 2 / expected).sum().item()
    k = int(kept.sum()) - 1
    if k == 0:
        return True
    return statistic < k * (1 - 2 / (9 * k) + 4 * (2 / (9 * k)) ** 0.5) ** 3  # Wilson and Hilferty


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_sample_draws_from_the_filtered_distribution(settings):
    torch.manual_seed(3)
    logits = logits_of(seed=1)
    counts = torch.bincount(sample(logits.expand(DRAWS, V), **settings)[:, 0], minlength=V)
    probs = plain_filter(logits, **settings)
    assert torch.equal(counts > 0, probs > 0)  # exactly the right set
    assert probs[probs > 0].min() * DRAWS > 50  # so that none is missed by chance
    assert chi_square_is_plausible(counts, probs)


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_the_reference_filter_agrees_with_transformers(settings):
    process = pytest.importorskip("transformers").generation.logits_process
    scores = logits_of(seed=1).double()
    for name, kind in (
        ("temperature", process.TemperatureLogitsWarper),
        ("top_k", process.TopKLogitsWarper),
        ("top_p", process.TopPLogitsWarper),
        ("min_p", process.MinPLogitsWarper),
    ):
        if name in settings:
            scores = kind(settings[name])(None, scores)
    torch.testing.assert_close(plain_filter(logits_of(seed=1), **settings), scores.softmax(-1)[0].float())


@pytest.mark.parametrize("size", [7, 500, 128256])
def test_a_nucleus_is_that_of_a_sort(size, monkeypatch):
    """Logits in bf16 have many ties, of which the first are taken; a large vocabulary is never sorted."""
    torch.manual_seed(0)
    logits = torch.stack([torch.randn(size).bfloat16().float() * scale for scale in (0.5, 2, 8)])
    logits[:, 3] = -torch.inf
    probs = (logits / 0.7).softmax(-1)
    order = probs.double().sort(dim=-1, descending=True, stable=True)
    monkeypatch.setattr(torch, "sort", None), monkeypatch.setattr(torch.Tensor, "topk", None)
    for top_p in (0.01, 0.5, 0.9, 0.99):
        kept = order.values.cumsum(-1) - order.values < top_p
        kept = torch.zeros_like(kept).scatter(-1, order.indices, kept)
        found = probabilities(logits, 0.7, top_p=top_p) > 0
        assert torch.equal(found, kept), top_p
    assert (probabilities(logits, 0.7, top_p=1 - 2**-24).sum(-1) - 1).abs().max() < 1e-5


def test_chi_square_notices_a_wrong_distribution():
    torch.manual_seed(0)
    logits = logits_of(seed=1)
    counts = torch.bincount(sample(logits.expand(DRAWS, V), 1.0)[:, 0], minlength=V)
    assert not chi_square_is_plausible(counts, plain_filter(logits, temperature=1.05))


def test_each_row_has_its_own_distribution_and_draw():
    torch.manual_seed(0)
    rows = torch.stack([logits_of(seed)[0] for seed in range(4)])
    draws = torch.stack([sample(rows, 1.0, top_k=3)[:, 0] for _ in range(2000)], 1)
    for row, drawn in zip(rows, draws, strict=True):
        counts = torch.bincount(drawn, minlength=V)
        assert chi_square_is_plausible(counts, plain_filter(row[None], 1.0, top_k=3))
    same = sample(rows[:1].expand(1000, V), 1.0)
    assert len(same.unique()) > 5  # equal rows draw independently


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_is_argmax(dtype):
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = logits.argmax(-1, keepdim=True)
    assert sample(logits).dtype == torch.int64 and sample(logits).shape == (64, 1)
    assert torch.equal(sample(logits), expected)
    assert torch.equal(sample(logits, 0.0, top_k=5, top_p=0.5, min_p=0.5), expected)
    if dtype == torch.float32:
        assert torch.equal(sample(logits, 1e-5), expected)  # and close to zero is close to greedy
        assert torch.equal(sample(logits, 5.0, top_k=1), expected)


def test_seeds_are_repeatable():
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))

    def draw(seed: int):
        torch.manual_seed(seed)
        return torch.cat([sample(logits, 1.0, top_p=0.9) for _ in range(4)], 1)

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_equals_transformers(penalty):
    process = pytest.importorskip("transformers").generation.logits_process
    theirs = process.RepetitionPenaltyLogitsProcessor(penalty)
    generator = torch.Generator().manual_seed(0)
    ours = Sampler(temperature=0.0, repetition_penalty=penalty)
    for shift in (0, 3, -3):  # both signs at the top; every generation starts afresh
        prompts = torch.randint(50, (3, 7), generator=generator)
        ours.reset(prompts.tolist(), 50, torch.device("cpu"))
        ids = prompts
        for _ in range(20):
            logits = torch.randn(3, 50, generator=generator) + shift
            expected = theirs(ids, logits.clone()).argmax(-1, keepdim=True)
            token = ours(logits)
            assert torch.equal(token, expected)
            ids = torch.cat([ids, token], 1)


def test_repetition_penalty_within_generate(tiny):
    process = pytest.importorskip("transformers").generation.logits_process
    model, prompt = tiny(), tokens(9)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(24):
            logits = model(torch.tensor([ids]))[:, -1]
            scores = process.RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([ids]), logits)
            ids.append(int(scores.argmax()))
    sampler = Sampler(repetition_penalty=1.5)
    assert columns(generate(model, [prompt], 24, sampler))[0].tolist() == ids[9:]
    assert ids[9:] != greedy_by_full_forwards(model, prompt, 24)
    memory = sampler.seen.data_ptr()
    assert columns(generate(model, [prompt], 24, sampler))[0].tolist() == ids[9:]  # nothing stays from before
    assert sampler.seen.data_ptr() == memory


@pytest.mark.parametrize(
    "bad",
    [dict(temperature=-0.1), dict(temperature=float("nan")), dict(top_k=0), dict(top_k=-3), dict(top_p=0.0),
     dict(top_p=1.1), dict(top_p=-0.5), dict(min_p=-0.1), dict(min_p=1.0), dict(repetition_penalty=0.0),
     dict(repetition_penalty=-1.0)],
    ids=str,
)  # fmt: skip
def test_sampler_refuses(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=f"--{name} {value}"):
        Sampler(**bad)


# --------------------------------------------------------------------------------------------------- the decode loop
@pytest.mark.parametrize("changes", [{}, dict(sliding_window=8), dict(attn_softcap=3.0, logit_softcap=5.0)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_greedy_equals_full_forwards(tiny, changes, length):
    model, prompt = tiny(**changes), tokens(length)
    expected = greedy_by_full_forwards(model, prompt, 40)
    assert len(set(expected)) > 8  # not one token over and over
    assert columns(generate(model, [prompt], 40))[0].tolist() == expected


@pytest.mark.parametrize("length", [QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 100])
@pytest.mark.parametrize("changes", [{}, dict(sliding_window=100), dict(attn_softcap=3.0)], ids=str)
def test_prompts_of_several_chunks(tiny, length, changes):
    model, prompt = tiny(**changes), tokens(length)
    assert columns(generate(model, [prompt], 6))[0].tolist() == greedy_by_full_forwards(model, prompt, 6)


@torch.no_grad()
def check_later_chunk(model, dtype: torch.dtype, kv_dtype: str | None, bound: float):
    """300 queries in order after 1,500 tokens, told by that number, attend as under a mask."""
    model.setup_caches(2, 1900, kv_dtype)
    attention, device = model.layers[0].attention, model.slots.device
    q, k, v = (torch.randn(2, 1800, n, attention.head_dim, device=device, dtype=dtype) for n in (4, 2, 2))
    pos = torch.arange(1800, device=device).expand(2, -1)
    attention.cache.update(pos, k, v)
    last = q[:, 1500:].transpose(1, 2), pos[:, 1500:]
    counted, masked = attention.attended(*last, 1500), attention.attended(*last, model.slots)
    assert (counted - masked).float().norm() < bound * masked.float().norm()
    return last[0], *attention.cache.read(2, 1800, dtype)


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
@pytest.mark.parametrize("changes", [{}, dict(sliding_window=100), dict(attn_softcap=3.0)], ids=str)
def test_a_later_chunk_needs_no_mask(tiny, changes, kv_dtype):
    model = tiny(n_heads=4, n_kv_heads=2, **changes)
    assert not flash_attends(*check_later_chunk(model, torch.float32, kv_dtype, 1e-5))


@torch.no_grad()
@pytest.mark.parametrize("start, T", [(0, 16), (0, 5), (0, 13), (40, 16), (40, 13)])
def test_short_chunks_in_order_before_they_are_captured(tiny, start, T, monkeypatch):
    """As who captures them sees them: filled up to a size that others have, and looking at slots."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    ids, pos = torch.tensor([tokens(60), tokens(60, seed=1)]), torch.arange(60).expand(2, -1)
    model, chunk = tiny(), slice(start, start + T)
    model.setup_caches(2, 100)
    model(ids[:, :40], pos[:, :40], 0)
    out = GraphedPrefill(prefill)(model, ids[:, chunk], pos[:, chunk], start)
    torch.testing.assert_close(out, tiny()(ids[:, : start + T])[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: flash attention; the plain one was tested")
@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_a_later_chunk_attends_by_flash(tiny, head_dim, kv_dtype):
    model = tiny(n_heads=4, n_kv_heads=2, head_dim=head_dim).to("cuda", torch.bfloat16)
    assert flash_attends(*check_later_chunk(model, torch.bfloat16, kv_dtype, 1e-2))


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: prompts of a mixture of experts as graphs")
def test_short_prompts_of_experts_are_captured(tiny):
    model = tiny(n_experts=4, n_experts_per_token=2, head_dim=32).to("cuda")
    plain, ids = copy.deepcopy(model), torch.tensor([tokens(60), tokens(60, seed=1)], device="cuda")
    kernels.fuse(model)
    model.setup_caches(2, 100)
    read, pos = compile_prefill(model), torch.arange(60, device="cuda").expand(2, -1)
    for B, T, captured in ((1, 5, True), (1, 13, True), (2, 8, True), (2, 9, False), (1, 17, False)):
        for _ in range(3):  # eager, captured, replayed
            out = read(model, ids[:B, :T], pos[:B, :T], 0)
            torch.testing.assert_close(out, plain(ids[:B, :T])[:, -1], atol=1e-4, rtol=1e-4)
        assert any(key[1] == B and T <= key[2] < 2 * T for key in read.graphs) == captured


def test_prompts_of_experts_without_kernels_are_not_captured(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model = tiny(n_experts=4, n_experts_per_token=2)
    assert compile_prefill(model).most_rows == 0 and compile_prefill(tiny()).most_rows is None
    model.layers[0].moe.most_rows = model.layers[1].moe.most_rows = 16
    assert compile_prefill(model).most_rows == 16


@pytest.mark.parametrize("changes", [{}, dict(sliding_window=8), dict(n_experts=4, n_experts_per_token=2)], ids=str)
def test_a_ragged_row_equals_that_row_alone(tiny, changes):
    model = tiny(**changes)
    prompts = [tokens(n, seed=n) for n in (5, 1, QUERY_BLOCK + 9, 40)]
    together = columns(generate(model, prompts, 20))
    for prompt, row in zip(prompts, together, strict=True):
        assert columns(generate(tiny(**changes), [prompt], 20))[0].tolist() == row.tolist()


def test_stop_ids_end_a_row(tiny):
    model, prompts = tiny(), [tokens(5, seed=1), tokens(9, seed=2)]
    free = columns(generate(model, prompts, 30))
    # a token that each row meets for the first time in mid-flight, at different steps
    first = [{t: row.index(t) for t in reversed(row)} for row in free.tolist()]
    stop = next((a, b) for a, i in first[0].items() for b, j in first[1].items()
                if 3 <= i < j <= 20 and first[0].get(b, 99) > i and first[1].get(a, 99) > j)  # fmt: skip
    ends = [first[0][stop[0]], first[1][stop[1]]]
    out = columns(generate(model, prompts, 30, stop_ids=stop))
    assert out.shape[1] == max(ends) + 1  # ends with the last row
    for row, expected, end in zip(out, free, ends, strict=True):
        assert row[: end + 1].tolist() == expected[: end + 1].tolist()  # the stop id itself is yielded
        assert (row[end + 1 :] == -1).all()


def test_stop_id_as_the_first_and_as_the_last_token(tiny):
    model, prompt = tiny(), tokens(5)
    free = columns(generate(model, [prompt], 8))[0].tolist()
    assert columns(generate(model, [prompt], 8, stop_ids=[free[0]]))[0].tolist() == free[:1]
    last = columns(generate(model, [prompt], 8, stop_ids=[free[7]] if free[7] not in free[:7] else []))
    assert last[0].tolist() == free


def test_columns_are_int64_on_the_cpu_and_not_overwritten(tiny):
    model = tiny()
    kept = list(generate(model, [tokens(4), tokens(6)], 5))
    assert all(c.dtype == torch.int64 and c.shape == (2,) and c.device.type == "cpu" for c in kept)
    assert len({c.data_ptr() for c in kept}) == 5


def test_one_new_token(tiny):
    model, prompt = tiny(), tokens(5)
    steps = []
    out = columns(generate(model, [prompt], 1, decode=lambda *a: steps.append(a)))
    assert out.tolist() == [greedy_by_full_forwards(model, prompt, 1)] and not steps  # nothing is computed in vain


def test_as_many_decode_steps_as_needed(tiny):
    from generate import decode_one_token

    steps = []

    def decode(*args):
        steps.append(1)
        return decode_one_token(*args)

    columns(generate(tiny(), [tokens(5)], 10, decode=decode))
    assert len(steps) == 9


def test_the_whole_context_can_be_used(tiny):
    model, prompt = tiny(max_seq_len=32), tokens(20)
    assert columns(generate(model, [prompt], 12))[0].tolist() == greedy_by_full_forwards(model, prompt, 12)
    with pytest.raises(ValueError, match="20 tokens .* 13 .* context of 32.*--max_new_tokens 12"):
        next(generate(model, [prompt], 13))


def test_generate_refuses(tiny):
    model = tiny(max_seq_len=32)
    with pytest.raises(ValueError, match="empty prompt"):
        next(generate(model, [[]], 4))
    with pytest.raises(ValueError, match="empty prompt"):
        next(generate(model, [[1], []], 4))
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"--max_new_tokens {n}: it must be at least 1"):
            next(generate(model, [[1]], n))
    with pytest.raises(ValueError, match="shorten the prompt") as error:
        next(generate(model, [[1] * 40], 4))
    assert "--max_new_tokens 0" not in str(error.value)  # no remedy that is itself refused


@pytest.mark.parametrize("window", [None, 8])
def test_prefix_reuse(tiny, window):
    model, prompt = tiny(sliding_window=window), tokens(30)
    model.setup_caches(1, 700)
    answer = columns(generate(model, [prompt], 10))[0].tolist()
    turn = [*prompt, *answer, *tokens(600, seed=5)]
    expected = columns(generate(tiny(sliding_window=window), [turn], 12))[0].tolist()
    for start in (39, 7, 0, len(turn) - 1):  # the last answer token was never fed; then everything is in the cache
        assert columns(generate(model, [turn], 12, start=start))[0].tolist() == expected


def test_prefix_reuse_knows_when_the_cache_is_made_anew(tiny):
    model, prompt = tiny(), tokens(30)
    columns(generate(model, [prompt], 10))
    turn = [*prompt, *tokens(100, seed=5)]  # more than was allocated
    assert columns(generate(model, [turn], 12, start=30)).tolist() == [greedy_by_full_forwards(model, turn, 12)]


def test_prefix_reuse_reads_the_cache(tiny):
    model, prompt = tiny(), tokens(30)
    expected = columns(generate(model, [prompt], 10))[0].tolist()
    seen = []

    def prefill(model, tokens, input_pos, slots):
        from generate import prefill

        seen.append(input_pos.tolist())
        return prefill(model, tokens, input_pos, slots)

    assert columns(generate(model, [prompt], 10, prefill=prefill, start=25))[0].tolist() == expected
    assert seen == [[[25, 26, 27, 28, 29]]]
    for layer in model.layers:
        layer.attention.cache.k[:, :, :25] = 0
    assert columns(generate(model, [prompt], 10, start=25))[0].tolist() != expected


def test_cache_is_allocated_once(tiny):
    model = tiny()
    model.setup_caches(3, 900)
    pointers = [(layer.attention.cache.k.data_ptr(), layer.attention.cache.v.data_ptr()) for layer in model.layers]
    for lengths in ((700,), (3,), (5, 60, 800), (2, 2), (850,), (1,)):  # smaller batches after larger ones, too
        prompts = [tokens(n, seed=n) for n in lengths]
        out = columns(generate(model, prompts, 8))
        for prompt, row in zip(prompts, out, strict=True):
            assert row.tolist() == greedy_by_full_forwards(model, prompt, 8)
    assert pointers == [(lay.attention.cache.k.data_ptr(), lay.attention.cache.v.data_ptr()) for lay in model.layers]


def test_slots_for():
    for cuda, least in ((False, 64), (True, 256)):
        slots = type("Slots", (), {"is_cuda": cuda, "__getitem__": lambda self, s: s.stop})()
        sizes = {n: slots_for(SimpleNamespace(slots=slots), n) for n in range(1, 20_000)}
        assert all(n <= size <= max(least, n + n // 4 + 64) for n, size in sizes.items() if n <= 1024 and not cuda)
        assert all(n <= size <= max(least, 1.25 * n) for n, size in sizes.items() if n > 1024)
        assert all(n <= size < n + least for n, size in sizes.items() if n <= 256)
        assert sorted(sizes.values()) == list(sizes.values())
        assert len(set(sizes.values())) < 48  # each is a CUDA graph


def test_slots_never_exceed_the_cache(tiny):
    model = tiny()
    model.setup_caches(1, 1100)
    for n in (1, 64, 65, 1024, 1025, 1100):
        slots = slots_for(model, n)
        assert n <= len(slots) <= model.layers[0].attention.cache.k.shape[2]
        assert torch.equal(slots, torch.arange(len(slots)))


# --------------------------------------------------------------------------------------------------- an fp8 KV cache
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_round_trip(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=generator) * 2.0 ** torch.randint(-12, 8, (500, 1), generator=generator)
    x[:100] *= torch.randn(100, 64, generator=generator) ** 8  # elements of very different sizes
    x[100] = 0
    x[101:103] = torch.tensor([1.0, 255.0])[:, None]
    x = x.clamp(-3e4, 3e4).to(dtype)
    q, scale = to_fp8(x)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.bfloat16, (500,))
    y, top = from_fp8(q, scale, dtype), x.abs().amax(-1, keepdim=True)
    assert y.dtype == dtype and y.isfinite().all()
    wrong, rounding = (y.double() - x.double()).abs(), 2.0**-7 if dtype == torch.bfloat16 else 2.0**-8
    assert (wrong <= torch.maximum(x.abs().double() * (1 / 16 + rounding), top.double() * 2**-17)).all()
    assert (wrong[x.abs() == top] <= (top.expand_as(x)[x.abs() == top].double() * rounding)).all()
    assert torch.equal(y[100:103], x[100:103])  # what is as large as the largest is kept, and zeros


def fp8_caches(model, batch: int = 1, length: int = 1200):
    model.setup_caches(batch, length, "fp8")
    return model


def test_fp8_cache_is_half_as_large_and_stays_fp8(tiny):
    model, plain = fp8_caches(tiny(head_dim=64)), tiny(head_dim=64).to(torch.bfloat16)
    plain.setup_caches(1, 1200)
    small, large = (sum(b.nbytes for b in m.layers[0].attention.cache.buffers()) for m in (model, plain))
    assert small == large * (64 + 2) / (2 * 64)
    columns(generate(model, [tokens(5)] * 3, 2))  # larger ones, by someone who does not ask for a dtype
    assert model.layers[1].attention.cache.k.dtype == torch.float8_e4m3fn
    assert model.layers[1].attention.cache.k_scale.shape == model.layers[1].attention.cache.k.shape[:3]


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(sliding_window=8), dict(attn_softcap=3.0, qk_norm=True)], ids=str)
def test_fp8_keys_and_values_are_the_same_however_they_come(tiny, changes):
    """A prompt at once, before anything is in the cache or through it, in chunks, and step by step: one result."""
    ids, pos = torch.tensor([tokens(60), tokens(60, seed=1)]), torch.arange(60).expand(2, -1)
    plain, results, many = tiny(**changes)(ids), [], [7, 8, 16, 1, 2, 3, 4, 5, 6, 8]
    for sizes, counted in [([60], True), ([60], False), ([1] * 60, False), (many, False), (many, True)]:
        model = fp8_caches(tiny(**changes), batch=2)
        parts = zip(ids.split(sizes, 1), pos.split(sizes, 1), strict=True)
        results.append(torch.cat([model(x, p, int(p[0, 0]) if counted else model.slots[:64]) for x, p in parts], 1))
    for result in results:
        off = (result - results[0]).abs().amax((0, 2)) / results[0].abs().max()
        assert off.quantile(0.8) < 2e-5 and off.max() < 2e-3, off  # a sum in another order, and an fp8 rounding flips
    assert 1e-3 < (results[0] - plain).norm() / plain.norm() < 0.25  # of random weights, whose logits change easily


def test_fp8_ragged_row_equals_that_row_alone(tiny):
    prompts = [tokens(n, seed=n) for n in (5, 1, QUERY_BLOCK + 9, 40)]
    together = columns(generate(fp8_caches(tiny()), prompts, 20))
    for prompt, row in zip(prompts, together, strict=True):
        assert columns(generate(fp8_caches(tiny()), [prompt], 20))[0].tolist() == row.tolist()


def test_fp8_cache_compiled_and_reused(tiny):
    model = fp8_caches(tiny(n_layers=1))
    steps = dict(decode=compile_decode(model))
    for length in (40, 5, 70):
        expected = columns(generate(fp8_caches(tiny(n_layers=1)), [tokens(length)], 12))
        assert torch.equal(columns(generate(model, [tokens(length)], 12, **steps)), expected), length


def test_fp8_cache_refusals(tiny, monkeypatch):
    model = tiny()
    with pytest.raises(ValueError, match="--kv_dtype int3: not known; known: fp8"):
        model.setup_caches(1, 10, "int3")
    model.setup_caches(1, 10)
    with pytest.raises(ValueError, match="first call"):
        model.setup_caches(1, 10, "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match="--kv_dtype fp8: needs .* 8.9"):
            pick_kv_dtype("fp8", torch.device(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert pick_kv_dtype("fp8", torch.device("cuda")) == torch.float8_e4m3fn


# ----------------------------------------------------------------------------------------------------- no S x S term
class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any tensor made inside had, and what made it."""

    def __init__(self):
        super().__init__()
        self.numel, self.made_by = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                size = t.untyped_storage().nbytes() // t.element_size()  # an expanded view takes no memory
                if size > self.numel:
                    self.numel, self.made_by = size, str(func)
        return out


S = 3000
WIDE = dict(n_heads=2, n_kv_heads=1, n_layers=1)
# All heads' scores of one block of queries, over all slots of the cache; an S x S mask has three times as many.
BOUND = 2 * QUERY_BLOCK * (S + 200)


@pytest.mark.parametrize("changes", [{}, dict(sliding_window=64), dict(attn_softcap=3.0)], ids=str)
def test_no_tensor_grows_with_the_square_of_the_prompt(tiny, changes):
    model = tiny(**WIDE | changes)
    assert BOUND < S * S / 2
    model.setup_caches(1, S + 8)
    with LargestTensor() as largest:
        columns(generate(model, [tokens(S)], 4))
    assert largest.numel <= BOUND, largest.made_by


@pytest.mark.parametrize("changes", [{}, dict(sliding_window=64), dict(attn_softcap=3.0)], ids=str)
@pytest.mark.parametrize("call", ["no cache", "cache", "training"])
def test_no_tensor_grows_with_the_square_of_one_forward(tiny, changes, call):
    model = tiny(**WIDE | changes)
    x = torch.tensor([tokens(S)])
    with LargestTensor() as largest, torch.set_grad_enabled(call == "training"):
        if call == "cache":
            model.setup_caches(1, S + 8)
            model(x, torch.arange(S)[None])
        elif call == "training":
            model.requires_grad_(True)
            model(x).square().mean().backward()
        else:
            model(x)
    assert largest.numel <= BOUND, largest.made_by


def test_the_largest_tensor_is_noticed():
    with LargestTensor() as largest:
        x = torch.ones(S, 1)
        (x == x.T).sum()
    assert largest.numel == S * S > BOUND


def test_decode_reads_only_the_context(tiny):
    """One step after a short prompt in a huge cache makes nothing as large as the cache is long."""
    model = tiny(vocab_size=17)
    model.setup_caches(1, 4000)
    list(generate(model, [tokens(10, vocab=17)], 1))
    with LargestTensor() as largest, torch.no_grad():
        model(torch.tensor([[3]]), torch.tensor([[10]]), slots_for(model, 11))
    cache = model.layers[0].attention.cache.k.numel()  # in-place writes return the cache itself
    assert largest.numel == cache
    spy = []
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **kw: (
        spy.append(k.shape) or attend(q, k, v, **kw)
    )
    try:
        list(generate(model, [tokens(10, vocab=17)], 3))
    finally:
        torch.nn.functional.scaled_dot_product_attention = attend
    assert {shape[2] for shape in spy} == {10, 64}  # the prompt's own tokens, then a round number of slots


# ---------------------------------------------------------------------------------------------------------- compiled
@pytest.fixture
def compiled():
    """compile_decode plus main's warm-up; afterwards a recompilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):

        def make(model, sampler=sample, length=3100, batch=1):
            model.setup_caches(batch, length)
            steps = dict(decode=compile_decode(model))
            warm_up(model, lambda p, n, **kw: generate(model, p * batch, n, sampler, **steps, **kw), length)
            torch._dynamo.config.error_on_recompile = True
            return steps

        yield make
    torch._dynamo.reset()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_compiled_prompts_of_all_lengths_without_recompilation(tiny, compiled, penalty):
    model, sampler = tiny(), Sampler(repetition_penalty=penalty)
    steps = compiled(model, sampler)
    pointers = [layer.attention.cache.k.data_ptr() for layer in model.layers]
    for length in (10, 500, 3000, 1, 63, 64, 65, 1023, 1024, 1025):
        prompt, new = tokens(length, seed=length), 70 if length == 10 else 20  # 70: across a step of slots
        expected = columns(generate(tiny(), [prompt], new, Sampler(repetition_penalty=penalty)))
        assert torch.equal(columns(generate(model, [prompt], new, sampler, **steps)), expected), length
    # a chat of many turns, each with what came before in the cache
    ids, start = tokens(7), 0
    for turn in range(12):
        expected = columns(generate(tiny(), [ids], 9, Sampler(repetition_penalty=penalty)))
        out = columns(generate(model, [ids], 9, sampler, **steps, start=start))
        assert torch.equal(out, expected), turn
        start = len(ids) + 8
        ids = ids + out[0].tolist() + tokens(3 + 17 * turn, seed=turn)
    assert pointers == [layer.attention.cache.k.data_ptr() for layer in model.layers]


def test_compiled_recompilation_would_be_noticed(tiny, compiled):
    model = tiny()
    steps = compiled(model, length=200)
    with pytest.raises(Exception, match="(?i)recompil"):
        columns(generate(model, [tokens(5), tokens(6)], 4, **steps))  # another batch size is another program


@pytest.mark.parametrize(
    "changes", [dict(sliding_window=8), dict(n_experts=4, n_experts_per_token=2, qk_norm=True)], ids=str
)
def test_compiled_families_at_batch_two(tiny, compiled, changes):
    model = tiny(**changes)
    sampler = Sampler()
    steps = compiled(model, sampler, length=300, batch=2)
    for lengths in ((5, 90), (200, 1), (33, 33)):
        prompts = [tokens(n, seed=n) for n in lengths]
        expected = columns(generate(tiny(**changes), prompts, 24, Sampler()))
        assert torch.equal(columns(generate(model, prompts, 24, sampler, **steps)), expected)


def test_compiled_sampling_draws_from_the_distribution(tiny, compiled):
    """The noise must be fresh in every compiled step, and the filters hold."""
    model = tiny(n_layers=1, vocab_size=V)
    sampler = Sampler(temperature=1.5, top_k=6, top_p=0.95)
    batch, prompt = 500, tokens(4, vocab=V)
    steps = compiled(model, sampler, length=64, batch=batch)
    torch.manual_seed(0)
    first, second = columns(generate(model, [prompt] * batch, 2, sampler, **steps)).T
    assert len(second.unique()) > 1
    with torch.no_grad():
        for token in first.unique()[:3].tolist():
            probs = plain_filter(model(torch.tensor([[*prompt, token]]))[:, -1], 1.5, 6, 0.95)
            counts = torch.bincount(second[first == token], minlength=V)
            assert not (counts[probs == 0]).any()
            if (probs[probs > 0] * counts.sum()).min() > 5:
                assert chi_square_is_plausible(counts, probs)
    torch.manual_seed(0)
    again = columns(generate(model, [prompt] * batch, 2, sampler, **steps)).T
    assert torch.equal(again[0], first) and torch.equal(again[1], second)


def test_noise_is_exponential_and_ever_new():
    clock = torch.tensor([[3], [4], [1 << 61]])  # two steps of a row, and another row
    noise = exponential(clock, 200_000)
    assert noise.dtype == torch.float32 and torch.equal(noise, exponential(clock, 200_000))
    parts = (50 * (1 - noise.double().neg().exp())).long().clamp(max=49)  # equally likely ones
    for row in parts:
        assert chi_square_is_plausible(torch.bincount(row, minlength=50), torch.full((50,), 0.02))
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.01
    assert torch.corrcoef(torch.stack([noise[0, 1:], noise[0, :-1]]))[0, 1].abs() < 0.01
    assert exponential(torch.tensor([[4495110279328]]), 2000)[0, 1646] > 16, "of the largest number there is"
    assert exponential(torch.tensor([[4495110279328]]), 2000).isfinite().all()
    # What is drawn once in a million is small noise, of which there must be neither too much nor too little.
    small = sum(int((exponential(clock + 10 * i, 200_000) < 1e-5).sum()) for i in range(100))
    assert abs(small - 600) < 150


def test_a_sampler_keeps_its_memory_for_smaller_batches():
    """A captured graph reads it; and rows of a batch draw different numbers."""
    sampler, logits = Sampler(temperature=1.0), torch.zeros(3, 1000)
    torch.manual_seed(5)
    sampler.reset([[1]] * 3, 1000, logits.device)
    address, first = sampler.clock.data_ptr(), [sampler(logits) for _ in range(2)]
    assert len(torch.cat(first).unique()) == 6
    sampler.reset([[1]], 1000, logits.device)
    assert sampler.clock.data_ptr() == address and sampler(logits[:1]).shape == (1, 1)
    torch.manual_seed(5)
    sampler.reset([[1]] * 3, 1000, logits.device)
    assert sampler.clock.data_ptr() == address and torch.equal(sampler(logits), first[0])


def test_compiled_sampling_draws_what_eager_code_draws(tiny, compiled):
    model, sampler = tiny(n_layers=1), Sampler(temperature=1.2, top_p=0.9)
    steps = compiled(model, sampler, length=100)
    runs = []
    for more in (steps, {}):
        torch.manual_seed(11)
        runs.append(columns(generate(model, [tokens(5)], 40, sampler, **more)))
    assert torch.equal(*runs)


# ------------------------------------------------------------------------------------------------- mixture of experts
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("experts, top", [(4, 2), (16, 3), (8, 8), (5, 1)])
def test_routed_experts_equal_gathered_ones(tiny, experts, top, norm):
    model = tiny(n_layers=1, n_experts=experts, n_experts_per_token=top, norm_expert_weights=norm)
    moe, x = model.layers[0].moe, torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
    gathered = []
    forward = type(moe.gate_up).forward
    moe.gate_up.forward = lambda *a: gathered.append(1) or forward(moe.gate_up, *a)
    many = moe(x)  # 60 rows: each expert once, with the rows routed to it
    assert not gathered
    few = torch.stack([moe(x[b : b + 1, t : t + 1])[0, 0] for b in range(2) for t in range(30)]).view_as(x)
    assert len(gathered) == 60
    torch.testing.assert_close(many, few, rtol=1e-5, atol=1e-5)
    assert (many - x).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------- stop strings
def feed_all(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    stopper = StopStrings(stops)
    shown = [stopper.feed(piece) for piece in pieces]
    return [*shown, stopper.feed("", final=True)], stopper.stopped


@pytest.mark.parametrize(
    "stops, pieces, shown, stopped",
    [
        ([], ["a", "b"], ["a", "b", ""], False),
        (["END"], ["x E", "N", "D y"], ["x ", "", "", ""], True),  # split over tokens
        (["END"], ["x E", "N", "O"], ["x ", "", "ENO", ""], False),  # a false alarm
        (["END"], ["x E", "N"], ["x ", "", "EN"], False),  # the end: what was held back is released
        (["\n\n"], ["a\n", "b\n", "\n", "c"], ["a", "\nb", "", "", ""], True),
        (["bc", "abcd"], ["xa", "b", "cd"], ["x", "", "", ""], True),
        (["abab!", "aba?"], ["abab", "ab!"], ["", "ab", ""], True),  # overlapping prefixes
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""], True),
        (["x", "hello"], ["hel", "lox"], ["", "", ""], True),  # the earliest of several
        ([""], ["a", "b"], ["a", "b", ""], False),  # an empty stop string stops nothing
        (["é"], ["caf", "é", "s"], ["caf", "", "", ""], True),
    ],
)
def test_stop_strings(stops, pieces, shown, stopped):
    assert feed_all(stops, pieces) == (shown, stopped)


def test_stop_strings_on_random_texts():
    rng = random.Random(0)
    stopped_ever = 0
    for _ in range(3000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        pieces = ["".join(rng.choices("abc", k=rng.randint(0, 4))) for _ in range(rng.randint(1, 8))]
        stopper, text, shown = StopStrings(stops), "", ""
        for piece in pieces:
            text += piece
            shown += stopper.feed(piece)
            found = [i for i in map(text.find, stops) if i >= 0]
            if found:
                assert stopper.stopped and shown == text[: min(found)]
                stopped_ever += 1
                break
            assert not stopper.stopped and text.startswith(shown)
            held = text[len(shown) :]  # no more than could become a stop string is held back
            assert held == "" or any(s.startswith(held) for s in stops)
        else:
            assert shown + stopper.feed("", final=True) == text
        assert stopper.feed("more") == ("" if stopper.stopped else "more")
    assert 500 < stopped_ever < 2900


# ------------------------------------------------------------------------------------------------- complete: streaming
@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(DEMO)


def run_complete(tokenizer, text: str, stops=(), stop_ids=(), extra=()):
    """`complete` with a model that says `text`, then the ids `extra`; what is streamed is also returned."""
    ids, prompt = [*tokenizer.encode(text, bos=False), *extra], tokenizer.encode("# ")
    written = []
    result = complete(
        lambda: iter(torch.tensor([[i] for i in ids])), tokenizer, prompt, stop_ids, stops, written.append
    )
    assert "".join(written) == result["text"]
    assert result["prompt_tokens"] == len(prompt)
    assert result["tokens"] == ids[: len(result["tokens"])]
    return result, written, ids


TEXT = "    def f(x):\n        return '日本 😀' * x\n\n\nclass A:\n"


def test_complete_streams_all_text(tokenizer):
    result, written, ids = run_complete(tokenizer, TEXT)
    assert result["text"] == TEXT and result["finish_reason"] == "length" and result["tokens"] == ids
    assert len(written) == len(ids) + 1  # one write a token: it streams
    assert sum(map(bool, written)) > 10


def test_complete_ends_at_a_stop_string(tokenizer):
    result, _, ids = run_complete(tokenizer, TEXT, stops=["\nclass", "never"])
    assert result["text"] == TEXT[: TEXT.index("\nclass")] and result["finish_reason"] == "stop"
    assert len(result["tokens"]) < len(ids)
    result, _, _ = run_complete(tokenizer, TEXT, stops=["class A:\n\n"])  # only nearly
    assert result["text"] == TEXT and result["finish_reason"] == "length"


def test_complete_ends_at_eos(tokenizer):
    assert tokenizer.stop_ids
    eos = tokenizer.stop_ids[0]
    result, _, ids = run_complete(tokenizer, "a = 1", stop_ids=tokenizer.stop_ids, extra=[eos, *[5] * 9])
    assert result["text"] == "a = 1" and result["finish_reason"] == "stop"
    assert result["tokens"][-1] == eos and len(result["tokens"]) == len(ids) - 9
    result, _, _ = run_complete(tokenizer, "a = 1 E", stops=["END"], stop_ids=[eos], extra=[eos])
    assert result["text"] == "a = 1 E"  # what a stop string held back is released


def test_complete_with_a_real_generation(tiny, tokenizer):
    model = tiny(vocab_size=tokenizer.vocab_size)
    ids = tokenizer.encode("x")
    for n in (1, 20):
        result = complete(lambda n=n: generate(model, [ids], n), tokenizer, ids, (), (), lambda text: None)
        assert result["tokens"] == columns(generate(model, [ids], n))[0].tolist()
        assert result["finish_reason"] == "length" and result["ttft_s"] > 0
        assert (result["decode_tok_s"] is None) == (n == 1)


# -------------------------------------------------------------------------------------------------- the bundled model
BUNDLED = [DEMO, DEMO / "draft"]


def bundled_prompt(directory: Path) -> list[int]:
    return Tokenizer(directory).encode((DEMO / "heldout.txt").read_text()[:400])


@pytest.mark.parametrize("directory", BUNDLED, ids=lambda d: d.name)
def test_bundled_model_equals_transformers(directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = load_model(directory, dtype=torch.float32)
    ids = bundled_prompt(directory)
    x = torch.tensor([ids])
    with torch.no_grad():
        expected, logits = theirs(x).logits, ours(x)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    greedy = theirs.generate(
        x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :]
    assert columns(generate(ours, [ids], 64))[0].tolist() == greedy.tolist()


@pytest.mark.parametrize("directory", BUNDLED, ids=lambda d: d.name)
def test_bundled_model_compiled_equals_eager(directory, compiled):
    model = load_model(directory, dtype=torch.float32)
    prompts = [bundled_prompt(directory)[:n] for n in (100, 7)]
    expected = [columns(generate(model, [p], 64)) for p in prompts]
    steps = compiled(model, length=200)
    for prompt, out in zip(prompts, expected, strict=True):
        assert torch.equal(columns(generate(model, [prompt], 64, **steps)), out)
    if directory == DEMO:  # and the golden text, while it is compiled
        for golden in json.loads(GOLDEN.read_text()):
            assert golden_tokens(model, golden["prompt"], **steps) == golden["tokens"]


def golden_tokens(model, prompt: str, **steps) -> list[int]:
    """64 greedy tokens that demo/ continues a prompt with."""
    return columns(generate(model, [Tokenizer(DEMO).encode(prompt)], 64, **steps))[0].tolist()


def test_golden_text():
    """The bundled model's words. After a new demo/: python tests/test_generate.py --write-golden"""
    model, tokenizer = load_model(DEMO, dtype=torch.float32), Tokenizer(DEMO)
    golden = json.loads(GOLDEN.read_text())
    assert [g["prompt"] for g in golden] == GOLDEN_PROMPTS
    for g in golden:
        assert golden_tokens(model, g["prompt"]) == g["tokens"]
        prompt = tokenizer.encode(g["prompt"])
        assert tokenizer.decode([*prompt, *g["tokens"]]) == g["prompt"] + g["text"]


@pytest.mark.parametrize("missing", ["nothing", "Triton", "a C compiler"])
def test_a_step_that_cannot_be_compiled_for_a_gpu_runs_as_it_is(missing, monkeypatch):
    import graphs

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: missing != "Triton")
    monkeypatch.setattr(graphs.shutil, "which", lambda name: None if missing == "a C compiler" else name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch._dynamo, "mark_dynamic", lambda *a: None)
    monkeypatch.setattr(torch, "compile", lambda step, **_: lambda *a: "compiled")
    step = graphs.compile_step(lambda x, slots: "plain", 1)
    assert step(0, SimpleNamespace(is_cuda=True)) == ("compiled" if missing == "nothing" else "plain")
    assert step(0, SimpleNamespace(is_cuda=False)) == "compiled"


def write_golden() -> None:
    model, tokenizer = load_model(DEMO, dtype=torch.float32), Tokenizer(DEMO)
    rows = []
    for prompt in GOLDEN_PROMPTS:
        new = golden_tokens(model, prompt)
        stream = tokenizer.stream(tokenizer.encode(prompt))
        text = "".join(map(stream.feed, new)) + stream.flush()
        rows.append({"prompt": prompt, "text": text, "tokens": new})
        print(f"{prompt}{text}\n{'-' * 60}")
    lines = ",\n".join(json.dumps(row) for row in rows)
    GOLDEN.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-golden"]:
        sys.exit("usage: python tests/test_generate.py --write-golden")
    write_golden()
