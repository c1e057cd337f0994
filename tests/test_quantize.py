"""quantize.py: linears against their dequantized weights, recipes, streaming, GPTQ over models, and every user error.

Try it:  python -m pytest tests/test_quantize.py
"""

import dataclasses
import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import calibrate
import checkpoint
import eval as evaluation
import gptq
import kernels_cpu
import quantize
from checkpoint import META, build_model, load_model, metadata, open_checkpoint, write_checkpoint
from generate import generate
from model import ExpertLinear, ModelArgs, Transformer
from quantize import Int4Linear, QuantLinear, check_recipe, make_recipe, pack_nibbles, swap_linears, unpack_nibbles
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
HELDOUT = DEMO / "heldout.txt"
KINDS = [("int8", None), ("fp8", None), ("int4", 32), ("int4", 64), ("int4", 128)]
MOE = dict(n_experts=4, n_experts_per_token=2)  # as in Mixtral


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["cpp", "plain"])
def cpp(request, monkeypatch):
    """With the C++ kernels, and without."""
    if request.param == "plain":
        monkeypatch.setattr(kernels_cpu, "available", lambda: False)
    elif not kernels_cpu.available():
        pytest.skip("no C++ compiler")
    return request.param == "cpp"


@pytest.fixture
def cli(monkeypatch, capfd):
    """Run a script of the repository as __main__ in this process -> code, out, err."""

    def run(*argv, script: str = "quantize.py"):
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            code = exit.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def is_one_line_error(done, *words: str, script: str = "quantize.py") -> None:
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith(f"{script}: ") and done.err.endswith("\n") and done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err and "Error:" not in done.err
    for word in words:
        assert word in done.err, (word, done.err)


def write(path: Path, model: Transformer, tokenizer: bool = False, **replaced) -> Path:
    """A converted directory of a model in memory, with the demo's tokenizer where one is wanted."""
    state = model.state_dict() | replaced
    if model.args.tie_embeddings:
        del state["output.weight"]
    write_checkpoint(path, state.items(), META, metadata(model.args, path), DEMO if tokenizer else None)
    return path


def edit_recipe(directory: Path, change) -> None:
    meta = json.loads((directory / META).read_text())
    meta["quantization"] = change(meta["quantization"])
    (directory / META).write_text(json.dumps(meta))


def quantized_linear(mode, groupsize, N, K, bias=False, dtype=torch.float32) -> tuple[QuantLinear, nn.Linear]:
    """A packed quantized linear of random weights, and the float linear of its dequantized weight, same bias."""
    rng = torch.Generator().manual_seed(N * K)
    weight = torch.randn(N, K, generator=rng) * (0.1 + torch.rand(N, 1, generator=rng))
    weight[:, 0] += 0.3  # so that zeros are nowhere in the middle
    holder = nn.Sequential(nn.Linear(K, N, bias=bias))
    linear = swap_linears(holder, make_recipe(mode, groupsize))["0"]
    assert holder[0] is linear
    for name, tensor in linear.quantize(weight).items():
        assert tensor.shape == getattr(linear, name).shape and tensor.dtype == getattr(linear, name).dtype
        setattr(linear, name, tensor)
    plain = nn.Linear(K, N, bias=bias).requires_grad_(False)
    plain.weight.data = linear.dequantize()
    if bias:
        linear.bias = plain.bias.data = torch.randn(N, generator=rng).to(dtype)
    unpacked = linear.dequantize()
    linear.pack()
    assert torch.equal(linear.dequantize(), unpacked)
    # The grid is fine enough: within half a step of the weight.
    step = {"int8": weight.abs().amax(1, keepdim=True) / 127, "fp8": 2**-3 * weight.abs() + 1e-3}.get(mode)
    if mode == "int4":
        groups = weight.unflatten(1, (-1, groupsize))
        step = ((groups.amax(-1) - groups.amin(-1)) / 15).repeat_interleave(groupsize, 1)
    assert ((unpacked - weight).abs() <= 0.51 * step + 1e-3 * weight.abs()).all()
    return linear, plain


def close(y, x, plain) -> None:
    """y is what `plain` gives, within the rounding of y's dtype: of the result, and of the weight on its way."""
    want = F.linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())
    assert y.dtype == x.dtype and y.shape == want.shape and y.isfinite().all()
    ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}[y.dtype]
    product = want if plain.bias is None else want - plain.bias.double()  # rounded before the bias is added
    spread = (x.double().square() @ plain.weight.double().square().T).sqrt()  # of the weights' independent roundings
    limit = ulp * (want.abs() + product.abs() + 2 * spread) + 1e-6 * (x.double().abs() @ plain.weight.double().abs().T)
    assert ((y.double() - want).abs() <= limit).all(), ((y.double() - want).abs() / limit).max()


# ------------------------------------------------------------------------------------------------------ the linears
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 2, 3, 8, 17, 512])
@pytest.mark.parametrize("mode, groupsize", KINDS)
def test_linear_equals_its_dequantized_reference(mode, groupsize, M, dtype, cpp):
    for N, K, bias in [(37, 384, True), (1, 128, False), (261, 640, False)]:
        linear, plain = quantized_linear(mode, groupsize, N, K, bias, dtype)
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
        close(linear(x), x, plain)
    if mode == "int4":
        assert (linear.weight is None) == cpp  # else this does not test what it says
    x = torch.randn(2, 3, 640).to(dtype)
    assert torch.equal(linear(x), linear(x.view(6, 640)).view(2, 3, -1))


@pytest.mark.parametrize("M", [1, 17])
@pytest.mark.parametrize("mode, groupsize", KINDS[:4])
def test_float16(mode, groupsize, M, cpp):
    linear, plain = quantized_linear(mode, groupsize, 37, 384, True, torch.float16)
    x = torch.randn(M, 384).half()
    close(linear(x), x, plain)
    x = torch.full((M, 384), 100.0).half()  # times 448 or 127 their sums leave float16's range
    torch.testing.assert_close(linear(x).float(), plain.float()(x.float()), rtol=1e-2, atol=5)


@pytest.mark.parametrize("mode, groupsize", [("int8", None), ("fp8", None), ("int4", 64)])
def test_compiled_in_one_graph(mode, groupsize):
    torch._dynamo.reset()
    linear, plain = quantized_linear(mode, groupsize, 37, 384, True)
    x = torch.randn(3, 384)
    close(torch.compile(linear, fullgraph=True)(x), x, plain)


@pytest.mark.parametrize("mode, groupsize", [("int8", None), ("fp8", None), ("int4", 32)])
def test_stack_of_experts(mode, groupsize):
    holder = nn.ModuleDict({"up": ExpertLinear(3, 64, 37)})
    weight = holder["up"].weight.data
    linear = swap_linears(holder, make_recipe(mode, groupsize))["up"]
    for name, tensor in linear.quantize(weight).items():
        assert tensor.shape == getattr(linear, name).shape and tensor.dtype == getattr(linear, name).dtype
        setattr(linear, name, tensor)
    linear.pack()
    dense = linear.dequantize()
    assert dense.shape == weight.shape and (dense - weight).abs().max() < weight.abs().max() / 14
    for dtype in (torch.float32, torch.bfloat16):
        x, expert = torch.randn(5, 64).to(dtype), torch.tensor([2, 0, 0, 1, 2])
        for e in range(3):
            close(linear.one(x, e), x, SimpleNamespace(weight=dense[e], bias=None))
        y = linear(x, expert)
        for n in range(5):
            close(y[n], x[n], SimpleNamespace(weight=dense[expert[n]], bias=None))


def test_rows_of_zeros_and_constants():
    for mode, groupsize in KINDS:
        linear = swap_linears(nn.Sequential(nn.Linear(128, 3, bias=False)), make_recipe(mode, groupsize))["0"]
        weight = torch.stack([torch.zeros(128), torch.full((128,), -0.25), torch.eye(128)[5] * 0.003])
        dense = linear.dequantize_stored(**linear.quantize(weight))
        torch.testing.assert_close(dense, weight, rtol=1e-3, atol=1e-7)


def test_nibbles():
    q = torch.randint(0, 16, (5, 7, 64), dtype=torch.uint8)
    packed = pack_nibbles(q)
    assert packed.shape == (5, 7, 32) and packed.dtype == torch.uint8 and torch.equal(unpack_nibbles(packed), q)
    assert pack_nibbles(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [0x21, 0x0F]  # even column low


@pytest.mark.skipif("not __import__('kernels_cpu').available()", reason="no C++ compiler")
@pytest.mark.parametrize("groupsize", [32, 64, 128])
def test_packing_does_not_show_in_the_state_dict(groupsize, monkeypatch):
    packed, _ = quantized_linear("int4", groupsize, 37, 384, bias=True)
    monkeypatch.setattr(kernels_cpu, "available", lambda: False)
    unpacked, _ = quantized_linear("int4", groupsize, 37, 384, bias=True)
    assert packed.weight is None and unpacked.weight is not None
    a, b = packed.state_dict(), unpacked.state_dict()
    assert sorted(a) == sorted(b) == ["bias", "scale", "weight", "zero"]
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype and a[k].is_contiguous() for k in a)
    unpacked.load_state_dict(a)


def test_hqq_beats_rtn_and_gptq_needs_data():
    weight = torch.randn(64, 256).pow(3)
    errors = {}
    for method in ("rtn", "hqq"):
        linear = swap_linears(nn.Sequential(nn.Linear(256, 64)), make_recipe("int4", 64, method))["0"]
        errors[method] = (linear.dequantize_stored(**linear.quantize(weight)) - weight).square().mean()
    assert errors["hqq"] < 0.95 * errors["rtn"]
    linear = swap_linears(nn.Sequential(nn.Linear(256, 64)), make_recipe("int4", 64, "gptq"))["0"]
    with pytest.raises(ValueError, match="calibration text"):
        linear.quantize(weight)


# -------------------------------------------------------------------------------------------------------- the recipe
def test_recipes():
    assert make_recipe("int8") == {"mode": "int8", "skip": []}
    assert make_recipe("int4", skip=["lm_head", "layers.0."]) == {
        "mode": "int4", "skip": ["output", "layers.0."], "groupsize": 64, "method": "rtn", "groupsizes": {},
    }  # fmt: skip
    for mode, groupsize, method, words in [
        ("int3", None, None, "'int3' is not known; known: int8, int4, fp8"),
        ("int8", 64, None, "groupsize 64 does not apply to int8"),
        ("fp8", 0, None, "groupsize 0 does not apply to fp8"),
        ("fp8", None, "hqq", "method hqq does not apply to fp8"),
        ("int4", 48, None, r"groupsize 48 is not supported; known: \(32, 64, 128\)"),
        ("int4", 0, None, "groupsize 0 is not supported"),
        ("int4", 64, "awq", "'awq' is not known; known: rtn, hqq, gptq"),
    ]:
        with pytest.raises(ValueError, match=words):
            make_recipe(mode, groupsize, method)


GOOD = {"mode": "int4", "skip": [], "groupsize": 64, "method": "rtn", "groupsizes": {}}


@pytest.mark.parametrize(
    "recipe, words",
    [
        (GOOD | {"mode": "int2"}, "'int2' is not known"),
        (GOOD | {"method": "awq"}, "'awq' is not known"),
        (GOOD | {"groupsize": 16}, "groupsize 16"),
        (GOOD | {"rotation": "hadamard"}, "'rotation' is not known"),
        (GOOD | {"groupsizes": {"output": 48}}, "groupsizes"),
        (GOOD | {"groupsizes": [32]}, "groupsizes"),
        (GOOD | {"skip": "output"}, "skip"),
        (GOOD | {"skip": None}, "skip"),
        ({"mode": "int8", "skip": [3]}, "skip"),
        ({}, "None is not known"),
        ("int8", "'int8' is not known"),
        (["int8"], "not known"),
    ],
)
def test_recipes_of_other_versions_are_refused(tiny, tmp_path, recipe, words):
    with pytest.raises(ValueError, match=words):
        check_recipe(recipe)
    write(tmp_path / "model", tiny(n_layers=1))
    edit_recipe(tmp_path / "model", lambda _: recipe)
    with pytest.raises(ValueError, match=words) as error:
        load_model(tmp_path / "model")
    assert str(tmp_path / "model" / META) in str(error.value) and "\n" not in str(error.value)


def test_what_is_swapped(tiny):
    def names(model, recipe):
        linears = swap_linears(model, recipe)
        assert all(model.get_submodule(name) is linear for name, linear in linears.items())
        return {n.removeprefix("layers.") for n in linears}

    dense = {f"{i}.{part}.linear" for i in (0, 1) for part in ("qkv", "out", "gate_up", "down")}
    assert names(tiny(), make_recipe("int8")) == dense | {"output"}
    assert names(tiny(), make_recipe("int8", skip=["lm_head"])) == dense
    assert names(tiny(), make_recipe("int8", skip=["layers.0.", "down"])) == {
        "1.qkv.linear", "1.out.linear", "1.gate_up.linear", "output",
    }  # fmt: skip
    experts = {f"{i}.{part}" for i in (0, 1) for part in ("qkv.linear", "out.linear", "moe.gate_up", "moe.down")}
    assert names(tiny(**MOE), make_recipe("int4", 32)) == experts | {"output"}  # the routers stay
    with pytest.raises(ValueError, match="--skip head: no linear is called so"):
        swap_linears(tiny(), make_recipe("int8", skip=["output", "head"]))


def test_smaller_groups_are_recorded():
    sizes = dict(dim=96, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=320, vocab_size=9, max_seq_len=9)
    args = ModelArgs(**sizes)
    recipe = make_recipe("int4", 128)
    with torch.device("meta"):
        linears = swap_linears(Transformer(args), recipe)
    assert recipe["groupsizes"] == {
        "layers.0.qkv.linear": 32, "layers.0.gate_up.linear": 32, "layers.0.down.linear": 64, "output": 32,
    }  # fmt: skip
    assert linears["layers.0.down.linear"].groupsize == 64 and linears["layers.0.out.linear"].groupsize == 128
    recipe["groupsizes"]["layers.0.out.linear"] = 32  # what is recorded counts, not what would be chosen today
    with torch.device("meta"):
        assert swap_linears(Transformer(args), recipe)["layers.0.out.linear"].groupsize == 32
    with torch.device("meta"), pytest.raises(ValueError, match="layers.0.qkv.linear: in_features 80 .* multiple of 32"):
        swap_linears(Transformer(dataclasses.replace(args, dim=80)), make_recipe("int4"))


# ------------------------------------------------------------------------------------------------------ whole models
def dequantized(model: Transformer) -> Transformer:
    """The plain float32 model of a quantized one."""
    plain = Transformer(dataclasses.replace(model.args, tie_embeddings=False))
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            for key in module.layout():
                del state[f"{name}.{key}"]
            state[f"{name}.weight"] = module.dequantize()
    plain.load_state_dict({k: v.float() for k, v in state.items()})
    return plain.requires_grad_(False).eval()


VARIANTS = [
    {},
    {"tie_embeddings": True},
    {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    MOE,
    {"dim": 96, "tie_embeddings": True, **MOE},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("mode, groupsize", KINDS[:3] + KINDS[4:])
def test_model_equals_the_dequantized_model(tiny, mode, groupsize, changes, cpp):
    model = tiny(**changes)
    state = {k: v for k, v in model.state_dict().items() if not (model.args.tie_embeddings and k == "output.weight")}
    quant = build_model(model.args, state.items(), quant=make_recipe(mode, groupsize))
    plain = dequantized(quant)
    assert isinstance(quant.output, QuantLinear) and isinstance(quant.tok_embeddings, nn.Embedding)
    for name, linear in quant.named_modules():
        if isinstance(linear, QuantLinear):
            stored = linear.quantize(model.state_dict()[f"{name}.weight"])
            assert torch.equal(plain.state_dict()[f"{name}.weight"], linear.dequantize_stored(**stored))
    for length in (1, 40):  # of a MoE: two rows are gathered with their experts, eighty are routed
        tokens = torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(length))
        want = plain(tokens)
        torch.testing.assert_close(quant(tokens), want, rtol=1e-3, atol=1e-3)
        far = (model(tokens) - want).abs().max()
        assert far > 0.03, far  # and the weights did change


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {**MOE, "qkv_bias": True}], ids=str)
@pytest.mark.parametrize(
    "arguments", ["int8", "fp8", "int4", "int4 --groupsize 128 --method hqq", "int8 --skip lm_head"]
)
def test_written_equals_quantized_at_load(tiny, tmp_path, cli, arguments, changes):
    source, out = write(tmp_path / "source", tiny(dim=96, **changes).bfloat16()), tmp_path / "out"
    done = cli("--checkpoint_path", source, "--out_dir", out, "--json", "--mode", *arguments.split())
    assert done.code == 0, done.err
    figures = json.loads(done.out.splitlines()[-1])
    meta = json.loads((out / META).read_text())
    recipe = make_recipe(
        arguments.split()[0], 128 if "128" in arguments else None, "hqq" if "hqq" in arguments else None,
        ["lm_head"] if "skip" in arguments else [],
    )  # fmt: skip
    at_load = load_model(source, quant=recipe)
    assert recipe.get("groupsizes", {}) == {}  # loading changes nothing of the caller's
    if recipe["mode"] == "int4":
        recipe["groupsizes"] = {n: m.groupsize for n, m in at_load.named_modules() if isinstance(m, Int4Linear)}
        recipe["groupsizes"] = {n: g for n, g in recipe["groupsizes"].items() if g != recipe["groupsize"]}
        assert recipe["groupsizes"]["layers.0.qkv.linear"] == 32
    assert meta["quantization"] == figures["recipe"] == recipe
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]

    written = load_model(out)
    a, b = at_load.state_dict(), written.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) and a[k].dtype == b[k].dtype for k in a)
    tokens = torch.randint(0, 97, (2, 9))
    assert torch.equal(at_load(tokens), written(tokens))
    skipped = "skip" in arguments
    assert isinstance(written.output, QuantLinear) != skipped
    if skipped:
        assert (written.output.weight is written.tok_embeddings.weight) == written.args.tie_embeddings
        assert torch.equal(written.output.weight, load_model(source).output.weight)
    stored = dict(open_checkpoint(out)[2])
    expected = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[recipe["mode"]]
    assert stored["layers.1.qkv.linear.weight"].dtype == expected
    assert figures["megabytes"] == pytest.approx(sum(t.nbytes for t in stored.values()) / 1e6)
    # The compute dtype is free; what is stored stays as it is.
    for dtype in (torch.float16, torch.bfloat16):
        other = load_model(out, dtype=dtype)
        assert other.tok_embeddings.weight.dtype == dtype
        for name, module in other.named_modules():
            for key in module.layout() if isinstance(module, QuantLinear) else ():
                tensor = other.state_dict()[f"{name}.{key}"]
                assert tensor.dtype == b[f"{name}.{key}"].dtype and torch.equal(tensor, b[f"{name}.{key}"])


def test_recorded_groupsizes_are_obeyed_at_load(tiny, tmp_path, cli):
    source = write(tmp_path / "source", tiny())
    arguments = ("--mode", "int4", "--groupsize", 32)
    assert cli("--checkpoint_path", source, "--out_dir", tmp_path / "out", *arguments).code == 0
    name = "layers.0.qkv.linear"

    def wider(recipe):  # the same groups, described another way
        return recipe | {"groupsize": 64, "groupsizes": dict.fromkeys(swap_linears(tiny(), make_recipe("int8")), 32)}

    before = load_model(tmp_path / "out").state_dict()
    edit_recipe(tmp_path / "out", wider)
    after = load_model(tmp_path / "out").state_dict()
    assert after[f"{name}.scale"].shape == (128, 2) and all(torch.equal(before[k], after[k]) for k in before)
    edit_recipe(tmp_path / "out", lambda recipe: recipe | {"groupsizes": {}})
    with pytest.raises(ValueError, match=r"scale is \[\d+, 2\], the configuration says \[\d+, 1\]"):
        load_model(tmp_path / "out")


def test_quantized_models_are_not_saved_as_others(tiny, tmp_path):
    source = write(tmp_path / "source", tiny())
    with pytest.raises(ValueError, match="quantized"):
        checkpoint.save_checkpoint(load_model(source, quant=make_recipe("int8")), tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{}, MOE, {"tie_embeddings": True}], ids=str)
@pytest.mark.parametrize("way", ["load", "write"])
def test_one_float_weight_at_a_time(tiny, tmp_path, monkeypatch, way, changes):
    model = tiny(n_layers=4, **changes)
    state = dict(model.state_dict())
    if model.args.tie_embeddings:
        del state["output.weight"]
    wanted = set(swap_linears(tiny(n_layers=4, **changes), make_recipe("int4")))
    alive, most = {}, 0

    def stream():
        nonlocal most
        for name in state:
            # Of the weights to be quantized, only the one that came last may still be in hand.
            most = max(most, sum(ref() is not None for ref in alive.values()))
            tensor = state[name].clone()
            if name.removesuffix(".weight") in wanted:
                alive[name] = weakref.ref(tensor)
            yield name, tensor
            del tensor

    if way == "load":
        build_model(model.args, stream(), quant=make_recipe("int4"))
    else:
        monkeypatch.setattr(checkpoint, "open_checkpoint", lambda path: (model.args, None, stream(), 0))
        arguments = vars(quantize.parser().parse_args(["--mode", "int4", "--out_dir", str(tmp_path / "out")]))
        quantize.main(**arguments | {"checkpoint_path": str(write(tmp_path / "source", model))})
    assert len(alive) == len(wanted) - bool(model.args.tie_embeddings) and most == 1


# --------------------------------------------------------------------------------------------------------------- GPTQ
@pytest.fixture(scope="module")
def slice_of_demo(tmp_path_factory):
    """The first two layers of the demo in float32; text to calibrate with; tokens [4, 512] of other text to judge."""
    whole = load_model(DEMO, dtype=torch.float32)
    model = Transformer(dataclasses.replace(whole.args, n_layers=2)).requires_grad_(False)
    state = whole.state_dict()
    model.load_state_dict({k: state[k] for k in model.state_dict()})
    directory = write(tmp_path_factory.mktemp("slice") / "model", model, tokenizer=True)
    text = HELDOUT.read_text(encoding="utf-8")
    (directory / "calibration.txt").write_text(text[:40_000], encoding="utf-8")
    tokens = Tokenizer(DEMO).encode(text[100_000:120_000])[:2048]
    return directory, directory / "calibration.txt", torch.tensor(tokens).view(4, 512)


GPTQ = ("--mode", "int4", "--method", "gptq")
FEW = ("--calibration_samples", 8, "--calibration_length", 256)


def test_gptq_of_a_trained_model(slice_of_demo, tmp_path, cli):
    directory, text, tokens = slice_of_demo
    models = {"float": load_model(directory)}
    for method, more in [("rtn", ()), ("gptq", (*FEW, "--calibration_text", text))]:
        arguments = ("--mode", "int4", "--groupsize", 128, "--method", method, *more)
        done = cli("--checkpoint_path", directory, "--out_dir", tmp_path / method, *arguments)
        assert done.code == 0, done.err
        models[method] = load_model(tmp_path / method)
    assert json.loads((tmp_path / "gptq" / META).read_text())["quantization"] == {
        "mode": "int4", "skip": [], "groupsize": 128, "method": "gptq", "groupsizes": {},
    }  # fmt: skip
    plain = dequantized(models["gptq"])
    for name, weight in models["float"].state_dict().items():
        error = (plain.state_dict()[name] - weight).norm() / weight.norm()
        assert error < 0.2, (name, error)  # a weight is moved by its neighbours' errors, but not far
        if "linear" not in name and name != "output.weight":
            assert error == 0, name  # norms and the embedding
    caught = {}
    for key, model in models.items():
        for i, layer in enumerate(model.layers):
            layer.register_forward_hook(lambda *a, at=(key, i): caught.update({at: a[2]}))
        caught[key, "logits"] = model(tokens)
    for at in (0, 1, "logits"):
        loss = {key: (caught[key, at] - caught["float", at]).square().mean() for key in models}
        assert 0 < loss["gptq"] < 0.8 * loss["rtn"], (at, loss)


@pytest.mark.parametrize(
    "changes", [{}, MOE, {"tie_embeddings": True, **MOE}, {"qkv_bias": True, "mlp_bias": True}], ids=str
)
def test_gptq_streams_any_model(tiny, changes):
    """Of a random model: all stored tensors come, in the stored formats, and the outputs are nearer than RTN's."""
    model = tiny(**changes)
    tokens = torch.randint(0, 97, (8, 128), generator=torch.Generator().manual_seed(1))
    losses = {}
    for method in ("rtn", "gptq"):
        recipe = make_recipe("int4", 64, method)
        state = dict(model.state_dict())
        if model.args.tie_embeddings:
            del state["output.weight"]
        stream = state.items()
        if method == "gptq":
            with torch.device("meta"):
                linears = swap_linears(Transformer(model.args), recipe)
            stream = calibrate.calibrate(model.args, stream, linears, tokens, torch.device("cpu"), True)
        quant = build_model(model.args, stream, quant=recipe)
        first = quant.layers[0].qkv(quant.tok_embeddings(tokens)) - model.layers[0].qkv(model.tok_embeddings(tokens))
        losses[method] = first.square().mean(), (quant(tokens) - model(tokens)).square().mean()
    assert losses["gptq"][0] < 0.9 * losses["rtn"][0]
    assert losses["gptq"][1] < (1.0 if changes == {} else 1.1) * losses["rtn"][1]  # experts switch, which is chaotic


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, **MOE}], ids=str)
def test_gptq_learns_from_the_inputs_of_the_quantized_model(tiny, monkeypatch, changes):
    model = tiny(**changes)
    tokens = torch.randint(0, 97, (150, 128))  # more than run through a layer together
    recipe, seen, caught = make_recipe("int4", 32, "gptq"), [], []
    with torch.device("meta"):
        linears = swap_linears(Transformer(model.args), recipe)
    real = gptq.gptq
    monkeypatch.setattr(gptq, "gptq", lambda w, hessian, *a, **k: (seen.append(hessian), real(w, hessian, *a, **k))[1])
    state = {k: v for k, v in model.state_dict().items() if not (model.args.tie_embeddings and k == "output.weight")}
    stream = calibrate.calibrate(model.args, state.items(), linears, tokens, torch.device("cpu"), True)
    plain = dequantized(build_model(model.args, stream, quant=recipe))
    for name, module in plain.named_modules():
        if name in linears:  # a linear's inputs come after all that stands before it was quantized
            caught.append(calibrate._hessians(module, plain, tokens.split(50)))
    caught = [sums[key] for sums in caught for key in sorted(sums, key=lambda k: k or 0)]
    assert len(seen) == len(caught) == (1 + 2 * (2 + 2 * 4) if "n_experts" in changes else 9)
    for a, b in zip(seen, caught, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max())


def test_gptq_of_an_expert_that_no_token_reaches(tiny):
    model = tiny(n_layers=1, **MOE)
    model.layers[0].moe.router.weight.data[3] = 0
    model.layers[0].moe.router.weight.data[:3] = torch.eye(64)[:3] * 50  # one of them is positive, or all are negative
    model.layers[0].moe.norm.weight.data[:3] = 0
    model.layers[0].moe.router.weight.data[:3, 3] = 0
    # With equal scores topk takes the first ones: experts 0 and 1, never 2 and 3.
    tokens = torch.randint(0, 97, (2, 64))
    recipe = make_recipe("int4", 64, "gptq")
    with torch.device("meta"):
        linears = swap_linears(Transformer(model.args), recipe)
    stream = model.state_dict().items()
    stored = dict(calibrate.calibrate(model.args, stream, linears, tokens, torch.device("cpu"), True))
    name = "layers.0.moe.gate_up"
    q, scale, zero = gptq.rtn(model.state_dict()[f"{name}.weight"], 64)
    same = [torch.equal(stored[f"{name}.weight"][e], pack_nibbles(q[e])) for e in range(4)]
    assert same.count(True) == 2, same


def test_gptq_leaves_out_what_is_skipped(slice_of_demo, tmp_path, cli, monkeypatch):
    directory, text, _ = slice_of_demo
    real, orders = gptq.gptq, []
    monkeypatch.setattr(gptq, "gptq", lambda *a, **k: (orders.append(k["act_order"]), real(*a, **k))[1])
    arguments = (*GPTQ, "--calibration_samples", 2, "--calibration_length", 64, "--calibration_text", text)
    done = cli("--checkpoint_path", directory, "--out_dir", tmp_path / "out", *arguments,
               "--no_act_order", "--skip", "lm_head", "layers.0.", "gate_up")  # fmt: skip
    assert done.code == 0, done.err
    before, after = load_model(directory).state_dict(), load_model(tmp_path / "out").state_dict()
    kept = [k for k in before if "layers.1." not in k or "gate_up" in k or "norm" in k]
    assert len(kept) == 12 and all(torch.equal(before[k], after[k]) for k in kept)
    assert after["layers.1.down.linear.weight"].dtype == torch.uint8
    assert orders == [False] * 3


# --------------------------------------------------------------------------------------------------- the bundled model
def test_greedy_int8_is_near_the_float_model():
    tokens = Tokenizer(DEMO).encode("def fibonacci(n):")
    models = [load_model(DEMO, dtype=torch.float32, quant=quant) for quant in (None, make_recipe("int8"))]
    a, b = ([int(t) for t in generate(model, [tokens], 64)] for model in models)
    same = sum(x == y for x, y in zip(a, b, strict=True))
    assert same > 32, same


def test_perplexity():
    documents, _, _ = evaluation.read_documents(HELDOUT, Tokenizer(DEMO), 4000)
    found = {}
    for name in ("float", "int8", "fp8"):
        model = load_model(DEMO, dtype=torch.float32, quant=None if name == "float" else make_recipe(name))
        found[name] = evaluation.perplexity(model, documents, 1024, 1000)["perplexity"]
    assert 1 < found["float"] < 20, found
    for name in ("int8", "fp8"):
        assert found[name] != found["float"] and abs(found[name] / found["float"] - 1) < 0.01, found


def test_generate_takes_quantized_checkpoints(tmp_path, cli):
    assert cli("--mode", "int4", "--groupsize", 32, "--out_dir", tmp_path / "out").code == 0  # of demo/, the default
    short = ("--prompt", "import os", "--max_new_tokens", 8, "--temperature", 0, "--device", "cpu", "--json")
    written = cli("--checkpoint_path", tmp_path / "out", *short, script="generate.py")
    at_load = cli("--quant", "int4", "--groupsize", 32, *short, script="generate.py")
    int8 = cli("--quant", "int8", *short, script="generate.py")
    tokens = []
    for done in (written, at_load, int8):
        assert done.code == 0, done.err
        tokens.append(json.loads(done.out.splitlines()[-1])["tokens"])
    assert tokens[0] == tokens[1] and [len(t) for t in tokens] == [8, 8, 8]
    done = cli("--checkpoint_path", tmp_path / "out", "--quant", "int8", *short, script="generate.py")
    is_one_line_error(done, "is quantized already (int4)", "without --quant", script="generate.py")
    done = cli("--checkpoint_path", tmp_path / "out", "--mode", "int8", "--out_dir", tmp_path / "twice")
    is_one_line_error(done, "is quantized already (int4)", "original")
    edit_recipe(tmp_path / "out", lambda recipe: recipe | {"mode": "int5"})
    done = cli("--checkpoint_path", tmp_path / "out", *short, script="generate.py")
    is_one_line_error(done, META, "'int5' is not known", script="generate.py")


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--mode", "int3"], ["'int3' is not known", "int8, int4, fp8"]),
        ([], ["--mode"]),
        (["--mode", "int8", "--groupsize", "64"], ["groupsize 64 does not apply to int8"]),
        (["--mode", "fp8", "--method", "gptq"], ["method gptq does not apply to fp8"]),
        (["--mode", "int4", "--groupsize", "96"], ["groupsize 96", "32, 64, 128"]),
        (["--mode", "int4", "--groupsize", "0"], ["groupsize 0"]),
        (["--mode", "int4", "--groupsize", "x"], ["--groupsize", "'x'"]),
        (["--mode", "int4", "--method", "awq"], ["'awq'", "rtn, hqq, gptq"]),
        (["--mode", "int8", "--skip", "lm_haed"], ["--skip lm_haed", "gate_up"]),
        (["--mode", "int8", "--device", "tpu"], ["--device tpu"]),
        (["--mode", "int8", "--device", "cuda:99"], ["--device cuda:99", "not available"]),
        (["--mode", "int8", "--checkpoint_path", "nowhere"], ["nowhere: no such directory"]),
        ([*GPTQ], ["--calibration_text FILE"]),
        ([*GPTQ, "--calibration_text", "nowhere.txt"], ["nowhere.txt", "cannot be read"]),
        ([*GPTQ, "--calibration_text", "{tmp}/latin.txt"], ["latin.txt", "utf-8"]),
        ([*GPTQ, "--calibration_text", "{tmp}/short.txt"], ["short.txt", "4 tokens", "2048", "--calibration_length"]),
        ([*GPTQ, "--calibration_text", "{tmp}/empty.txt"], ["empty.txt", "1 tokens"]),
        ([*GPTQ, "--calibration_text", "{tmp}/short.txt", "--calibration_length", "0"], ["--calibration_length 0"]),
        ([*GPTQ, "--calibration_text", "{tmp}/short.txt", "--calibration_samples", "-1"], ["--calibration_samples -1"]),
    ],
)
def test_bad_arguments(cli, tmp_path, arguments, words):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "short.txt").write_text("import os\n")
    (tmp_path / "empty.txt").write_text("")
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    is_one_line_error(cli("--out_dir", tmp_path / "out", *arguments), *words)
    assert not (tmp_path / "out").exists()


def test_groups_that_cannot_be(tiny, tmp_path, cli):
    source, out = write(tmp_path / "source", tiny(hidden_dim=72)), tmp_path / "out"
    arguments = ("--checkpoint_path", source, "--out_dir", out, "--mode", "int4")
    is_one_line_error(cli(*arguments), "layers.0.down.linear", "in_features 72", "multiple of 32", "--skip")
    assert not out.exists()
    done = cli("--checkpoint_path", source, "--quant", "int4", script="generate.py")
    assert done.code == 2 and done.err.count("\n") == 1
    assert cli(*arguments, "--skip", "down").code == 0  # the remedy that the message names
    assert load_model(out).layers[0].down.linear.weight.dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "arguments, name",
    [
        (["--mode", "int8"], "layers.1.down.linear.weight"),
        (["--mode", "fp8"], "output.weight"),
        (["--mode", "int4", "--method", "hqq"], "layers.0.qkv.linear.weight"),
        ([*GPTQ, "--calibration_length", "64", "--calibration_samples", "2"], "layers.1.gate_up.linear.weight"),
    ],
)
def test_weights_that_are_not_finite(tiny, tmp_path, cli, arguments, name, bad):
    model = tiny(vocab_size=4096)
    weight = model.state_dict()[name].clone()
    weight[3, 5] = bad
    source = write(tmp_path / "source", model, tokenizer=True, **{name: weight})
    if "gptq" in arguments:
        arguments = [*arguments, "--calibration_text", HELDOUT]
    done = cli("--checkpoint_path", source, "--out_dir", tmp_path / "out", *arguments)
    is_one_line_error(done, name, "NaN or infinite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    if "gptq" not in arguments:
        with pytest.raises(ValueError, match=name):
            load_model(source, quant=make_recipe(arguments[1]))


@pytest.mark.parametrize("arguments", [["--mode", "int8"], [*GPTQ, "--calibration_length", "64"]], ids=str)
@pytest.mark.parametrize("name", ["layers.0.out.linear.weight", "layers.1.gate_up.norm.weight", "norm.weight"])
def test_tensors_that_are_missing(tiny, tmp_path, cli, arguments, name):
    source = write(tmp_path / "source", tiny(vocab_size=4096), tokenizer=True)
    meta = json.loads((source / META).read_text())
    tensors = dict(open_checkpoint(source)[2])
    del tensors[name]
    write_checkpoint(source, tensors.items(), META, meta, source, overwrite=True)
    more = ["--calibration_text", HELDOUT, "--calibration_samples", "2"] if "gptq" in arguments else []
    done = cli("--checkpoint_path", source, "--out_dir", tmp_path / "out", *arguments, *more)
    is_one_line_error(done, "missing")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_output_directory(tiny, tmp_path, cli):
    source, out = write(tmp_path / "source", tiny(n_layers=1)), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    arguments = ("--checkpoint_path", source, "--mode", "int8", "--out_dir")
    is_one_line_error(cli(*arguments, out), str(out), "not empty", "--overwrite")
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    assert cli(*arguments, out, "--overwrite").code == 0
    assert load_model(out).output.weight.dtype == torch.int8 and (out / "notes.txt").read_text() == "mine"
    is_one_line_error(cli(*arguments, out / "notes.txt"), "is a file")
    (tmp_path / "empty").mkdir()
    assert cli(*arguments, tmp_path / "empty").code == 0


@pytest.mark.parametrize("shard", [1, 2])
def test_full_disk(tiny, tmp_path, cli, monkeypatch, shard):
    import safetensors.torch

    source = write(tmp_path / "source", tiny())
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    save_file, files = safetensors.torch.save_file, []

    def full(tensors, path, *args, **kwargs):
        files.append(path)
        if len(files) == shard:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    done = cli("--checkpoint_path", source, "--out_dir", tmp_path / "out", "--mode", "int4")
    is_one_line_error(done, str(tmp_path / "out"), "No space left on device", "nothing was left behind")
    assert len(files) == shard and sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_interrupt(tiny, tmp_path, cli, monkeypatch, method):
    source = write(tmp_path / "source", tiny(vocab_size=4096), tokenizer=True)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)  # some shards are on disk by then
    plain, calls = getattr(gptq, method), []

    def interrupted(*args, **kwargs):
        calls.append(len(list(tmp_path.glob(".out*/*"))))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(gptq, method, interrupted)
    more = ("--calibration_text", HELDOUT, *FEW) if method == "gptq" else ()
    done = cli("--checkpoint_path", source, "--out_dir", tmp_path / "out", "--mode", "int4", "--method", method, *more)
    assert done.code == 130 and done.out == "" and done.err == "\n"
    assert calls[-1] > 0 and sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_in_a_process_of_its_own_without_cpp(tmp_path):
    """The real program, where there is no compiler: what it writes is what the C++ side reads."""
    command = [sys.executable, str(ROOT / "quantize.py"), "--mode", "int4", "--out_dir", str(tmp_path / "out")]
    env = os.environ | {"HOTLOOP_NO_CPP": "1", "OMP_NUM_THREADS": "1"}
    source = shutil.copytree(DEMO / "draft", tmp_path / "draft")
    command += ["--checkpoint_path", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("\n") == 1 and " MB -> " in done.stdout
    a = load_model(tmp_path / "out").state_dict()
    b = load_model(source, quant=make_recipe("int4")).state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", ["int8", "int4", "fp8"])
def test_experts_stream_or_are_dequantized_one_by_one(mode):
    """A stack, packed for the CPU or not, in dtypes that its kernels know and in float16, which they do not."""
    linear = {"int8": quantize.Int8Linear, "int4": Int4Linear, "fp8": quantize.Fp8Linear}[mode](128, 24, n_experts=5)
    weight = torch.randn(5, 24, 128, generator=torch.Generator().manual_seed(0))
    for name, tensor in linear.quantize(weight).items():
        setattr(linear, name, tensor)
    dense, before = linear.dequantize(), {k: v.clone() for k, v in linear.state_dict().items()}
    linear.pack()
    assert (linear.weight is None) == (mode == "int4" and kernels_cpu.available())
    after = linear.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    expert = torch.tensor([3, 0, 3])
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6), (torch.float16, 2**-8)):
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
        want = torch.stack([dense[e] @ v for e, v in zip(expert.tolist(), x.float(), strict=True)])
        torch.testing.assert_close(linear(x, expert).float(), want, rtol=rtol, atol=8 * rtol)
        torch.testing.assert_close(linear.one(x, 2).float(), x.float() @ dense[2].T, rtol=rtol, atol=8 * rtol)
