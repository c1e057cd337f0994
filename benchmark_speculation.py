"""What speculation brings and costs: against plain decoding, and where the time of a speculative step goes.

    python benchmark.py --speculation                                        # the bundled models on held-out Python
    python benchmark.py --shape llama-3.1-8b --draft_shape llama-3.2-1b --simulate_acceptance 0.8

benchmark.py's part for `--draft`, `--draft_shape` and `--speculation`; it passes its `measure` in.

Sources: speculative.py's.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import load_model
from generate import compile_decode, fill, generate, make_speculation, warm_up, weight_bytes
from graphs import compile_step, graph_slots
from machine import seconds, synchronize
from model import Transformer
from quantize import make_recipe
from sampling import Sampler
from speculative import MAX_K, Speculation, count_kept, kept_and_next
from tokenizer import Tokenizer

DEMO = Path(__file__).parent / "demo"


class CoinSampler(Sampler):
    """Keeps each proposed token by a coin of probability `acceptance`, whatever the models say of it.

    For random weights, which agree on nothing: the text means nothing, and the work is that of a real step.
    """

    def __init__(self, acceptance: float, *settings):
        super().__init__(*settings)
        self.acceptance = acceptance

    def verify(self, logits: Tensor, proposed: Tensor, probs: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        """As a Sampler's, with the coins' outcome."""
        real = super().verify(logits, proposed, probs, noise)
        count = count_kept(torch.rand(proposed.shape, device=proposed.device) < self.acceptance)
        # Of the real outcome what can be used is, so that no compiler leaves the work out.
        following = torch.where(real >= 0, real, real[:, :1]).gather(1, count)
        return kept_and_next(proposed, count, following)


@torch.no_grad()
def pass_ms(model: Transformer, T: int, batch: int, context: int, compile: bool) -> float:
    """Milliseconds of one forward of T tokens a row, after `context` ones; on CUDA a captured graph, if compiled."""
    device = model.tok_embeddings.weight.device
    model.setup_caches(batch, context + T)
    tokens = torch.randint(model.args.vocab_size, (batch, T), device=device)
    input_pos = torch.arange(context, context + T, device=device).expand(batch, T).contiguous()
    runner = Speculation(fill, graph_slots, compile=compile_step if compile else None)
    slots, forward = graph_slots(model, context + T), Transformer.forward
    forward = compile_step(forward, 3) if compile else forward
    many = 20 if device.type == "cuda" else 5

    def work():
        forward(model, tokens, input_pos, slots)

    def repeat():
        for _ in range(many):
            runner.run((), work, [tokens])

    repeat()
    return 1e3 * statistics.median(seconds(repeat, device) for _ in range(10)) / many


def measure_speculation(
    measure: Callable[..., dict], model: Transformer, draft: Transformer, k: int, acceptance: float | None,
    prompt_tokens: int, new_tokens: int, batch: int, temperature: float, top_k: int | None, compile: bool, runs: int,
) -> dict:  # fmt: skip
    """Plain and speculative decoding of one model in one process -> speeds, and where a speculative step's time goes.

    measure: benchmark.measure. tok_s, plain_tok_s, speedup: as its own, prefill included. step_ms: from the first
    token, which prefill gives, to the last, without the draft's catching up with the prompt, by steps; draft_ms: of
    which proposing. verify_cost_T: a forward of T tokens over one of one token. other_ms: what a speculative step takes
    beyond the forwards of draft and target: sampling, acceptance, bookkeeping, launches. acceptance: forced; None: as
    it comes.
    """
    settings = (prompt_tokens, new_tokens, batch, temperature, top_k, compile, runs)
    plain = measure(model, *settings)
    sampler = Sampler(temperature, top_k) if acceptance is None else CoinSampler(acceptance, temperature, top_k)
    how = make_speculation(k, draft, compile)
    how.setup_caches(batch, prompt_tokens + new_tokens + MAX_K)
    took, stats = [], []
    ours = measure(model, *settings, sampler=sampler, speculation=how,
                   after=lambda seconds: (took.append(seconds), stats.append(how.statistics)))  # fmt: skip
    steps, all_took = sum(s.steps for s in stats), zip(took, stats, strict=True)
    step_ms = 1e3 * statistics.median((seconds - s.catching_up) / s.steps for seconds, s in all_took)
    context = prompt_tokens + new_tokens // 2
    target_ms = {T: pass_ms(model, T, batch, context, compile) for T in sorted({1, 5, 8, k + 1})}
    draft_ms = {T: pass_ms(draft, T, batch, context, compile) for T in (1, 2)}
    return {
        "k": k,
        "simulated_acceptance": acceptance,
        "acceptance": sum(sum(s.kept) for s in stats) / sum(sum(s.reached) for s in stats),
        "tokens_per_step": sum(s.tokens for s in stats) / sum(s.rows for s in stats),
        "plain_tok_s": plain["tok_s"],
        "tok_s": ours["tok_s"],
        "speedup": ours["tok_s"] / plain["tok_s"],
        "plain_step_ms": plain["decode_step_ms"],
        "step_ms": step_ms,
        "decode_pass_ms": target_ms[1],
        "verify_pass_ms": target_ms[k + 1],
        "verify_cost_5": target_ms[5] / target_ms[1],
        "verify_cost_8": target_ms[8] / target_ms[1],
        "draft_pass_ms": draft_ms[1],
        "other_ms": step_ms - target_ms[k + 1] - draft_ms[2] - (k - 1) * draft_ms[1],
        "draft_ms": 1e3 * sum(s.seconds["draft"] - s.catching_up for s in stats) / steps,
        "compile_s": ours["compile_s"],
        "weights_gb": plain["weights_gb"],
        "draft_weights_gb": weight_bytes(draft) / 1e9,
        "peak_memory_gb": ours["peak_memory_gb"],
    }


def measure_bundled_pair(device: torch.device, prompts: int = 16, new_tokens: int = 100) -> Iterator[dict]:
    """The bundled models completing their held-out Python, greedy, compiled, by each way to propose; a row each.

    Prompts are 200 tokens. Each is decoded without speculation, with it, and without again, so that what else the
    machine does falls on both, if it grows, too. Speeds count from the first new token to the last.
    """
    tokenizer, sampler = Tokenizer(DEMO), Sampler()
    text = (DEMO / "heldout.txt").read_text()
    starts = [text.index("\n", i * len(text) // prompts) + 1 for i in range(prompts)]
    ids = [tokenizer.encode(text[i : i + 2000])[:200] for i in starts]
    model = load_model(DEMO, device, torch.bfloat16)
    model.setup_caches(1, 300 + MAX_K)
    plain = {"decode": compile_decode(model)}

    def decode_seconds(prompt, **steps) -> float:
        for i, _ in enumerate(generate(model, [prompt], new_tokens, sampler, **steps)):
            if i == 0:
                begin = time.perf_counter()
        synchronize(device)
        return time.perf_counter() - begin

    for name, source in (("lookup", None), ("demo/draft", DEMO / "draft"), ("itself in int8", DEMO)):
        recipe = make_recipe("int8") if source == DEMO else None
        draft = source and load_model(source, device, torch.bfloat16, recipe)
        for k in (4, "auto"):
            how = make_speculation(k, draft, compile=True)
            how.setup_caches(1, 300 + MAX_K)
            begin, steps = time.perf_counter(), {**plain, "speculation": how}
            for _ in how.every_depth():
                run = functools.partial(generate, model, sample=sampler, **steps)
                warm_up(model, run, 300, [200])
            compile_s, took, stats = time.perf_counter() - begin, [], []
            for prompt in ids:
                first, ours, last = (decode_seconds(prompt, **which) for which in (plain, steps, plain))
                took.append(((first + last) / 2, ours))
                stats.append(how.statistics)
            before, ours = map(sum, zip(*took, strict=True))
            kept, reached = sum(sum(s.kept) for s in stats), sum(sum(s.reached) for s in stats)
            decoded = prompts * (new_tokens - 1)
            yield {
                "kind": "speculation", "model": "demo", "mode": "bf16", "draft": name, "k": k,
                "simulated_acceptance": None, "batch": 1, "prompt_tokens": 200, "new_tokens": new_tokens,
                "acceptance": kept / reached if reached else None,
                "kept_share": kept / sum(sum(s.proposed) for s in stats) if reached else None,
                "tokens_per_step": decoded / sum(s.steps for s in stats),
                "plain_tok_s": decoded / before, "tok_s": decoded / ours, "speedup": before / ours,
                "median_speedup": statistics.median(a / b for a, b in took), "compile_s": compile_s,
                "draft_share_of_time": sum(s.seconds["draft"] for s in stats) / ours,
            }  # fmt: skip


def bundled_line(row: dict) -> str:
    """A row of measure_bundled_pair for people."""
    share = f"{row['acceptance']:>5.0%} accepted" if row["acceptance"] is not None else "  nothing tried"
    line = "{tokens_per_step:>6.2f} tokens a step{tok_s:>9.1f} tok/s against{plain_tok_s:>8.1f}{speedup:>6.2f} times"
    return f"{row['draft']:<16} k {row['k']!s:<5}{share}{line.format(**row)}"


def speculation_lines(row: dict) -> str:
    """A row of measure_speculation for people."""
    forced = " (simulated)" if row["simulated_acceptance"] is not None else ""
    lines = (
        "{model} {mode} with {draft}, k {k}: {acceptance:.0%} accepted{forced}, {tokens_per_step:.2f} tokens a step",
        "  {tok_s:.1f} tok/s against {plain_tok_s:.1f} without: {speedup:.2f} times{forced}",
        "  a step {step_ms:.3f} ms: verify {verify_pass_ms:.3f}, {k} x draft {draft_pass_ms:.3f}, other {other_ms:.3f}",
        "  plain step {plain_step_ms:.3f} ms, of which {decode_pass_ms:.3f} are the forward",
        "  a forward of 5 tokens costs {verify_cost_5:.2f} times one of 1, of 8 {verify_cost_8:.2f} times",
    )
    return "\n".join(lines).format(forced=forced, **row)
