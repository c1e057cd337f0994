"""Whether what was timed was right: a fast wrong kernel is not to score.

    python benchmark.py --shape llama-3.2-1b --json       # each row has logits_error, rounding_error and unlikely

benchmark.py's part: tokens that a run drew, and the cache that it left, against plain PyTorch in the same process. How
far off a right run is, rounding tells: logits of a shallow trained model by 1%, of 80 random layers by a quarter.

Shapes: B rows, n tokens drawn, T tokens of prompt and drawn ones, V vocab.
Sources: Higham, "Accuracy and Stability of Numerical Algorithms", 2.2: a rounding is relative noise of at most eps / 2.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from graphs import slots_for
from model import Attention, Transformer, from_fp8, to_fp8

MANY = 128  # rows of x: no kernel for few of them runs
STEPS = 8  # of a run's last, whose logits are compared


def check(model: Transformer, prompts: list[list[int]], drawn: Tensor, best: int) -> dict:
    """`compare`'s figures, of its arguments; ValueError where they are those of a wrong run."""
    figures = compare(model, prompts, drawn, best)
    most = min(1.5 * figures["rounding_error"] + 1e-4, 0.9)  # float32: sums in another order; 1: nothing in common
    most_unlikely = 0.05 + most**2  # as measured: of logits off by 0.25, 0.6, 0.8 of their spread 5%, 34%, 60%
    if not (figures["logits_error"] <= most and figures["unlikely"] <= most_unlikely):  # nor what is not a number
        raise ValueError(
            f"what was measured is wrong, and does not count: logits are off by {figures['logits_error']:.2%} "
            f"(limit {most:.2%}), {figures['unlikely']:.0%} of the tokens are unlikely (limit {most_unlikely:.0%})"
        )
    return figures


@contextlib.contextmanager
def as_cached() -> Iterator[None]:
    """Inside, a model that has fp8 caches, used without them, has keys and values as they keep them: that is the mode,
    and no error."""
    plain = Attention.causal  # the class's: what takes an attention's place calls it, too

    def causal(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cache.k_scale is not None:
            k, v = (from_fp8(*to_fp8(t), t.dtype) for t in (k, v))
        return plain(self, q, k, v)

    Attention.causal = causal
    try:
        yield
    finally:
        Attention.causal = plain


@contextlib.contextmanager
def rounding(model: Transformer) -> Iterator[None]:
    """Inside, each layer's output is off by noise of one eps of its dtype, what enters attention by a quarter of the KV
    cache's (of fp8 by bf16's: `as_cached`, it is enough that some then round the other way): the same noise at each
    use, and one to two times what all the roundings in a layer amount to.
    """
    device, hooks = model.tok_embeddings.weight.device, []
    noise = torch.Generator(device).manual_seed(0)

    def off(x: Tensor, eps: float) -> Tensor:
        return (x.float() * (1 + eps * torch.randn(x.shape, device=device, generator=noise))).to(x.dtype)

    try:
        for layer in model.layers:
            cache = min(torch.finfo(layer.attention.cache.k.dtype).eps, torch.finfo(torch.bfloat16).eps)
            hooks += [
                layer.register_forward_hook(lambda _, inputs, y: off(y, torch.finfo(y.dtype).eps)),
                layer.attention.register_forward_pre_hook(lambda _, x, eps=cache / 4: (off(x[0], eps), *x[1:])),
            ]
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def compare(model: Transformer, prompts: list[list[int]], drawn: Tensor, best: int) -> dict:
    """Tokens drawn after prompts, int [B, n] with n > 1, and the cache that this has left, against a reference.

    logits_error: how far steps' logits at the last positions are from the reference's, as a share of their spread; not
    counting what all tokens have in common, and the median, since rounding may choose another expert at some.
    rounding_error: how far off the reference's own are under `rounding`: of 80 layers with random weights ten times as
    far as of 16 trained ones. Both are NaN where logits are. unlikely: share of tokens beyond the 2 best + 8 likeliest,
    `best` being from how many they were drawn; of logits off by a fifth of their spread that is 1 to 7%, by half a
    quarter, and nearly all if they have nothing to do with them.
    The reference is the model without a cache (`as_cached`), of all positions at once, and so many that no kernel for
    few rows runs: libraries multiply matrices and attend, and nothing is compiled.
    """
    device, n = model.tok_embeddings.weight.device, drawn.shape[1]
    tokens = torch.cat([torch.tensor(prompts), drawn], 1).to(device)
    first, T = len(prompts[0]) - 1, tokens.shape[1]  # what stands before the first drawn token tells its logits
    local = getattr(model.logits, "local", None)
    if local is not None:
        model.logits.local = False
    last = range(T - 1 - min(n, STEPS), T - 1)
    pos = torch.arange(T, device=device).expand(len(tokens), -1)
    at = [(tokens[:, p : p + 1], pos[:, p : p + 1], slots_for(model, p + 1)) for p in last]
    # [B, STEPS, V]. The last first, since a step writes its own slot again: each reads what the run has written.
    step = torch.cat([model(*one) for one in at[::-1]][::-1], 1)
    unlikely, errors, rounded = 0, [], []
    for row, ours in zip(tokens, step, strict=True):
        padded = F.pad(row, (0, max(0, MANY - T)))
        begin = min(first, len(padded) - MANY)

        def reference(padded=padded, begin=begin):
            return model.logits(model.features(padded[None])[:, begin:])[0, first - begin :][:n].float()

        with as_cached():
            logits = reference()  # [n, V]
            with rounding(model):
                rounded.append((reference() - logits).std(-1) / logits.std(-1))
        rank = (logits > logits.gather(1, row[first + 1 :, None])).sum(1)
        unlikely += int((rank >= 2 * best + 8).sum())
        errors.append((ours.float() - logits[-len(last) :]).std(-1) / logits[-len(last) :].std(-1))
    if local is not None:
        model.logits.local = local
    return {"logits_error": float(torch.cat(errors).median()), "rounding_error": float(torch.cat(rounded).median()),
            "unlikely": unlikely / drawn.numel()}  # fmt: skip
