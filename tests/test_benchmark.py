"""What benchmark.py refuses to count, and what it repeats: on the bundled model, eager, in a few runs of few tokens."""

import json
from pathlib import Path

import pytest
import torch

import benchmark
from checkpoint import load_model
from machine import peak_memory_gb

DEMO = Path(benchmark.__file__).parent / "demo"
pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ["--checkpoint_path", str(DEMO), "--device", "cpu", "--no_compile", "--runs", "1", "--new_tokens", "12"]


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch):
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 20.0)  # a second, and it would be remembered


def rows(*flags: str, capsys) -> list[dict]:
    benchmark.main(**vars(benchmark.parser().parse_args([*FEW, *flags, "--json"])))
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_every_batch_with_every_length_in_every_mode(capsys):
    found = rows("--batch", "1", "3", "--prompt_tokens", "5", "40", "--quant", "none", "int8", capsys=capsys)
    settings = [(r["mode"], r["batch"], r["prompt_tokens"]) for r in found]
    assert settings == [(mode, B, N) for mode in ("bf16", "int8") for B in (1, 3) for N in (5, 40)]
    assert all(r["unlikely"] == 0 and r["tok_s"] > 0 and r["runs"] == 1 for r in found)
    assert [r["cache_tokens"] for r in found[:3]] == [17, 52, 52], "what is allocated stays"
    assert [r["start_s"] is not None for r in found] == [True] + 7 * [False]


@pytest.mark.parametrize("off", ["nothing", "positions", "logits", "tokens", "cache", "numbers"])
def test_a_fast_wrong_step_does_not_count(off, monkeypatch):
    torch.manual_seed(0)
    model = load_model(DEMO, "cpu", torch.float32)
    features, logits, generate = model.features, model.logits, benchmark.generate

    def wrong_positions(tokens, input_pos=None, slots=None):
        one = input_pos is not None and tokens.shape[1] == 1
        return features(tokens, input_pos // 2 if one else input_pos, slots)

    if off == "positions":
        monkeypatch.setattr(model, "features", wrong_positions)
    if off == "logits":
        monkeypatch.setattr(model, "logits", lambda h: logits(h).roll(1 if h.shape[1] == 1 else 0, -1))
    if off == "tokens":
        monkeypatch.setattr(benchmark, "generate", lambda *a, **b: ((t + 1) % 500 for t in generate(*a, **b)))
    if off == "cache":

        def spoil(*a, **b):
            yield from generate(*a, **b)
            for layer in model.layers:
                layer.attention.cache.k[:, :, 9:].zero_()

        monkeypatch.setattr(benchmark, "generate", spoil)
    if off == "numbers":
        monkeypatch.setattr(model, "logits", lambda h: logits(h) * torch.nan)
    n = 8 if off == "cache" else 20
    settings = dict(prompt_tokens=9, new_tokens=n, batch=2, temperature=0.8, top_k=5, compile=False, runs=1)
    if off == "nothing":
        figures = benchmark.measure(model, **settings)
        assert figures["unlikely"] == 0 and figures["logits_error"] < 1e-5 and figures["rounding_error"] < 1e-5
    else:
        with pytest.raises(ValueError, match="what was measured is wrong, and does not count: logits are off"):
            benchmark.measure(model, **settings)


@pytest.mark.parametrize("dtype, kv_dtype", [(torch.bfloat16, None), (torch.bfloat16, "fp8"), (torch.float32, "fp8")])
@pytest.mark.parametrize("layers, more", [(6, {}), (30, {}), (12, dict(n_experts=8, n_experts_per_token=2))], ids=str)
def test_rounding_counts_for_what_it_is(dtype, kv_dtype, layers, more):
    """What is right of a deep model, of experts or of an fp8 cache would be wrong of others."""
    torch.manual_seed(0)
    args = benchmark._shape(128, layers, 4, 2, 256, 300, 512, head_dim=32, **more)
    weights = benchmark.random_weights(args, "cpu", dtype)
    wide = ((name, t * (1 if "norm" in name or "emb" in name else 4)) for name, t in weights)  # layers count
    model = benchmark.build_model(args, wide, "cpu", dtype)
    model.setup_caches(1, 1, kv_dtype)
    settings = dict(prompt_tokens=9, new_tokens=20, batch=2, compile=False, runs=1)
    right = benchmark.measure(model, **settings)
    assert 0 < right["logits_error"] < 1.2 * right["rounding_error"]
    assert dtype != torch.float32 or right["logits_error"] < 0.005  # the reference rounds keys to fp8, too
    for layer in model.layers:
        layer.attention.attended = lambda q, *rest, attended=layer.attention.attended: (
            attended(q, *rest) * (0.5 if q.shape[2] == 1 else 1)
        )
    with pytest.raises(ValueError, match="does not count: logits are off"):
        benchmark.measure(model, **settings)


def test_peak_memory_counts_anew():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux alone lets a process forget its peak")
    device = torch.device("cpu")
    torch.ones(100_000_000)
    high = peak_memory_gb(device)
    benchmark.forget_peak(device)
    assert 0 < peak_memory_gb(device) < high - 0.3


def test_a_process_that_fails_to_start_is_one_line():
    with pytest.raises(ValueError, match="nowhere"):
        benchmark.measure_start(["--checkpoint_path", "nowhere", "--device", "cpu"])


def test_two_starts(monkeypatch):
    """The second finds what the first has kept, and neither what was there before."""
    seen = []

    def run(command, env, **_):
        folder = Path(env["XDG_CACHE_HOME"])
        seen.append((command[2:], sorted(p.name for p in folder.iterdir())))
        (folder / "kept").write_text("")
        line = json.dumps({"model": "m", "mode": "int8", "start_s": 9.0 - len(seen) if len(seen) < 3 else None})
        return benchmark.subprocess.CompletedProcess(command, 0, f"table\n{line}\n", "")

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    row = benchmark.measure_start(["--shape", "m"])
    assert row == {"kind": "start", "model": "m", "mode": "int8", "cold_s": 8.0, "warm_s": 7.0}
    assert seen == [(["--shape", "m", "--runs", "1", "--json"], kept) for kept in ([], ["kept"])]
    with pytest.raises(ValueError, match="does not tell when a process began"):
        benchmark.measure_start([])
