"""speculative.py: greedy tokens are those of plain decoding, sampled ones have its distribution, and it pays or stops.

Try it:  python -m pytest tests/test_speculative.py -k accept
"""

import functools
import inspect
import json
import random
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import benchmark
import benchmark_speculation
import draft as drafts
import generate as program
import sampling
import speculative
import tables
from checkpoint import load_model
from generate import Sampler, compile_decode, complete, fill, generate, graph_slots, warm_up
from graphs import compile_step
from quantize import make_recipe
from speculative import MAX_K, Pace, Speculation, accept, accept_greedy, accept_listed, propose_lookup
from tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "demo"
DEPTHS = range(1, 9)
PROPOSERS = ("draft", "int8", "int4", "lookup")

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(n: int, seed: int = 0, vocab: int = 97) -> list[int]:
    """A random prompt."""
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def columns(iterator) -> torch.Tensor:
    """What `generate` yields, as one tensor [B, N]."""
    return torch.stack(list(iterator), 1)


def speculation(k=4, draft=None, **more) -> Speculation:
    return Speculation(fill, graph_slots, k, draft, **more)


def noisy(draft, amount: float):
    """A model, with noise in its weights."""
    generator = torch.Generator().manual_seed(5)
    for weight in draft.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.data = weight + amount * weight.std() * noise
    return draft


def perturbed(model, tiny, amount: float, **changes):
    """A draft that agrees with a tiny model now and then: its weights, and noise."""
    draft = tiny(**changes)
    for mine, theirs in zip(draft.parameters(), model.parameters(), strict=True):
        mine.data = theirs
    return noisy(draft, amount)


class Steps(Sampler):
    """A greedy sampler that remembers what each step gave each row, a plain step one token."""

    def reset(self, *more):
        super().reset(*more)
        self.steps = []

    def forward(self, logits):
        out = super().forward(logits)
        self.steps.append(out.tolist())
        return out

    def verify(self, *more):
        out = super().verify(*more)
        self.steps.append([[t for t in row if t >= 0] for row in out.tolist()])
        return out

    def stopped_inside(self, out: torch.Tensor, stops) -> int:
        """In how many rows of what was yielded the stop was followed by tokens of its step, which had to be dropped."""
        inside = 0
        for row, steps in zip(out.tolist(), zip(*self.steps, strict=True), strict=True):
            if set(stops) & set(row):
                step = next(step for step in steps if set(stops) & set(step))
                inside += bool(set(stops) & set(step[:-1]))
        return inside


def until(rows: torch.Tensor, stops) -> torch.Tensor:
    """What `generate` leaves of tokens [B, N] where a stop ends a row."""
    stop = torch.isin(rows, torch.tensor(list(stops))).long()
    rows = rows.masked_fill(stop.cumsum(1) > stop, -1)
    return rows[:, (rows >= 0).any(0)]


@pytest.fixture(scope="module")
def bundled():
    """The bundled pair in float32: (tokenizer, model, draft of each proposer)."""
    own = {mode: load_model(DEMO, dtype=torch.float32, quant=make_recipe(mode)) for mode in ("int8", "int4")}
    drafts = {"draft": load_model(DEMO / "draft", dtype=torch.float32), **own, "lookup": None}
    return Tokenizer(DEMO), load_model(DEMO, dtype=torch.float32), drafts


# ----------------------------------------------------------------------------------------------------------- accept
V, DRAWS = 10, 200_000


def p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's chi-square test: how likely counts at least so far from probs are; 0 for what cannot be drawn."""
    possible = probs > 0
    if counts[~possible].any():
        return 0.0
    expected = probs[possible].double() * counts.sum()
    assert expected.min() > 5
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((possible.sum().item() - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def distributions(deterministic: bool):
    """(target [3, V], draft [2, V] or None): with tokens that only one of the two can draw."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(n, V, generator=generator).mul(1.2).softmax(-1) for n in (3, 2))
    p[:, 3], q[:, 6] = 0, 0
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return p, None if deterministic else q


def p_values(accept, deterministic: bool) -> list[float]:
    """The test of each of the three tokens that a step of k = 2 may give, where it gives it, and of the first two."""
    p, q = distributions(deterministic)
    generator = torch.Generator().manual_seed(1)
    if deterministic:
        proposed = torch.tensor([[4, 8]]).expand(DRAWS, 2)
    else:
        proposed = torch.stack([q[i].multinomial(DRAWS, replacement=True, generator=generator) for i in (0, 1)], 1)
    coins = torch.rand(DRAWS, 2, generator=generator)
    noise = torch.empty(DRAWS, V).exponential_(generator=generator)
    out = accept(p.expand(DRAWS, 3, V), None if q is None else q.expand(DRAWS, 2, V), proposed, coins, noise)
    assert out.shape == (DRAWS, 3) and out.dtype == torch.int64
    values = []
    for i in range(3):
        there = out[:, i][out[:, i] >= 0]
        values.append(p_value(torch.bincount(there, minlength=V), p[i]))
    return values


def accept_lists(p, q, proposed, coins, noise, accept_listed=accept_listed):
    """accept_listed, given what accept is: each distribution lists its V - 1 tokens, the likeliest first."""
    noise = noise[:, 1:]
    p, ids = p.topk(V - 1)
    q, q_ids = (None, None) if q is None else q.topk(V - 1)
    return accept_listed(p, ids, q, q_ids, proposed, coins, noise)


@pytest.mark.parametrize("function", [accept, accept_lists])
@pytest.mark.parametrize("deterministic", [False, True])
def test_accept_gives_the_targets_distribution(deterministic, function):
    values = p_values(function, deterministic)
    assert min(values) > 0.01, values


BUGS = [
    ("accept", "rest = (p - q).clamp_min(0)", "rest = p", False),
    ("accept", "rest = (p - q).clamp_min(0)", "rest = p", True),
    ("accept", "count_kept(coins * q.", "count_kept(0.9 * coins * q.", False),
    ("accept", "count_kept(coins * q.", "count_kept(0.95 * coins * q.", True),
    ("accept", "torch.where(kept, k, torch.arange(k, device=kept.device)).amin", "kept.sum", False),
    ("accept", "at(q, count)", "at(q, 0 * count)", False),
    ("accept", "at(q, count)", "at(q, 0 * count)", True),
    ("accept_listed", "coins * q_token < p_token", "0.9 * coins * q_token < p_token", False),
    ("accept_listed", "coins * q_token < p_token", "0.95 * coins * q_token < p_token", True),
    ("accept_listed", "at(q_ids, count)", "at(q_ids, 0 * count)", False),
    ("accept_listed", "at(q_ids, count)", "at(q_ids, 0 * count)", True),
    ("accept_listed", "torch.where(same, at(q, count)[:, None], 0).sum(-1)", "0 * noise", False),
    ("accept_listed", "torch.where(same, at(q, count)[:, None], 0).sum(-1)", "0 * noise", True),
]


@pytest.mark.parametrize("function, right, wrong, deterministic", BUGS, ids=[f"{f}-{w}-{d}" for f, _, w, d in BUGS])
def test_the_test_of_accept_notices_a_bug(function, right, wrong, deterministic):
    functions = (getattr(speculative, function), speculative.count_kept, speculative.draw_rest)
    source = "\n".join(map(inspect.getsource, functions))
    assert source.count(right) == 1
    names = dict(vars(speculative))
    exec(source.replace(right, wrong), names)
    lists = functools.partial(accept_lists, accept_listed=names["accept_listed"])
    assert min(p_values(names["accept"] if function == "accept" else lists, deterministic)) < 1e-6


def test_accept_row_by_row():
    """What is certain: equal distributions keep all, disjoint ones nothing, whatever the coins say."""
    a, b = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])
    p = torch.stack([torch.stack([a, a, a]), torch.stack([a, a, b]), torch.stack([b, a, a])])
    q = torch.stack([torch.stack([a, a]), torch.stack([a, b]), torch.stack([a, a])])
    proposed = torch.tensor([[0, 1], [1, 2], [0, 0]])
    for coin in (0.0, 0.5, 1 - 2**-24):
        out = accept(p, q, proposed, torch.full((3, 2), coin)).tolist()
        assert out[0][:2] == [0, 1] and out[0][2] in (0, 1)
        assert out[1][0] == 1 and out[1][1] in (0, 1) and out[1][2] == -1
        assert out[2][0] in (2, 3) and out[2][1:] == [-1, -1]


def test_accept_with_a_smaller_vocabulary_and_in_bfloat16():
    p, q = distributions(False)
    p[:, 7:] += 0.2
    p, q = p / p.sum(-1, keepdim=True), q[:, :7] / q[:, :7].sum(-1, keepdim=True)
    proposed = q[:, None].expand(2, 50_000, 7).reshape(-1, 7).multinomial(1).view(2, -1).T
    torch.manual_seed(0)
    out = accept(p.expand(50_000, 3, V), q.expand(50_000, 2, 7), proposed)
    assert p_value(torch.bincount(out[:, 0], minlength=V), p[0]) > 0.01
    low = accept(p.bfloat16().expand(9, 3, V), q.bfloat16().expand(9, 2, 7), proposed[:9])
    assert low.dtype == torch.int64


def test_lists_of_few_tokens_decide_as_distributions_do():
    torch.manual_seed(0)
    logits, draft_logits, k = torch.randn(50, 4, 97), torch.randn(50, 3, 80), 3
    sampler = Sampler(0.8, top_k=5, top_p=0.9)
    drawn = [sampler.draw(row, None) for row in draft_logits.unbind(1)]
    proposed = torch.cat([token for token, _ in drawn], 1)
    q, q_ids = (torch.stack(part, 1) for part in zip(*(parts for _, parts in drawn), strict=True))
    for vocab, n in ((80, 5), (3, 3)):
        assert sampler.parts(vocab) == [(n, torch.float32), (n, torch.int64)]
    assert Sampler(0.8).parts(80) == [(80, torch.float32)] and Sampler().parts(80) == []
    dense = draft_logits.new_zeros(50, k, 80).scatter(-1, q_ids, q)
    expected = sampling.probabilities(draft_logits.flatten(0, 1), 0.8, 5, 0.9).view(50, k, 80)
    torch.testing.assert_close(dense, expected)
    p, ids = sampling.filtered(logits.flatten(0, 1), 0.8, 5, 0.9, None)
    p, ids = sampling.normalized(p).view(50, 4, 5), ids.view(50, 4, 5)
    target = torch.zeros(50, 4, 97).scatter(-1, ids, p)
    coins = torch.rand(50, k)
    for given in ((q, q_ids), (None, None)):
        lists = accept_listed(p, ids, *given, proposed, coins, torch.empty(50, 5).exponential_())
        plain = accept(target, None if given[0] is None else dense, proposed, coins)
        assert torch.equal(lists < 0, plain < 0)  # as many are kept
        kept = F.pad(lists[:, 1:] >= 0, (0, 1))  # all but the last, which is drawn
        assert torch.equal(lists[kept], plain[kept]) and len(lists.unique(dim=0)) > 10
        last = (lists >= 0).sum(1) - 1
        token = lists[torch.arange(50), last]
        assert (target[torch.arange(50), last, token] > 0).all()  # what is drawn is a token that the target can draw


def test_accept_greedy():
    target = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    proposed = torch.tensor([[1, 2, 3], [9, 2, 3], [1, 9, 3], [1, 2, 9]])
    expected = [[1, 2, 3, 4], [1, -1, -1, -1], [1, 2, -1, -1], [1, 2, 3, -1]]
    assert accept_greedy(target, proposed).tolist() == expected


# ----------------------------------------------------------------------------------------------------------- lookup
def plain_lookup(history: list[int], k: int, longest: int, shortest: int) -> list[int] | None:
    """The same, the obvious way."""
    n = len(history)
    for length in range(min(longest, n - 1), shortest - 1, -1):
        for end in range(n - 2, length - 2, -1):
            if history[end - length + 1 : end + 1] == history[n - length :]:
                said = list(history)
                for i in range(k):
                    said.append(said[end + 1 + i])
                return said[n:]
    return None


def test_lookup_equals_the_obvious_search():
    rng = random.Random(0)
    found = 0
    for _ in range(2000):
        history = rng.choices(range(rng.randint(1, 6)), k=rng.randint(1, 40))
        k, longest = rng.randint(1, 8), rng.randint(1, 6)
        shortest = rng.randint(1, longest)
        expected = plain_lookup(history, k, longest, shortest)
        assert propose_lookup(torch.tensor(history), k, longest, shortest) == expected, history
        found += expected is not None
    assert 500 < found < 1950


# ---------------------------------------------------------------------------------------- greedy: the same tokens
@pytest.mark.parametrize("changes", [{}, dict(sliding_window=8), dict(n_experts=4, n_experts_per_token=2)], ids=str)
@pytest.mark.parametrize("amount", [0.0, 0.05, 3.0])
def test_greedy_equals_plain_at_every_depth(tiny, changes, amount):
    model = tiny(**changes)
    draft = perturbed(model, tiny, amount, **changes)
    prompts = [tokens(n, seed=n) for n in (7, 1, 40)]
    plain = [columns(generate(model, p, 30)) for p in (prompts[:1], prompts)]
    kept = 0
    for k in DEPTHS:
        how = speculation(k, draft)
        for batch, expected in zip((prompts[:1], prompts), plain, strict=True):
            assert torch.equal(columns(generate(model, batch, 30, Sampler(), speculation=how)), expected), k
        kept += how.statistics.summary()["acceptance"]
    assert kept > 7.9 if amount == 0 else kept < 7.9  # the draft is as good as it was made


def test_greedy_lookup_equals_plain_at_every_depth(tiny):
    model = tiny(vocab_size=7)  # so few words that the same ones follow each other again
    cycle = tokens(6, seed=1, vocab=7) * 4
    prompts = [cycle, tokens(30, seed=2, vocab=7), cycle[3:]]
    plain = [columns(generate(model, p, 40)) for p in (prompts[:1], prompts)]
    for k in DEPTHS:
        how = speculation(k)
        for batch, expected in zip((prompts[:1], prompts), plain, strict=True):
            assert torch.equal(columns(generate(model, batch, 40, Sampler(), speculation=how)), expected), k
        assert 0 < how.statistics.summary()["acceptance"] <= 1


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_position_by_position(tiny, penalty):
    model = tiny()
    draft = perturbed(model, tiny, 0.05)
    prompts = [tokens(n, seed=n) for n in (9, 4)]
    expected = columns(generate(model, prompts, 40, Sampler(repetition_penalty=penalty)))
    assert not torch.equal(expected, columns(generate(model, prompts, 40)))
    for k, proposer in product((1, 4), (draft, None)):
        how, sampler = speculation(k, proposer), Sampler(repetition_penalty=penalty)
        for _ in range(2):  # the second begins afresh
            assert torch.equal(columns(generate(model, prompts, 40, sampler, speculation=how)), expected)


@pytest.mark.parametrize("draft_vocab, target_vocab", [(97, 64), (64, 97)])
def test_vocabularies_of_different_sizes(tiny, draft_vocab, target_vocab):
    model, draft = tiny(vocab_size=target_vocab), tiny(vocab_size=draft_vocab)
    prompts = [tokens(9, seed=1, vocab=target_vocab), tokens(4, seed=2, vocab=target_vocab)]
    expected = columns(generate(model, prompts, 30))
    how = speculation(3, draft)
    assert torch.equal(columns(generate(model, prompts, 30, Sampler(), speculation=how)), expected)
    for sampler in (Sampler(1.0, top_k=5), Sampler(0.7, repetition_penalty=1.2)):
        out = columns(generate(model, prompts, 30, sampler, speculation=how))
        assert out.shape == (2, 30) and 0 <= out.min() and out.max() < target_vocab


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("amount", [0.0, 0.05, None], ids=["itself", "draft", "lookup"])
def test_stop_ids_inside_accepted_runs(tiny, amount, k):
    small = dict(vocab_size=11)  # so few words that a lookup finds the stop, too
    model = tiny(**small)
    how = speculation(k, None if amount is None else perturbed(model, tiny, amount, **small))
    prompts = [tokens(5, seed=1, vocab=11), tokens(5, seed=2, vocab=11) * 2, tokens(3, seed=3, vocab=11)]
    inside = 0
    for stop in range(11):
        sampler, expected = Steps(), columns(generate(model, prompts, 24, stop_ids=[stop]))
        out = columns(generate(model, prompts, 24, sampler, stop_ids=[stop], speculation=how))
        assert torch.equal(out, expected), stop
        inside += sampler.stopped_inside(out, [stop])
    assert inside > (0 if amount is None else 3), inside


def test_stop_strings_and_reasons_inside_accepted_runs(bundled):
    """Each stop with one k of each proposer, in turn; the text repeats itself, so that a lookup has long runs, too."""
    tokenizer, model, drafts = bundled
    ids = tokenizer.encode("self.x = x\nself.y = y\nself.")
    proposers, met = ("draft", "int8", "lookup"), set()
    whole = complete(lambda: generate(model, [ids], 40), tokenizer, ids, (), (), lambda text: None)["text"]
    for i, at in enumerate(range(4, len(whole) - 12, 9)):
        results = []
        for name in (None, *proposers):
            k = (1, 4, 8)[(i + proposers.index(name)) % 3] if name else None
            more = dict(sample=Sampler(), speculation=speculation(k, drafts[name])) if name else {}
            generation = lambda more=more: generate(model, [ids], 40, **more)  # noqa: E731
            results.append(complete(generation, tokenizer, ids, (), [whole[at : at + 3]], lambda text: None))
            met.add((name, k))
        plain, *ours = ({k: r[k] for k in ("tokens", "text", "finish_reason")} for r in results)
        assert plain["finish_reason"] == "stop" and all(o == plain for o in ours), at
    assert met > set(product(proposers, (1, 4, 8)))


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_as_many_tokens_as_asked_for(tiny, n):
    model, prompts = tiny(), [tokens(5, seed=1), tokens(9, seed=2)]
    how = speculation(8, tiny())
    expected = columns(generate(model, prompts, n))
    assert torch.equal(columns(generate(model, prompts, n, Sampler(), speculation=how)), expected)


def test_a_row_far_ahead_of_another_stays_in_the_cache(tiny):
    """One row keeps every proposal, the other none: what the first goes on to do after its end harms nobody."""

    class Partial(Sampler):
        def verify(self, logits, *more):
            out = super().verify(logits, *more)
            out[1, 1:] = -1
            return out

    model, prompts = tiny(), [tokens(9, seed=2), tokens(5, seed=1)]
    expected = columns(generate(model, prompts, 150))
    how = speculation(8, tiny())
    assert torch.equal(columns(generate(model, prompts, 150, Partial(), speculation=how)), expected)
    assert how.statistics.steps == 149
    limit = len(prompts[0]) + 150
    assert int(how.buffers[2].pos.max()) < limit and model.max_seq_len == limit + 8


def test_the_whole_context_can_be_used(tiny):
    model, draft = tiny(max_seq_len=64), tiny(max_seq_len=64)
    prompt = tokens(40)
    expected = columns(generate(tiny(max_seq_len=64), [prompt], 24))
    for _ in range(2):
        out = columns(generate(model, [prompt], 24, Sampler(), speculation=speculation(8, draft)))
        assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="context of 64"):
        next(generate(model, [prompt], 25, Sampler(), speculation=speculation(8, draft)))


@pytest.mark.parametrize("k", [1, 4, 8])
def test_greedy_equals_plain_with_an_fp8_cache(tiny, k):
    """Proposals that are rejected leave their keys and scales behind; what is written over them is all that is read."""
    model, plain, draft = tiny(), tiny(), perturbed(tiny(), tiny, 0.05)
    plain.setup_caches(3, 100, "fp8")
    prompts = [tokens(n, seed=n) for n in (7, 1, 40)]
    for how in (speculation(k, draft), speculation(k)):
        model.setup_caches(3, 100, "fp8")
        how.setup_caches(3, 100, "fp8")
        for batch in (prompts[:1], prompts):
            out = columns(generate(model, batch, 30, Sampler(), speculation=how))
            assert torch.equal(out, columns(generate(plain, batch, 30)))
    assert draft.layers[0].attention.cache.k.dtype == torch.float8_e4m3fn


def test_columns_are_as_generates(tiny):
    how = speculation(4, tiny())
    kept = list(generate(tiny(), [tokens(4), tokens(6)], 9, Sampler(), speculation=how))
    assert all(c.dtype == torch.int64 and c.shape == (2,) and c.device.type == "cpu" for c in kept)
    assert len({c.data_ptr() for c in kept}) == 9


def test_chat_turns_reuse_both_caches(tiny):
    model, draft = tiny(), perturbed(tiny(), tiny, 0.05)
    model.setup_caches(1, 900)
    fed = []

    def counting_fill(model, rows, start=0):
        fed.append([len(r) - start for r in rows])
        return fill(model, rows, start)

    how = Speculation(counting_fill, graph_slots, 4, draft)
    how.setup_caches(1, 900)
    ids, start = tokens(40), 0
    for turn in range(6):
        expected = columns(generate(tiny(), [ids], 20))
        stop_after = 20 - 3 * turn  # the reader leaves in the middle, as a stop string makes it
        out = []
        for column in generate(model, [ids], 20, Sampler(), start=start, speculation=how):
            out.append(column)
            if len(out) == stop_after:
                break
        assert torch.equal(columns(out), expected[:, :stop_after]), turn
        start = len(ids) + stop_after - 1
        ids = ids + columns(out)[0].tolist() + tokens(5 + 9 * turn, seed=turn)
    assert len(fed) == 6 and all(n < 80 for (n,) in fed[1:])  # only what is new


def test_a_compiled_draft_reads_the_prompt_by_graphs_of_its_own(tiny, monkeypatch):
    """On a GPU compile_prefill makes graphs; an eager pass of 32 layers takes as long as ten steps."""
    model, draft, read = tiny(), tiny(), []

    def compile_prefill(which):
        return lambda model, *args: read.append((which, model)) or program.prefill(model, *args)

    monkeypatch.setattr(program, "compile_prefill", compile_prefill)
    how = program.make_speculation(2, draft, compile=True)
    how.draft_step, how.verify_step = speculative.draft_one_token, speculative.verify_proposal
    how.setup_caches(1, 40)
    ours = columns(generate(model, [tokens(9)], 12, Sampler(), speculation=how))
    assert torch.equal(ours, columns(generate(tiny(), [tokens(9)], 12)))
    assert len(read) == 1 and read[0][0] is read[0][1] is draft


def test_a_cache_made_anew_is_filled_anew(tiny):
    model, how = tiny(), speculation(4, tiny())
    for length in (10, 200, 700, 5):
        prompt = tokens(length, seed=length)
        expected = columns(generate(tiny(), [prompt], 20))
        assert torch.equal(columns(generate(model, [prompt], 20, Sampler(), speculation=how)), expected)
        assert how.statistics.summary()["acceptance"] == 1  # the draft, its own target, is never lost


# -------------------------------------------------------------------------------------------------- every family
def family_names():
    pytest.importorskip("transformers")
    from test_families import CASES

    return list(CASES)


def family_runs(i: int) -> list[tuple[str, int, int]]:
    """(proposer, k, batch) of the i-th family: each proposer once, with all k and both batches over the families."""
    names = ("draft", "int4" if i % 3 == 1 else "int8", "lookup")
    return [(name, 1 + (i + 3 * n) % 8, (1, 3)[(i // 8 + n) % 2]) for n, name in enumerate(names)]


def test_the_families_see_every_depth_and_batch():
    runs = {run for i in range(len(family_names())) for run in family_runs(i)}
    assert runs >= set(product(("draft", "lookup"), DEPTHS, (1, 3)))
    assert {run[1:] for run in runs if run[0] in ("int8", "int4")} == set(product(DEPTHS, (1, 3)))


@pytest.mark.parametrize("i, name", list(enumerate(family_names())), ids=family_names())
def test_every_family(i, name, tmp_path):
    """A family's tiny model with a draft near to it, its own weights quantized, and lookup."""
    from test_families import hf_model

    hf_model(name).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    cycle = tokens(5, vocab=96) * 4
    prompts = [cycle, tokens(33, seed=1, vocab=96), cycle[:7]]
    expected = columns(generate(model, prompts, 24))
    for proposer, k, batch in family_runs(i):
        draft = None
        if proposer != "lookup":
            skip = ["down"] if proposer == "int4" else []  # 80 columns are no multiple of its groups
            quant = None if proposer == "draft" else make_recipe(proposer, skip=skip)
            draft = load_model(tmp_path, dtype=torch.float32, quant=quant)
        how = speculation(k, noisy(draft, 0.02) if proposer == "draft" else draft)
        out = columns(generate(model, prompts[:batch], 24, Sampler(), speculation=how))
        assert torch.equal(out, expected[:batch]), (proposer, k, batch)
        if proposer == "int8":
            assert how.statistics.summary()["acceptance"] > 0.3


# ------------------------------------------------------------------------------------------------ the bundled pair
def heldout_prompts(tokenizer, n: int) -> list[list[int]]:
    """n prompts of the held-out text, of different lengths: from 1 to 73 tokens, most of them short."""
    rng, text = random.Random(0), (DEMO / "heldout.txt").read_text()
    starts = [rng.randrange(len(text) - 2000) for _ in range(n)]
    lengths = [1 + x * (x + 20) // 66 for x in (37 * i % 61 for i in range(n))]
    return [tokenizer.encode(text[s : s + 500])[:length] for s, length in zip(starts, lengths, strict=True)]


def test_bundled_pair_on_200_prompts(bundled):
    """Each prompt with the draft, a self-draft and lookup, in threes or alone; of three texts two meet a stop."""
    tokenizer, model, drafts = bundled
    prompts = heldout_prompts(tokenizer, 200)
    groups = [prompts[i : i + 3] for i in range(0, 180, 3)] + [[p] for p in prompts[180:]]
    hows = {(name, k): speculation(k, draft) for name, draft in drafts.items() for k in DEPTHS}
    covered, inside, rates = set(), dict.fromkeys(PROPOSERS, 0), {name: [] for name in PROPOSERS}
    for i, batch in enumerate(groups):
        k, own = 1 + i % 8, ("int8", "int4")[i // 8 % 2]
        new = k + 3  # the first token, a whole proposal, and another step
        free = columns(generate(model, batch, new))
        stops = tokenizer.stop_ids
        if i % 3:
            stops = [row[2 + (i + j) % max(1, new - 3)] for j, row in enumerate(free.tolist())]
        expected = until(free, stops)
        for name in ("draft", own, "lookup"):
            sampler = Steps()
            out = columns(generate(model, batch, new, sampler, stop_ids=stops, speculation=hows[name, k]))
            assert torch.equal(out, expected), (name, k, i)
            inside[name] += sampler.stopped_inside(out, stops)
            covered.add((name, k, len(batch)))
            rates[name].append(hows[name, k].statistics.summary()["acceptance"])
    assert covered == set(product(PROPOSERS, DEPTHS, (1, 3)))
    assert min(inside.values()) > 0, inside
    rates = {name: sum(filter(None, r)) / len(r) for name, r in rates.items()}
    assert rates["int8"] > 0.9 and rates["int4"] > 0.6 and rates["draft"] > 0.35 and rates["lookup"] > 0.1, rates


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: steps as graphs; eager ones were tested")
@pytest.mark.parametrize("proposer, k, batch", [("draft", 1, 3), ("draft", 4, 1), ("draft", 8, 3), ("lookup", 4, 3)])
def test_graphs_give_the_tokens_of_eager_steps(proposer, k, batch, device="cuda"):
    """Compiled, captured and a step ahead of what is read: greedy, in float32, twice over the same graphs."""
    model = load_model(DEMO, device, torch.float32)
    draft = load_model(DEMO / "draft", device, torch.float32) if proposer == "draft" else None
    prompts = heldout_prompts(Tokenizer(DEMO), 5)[-batch:]
    model.setup_caches(batch, 200)
    expected = columns(generate(model, prompts, 60))
    decode, how = compile_decode(model), Speculation(fill, graph_slots, k, draft, compile_step)
    sampler = Sampler()  # another would be captured with graphs of its own
    assert torch.equal(columns(generate(model, prompts, 60, sampler, decode=decode)), expected)
    for _ in range(2):
        out = columns(generate(model, prompts, 60, sampler, decode=decode, speculation=how))
        assert torch.equal(out, expected)
        assert how.statistics.summary()["acceptance"] > 0
    assert len(how.graphs) == (0 if device == "cpu" else 2 if draft else 1)


SETTINGS = {
    "top_k": dict(temperature=1.2, top_k=3),
    "top_p": dict(temperature=1.0, top_p=0.7),
    "min_p": dict(temperature=1.2, min_p=0.1),
    "penalty": dict(temperature=0.5, repetition_penalty=1.1),
    "penalty, top_k": dict(temperature=1.2, top_k=3, repetition_penalty=1.3),
    "none": dict(temperature=0.7),
}


def likely_texts(model, prompt: list[int], n: int, least: float, repetition_penalty=1.0, **rule) -> dict:
    """Texts of n tokens that follow a prompt with a probability above `least`, computed from the target alone."""
    exact = {(): 1.0}
    for _ in range(n):
        texts = torch.tensor([prompt + list(stem) for stem in exact])
        logits = model(texts)[:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, texts, True)
        factor = torch.where(logits > 0, 1 / repetition_penalty, repetition_penalty)
        probs = sampling.probabilities(torch.where(seen, logits * factor, logits), **rule)
        exact = {(*stem, t): p * q for (stem, p), row in zip(exact.items(), probs.tolist(), strict=True)
                 for t, q in enumerate(row) if p * q > least}  # fmt: skip
    return exact


@pytest.mark.parametrize(
    "proposer, setting",
    [("draft", "top_k"), ("lookup", "top_k"), ("int8", "top_k"), ("draft", "top_p"), ("draft", "min_p"),
     ("draft", "penalty"), ("lookup", "penalty, top_k"), ("lookup", "none")],
)  # fmt: skip
@torch.no_grad()
def test_three_sampled_tokens_have_the_targets_distribution(bundled, proposer, setting):
    """The joint distribution of the first three tokens; texts too rare to be counted are one class."""
    tokenizer, model, drafts = bundled
    prompt, rows = tokenizer.encode("self.x = x\nself.y = y\nself."), 300
    draws = 900 if "top_k" in setting else 600  # a number for each token of the vocabulary takes longer than a list
    exact = likely_texts(model, prompt, 3, 6 / draws, **SETTINGS[setting])
    torch.manual_seed(0)
    how, counts = speculation(2, drafts[proposer]), dict.fromkeys(exact, 0)
    for start in (0, *[len(prompt) - 1] * (draws // rows - 1)):  # the prompts are read once
        sampler = Sampler(**SETTINGS[setting])
        for row in columns(generate(model, [prompt] * rows, 3, sampler, start=start, speculation=how)).tolist():
            if tuple(row) in counts:
                counts[tuple(row)] += 1
    observed = torch.tensor([*counts.values(), draws - sum(counts.values())])
    expected = torch.tensor([*exact.values(), 1 - sum(exact.values())])
    assert 0.1 < how.statistics.summary()["acceptance"] < 0.99
    assert len(exact) > 8 and p_value(observed, expected) > 0.01


def test_seeds_are_repeatable(tiny):
    model, runs = tiny(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        how = speculation(3, perturbed(model, tiny, 0.05))
        runs.append(columns(generate(model, [tokens(5)], 40, Sampler(1.0, top_p=0.9), speculation=how)))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# --------------------------------------------------------------------------------------------------------- compiled
def test_compiled_equals_eager_without_recompilation(tiny):
    """Every length of context, matches and none, proposals kept and not, without a program more than after warm-up."""
    torch._dynamo.reset()
    small = dict(n_layers=1, vocab_size=17)
    model, sampler = tiny(**small), Sampler(repetition_penalty=1.2)
    hows = [speculation(3, perturbed(model, tiny, 0.05, **small), compile=compile_step), speculation(3)]
    hows[1].verify_step = hows[0].verify_step
    decode = compile_decode(model)
    model.setup_caches(1, 600)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for how in hows:
            how.setup_caches(1, 600)
            for _ in how.every_depth():
                more = dict(sample=sampler, decode=decode, speculation=how)
                warm_up(model, lambda p, n, more=more, **kw: generate(model, p, n, **more, **kw), 590)
            assert how.forced is None
        torch._dynamo.config.error_on_recompile = True
        for how, length in product(hows, (10, 500, 1, 64)):
            prompt = (tokens(12, seed=length, vocab=17) * 50)[:length]
            expected = columns(generate(tiny(**small), [prompt], 70, Sampler(repetition_penalty=1.2)))
            out = generate(model, [prompt], 70, sampler, decode=decode, speculation=how)
            assert torch.equal(columns(out), expected), length
            assert 0 < how.statistics.summary()["acceptance"] < 1
        with pytest.raises(Exception, match="(?i)recompil"):
            columns(generate(model, [[1], [2]], 9, sampler, decode=decode, speculation=hows[0]))
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------- pace
def simulate(rate, cost, n: int, pace: Pace | None = None, seed=0, lacks=20) -> tuple[float, dict[int, int], Pace]:
    """Run a pace in a world where the i-th token is kept at rate(i) and a step takes cost(k): (time, steps by k, it).

    Time is in plain steps for each token.
    """
    rng, pace = random.Random(seed), pace or Pace()
    pace.begin()
    pace.guess(0.1)  # from the model's prefill
    done, took, steps, last = 0, 0.0, {}, 0
    while done < n:
        k = pace.choose(lacks=functools.partial(int, 0 if last else lacks), left=n - done)
        kept = next((i for i in range(k) if rng.random() >= rate(done)), k)
        caught, lacks = (lacks, 20) if k and not last else (0, lacks)  # by the draft, in a tenth of a plain step each
        seconds = cost(k) * rng.uniform(0.9, 1.1)
        pace.learn(k, seconds, kept + 1, [kept] if k else [], 0.1 * caught, caught)
        done, took, last = done + kept + 1, took + seconds + 0.1 * caught, k
        steps[k] = steps.get(k, 0) + 1
    return took / done, steps, pace


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("draft", [0.05, 0.3, 0.8])
def test_auto_never_loses_much(rate, draft):
    for n, seed in product((200, 1000, 5000), range(5)):
        took, _, _ = simulate(lambda i: rate, lambda k: 1 + draft * k if k else 1, n, seed=seed)
        assert took < 1 / 0.94, (n, seed)  # of which one hundredth is the simulation's own noise


def test_auto_uses_what_pays():
    took, steps, _ = simulate(lambda i: 0.95, lambda k: 1.1 + 0.05 * k if k else 1, 2000)
    assert took < 0.35 and max(steps, key=steps.get) == 7
    took, steps, _ = simulate(lambda i: 0.6, lambda k: 1 + 0.25 * k if k else 1, 2000)
    assert took < 0.97 and max(steps, key=steps.get) in (1, 2)
    _, steps, _ = simulate(lambda i: 0.1, lambda k: 1.5 + 0.25 * k if k else 1, 4000)
    assert steps[0] > 0.95 * sum(steps.values())


def test_auto_notices_that_the_text_has_changed():
    took, steps, pace = simulate(lambda i: 0.0 if i < 1500 else 0.9, lambda k: 1 + 0.1 * k if k else 1, 6000)
    assert took < 0.6
    took, steps, _ = simulate(lambda i: 0.0, lambda k: 1 + 0.1 * k if k else 1, 2000, pace)
    assert steps[0] > 0.9 * sum(steps.values()) and took < 1.05


def test_auto_asks_what_catching_up_costs():
    """A draft that would have to read a long prompt is not tried for a short text, and is once it has paid for one."""
    pace = Pace()
    pace.guess(0.1)
    for _ in range(100):
        assert pace.choose(lacks=lambda: 200, left=100) == 0  # 20 steps: more than may be lost
        pace.learn(0, 1.0, 1, [])
    pace.guess(0.01)
    steps = [k for k in (pace.choose(lacks=lambda: 200, left=100) for _ in range(4)) if k or pace.learn(0, 1.0, 1, [])]
    assert steps
    for i in range(30):
        pace.learn(4, 1.5, 5, [4], 2.0 if i == 0 else 0.0, 200 if i == 0 else 0)
    pace.trial, pace.plain_steps, pace.slack = 0, 4, 0.0
    assert pace.choose(lacks=lambda: 200, left=200) == 4 and pace.trial  # 3.5 steps, for 200 tokens 3.3 times as fast
    pace.trial, pace.plain_steps = 0, 4
    assert pace.choose(lacks=lambda: 200, left=100) == 0 and pace.choose(lacks=lambda: 200, left=2) == 0


def test_auto_outlives_a_bad_text():
    """What paid for one text is risked on another, of a long prompt, within bounds; and is used again on a third."""
    _, _, pace = simulate(lambda i: 0.9, lambda k: 1 + 0.1 * k if k else 1, 400)
    took, steps, pace = simulate(lambda i: 0.0, lambda k: 1 + 0.1 * k if k else 1, 1500, pace, lacks=4000)
    assert took < 1 / 0.95
    took, steps, pace = simulate(lambda i: 0.9, lambda k: 1 + 0.1 * k if k else 1, 3000, pace)
    assert took < 0.8


def test_auto_measures_what_catching_up_costs(tiny):
    model, draft = tiny(), tiny()
    how = speculation("auto", draft)
    columns(generate(model, [tokens(50)], 2, Sampler(), speculation=how))  # too few to try anything
    assert 0 < how.pace.rate < 1 and how.pace.guessed  # by the model's own prefill
    how.pace.choose = lambda lacks, left: asked.append(lacks()) or 2
    asked = []
    columns(generate(model, [tokens(50)], 12, Sampler(), speculation=how))
    assert asked[0] == 49 and asked[1] == 0 and not how.pace.guessed


def test_auto_survives_a_hiccup():
    hiccup = iter([50.0])
    _, steps, _ = simulate(lambda i: 0.9, lambda k: (next(hiccup, 0) if k else 0) + (1 + 0.1 * k if k else 1), 1500)
    assert steps[0] < 0.5 * sum(steps.values())


def test_auto_is_still_exact(tiny):
    model, how = tiny(), speculation("auto", perturbed(tiny(), tiny, 0.05))
    for lengths in ((7,), (7, 1, 40)):
        prompts = [tokens(n, seed=n) for n in lengths]
        expected = columns(generate(model, prompts, 150))
        assert torch.equal(columns(generate(model, prompts, 150, Sampler(), speculation=how)), expected)
    script = iter([0, 4, 1, 0, 0, 7, 7, 2, 0, 1] * 20)  # whatever it decides, also from one step to the next
    how.pace.choose = lambda lacks, left: next(script)
    assert torch.equal(columns(generate(model, prompts, 60, Sampler(), speculation=how)), expected[:, :60])


def test_statistics(tiny):
    model, how = tiny(), speculation(4, tiny())
    columns(generate(model, [tokens(5)], 21, Sampler(), speculation=how))
    summary = how.statistics.summary()
    assert summary["steps"] == 4 and summary["tokens_per_step"] == 5  # the first token is the prefill's
    assert summary["acceptance"] == 1 and summary["acceptance_by_position"] == [1.0] * 4
    assert 0 < summary["draft_share_of_time"] < 1 and summary["plain_share_of_time"] == 0
    assert 0 < how.statistics.catching_up < how.statistics.seconds["draft"]
    columns(generate(model, [tokens(5)], 1, Sampler(), speculation=how))
    assert how.statistics.summary()["tokens_per_step"] is None
    how = speculation(3, perturbed(tiny(), tiny, 0.05))
    n = columns(generate(model, [tokens(5), tokens(9)], 30, Sampler(), speculation=how)).numel()
    assert how.statistics.tokens == n - 2
    by_position = how.statistics.summary()["acceptance_by_position"]
    assert sorted(by_position, reverse=True) == by_position and 0 < by_position[0] < 1


# --------------------------------------------------------------------------------------------------------- benchmark
def test_simulated_acceptance_is_what_was_asked_for(tiny):
    sampler = benchmark_speculation.CoinSampler(0.8, 0.0, None)
    how = speculation(4, tiny(seed=1))  # agrees on nothing
    columns(generate(tiny(), [tokens(5, seed=i) for i in range(8)], 200, sampler, speculation=how))
    assert 0.77 < how.statistics.summary()["acceptance"] < 0.83


def test_benchmark_tells_simulated_rows(tiny):
    for acceptance in (0.9, None):
        figures = benchmark_speculation.measure_speculation(
            benchmark.measure, tiny(), tiny(), 3, acceptance, 5, 30, 1, 0.8, 10, False, 2
        )
        assert (figures["acceptance"] > 0.99) == (acceptance is None) and figures["tokens_per_step"] > 2
        parts = figures["verify_pass_ms"] + 3 * figures["draft_pass_ms"] + figures["other_ms"]
        assert parts == pytest.approx(figures["step_ms"], rel=0.5)
        row = {"kind": "speculation", "model": "m", "mode": "bf16", "draft": "d", "batch": 1, "device": "D",
               "commit": "c", "torch": "2", "date": "today", **figures}  # fmt: skip
        for text in (benchmark_speculation.speculation_lines(row), tables.speculation_table([row])):
            assert ("simulated" in text) == (acceptance is not None)


@pytest.mark.parametrize(
    "arguments",
    [["--speculate_k", "0"], ["--speculate_k", "16"], ["--simulate_acceptance", "0.5"],
     ["--simulate_acceptance", "1.5", "--draft", "int8"], ["--draft", "int8", "--new_tokens", "1"]],
    ids=" ".join,
)  # fmt: skip
def test_benchmark_refuses(arguments):
    with pytest.raises(ValueError, match=arguments[0]) if arguments[0] != "--draft" else pytest.raises(ValueError):
        benchmark.main(**vars(benchmark.parser().parse_args(arguments)))


# -------------------------------------------------------------------------------------------------- the command line
def run(monkeypatch, capsys, *argv) -> tuple[str, str]:
    """generate.py's main on a command line -> (stdout, stderr)."""
    program.main(**vars(program.parser().parse_args([str(a) for a in argv])))
    return capsys.readouterr()


GREEDY = ("--prompt", "def add(a, b):", "--max_new_tokens", "40", "--temperature", "0", "--dtype", "fp32", "--json")


@pytest.mark.parametrize(
    "how",
    [["--draft", "lookup"], ["--draft", "int8"], ["--draft", "int4", "--speculate_k", "8"],
     ["--draft_checkpoint_path", DEMO / "draft"], ["--draft_checkpoint_path", DEMO / "draft", "--draft", "int8"],
     ["--draft", "lookup", "--speculate_k", "auto", "--num_samples", "2"],
     ["--draft", "int8", "--quant", "int4"]],
    ids=lambda how: " ".join(map(str, how)).replace(str(DEMO), "demo"),
)  # fmt: skip
def test_command_line(how, monkeypatch, capsys):
    quant = ["--quant", "int4"] if "int4" in how and "--quant" in how else []
    plain = json.loads(run(monkeypatch, capsys, *GREEDY, *quant)[0].splitlines()[-1])
    assert "speculation" not in plain
    out, err = run(monkeypatch, capsys, *GREEDY, *how, "--compare")
    ours = json.loads(out.splitlines()[-1])
    for key in ("tokens", "text", "finish_reason", "prompt_tokens"):
        assert ours[key] == plain[key]
    assert out.startswith("def add(a, b):" + ours["text"])
    figures = ours["speculation"]
    assert figures["tokens_per_step"] >= 1 and figures["speedup"] > 0 and figures["plain_tok_s"] > 0
    assert "tokens with" in err and "times plain decoding" in err and "% accepted" in err
    shares = " ".join(f"{100 * share:.0f}" for share in figures["acceptance_by_position"])
    assert "(by position " in err and (f"(by position {shares})" in err or not shares)
    assert ours["bandwidth_gbs"] is None


def test_compare_changes_neither_sampling_nor_chat(monkeypatch, capsys):
    import io

    class Stdin(io.TextIOWrapper):
        def __init__(self):
            super().__init__(io.BytesIO(b"import os\ndef f(x):\nclass A:\n"))

    texts = []
    arguments = ["--interactive", "--seed", "1", "--max_new_tokens", "20", "--draft_checkpoint_path", DEMO / "draft"]
    for more in ([], ["--compare"]):
        monkeypatch.setattr(sys, "stdin", Stdin())
        texts.append(run(monkeypatch, capsys, *arguments, *more)[0])
    assert texts[0] == texts[1] and len(texts[0]) > 100


def test_self_draft_shares_what_is_not_quantized():
    model = load_model(DEMO)
    draft = drafts.load_draft(model, DEMO, None, "int8", None, None, 100)
    assert draft.tok_embeddings.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
    assert draft.norm.weight.data_ptr() == model.norm.weight.data_ptr()
    assert type(draft.output).__name__ == "Int8Linear" and type(model.output).__name__ != "Int8Linear"


@pytest.fixture
def other(tmp_path):
    """A copy of the bundled draft to change."""
    return Path(shutil.copytree(DEMO / "draft", tmp_path / "other"))


def refused(*argv) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(ValueError) as error:
        program.main(**vars(program.parser().parse_args([str(a) for a in argv])))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--draft", "lookup", "--speculate_k", "0"], ["--speculate_k 0", "from 1 to 15"]),
        (["--draft", "lookup", "--speculate_k", "-1"], ["--speculate_k -1"]),
        (["--draft", "lookup", "--speculate_k", "1000"], ["--speculate_k 1000", "auto"]),
        (["--draft", "lookup", "--speculate_k", "many"], ["--speculate_k many"]),
        (["--draft", "lookup", "--speculate_k", "2.5"], ["--speculate_k 2.5"]),
        (["--speculate_k", "4"], ["--speculate_k 4", "--draft"]),
        (["--compare"], ["--compare", "--draft"]),
        (["--draft", "lookup", "--draft_checkpoint_path", str(DEMO / "draft")], ["lookup", "leave out"]),
        (["--draft_checkpoint_path", "no/such/dir"], ["no/such/dir", "no such directory"]),
        (["--draft", "int8", "--quant", "int8"], ["--draft int8", "already"]),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else v,
)
def test_bad_arguments(arguments, words):
    line = refused(*arguments)
    for word in words:
        assert word in line, line


def test_speculation_refuses_k():
    for k in (0, -1, MAX_K + 1, 2.5, "many", None):
        with pytest.raises(ValueError, match=f"--speculate_k {k}: it must be auto, or a number from 1 to {MAX_K}"):
            speculation(k)


def test_a_draft_with_another_tokenizer(other):
    data = bytearray((other / "tokenizer.model").read_bytes())
    at = data.find("▁return".encode())
    data[at : at + len("▁return".encode())] = "▁nruter".encode()
    (other / "tokenizer.model").write_bytes(bytes(data))
    line = refused("--draft_checkpoint_path", other)
    assert "another tokenizer" in line and "nruter" in line
    assert Tokenizer(DEMO).difference(Tokenizer(DEMO / "draft")) is None


def test_a_draft_of_too_short_a_context(other):
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert "a context of 64 tokens, 2" in refused("--draft_checkpoint_path", other)
    program.main(**vars(program.parser().parse_args(["--draft_checkpoint_path", str(other), "--max_new_tokens", "20"])))


def test_no_memory_for_both(monkeypatch):
    monkeypatch.setattr(drafts, "free_memory", lambda device: 1_000_000)
    line = refused("--draft", "int8")
    assert "needs 0.0 GB" in line and "free" in line and "lookup" in line
    assert drafts.memory_of(load_model(DEMO).args, None, torch.bfloat16, 0) == pytest.approx(13.9e6, rel=0.02)
