"""Prompt to text: prefill, the decode loop, chat, and the report of what it cost.

    python generate.py --compile --prompt "def fibonacci(n):"        # the bundled demo model
    python generate.py --checkpoint_path org/name --interactive      # your own, as a chat

`main` reads as a table of contents. `generate()` is one iterator of token columns that the command line, the chat, the
benchmark and the tests all use; what it calls (`prefill`, `decode`, `sample`) is passed in, and compiling means passing
compiled ones.

Sources: gpt-fast (the loop as one page).
"""

import argparse
import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the imports below ends quietly, too
    on_interrupt = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
from torch import Tensor

import lifeline
import tp
from checkpoint import load_model, read_config, read_json, resolve
from draft import load_draft, pick_k
from graphs import GraphedDecode, GraphedPrefill, compile_step, graph_slots, reads_own_length, slots_for
from machine import (
    CACHE_DIR,
    check_compiler,
    peak_bandwidth,
    peak_memory_gb,
    pick_device,
    pick_dtype,
)
from model import Transformer, pick_kv_dtype
from quantize import QuantLinear, make_recipe
from sampling import Sampler, sample
from speculative import MAX_K, Speculation, mark, speculate
from tokenizer import Tokenizer

PREFILL_CHUNK = {"cpu": 512, "cuda": 8192, "mps": 512}  # tokens of a prompt that go through the model at once
CHAT_CONTEXT = 8192  # tokens of cache that a chat allocates unless --max_seq_len says otherwise


# ------------------------------------------------------------------------------------------------- the decode loop
def prefill(model: Transformer, tokens: Tensor, input_pos: Tensor, slots: Tensor | int) -> Tensor:
    """Run tokens [B, T] at input_pos [B, T] into the cache -> logits [B, V] after the last; the head sees no other."""
    return model.logits(model.features(tokens, input_pos, slots)[:, -1:])[:, -1]


def decode_one_token(model: Transformer, token: Tensor, input_pos: Tensor, slots: Tensor, sample: Callable):
    """One step: token [B, 1] at input_pos [B, 1] -> (next token [B, 1], its position [B, 1])."""
    return sample(model(token, input_pos, slots)[:, -1]), input_pos + 1


def advance(model: Transformer, token: Tensor, input_pos: Tensor, slots: Tensor, sample: Callable) -> None:
    """`decode_one_token` in place, which a compiler makes part of the last kernels."""
    token.copy_(decode_one_token(model, token, input_pos, slots, sample)[0])
    input_pos.add_(token >= 0)  # always 1; what depends on the token is part of the kernel that finds it


def compile_decode(model: Transformer) -> Callable:
    """`decode_one_token`, compiled, and on CUDA replayed as one graph; one compilation serves all context lengths.

    Prefill is not compiled: it is matrix products, which libraries do, and Inductor takes a minute for 32 layers of it.
    """
    graphed = model.tok_embeddings.weight.is_cuda
    step = compile_step(advance if graphed else decode_one_token, 3, dynamic=None)
    return GraphedDecode(step) if graphed else step


def compile_prefill(model: Transformer) -> Callable:
    """`prefill`, replayed as CUDA graphs where launching its kernels takes longer than running them: on a GPU."""
    if not model.tok_embeddings.weight.is_cuda:
        return prefill
    mixtures = [layer.moe for layer in model.layers if layer.is_moe]  # which ask the host for the rows of each expert
    return GraphedPrefill(prefill, min((getattr(moe, "most_rows", 0) for moe in mixtures), default=None))


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sample: Callable = sample,
    prefill: Callable = prefill,
    decode: Callable = decode_one_token,
    stop_ids: Sequence[int] = (),
    start: int = 0,
    speculation: Speculation | None = None,
) -> Iterator[Tensor]:
    """Yield the new tokens column by column: int64 [B] on the CPU, -1 in rows that have met a stop id.

    prompts: B lists of token ids, of any lengths. stop_ids are yielded, then end their row; the iterator ends with
    the last row or after max_new_tokens. start: so many leading tokens of the prompts are in the cache already.
    On CUDA the device runs one step ahead of what is yielded, so that reading a token never makes it wait.
    Of a model sharded over ranks, all of them iterate, and rank 0's decision to go on or to stop holds for all.
    speculation: how to find several tokens a step; `sample` is then a Sampler. The tokens' distribution is the same.
    Raises ValueError for an empty prompt, max_new_tokens below 1, or a context that the model was not made for.
    """
    device = model.tok_embeddings.weight.device
    longest = max(map(len, prompts))
    check_lengths(min(map(len, prompts)), longest, max_new_tokens, model.args.max_seq_len)
    slots = model.slots
    room = longest + max_new_tokens + (speculation.max_k if speculation else 0)  # proposals may go beyond the end
    model.setup_caches(len(prompts), room)  # nothing to do when they are large enough
    start = start if model.slots is slots else 0  # caches made anew hold nothing
    if isinstance(sample, Sampler):
        sample.reset(prompts, model.args.vocab_size, device)

    began = mark(device) if speculation else None
    token = sample(fill(model, prompts, start, prefill))
    pos = torch.tensor([[len(p)] for p in prompts]).to(device)
    ranks = tp.current() if isinstance(model.logits, tp.ShardedLogits) else None
    if speculation is not None:
        speculation.setup_caches(len(prompts), room)
        for column in speculate(
            speculation, model, prompts, token, max_new_tokens, sample, decode, stop_ids, start, began
        ):
            going = False
            try:
                yield column
                going = True
            finally:
                going = going if ranks is None else ranks.agree(going)
            if not going:
                return
        return

    alone = ranks and isinstance(sample, Sampler) and sample.part is None
    if alone and (model.logits.local or (sample.temperature and not sample.same_noise)):
        raise ValueError("of a sharded model each rank would draw its own tokens: call sampler.shard(model) before")
    running = torch.ones(len(prompts), dtype=torch.bool)
    stops = torch.tensor(stop_ids, dtype=torch.int64)
    for i in range(max_new_tokens):
        host, last = token[:, 0].to("cpu", non_blocking=True), i + 1 == max_new_tokens
        if device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
            if not last:
                token, pos = decode(model, token, pos, slots_for(model, longest + i + 1), sample)
            arrived.synchronize()
        elif device.type != "cpu":
            torch.mps.synchronize()
        going = False
        try:
            yield torch.where(running, host, -1)
            running &= ~torch.isin(host, stops)
            going = not last and bool(running.any())
        finally:  # also where rank 0's caller has seen enough
            going = going if ranks is None else ranks.agree(going)
        if not going:
            return
        if device.type != "cuda":
            token, pos = decode(model, token, pos, slots_for(model, longest + i + 1), sample)


def fill(model: Transformer, prompts: Sequence[Sequence[int]], start: int = 0, prefill: Callable = prefill) -> Tensor:
    """Run the prompts' tokens from position `start` on into the cache -> logits [B, V] after each prompt's last."""
    device, longest = model.tok_embeddings.weight.device, max(map(len, prompts))
    # Shorter rows repeat their last token at its own position: that rewrites the same keys and values, needs no mask,
    # and leaves every row's last logits in the last column.
    tokens = torch.tensor([[*p, *[p[-1]] * (longest - len(p))] for p in prompts])[:, start:]
    lengths = torch.tensor([[len(p)] for p in prompts])
    input_pos = torch.minimum(torch.arange(start, longest), lengths - 1)
    size, in_order = PREFILL_CHUNK[device.type], bool((lengths == longest).all())
    for chunk, pos in zip(tokens.split(size, 1), input_pos.split(size, 1), strict=True):
        # Tokens in order attend without a mask. Rows filled up with repeated tokens are not.
        slots = int(pos[0, 0]) if in_order else slots_for(model, int(pos.max()) + 1)
        logits = prefill(model, chunk.to(device), pos.to(device), slots)
    return logits


def make_speculation(k: int | str, draft: Transformer | None, compile: bool) -> Speculation:
    """A Speculation whose draft reads prompts as the model does: compiled, by graphs of its own."""
    read = functools.partial(fill, prefill=compile_prefill(draft)) if compile and draft is not None else fill
    agree = tp.current().agree if tp.current() else int
    return Speculation(read, graph_slots, k, draft, compile_step if compile else None, agree)


def check_lengths(shortest: int, longest: int, max_new_tokens: int, limit: int) -> None:
    """ValueError, in one line, for lengths (in tokens) that cannot be served."""
    if shortest == 0:
        raise ValueError("empty prompt, and the tokenizer adds no BOS token: give at least one character")
    if max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {max_new_tokens}: it must be at least 1")
    if longest + max_new_tokens > limit:
        fewer = f" or give --max_new_tokens {limit - longest} or fewer" if limit > longest else ""
        raise ValueError(
            f"prompt of {longest} tokens + {max_new_tokens} new ones exceed the context of {limit}; "
            f"shorten the prompt{fewer}"
        )


# ---------------------------------------------------------------------------------------------- one prompt, as text
class StopStrings:
    """Pass text on until one of the stop strings appears; what could become one is held back."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.stopped = [s for s in stops if s], "", False

    def feed(self, text: str, final: bool = False) -> str:
        """The text that may be shown now; `stopped` tells whether a stop string, which is never shown, has come."""
        if self.stopped:
            return ""
        self.held += text
        found = [i for i in map(self.held.find, self.stops) if i >= 0]
        if found:
            shown, self.held, self.stopped = self.held[: min(found)], "", True
            return shown
        keep = 0
        if not final:
            keep = max((n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


def complete(
    generation: Callable[[], Iterator[Tensor]],
    tokenizer: Tokenizer,
    ids: Sequence[int],
    stop_ids: Sequence[int],
    stops: Sequence[str],
    write: Callable[[str], None],
) -> dict:
    """Run one generation of batch 1, streaming its text to `write` -> tokens, text, finish_reason and timings (s)."""
    begin = time.perf_counter()
    stream, stop_text, tokens, text, reason = tokenizer.stream(ids), StopStrings(stops), [], [], "length"
    first = now = begin
    for column in generation():
        now = time.perf_counter()
        first = first if tokens else now
        tokens.append(int(column[0]))
        if tokens[-1] in stop_ids:
            reason = "stop"
            break
        text.append(stop_text.feed(stream.feed(tokens[-1])))
        write(text[-1])
        if stop_text.stopped:
            reason = "stop"
            break
    text.append(stop_text.feed(stream.flush(), final=True))
    write(text[-1])
    return {
        "tokens": tokens,
        "text": "".join(text),
        "finish_reason": reason,
        "prompt_tokens": len(ids),
        "ttft_s": first - begin,
        "decode_tok_s": (len(tokens) - 1) / (now - first) if len(tokens) > 1 else None,
    }


# -------------------------------------------------------------------------------------------------------- reporting
def weight_bytes(model: Transformer) -> float:
    """Bytes of weights that one decode step reads: all but the embedding table, of the experts only those chosen."""
    args, total = model.args, 0.0
    for module in model.modules():
        if hasattr(module, "in_features") or hasattr(module, "eps"):  # linears, plain or quantized, and norms
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            share = args.n_experts_per_token / args.n_experts if getattr(module, "n_experts", 0) else 1.0
            total += share * sum(t.nbytes for t in tensors)
    return total


def report(result: dict) -> str:
    """The figures of a result as a few lines for people."""

    def row(name, value, unit, note=""):
        return f"  {name:<12}{value:>10} {unit}{note}" if value is not None else None

    def number(key, digits=1):
        return None if result[key] is None else f"{result[key]:,.{digits}f}"

    peak, spec = result["percent_of_peak_bandwidth"], result.get("speculation")
    share = f", {peak:.0f}% of the measured peak" if peak else ""
    new, prompt = len(result["tokens"]), result["prompt_tokens"]
    rows = [
        row("load", number("load_s", 2), "s"),
        row("compile", number("compile_s", 2), "s"),
        row("first token", f"{result['ttft_s'] * 1e3:,.1f}", "ms"),
        row("prefill", number("prefill_tok_s"), f"tok/s  ({prompt} tokens)"),
        row("decode", number("decode_tok_s"), f"tok/s  ({new} tokens, {result['finish_reason']})"),
        row("bandwidth", number("bandwidth_gbs"), "GB/s of weights", share),
        row("peak memory", number("peak_memory_gb", 2), "GB"),
    ]
    if spec and spec["tokens_per_step"]:
        by_position = " ".join(f"{100 * a:.0f}" for a in spec["acceptance_by_position"])
        kept = "; {acceptance:.0%} accepted, {kept_share:.0%} used".format(**spec) if by_position else ""
        kept += f" (by position {by_position})" if by_position else ""
        shares = "draft {draft_share_of_time:.0%}, plain steps {plain_share_of_time:.0%} of the time".format(**spec)
        what = f"tokens with {spec['proposer']}, k {spec['k']}{kept}; {shares}"
        rows.append(row("a step", f"{spec['tokens_per_step']:.2f}", what))
    if spec and spec["speedup"]:
        plain = f"times plain decoding ({spec['plain_tok_s']:,.1f} tok/s)"
        rows.append(row("speed-up", f"{spec['speedup']:.2f}", plain))
    return "\n".join(r for r in rows if r)


# -------------------------------------------------------------------------------------------------------- the steps
def pick_recipe(quant: str | None, groupsize: int | None) -> dict | None:
    """The quantization recipe of --quant and --groupsize."""
    if quant is None:
        if groupsize is not None:
            raise ValueError(f"--groupsize {groupsize}: it belongs to --quant int4")
        return None
    return make_recipe(quant, groupsize)


def own_sampling(directory: Path) -> dict:
    """temperature, top_k and top_p that the checkpoint's generation_config.json recommends; {} where it does not."""
    file = directory / "generation_config.json"
    own = read_json(file) if file.exists() else {}
    return {k: own[k] for k in ("temperature", "top_k", "top_p") if own.get("do_sample") and own.get(k) is not None}


def warm_up(model: Transformer, generation: Callable, length: int, prompts: Iterable[int] = ()) -> None:
    """Compile, and record the CUDA graphs of every context size up to `length` tokens and of prompts so long."""
    per_size = model.slots.is_cuda and not reads_own_length(model)
    sizes = sorted({slots_for(model, n).shape[0] for n in range(2, length + 1)}) if per_size else [12]
    new = min(4, length - 1)
    lengths = [max(1, min(size, length) - new) for size in sizes]
    for n in [*lengths, *(2 * sorted({min(n, length - new) for n in prompts}) if model.slots.is_cuda else [])]:
        for _ in generation([[0] * n], new, stop_ids=()):
            pass


@contextlib.contextmanager
def profiler(file: str | None, device: torch.device):
    """Record a Chrome trace of what runs inside to `file` (open it in https://ui.perfetto.dev)."""
    if file is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    try:  # before the generation, not after it
        open(file + ".tmp", "w").close()
    except OSError as error:
        raise ValueError(f"--profile {file}: cannot be written: {error.strerror}") from None
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")) as trace:
        yield
    trace.export_chrome_trace(file + ".tmp")
    os.replace(file + ".tmp", file)


def chat(run: Callable, tokenizer: Tokenizer, max_new_tokens: int, limit: int) -> list[dict]:
    """Turns from the terminal until end of file; history is kept, and only what is new in it is prefilled."""
    history, ids, cached, results = [], [], [], []
    sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    if not tokenizer.has_chat_template:
        print("no chat template in this checkpoint: it continues the text you type", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return results
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin is not UTF-8: {error}") from None
        if not line.strip():
            continue
        if tokenizer.has_chat_template:
            history.append({"role": "user", "content": line})
            ids = tokenizer.chat(history)
            while len(ids) + max_new_tokens > limit and len(history) > 2:
                history = history[2:]  # the oldest turn goes
                ids = tokenizer.chat(history)
        else:
            ids = ids + tokenizer.encode(line + "\n", bos=None if not ids else False)
            ids = ids[-max(limit - max_new_tokens, 1) :]
        check_lengths(len(ids), len(ids), max_new_tokens, limit)
        same = len(os.path.commonprefix([ids, cached]))  # works on any sequences
        result = run(ids, start=min(same, len(ids) - 1))
        print(flush=True)
        # The last token may not have been fed to the model yet.
        ids, cached = ids + result["tokens"], ids + result["tokens"][:-1]
        history.append({"role": "assistant", "content": result["text"]})
        results.append(result)


def lead(ranks: tp.Ranks | None, run: Callable, work: Callable[[Callable], list[dict]]) -> list[dict]:
    """work(run) -> results. On several ranks, rank 0 alone works (reads, writes), and the others run what it runs."""
    if ranks is None:
        return work(run)
    if ranks.rank == 0:
        results = work(lambda ids, start=0: run(*ranks.broadcast((ids, start))))
        ranks.broadcast(None)
        return results
    while (job := ranks.broadcast()) is not None:
        run(*job)
    return []


# ------------------------------------------------------------------------------------------------------ the program
def main(
    checkpoint_path: str | Path,
    prompt: list[str] | None,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str],
    ignore_eos: bool,
    compile: bool,
    quant: str | None,
    groupsize: int | None,
    draft_checkpoint_path: str | None,
    draft: str | None,
    speculate_k: str | None,
    compare: bool,
    device: str | None,
    dtype: str | None,
    kv_dtype: str | None,
    max_seq_len: int | None,
    interactive: bool,
    num_samples: int,
    json_line: bool,
    profile: str | None,
    all_reduce: str = "auto",
) -> None:
    ranks = lifeline.join(all_reduce)
    device, dtype = pick_device(device), pick_dtype(dtype)
    device = ranks.device(device) if ranks else device
    kv = pick_kv_dtype(kv_dtype, device)
    if num_samples < 1:
        raise ValueError(f"--num_samples {num_samples}: it must be at least 1")
    if compile:
        check_compiler(device)
    recipe = pick_recipe(quant, groupsize)
    k = pick_k(speculate_k, draft, draft_checkpoint_path, compare)
    if ranks and k is not None:  # every rank draws the same numbers, so that they accept the same tokens
        seed = ranks.broadcast(torch.seed() >> 1 if seed is None else seed)
        torch.manual_seed(seed)
    directory = resolve(checkpoint_path)
    own = own_sampling(directory) if temperature is None else {}
    sampler = Sampler(
        own.get("temperature", 0.8) if temperature is None else temperature,
        own.get("top_k") if top_k is None else top_k,
        own.get("top_p") if top_p is None else top_p,
        min_p,
        repetition_penalty,
    ).to(device)
    sampler.same_noise = k is not None
    args, _ = read_config(directory)
    tokenizer = Tokenizer(directory)

    prompts = [] if interactive else [tokenizer.encode(p) for p in prompt or ["def fibonacci(n):"]]
    shortest, longest = min(map(len, prompts), default=1), max(map(len, prompts), default=0)
    wanted = CHAT_CONTEXT if interactive else longest + max_new_tokens
    context = min(args.max_seq_len, wanted if max_seq_len is None else max_seq_len)
    own_limit = max_seq_len is None and not interactive
    check_lengths(shortest, longest, max_new_tokens, args.max_seq_len if own_limit else context)

    begin = time.perf_counter()
    model = load_model(directory, device, dtype, recipe)
    steps = {}
    if k is None:
        sampler.shard(model)
    else:
        proposer = load_draft(model, directory, draft_checkpoint_path, draft, quant, dtype, context, kv)
        steps["speculation"] = make_speculation(k, proposer, compile)
        steps["speculation"].setup_caches(1, context + steps["speculation"].max_k, kv_dtype)
    model.setup_caches(1, context + (steps["speculation"].max_k if steps else 0), kv_dtype)
    load_s, compile_s = time.perf_counter() - begin, None

    if device.type == "cuda" and not compile and any(isinstance(m, QuantLinear) for m in model.modules()):
        print("quantized but not compiled: on a GPU --compile makes decoding several times faster", file=sys.stderr)
    if compile:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE_DIR / "inductor"))
        begin = time.perf_counter()
        steps |= {"decode": compile_decode(model), "prefill": compile_prefill(model)}
        for _ in steps["speculation"].every_depth() if steps.get("speculation") else [None]:
            warm_up(
                model, lambda p, n, **kw: generate(model, p, n, sampler, **steps, **kw), context, map(len, prompts)
            )
        compile_s = time.perf_counter() - begin
    if seed is not None:  # after the warm-up, which draws numbers too; each rank draws for its own part of the tokens
        torch.manual_seed(seed + (ranks.rank << 32) if ranks and k is None else seed)

    stop_ids = () if ignore_eos else tokenizer.stop_ids
    write = lambda text: print(text, end="", flush=True)  # noqa: E731

    def run(ids: list[int], start: int = 0, steps: dict = steps, write: Callable = write) -> dict:
        if compare and "speculation" in steps:
            # First, so that the cache is left as the tokens returned say; and --seed repeats the run without --compare.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                plain = run(ids, start, {name: step for name, step in steps.items() if name != "speculation"}, len)
        generation = lambda: generate(  # noqa: E731
            model, [ids], max_new_tokens, sampler, **steps, stop_ids=stop_ids, start=start
        )
        if ranks and ranks.rank:  # rank 0 decides where it ends
            return {"tokens": len(list(generation())), "decode_tok_s": None}
        result = complete(generation, tokenizer, ids, stop_ids, stop, write)
        speed = result["decode_tok_s"]
        if "speculation" in steps:
            name = " ".join(filter(None, [draft_checkpoint_path, draft]))
            before = plain["decode_tok_s"] if compare else None
            result["speculation"] = {"proposer": name, "k": k, **steps["speculation"].statistics.summary(),
                                     "plain_tok_s": before,
                                     "speedup": speed / before if speed and before else None}  # fmt: skip
            speed = None  # a step reads the weights once for several tokens
        bandwidth, peak = speed and speed * weight_bytes(model) / 1e9, peak_bandwidth(device)
        return result | {
            "load_s": load_s,
            "compile_s": compile_s,
            "prefill_tok_s": (len(ids) - start) / result["ttft_s"],
            "bandwidth_gbs": bandwidth,
            "percent_of_peak_bandwidth": 100 * bandwidth / peak if bandwidth and peak else None,
            "peak_memory_gb": peak_memory_gb(device),
        }

    def complete_all(run: Callable) -> list[dict]:
        results = []
        for ids, text in zip(prompts, prompt or ["def fibonacci(n):"], strict=True):
            for _ in range(num_samples):
                write(text)
                results.append(run(ids))
                print(flush=True)
        return results

    if ranks:
        ranks.barrier()  # they load and compile at different speeds
    with profiler(profile if not (ranks and ranks.rank) else None, device):
        converse = lambda run: chat(run, tokenizer, max_new_tokens, context)  # noqa: E731
        results = lead(ranks, run, converse if interactive else complete_all)
    for result in results[-1:] if interactive else results:
        print(report(result), file=sys.stderr)
    if json_line:
        print(json.dumps((results[-1] if results else {}) | {"samples": results}))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, but for those that the help tells in words, whose value is None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Generate text from a Llama-family checkpoint; with no argument, from the bundled demo model.",
        epilog=f"Compiled code is kept in {CACHE_DIR} (Inductor's moves with TORCHINDUCTOR_CACHE_DIR), "
        "so a second --compile of the same model starts faster.",
        formatter_class=lambda prog: Help(prog, width=110, max_help_position=32),
    )
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")  # one line, as for every other error
    a = p.add_argument
    a("--checkpoint_path", default=Path(__file__).parent / "demo", metavar="DIR_OR_HUB_ID",
      help="converted directory, Hugging Face directory, or hub id such as org/name")  # fmt: skip
    a("--prompt", action="append", metavar="TEXT", help="may be given several times; default: def fibonacci(n):")
    a("--max_new_tokens", type=int, default=200, metavar="N", help="tokens to generate at most")
    a("--temperature", type=float, metavar="T",
      help="0 is greedy; default: generation_config.json's temperature, top-k and top-p, else 0.8")  # fmt: skip
    a("--top_k", type=int, metavar="K", help="keep the K likeliest tokens; default: all")
    a("--top_p", type=float, metavar="P", help="keep the likeliest tokens that reach probability P; default: all")
    a("--min_p", type=float, metavar="P", help="keep tokens of at least P times the likeliest's probability")
    a("--repetition_penalty", type=float, default=1.0, metavar="R", help="above 1: seen tokens become less likely")
    a("--seed", type=int, metavar="S", help="make sampling repeatable")
    a("--stop", nargs="+", default=[], metavar="STR", help="end at any of these strings, which are not printed")
    a("--ignore_eos", action="store_true", help="go on after an end-of-sequence token")
    a("--compile", action="store_true", help="torch.compile the step: slower start, faster decode")
    a("--quant", metavar="MODE", help="quantize the weights while loading: int8, int4 or fp8")
    a("--groupsize", type=int, metavar="G", help="columns that share an int4 scale: 32, 64 or 128; default: 64")
    a("--draft_checkpoint_path", metavar="DIR_OR_HUB_ID", help="speculate: this smaller model proposes tokens")
    a("--draft", choices=["lookup", "int8", "int4"], metavar="HOW",
      help="speculate: look up what followed the same words before (lookup), or propose with the model itself, or the "
      "--draft_checkpoint_path, quantized (int8, int4)")  # fmt: skip
    a("--speculate_k", metavar="K",
      help=f"tokens proposed a step, 1 to {MAX_K}; auto: as many as pay, perhaps none; default: 4")  # fmt: skip
    a("--compare", action="store_true", help="speculate: decode without, too, and report the speed-up")
    a("--device", metavar="D", help="cuda, cuda:N, mps or cpu; default: the best there is")
    a("--dtype", metavar="D", help="bf16, fp16 or fp32; default: as the checkpoint has it")
    a("--kv_dtype", metavar="D",
      help="fp8: keep keys and values in half the memory, for long contexts; default: the model's dtype")  # fmt: skip
    a("--max_seq_len", type=int, metavar="S",
      help=f"tokens of KV cache; default: what is needed, in a chat the model's own up to {CHAT_CONTEXT}")  # fmt: skip
    a("--interactive", action="store_true", help="chat in the terminal; end with Ctrl-D")
    a("--num_samples", type=int, default=1, metavar="N", help="completions of each prompt, one after another")
    a("--json", action="store_true", dest="json_line", help="last line of stdout: one JSON object with all figures")
    a("--all_reduce", default="auto", metavar="A", help="under torchrun, on GPUs: nccl, or auto to take what is faster")
    a("--profile", metavar="FILE", help="write a Chrome trace of the generation (open it in ui.perfetto.dev)")
    return p


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        with lifeline.one_voice("generate.py"):
            main(**vars(parser().parse_args()))
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"generate.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough; nothing may be flushed into the pipe at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
