"""From logits to a token: temperature, top-k, top-p, min-p, repetition penalty; without a host round trip.

    python -c "import torch, sampling; print(sampling.sample(torch.randn(3, 100), temperature=0.8, top_k=5))"

`sample` is the rule, `Sampler` the rule with its settings and with what it has to remember; under tensor parallelism
and speculation it draws from the same distribution.

Sources: top-p: arXiv 1904.09751, min-p: 2407.01082, repetition penalty: 1909.05858; drawing without a cumulative sum is
an exponential race (https://en.wikipedia.org/wiki/Exponential_distribution).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kernels
import tp
from speculative import accept, accept_greedy, accept_listed


def filtered(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None):
    """Logits [B, V] -> (weights float32 [B, n], ids [B, n] or None for all n = V in their order).

    The weights are probabilities but for a common factor. Filters apply in Hugging Face's order: temperature, top-k,
    top-p (the smallest set of tokens whose probability reaches top_p), min-p (at least min_p times the likeliest's).
    """
    ids = None
    if top_k:
        # The likeliest first, where that matters. The temperature, which keeps their order, is then for these alone.
        logits, ids = kernels.top_k(logits, min(top_k, logits.shape[-1]), sorted=bool(top_p))
    probs = (logits.float() / temperature).softmax(-1)
    if top_p:
        kept = nucleus(probs, top_p) if ids is None else probs.cumsum(-1) - probs < top_p
        probs = probs.masked_fill(~kept, 0)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    return probs, ids


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Probabilities float32 [B, V] -> bool: the fewest whose sum is at least top_p; of equal ones, the first.

    A vocabulary is not sorted for it: three bits at a time, the least probability that is kept is found, by what those
    from each of seven candidates on add up to.
    """
    bits = probs.view(torch.int32)  # in the order of the numbers, which are from 0 to 1, and so below 2^30
    least, digits = torch.zeros_like(bits[:, :1]), torch.arange(1, 8, dtype=torch.int32, device=probs.device)
    for shift in range(27, -1, -3):
        from_there = bits[:, None] >= (least + (digits << shift))[..., None]  # [B, 7, V]
        mass = torch.where(from_there, probs[:, None], 0).sum(-1)
        least = least + ((mass >= top_p).sum(-1, keepdim=True, dtype=torch.int32) << shift)
    more, equal = bits > least, bits == least
    lacking = top_p - torch.where(more, probs, 0).sum(-1, keepdim=True)
    return more | (equal & (equal.cumsum(-1) <= (lacking / least.view(torch.float32)).ceil()))


def probabilities(logits: Tensor, temperature: float, top_k=None, top_p=None, min_p=None) -> Tensor:
    """Logits [B, V] -> the distribution that `sample` draws from: float32 [B, V]. temperature above 0."""
    return spread(*filtered(logits, temperature, top_k, top_p, min_p), logits.shape[-1])


def spread(weights: Tensor, ids: Tensor | None, V: int) -> Tensor:
    """What `filtered` returns -> probabilities float32 [B, V]."""
    weights = normalized(weights)
    return weights if ids is None else weights.new_zeros(len(weights), V).scatter(-1, ids, weights)


def normalized(weights: Tensor) -> Tensor:
    """Weights [..., n] -> probabilities, which sum to 1."""
    return weights / weights.sum(-1, keepdim=True)


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Logits [B, V] -> token ids int64 [B, 1]; probabilities in float32, no host synchronisation.

    temperature 0 is argmax; the filters are those of `filtered`. noise: exponential, float32 [B, V], or of as many
    columns as filters leave, where it must not be drawn here.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    weights, ids = filtered(logits, temperature, top_k, top_p, min_p)
    choice = race(weights, noise)
    return choice if ids is None else ids.gather(-1, choice)


def race(weights: Tensor, noise: Tensor | None = None) -> Tensor:
    """Draw an index of each row with probability proportional to its weight: [B, n] -> int64 [B, 1]."""
    # The first of V exponential clocks with rates p rings at i with probability p_i. Noise of 0 would ring any token.
    noise = torch.empty_like(weights).exponential_() if noise is None else noise[:, : weights.shape[-1]]
    noise = noise.clamp_min(1e-20)
    return (weights / noise).argmax(-1, keepdim=True)


def exponential(clock: Tensor, n: int) -> Tensor:
    """Exponential noise, float32 [B, n], n up to 2^20, that is a function of clock, int64 [B, 1], of which the last 44
    bits count: SplitMix64 in counter mode.

    Of a generator a CUDA graph has to be told before each replay, and no compiler makes its kernel part of another.
    """
    z = ((clock << 20) + torch.arange(n, device=clock.device)) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    z = z ^ (z >> 31 & (1 << 33) - 1)
    # Uniform numbers have all of float32's precision near 0, so that rare tokens are drawn as often as they should; and
    # are below 1, so that no noise is infinite: of weights that are 0 but for one the race would be a tie.
    uniform = ((z >> 11 & (1 << 53) - 1).float() * 2.0**-53).clamp_max(1 - 2.0**-24)
    return -torch.log1p(-uniform)


class Sampler(nn.Module):
    """`sample` with its settings, what noise is made from, and the repetition penalty's memory of each row's tokens."""

    def __init__(self, temperature=0.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
        super().__init__()
        for ok, name, value, limit in (
            (temperature >= 0, "temperature", temperature, "at least 0 (0 is greedy)"),
            (top_k is None or top_k >= 1, "top_k", top_k, "at least 1"),
            (top_p is None or 0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1 (1 keeps every token)"),
            (min_p is None or 0 <= min_p < 1, "min_p", min_p, "at least 0 and below 1 (0 keeps every token)"),
            (repetition_penalty > 0, "repetition_penalty", repetition_penalty, "above 0 (1 is none)"),
        ):
            if not ok:
                raise ValueError(f"--{name} {value}: it must be {limit}")
        self.temperature, self.top_k, self.min_p = temperature, top_k, min_p
        self.top_p = None if top_p == 1 else top_p
        self.penalty = repetition_penalty
        self.register_buffer("seen", None, persistent=False)  # bool [B, V]
        self.register_buffer("clock", None, persistent=False)  # int64 [B or more, 1]
        self.part: tp.ShardedLogits | None = None
        self.same_noise = False  # whether all ranks draw the same numbers, and so need no part

    def shard(self, model: nn.Module) -> None:
        """Where the model is sharded, sample from this rank's part of the logits, which it then no longer gathers."""
        if isinstance(model.logits, tp.ShardedLogits):
            self.part, model.logits.local = model.logits, True

    def reset(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> None:
        """Start a generation: the prompts' tokens count as seen, and noise is that of PyTorch's seed."""
        if self.temperature > 0 and self.part is None:
            clock = torch.randint(1 << 62, (len(prompts), 1)).to(device)  # from the CPU's generator, on all devices
            if self.clock is None or len(self.clock) < len(clock):
                self.clock = clock
            self.clock[: len(clock)] = clock  # in place: a captured graph reads this memory
        if self.penalty == 1:
            return
        if self.seen is None or self.seen.shape[0] != len(prompts):
            width = vocab_size + (self.part.width if self.part else 0)  # parts are padded beyond the end
            self.seen = torch.zeros(len(prompts), width, dtype=torch.bool, device=device)
        self.seen.zero_()
        for row, prompt in zip(self.seen, prompts, strict=True):
            row[torch.tensor(prompt, device=device)] = True

    def penalized(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits with the repetition penalty where `seen` (bool, of the same shape) is true; float32."""
        logits = logits.float()
        return torch.where(seen, torch.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)

    def forward(self, logits: Tensor) -> Tensor:
        """Logits [B, V] -> token ids [B, 1]."""
        if self.penalty != 1:
            seen = self.seen[:, self.part.start :][:, : self.part.width] if self.part else self.seen
            logits = self.penalized(logits, seen)
        rule = (self.temperature, self.top_k, self.top_p, self.min_p)
        if self.part is None:
            (B, V), clock = logits.shape, self.clock if self.temperature > 0 else None
            clock = clock if clock is None or len(clock) == B else clock[:B]  # where it is whole, nothing to scatter
            token = sample(logits, *rule, None if clock is None else exponential(clock, min(self.top_k or V, V)))
            if clock is not None:
                clock.add_(token >= 0)  # always 1; what depends on the token is part of the kernel that finds it
        else:
            token = tp.sample_shard(
                lambda values, noise: sample(values, *rule, noise),
                logits, self.part.start, self.temperature, self.top_k, bool(self.top_p or self.min_p),
                kernels.top_k,
            )  # fmt: skip
        if self.penalty != 1:
            self.seen.scatter_(1, token, True)
        return token

    @property
    def lists(self) -> bool:
        """Whether a distribution is a list of the few tokens that it can draw, rather than a number for each token."""
        return self.top_k is not None and self.top_k <= kernels.MAX_TOP_K

    def parts(self, vocab: int) -> list[tuple[int, torch.dtype]]:
        """(n, dtype) of what tells a row's distribution over so many tokens, as `draw` returns it; none if greedy."""
        if self.temperature == 0:
            return []
        n = min(self.top_k, vocab) if self.lists else vocab
        return [(n, torch.float32), (n, torch.int64)][: 1 + self.lists]

    def draw(self, logits: Tensor, seen: Tensor | None, noise: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """A draft's logits [B, V'] -> (token ids [B, 1], the distribution they come from).

        The distribution is its parts: probabilities, float32 [B, V'], or with a small top_k [B, n] and their token ids.
        seen: a copy of this sampler's memory, to which the tokens are added; None without a penalty. noise: as of
        `sample`, [B, n] at least.
        """
        if seen is not None:
            logits = self.penalized(logits, seen[:, : logits.shape[-1]])
        if self.temperature == 0:
            token, probs = logits.argmax(-1, keepdim=True), []
        else:
            weights, ids = filtered(logits, self.temperature, self.top_k, self.top_p, self.min_p)
            token = race(weights, noise)
            token = token if ids is None else ids.gather(-1, token)
            if self.lists:
                probs = [normalized(weights), ids]
            else:
                probs = [spread(weights, ids, logits.shape[-1])]
        if seen is not None:
            seen.scatter_(1, token, True)
        return token, probs

    def verify(self, logits: Tensor, proposed: Tensor, probs: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        """The target's logits [B, k + 1, V] at proposed [B, k] -> tokens [B, k + 1] as `accept` returns them.

        probs: the parts [B, k, n] of what `draw` says they were drawn from; none: they were not drawn. noise:
        exponential, float32 [B, k + n], n as of the target's `parts`; None if greedy.
        """
        if self.penalty != 1:  # each position has seen the proposals before it, too
            seen = [self.seen]
            for token in proposed.split(1, 1):
                seen.append(seen[-1].scatter(1, token, True))
            logits = self.penalized(logits, torch.stack(seen, 1))
        if self.temperature == 0:
            tokens = accept_greedy(logits.argmax(-1), proposed)
        else:
            rule = (self.temperature, self.top_k, self.top_p, self.min_p)
            weights, ids = filtered(logits.flatten(0, 1), *rule)
            k = proposed.shape[1]
            coins, noise = noise[:, :k].neg().exp(), noise[:, k:]  # e to the minus exponential noise is uniform
            if self.lists:
                target = normalized(weights).view(*logits.shape[:2], -1), ids.view(*logits.shape[:2], -1)
                tokens = accept_listed(*target, *(probs or (None, None)), proposed, coins, noise)
            else:
                target = spread(weights, ids, logits.shape[-1]).view(logits.shape)
                tokens = accept(target, probs[0] if probs else None, proposed, coins, noise)
        if self.penalty != 1:
            self.seen.scatter_(1, torch.where(tokens < 0, tokens[:, :1], tokens), True)
        return tokens
