"""The CUDA C++ kernels against their references, on a GPU that has what they need; plans and guards anywhere."""

import contextlib
import functools
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
import kernels_cuda as k
import model
from checkpoint import load_model
from tokenizer import Tokenizer

GPU = torch.cuda.is_available() and k.available(torch.device("cuda", 0))
SHAPES = [(333, 512), (66, 1024), (12345, 1024), (1000, 4096), (4096, 2048), (5, 512), (48, 14336), (50, 22016)]
SHAPES += [(40, 3584), (40, 7168), (40, 8192)]  # of int4 other variants: whether a row is one chunk, shared, or neither
SHAPES += [(5000, 9216), (3000, 28672)]  # and shared by four blocks, which send each other sums of many tiles
KINDS = [("bf16", 0), ("fp8", 0), ("int8", 0), ("int4", 32), ("int4", 64), ("int4", 128)]


def stored(kind: str, N: int, K: int, group: int):
    """Random (weight, scale) of a kind, on the GPU."""
    w = torch.randn(N, K, device="cuda")
    if kind == "bf16":
        return w.bfloat16(), None
    if kind == "int8":
        return (w * 40).clamp(-127, 127).to(torch.int8), torch.rand(N, device="cuda")
    if kind == "fp8":
        return (w * 100).clamp(-448, 448).to(torch.float8_e4m3fn), torch.rand(N, device="cuda")
    scale, zero = torch.rand(2, N, K // group, device="cuda").half()
    return torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda"), kernels.join_scales(scale, 15 * zero)


def expected(x, weight, scale, bias, norm, residual, eps, offset, activation):
    """kernels.linear_reference in float64, with x rounded once, after the norm."""
    x = x.double()
    if norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (norm.double() + offset)
    y = x @ kernels.dequantize(weight, scale).double().T
    y = y if bias is None else y + bias.double()
    if activation:
        gate, up = y.chunk(2, dim=-1)
        y = kernels.activate(activation, gate) * up
    return y if residual is None else residual.double() + y


if GPU:

    @pytest.mark.gpu
    @pytest.mark.parametrize("split", (False, True))
    @pytest.mark.parametrize("M", (1, 2, 3, 5, 8))
    @pytest.mark.parametrize("kind, group", KINDS)
    def test_linear(kind, group, M, split, monkeypatch):
        """As planned; and, of several rows, with two blocks for each of many tiles wherever that goes."""
        if split:
            monkeypatch.setattr(k, "SPLIT", 1)
            monkeypatch.setattr(k, "SPLIT_PAIRS", 1)
            monkeypatch.setattr(k, "_plan", k._plan.__wrapped__)
        torch.manual_seed(0)
        ran = 0
        for N, K in SHAPES:
            if kind == "int4" and K % (8 * group):
                continue
            weight, scale = stored(kind, N, K, group)
            x = torch.randn(M, K, device="cuda").bfloat16()
            x[:, ::77] *= 50  # a block of columns has an exponent of its own
            for extras in range(4):
                norm = torch.rand(K, device="cuda").bfloat16() if extras in (1, 2) else None
                activation = ("silu", "gelu_tanh", "gelu")[M % 3] if extras == 2 and N % 2 == 0 else ""
                bias = torch.randn(N, device="cuda").bfloat16() if extras in (1, 3) else None
                residual = torch.randn(M, N, device="cuda").bfloat16() if extras == 3 else None
                assert k.supports(x, weight, scale, bias, norm, residual, bool(activation))
                arguments = (x, weight, scale, bias, norm, residual, 1e-5, 0.25 * (extras % 2), activation)
                y, want = k.linear(*arguments).double(), expected(*arguments)
                assert (y - want).norm() <= 1e-2 * want.norm(), (N, K, extras)
                each = 0.1 * want.norm() / want.shape[1] ** 0.5 + 1e-2 * want.norm(dim=0)  # no output is left out
                assert ((y - want).norm(dim=0) <= each).all(), (N, K, extras)
                assert torch.equal(k.linear(*arguments).double(), y), "the same sums in the same order"
                ran += 1
        assert ran >= 12

    @pytest.mark.gpu
    @pytest.mark.parametrize("kind, group", KINDS[1:])
    def test_linear_in_several_passes(kind, group):
        """Of more than 8 rows each gets what it gets with fewer beside it, also in a chain of linears that overlap."""
        torch.manual_seed(0)
        K = 4096
        norm = torch.rand(K, device="cuda").bfloat16()
        weights = [stored(kind, N, K, group) for N in (K, 2 * K)]
        for M in (9, 16, 27, 32):
            x = torch.randn(1, M, K, device="cuda").bfloat16()

            def chain(x):
                y = k.linear(x, *weights[0], None, None, x)
                z = k.linear(y, *weights[1], None, norm, None, 1e-5, 0.0, "silu")
                return k.linear(z, *weights[0], None, norm, y)

            assert k.supports(x, *weights[0], None, norm, x) and k.supports(x, *weights[1], None, norm, pairs=True)
            assert torch.equal(chain(x), torch.cat([chain(rows) for rows in x.split(8, 1)], 1)), M

    @pytest.mark.gpu
    @pytest.mark.parametrize("kind, group", KINDS)
    @pytest.mark.parametrize("N, top, E, outputs, K", [
        (1, 2, 8, 1792, 4096), (1, 8, 16, 768, 2048), (1, 8, 128, 48, 1024), (2, 2, 5, 400, 4096), (2, 8, 9, 32, 1024),
        (2, 1, 3, 4096, 14336), (1, 1, 1, 16, 4096)])  # fmt: skip
    def test_experts(kind, group, N, top, E, outputs, K):
        """As a mixture has them: all chosen experts for each token, after a norm, in pairs of gate and up; and a row of
        x for each. In a chain, where what is chosen comes right before the first of them."""
        torch.manual_seed(0)
        kernels._triton()
        each = [stored(kind, 2 * outputs, K, group) for _ in range(E)]
        weight, scale = (None if t[0] is None else torch.stack(t) for t in zip(*each, strict=True))
        norm, tokens, rows = (torch.randn(n, K, device="cuda").bfloat16() for n in (1, N, min(2, N * top)))
        for x, activation, n in ((tokens[None], "silu", norm[0]), (tokens[None], "", None), (rows, "", None)):
            R = N * top if len(x) == 1 else len(x)
            logits, eye = torch.randn(N if len(x) == 1 else 1, E, device="cuda"), torch.eye(E, device="cuda")
            count = torch.zeros(16, dtype=torch.int32, device="cuda")
            settings = (None, 0.0, 0.0, count, R // len(logits), True)
            route = functools.partial(torch.ops.hotloop.route, logits, eye, *settings)
            expert = route()[1]
            assert k.supports_experts(x, weight, scale, expert, n, bool(activation))
            around = (n, 1e-5, 0.25, activation)
            for early in (False, True):
                chosen = route()[1]
                if early:
                    k.linear(rows, weight[0], None if scale is None else scale[0])  # a kernel in between
                y = k.experts(x, weight, scale, chosen, *around, early).double()
                flat = x.view(-1, K)
                for r, e in enumerate(expert.flatten().tolist()):
                    row, one = flat[r // (R // len(flat))][None], (weight[e], None if scale is None else scale[e])
                    want = expected(row, *one, None, n, None, 1e-5, 0.25, activation)
                    assert (y[r] - want).norm() <= 1e-2 * want.norm(), (r, e, early, activation)

    @pytest.mark.gpu
    def test_not_a_number_stays_one():
        for (kind, group), M, bad in itertools.product(KINDS, (2, 8), (torch.nan, torch.inf)):
            weight, scale = stored(kind, 64, 1024, group)
            x = torch.ones(M, 1024, device="cuda").bfloat16()
            x[1, 300] = bad
            y = k.linear(x, weight, scale)
            assert y[:1].isfinite().all() and y[2:].isfinite().all(), (kind, M)
            assert not y[1].isfinite().any() if kind == "bf16" else y[1].isnan().all(), (kind, M)

    @pytest.mark.gpu
    def test_kernels_takes_it_where_it_is_faster(monkeypatch):
        calls = []
        monkeypatch.setattr(k, "linear", lambda x, *others: calls.append(len(x)) or x.new_zeros(len(x), 64))
        for M in (1, 2, 8, 9):
            kernels.linear(torch.ones(M, 512, device="cuda").bfloat16(), torch.ones(64, 512, device="cuda").bfloat16())
        kernels.linear(torch.ones(2, 512, device="cuda"), torch.ones(64, 512, device="cuda"))  # float32
        for M in (9, 32, 33):
            kernels.linear(torch.ones(M, 512, device="cuda").bfloat16(), *stored("int8", 64, 512, 0))
        assert calls == [1, 2, 8, 9, 32]

    @pytest.mark.gpu
    @pytest.mark.parametrize("D", k.HEAD_DIMS)
    @pytest.mark.parametrize("K, G", [(8, 4), (32, 1), (2, 8), (1, 3), (4, 7)])
    def test_attend(K, G, D):
        """Lengths around a warp's 16 slots and a block's 256, several rows and new tokens, and every setting."""
        torch.manual_seed(K * G + D)
        settings = itertools.cycle([(0, 0.0, False), (50, 0.0, True), (300, 0.0, False), (0, 30.0, True)])
        S, ran = 3072, 0
        for (B, T), p in itertools.product([(1, 1), (3, 1), (1, 2), (1, 5), (2, 4), (1, 8)],
                                           [0, 1, 15, 16, 17, 100, 255, 256, 257, 300, 1000, 3000]):  # fmt: skip
            window, cap, qk_norm = next(settings)
            args = model.ModelArgs(
                dim=K * G * D, n_layers=1, n_heads=K * G, n_kv_heads=K, head_dim=D, hidden_dim=64, vocab_size=64,
                max_seq_len=S, qk_norm=qk_norm, attn_softcap=cap or None, sliding_window=window or None,
            )  # fmt: skip
            plain = model.Attention(args, 0).cuda()
            norms = (None, None)
            if qk_norm:
                norms = [torch.rand(D, device="cuda").bfloat16() + 0.5 for _ in range(2)]
                plain.q_norm.weight.data, plain.k_norm.weight.data = (n.float() for n in norms)
            plain.cache = model.KVCache((B, K, S, D), torch.float32, torch.device("cuda"))
            caches = [torch.randn_like(plain.cache.k).bfloat16() for _ in range(2)]
            plain.cache.k.copy_(caches[0]), plain.cache.v.copy_(caches[1])
            start = torch.tensor([max(0, p - 7 * b) for b in range(B)], device="cuda")
            pos = start[:, None] + torch.arange(T, device="cuda")
            qkv = (torch.randn(B, T, (G + 2) * K * D, device="cuda") * 2).bfloat16()
            if T == 4:  # the last token may repeat the one before it
                pos[:, 3], qkv[:, 3] = pos[:, 2], qkv[:, 2].clone()
            rope, count = model.RoPE(args).cuda()(pos), torch.zeros(k.MAX_COUNTS, dtype=torch.int32, device="cuda")
            eps = args.norm_eps if qk_norm else 0.0
            assert k.supports_attend(qkv, pos, *caches, G, norms)
            y = k.attend(qkv, *rope, pos, *caches, count, *norms, G, plain.scale, cap, window, eps, 0.0)
            with torch.no_grad():
                want = plain(qkv.float(), rope, pos, torch.arange(S, device="cuda"))
            assert (y - want).norm() <= 1.5e-2 * want.norm(), (B, T, p, window, cap, qk_norm)
            assert torch.allclose(caches[0].float(), plain.cache.k, atol=0.05, rtol=0.01)
            assert torch.equal(caches[1].float(), plain.cache.v) and not count.any()
            ran += 1
        assert ran == 72

    @pytest.mark.gpu
    def test_attend_may_guess_wrong(monkeypatch):
        """Where the position of several tokens is not there yet, what was read meanwhile is not used."""
        torch.manual_seed(0)
        B, T, K, G, D, S = 2, 3, 8, 4, 128, 2048
        rope = [torch.rand(B, T, 1, D // 2, device="cuda") for _ in range(2)]
        count = torch.zeros(k.MAX_COUNTS, dtype=torch.int32, device="cuda")
        caches = [torch.randn(B, K, S, D, device="cuda").bfloat16() for _ in range(2)]
        qkv = torch.randn(B, T, (G + 2) * K * D, device="cuda").bfloat16()
        steps = torch.arange(T, device="cuda")
        where = [torch.tensor([[p], [p + 9]], device="cuda") + steps for p in (0, 20, 255, 1500)]

        def results():
            k._function.cache_clear(), k._module.cache_clear()
            all_new = []
            for pos in where:  # each with caches of its own: what is old has to be older than the kernel before
                new = [c.clone() for c in caches]
                y = k.attend(qkv, *rope, pos, *new, count, None, None, G, 0.1, 0.0, 0, 0.0, 0.0)
                all_new += [y, *new]
            return all_new

        want = results()
        source = Path(k.__file__).with_name("attend_cuda.cu").read_bytes()
        for guess in (b"0", b"S - 1", b"(position_of(0) * 13 + 77 * (int)blockIdx.x) % S"):
            wrong = source.replace(b"begin(min(max(position_of(0), 0), S - 1));", b"begin(" + guess + b");")
            assert wrong != source
            monkeypatch.setattr(k, "_machine_code", lambda nvrtc, *a, wrong=wrong: k._compile(nvrtc, a[0], wrong, a[1]))
            assert all(torch.equal(a, b) for a, b in zip(results(), want, strict=True)), guess
            monkeypatch.undo()
        k._function.cache_clear(), k._module.cache_clear()

    @pytest.mark.gpu
    @pytest.mark.parametrize("world", (2, 3, 4))
    def test_exchange(world):
        """Ranks as streams of one GPU: sums and gathers of all sizes, one after another, also as a replayed graph, and
        with one rank late."""
        torch.manual_seed(world)
        words = [torch.zeros(2 * world * 2 * 1000, dtype=torch.int64, device="cuda") for _ in range(world)]
        ranks = [k.Exchange(words[r], [w.data_ptr() for w in words], r) for r in range(world)]
        streams = [torch.cuda.Stream() for _ in range(world)]
        sizes = [1, 1000, 2, 256, 1000, 3, 500, 1] * 3  # pieces of 8 bytes

        def work(r, inputs):
            return [ranks[r](x, gather=i % 3 == 2) for i, x in enumerate(inputs[r])]

        def check(inputs, results):
            torch.cuda.synchronize()
            for i in range(len(sizes)):
                every = torch.stack([inputs[r][i] for r in range(world)])
                want = every if i % 3 == 2 else every.sum(0)
                assert all(torch.equal(results[r][i], want) for r in range(world)), i

        for dtype in (torch.bfloat16, torch.float32):
            lengths = [n * 8 // dtype.itemsize for n in sizes]
            inputs = [[torch.randint(-9, 9, (n,), device="cuda").to(dtype) for n in lengths] for _ in ranks]
            assert all(ranks[0].supports(x) for x in inputs[0])
            torch.cuda.synchronize()
            results, graphs = [], [torch.cuda.CUDAGraph() for _ in ranks]
            for r, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(3_000_000 * (r == 1))
                    results.append(work(r, inputs))
            check(inputs, results)
            for r, graph in enumerate(graphs):
                with torch.cuda.graph(graph):
                    results[r] = work(r, inputs)
            for late in (0, 1, world - 1):
                for r, stream in enumerate(streams):
                    with torch.cuda.stream(stream):
                        torch.cuda._sleep(3_000_000 * (r == late))
                        graphs[r].replay()
                check(inputs, results)

    @pytest.mark.gpu
    @pytest.mark.parametrize("world", (2, 4))
    @pytest.mark.parametrize("kind, group", [("bf16", 0), ("fp8", 0), ("int8", 0), ("int4", 32)])
    def test_linears_send_their_sums(kind, group, world, monkeypatch):
        """Ranks as streams of one GPU, each with some of the columns: the sum and the residual, the same bits on all,
        also in replayed graphs, and after other exchanges."""
        torch.manual_seed(world)
        # A rank's next linear is there, and waits, before its sum is: together they must leave room for all ranks.
        multiprocessors = k._multiprocessors(torch.device("cuda", 0)) // (4 * world)
        monkeypatch.setattr(k, "_multiprocessors", lambda device: multiprocessors)
        monkeypatch.setattr(k, "_plan", k._plan.__wrapped__)
        monkeypatch.setattr(k, "_clusters", k._clusters.__wrapped__)
        words = [torch.zeros(2 * world * 2 * 8192, dtype=torch.int64, device="cuda") for _ in range(world)]
        ranks = [k.Exchange(words[r], [w.data_ptr() for w in words], r) for r in range(world)]
        streams = [torch.cuda.Stream() for _ in range(world)]
        cases = []
        sizes = (1, 1000, 1024), (5, 2000, 2048), (1, 4096, 1024), (8, 1000, 8192), (3, 500, 1024), (2, 66, 512)
        for M, N, K in sizes:
            parts = [stored(kind, N, K, group) for _ in ranks]
            x = [torch.randn(M, K, device="cuda").bfloat16() for _ in ranks]
            residual = torch.randn(M, N, device="cuda").bfloat16() * 100
            each = [expected(v, *part, None, None, None, 0, 0, "") for v, part in zip(x, parts, strict=True)]
            cases.append((x, parts, residual, residual.double() + sum(each)))
            assert ranks[0].sends(residual) and all(ranks[0].supports_linear(*part, None, K) for part in parts)

        def work(r):
            results = []
            for x, parts, residual, _ in cases:
                results.append(ranks[r].linear(x[r], *parts[r], None, residual))
                results.append(ranks[r](residual[0, :64]))
            return results

        def check(results):
            torch.cuda.synchronize()
            for i, (_, _, residual, want) in enumerate(cases):
                assert all(torch.equal(results[r][2 * i], results[0][2 * i]) for r in range(world)), i
                off = results[0][2 * i] - want
                assert off.norm() <= 1e-2 * want.norm(), i
                each = 0.1 * want.norm() / want.shape[1] ** 0.5 + 1e-2 * want.norm(dim=0)
                assert (off.norm(dim=0) <= each).all(), i
                assert all(torch.equal(results[r][2 * i + 1], residual[0, :64] * world) for r in range(world)), i

        with monkeypatch.context() as nothing_runs:  # to load a kernel may take waiting for those that wait for it
            nothing_runs.setattr(k, "_launch", lambda *a, **b: None)
            work(0)
        torch.cuda.synchronize()
        results, graphs = [], [torch.cuda.CUDAGraph() for _ in ranks]
        for r, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append(work(r))
        check(results)
        for r, graph in enumerate(graphs):
            with torch.cuda.graph(graph):
                results[r] = work(r)
        for late in (0, 1, world - 1):
            for r, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(3_000_000 * (r == late))
                    graphs[r].replay()
            check(results)

    @pytest.mark.gpu
    def test_greedy_tokens_of_the_bundled_model(monkeypatch):
        """2,000 positions of real text, one at a time through the kernels, against plain PyTorch that also sums in
        float32 and rounds where they do, and against the plain model in bf16, which rounds more often, and in float32:
        the likeliest token is another one only where two are nearly as likely."""
        demo = Path(__file__).parents[1] / "demo"
        text = (demo / "heldout.txt").read_text(encoding="utf-8")[:20000]
        tokens = torch.tensor(Tokenizer(demo).encode(text)[:2000], device="cuda").view(4, 500)
        fused = load_model(demo, "cuda", torch.bfloat16)
        monkeypatch.setattr(kernels, "fuse", lambda model: None)
        plain, exact = (load_model(demo, "cuda", dtype) for dtype in (torch.bfloat16, torch.float32))
        fused.setup_caches(4, 512)

        linear_reference = kernels.linear_reference

        def rounded_once(x, weight, scale, bias, norm, residual, eps, offset, activation):
            x = x.float()
            if norm is not None:  # its weight before the rounding, its factor after the product
                factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
                x = (x * (norm.float() + offset)).bfloat16().float() * factor
            weight, residual = weight.float(), None if residual is None else residual.float()
            return linear_reference(x, weight, scale, bias, None, residual, 0, 0, activation).bfloat16()

        with torch.no_grad():
            pos = torch.arange(500, device="cuda").expand(4, -1)
            ours = torch.cat([fused(tokens[:, [i]], pos[:, [i]], fused.slots[:512]) for i in range(500)], 1).float()
            with monkeypatch.context() as patched:
                patched.setattr(kernels, "linear_reference", rounded_once)
                patched.setattr(kernels, "use_triton", lambda x: False)
                alike = torch.cat([fused(tokens[:, [i]], pos[:, [i]], fused.slots[:512]) for i in range(500)], 1)
            theirs, wanted = plain(tokens).float(), exact(tokens)
        assert type(fused.layers[0].attention) is kernels.FusedAttention is not type(plain.layers[0].attention)
        ours_error, their_error = ((y - wanted).norm() / wanted.norm() for y in (ours, theirs))
        assert ours_error <= 1.2 * their_error, "no further from float32 than plain bf16 is"
        best = wanted.argmax(-1)
        for name, y, other, most in (
            ("kernels, as they round", ours, alike.argmax(-1), 0.01),
            ("kernels, plain bf16", ours, theirs.argmax(-1), 0.02), ("kernels, float32", ours, best, 0.02),
            ("plain bf16, float32", theirs, best, 0.02),
        ):  # fmt: skip
            differ = y.argmax(-1) != other
            gaps = (wanted.amax(-1) - wanted.gather(-1, y.argmax(-1, keepdim=True))[..., 0])[differ]
            print(f"{name}: {differ.sum()} of {differ.numel()} differ, by at most {gaps.max():.3f} in logits")
            assert differ.sum() <= most * differ.numel() and gaps.max() < 0.2
else:

    @pytest.mark.gpu
    def test_linear_and_attend():
        pytest.skip("needs a Hopper GPU or a newer one: their plans and guards were tested")


@pytest.fixture
def h200(monkeypatch):
    """A GPU as far as plans and guards see."""
    monkeypatch.setattr(k, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(k, "_shared_memory", lambda device: 232448)
    monkeypatch.setattr(k, "available", lambda device: True)
    monkeypatch.setattr(k, "_plan", k._plan.__wrapped__)


@pytest.mark.parametrize("kind", range(4))
def test_plans_fit(kind, h200):
    """Every number of rows, of shapes of real models, within the shared memory of a block, and in few panels."""
    for N, K, pairs in ((6144, 4096, False), (14336, 4096, True), (4096, 14336, False), (8192, 28672, False),
                        (128256, 4096, False), (2048, 256, False)):  # fmt: skip
        for M in range(1, 9):
            p = k._plan(kind, 32, M, N, K, pairs, None)
            assert 3 <= p.stages <= k.MAX_STAGES[kind] * 2048 // p.chunk, (N, K, M, p)
            assert p.room >= M and p.shared <= 232448, (N, K, M, p)
            assert p.panels <= 8, (N, K, M, p)
    assert [k._plan(kind, 32, M, 4096, 4096, False, None).panels for M in (1, 2, 4)] == [1, 1, 1]
    if kind == 3:  # rows that are too long are shared, and x stays in registers
        cases = itertools.product((4, 5, 8), (4096, 11008, 14336))
        plans = [k._plan(kind, 32, M, 4096, K, False, None) for M, K in cases]
        assert [(p.split, p.one) for p in plans] == 3 * [(1, True), (4, True), (4, True)]


def test_as_many_clusters_as_run_at_a_time(h200, monkeypatch):
    """What the driver says counts, between what all multiprocessors would hold and what plans have room for."""
    says = []

    def driver(count, function, config):
        config = config._obj
        assert function == "function" and tuple(config.grid) == (132, 1, 1) and config.shared == plan.shared
        assert config.block[0] == plan.threads and tuple(config.attributes[0].value[:3]) == (4, 1, 1)
        count._obj.value = says[0]
        return says[1]

    monkeypatch.setattr(k, "_libraries", lambda: (None, SimpleNamespace(cuOccupancyMaxActiveClusters=driver)))
    monkeypatch.setattr(k, "_function", lambda *a: "function")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(k, "_clusters", k._clusters.__wrapped__)
    plan = k._plan(3, 32, 8, 4096, 14336, False, None)
    for count, launched in ((30, 30), (33, 33), (40, 33), (24, 24), (3, 24), (0, 24)):
        says[:] = count, 0
        assert k._clusters((), plan, None) == launched
    says[1] = 1
    with pytest.raises(RuntimeError, match="cuOccupancyMaxActiveClusters failed with error 1"):
        k._clusters((), plan, None)
    for kind, M, blocks in ((3, 8, 132), (2, 8, 66), (0, 1, 132)):  # of 4,096 columns, which fours never share
        plan = k._plan(kind, 32, M, 4096, 4096, False, None)
        assert k._clusters((), plan, None) == blocks, "without asking"


@pytest.mark.parametrize("kind", range(4))
def test_plans_leave_room_for_what_is_on_its_way(kind, h200, monkeypatch):
    """On a GPU with less shared memory too, what is taken has as many stages as are sent for at a time."""
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 0)
    taken, cases = 0, itertools.product((232448, 166912, 101376), (3072, 40000), (1024, 2048, 8192, 28672), (1, 4, 8))
    for most, N, K, M in cases:
        monkeypatch.setattr(k, "_shared_memory", lambda device, most=most: most)
        p = k._plan(kind, 32, M, N, K, False, None)
        weight = torch.empty(N, K // (1, 1, 1, 2)[kind], dtype=list(k.KINDS)[kind], device="meta")
        scale = [None, torch.empty(N, device="meta"), torch.empty(N, device="meta"),
                 torch.empty(N, K // 32, dtype=torch.int32, device="meta")][kind]  # fmt: skip
        if k.supports(torch.empty(M, K, dtype=torch.bfloat16, device="meta"), weight, scale):
            assert p.stages >= k.FLIGHT // p.chunk and p.shared <= most and (p.panels == 1 or not p.dynamic)
            taken += 1
    assert taken > 36  # of 72


@pytest.mark.parametrize("kind", k.KINDS.values())
def test_whose_sums_are_sent(kind, h200, monkeypatch):
    """Of real models' shares every output and down projection, whatever the rows; not where columns do not fit."""
    exchange = k.Exchange(torch.zeros(4 * 2 * 32768, dtype=torch.int64), [0, 0], 0)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 0)
    for N, K, works in ((4096, 2048, True), (4096, 1024, True), (4096, 7168, True), (4096, 3584, True),
                        (8192, 4096, True), (8192, 14336, True), (4096, 2752, kind == 0)):  # fmt: skip
        weight = torch.empty(N, K // (1, 1, 1, 2)[kind], dtype=list(k.KINDS)[kind], device="meta")
        scale = [None, torch.empty(N, device="meta"), torch.empty(N, device="meta"),
                 torch.empty(N, K // 32, dtype=torch.int32, device="meta")][kind]  # fmt: skip
        assert exchange.supports_linear(weight, scale, None, K) == works, (N, K)


@pytest.mark.parametrize("activation", ("", "silu"))
def test_each_pass_has_its_rows(activation, monkeypatch):
    def reference(x, residual, y, *others):
        assert len(x) == len(y) <= k.MAX_ROWS and all(t is None or t.is_contiguous() for t in (x, residual, y))
        y[:] = kernels.linear_reference(x, *others[:4], residual, *others[4:7])

    monkeypatch.setattr(k, "_pass", reference)
    weight, scale = torch.randint(-99, 99, (64, 128), dtype=torch.int8), torch.rand(64)
    norm = torch.rand(128).bfloat16()
    for M in (1, 8, 9, 16, 27, 32):
        x = torch.randn(M, 2, 128).bfloat16()[:, None, 1]  # rows that are not side by side
        residual = torch.randn(M, 1, 32 if activation else 64).bfloat16()
        arguments = (x, weight, scale, None, norm, residual, 1e-5, 0.0, activation)
        assert torch.equal(k.linear(*arguments), kernels.linear_reference(*arguments)), M


def test_guards(h200, monkeypatch):
    x, weight = torch.ones(2, 256, dtype=torch.bfloat16), torch.ones(64, 256, dtype=torch.bfloat16)
    assert k.supports(x, weight, None) and k.supports(x, weight, None, None, torch.ones(256).bfloat16())
    assert k.supports(x[:, None], weight, None)  # [2, 1, 256]
    assert k.supports(torch.ones(2, 3, 256).bfloat16()[:, -1:], weight, None)  # copied
    for changed in (
        (x.float(), weight, None), (torch.ones(9, 256).bfloat16(), weight, None),
        (x[:, :96].contiguous(), weight[:, :96].contiguous(), None), (x, weight.half(), None), (x[:0], weight, None),
        (x, weight, None, torch.ones(64)), (x, weight.repeat(1, 2)[:, ::2], None), (x, weight, torch.ones(64)),
        (torch.ones(2 * 256 + 3).bfloat16()[3:].view(2, 256), weight, None),  # not at an address of whole words
    ):  # fmt: skip
        assert not k.supports(*changed)
    q, packed = torch.zeros(64, 128, dtype=torch.uint8), torch.zeros(64, 8, dtype=torch.int32)
    assert k.supports(x, q, packed) and not k.supports(x, q, None)
    assert not k.supports(x, q, packed.float())  # not packed for a GPU
    assert not k.supports(x, q, torch.zeros(64, 16, dtype=torch.int32))  # groups of 16
    q = torch.zeros(64, 256, dtype=torch.int8)
    assert k.supports(x, q, torch.ones(64)) and not k.supports(x, q, torch.ones(64).bfloat16())
    assert [k.supports(x[:1].expand(M, 256), q, torch.ones(64)) for M in (9, 32, 33)] == [True, True, False]
    assert not k.supports(x, q, torch.ones(128)[::2])
    monkeypatch.setattr(k, "_shared_memory", lambda device: 45000)
    assert not k.supports(x, weight, None), "no room for three stages"


def test_guards_of_experts(h200):
    x, weight, expert = torch.ones(1, 2, 256).bfloat16(), torch.ones(5, 64, 256).bfloat16(), torch.zeros(2, 3).long()
    assert k.supports_experts(x, weight, None, expert, torch.ones(256).bfloat16(), True)
    assert k.supports_experts(x, weight.to(torch.int8), torch.ones(5, 64), expert, None, False)
    for changed in (
        (x.float(), weight, None, expert, None, False), (x, weight.float(), None, expert, None, False),
        (torch.ones(3, 256).bfloat16(), weight, None, torch.zeros(3).long(), None, False),
        (x, weight, None, torch.zeros(65).long(), None, False), (x, weight, torch.ones(5, 64), expert, None, False),
        (x, weight[:, :24].contiguous(), None, expert, None, False),  # a tile would be of two matrices
        (x, weight[:, :24].contiguous(), None, expert, None, True), (x, weight, None, expert, torch.ones(256), False),
    ):  # fmt: skip
        assert not k.supports_experts(*changed)
    plans = [k._plan(2, 32, 2, 28672, 4096, False, None, stacked) for stacked in (False, True)]
    assert plans[1].shared == plans[0].shared + 4 * k.MAX_MATRICES <= 232448


def test_attend_guards(h200):
    qkv, k_cache, v_cache = (torch.zeros(*s, dtype=torch.bfloat16) for s in ((1, 2, 384), (1, 1, 9, 64), (1, 1, 9, 64)))
    pos = torch.zeros(1, 2, dtype=torch.int64)
    assert k.supports_attend(qkv, pos, k_cache, v_cache, 4)
    assert k.supports_attend(qkv, pos, k_cache, v_cache, 4, (torch.ones(64).bfloat16(), None))
    assert k.supports_attend(qkv[:, :1].expand(3, 1, -1), pos[:, :1], k_cache, v_cache, 4)
    assert not k.supports_attend(qkv[:, :1].expand(3, 1, -1), pos[:, :1].expand(3, 1), k_cache, v_cache, 4)
    for changed in (
        (qkv.float(), pos, k_cache, v_cache, 4), (qkv, pos, k_cache.half(), v_cache, 4),
        (qkv[:, :0], pos, k_cache, v_cache, 4), (qkv, pos, k_cache[..., :32], v_cache[..., :32], 4),
        (qkv.repeat(1, 5, 1), pos, k_cache, v_cache, 4), (qkv.expand(5000, 2, -1), pos, k_cache, v_cache, 4),
        (qkv, pos, k_cache, v_cache.repeat(1, 1, 1, 2)[..., ::2], 4),
        (qkv, pos, k_cache, v_cache, 4, (torch.ones(64),)),
        (qkv, pos, k_cache.to(torch.float8_e4m3fn), v_cache, 4),
    ):  # fmt: skip
        assert not k.supports_attend(*changed)


def test_not_on_a_cpu():
    assert not k.available(torch.device("cpu"))
    assert not k.supports(torch.ones(2, 256).bfloat16(), torch.ones(64, 256).bfloat16())
    assert not k.supports_attend(*(torch.zeros(1, 1, 9, 64).bfloat16(),) * 4, 4)


def test_kernels_alone(monkeypatch):
    """kernels.py copied without kernels_cuda.py."""
    kernels._kernels_cuda.cache_clear()
    monkeypatch.setitem(sys.modules, "kernels_cuda", None)
    assert kernels._kernels_cuda() is None
    kernels._kernels_cuda.cache_clear()


def test_errors_say_what_failed(monkeypatch):
    with pytest.raises(RuntimeError, match="cuModuleLoadData failed with error 300"):
        k._check(300, "cuModuleLoadData")

    def failing(log: bytes):
        def get_log(program, buffer):
            buffer.value = log

        def get_size(program, size):
            size._obj.value = len(log) + 1

        return SimpleNamespace(
            nvrtcCreateProgram=lambda *a: 0, nvrtcCompileProgram=lambda *a: 6, nvrtcGetProgramLogSize=get_size,
            nvrtcGetProgramLog=get_log,
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="does not compile: line 1: no"):
        k._compile(failing(b"line 1: no"), "linear_cuda.cu", b"", [])


def test_machine_code_is_kept(monkeypatch, tmp_path):
    """Compiled once for each file, set of options and compiler; anew each time where it cannot be kept."""
    compiled, minor = [], 0

    def version(major, minor_):
        major._obj[:] = 13, minor
        return 0

    def code(file, options):
        return k._machine_code(SimpleNamespace(nvrtcVersion=version), file, options)

    monkeypatch.setattr(k, "_compile", lambda *a: compiled.append(a[1:]) or b"%d" % len(compiled))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cases = [("linear_cuda.cu", ["-DKIND=0"]), ("linear_cuda.cu", ["-DKIND=1"]), ("attend_cuda.cu", ["-DKIND=0"])]
    assert [code(*c) for c in cases + cases] == [b"1", b"2", b"3"] * 2
    assert compiled[2][1].startswith(b"// ") and b"attend" in compiled[2][1]
    minor = 1
    assert code(*cases[0]) == b"4" and code(*cases[0]) == b"4"
    kept = list((tmp_path / "hotloop" / "cuda").iterdir())
    assert len(kept) == 4 and all(f.suffix == ".cubin" for f in kept)
    for left in (b"", b"4"):  # by a crash
        for f in kept:
            f.write_bytes(left)
        again = len(compiled) + 1
        assert code(*cases[0]) == code(*cases[0]) == b"%d" % again
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no directory
    assert code(*cases[0]) == b"7" and code(*cases[0]) == b"8"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    assert code(*cases[0]) == b"9"
