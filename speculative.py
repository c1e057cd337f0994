"""Speculative decoding: propose k tokens cheaply, verify all in one pass of the target, keep what it would have drawn.

    python generate.py --compile --draft lookup --prompt "def add(a, b):" --compare
    python generate.py --compile --draft_checkpoint_path demo/draft --speculate_k auto

The output's distribution is exactly the target's, whatever proposes: a proposal only decides how many tokens a step
gives. Greedy decoding gives the same tokens as without. Caches roll back by position alone: keys and values beyond the
accepted tokens are overwritten before anything attends to them.

The file imports nothing of the repository. A model is a callable (tokens [B, T], input_pos [B, T], slots) -> logits
[B, T, V] with `features` and `logits`, its two halves; a sampler has `seen`, `parts`, `draw` and `verify` (see
sampling.Sampler). Shapes: B rows, k proposed tokens, T = k + 1 verified ones, V vocab.

Sources: speculative sampling (arXiv 2211.17192, 2302.01318); prompt lookup decoding (github.com/apoorvumang).
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_K = 15  # the kernels of few rows take up to 16 tokens in a verify pass
DEPTHS = (1, 2, 4, 7)  # what "auto" chooses from, beside 0; each is a program to compile
LONGEST_MATCH, SHORTEST_MATCH = 8, 2  # tokens that a prompt lookup compares


# ------------------------------------------------------------------------------------------------------- acceptance
def accept(
    target_probs: Tensor,
    draft_probs: Tensor | None,
    draft_tokens: Tensor,
    coins: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Which proposed tokens to keep, and the one after them -> int64 [B, k + 1]: n kept, one drawn, then -1.

    target_probs [B, k + 1, V]: the target's distribution at each proposed position and after the last. draft_probs
    [B, k, V'], V' <= V: what the tokens were drawn from; None: they were not drawn (a lookup, an argmax), which is
    all probability on them. draft_tokens int64 [B, k]. coins [B, k] uniform in [0, 1] and noise [B, V] exponential are
    the randomness; None draws them here.

    Token i is kept with probability min(1, p / q); the first that is not is replaced by a draw from max(p - q, 0), and
    after k kept ones comes a draw from p (algorithm 1 of arXiv 2211.17192). Each row keeps its own number. Float32.
    """
    k, V = draft_tokens.shape[1], target_probs.shape[-1]
    p, token = target_probs.float(), draft_tokens[..., None]
    if draft_probs is None:
        q = (token == torch.arange(V, device=token.device)).float()
    else:
        q = F.pad(draft_probs.float(), (0, V - draft_probs.shape[-1]))
    coins = torch.rand(draft_tokens.shape, device=token.device) if coins is None else coins
    noise = torch.empty_like(p[:, 0]).exponential_() if noise is None else noise
    count = count_kept(coins * q.gather(-1, token)[..., 0] < p[:, :k].gather(-1, token)[..., 0])
    return kept_and_next(draft_tokens, count, draw_rest(at(p, count), at(q, count), noise))


def accept_listed(
    p: Tensor, ids: Tensor, q: Tensor | None, q_ids: Tensor | None, draft_tokens: Tensor, coins: Tensor, noise: Tensor
) -> Tensor:
    """`accept` where distributions list the few tokens that they can draw, as after a top-k, each token once.

    p float32 and ids int64 [B, k + 1, n]: the target's. q and q_ids [B, k, n']: the draft's, or None as draft_probs.
    Tokens that the draft alone lists do not matter, since max(p - q, 0) is 0 for them. noise [B, n].
    """
    # Sums over all k + 1 positions, though nothing is proposed after the last, share a kernel with what computes p.
    token = F.pad(draft_tokens, (0, 1), value=-1)[..., None]
    p_token = (p * (ids == token)).sum(-1)[:, :-1]
    if q is None:
        q_token, q, q_ids = 1, torch.ones_like(token[:, 1:], dtype=p.dtype), draft_tokens[..., None]
    else:
        q_token = (q * (q_ids == token[:, :-1])).sum(-1)
    count = count_kept(coins * q_token < p_token)
    listed = at(ids, count)
    same = listed[..., None] == at(q_ids, count)[:, None]  # [B, n, n']
    drawn = draw_rest(at(p, count), torch.where(same, at(q, count)[:, None], 0).sum(-1), noise)
    return kept_and_next(draft_tokens, count, listed.gather(1, drawn))


def accept_greedy(target_tokens: Tensor, draft_tokens: Tensor) -> Tensor:
    """`accept` at temperature 0: target_tokens int64 [B, k + 1] are the target's argmaxes. No probabilities."""
    count = count_kept(target_tokens[:, :-1] == draft_tokens)
    return kept_and_next(draft_tokens, count, target_tokens.gather(1, count))


def count_kept(kept: Tensor) -> Tensor:
    """How many are true before the first that is not: bool [B, k] -> int64 [B, 1]."""
    k = kept.shape[1]
    return torch.where(kept, k, torch.arange(k, device=kept.device)).amin(1, keepdim=True)


def at(x: Tensor, position: Tensor) -> Tensor:
    """x [B, T, n] at position [B, 1] of each row -> [B, n]; zeros beyond the last."""
    T, n = x.shape[1:]
    row = x.gather(1, position[..., None].clamp(max=T - 1).expand(-1, 1, n))[:, 0]
    return torch.where(position < T, row, 0)


def draw_rest(p: Tensor, q: Tensor, noise: Tensor) -> Tensor:
    """Draw an index of each row with probability proportional to max(p - q, 0): [B, n] -> int64 [B, 1]."""
    rest = (p - q).clamp_min(0)
    # p and q alike but for rounding leave nothing, at odds of 1e-7; then p itself is the distribution.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    return (rest / noise.clamp_min(1e-20)).argmax(-1, keepdim=True)  # an exponential race, as in sampling.race


def kept_and_next(draft_tokens: Tensor, count: Tensor, following: Tensor) -> Tensor:
    """The first count [B, 1] of draft_tokens [B, k], then following [B, 1], then -1 -> [B, k + 1]."""
    position = torch.arange(draft_tokens.shape[1] + 1, device=draft_tokens.device)
    tokens = F.pad(draft_tokens, (0, 1))
    return torch.where(position < count, tokens, torch.where(position == count, following, -1))


# --------------------------------------------------------------------------------------------------------- proposals
def propose_lookup(
    history: Tensor, k: int, longest: int = LONGEST_MATCH, shortest: int = SHORTEST_MATCH
) -> list[int] | None:
    """What followed the last tokens of `history` the last time that they appeared in it -> k tokens, or None.

    history: int64 [n] on the CPU, prompt and output. The longest match counts, of `longest` down to `shortest`
    tokens, and of several the most recent. A match near the end goes on into the proposal itself, as a cycle does.
    """
    n = len(history)
    ends = (history[:-1] == history[-1]).nonzero()[:, 0]  # where the last token stood before
    length = 1
    while length < min(longest, n - 1) and len(ends):
        longer = ends[ends >= length]
        longer = longer[history[longer - length] == history[n - 1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    if not len(ends) or length < shortest:
        return None
    begin = int(ends[-1]) + 1
    period = n - begin
    following = history[begin : begin + k].tolist()
    return [following[i % period] for i in range(k)]


def draft_one_token(model, tokens, input_pos, slots, sampler, seen, vocab: int, noise: Tensor | None):
    """Feed tokens [B, T] to the draft -> (a token [B, 1] below `vocab`, what it was drawn from).

    The last is as the sampler's `draw` returns it. seen, the sampler's memory for the repetition penalty or None, and
    noise are what it takes.
    """
    tokens = tokens.clamp(max=model.args.vocab_size - 1)  # what a smaller draft does not know is another token to it
    logits = model.logits(model.features(tokens, input_pos, slots)[:, -1:])[:, -1, :vocab]
    return sampler.draw(logits, seen, noise)


def verify_proposal(model, tokens, pos, last, slots, sampler, probs, noise, out, state) -> None:
    """Run tokens [B, k + 1], the last one and k proposed, at pos [B, k + 1]; leave what is kept and where that ends.

    out, state: see Buffers; they are written in place, which a compiler makes part of the last kernels. last [B, 1]: as
    far as a row's position may go. probs: as `draft_one_token` returns them, of each proposed token.
    """
    new = sampler.verify(model(tokens, pos, slots), tokens[:, 1:], probs, noise)
    end = (new >= 0).sum(1, keepdim=True) - 1
    which = torch.arange(2, device=pos.device)
    two = torch.where(which == 0, tokens.gather(1, end), new.gather(1, end))
    out.copy_(new)
    state.copy_(torch.stack([two, torch.minimum(pos[:, :1] + end + which, last)]))


# ------------------------------------------------------------------------------------------------- how many to propose
class Statistics:
    """What the steps of one generation gave and took."""

    def __init__(self, k: int):
        self.steps = self.rows = self.tokens = 0  # rows: those still running, summed over the steps
        # By position, rows that proposed a token there; those of them that kept all before it; and that kept it, too.
        self.proposed, self.reached, self.kept = [0] * k, [0] * k, [0] * k
        self.seconds = {"draft": 0.0, "verify": 0.0, "plain": 0.0}
        self.catching_up = 0.0  # the part of the draft's seconds that is not of a step, but after the prompt

    def add(self, k: int, seconds: Sequence[float], rows: int, tokens: int, kept: Sequence[int]) -> None:
        """A step at k, seconds as Step.read returns them; rows that ran; tokens that they got, and kept of proposed."""
        self.steps, self.rows, self.tokens = self.steps + 1, self.rows + rows, self.tokens + tokens
        self.seconds["draft"] += seconds[1] + seconds[2]
        self.catching_up += seconds[1]
        self.seconds["verify" if k else "plain"] += seconds[0] + seconds[3]
        for n in kept:
            for j in range(k):
                self.proposed[j] += 1
                self.reached[j] += j <= n
                self.kept[j] += j < n

    def summary(self) -> dict:
        """The figures that a report shows; None where nothing was proposed.

        acceptance: of the proposed tokens whose turn came (all before them were kept), the share that was kept.
        kept_share: of all that were proposed. acceptance_by_position: that share, position by position.
        """
        proposed, reached, total = sum(self.proposed), sum(self.reached), sum(self.seconds.values())
        return {
            "steps": self.steps,
            "tokens_per_step": self.tokens / self.rows if self.rows else None,
            "acceptance": sum(self.kept) / reached if reached else None,
            "kept_share": sum(self.kept) / proposed if proposed else None,
            "acceptance_by_position": [a / b for a, b in zip(self.kept, self.proposed, strict=True) if b],
            "draft_share_of_time": self.seconds["draft"] / total if total else None,
            "plain_share_of_time": self.seconds["plain"] / total if total else None,
        }


class Pace:
    """Chooses how many tokens to propose, 0 included, from the acceptance and the costs it has seen.

    A step at k gives 1 + sum over j <= k of P(the first j are kept) tokens for cost(k) seconds; the best ratio wins.
    What speculation may lose against plain decoding is bounded: `slack`, in plain steps, starts at a few, grows by a
    two-hundredth each token and by what is gained, shrinks by what is lost, and nothing is tried whose worst case, no
    token kept, exceeds it. What was seen to pay may risk half of what it promises for the rest of the text, and so many
    steps as are a small part of that. So at least 95% of plain decoding's speed remain after some 200 tokens.
    """

    START, CAP, GROWTH, BOLD = 6.0, 10.0, 0.005, 0.03
    TRIAL = 3  # steps in a row when speculation begins: the draft has to catch up, which one step would not pay back
    WAIT = 16  # plain steps before the next trial, doubled each time that one is in vain
    MARGIN = 1.05  # measured costs are that uncertain: what promises less is not begun
    REFRESH = 64  # speculative steps before the cost of a plain one is measured again

    def __init__(self, depths: Sequence[int] = DEPTHS):
        self.depths, self.slack = depths, self.START
        self.plain_steps = self.steps = self.trial = 0  # of a kind in a row; what is left of a trial
        self.trial_k, self.doubt = 0, 1
        self.rate, self.guessed = math.inf, True  # seconds for each token that the draft catches up
        self.costs = {k: deque(maxlen=9) for k in (0, *depths)}  # seconds
        # By position: rows that kept all before it, and of these the rows that kept it too; the past fades.
        self.reached, self.kept = [0.0] * max(depths), [0.0] * max(depths)

    def cost(self, k: int) -> float:
        """Seconds of a step: the median of the latest, or a guess by the nearest depth that was measured."""
        if self.costs[k]:
            return statistics.median(self.costs[k]) if len(self.costs[k]) > 2 else min(self.costs[k])
        plain = self.cost(0)
        known = min((d for d in self.depths if self.costs[d]), key=lambda d: abs(d - k), default=None)
        return plain * (1 + 0.25 * k) if known is None else plain + (self.cost(known) - plain) * k / known

    def tokens(self) -> list[float]:
        """Tokens that a step is expected to give, at each k from 0 on."""
        total, all_kept, rate = [1.0], 1.0, 0.7
        for reached, kept in zip(self.reached, self.kept, strict=True):
            rate = (kept + rate) / (reached + 1)  # where little was seen, as at the position before
            all_kept *= rate
            total.append(total[-1] + all_kept)
        return total

    def begin(self) -> None:
        """Another text: nothing is under way, and a draft knows nothing of it."""
        self.trial = self.steps = 0
        self.plain_steps = max(4, self.plain_steps // 4 * 4)  # to be thought about at once

    def choose(self, lacks: Callable[[], int] = int, left: int = 1000) -> int:
        """The k of the next step. lacks(): tokens that the draft would have to catch up; left: to come at most."""
        if len(self.costs[0]) < 2 or self.steps >= self.REFRESH:
            return 0
        if self.trial:
            self.trial -= 1
            return self.trial_k
        if self.plain_steps % 4:  # to think takes time, too
            return 0
        plain, begins = self.cost(0), self.plain_steps > 0
        rate = self.rate if math.isfinite(self.rate) else 0.0  # where nobody knows, it has to be tried
        steps, entry = (self.TRIAL, lacks() * rate / plain) if begins else (1, 0.0)
        cost, tokens = {0: 1.0, **{k: self.cost(k) / plain for k in self.depths}}, self.tokens()
        # In plain steps: what is lost if no token is kept, and what is gained if all goes on as it was seen to go.
        risk = {k: steps * (cost[k] - 1) + entry for k in self.depths}
        gain = {k: left * (1 - cost[k] / tokens[k]) - entry for k in self.depths}
        seen = self.reached[0] >= 10
        safe = [k for k in self.depths if risk[k] <= self.slack]
        known = [k for k in self.depths if seen and len(self.costs[k]) >= self.TRIAL]
        paid = [k for k in known if risk[k] <= min(gain[k] / 2, self.BOLD * left)]
        best = max((0, *{*safe, *paid}), key=lambda k: tokens[k] / cost[k] * (1 if k else self.MARGIN))
        if best and begins and gain[best] <= 0:  # it would pay, but too little is left
            best = 0
        if best == 0 and safe and self.plain_steps >= self.WAIT * self.doubt:  # has the text changed?
            self.doubt = min(2 * self.doubt, 16)
            best = min(safe, key=lambda k: abs(k - 2))
        if best and begins:
            self.trial, self.trial_k = self.TRIAL - 1, best
        return best

    def guess(self, rate: float) -> None:
        """What catching up may take, before it was seen: the least of what is given, since first times are slow."""
        if self.guessed:
            self.rate = min(self.rate, rate)

    def learn(
        self, k: int, seconds: float, tokens: float, kept: Sequence[int], more: float = 0.0, caught: int = 0
    ) -> None:
        """A step at k gave so many tokens a row; rows that proposed kept so many of theirs.

        seconds: what such a step takes; more: what this one took to catch the draft up, by so many tokens.
        """
        if caught:  # of few tokens each takes longer, and that is not worth knowing
            self.rate, self.guessed = more / caught if self.guessed else min(1.25 * self.rate, more / caught), False
        expected = self.cost(k) if k and self.costs[0] else seconds
        self.costs[k].append(seconds)
        self.plain_steps, self.steps = (0, self.steps + 1) if k else (self.plain_steps + 1, 0)
        for n in kept:
            for j in range(min(n + 1, k)):
                self.reached[j] = 0.95 * self.reached[j] + 1
                self.kept[j] = 0.95 * self.kept[j] + (j < n)
            self.doubt = 1 if n else self.doubt
        # A hiccup of the machine is no loss of speculation's.
        took = (min(seconds, 3 * expected) + more) / self.cost(0) if k else tokens
        self.slack = max(0.0, min(self.slack + tokens - took + self.GROWTH * tokens, self.CAP))


# ------------------------------------------------------------------------------------------------------ the decode loop
class Buffers:
    """What the steps of B rows read and leave, at fixed addresses, so that captured graphs can be replayed."""

    def __init__(self, B: int, device: torch.device):
        self.last = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.state = torch.zeros(2, B, 2, dtype=torch.int64, device=device)  # the last two tokens, and their positions
        self.token, self.pos = self.state[..., 1:]
        self.steps = torch.arange(MAX_K + 1, device=device)
        self.tokens: dict[int, Tensor] = {}  # k -> int64 [B, k + 1]: the last token, and the proposed ones
        self.probs: dict[int, list[Tensor]] = {}  # k -> what they were drawn from, each [B, k, n]
        self.out: dict[int, Tensor] = {}  # k -> int64 [B, k + 1], as `accept` returns it

    def make(self, k: int, parts: Sequence[tuple[int, torch.dtype]]) -> None:
        """Room for k proposed tokens, and for their distributions of these parts."""
        B, device = len(self.token), self.token.device
        if k not in self.out or parts != [(t.shape[-1], t.dtype) for t in self.probs[k]]:
            self.tokens[k] = torch.zeros(B, k + 1, dtype=torch.int64, device=device)
            self.out[k] = torch.zeros(B, k + 1, dtype=torch.int64, device=device)
            self.probs[k] = [torch.zeros(B, k, n, dtype=dtype, device=device) for n, dtype in parts]


class Step:
    """A step that was launched: its k, its tokens on their way to the host, and when its parts began and ended."""

    def __init__(self, k: int, tokens: Tensor, real: Sequence[bool], marks: Sequence):
        self.k, self.tokens, self.real, self.marks = k, tokens.to("cpu", non_blocking=True), real, marks
        self.caught = 0  # tokens that the draft caught up before
        self.arrived = None if tokens.device.type == "cpu" else mark(tokens.device)

    def read(self) -> tuple[list[list[int]], list[float]]:
        """Wait for it -> (each row's tokens, -1 beyond those accepted; seconds between the marks).

        The seconds: before the step (on a CPU; a GPU does not wait for that), to catch up, to propose, and to verify or
        decode; of the prefill all in one.
        """
        if isinstance(self.arrived, torch.cuda.Event):
            self.arrived.synchronize()
        return self.tokens.tolist(), [elapsed(a, b) for a, b in zip(self.marks, self.marks[1:], strict=False)]


def elapsed(a, b) -> float:
    """Seconds from one mark to another."""
    return a.elapsed_time(b) / 1e3 if isinstance(a, torch.cuda.Event) else b - a


def mark(device: torch.device):
    """A point in time: on a GPU an event in its queue, else seconds."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


class Speculation:
    """How to speculate, and what outlives one generation: compiled steps and graphs, the draft's cache, the pace.

    fill(model, rows, start): run rows (lists of ids) into a model's cache from position `start` on.
    slots_for(model, n): the cache slots to attend to for n tokens. k: tokens to propose, 1 to MAX_K, or "auto".
    draft: a model, or None to look up in the text so far. compile(step, slots_at): a step compiled, `slots` being its
    argument number slots_at; on CUDA such steps are then captured. None: eager steps. agree(k): of a model sharded over
    ranks, whose clocks differ, the k that one of them has chosen.
    Raises ValueError for another k.
    """

    def __init__(
        self, fill: Callable, slots_for: Callable, k: int | str = 4, draft=None, compile: Callable | None = None,
        agree: Callable[[int], int] = int,
    ):  # fmt: skip
        if k != "auto" and not (isinstance(k, int) and 1 <= k <= MAX_K):
            raise ValueError(f"--speculate_k {k}: it must be auto, or a number from 1 to {MAX_K}")
        self.fill, self.slots_for, self.draft, self.agree = fill, slots_for, draft, agree
        self.pace = Pace() if k == "auto" else None
        self.depths = DEPTHS if k == "auto" else (k,)
        self.max_k = max(self.depths)
        self.forced: int | None = None  # a k that every step uses, match or not: for warming up
        self.draft_step = compile(draft_one_token, 3) if compile else draft_one_token
        self.verify_step = compile(verify_proposal, 4) if compile else verify_proposal
        self.graphed, self.graphs, self.buffers = compile is not None, {}, {}
        self.cached: list[int] = []  # how many leading tokens of each row the draft's cache holds
        self.statistics = Statistics(self.max_k)

    def setup_caches(self, batch_size: int, max_seq_len: int, kv_dtype: str | None = None) -> None:
        """Room for the draft's keys and values, as its own setup_caches; one that is made anew holds nothing."""
        if self.draft is not None:
            slots = self.draft.slots
            self.draft.setup_caches(batch_size, max_seq_len, kv_dtype)
            self.cached = self.cached if self.draft.slots is slots else []

    def run(self, key: tuple, work: Callable[[], None], kept: Sequence[Tensor]) -> None:
        """Do `work`, which reads and writes fixed memory; on CUDA by replaying a graph of it, captured at first.

        kept: what the work changes, to be put back after the warm-up that comes before a capture.
        """
        if not (self.graphed and kept[0].is_cuda):
            return work()
        if key not in self.graphs:
            before = [t.clone() for t in kept]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    work()
                    for t, b in zip(kept, before, strict=True):
                        t.copy_(b)
            torch.cuda.current_stream().wait_stream(side)
            self.graphs[key] = torch.cuda.CUDAGraph(), work  # the latter keeps alive what the key knows by its address
            with torch.cuda.graph(self.graphs[key][0]):
                work()
        self.graphs[key][0].replay()

    def every_depth(self) -> Iterator[int]:
        """Go through each k, 0 included, which every step then uses until the next: to warm up."""
        try:
            for k in (0, *self.depths):
                self.forced = k
                yield k
        finally:
            self.forced = None

    def choose(self, rows: Sequence[Sequence[int]], done: Sequence[bool], left: int) -> int:
        """The k of the next step after `rows`, where at most so many tokens are left to come."""
        if self.forced is not None:
            return self.forced
        return self.agree(self.pace.choose(lambda: self.lacks(rows, done), left)) if self.pace else self.max_k

    def lacks(self, rows: Sequence[Sequence[int]], done: Sequence[bool]) -> int:
        """How many tokens the draft has to catch up, of the row that lacks most; its next pass feeds the last two."""
        if self.draft is None:
            return 0
        return max([0, *(len(row) - 2 - c for c, row, d in zip(self.cached, rows, done, strict=True) if not d)])

    def propose(self, s: Buffers, k: int, slots: Tensor, sampler, vocab: int) -> None:
        """k tokens of the draft, one after another, into s.tokens[k], and what they were drawn from.

        The first pass feeds two tokens: when all of the last step's proposal was kept, the draft has not seen its end.
        """
        seen = None if sampler.seen is None else sampler.seen.clone()
        # What all passes need is made at once, since a kernel in each of them takes as long.
        (tokens, pos), noise, drawn, probs = s.state, [None] * k, [s.token], []
        later = s.pos + s.steps[:k, None, None]  # [k, B, 1]
        if s.probs[k]:
            noise = torch.empty(k, len(tokens), s.probs[k][0].shape[-1], device=tokens.device).exponential_()
        for i in range(k):
            pos = later[i] if i else pos
            tokens, q = self.draft_step(self.draft, tokens, pos, slots, sampler, seen, vocab, noise[i])
            drawn.append(tokens)
            probs.append(q)
        torch.cat(drawn, 1, out=s.tokens[k])
        for buffer, part in zip(s.probs[k], zip(*probs, strict=True), strict=True):
            torch.stack(part, 1, out=buffer)

    def catch_up(self, s: Buffers, rows: Sequence[Sequence[int]], done: Sequence[bool]) -> int:
        """After the prompt or plain steps: bring `s` and the draft's cache to the end of `rows` -> tokens it lacked."""
        s.state.copy_(torch.tensor([[row[-2:] for row in rows], [[len(row) - 2, len(row) - 1] for row in rows]]))
        if lacks := self.lacks(rows, done):
            known = self.draft.args.vocab_size - 1  # as in draft_one_token
            self.fill(self.draft, [[min(t, known) for t in row] for row in rows], min(self.cached))
            self.cached = [len(row) for row in rows]
        return lacks

    def expect(self, model, tokens: int, seconds: float) -> None:
        """The model's prefill of so many tokens took so long: a first guess of what it takes the draft to catch up."""
        if self.pace and self.pace.guessed and self.draft is not None:
            size = [sum(m.in_features * m.out_features for m in which.modules() if hasattr(m, "in_features"))
                    for which in (self.draft, model)]  # fmt: skip
            self.pace.guess(seconds / max(1, tokens) * size[0] / size[1])

    def launch(self, model, s: Buffers, k: int, proposals, length: int, sampler, marks) -> Step:
        """One step from where `s` stands, for contexts of `length` tokens, s.token included; nothing is waited for.

        proposals: for each row the tokens looked up, or None; with a draft None. marks: those of Step.read so far.
        """
        device = s.token.device
        real = [True] * len(s.token)
        vocab = model.args.vocab_size if self.draft is None else min(model.args.vocab_size, self.draft.args.vocab_size)
        s.make(k, [] if self.draft is None else sampler.parts(vocab))
        memory = [] if sampler.seen is None else [sampler.seen]
        fixed = [*memory, s.tokens[k], s.out[k], *s.probs[k]]
        key = (k, id(sampler), len(s.token), *(m.data_ptr() for m in fixed))
        if self.draft is None:
            real = [p is not None for p in proposals]
            s.tokens[k][:, :1] = s.token
            s.tokens[k][:, 1:].copy_(torch.tensor([p or [0] * k for p in proposals]), non_blocking=True)
        else:
            theirs = self.slots_for(self.draft, length + k)
            self.run(("draft", *key, *size(self.draft, theirs)),
                     lambda: self.propose(s, k, theirs, sampler, vocab), [s.tokens[k]])  # fmt: skip
        marks = [*marks, mark(device)]
        slots = self.slots_for(model, length + k)
        parts = sampler.parts(model.args.vocab_size)

        def verify():
            # Not in the compiled step: a compiler would compute positions anew for each layer, and copy empty noise.
            pos = s.pos + s.steps[: k + 1]
            noise = torch.empty(len(pos), k + parts[0][0], device=device).exponential_() if parts else None
            self.verify_step(model, s.tokens[k], pos, s.last, slots, sampler, s.probs[k], noise, s.out[k], s.state)

        self.run(("verify", *key, *size(model, slots)), verify, [s.state, *memory])
        return Step(k, s.out[k], real, [*marks, mark(device)])


def size(model, slots: Tensor) -> tuple[int, int, int]:
    """What tells one captured graph of a model from another: how many slots it reads, of how large a cache."""
    return len(slots), model.max_batch_size, model.max_seq_len


def speculate(
    speculation: Speculation,
    model,
    prompts: Sequence[Sequence[int]],
    token: Tensor,
    max_new_tokens: int,
    sampler,
    decode: Callable,
    stop_ids: Sequence[int] = (),
    start: int = 0,
    began=None,
) -> Iterator[Tensor]:
    """Yield the tokens that follow the prompts, column by column, as generate() does: int64 [B], -1 in ended rows.

    token [B, 1]: the first new token of each row, drawn but not fed; the model's cache holds the prompts. decode: a
    plain step, (model, token, input_pos, slots, sampler) -> (token, input_pos). start: as generate()'s. began: a `mark`
    from before the prompts' prefill, or None.

    A column is yielded once every row that runs has its token; rows that accept more run ahead of it, each at its own
    position. With a draft on CUDA, the device runs a step ahead of what is yielded: reading the tokens of a step is
    the only synchronisation. What a step draws beyond a row's end is dropped, and its position stays within the cache.
    """
    B, device, draft = len(prompts), token.device, speculation.draft
    rows, stops = [list(p) for p in prompts], frozenset(stop_ids)
    ends = [len(p) + max_new_tokens for p in prompts]
    s = speculation.buffers.setdefault(B, Buffers(B, device))
    s.last.copy_(torch.tensor([[n - 1] for n in ends]))
    speculation.cached = [min(c, start) for c in speculation.cached] if len(speculation.cached) == B else [0] * B
    stats = speculation.statistics = Statistics(speculation.max_k)
    if speculation.pace:
        speculation.pace.begin()
    history = torch.zeros(B, max(ends), dtype=torch.int64)  # what lookups search; the first in_history[b] of row b
    in_history = [0] * B

    # Where plain steps stand: (token, position), as a plain step wants and leaves them; None where `s` is ahead of it.
    plain = token, torch.tensor([[len(p)] for p in prompts], device=device)
    ahead = int(device.type == "cuda" and draft is not None)
    queue = deque([Step(0, token, [], [] if began is None else [began, mark(device)])])
    ended = None  # on a CPU: when the last step ended, without the time that whoever reads the tokens takes
    reach, shown = max(map(len, prompts)) + 1, 0
    running, done = [True] * B, [False] * B  # as far as columns were yielded; as far as tokens are known
    while True:
        while len(queue) <= ahead:
            missing = max((end - len(row) for row, end, d in zip(rows, ends, done, strict=True) if not d), default=0)
            if missing <= len(queue):  # each step brings one token at least
                break
            begin = ended or mark(device)
            k, proposals, caught = speculation.choose(rows, done, missing), None, 0
            if k and draft is None:
                for b, row in enumerate(rows):
                    history[b, in_history[b] : len(row)] = torch.tensor(row[in_history[b] :])
                    in_history[b] = len(row)
                proposals = [propose_lookup(h[:n], k) for h, n in zip(history, in_history, strict=True)]
                k = k if any(proposals) or speculation.forced else 0
            if k and plain:
                if queue:
                    break  # the tokens of the steps before have to be known
                ready = mark(device)
                caught = speculation.catch_up(s, rows, done)
                plain = None
            now = mark(device)
            marks = [begin, ready if caught else now, now]
            length, reach = min(reach, max(ends)), reach + k + 1
            if k:
                queue.append(speculation.launch(model, s, k, proposals, length, sampler, marks))
                queue[-1].caught = caught
                continue
            plain = plain or s.state[..., 1:].contiguous()
            token, pos = decode(model, *plain, speculation.slots_for(model, length), sampler)
            # A row that has ended goes on beside others, and must stay in the cache.
            plain = (token, pos) if B == 1 else (token.clone(), torch.minimum(pos, s.last))
            queue.append(Step(0, token, [], [*marks, now, mark(device)]))

        step = queue.popleft()
        tokens, seconds = step.read()
        kept, brought, live = [], 0, B - sum(done)
        for b, (row, new) in enumerate(zip(rows, tokens, strict=True)):
            new = [t for t in new if t >= 0]
            if step.k:
                speculation.cached[b] = len(row) + min(len(new) - 1, step.k - 1)
                if step.real[b] and not done[b]:
                    kept.append(len(new) - 1)
            new = new[: ends[b] - len(row)]
            row += new
            if not done[b]:
                stop = next((i for i, t in enumerate(new) if t in stops), None)
                brought += len(new) if stop is None else stop + 1
                done[b] = stop is not None or len(row) == ends[b]
        reach = max(map(len, rows)) + sum(later.k + 1 for later in queue)
        if len(seconds) > 1:
            stats.add(step.k, seconds, live, brought, kept)
            if speculation.pace and speculation.forced is None:
                took = seconds[0] + sum(seconds[2:])
                speculation.pace.learn(step.k, took, brought / live, kept, seconds[1], step.caught)
        elif seconds and speculation.forced is None:
            speculation.expect(model, max(map(len, prompts)) - start, seconds[0])
        ended = step.marks[-1] if step.marks and device.type != "cuda" else None

        while shown < max_new_tokens and all(
            len(row) > len(p) + shown for row, p, r in zip(rows, prompts, running, strict=True) if r
        ):
            column = [row[len(p) + shown] if r else -1 for row, p, r in zip(rows, prompts, running, strict=True)]
            away = time.perf_counter()
            yield torch.tensor(column)
            ended = ended and ended + time.perf_counter() - away
            shown += 1
            running = [r and t not in stops for r, t in zip(running, column, strict=True)]
            if shown == max_new_tokens or not any(running):
                return
