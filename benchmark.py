"""Measure decoding on random weights of a named shape, against the read bandwidth of the machine it runs on.

    python benchmark.py --shape llama-3.1-8b               # no download: the values of weights cost nothing
    python benchmark.py --checkpoint_path demo --device cpu

The protocol is gpt-fast's: batch 1, a prompt of 5 tokens, 200 new ones, temperature 0.8, top-k 200; tok/s counts the
new tokens over the whole time, prefill included; the median of five runs. `--record` appends the row, with command,
commit, device and versions, to benchmarks/results.jsonl, from which `--readme` makes the README's tables.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import eval
import lifeline
import quantize
import tp
from benchmark_check import check
from benchmark_speculation import bundled_line, measure_bundled_pair, measure_speculation, speculation_lines
from checkpoint import build_model, load_model, resolve
from draft import share_weights
from generate import compile_decode, compile_prefill, generate, pick_recipe, warm_up, weight_bytes
from kernels import read_sum
from machine import device_name, peak_memory_gb, pick_device, pick_dtype, remember_bandwidth, seconds, synchronize
from model import ModelArgs, Transformer, pick_kv_dtype
from sampling import Sampler
from speculative import MAX_K
from tables import fill_tables, one_gpu, read_rows, roofline
from tokenizer import Tokenizer

# What the README's table of perplexities compares: (mode, groupsize, method).
RECIPES = [("int8", None, None), ("fp8", None, None)] + [
    ("int4", groupsize, method) for groupsize in (128, 64, 32) for method in ("rtn", "hqq", "gptq")
]
DEMO = Path(__file__).parent / "demo"
RESULTS = Path(__file__).parent / "benchmarks" / "results.jsonl"
README = Path(__file__).parent / "README.md"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, max_seq_len, head_dim=128, **more) -> ModelArgs:
    return ModelArgs(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, hidden_dim=hidden_dim,
        vocab_size=vocab_size, max_seq_len=max_seq_len, **more,
    )  # fmt: skip


# The published architectures; a string names the one that another equals in size.
SHAPES = {
    "llama-2-7b": _shape(4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-2-70b": _shape(8192, 80, 64, 8, 28672, 32000, 4096),
    "llama-3.1-8b": _shape(4096, 32, 32, 8, 14336, 128256, 131072, rope_theta=5e5, rope_scaling=LLAMA3_ROPE),
    "llama-3.1-70b": _shape(8192, 80, 64, 8, 28672, 128256, 131072, rope_theta=5e5, rope_scaling=LLAMA3_ROPE),
    "llama-3.2-1b": _shape(2048, 16, 32, 8, 8192, 128256, 131072, head_dim=64, rope_theta=5e5,
                           rope_scaling={**LLAMA3_ROPE, "factor": 32.0}, tie_embeddings=True),
    "mistral-7b": _shape(4096, 32, 32, 8, 14336, 32768, 32768, rope_theta=1e6),
    "qwen3-8b": _shape(4096, 36, 32, 8, 12288, 151936, 40960, rope_theta=1e6, norm_eps=1e-6, qk_norm=True),
    "gemma-7b": _shape(3072, 28, 16, 16, 24576, 256000, 8192, head_dim=256, norm_eps=1e-6, norm_offset=1.0,
                       activation="gelu_tanh", embedding_scale=3072**0.5, tie_embeddings=True),
    "mixtral-8x7b": _shape(4096, 32, 32, 8, 14336, 32000, 32768, rope_theta=1e6, n_experts=8, n_experts_per_token=2),
    "qwen3-30b-a3b": _shape(2048, 48, 32, 4, 768, 151936, 40960, rope_theta=1e6, norm_eps=1e-6, qk_norm=True,
                            n_experts=128, n_experts_per_token=8),
    "tinyllama-1.1b": _shape(2048, 22, 32, 4, 5632, 32000, 2048, head_dim=64),
}  # fmt: skip


def read_bandwidth(device: torch.device, gigabytes: float | None = None) -> float:
    """The read bandwidth of a device in GB/s (10^9 bytes), measured: the best of six times two sums over a buffer.

    gigabytes: the buffer's size; None: 8 on a GPU, 1 on a CPU, far beyond any cache. The figure is remembered, so that
    `generate.py` can report a share of it.
    """
    n = int((gigabytes or (8 if device.type == "cuda" else 1)) * 1e9) // 4
    x = torch.ones(n, device=device)
    best = min(seconds(lambda: (read_sum(x), read_sum(x)), device) for _ in range(6))
    bandwidth = 2 * x.nbytes / best / 1e9
    remember_bandwidth(device, bandwidth)
    return bandwidth


def forget_peak(device: torch.device) -> None:
    """Free what is unused on a GPU. From here on the most memory held counts anew: a GPU's, or a process's on Linux."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the process's: man 5 proc_pid_clear_refs


def random_weights(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter, one at a time: normal with std 0.02, norms near their neutral value.

    With experts, whose choice rounding changes now and then, an embedding of std 1, and layers whose sum is about as
    large (as GPT-2, Radford et al. 2019): where all layers weigh the same, one change decides whatever comes after.
    """
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Transformer(args).state_dict().items()}
    for name, shape in shapes.items():
        if args.tie_embeddings and name == "output.weight":
            continue
        std = 0.02
        if args.n_experts and name == "tok_embeddings.weight":
            std = 1.0
        if args.n_experts and name.endswith((".out.linear.weight", ".moe.down.weight")):
            std *= (2 * args.n_layers) ** -0.5
        tensor = torch.randn(shape, device=device, dtype=dtype).mul_(std)  # in place: of a head, a copy is a gigabyte
        yield name, tensor + (1 - args.norm_offset) if name.endswith("norm.weight") else tensor


def timed(items: Iterator, device: torch.device, spent: list[float]) -> Iterator:
    """`items`; the seconds that making each of them takes are appended to `spent`."""
    while True:
        took = seconds(lambda: spent.append(next(items, None)), device)
        item = spent.pop()
        if item is None:
            return
        spent.append(took)
        yield item


def process_seconds() -> float | None:
    """Seconds since this process began; None where the system does not tell (it is Linux that does)."""
    try:
        began = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # in clock ticks since the boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(began) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return None


def measure(
    model: Transformer,
    prompt_tokens: int = 5,
    new_tokens: int = 200,
    batch: int = 1,
    temperature: float = 0.8,
    top_k: int | None = 200,
    compile: bool = True,
    runs: int = 5,
    sampler: Sampler | None = None,
    after: Callable[[float], None] = lambda seconds: None,
    **steps,
) -> dict:
    """Generate `runs` times from random prompts -> medians: tok_s, decode_step_ms, ttft_s, ...; times in seconds.

    very_first_s is that of the run that warms up, in which an eager model may compile its kernels. ValueError where
    the last run has gone wrong (see `check`); not checked: runs of one token, speculation, a sampler of one's own.

    sampler: another than temperature and top_k make. after: called after each run that counts, with the seconds from
    the first token to the last. steps: what else generate() is to be given.
    """
    device, ranks = model.tok_embeddings.weight.device, tp.current()
    checked = sampler is None and not steps and new_tokens > 1
    sampler = (sampler or Sampler(temperature, top_k)).to(device)
    sampler.shard(model)
    model.setup_caches(batch, prompt_tokens + new_tokens + (MAX_K if steps else 0))
    compile_s = None
    prompts = torch.randint(model.args.vocab_size, (batch, prompt_tokens)).tolist()
    prompts = ranks.broadcast(prompts) if ranks else prompts
    if compile:
        begin = time.perf_counter()
        steps |= {"decode": compile_decode(model), "prefill": compile_prefill(model)}
        warm_up(
            model,
            lambda p, n, **kw: generate(model, p * batch, n, sampler, **steps, **kw),
            prompt_tokens + new_tokens,
            [prompt_tokens],
        )
        compile_s = time.perf_counter() - begin

    totals, firsts = [], []
    for run in range(runs + 1):  # the first is a warm-up of allocators and clocks
        synchronize(device)
        if ranks:
            ranks.barrier()
        columns, begin = [], time.perf_counter()
        for column in generate(model, prompts, new_tokens, sampler, **steps):
            if not columns:
                first = time.perf_counter() - begin
            columns.append(column)
        totals.append(time.perf_counter() - begin)
        firsts.append(first)
        if run:
            after(totals[-1] - first)
    total, first = statistics.median(totals[1:]), statistics.median(firsts[1:])
    step_s = (total - first) / (new_tokens - 1) if new_tokens > 1 else None
    shared = {}
    if ranks:
        alone, dtype = tp.communication_seconds(model, batch), model.tok_embeddings.weight.dtype
        shared = {"ranks": ranks.world, "all_reduce_us": alone * 1e6 / (2 * model.args.n_layers + 1),
                  "percent_communication": step_s and 100 * alone / step_s,
                  "all_reduce": "exchange" if tp.exchanges(batch * model.args.dim, dtype) else
                  "nccl" if device.type == "cuda" else "gloo"}  # fmt: skip
    figures = shared | {
        "compile_s": compile_s,
        "tok_s": batch * new_tokens / total,
        "decode_step_ms": step_s and 1e3 * step_s,
        "ttft_s": first,
        "very_first_s": firsts[0],
        "prefill_tok_s": batch * prompt_tokens / first,
        "weights_gb": weight_bytes(model) / 1e9,
        "cache_tokens": model.max_seq_len,
        "peak_memory_gb": peak_memory_gb(device),
    }
    if checked:
        best = 1 if temperature == 0 else top_k or model.args.vocab_size
        figures |= check(model, prompts, torch.stack(columns, 1), best)
    return figures


def record(row: dict) -> None:
    """Append a row to benchmarks/results.jsonl."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def circumstances(device: torch.device) -> dict:
    """What a figure depends on beside its settings: command, commit, device, versions, date."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    but_rows = [*git, "status", "--porcelain", "-uno", "--", ".", f":!{RESULTS.parent.name}/{RESULTS.name}"]
    changed = subprocess.run(but_rows, capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join([f"torchrun --nproc_per_node={tp.current().world}" if tp.current() else "python",
                             Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": os.environ.get("HOTLOOP_COMMIT") or head + ("+" if changed else ""),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": next((d.version for d in importlib.metadata.distributions(name="triton")), None),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def measure_perplexities(checkpoint_path: str, device: torch.device) -> Iterator[dict]:
    """Perplexity of a checkpoint on the bundled held-out text: bf16, with an fp8 KV cache where it can be; RECIPES.

    Each recipe is written by quantize.py as a user would, in a temporary directory, and loaded from there.
    """
    tokenizer = Tokenizer(resolve(checkpoint_path))
    documents, _, _ = eval.read_documents(DEMO / "heldout.txt", tokenizer, None)
    try:
        pick_kv_dtype("fp8", device)
        plain = ("bf16", "bf16 kv fp8")
    except ValueError:  # a GPU without it
        plain = ("bf16",)
    for mode, groupsize, method in [*((mode, None, None) for mode in plain), *RECIPES]:
        with tempfile.TemporaryDirectory() as folder:
            directory = checkpoint_path
            if not mode.startswith("bf16"):
                directory = f"{folder}/quantized"
                command = ["--checkpoint_path", str(checkpoint_path), "--mode", mode, "--out_dir", directory,
                           "--device", str(device)]  # fmt: skip
                command += ["--groupsize", str(groupsize)] if groupsize else []
                command += ["--method", method] if method else []
                command += ["--calibration_text", str(DEMO / "calibration.txt")] if method == "gptq" else []
                with contextlib.redirect_stdout(None):
                    quantize.main(**vars(quantize.parser().parse_args(command)))
            model = load_model(directory, device, torch.bfloat16)
            features = None
            if mode == "bf16 kv fp8":
                model.setup_caches(1, 1, "fp8")
                features = eval.through_cache(model, model.features)
            figures = eval.perplexity(model, documents, window=2048, stride=1024, features=features)
            size = sum(f.stat().st_size for f in resolve(directory).glob("*.safetensors")) / 1e6
        yield {"kind": "perplexity", "model": Path(checkpoint_path).name, "mode": mode, "method": method,
               "groupsize": groupsize, "size_mb": size, "perplexity": figures["perplexity"],
               "tokens": figures["tokens"]}  # fmt: skip


HEADER = (f"{'model':<16}{'mode':>9}{'batch':>6}{'in':>7}{'GB':>8}{'tok/s':>9}{'step ms':>9}{'of peak':>9}"
          f"{'first ms':>10}{'prefill/s':>11}{'compile s':>11}{'peak GB':>9}")  # fmt: skip
RANKS_HEADER = f"{'ranks':>7}{'us a reduce':>13}{'of step':>9}{'against 1':>11}"


def decode_line(row: dict) -> str:
    """A row of measured decoding below HEADER, of several ranks below RANKS_HEADER, too."""
    line = (f"{row['model']:<16}{row['mode']:>9}{row['batch']:>6}{row['prompt_tokens']:>7}{row['weights_gb']:>8.2f}"
            f"{row['tok_s']:>9.1f}{row['decode_step_ms'] or 0:>9.3f}{row['percent_of_peak_bandwidth'] or 0:>8.1f}%"
            f"{1e3 * row['ttft_s']:>10.1f}{row['prefill_tok_s']:>11,.0f}{row['compile_s'] or 0:>11.1f}"
            f"{row['peak_memory_gb']:>9.2f}")  # fmt: skip
    if "ranks" not in row:
        return line
    alone = one_gpu(row, read_rows(RESULTS))
    gain = f"{row['tok_s'] / alone['tok_s']:>10.2f}x" if alone else f"{'-':>11}"
    return line + (f"{row['ranks']:>7}{row['all_reduce_us']:>13.1f}{row['percent_communication'] or 0:>8.1f}%{gain}  "
                   f"{row['all_reduce']}")  # fmt: skip


def measure_start(arguments: list[str]) -> dict:
    """Seconds from the start of a process to its first token, the making of random weights not counted: where nothing
    is kept from before (cold_s), and of the next process (warm_s).

    arguments: what each process, a benchmark.py of one run, is to measure. ValueError where one fails.
    """
    starts: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        kept = {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                "TRITON_CACHE_DIR": f"{folder}/triton"}  # fmt: skip
        for _ in range(2):
            command = [sys.executable, __file__, *arguments, "--runs", "1", "--json"]
            done = subprocess.run(command, env=os.environ | kept, capture_output=True, text=True)
            if done.returncode:
                raise ValueError((done.stderr.strip() or "a process ended without a word").splitlines()[-1])
            starts.append(json.loads(done.stdout.splitlines()[-1]))
            if starts[-1]["start_s"] is None:
                raise ValueError("--starts: this system does not tell when a process began; Linux does")
    return {"kind": "start", "model": starts[0]["model"], "mode": starts[0]["mode"],
            "cold_s": starts[0]["start_s"], "warm_s": starts[1]["start_s"]}  # fmt: skip


def start_line(row: dict) -> str:
    """A row of measure_start for people."""
    return (f"{row['model']:<16}{row['mode']:>9}: from the start of a process to its first token {row['cold_s']:.1f} s,"
            f" of the next {row['warm_s']:.1f} s")  # fmt: skip


def perplexity_line(row: dict) -> str:
    """A row of measure_perplexities for people."""
    return (f"{row['mode']:<12}{row['method'] or '':<6}{row['groupsize'] or '':<5}{row['size_mb']:>8.2f} MB"
            f"{row['perplexity']:>10.4f}")  # fmt: skip


def main(
    shape: list[str],
    checkpoint_path: str | None,
    quant: list[str],
    groupsize: int | None,
    draft_shape: str | None,
    draft: str | None,
    speculate_k: int,
    simulate_acceptance: float | None,
    device: str | None,
    dtype: str,
    kv_dtype: str | None,
    batch: list[int],
    prompt_tokens: list[int],
    new_tokens: int,
    temperature: float,
    top_k: int | None,
    no_compile: bool,
    runs: int,
    starts: bool,
    perplexity: bool,
    speculation: bool,
    record_row: bool,
    readme: bool,
    json_line: bool,
    all_reduce: str = "auto",
) -> None:
    if readme:
        rows = read_rows(RESULTS)
        README.write_text(fill_tables(README.read_text(), rows))
        try:
            roofline(rows, RESULTS.with_name("roofline.svg"))
        except ImportError:
            print("benchmark.py: no plot without matplotlib: pip install matplotlib", file=sys.stderr)
        return
    ranks = lifeline.join(all_reduce)
    if not 1 <= speculate_k <= MAX_K:
        raise ValueError(f"--speculate_k {speculate_k}: it must be from 1 to {MAX_K}")
    if simulate_acceptance is not None:
        if not 0 <= simulate_acceptance <= 1:
            raise ValueError(f"--simulate_acceptance {simulate_acceptance}: it is a probability, from 0 to 1")
        if not (draft or draft_shape):
            raise ValueError("--simulate_acceptance: nothing proposes; give --draft_shape NAME or --draft int8|int4")
    if (draft or draft_shape) and new_tokens < 2:
        raise ValueError(f"--new_tokens {new_tokens}: speculation needs at least 2")
    if ranks and (draft or draft_shape or speculation):
        raise ValueError("speculation is measured with one process; run it without torchrun")
    device, dtype_name, dtype = pick_device(device), dtype, pick_dtype(dtype)
    device = ranks.device(device) if ranks else device
    record_row = record_row and not (ranks and ranks.rank)
    pick_kv_dtype(kv_dtype, device)
    if kv_dtype and (starts or perplexity or speculation):
        flag = "--starts" if starts else "--perplexity" if perplexity else "--speculation"
        raise ValueError(f"--kv_dtype {kv_dtype}: {flag} itself decides what to compare; leave one of them out")
    if perplexity and ranks:
        raise ValueError("--perplexity: quantizes with one process; run it without torchrun")
    rows = []

    def keep(row: dict, line: Callable[[dict], str]) -> None:
        rows.append(row | circumstances(device))
        print(line(rows[-1]), flush=True)
        if record_row:
            record(rows[-1])

    def tell() -> None:
        if json_line:
            print(json.dumps(rows[0] if len(rows) == 1 else {"rows": rows}))

    if starts:
        if ranks or draft or draft_shape or no_compile:
            raise ValueError("--starts: of one process that compiles and does not speculate; leave the other flags out")
        for name, mode in itertools.product([checkpoint_path] if checkpoint_path else shape, quant):
            arguments = ["--checkpoint_path" if checkpoint_path else "--shape", name, "--quant", mode]
            arguments += ["--device", str(device), "--dtype", dtype_name]
            arguments += ["--groupsize", str(groupsize)] if groupsize else []
            keep(measure_start(arguments), start_line)
        return tell()
    if perplexity or speculation:
        measured = measure_perplexities(checkpoint_path or DEMO, device) if perplexity else measure_bundled_pair(device)
        for row in measured:
            keep(row, perplexity_line if perplexity else bundled_line)
        return tell()
    read_sum(torch.empty(1 << 20, device=device))  # this is part of a start, the measurement is not
    begin = time.perf_counter()
    peak = read_bandwidth(device)
    aside = [time.perf_counter() - begin]
    print(f"{device_name(device)}: reads {peak:,.0f} GB/s (measured), torch {torch.__version__}")
    print(HEADER + (RANKS_HEADER if ranks else ""))
    for name, mode in itertools.product([checkpoint_path] if checkpoint_path else shape, quant):
        recipe = pick_recipe(None if mode == "none" else mode, groupsize if mode == "int4" else None)

        def build(name, recipe):
            if name == checkpoint_path:
                model = load_model(name, device, dtype, recipe)
            else:
                torch.manual_seed(0)  # ranks cut the same weights; a draft of the same shape has them, too
                weights = timed(random_weights(SHAPES[name], device, dtype), device, aside)
                model = build_model(SHAPES[name], weights, device, dtype, recipe, ranks)
                torch.seed()
            if kv_dtype is not None:
                model.setup_caches(1, 1, kv_dtype)  # larger ones will be of the same kind
            return model

        begin = time.perf_counter()
        model = build(name, recipe)
        synchronize(device)
        load_s = time.perf_counter() - begin
        age = process_seconds()
        kind = f"int4 g{recipe['groupsize']}" if mode == "int4" else dtype_name if recipe is None else mode
        kind += f" kv {kv_dtype}" if kv_dtype else ""
        proposer = None
        if draft or draft_shape:
            proposer = build(draft_shape or name, pick_recipe(draft, None))
            if not draft_shape:
                share_weights(proposer, model)
        for B, N in itertools.product(batch, prompt_tokens):
            forget_peak(device)
            settings = (N, new_tokens, B, temperature, top_k, not no_compile, runs)
            row = {"model": name, "mode": kind, "batch": B, "prompt_tokens": N, "new_tokens": new_tokens,
                   "temperature": temperature, "top_k": top_k, "runs": runs}  # fmt: skip
            if proposer:
                row |= {"kind": "speculation", "draft": f"{draft_shape or 'itself in'} {draft or dtype_name}"}
                row |= measure_speculation(measure, model, proposer, speculate_k, simulate_acceptance, *settings)
                keep(row, speculation_lines)
            else:
                row |= {"load_s": load_s, **measure(model, *settings), "read_bandwidth_gbs": peak}
                # From the start of the process to the first token, but for the making of random weights.
                first_s = row.pop("very_first_s")
                row["start_s"] = age - sum(aside) + (row["compile_s"] or 0) + first_s if age and not rows else None
                step = row["decode_step_ms"]
                row["percent_of_peak_bandwidth"] = step and 100 * row["weights_gb"] / step * 1e3 / peak
                keep(row, decode_line)
            torch._dynamo.reset()  # frees the CUDA graphs and their memory
        del model, proposer
        forget_peak(device)  # before the next one is made
    if rows and rows[0].get("start_s"):
        print(f"from the start of the process to the first token: {rows[0]['start_s']:.1f} s, weights not counted")
    tell()


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, but for those that the help tells in words, whose value is None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Measure decoding speed on random weights of a named shape (nothing is downloaded).",
        formatter_class=lambda prog: Help(prog, width=110, max_help_position=32),
    )
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")
    a = p.add_argument
    a("--shape", nargs="+", choices=list(SHAPES), default=["tinyllama-1.1b"], metavar="NAME", help=", ".join(SHAPES))
    a("--checkpoint_path", metavar="DIR_OR_HUB_ID", help="measure this checkpoint instead of a shape")
    a("--quant", nargs="+", choices=["none", "int8", "int4", "fp8"], default=["none"], metavar="MODE",
      help="none, int8, int4, fp8: each is measured")
    a("--groupsize", type=int, metavar="G", help="columns that share an int4 scale: 32, 64 or 128; default: 64")
    a("--draft_shape", choices=list(SHAPES), metavar="NAME", help="speculate: the shape of the draft")
    a("--draft", choices=["int8", "int4"], metavar="MODE",
      help="speculate: quantize the --draft_shape, or without one the model itself, as the draft")
    a("--speculate_k", type=int, default=4, metavar="K", help="tokens proposed a step")
    a("--simulate_acceptance", type=float, metavar="A",
      help="keep each proposed token with this probability, whatever the models say: random weights agree on nothing")
    a("--device", metavar="D", help="cuda, cuda:N, mps or cpu; default: the best there is")
    a("--dtype", default="bf16", metavar="D", help="bf16, fp16 or fp32")
    a("--kv_dtype", metavar="D", help="fp8: the KV cache in that; default: the model's dtype")
    a("--batch", nargs="+", type=int, default=[1], metavar="B", help="rows decoded together: each is measured")
    a("--prompt_tokens", nargs="+", type=int, default=[5], metavar="N",
      help="length of the random prompts: each is measured")
    a("--new_tokens", type=int, default=200, metavar="N", help="tokens generated")
    a("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy")
    a("--top_k", type=int, default=200, metavar="K", help="keep the K likeliest tokens")
    a("--no_compile", action="store_true", help="measure the eager model")
    a("--runs", type=int, default=5, metavar="N", help="timed runs, of which the median counts")
    a("--starts", action="store_true",
      help="instead: seconds from the start of a process to its first token, twice, with caches empty at first")
    a("--perplexity", action="store_true", help="instead: perplexity of --checkpoint_path or demo/ by each recipe")
    a("--speculation", action="store_true", help="instead: the bundled models on held-out code, by each way to propose")
    a("--record", action="store_true", dest="record_row", help=f"append the rows to {RESULTS.name}")
    a("--readme", action="store_true", help=f"measure nothing: {README.name}'s tables and plot from {RESULTS.name}")
    a("--all_reduce", default="auto", metavar="A", help="under torchrun, on GPUs: nccl, or auto to take what is faster")
    a("--json", action="store_true", dest="json_line", help="last line of stdout: one JSON object with all figures")
    return p


if __name__ == "__main__":
    try:
        with lifeline.one_voice("benchmark.py"):
            main(**vars(parser().parse_args()))
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"benchmark.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
