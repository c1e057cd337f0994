"""Tensor parallelism on gloo: the same numbers as one process, faults that end all ranks, bad input in one line.

For each number of ranks a process group is started once and runs all cases; the programs' own behaviour is tested in
real processes under torchrun. This file is also what those processes run: see `worker`, `saboteur` and `pairs`.

Try it:  python -m pytest tests/test_tp.py
"""

import contextlib
import gc
import json
import os
import queue
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kernels
import kernels_cuda
import lifeline
import tp
from checkpoint import Weights, convert_checkpoint, load_model, read_config
from generate import Sampler, generate
from model import Transformer
from quantize import Int4Linear, make_recipe, swap_linears

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=256,
)  # fmt: skip
WIDE = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2)  # int4's groups fit
MODELS = {  # name -> (transformers' class, its config)
    "llama": ("Llama", dict(num_key_value_heads=2)),
    "llama-bias-odd": ("Llama", dict(attention_bias=True, mlp_bias=True, vocab_size=97, intermediate_size=88)),
    "llama-mqa": ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", WIDE | dict(num_key_value_heads=4)),
    "qwen3": ("Qwen3", WIDE | dict(head_dim=64, tie_word_embeddings=True)),
    "gemma": ("Gemma", WIDE | dict(head_dim=32, vocab_size=99)),
    "gemma2": ("Gemma2", dict(head_dim=16, num_key_value_heads=2, sliding_window=8, query_pre_attn_scalar=24)),
    "gemma3": ("Gemma3Text", dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=24)),
    "mixtral": ("Mixtral", WIDE | dict(num_local_experts=4, num_experts_per_tok=2)),
    "mixtral-soft": ("Mixtral", dict(num_local_experts=2, num_experts_per_tok=2)),  # no choice that rounding could flip
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2, head_dim=16)),
    "wide": ("Llama", WIDE),
}
INT8, FP8 = make_recipe("int8"), make_recipe("fp8")
INT4 = {g: make_recipe("int4", g) for g in (32, 64, 128)}
# name -> (model, dtype, recipe at load). A name that ends in -converted is loaded from our own format.
CASES = {name: (name, "float32", None) for name in MODELS}
CASES |= {
    f"{model}-{recipe['mode']}{recipe.get('groupsize', '')}": (model, "float32", recipe)
    for model in ("wide", "qwen2", "qwen3", "gemma", "mixtral")
    for recipe in (INT8, INT4[32], INT4[64], INT4[128], FP8)
}
CASES |= {f"{model}-bf16": (model, "bfloat16", None) for model in ("wide", "qwen2", "qwen3", "gemma")}
CASES |= {"mixtral-bf16": ("mixtral-soft", "bfloat16", None), "wide-int8-bf16": ("wide", "bfloat16", INT8)}
CASES |= {
    "wide-int4-bf16": ("wide", "bfloat16", INT4[128]),
    "wide-hqq": ("wide", "float32", INT4[64] | {"method": "hqq"}),
}
CASES |= {f"{name}-converted": (name, "float32", None) for name in ("llama-bias-odd", "mixtral", "gemma")}
PROMPTS = [[5, 17, 3, 60, 2, 9, 41], [7, 7, 90], [33, 1, 50, 2, 8]]  # of different lengths
THOROUGH = ("llama-bias-odd", "mixtral", "wide-int464", "gemma2")
STORED = ("int8", "int4", "fp8")  # written by quantize.py, then loaded


# ------------------------------------------------------------------------------- one process, and a worker on a rank
def outputs(directory: Path, dtype: str, recipe: dict | None, thorough: bool) -> dict:
    """What is compared: logits of three rows and of one, greedy tokens of one and of three prompts, the state dict."""
    model = load_model(directory, "cpu", getattr(torch, dtype), recipe)
    tokens = torch.tensor([p[:3] * 4 for p in PROMPTS])
    with torch.no_grad():
        logits = [model(rows).float() for rows in (tokens, tokens[:1])]
    # Each decoded step costs many collectives, and ranks share cores here: sampling from gathered logits and with a
    # repetition penalty, which has to know its part of the seen tokens, are tried on some models only.
    jobs = [(PROMPTS, 4, {}, True), (PROMPTS[:1], 3, {}, True)]
    if thorough:
        jobs += [(PROMPTS, 4, {}, False), *((PROMPTS, 10, {"repetition_penalty": 8.0}, s) for s in (False, True))]
    greedy = []
    for prompts, new, settings, shard in jobs:
        sampler = Sampler(**settings)
        if shard:
            sampler.shard(model)
        greedy.append(torch.stack(list(generate(model, prompts, new, sampler)), 1))
        if isinstance(model.logits, tp.ShardedLogits):
            model.logits.local = False
    return {"logits": logits, "greedy": greedy, "state": model.state_dict()}


def draws(model, rule: dict, n: int = 4000) -> torch.Tensor:
    """n tokens sampled from the same sharded logits by one rule."""
    torch.manual_seed(tp.current().rank)
    sampler = Sampler(**rule)
    sampler.shard(model)
    with torch.no_grad():
        logits = model.logits(model.features(torch.tensor([PROMPTS[0]])))[:, -1]
    model.logits.local = False
    return sampler(logits.expand(n, -1))[:, 0]


def with_fp8_cache(model) -> torch.Tensor:
    """Greedy tokens of three prompts, with keys and values in fp8."""
    model.setup_caches(3, 32, "fp8")
    sampler = Sampler()
    sampler.shard(model)
    out = torch.stack(list(generate(model, PROMPTS, 8, sampler)), 1)
    if isinstance(model.logits, tp.ShardedLogits):
        model.logits.local = False
    return out


RULES = {
    "plain": dict(temperature=1.5),
    "top_k": dict(temperature=2.0, top_k=7),
    "top_p": dict(temperature=1.5, top_p=0.8),
    "min_p": dict(temperature=2.0, min_p=0.1),
    "all": dict(temperature=1.0, top_k=20, top_p=0.95, min_p=0.01),
}


def worker(folder: Path) -> None:
    """Run every case on this rank, save what comes out; tokens must be the same on all ranks."""
    torch.set_num_threads(1)
    with lifeline.one_voice("worker"):
        ranks = lifeline.join()
        results = {}
        for name, directory, dtype, recipe in json.loads((folder / "cases.json").read_text()):
            results[name] = outputs(Path(directory), dtype, recipe, name in THOROUGH)
            assert len(set(ranks.gather(str(results[name]["greedy"])))) == 1, f"{name}: ranks disagree"
        directory = results and json.loads((folder / "cases.json").read_text())[0][1]
        model = load_model(directory, "cpu", torch.float32)
        results["kv fp8"] = with_fp8_cache(model)
        for name, rule in RULES.items():
            results[name] = draws(model, rule)
            assert len(set(ranks.gather(str(results[name].tolist())))) == 1, f"{name}: ranks disagree"
        errors = {}
        for world in (3, 8, 16):
            with torch.device("meta"):
                whole = Transformer(model.args)
            try:
                tp.apply_tp(whole, 0, world)
            except ValueError as error:
                errors[world] = str(error)
        results["errors"] = errors
        torch.save(results, folder / f"rank{ranks.rank}.pt")


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """name -> checkpoint directory: each of MODELS by transformers, converted, and quantized in each mode."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root, found = tmp_path_factory.mktemp("models"), {}
    for i, (name, (family, changes)) in enumerate(MODELS.items()):
        config = getattr(transformers, f"{family}Config")(**SIZES | changes)
        kind = {"Gemma3Text": "Gemma3"}.get(family, family)
        torch.manual_seed(i)
        model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config)
        for key, weight in model.named_parameters():
            if key.endswith("norm.weight"):
                weight.data += 0.3 * torch.randn_like(weight)
            else:
                weight.data.normal_(std=0.5 if key.endswith("bias") else 2.0 * weight.shape[-1] ** -0.5)
            if "embed_tokens" in key and config.tie_word_embeddings:
                weight.data /= 4 if "gemma" not in config.model_type else 32
        model.save_pretrained(root / name, **{"max_shard_size": "60KB"} if name == "wide" else {})
        found[name] = root / name
    for name in ("llama-bias-odd", "mixtral", "gemma"):
        convert_checkpoint(found[name], root / f"{name}-converted")
        found[f"{name}-converted"] = root / f"{name}-converted"
    import quantize

    for mode in STORED:
        argv = ["--checkpoint_path", str(found["wide"]), "--mode", mode, "--out_dir", str(root / f"stored-{mode}")]
        quantize.main(**vars(quantize.parser().parse_args(argv + ["--groupsize", "128"] * (mode == "int4"))))
        found[f"stored-{mode}"] = root / f"stored-{mode}"
    yield found
    torch.set_num_threads(threads)


def all_cases(directories) -> list:
    """(name, directory, dtype, recipe) of every case."""
    cases = [(name, str(directories.get(name, directories[model])), dtype, recipe)
             for name, (model, dtype, recipe) in CASES.items()]  # fmt: skip
    return cases + [(f"stored-{mode}", str(directories[f"stored-{mode}"]), "float32", None) for mode in STORED]


def run_ranks(world: int, folder: Path, port: int) -> list[dict]:
    """Start this file as `world` ranks -> what each saved."""
    environment = os.environ | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                                "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, __file__, "worker", folder], stderr=subprocess.PIPE, text=True,
                         env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(world)
    ]  # fmt: skip
    try:
        errors = [p.communicate(timeout=200)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert not any(p.returncode for p in processes), "\n".join(errors)
    return [torch.load(folder / f"rank{r}.pt") for r in range(world)]


@pytest.fixture(scope="session")
def ranks(directories, tmp_path_factory):
    """world -> the results of each of its ranks; started together, since one core each is enough."""
    cases, folders = all_cases(directories), {n: tmp_path_factory.mktemp(f"ranks{n}") for n in (2, 4)}
    for folder in folders.values():
        (folder / "cases.json").write_text(json.dumps(cases))
    return {n: run_ranks(n, folder, 29600 + os.getpid() % 1000 + n) for n, folder in folders.items()}


@pytest.fixture(scope="session")
def alone(directories):
    """name -> the same outputs of one process."""
    cases = {name: (Path(directory), dtype, recipe) for name, directory, dtype, recipe in all_cases(directories)}
    return cache(lambda name: outputs(*cases[name], name in THOROUGH))


NAMES = [*CASES, *(f"stored-{mode}" for mode in STORED)]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(name, world, ranks, alone):
    expected, exact = alone(name), "bf16" not in name
    for result in ranks[world]:
        got = result[name]
        for logits, theirs in zip(got["logits"], expected["logits"], strict=True):
            assert (logits - theirs).abs().max() / theirs.abs().max() < (1e-4 if exact else 3e-2)
        for tokens, theirs in zip(got["greedy"], expected["greedy"], strict=True):
            assert not exact or torch.equal(tokens, theirs)
        assert not exact or len(set(expected["greedy"][0].flatten().tolist())) > 3


def test_penalties_change_something(alone):
    tokens = {name: alone(name)["greedy"] for name in THOROUGH}
    assert sum(not torch.equal(t[0], t[4][:, :4]) for t in tokens.values()) >= 2


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_slices_of_one_process(name, world, ranks, alone, directories):
    """Stored values, scales included, are those of the whole quantized model, and most are on one rank only."""
    whole, (args, _) = alone(name)["state"], read_config(dict((n, d) for n, d, *_ in all_cases(directories))[name])
    recipe = CASES[name][2] if name in CASES else read_config(directories[name])[1]["quantization"]
    for rank, result in enumerate(ranks[world]):
        with torch.device("meta"):
            model = Transformer(args)
        if recipe:
            swap_linears(model, json.loads(json.dumps(recipe)))
        parts, state = tp.apply_tp(model, rank, world), result[name]["state"]
        for key, tensor in whole.items():
            if key in parts and not parts[key][1]:
                assert key not in state  # the bias that another rank adds
            else:
                assert torch.equal(state[key].float(), tp.take(tensor, parts.get(key)).float()), key
        kv_kept = max(1, world // args.n_kv_heads)  # how many ranks hold the same kv heads
        share = sum(t.nbytes for t in state.values()) / sum(t.nbytes for t in whole.values())
        assert share < 1.6 / world * (1.3 if kv_kept > 1 else 1)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_sampled_distribution(rule, world, ranks, directories):
    """4,000 draws from sharded logits against the probabilities that the rule gives one process, by chi-square."""
    model, settings = load_model(directories["llama"], "cpu", torch.float32), RULES[rule]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]]))[:, -1] / settings["temperature"]
    order = logits[0].argsort(descending=True)
    p = logits[0, order].softmax(-1)
    if "top_k" in settings:
        p[settings["top_k"] :] = 0
        p /= p.sum()
    if "top_p" in settings:
        p[p.cumsum(0) - p >= settings["top_p"]] = 0
    if "min_p" in settings:
        p[p < settings["min_p"] * p.max()] = 0
    p = torch.zeros(96).scatter(0, order, p / p.sum())
    draws = ranks[world][0][rule]
    counts = torch.bincount(draws, minlength=96).float()
    assert not counts[p == 0].any()
    big = p * len(draws) > 5
    expected = torch.cat([p[big], p[~big].sum()[None]]) * len(draws)
    seen = torch.cat([counts[big], counts[~big].sum()[None]])
    chi2, degrees = ((seen - expected) ** 2 / expected.clamp_min(1e-9)).sum(), max(1, int(big.sum()))
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5 + 4
    assert len(set(draws.tolist())) > 3


@pytest.mark.parametrize("world", [2, 4])
def test_fp8_cache_equals_one_process(world, ranks, directories):
    expected = with_fp8_cache(load_model(directories["llama"], "cpu", torch.float32))
    assert all(torch.equal(result["kv fp8"], expected) for result in ranks[world])
    assert len(set(expected.flatten().tolist())) > 3


def test_uneven_heads_are_refused(ranks):
    errors = ranks[2][0]["errors"]
    assert errors[3] == "4 heads cannot be split over 3 ranks; use a number of ranks that divides 4"
    assert "4 heads cannot be split over 8 ranks" in errors[8]
    with pytest.raises(ValueError, match="6 kv heads cannot be split over 4 ranks; .* divides 6"):
        tp.split_heads(12, 6, 0, 4)
    assert [tp.split_heads(8, 2, r, 4) for r in range(4)] == [
        ((0, 2), (0, 1)), ((2, 4), (0, 1)), ((4, 6), (1, 2)), ((6, 8), (1, 2))]  # fmt: skip


def test_splits_cover_everything_once():
    for size in (97, 96, 11008, 128256, 32001, 352):
        for world in (1, 2, 3, 4, 8):
            for unit in (1, 32) if size % 32 == 0 and size // 32 >= world else (1,):
                bounds = [tp.split(size, r, world, unit) for r in range(world)]
                assert bounds[0][0] == 0 and bounds[-1][1] == size
                assert all(a[1] == b[0] and a[0] < a[1] for a, b in zip(bounds, bounds[1:], strict=False))
                assert all(a % unit == 0 for a, _ in bounds)
    with pytest.raises(ValueError, match="64 columns in units of 32 cannot be split over 4 ranks"):
        tp.split(64, 0, 4, 32)


@pytest.mark.parametrize("cut", [(0, 128), (128, 352), (32, 384), (64, 192)])
@pytest.mark.parametrize("groupsize", [32, 64, 128])
def test_int4_shards_at_any_column(cut, groupsize):
    """A cut through a group gives smaller groups that stand for the same weights."""
    linear = Int4Linear(384, 6, groupsize=groupsize)
    stored = linear.quantize(torch.randn(6, 384))
    mine, parts = linear.shard(columns=[cut])
    pieces = {name: tp.take(tensor, parts[name]) for name, tensor in stored.items()}
    assert {n: (tuple(t.shape), t.dtype) for n, t in pieces.items()} == mine.layout()
    assert torch.equal(mine.dequantize_stored(**pieces), linear.dequantize_stored(**stored)[:, slice(*cut)])
    with pytest.raises(ValueError, match="at columns .* not at multiples of 32"):
        linear.shard(columns=[(0, 40)])


def test_a_fused_module_adds_the_residual_once():
    """kernels.FusedLinearResidual of a sharded module: what the ranks hand to the all-reduce sums up to the whole."""
    # more rows than the kernel takes, which a CPU does not have
    y, x, weight, sent = torch.randn(2, 30, 64), torch.randn(2, 30, 16), torch.randn(16, 64), []
    for rank in range(2):
        linear = torch.nn.Linear(32, 16, bias=False)
        linear.weight.data = weight[:, 32 * rank : 32 * rank + 32]
        plain = tp.ReducedLinearResidual(types.SimpleNamespace(linear=linear, post_norm=None), rank)
        plain.all_reduce = lambda z: sent.append(z) or z
        kernels.FusedLinearResidual(plain)(y[..., 32 * rank : 32 * rank + 32], x)
    torch.testing.assert_close(sum(sent), x + y @ weight.T)


def test_a_fused_module_leaves_few_rows_to_linear_sum():
    plain = tp.ReducedLinearResidual(types.SimpleNamespace(linear=torch.nn.Linear(32, 16), post_norm=None), 1)
    y, x, given = torch.randn(1, 1, 32), torch.randn(1, 1, 16), []
    plain.linear_sum = lambda *tensors: given.extend(tensors) or x
    assert kernels.FusedLinearResidual(plain)(y, x) is x
    wanted = (y, plain.linear.weight, None, plain.linear.bias, x)
    assert all(a is b for a, b in zip(given, wanted, strict=True))


def test_ranks_agree_on_which_linears_send_their_sums(monkeypatch):
    """Where one rank's kernel cannot, none does."""
    layers = [types.SimpleNamespace(linear=torch.nn.Linear(64 * i, 16), post_norm=None) for i in (1, 2, 3)]
    model = torch.nn.Module()
    model.tok_embeddings, model.other = torch.nn.Embedding(4, 16), torch.nn.Linear(4, 4)
    model.sums = torch.nn.ModuleList(tp.ReducedLinearResidual(layer, 0) for layer in layers)
    exchange = types.SimpleNamespace(supports_linear=lambda weight, scale, bias, K: K > 64)
    fake = types.SimpleNamespace(exchange=exchange, gather=lambda able: [able, [True, True, False]])
    monkeypatch.setattr(tp, "_ranks", fake)
    tp.agree_on_linear_sums(model, kernels.stored)
    assert [m.linear_sum for m in model.sums] == [None, tp.linear_sum, None]
    monkeypatch.setattr(tp, "_ranks", types.SimpleNamespace(exchange=None))
    tp.agree_on_linear_sums(model, None)  # nothing to agree on


@pytest.mark.parametrize("rank", range(2))
def test_a_linear_sends_its_sum_itself_where_it_can(rank, monkeypatch):
    """tp.linear_sum: by the linear's kernel; of what is not exchanged, or not sent, by an all-reduce of linears one of
    which has added the residual."""
    y, x, weight, sent = torch.randn(2, 1, 64), torch.randn(2, 1, 16), torch.randn(16, 64), []

    def linear(y, weight, scale, bias, norm, residual, *others):
        return y @ weight.T if residual is None else y @ weight.T + residual

    monkeypatch.setattr(torch.ops, "hotloop", types.SimpleNamespace(linear=linear))
    monkeypatch.setattr(tp, "_all_reduce", lambda z: sent.append(z) or z)
    for sends, exchanged in ((True, x.numel()), (False, x.numel()), (True, x.numel() - 2)):
        exchange = types.SimpleNamespace(sends=lambda z, sends=sends: sends, linear=lambda *tensors: tensors)
        fake = types.SimpleNamespace(rank=rank, world=2, exchange=exchange, exchanged={x.dtype: exchanged})
        monkeypatch.setattr(tp, "_ranks", fake)
        z = tp._linear_sum(y, weight, None, None, x)
        if sends and exchanged == x.numel():
            assert z == (y, weight, None, None, x) and not sent
        else:
            torch.testing.assert_close(sent.pop(), y @ weight.T + x * (rank == 0))


def test_only_slices_are_read(directories, monkeypatch):
    """Of every tensor a rank reads its part, not more: elements that reach memory, against those that it holds."""
    read, original = [], Weights.read
    monkeypatch.setattr(Weights, "read", lambda *a, **k: read.append(original(*a, **k)) or read[-1])
    monkeypatch.setattr(Weights, "__getitem__", lambda *a: pytest.fail("a whole tensor was read"))
    fake = types.SimpleNamespace(rank=1, world=4, check_same=lambda *a: None, exchange=None, exchanged={})
    monkeypatch.setattr(tp, "_ranks", fake)
    for name in ("wide", "mixtral-converted", "qwen3_moe", "stored-int4"):
        read.clear()
        model = load_model(directories[name], "cpu", torch.float32)
        held = sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
        assert sum(t.nbytes for t in read) <= 1.01 * held


def test_mistakes_in_shapes_are_told(directories, monkeypatch, tmp_path):
    """A tensor of the wrong shape is an error also where only a part of it would be read."""
    config = json.loads((directories["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    (tmp_path / "model.safetensors").symlink_to(directories["llama"] / "model.safetensors")
    fake = types.SimpleNamespace(rank=0, world=2, check_same=lambda *a: None, exchanged={})
    monkeypatch.setattr(tp, "_ranks", fake)
    with pytest.raises(ValueError, match="config.json implies"):
        load_model(tmp_path, "cpu", torch.float32)


# ----------------------------------------------------------------------------------------- programs under torchrun
ONE = ["--max_new_tokens", "12", "--temperature", "0", "--dtype", "fp32"]
TEXT = ["--prompt", "class Stack:", "--prompt", "def add(a, b):", "--stop", "Stack"]
LONG = ["--max_new_tokens", "3000", "--ignore_eos", "--dtype", "fp32"]
# A text that repeats itself, so that what looks up finds something; the draft's sampled proposals are not all kept.
CODE = ["--prompt", "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef", "--dtype", "fp32"]
CODE += ["--max_new_tokens", "24", "--ignore_eos"]
SPECULATION = {
    "lookup, auto": [*CODE, "--draft", "lookup", "--speculate_k", "auto", "--temperature", "0"],
    "int8": [*CODE, "--draft", "int8", "--speculate_k", "3", "--temperature", "0"],
    "draft, sampled": [*CODE, "--draft_checkpoint_path", DEMO / "draft", "--speculate_k", "3"]
    + ["--temperature", "1", "--seed", "7"],
}


def saboteur(argv: list[str]) -> None:
    """generate.py with something going wrong on one rank: RANK KIND, then the program's arguments."""
    import generate as program

    victim, kind, *argv = argv
    with lifeline.one_voice("generate.py"):
        if os.environ["RANK"] == victim:
            calls, features, read = [], Transformer.features, Weights.read

            def fail():
                if kind == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
                if kind == "defect":
                    raise KeyError("a defect")
                os.kill(os.getpid(), signal.SIGINT if kind == "interrupt" else signal.SIGKILL)

            def broken_features(*args):
                calls.append(1)
                if len(calls) == {"prefill": 1}.get(kind, 4):
                    fail()
                return features(*args)

            def broken_read(*args, **keywords):
                calls.append(1)
                return fail() if len(calls) == 5 else read(*args, **keywords)

            if kind in ("load", "memory"):
                Weights.read = broken_read
            elif kind in ("prefill", "decode", "defect", "interrupt"):
                Transformer.features = broken_features
            else:  # another checkpoint
                argv[argv.index("--checkpoint_path") + 1] = kind
        program.main(**vars(program.parser().parse_args(argv)))


def end_left(mark: str) -> list[int]:
    """End all processes whose environment holds the mark -> their ids. On Linux; elsewhere it finds none.

    torchrun puts its ranks into sessions of their own, so that its process group says nothing about them.
    """
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            if mark.encode() in file.read_bytes():
                found.append(int(file.parent.name))
                os.kill(found[-1], signal.SIGKILL)
    return found


def pairs(n: int) -> None:
    """n times over: two processes become ranks, add numbers up, leave, and end as any interpreter does.

    They are forked, and end without a collection of what was imported, since imports take longer than all the rest.
    """
    torch.set_num_threads(1)
    gc.freeze()
    for _ in range(n):
        ids = []
        for rank in range(2):
            ids.append(os.fork())
            if ids[-1] == 0:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with lifeline.one_voice("pairs"):
                    lifeline.join()
                    assert tp.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
                return
        codes = [os.waitstatus_to_exitcode(os.waitpid(i, 0)[1]) for i in ids]
        assert codes == [0, 0], codes
    print("all ended")


def torchrun(*argv, nproc: int = 2, stdin: str = "", script: Path = ROOT / "generate.py", flags=("--standalone",),
             interrupt: bool = False) -> types.SimpleNamespace:  # fmt: skip
    """Run a script under torchrun -> rc, out, lines (ours on stderr), codes (of the ranks, by torchrun's report),
    seconds; nothing may be left of it. interrupt: send SIGINT once something was printed; seconds count from there.
    """
    command = [sys.executable, "-m", "torch.distributed.run", *flags, f"--nproc_per_node={nproc}", str(script)]
    begin, mark = time.perf_counter(), secrets.token_hex(16)
    process = subprocess.Popen(
        [*command, *map(str, argv)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TEST_JOB": mark}, start_new_session=True,
        cwd=ROOT,
    )  # fmt: skip
    try:
        if interrupt:
            select.select([process.stdout], [], [], 60)
            begin = time.perf_counter()
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(stdin, timeout=60)
    finally:
        left = end_left(mark)
        process.kill()  # where it could not be found
    assert not left, f"processes were left behind: {err}"
    lines = [
        line for line in err.splitlines() if line.startswith(f"{script.stem}.py: ") or line.startswith("generate.py: ")
    ]
    return types.SimpleNamespace(rc=process.returncode, out=out, err=err, lines=lines,
                                 codes=dict(re.findall(r"rank +: (\d) .*\n +exitcode +: (-?\d+)", err)),
                                 seconds=time.perf_counter() - begin)  # fmt: skip


def two_agents(*argv) -> tuple:
    """Two machines of one rank each, simulated on this one: two torchruns that meet on loopback."""
    port = 30700 + os.getpid() % 1000
    flags = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={port}")
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(torchrun, *argv, nproc=1, flags=flags) for _ in range(2)]
        return tuple(job.result() for job in jobs)


def program_runs(folder: Path) -> dict:
    """Functions by name, each of which runs a program, with what goes wrong in it, and returns how it ended."""
    truncated, other, sharded, short = (folder / name for name in ("truncated", "other", "sharded", "short"))
    for copy in (truncated, other, sharded, short):
        copy.mkdir()
        for file in DEMO.iterdir():
            if file.is_file() and file.name != "model.safetensors":
                (copy / file.name).symlink_to(file)
    data = (DEMO / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[: len(data) // 2])
    flip = bytes(b ^ 1 for b in data[-4096:])  # as long, with other values
    (other / "model.safetensors").write_bytes(data[:-4096] + flip)
    weights = load_file(DEMO / "model.safetensors")
    shards = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in sorted(set(shards.values())):
        save_file({name: weights[name] for name in weights if shards[name] == file}, sharded / file)
        (short / file).write_bytes((sharded / file).read_bytes())
    os.truncate(short / file, (short / file).stat().st_size // 2)  # the second
    for copy in (sharded, short):
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    def sabotaged(rank, kind, checkpoint=DEMO):
        argv = ("saboteur", rank, kind, *LONG, "--checkpoint_path", checkpoint)
        return lambda: torchrun(*argv, script=Path(__file__))

    jobs = {
        "text": lambda: torchrun(*ONE, *TEXT, "--json"),
        "chat": lambda: torchrun(*ONE, "--interactive", "--json", stdin="hello\nclass A:\n"),
        "agents": lambda: two_agents(*ONE, *TEXT, "--json"),
        "eval": lambda: torchrun("--limit_tokens", "300", "--dtype", "fp32", "--json", script=ROOT / "eval.py"),
        "benchmark": lambda: torchrun("--checkpoint_path", "demo", "--device", "cpu", "--new_tokens", "4", "--runs",
                                      "1", "--no_compile", "--json", "--dtype", "fp32", script=ROOT / "benchmark.py"),
        "kill 1 load": sabotaged(1, "load"),
        "kill 1 prefill": sabotaged(1, "prefill"),
        "kill 1 decode": sabotaged(1, "decode"),
        "kill 0 decode": sabotaged(0, "decode"),
        "memory 1": sabotaged(1, "memory"),
        "defect 1": sabotaged(1, "defect"),
        "truncated 1": sabotaged(1, truncated),
        "truncated shard 1": sabotaged(1, short, sharded),
        "other 1": sabotaged(1, other),
        "interrupt": lambda: torchrun(*LONG, interrupt=True),
        "interrupt 1": sabotaged(1, "interrupt"),
        "heads": lambda: torchrun(*ONE, nproc=3),
        "flag": lambda: torchrun("--nonsense"),
        "mps": lambda: torchrun(*ONE, "--device", "mps"),
    }  # fmt: skip
    return jobs | {name: partial(torchrun, *argv, "--json") for name, argv in SPECULATION.items()}


@pytest.fixture
def runs(programs):
    """A function of a name: how that program run ended."""
    return programs


def one(*argv, script="generate.py", stdin="") -> dict:
    """The JSON line of one process."""
    done = subprocess.run(
        [sys.executable, script, *argv, "--json"], input=stdin, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"out": done.stdout.splitlines()[:-1]}


def test_the_programs_just_work(runs):
    text = one(*ONE, *TEXT)
    for name in ("text", "chat", "eval", "benchmark"):
        assert runs(name).rc == 0, runs(name).err
    got = runs("text").out.splitlines()
    assert got[:-1] == text["out"]  # once, not once a rank
    assert [s["tokens"] for s in json.loads(got[-1])["samples"]] == [s["tokens"] for s in text["samples"]]
    agents = runs("agents")
    assert [a.rc for a in agents] == [0, 0], agents[0].err + agents[1].err
    (out,) = (a.out for a in agents if a.out)  # one of the two speaks
    assert [s["tokens"] for s in json.loads(out.splitlines()[-1])["samples"]] == [s["tokens"] for s in text["samples"]]
    assert [s["finish_reason"] for s in text["samples"]] == ["stop", "length"]  # both, or stop strings are not tried


@pytest.mark.parametrize("name", SPECULATION)
def test_speculation_gives_one_process_tokens(name, runs, capsys):
    """Sampled ones, too: all ranks draw the numbers of one process. Proposals are as good, which tokens do not tell;
    but for k that depends on the clock, and is rank 0's."""
    import generate as program

    assert runs(name).rc == 0, runs(name).err
    program.main(**vars(program.parser().parse_args([*map(str, SPECULATION[name]), "--json"])))
    got, expected = (json.loads(out.splitlines()[-1]) for out in (runs(name).out, capsys.readouterr().out))
    assert got["tokens"] == expected["tokens"] and len(got["tokens"]) == 24
    if "auto" not in name:
        for figure in ("steps", "acceptance_by_position"):
            assert got["speculation"][figure] == expected["speculation"][figure]
        assert got["speculation"]["steps"] < 20


def test_chat(runs):
    chat = json.loads(runs("chat").out.splitlines()[-1])
    expected = one(*ONE, "--interactive", stdin="hello\nclass A:\n")
    assert len(chat["samples"]) == 2
    assert [s["tokens"] for s in chat["samples"]] == [s["tokens"] for s in expected["samples"]]


def test_eval_and_benchmark(runs):
    result = json.loads(runs("eval").out.splitlines()[-1])
    assert result["perplexity"] == pytest.approx(
        one("--limit_tokens", "300", "--dtype", "fp32", script="eval.py")["perplexity"], 1e-4
    )
    row = json.loads(runs("benchmark").out.splitlines()[-1])
    assert row["ranks"] == 2 and row["all_reduce"] == "gloo" and row["percent_communication"] > 0
    assert row["command"].startswith("torchrun --nproc_per_node=2 benchmark.py")
    assert 0 < row["start_s"] < runs("benchmark").seconds  # of the rank that prints


DIED = "generate.py: rank {} died (killed, or out of memory); all ranks end"
FAULTS = {
    "kill 1 load": DIED.format(1),
    "kill 1 prefill": DIED.format(1),
    "kill 1 decode": DIED.format(1),
    "kill 0 decode": DIED.format(0),
    "memory 1": "generate.py: rank 1: CUDA out of memory. Tried to allocate 2 GiB",
    "defect 1": "generate.py: rank 1: KeyError: 'a defect'",
    "truncated 1": "generate.py: rank 1: .*model.safetensors: truncated or corrupt",
    "truncated shard 1": "generate.py: .*ranks must read the same checkpoint: rank 1 has .*",  # it is shorter
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_all_ranks_with_one_line(name, runs):
    run, expected = runs(name), FAULTS[name]
    assert run.rc != 0 and run.seconds < 60
    assert len(run.lines) == 1, run.err
    assert run.lines[0].startswith(expected) or re.match(expected, run.lines[0]), run.err
    assert run.err.count("Traceback") == 1  # torchrun's own


@pytest.mark.parametrize("name, line", [
    ("heads", f"{re.escape(str(DEMO))}: 4 heads cannot be split over 3 ranks; use a number of ranks that divides 4"),
    ("flag", "unrecognized arguments: --nonsense"),
    ("mps", "--device mps: (not available on this machine|under torchrun it must be cuda or cpu).*"),
    ("other 1", ".*: ranks must read the same checkpoint: rank 1 has .*, rank 0 .*"),
])  # fmt: skip
def test_bad_input_is_one_line_of_rank_0(name, line, runs):
    run = runs(name)
    assert run.rc != 0 and len(run.lines) == 1 and run.seconds < 60, run.err
    assert re.fullmatch(f"generate.py: ({line})", run.lines[0])
    assert run.codes["0"] == "2", run.err


def test_a_failure_right_after_joining_is_heard():
    """Whoever lets ranks in takes no more of a connection than the word: what follows may be a reason to end."""
    line, found = lifeline.Lifeline.__new__(lifeline.Lifeline), queue.Queue()
    line.world, line.peers = 2, {}

    def connect():
        port, token = found.get()
        with socket.create_connection(("localhost", port)) as rank:
            rank.sendall(f"{token} 1\n".encode() + b"why it failed\n")

    thread = threading.Thread(target=connect)
    thread.start()
    line._accept(types.SimpleNamespace(broadcast=found.put))
    thread.join()
    (peer,) = line.peers
    with peer:
        assert line.peers[peer] == 1 and peer.recv(100) == b"why it failed\n"


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")


@needs_proc
def test_what_is_left_is_found():
    """A process in a session of its own: `torchrun` above would tell of it."""
    mark = secrets.token_hex(16)
    with subprocess.Popen(["sleep", "60"], env=os.environ | {"TEST_JOB": mark}, start_new_session=True) as process:
        deadline = time.monotonic() + 20
        while not (left := end_left(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)  # a program that has just begun may not have its environment yet
        assert left == [process.pid] and process.wait() == -signal.SIGKILL


@needs_proc
def test_20_starts_and_stops_leave_nothing():
    """All at one port. Every run of a program above is one more start and stop, of which nothing may be left."""
    mark = secrets.token_hex(16)
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT),
                   "MASTER_PORT": str(31700 + os.getpid() % 1000), "TEST_JOB": mark}  # fmt: skip
    try:
        done = subprocess.run([sys.executable, __file__, "pairs", "20"], capture_output=True, text=True, timeout=60,
                              env=os.environ | environment)  # fmt: skip
    finally:
        left = end_left(mark)
    assert done.returncode == 0 and done.stdout == "all ended\n" and not left, done.stderr


def test_interrupt_ends_everything(runs):
    """Of torchrun, which reports no exit codes then, and would kill the ranks if they went on for half a minute."""
    run = runs("interrupt")
    assert run.rc != 0 and run.out and not run.lines and run.seconds < 25, run.err


def test_interrupt_of_a_rank_ends_all(runs):
    run = runs("interrupt 1")
    assert run.rc != 0 and not run.lines and run.seconds < 60, run.err
    assert run.codes and set(run.codes.values()) == {"130"}, run.err


@pytest.mark.gpu
@pytest.mark.parametrize("nproc", (2, 4))
@pytest.mark.parametrize("more", ("", "--quant int8", "--compile"))
def test_gpus_give_one_process_tokens(more, nproc):
    """By exchanges over NVLink, where they are faster, also in a CUDA graph; and by NCCL alone."""
    if torch.cuda.device_count() < nproc:
        pytest.skip(f"needs {nproc} GPUs: gloo was tested instead")
    expected = one(*ONE, *TEXT, *more.split())["samples"]
    for choice in ("auto", "nccl"):
        run = torchrun(*ONE, *TEXT, *more.split(), "--json", "--all_reduce", choice, nproc=nproc)
        assert run.rc == 0, run.err
        got = json.loads(run.out.splitlines()[-1])["samples"]
        assert [s["tokens"] for s in got] == [s["tokens"] for s in expected], choice


def test_only_small_tensors_are_exchanged(monkeypatch):
    """NCCL takes what is larger than what was measured to be faster, and what is no whole number of pieces."""
    exchange = kernels_cuda.Exchange(torch.zeros(4 * 2 * 64, dtype=torch.int64), [0, 0], 0)
    assert (exchange.room, exchange.limit) == (64, 512)
    fake = types.SimpleNamespace(world=2, exchange=exchange, exchanged={torch.bfloat16: 256, torch.float32: 64})
    monkeypatch.setattr(tp, "_ranks", fake)
    x = torch.zeros(300, dtype=torch.bfloat16)
    assert [tp._exchanges(x[:n]) for n in (4, 256, 260, 6, 0)] == [True, True, False, False, False]
    assert tp._exchanges(x.float()[:64]) and not tp._exchanges(x.float()[:66]) and not tp._exchanges(x.half()[:4])
    x = torch.zeros(8, 1, 16, dtype=torch.bfloat16)
    assert exchange.sends(x) and exchange.sends(x[:1]) and not exchange.sends(x.float()), "2 x 64 values"
    assert not exchange.sends(torch.zeros(9, 1, 2).bfloat16()) and not exchange.sends(torch.zeros(8, 1, 18).bfloat16())
    with pytest.raises(RuntimeError, match="9 GPUs"):
        kernels_cuda.Exchange(torch.zeros(64, dtype=torch.int64), [0] * 9, 0)


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fake = types.SimpleNamespace(world=2, local_rank=1)
    with pytest.raises(ValueError, match="2 ranks on a machine with 1 GPUs: give --nproc_per_node=1 or fewer"):
        tp.Ranks.device(fake, torch.device("cuda"))
    with pytest.raises(ValueError, match="each rank takes its own GPU"):
        tp.Ranks.device(fake, torch.device("cuda:0"))
    with pytest.raises(ValueError, match="under torchrun it must be cuda or cpu"):
        tp.Ranks.device(fake, torch.device("mps"))


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(Path(sys.argv[2]))
    elif sys.argv[1] == "pairs":
        pairs(int(sys.argv[2]))
    else:
        saboteur(sys.argv[2:])
