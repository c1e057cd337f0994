"""The CPU linears against float32 math on dequantised weights: rows, odd sizes, bias, dtypes, compile, threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels_cpu as k

ROOT = Path(__file__).parent.parent
needs_cpp = pytest.mark.skipif("not __import__('kernels_cpu').available()", reason="no C++ compiler")


def quantized(kind, N, K, groupsize=32, seed=0):
    """A linear of the kind as (function of x and bias, its dequantised float32 weight, function to dequantise)."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "bf16":
        w = torch.randn(N, K, generator=rng).bfloat16()
        return (lambda x, bias=None: k.linear_bf16(x, w, bias)), w.float(), None
    if kind == "int8":
        w = torch.randint(-128, 128, (N, K), generator=rng, dtype=torch.int8)
        scale = torch.rand(N, generator=rng) / 100
        run = lambda x, bias=None: k.linear_int8(x, w, scale, bias)  # noqa: E731
        return run, w * scale[:, None], lambda dtype: k.dequantize_int8(w, scale, dtype)
    packed, (q, scale, zero) = int4(N, K, groupsize, rng)
    dense = ((q - zero[..., None].float()) * scale[..., None].float()).flatten(1)
    run = lambda x, bias=None: k.linear_int4(x, *packed, groupsize, bias)  # noqa: E731
    return run, dense, lambda dtype: k.dequantize_int4(*packed, groupsize, K, dtype)


def int4(N, K, groupsize, rng):
    q = torch.randint(0, 16, (N, K // groupsize, groupsize), generator=rng, dtype=torch.uint8)
    scale, zero = (torch.rand(2, N, K // groupsize, generator=rng) * torch.tensor([0.01, 15])[:, None, None]).half()
    even, odd = q.flatten(1)[:, 0::2], q.flatten(1)[:, 1::2]
    return k.pack_int4(even | odd << 4, scale - 0.002, zero, groupsize), (q, scale - 0.002, zero)


def close(y, x, w, bias=None):
    """Within the rounding of y's dtype, and of float32 sums whose terms may cancel."""
    want = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    size = (x.double().abs() @ w.double().abs().T).float()
    error = (y.double() - want).abs().float()
    assert y.dtype == x.dtype and y.shape == want.shape
    assert (error <= want.abs().float() * (2**-8 if y.dtype == torch.bfloat16 else 2**-23) + 2e-6 * size).all()


KINDS = [("bf16", 0), ("int8", 0), ("int4", 32), ("int4", 64), ("int4", 128)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("M", [1, 2, 3, 5, 8, 17, 100])
@pytest.mark.parametrize("kind, groupsize", KINDS)
def test_linear(kind, groupsize, M, dtype):
    for N, K in [(1, 128), (37, 384), (256, 1024), (515, 2176)] + ([] if groupsize else [(5, 7), (19, 33), (70, 1111)]):
        run, w, dequantize = quantized(kind, N, K, groupsize)
        x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
        if M <= k.max_rows(kind, dtype) or not dequantize:
            dense = w
        else:  # the weight is rounded to the dtype of the product on this way
            dense = dequantize(dtype if k._fast_bf16() else torch.float32).float()
        close(run(x), x, dense)
        close(run(x, bias), x, dense, bias)


@pytest.mark.parametrize("kind, groupsize", KINDS[1:])
def test_dequantize(kind, groupsize):
    for N, K in [(1, 128), (37, 384), (515, 2176)]:
        _, w, dequantize = quantized(kind, N, K, groupsize)
        assert torch.equal(dequantize(torch.float32), w)
        assert torch.equal(dequantize(torch.bfloat16), w.bfloat16())


@pytest.mark.parametrize("kind, groupsize", KINDS[:3])
def test_leading_dims_and_strides(kind, groupsize):
    run, w, _ = quantized(kind, 64, 256, groupsize)
    x = torch.randn(2, 3, 256)
    close(run(x), x, w)
    close(run(x[0, 0]), x[0, 0], w)
    strided = torch.randn(256, 4).T
    assert torch.equal(run(strided), run(strided.contiguous()))
    assert run(x[:0]).shape == (0, 3, 64)


@pytest.mark.parametrize("groupsize", [32, 64, 128])
def test_pack_int4_round_trip(groupsize):
    for K in (128, 384, 1024):
        rng = torch.Generator().manual_seed(1)
        packed, (q, scale, zero) = int4(9, K, groupsize, rng)
        w, *rest = k.unpack_int4(*packed, groupsize, K)
        assert torch.equal(torch.stack([w & 15, w >> 4], dim=-1).flatten(1), q.flatten(1))
        assert torch.equal(rest[0], scale) and torch.equal(rest[1], zero)
    with pytest.raises(ValueError, match="groupsize 48"):
        k.pack_int4(torch.zeros(2, 48, dtype=torch.uint8), torch.ones(2, 2), torch.ones(2, 2), 48)


@needs_cpp
@pytest.mark.parametrize("M", [1, 3, 100])
@pytest.mark.parametrize("kind, groupsize", KINDS[:3])
def test_compile(kind, groupsize, M):
    torch._dynamo.reset()
    run, w, _ = quantized(kind, 64, 256, groupsize)
    x, bias = torch.randn(M, 256).bfloat16(), torch.randn(64).bfloat16()
    compiled = torch.compile(lambda x: run(x * 2, bias) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), run(x * 2, bias) + 1, rtol=2**-7, atol=2**-5)


def stack(kind: str, E: int, N: int, K: int):
    """A stack of E linears as (function of x and each row's expert, dequantised float32 weight [E, N, K])."""
    rng = torch.Generator().manual_seed(0)
    if kind == "bf16":
        w = torch.randn(E, N, K, generator=rng).bfloat16()
        return (lambda x, e: torch.ops.hotloop.experts_bf16(x, w, e)), w.float()
    if kind == "int8":
        w, scale = torch.randint(-128, 128, (E, N, K), generator=rng, dtype=torch.int8), torch.rand(E, N) / 100
        return (lambda x, e: torch.ops.hotloop.experts_int8(x, w, scale, e)), w * scale[..., None]
    (packed, scales), (q, scale, zero) = int4(E * N, K, 32, rng)
    packed, scales = packed.view(E, N, -1), scales.view(E, N, -1)
    dense = ((q - zero[..., None].float()) * scale[..., None].float()).view(E, N, K)
    return (lambda x, e: torch.ops.hotloop.experts_int4(x, packed, scales, 32, e)), dense


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_experts(kind, dtype):
    run, dense = stack(kind, 5, 37, 384)
    for chosen in ([3], [0, 4, 0, 1], [2] * 3, []):
        x, expert = torch.randn(len(chosen), 384).to(dtype), torch.tensor(chosen, dtype=torch.int64)
        y = run(x, expert)
        assert y.shape == (len(chosen), 37) and y.dtype == dtype
        for n, e in enumerate(chosen):
            close(y[n], x[n], dense[e])
    compiled = torch.compile(lambda x, e: run(x * 2, e) + 1, fullgraph=True)
    x, expert = torch.randn(3, 384).to(dtype), torch.tensor([4, 0, 4])
    torch.testing.assert_close(compiled(x, expert), run(x * 2, expert) + 1, rtol=2**-7, atol=2**-5)


@needs_cpp
@pytest.mark.parametrize("kind, groupsize", KINDS[:3])
def test_threads(kind, groupsize):
    run, w, _ = quantized(kind, 2051, 1024, groupsize)
    x = torch.randn(3, 1024)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(x))
    finally:
        torch.set_num_threads(before)
    close(results[0], x, w)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_cpp
def test_bad_input_is_refused():
    x, w, scale = torch.randn(1, 64), torch.zeros(8, 64, dtype=torch.int8), torch.ones(8)
    for bad in [(w[:, :32], scale), (w, scale[:7]), (w.float(), scale), (w, scale.half())]:
        with pytest.raises(RuntimeError):
            torch.ops.hotloop.linear_int8(x, *bad, None)
    with pytest.raises(RuntimeError, match="bfloat16 or float32"):
        torch.ops.hotloop.linear_int8(x.half(), w, scale, None)


FALLBACK = """
import sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import kernels_cpu as k, test_kernels_cpu as t
assert not k.available()
for kind, groupsize in t.KINDS:
    run, w, dequantize = t.quantized(kind, 37, 384, groupsize)
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = torch.randn(3, 384).to(dtype), torch.randn(37).to(dtype)
        assert dequantize is None or torch.equal(dequantize(dtype), w.to(dtype))
        inside = dtype if kind == "bf16" or k._fast_bf16() else torch.float32
        want = torch.nn.functional.linear(x.to(inside), w.to(inside), bias.to(inside)).to(dtype)
        torch.testing.assert_close(run(x, bias), want)
"""


@pytest.mark.parametrize("name, value, lines", [("HOTLOOP_NO_CPP", "1", 0), ("CXX", "no-such", 1), ("CXX", "false", 1)])
def test_fallback(name, value, lines, tmp_path):
    env = {**os.environ, name: value, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FALLBACK.format(root=str(ROOT))]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == lines, done.stderr
    assert not list(tmp_path.glob("*.so")) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("fast", [False, True])
def test_many_rows_whatever_pytorch_is_fast_at(fast, monkeypatch):
    """Where PyTorch's bf16 products are slow, many rows are multiplied in float32, and rounded once."""
    monkeypatch.setattr(k, "_fast_bf16", lambda: fast)
    for kind, groupsize in KINDS[:3]:
        run, w, dequantize = quantized(kind, 70, 384, groupsize)
        x, bias = torch.randn(130, 384).bfloat16(), torch.randn(70).bfloat16()
        close(run(x, bias), x, dequantize(torch.bfloat16).float() if fast and dequantize else w, bias)


@needs_cpp
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-march=x86-64"])
def test_plain_vectors(flags, tmp_path):
    """The code for CPUs without AVX-512 is right too: built for AVX2, and for the oldest 64-bit CPU."""
    probe = subprocess.run(["c++", flags, "-xc++", "-c", "-", "-o", os.devnull], input=b"", capture_output=True)
    if probe.returncode:
        pytest.skip("not x86")
    if flags == "-mno-avx512f" and "avx512f" not in k._cpu_flags():
        pytest.skip("no AVX-512 here: what the other tests build is this")
    env = {**os.environ, "HOTLOOP_CXXFLAGS": flags, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    few = "test_dequantize or (test_linear and (-3- or -8- or -17-))"
    done = subprocess.run([*command, "-k", few], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
