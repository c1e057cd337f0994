"""Each kernel against its plain PyTorch reference: on a GPU where there is one, else under Triton's interpreter.

The interpreter is chosen when Triton is imported, for the whole process, so on a CPU these tests run in a second
pytest of their own, beside the first: conftest.py starts it, and the first test below looks at how it ended.
"""

import copy
import gc
import os
import weakref

import pytest
import torch
import torch.nn.functional as F

import benchmark_check
import kernels
import kernels_attend
import kernels_experts
import kernels_top_k
import model as m
import quantize
import tp

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

if not (INTERPRETED or GPU):

    def test_kernels_under_the_interpreter(kernel_tests):
        pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs the kernels on a CPU")
        process, output = kernel_tests
        code = process.wait()
        output.seek(0)
        text = output.read()
        assert code == 0 and "passed" in text, text[-5000:]

    @pytest.mark.gpu
    def test_kernels_on_a_gpu():
        pytest.skip("needs a CUDA GPU: the kernels were tested under Triton's interpreter instead")

    @pytest.mark.parametrize("capability, compiler, triton, line", [
        ((7, 5), "gcc", True, "this GPU is older than compute capability 8.0"),
        ((9, 0), None, True, "Triton needs a C compiler (gcc or clang)"),
        ((9, 0), "gcc", False, "Triton is not installed"),
    ])  # fmt: skip
    def test_a_line_says_why_plain_pytorch_runs(capability, compiler, triton, line, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(kernels.shutil, "which", lambda name: compiler)
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setitem(kernels.sys.modules, "triton", kernels.shutil if triton else None)
        assert not kernels._find_triton()
        assert capsys.readouterr().err == f"kernels: {line}, plain PyTorch runs instead\n"

    def test_without_triton_the_reference_runs():
        x, w = torch.randn(2, 64), torch.randn(8, 64)
        assert not kernels.use_triton(x)
        torch.testing.assert_close(kernels.linear(x, w), x @ w.T)
        assert kernels.read_sum(torch.ones(1000)).sum() == 1000
        assert all(torch.equal(a, b) for a, b in zip(kernels.top_k(x, 5), x.topk(5), strict=True))

else:

    def stored(kind: str, N: int, K: int, group: int):
        """Random (weight, scale) of a kind."""
        if kind == "float":
            return torch.randn(N, K, device=DEVICE), None
        if kind == "int8":
            return torch.randint(-127, 128, (N, K), dtype=torch.int8, device=DEVICE), torch.rand(N, device=DEVICE)
        if kind == "fp8":
            return torch.randn(N, K, device=DEVICE).to(torch.float8_e4m3fn), torch.rand(N, device=DEVICE)
        q = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=DEVICE)
        scale, zero = torch.rand(2, N, K // group, device=DEVICE).half()
        return q, kernels.join_scales(scale, 15 * zero)

    def relative(a, b):
        return ((a.double() - b.double()).norm() / b.double().norm()).item()

    KINDS = [("float", 0), ("int8", 0), ("fp8", 0), ("int4", 32), ("int4", 64), ("int4", 128)]

    @pytest.fixture(autouse=True)
    def triton_alone(monkeypatch):
        """Also where kernels_cuda.py would take over."""
        monkeypatch.setattr(kernels, "_kernels_cuda", lambda: None)
        torch.manual_seed(0)

    ROWS = {kind: range(1, 17) if kind in KINDS[:4] else (1, 3, 16) for kind in KINDS}

    @pytest.mark.parametrize("kind, group, M", [(*kind, M) for kind in KINDS for M in ROWS[kind]])
    def test_linear_of_few_rows(kind, group, M):
        x, w = torch.randn(M, 384, device=DEVICE), stored(kind, 37, 384, group)
        expected = kernels.linear_reference(x.double(), kernels.dequantize(*w).double())
        # int4 rounds x to 20 bits of the largest in its group
        assert relative(kernels.linear(x, *w), expected) < (4e-6 if kind == "int4" else 2e-6)

    def test_linear_of_more_rows_than_triton_takes(monkeypatch):
        """Quantized, where kernels_cuda.py goes over the weight several times, or would if its columns were others."""
        kernels._triton()
        x, w = torch.randn(20, 384, device=DEVICE).bfloat16(), stored("int8", 37, 384, 0)
        monkeypatch.setattr(kernels, "_quantized_m", lambda: 32)
        assert kernels.few_rows(x, w[0]) and not kernels.few_rows(x) and not kernels.few_rows(x, w[0].bfloat16())
        assert not kernels.few_rows(x.float(), w[0]) and not kernels.few_rows(x.repeat(2, 1), w[0])
        y = kernels.linear(x, *w)
        assert torch.equal(y, kernels.linear_reference(x, *w))

    @pytest.mark.parametrize("kind, group", KINDS[:4])
    @pytest.mark.parametrize("activation", ["", "silu", "gelu", "gelu_tanh"])
    @pytest.mark.parametrize("M", [1, 3, 16])
    def test_linear_with_everything_around_it(kind, group, activation, M):
        kernels._triton()
        N, K = 266, 384
        x, w = torch.randn(1, M, K, device=DEVICE) + 0.5, stored(kind, N, K, group)
        bias, norm = torch.randn(N, device=DEVICE), torch.rand(K, device=DEVICE)
        residual = torch.randn(1, M, N // 2 if activation else N, device=DEVICE)
        around = (bias, norm, residual, 1e-5, 1.0, activation)
        expected = kernels.linear_reference(x, kernels.dequantize(*w), None, *around)
        assert relative(torch.ops.hotloop.linear(x, *w, *around), expected) < 5e-6
        assert relative(kernels.linear_reference(x, *w, *around), expected) < 5e-6

    @pytest.mark.parametrize("kind, group", KINDS)
    @pytest.mark.parametrize("spread", [1.0, 1000.0])
    @pytest.mark.parametrize("M", [1] + [2, 5, 8, 16] * GPU)  # the interpreter's products of bf16 matrices are wrong
    def test_linear_in_bf16(kind, group, spread, M):
        # another path than float32's: packed loads, fewer digits; within a unit of bf16's last place
        x, w = torch.randn(M, 384, device=DEVICE).bfloat16(), stored(kind, 37, 384, group)
        x[:, ::50] *= spread  # activations of language models have a few that are so much larger
        norm = torch.rand(384, device=DEVICE).bfloat16()
        w = (w[0].bfloat16() if kind == "float" else w[0], w[1])
        kernels._triton()
        for n in (None, norm):
            y = torch.ops.hotloop.linear(x, *w, None, n, None, 1e-5, 0.0, "")
            h = x.double() if n is None else F.rms_norm(x.double(), (384,), n.double(), 1e-5)
            expected = h @ kernels.dequantize(*w).double().T
            assert relative(y, expected) < 2.0 ** (-8 if GPU and M == 1 else -7)  # normalized rows are rounded to bf16,
            # and the interpreter truncates to it

    @pytest.mark.parametrize("kind, group", KINDS)
    @pytest.mark.parametrize("K", [128, 256])
    def test_linear_of_few_columns(kind, group, K):
        for M in (3, 16):
            x, w = torch.randn(M, K, device=DEVICE), stored(kind, 70, K, group)
            if GPU:
                x, w = x.bfloat16(), (w[0].bfloat16() if kind == "float" else w[0], w[1])
            expected = x.double() @ kernels.dequantize(*w).double().T
            assert relative(kernels.linear(x, *w), expected) < (2.0**-7 if GPU else 4e-6)

    def test_norms_of_another_dtype_than_the_rows():
        x, w, norm = (
            torch.randn(1, 384, device=DEVICE).bfloat16(),
            stored("int8", 37, 384, 0),
            torch.rand(384, device=DEVICE),
        )
        kernels._triton()
        y = torch.ops.hotloop.linear(x, *w, None, norm, None, 1e-5, 0.0, "")
        expected = F.rms_norm(x.double(), (384,), norm.double(), 1e-5) @ kernels.dequantize(*w).double().T
        assert relative(y, expected) < 2.0**-7

    @pytest.mark.parametrize("K", [66, 1 << 16])
    def test_columns_that_do_not_fit_in_words_or_registers(K):
        x, w = torch.randn(1, K, device=DEVICE), stored("int8", 5, K, 0)
        expected = kernels.linear_reference(x.double(), kernels.dequantize(*w).double())
        assert relative(kernels.linear(x, *w), expected) < 5e-6

    @pytest.mark.parametrize("kind", ["float", "int8", "fp8"])
    @pytest.mark.parametrize("K", [66, 131])
    def test_linear_of_odd_columns(kind, K):
        for M in (1, 3, 16):
            x, w = torch.randn(M, K, device=DEVICE), stored(kind, 37, K, 0)
            expected = kernels.linear_reference(x.double(), kernels.dequantize(*w).double())
            assert relative(kernels.linear(x, *w), expected) < 5e-6, M

    @pytest.mark.parametrize("head_dim", [16, 48, 80])
    def test_heads_whose_size_is_no_power_of_two_keep_plain_attention(head_dim):
        args = m.ModelArgs(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=head_dim, hidden_dim=64, vocab_size=9,
                           max_seq_len=32)  # fmt: skip
        model = m.Transformer(args).to(DEVICE).requires_grad_(False)
        kernels.fuse(model)
        assert type(model.layers[0].attention) is m.Attention
        model.setup_caches(1, 8)
        assert (
            model(torch.ones(1, 3, dtype=torch.int64, device=DEVICE), torch.arange(3, device=DEVICE)[None])
            .isfinite()
            .all()
        )

    def test_scales_and_zeros_in_one_word():
        scale, zero = torch.randn(2, 5, 3, device=DEVICE).half()
        again = kernels.split_scales(kernels.join_scales(scale, zero))
        assert torch.equal(again[0], scale) and torch.equal(again[1], zero)

    @pytest.mark.parametrize("kind, group", KINDS)
    def test_linear_of_many_rows(kind, group, monkeypatch):
        kernels._triton()
        monkeypatch.setattr(kernels, "_linear", None)
        x, w = torch.randn(17, 384, device=DEVICE), stored(kind, 37, 384, group)
        torch.testing.assert_close(kernels.linear(x, *w), kernels.linear_reference(x, *w), atol=1e-3, rtol=1e-5)

    @pytest.mark.parametrize("kind, group", KINDS[1:])
    @pytest.mark.parametrize("N, K", [(37, 384), (3, 4224), (1, 128)])
    def test_dequantized(kind, group, N, K):
        kernels._triton()
        w = stored(kind, N, K, group)
        for dtype in [torch.float32] + [torch.bfloat16, torch.float16] * GPU:
            y, rtol = torch.ops.hotloop.dequantized(*w, dtype), 1e-6 if dtype == torch.float32 else 2.0**-7
            torch.testing.assert_close(y, kernels.dequantize(*w).to(dtype), rtol=rtol, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        "rows, width, half, scale, ropes", [(1, 40, 8, 1.0, 1), (3, 1024, 16, 6.7, 2), (2, 2100, 48, 1.0, 2)]
    )
    def test_embed(dtype, rows, width, half, scale, ropes):
        kernels._triton()
        rtol = 0 if GPU or dtype != torch.bfloat16 else 2.0**-6  # the interpreter cuts bfloat16 off
        weight = torch.randn(50, width, device=DEVICE).to(dtype)
        inv_freq = [0.3 ** torch.arange(half, device=DEVICE).float() * (i + 1) for i in range(ropes)]
        for batch, start in ((rows, 0), (1, 60)):  # of ids 60 ... 109, which others have a part of too
            tokens = torch.randint(start - 20 * (start > 0), start + 50, (rows, 3), device=DEVICE)
            pos = torch.tensor([[0, 17, 131071]], device=DEVICE).expand(batch, -1)
            given = tokens, weight, start, scale, pos, inv_freq, [1.0, 0.5][:ropes]
            x, angles = torch.ops.hotloop.embed(*given)
            expected = kernels.embed_reference(*given)
            torch.testing.assert_close(x, expected[0], rtol=rtol, atol=0)
            torch.testing.assert_close(angles, expected[1], rtol=0, atol=3e-7)
            if start == 0:
                rope = torch.stack([(pos[..., None].float() * inv_freq[0]).cos()[:, :, None]])
                torch.testing.assert_close(angles[0, :1], rope, rtol=0, atol=3e-7)
                torch.testing.assert_close(x, weight[tokens] * torch.tensor(scale, dtype=dtype), rtol=rtol, atol=0)

    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 9, 100), (17, 1024), (2, 4100)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_rms_norm(shape, dtype):
        kernels._triton()
        rows, weight = torch.randn(shape, device=DEVICE).to(dtype), torch.rand(shape[-1], device=DEVICE).to(dtype)
        for x in (rows, rows.transpose(0, -2)):
            for w, offset in [(weight, 0.0), (weight, 1.0), (weight.float(), 0.5)]:
                expected = F.rms_norm(x.double(), shape[-1:], w.double() + offset, 1e-3)
                y = torch.ops.hotloop.rms_norm(x, w, 1e-3, offset)
                assert y.dtype == dtype and relative(y, expected) < (1e-6 if dtype == torch.float32 else 2.0**-7)

    @pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
    @pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 3, 2050)])
    def test_gated(shape, activation):
        kernels._triton()
        x = 3 * torch.randn(shape, device=DEVICE)
        expected = kernels.gated_reference(x, activation)
        torch.testing.assert_close(torch.ops.hotloop.gated(x, activation), expected, atol=1e-5, rtol=1e-5)
        x = x.bfloat16()
        expected = kernels.gated_reference(x.float(), activation)
        assert relative(torch.ops.hotloop.gated(x, activation), expected) < 2.0**-6

    @pytest.mark.parametrize("heads, D, norms", [((2, 1), 32, False), ((7, 1), 64, True), ((6, 3), 64, False),
                                                 ((2, 2), 256, True)], ids=str)  # fmt: skip
    @pytest.mark.parametrize("dtype", [torch.float32] + [torch.bfloat16, torch.float16] * GPU)
    @pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
    def test_rotated_queries(heads, D, norms, dtype, kv_dtype):
        kernels._triton()
        (H, K), (B, T, S) = heads, (2, 37, 64)
        # ragged, in any order, and with a token that is repeated; there are more rows in the cache than in the batch
        pos = torch.stack([torch.arange(5, 5 + T).clamp_max(20), torch.randperm(S)[:T]]).to(DEVICE)
        qkv = torch.randn(B, T, (H + 2 * K) * D, device=DEVICE).to(dtype)
        qkv[0, 15:] = qkv[0, 15]
        args = m.ModelArgs(dim=8, n_layers=1, n_heads=H, n_kv_heads=K, head_dim=D, hidden_dim=8, vocab_size=9,
                           max_seq_len=S)  # fmt: skip
        rope = m.RoPE(args).to(DEVICE)(pos)
        weights = torch.rand(2, D, device=DEVICE).to(dtype) if norms else (None, None)
        results = []
        for f in (torch.ops.hotloop.rotated_queries, kernels.rotated_queries_reference):
            cache = m.KVCache((B + 1, K, S, D), kv_dtype or dtype, DEVICE)
            tensors = cache.k, cache.v, cache.k_scale, cache.v_scale
            results.append((f(qkv, *rope, pos, *tensors, *weights, H // K, 1e-5, 0.5), *cache.read(B + 1, S, dtype)))
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
        for y, expected in zip(*results, strict=True):
            if kv_dtype and y is not results[0][0]:  # numbers between two of e4m3 may go to the other one
                assert ((y - expected).abs() > 2e-3 * expected.abs()).sum() <= (2 if dtype == torch.float32 else 200)
                torch.testing.assert_close(y, expected, atol=tolerance, rtol=1 / 7)
            else:
                torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)

    def test_prefill_operators_traced():
        kernels._triton()
        x, w, scale = torch.randn(20, 64, device=DEVICE), torch.rand(64, device=DEVICE), torch.rand(8, device=DEVICE)
        weight = torch.randint(-127, 128, (8, 64), dtype=torch.int8, device=DEVICE)
        rope = torch.rand(2, 2, 10, 1, 16, device=DEVICE)
        pos, caches = torch.arange(20, device=DEVICE).view(2, 10), torch.zeros(2, 2, 1, 32, 32, device=DEVICE)

        def all_of_them(x, k_cache, v_cache):
            y = torch.ops.hotloop.gated(torch.ops.hotloop.rms_norm(x, w, 1e-5, 0.0), "silu")
            qkv = torch.cat([x, y], -1).view(2, 10, 96)
            q = torch.ops.hotloop.rotated_queries(qkv, *rope, pos, k_cache, v_cache, *[None] * 4, 1, 0.0, 0.0)
            return q, kernels.linear(x, weight, scale), k_cache.sum(), v_cache.sum()

        compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(x, *caches.clone()), all_of_them(x, *caches.clone()), strict=True):
            torch.testing.assert_close(a, b)

    def test_read_sum():
        x = torch.ones(100_001, device=DEVICE)
        assert kernels.read_sum(x).sum().item() == 100_001

    def check_top_k(x, k):
        values, ids = kernels.top_k(x, k)
        by_id = x.float().sort(dim=-1, descending=True, stable=True)  # ties in the order of their ids, NaN first
        assert torch.equal(ids, by_id.indices[:, :k]) and values.dtype == x.dtype
        torch.testing.assert_close(values, x.topk(k).values, atol=0, rtol=0, equal_nan=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("V", [1, 7, 1024, 1025, 6001])
    def test_top_k(V, dtype):
        x = torch.randn(3, V, device=DEVICE).to(dtype)  # of the 16-bit ones many are equal
        for k in {1, 2, 50, 256, V}:
            if k <= min(V, kernels.MAX_TOP_K):
                check_top_k(x, k)

    def test_top_k_of_a_large_vocabulary():
        check_top_k(4 * torch.randn(2, 128_256, device=DEVICE).bfloat16(), 200)
        check_top_k(torch.arange(300_000, 0, -1, device=DEVICE)[None].float(), 50)  # all neighbours

    @pytest.mark.parametrize("k", [1, 200])
    def test_top_k_of_unusual_rows(k):
        inf = float("inf")
        x = torch.randn(9, 5000, device=DEVICE)
        x[0] = 0
        x[1] = -inf
        x[2, 1:] = -inf
        x[3, torch.randperm(5000)[50:]] = -inf  # fewer than k are finite
        x[4, 17::500] = inf
        x[5, 4000:4003] = float("nan")
        x[6] = float("nan")
        x[7] = x[7].round()
        x[8] = torch.where(x[8] > 0, 0.0, -0.0)
        check_top_k(x, k)
        check_top_k(x[:, 1:4998], k)  # rows apart
        check_top_k(x.T.contiguous().T, k)

    @pytest.mark.parametrize("room", [256, 2048])
    def test_top_k_that_crowd_in_few_groups(room, monkeypatch):
        monkeypatch.setattr(kernels_top_k, "FOUND", room)
        x = torch.randn(2, 20 * kernels_top_k.GROUPS, device=DEVICE)
        for group in range(30):
            x[0, group :: kernels_top_k.GROUPS] += 100 - group
        for k in (1, 256):
            check_top_k(x, k)

    def test_top_k_beyond_the_kernel_and_traced():
        x = torch.randn(2, 3000, device=DEVICE)
        assert torch.equal(kernels.top_k(x, 1000)[1], x.topk(1000).indices)
        compiled = torch.compile(lambda x: kernels.top_k(2 * x, 9), fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), (2 * x).topk(9), strict=True))

    FAMILIES = [{}, dict(qk_norm=True), dict(sliding_window=20), dict(attn_softcap=5.0), dict(n_heads=7, n_kv_heads=1)]

    LENGTHS = [(1, 1), (15, 1), (16, 1), (17, 1), (100, 1), (320, 1), (2, 2), (90, 5), (320, 8)]  # 320: all
    CASES = [(f, *n, torch.float32) for f in FAMILIES for n in LENGTHS]
    CASES += [({}, *n, torch.float8_e4m3fn) for n in LENGTHS if n not in [(100, 1), (2, 2)]]
    CASES += [(FAMILIES[1] | FAMILIES[2], 70, 3, torch.float8_e4m3fn)]
    CASES += [(FAMILIES[3] | FAMILIES[4], 70, 2, torch.float8_e4m3fn)]

    @pytest.mark.parametrize("family, length, T, kv_dtype", CASES, ids=str)
    def test_attend(family, length, T, kv_dtype, monkeypatch):
        monkeypatch.setattr(kernels_attend, "ATTEND_BLOCK", 16)  # several splits at these lengths
        size = dict(dim=128, n_layers=1, n_heads=8, n_kv_heads=2, head_dim=64, hidden_dim=64, vocab_size=9)
        args = m.ModelArgs(**{**size, "max_seq_len": 320, **family})
        plain = m.Attention(args, 0).to(DEVICE)
        for norm in filter(None, (plain.q_norm, plain.k_norm)):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        cache = plain.cache = m.KVCache((2, args.n_kv_heads, 320, 64), kv_dtype, DEVICE)
        everywhere = torch.arange(320, device=DEVICE).expand(2, -1)
        k, v = torch.randn(2, 2, 320, args.n_kv_heads, 64, device=DEVICE) * torch.rand(2, 2, 320, 1, 1, device=DEVICE)
        cache.update(everywhere, k, v)
        kernels._triton()
        # two rows at different positions, the second filled up by repeating its last token
        pos = torch.stack([torch.arange(length - T, length), torch.arange(T).clamp_max(T // 2) + (length - T) // 2])
        pos = pos.to(DEVICE)
        rope = m.RoPE(args).to(DEVICE)(pos)
        qkv = torch.randn(2, T, (args.n_heads + 2 * args.n_kv_heads) * 64, device=DEVICE)
        qkv[1, T // 2 :] = qkv[1, T // 2]
        with torch.no_grad():
            expected = plain(qkv, rope, pos, torch.arange(320, device=DEVICE))
            written = cache.read(2, 320, torch.float32)
            plain.cache = m.KVCache((2, args.n_kv_heads, 320, 64), kv_dtype, DEVICE)
            plain.cache.update(everywhere, k, v)
            fused = kernels.FusedAttention(plain, DEVICE)
            fused.any_length = None  # the kernel it must be
            y = fused(qkv, rope, pos, torch.arange(320, device=DEVICE))
        k, v = fused.cache.read(2, 320, torch.float32)
        # A rotated key that lies between two numbers of e4m3 may go to the other one, where cosines differ in a bit.
        flipped = (k != written[0]).sum().item() if kv_dtype == torch.float8_e4m3fn else 0
        assert flipped <= 2 and relative(y, expected) < (0.05 if flipped else 2e-6)
        torch.testing.assert_close(k, written[0], atol=2e-6, rtol=1 / 8 if flipped else 1e-5)
        torch.testing.assert_close(v, written[1], atol=0, rtol=0)
        assert not fused.count.any()  # ready for the next call

    @pytest.mark.parametrize("family", [dict(qkv_bias=True), dict(  # as Qwen2, and as Gemma 3
        embedding_scale=11.3, norm_offset=1.0, tie_embeddings=True, qk_norm=True, activation="gelu_tanh",
        sliding_window=8, sliding_layers=[True, False], rope_theta=1e6, rope_local_theta=1e4)], ids=str)  # fmt: skip
    def test_fused_model_equals_the_plain_one(family):
        args = m.ModelArgs(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=256, vocab_size=99,
                           max_seq_len=64, **family)  # fmt: skip
        plain, fused = (m.Transformer(args).to(DEVICE).eval().requires_grad_(False) for _ in range(2))
        for name, weight in plain.named_parameters():
            weight += 0.3 * torch.randn_like(weight) * name.endswith("norm.weight")
        fused.load_state_dict(plain.state_dict())
        names = list(fused.state_dict())
        kernels.fuse(fused)
        assert list(fused.state_dict()) == names and isinstance(fused, kernels.FusedModel)
        for batch in (1, 3):
            plain.setup_caches(batch, 40)
            fused.setup_caches(batch, 40)
            tokens = torch.randint(0, 99, (batch, 20), device=DEVICE)
            pos = torch.arange(20, device=DEVICE).expand(batch, -1)
            for a, b in [(0, 12), (12, 17), (17, 18), (18, 19), (19, 20)]:
                expected = plain(tokens[:, a:b], pos[:, a:b])
                assert relative(fused(tokens[:, a:b], pos[:, a:b]), expected) < 5e-6

    def small_model(all_reduce=None, **changes):
        args = dict(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=64, vocab_size=99)
        model = m.Transformer(m.ModelArgs(**args | changes, max_seq_len=64)).to(DEVICE).eval().requires_grad_(False)
        model.layers[1].out.all_reduce = all_reduce
        kernels.fuse(model)
        model.setup_caches(2, 30)
        return model

    def run_from_3(forward, model, tokens):
        """`forward`'s logits of tokens [B, T] at positions from 3 on, and all keys and values that are then there."""
        caches = [getattr(layer.attention.cache, name) for layer in model.layers for name in "kv"]
        for i, cache in enumerate(caches):
            cache.fill_(0.1 * i)
        pos = 3 + torch.arange(tokens.shape[1], device=DEVICE).expand(len(tokens), -1)
        return [forward(model, tokens, pos, model.slots), *(c.clone() for c in caches)]

    def check_step(step, model, tokens, eager=m.Transformer.forward):
        for a, b in zip(run_from_3(step, model, tokens), run_from_3(eager, model, tokens), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    def traced(graphs):
        """A model's forward pass as a compiler traces it; `graphs` gets the names of what each graph calls."""

        def backend(graph, inputs):
            graphs.append([str(node.target).removesuffix(".default") for node in graph.graph.nodes])
            return graph.forward

        torch._dynamo.reset()
        return torch.compile(m.Transformer.forward, fullgraph=True, dynamic=False, backend=backend)

    @pytest.mark.parametrize("changes, B, T, one", [
        (dict(), 2, 1, True), (dict(), 1, 8, True), (dict(), 2, 8, True), (dict(), 1, 17, False), (dict(), 2, 9, False),
        (dict(n_heads=8), 1, 8, True), (dict(n_heads=8), 1, 9, False),
        (dict(qkv_bias=True, qk_norm=True, sliding_window=4, sliding_layers=[True, False], rope_theta=1e6,
              rope_local_theta=1e4), 2, 2, True),
        (dict(post_norms=True), 2, 1, False), (dict(n_experts=4, n_experts_per_token=2), 2, 1, True),
        (dict(head_dim=48), 2, 1, False)], ids=str)  # fmt: skip
    def test_a_compiler_sees_the_layers_as_one_operator(changes, B, T, one):
        """Where kernels do all of them, and no rank shares them: of few rows, and few of attention's."""
        model, tokens, graphs = small_model(**changes), torch.randint(0, 99, (B, T), device=DEVICE), []
        check_step(traced(graphs), model, tokens)
        assert [graph.count("hotloop.layers") for graph in graphs] == [one]
        assert not (one and "hotloop.attend" in graphs[0])

    def test_layers_run_while_another_thread_compiles(monkeypatch):
        model, tokens = small_model(), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        expected = run_from_3(m.Transformer.forward, model, tokens)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as it is then, in all threads
        for a, b in zip(run_from_3(m.Transformer.forward, model, tokens), expected, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)

    def test_layers_of_a_model_in_shards_are_seen_one_by_one():
        model, graphs = small_model(all_reduce=lambda x: x), []
        run_from_3(traced(graphs), model, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))
        assert graphs[0].count("hotloop.attend") == 2 and "hotloop.layers" not in graphs[0]

    def test_one_compiled_step_serves_several_models():
        """Each by its number, also a copy; and one that comes after another, by the same code."""
        model, graphs = small_model(), []
        twin = copy.deepcopy(model)
        for weight in twin.parameters():
            weight *= 1.5
        tokens = torch.randint(0, 99, (2, 1), device=DEVICE)
        step = traced(graphs)
        for which in (model, twin, model):
            check_step(step, which, tokens)
        assert len(graphs) == 2 and model.number != twin.number
        free = twin.number
        del which, twin
        gc.collect()
        other = small_model()
        check_step(step, other, tokens)
        assert other.number == free and len(graphs) == 2
        other.setup_caches(2, 60)
        check_step(step, other, tokens)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_a_compiler_keeps_calls_of_the_layers_for_what_they_leave_in_the_caches(backend):
        def one_by_one(model, tokens, pos, slots):
            model.features(tokens[:, :1], pos[:, :1], slots)
            return model(tokens[:, 1:], pos[:, 1:], slots)

        model, tokens = small_model(), torch.randint(0, 99, (2, 2), device=DEVICE)
        torch._dynamo.reset()
        step = torch.compile(one_by_one, fullgraph=True, backend=backend)
        check_step(step, model, tokens, one_by_one)

    def test_inductor_knows_what_follows_the_head():
        from torch._inductor.lowering import lowerings

        args = m.ModelArgs(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=32, vocab_size=9,
                           max_seq_len=32)  # fmt: skip
        model = m.Transformer(args).to(DEVICE).requires_grad_(False)
        kernels.fuse(model)
        lowerings.pop(torch.ops.hotloop.top_k.default, None)
        torch.compile(model.forward, backend="eager")(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))
        assert torch.ops.hotloop.top_k.default in lowerings

    # ------------------------------------------------------------------------------------------ mixture of experts
    def routed(x, router, norm, top, normalized):
        """The operator's result, and the reference's in float64."""
        kernels._triton()
        count = torch.zeros(16, dtype=torch.int32, device=DEVICE)
        y = torch.ops.hotloop.route(x, router, norm, 1e-5, 0.5, count, top, normalized)
        assert not count.any()  # ready for the next call
        exact = [t if t is None else t.double() for t in (x, router, norm)]
        return y, kernels_experts.route_reference(*exact, 1e-5, 0.5, count, top, normalized)

    @pytest.mark.parametrize("E, top", [(8, 2), (128, 8), (60, 4), (3, 3), (1, 1)])
    @pytest.mark.parametrize("normalized", [True, False])
    @pytest.mark.parametrize("dtype, K", [(torch.float32, 70), (torch.bfloat16, 256), (torch.bfloat16, 4100)])
    def test_experts_are_chosen(E, top, normalized, dtype, K):
        x = 0.1 * torch.randn(16 if K < 100 else 3, 1, K, device=DEVICE).to(dtype)
        router, norm = torch.randn(E, K, device=DEVICE).to(dtype) * K**-0.5, torch.rand(K, device=DEVICE).to(dtype)
        for n in (norm, None):
            (weight, expert), expected = routed(x, router, n, top, normalized)
            assert torch.equal(expert, expected[1]) and weight.dtype == dtype
            close = dict(rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)  # the interpreter truncates to bf16
            torch.testing.assert_close(weight.double(), expected[0], **close)

    def test_experts_of_broken_logits_exist():
        logits = torch.full((2, 5), torch.nan, device=DEVICE)
        logits[1] = 0  # all alike: the first ones
        (weight, expert), _ = routed(logits, torch.eye(5, device=DEVICE), None, 2, True)
        assert weight[0].isnan().all() and (expert < 5).all() and (expert >= 0).all()
        assert expert[1].tolist() == [0, 1] and weight[1].tolist() == [0.5, 0.5]

    @pytest.mark.parametrize("kind, group", KINDS[:4])
    @pytest.mark.parametrize("N, top", [(1, 2), (1, 8), (3, 2), (16, 1)])
    def test_each_row_through_its_expert(kind, group, N, top):
        """As a mixture has them: gate and up of all chosen experts for each token, after a norm; and down for each."""
        kernels._triton()
        H, K, each = 37, 384, [stored(kind, 74, 384, group) for _ in range(9)]
        weight, scale = (None if t[0] is None else torch.stack(t) for t in zip(*each, strict=True))
        expert = torch.randint(0, 9, (N, top), device=DEVICE)
        x, y = torch.randn(1, N, K, device=DEVICE) + 0.5, torch.randn(N * top, K, device=DEVICE)
        dense = torch.stack([kernels.dequantize(*one) for one in each])
        norm = torch.rand(K, device=DEVICE)
        for *around, rows in ((norm, 1e-5, 1.0, "silu", False, x), (None, 0.0, 0.0, "", True, y)):
            out = torch.ops.hotloop.experts(rows, weight, scale, expert, *around)
            assert out.shape == (N * top, H if around[3] else 2 * H)
            assert relative(out, kernels_experts.experts_reference(rows, dense, None, expert, *around)) < 5e-6
            assert relative(kernels_experts.experts_reference(rows, weight, scale, expert, *around), out) < 5e-6

    @pytest.mark.parametrize("N, top, C", [(1, 2, 4096), (3, 3, 70), (16, 8, 513)])
    @pytest.mark.parametrize("residual", [True, False])
    def test_experts_are_weighted(N, top, C, residual):
        kernels._triton()
        y, weight = torch.randn(N * top, C, device=DEVICE), torch.rand(N, top, device=DEVICE)
        residual = torch.randn(N, 1, C, device=DEVICE) if residual else None
        z = torch.ops.hotloop.weighted(y, weight, residual)
        expected = kernels_experts.weighted_reference(y, weight, residual)
        assert z.shape == expected.shape and relative(z, expected) < 2e-7

    @pytest.mark.parametrize(
        "mode, shared", [(None, False), ("int8", False), ("fp8", False), ("int4", False), ("int8", True)]
    )
    def test_fused_mixture_equals_the_plain_one(mode, shared):
        """For few rows; for more the plain one runs, and each expert is a linear of its kind. shared: by ranks."""
        args = m.ModelArgs(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=32, vocab_size=99,
                           max_seq_len=64, n_experts=5, n_experts_per_token=2)  # fmt: skip
        plain, fused = (m.Transformer(args).to(DEVICE).eval().requires_grad_(False) for _ in range(2))
        plain.layers[0].moe.norm.weight += 0.3 * torch.randn(64, device=DEVICE)
        fused.load_state_dict(plain.state_dict())
        recipe = mode and quantize.make_recipe(mode, 32 if mode == "int4" else None)
        for name, linear in quantize.swap_linears(fused.layers[0].moe, recipe).items() if mode else ():
            weight = plain.layers[0].moe.get_submodule(name).weight
            linear.load_state_dict(linear.quantize(weight))
            weight.copy_(linear.dequantize())
            linear.pack()
        if shared:
            fused.layers[0].moe = tp.ReducedMoE(fused.layers[0].moe)
            fused.layers[0].moe.all_reduce = lambda y: 2 * y
        kernels.fuse(fused)
        assert fused.all_kernels == (not shared) and isinstance(fused.layers[0].moe, kernels.FusedMoE)
        for shape in [(1, 1), (2, 1), (1, 3), (1, 17)] + [(2, 8), (3, 20)] * GPU:
            x = torch.randn(*shape, 64, device=DEVICE)
            expected = x + plain.layers[0].moe.experts(x) * (2 if shared else 1)
            assert relative(fused.layers[0].moe(x), expected) < 5e-6
        gone = weakref.ref(fused.layers[0].moe.gate_up)
        gc.disable()
        try:
            del fused
            assert gone() is None  # without a collection: experts are large
        finally:
            gc.enable()

    @pytest.mark.parametrize("family", [{}, dict(qk_norm=True, sliding_window=20), dict(
        post_norms=True, attn_softcap=5.0, norm_offset=1.0, activation="gelu_tanh")], ids=str)  # fmt: skip
    @pytest.mark.parametrize("kv_dtype", [None, "fp8"])
    def test_fused_model_of_many_rows(family, kv_dtype):
        args = m.ModelArgs(dim=128, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=99,
                           max_seq_len=64, **family)  # fmt: skip
        plain, fused = (m.Transformer(args).to(DEVICE).eval().requires_grad_(False) for _ in range(2))
        for name, weight in plain.named_parameters():
            weight += 0.3 * torch.randn_like(weight) * name.endswith("norm.weight")
        fused.load_state_dict(plain.state_dict())
        kernels.fuse(fused)
        for model in (plain, fused):
            model.setup_caches(2, 35, kv_dtype)
        tokens, pos = torch.randint(0, 99, (2, 35), device=DEVICE), torch.arange(35, device=DEVICE).expand(2, -1)
        ragged = torch.minimum(pos, torch.tensor([[34], [9]], device=DEVICE))  # a row that repeats its last token
        # a context's first tokens, and later ones, with the number that precedes them or slots to look at
        for p, start, slots in [(pos, 0, 0), (pos, 2, 2), (pos, 2, plain.slots), (ragged, 0, plain.slots)]:
            inputs = tokens.gather(1, p)[:, start:], p[:, start:], slots
            assert relative(fused(*inputs), plain(*inputs)) < (1e-2 if kv_dtype else 5e-6)  # roundings may flip
            k, expected = (model.layers[0].attention.cache.read(2, 35, torch.float32)[0] for model in (fused, plain))
            torch.testing.assert_close(k, expected, atol=1e-5, rtol=1 / 7 if kv_dtype else 1e-5)

    @pytest.mark.parametrize("mode", [None, "int8", "int4"])
    def test_shares_of_a_mixture_make_it_whole(mode):
        """Two ranks' parts of each expert, as tp.py cuts them: what they sum, and the residual once, is the whole."""
        args = m.ModelArgs(dim=64, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=32, hidden_dim=64, vocab_size=98,
                           max_seq_len=64, n_experts=4, n_experts_per_token=2)  # fmt: skip
        recipe = mode and quantize.make_recipe(mode, 32 if mode == "int4" else None)
        whole, shares, sent = m.Transformer(args).to(DEVICE).eval().requires_grad_(False), [], []
        stored = dict(whole.state_dict())
        for name, linear in quantize.swap_linears(copy.deepcopy(whole), recipe).items() if mode else ():
            weight = stored.pop(f"{name}.weight")
            kept = linear.quantize(weight)
            stored |= {f"{name}.{key}": t for key, t in kept.items()}
            weight.copy_(linear.dequantize_stored(**kept))
        for rank in range(2):
            with torch.device("meta"):
                share = m.Transformer(args)
            linears = quantize.swap_linears(share, recipe) if mode else {}
            parts = tp.apply_tp(share, rank, 2)
            mine = {name: tp.take(t, parts.get(name)) for name, t in stored.items()}
            share.load_state_dict(mine, assign=True)
            for name in linears:
                share.get_submodule(name).pack()
            share.layers[0].moe.all_reduce = lambda y: sent.append(y) or y
            kernels.fuse(share.eval().requires_grad_(False))
            assert isinstance(share.layers[0].moe, kernels.FusedMoE)
            shares.append(share.layers[0].moe)
        for rows in (1, 3, 17):
            x = torch.randn(1, rows, 64, device=DEVICE)
            for moe in shares:
                moe(x)
            assert relative(x + (sent.pop() + sent.pop()).view_as(x), whole.layers[0].moe(x)) < 5e-6

    @pytest.mark.parametrize("all_reduce", [None, lambda y: 2 * y])
    def test_a_compiled_mixture_serves_many_batches(all_reduce):
        """By two programs: that of the first size, and one for all others."""
        args = m.ModelArgs(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=32, vocab_size=99,
                           max_seq_len=64, n_experts=5, n_experts_per_token=2)  # fmt: skip
        model, graphs = m.Transformer(args).to(DEVICE).eval().requires_grad_(False), []
        model.layers[0].moe.all_reduce = all_reduce
        kernels.fuse(model)
        model.setup_caches(5, 20)
        torch._dynamo.reset()
        backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
        step = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=None)
        for batch in (1, 2, 3, 4, 5):
            tokens, pos = torch.full((2, batch, 1), batch, device=DEVICE)
            torch.testing.assert_close(step(tokens, pos), model(tokens, pos), atol=1e-5, rtol=1e-5)
        assert len(graphs) <= 3

    @pytest.mark.parametrize("kv_dtype", [None, "fp8"])
    def test_what_a_run_is_compared_with(kv_dtype):
        """benchmark.py's reference: kernels are not part of it, and an fp8 cache is."""
        args = m.ModelArgs(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=64, vocab_size=99,
                           max_seq_len=64)  # fmt: skip
        plain, fused = (m.Transformer(args).to(DEVICE).eval().requires_grad_(False) for _ in range(2))
        fused.load_state_dict(plain.state_dict())
        kernels.fuse(fused)
        tokens, pos = torch.randint(0, 99, (1, 20), device=DEVICE), torch.arange(20, device=DEVICE)[None]
        outputs = []
        for model in (plain, fused):
            model.setup_caches(1, 20, kv_dtype)
            with benchmark_check.as_cached():
                outputs.append(model(tokens))
            assert relative(model(tokens), plain(tokens)) < 5e-6
        assert relative(outputs[1], outputs[0]) < 5e-6 and relative(plain(tokens, pos), outputs[0]) < 5e-6
        assert (relative(outputs[0], plain(tokens)) > 1e-4) == (kv_dtype is not None)

    def test_many_rows_can_be_trained():
        args = m.ModelArgs(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=32, vocab_size=9,
                           max_seq_len=32)  # fmt: skip
        models = [m.Transformer(args).to(DEVICE) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        kernels.fuse(models[1])
        for model in models:
            model(torch.arange(20, device=DEVICE)[None] % 9).logsumexp(-1).sum().backward()
        grads = {name: p.grad for name, p in models[1].named_parameters()}
        for name, p in models[0].named_parameters():
            torch.testing.assert_close(grads[name], p.grad, msg=name)
