"""Weight-only quantization: int8, int4 and fp8 linears, swapped into a model; and the program that writes checkpoints.

    python quantize.py --checkpoint_path demo --mode int4 --groupsize 64 --method gptq --out_dir runs/demo-int4

Modes: int8, symmetric with one scale an output channel; fp8, e4m3 with one scale an output channel; int4, asymmetric
with a scale and a zero point for each group of `groupsize` input columns. Activations keep their dtype, and sums are
float32. What a state dict holds is portable: plain integers (int4 as two nibbles a byte, the even column in the low
one) and float scales, the same on every device.

Sources: LLM.int8 (arXiv 2208.07339) for per-channel int8, FP8 formats (2209.05433), and gptq.py's for int4.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import kernels_cpu

MODES = ("int8", "int4", "fp8")
METHODS = ("rtn", "hqq", "gptq")
GROUPSIZES = (32, 64, 128)
RECIPE_FIELDS = {"mode", "groupsize", "method", "skip", "groupsizes"}
QUANTIZE_AT_ONCE = 1 << 22  # weights: rows are independent, and float32 copies of a whole head are gigabytes
FP8 = torch.float8_e4m3fn


# ------------------------------------------------------------------------------------------------------ the linears
class QuantLinear(nn.Module):
    """A linear with quantized weight [out, in], or E of them stacked [E, out, in]; subclasses say how.

    Buffers: `weight` in the stored format, its scales (and zeros), and `bias` [out] or None. `forward(x)` serves a
    plain linear; `forward(x, expert)` and `one(x, e)` a stack, as model.ExpertLinear does.
    """

    column_unit = 1  # input columns that only go together

    def __init__(self, in_features: int, out_features: int, bias: bool = False, n_experts: int = 0):
        super().__init__()
        self.in_features, self.out_features, self.n_experts = in_features, out_features, n_experts
        self.lead = (n_experts,) if n_experts else ()
        for name, (shape, dtype) in self.layout().items():
            self.register_buffer(name, torch.empty(*self.lead, *shape, dtype=dtype))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Stored tensor name -> (shape of one expert, dtype)."""
        raise TypeError(f"{type(self).__name__} has no layout of its own")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Float weight [(E,) out, in] -> the stored tensors. ValueError where a weight is NaN or infinite."""
        N, rows, stored = weight.shape[-2], max(1, QUANTIZE_AT_ONCE // weight.shape[-1]), {}
        for e in range(self.n_experts or 1):
            for first in range(0, N, rows):  # and filled in place: of a head, a second copy is much
                at = (e, slice(first, first + rows)) if self.n_experts else slice(first, first + rows)
                if not bool(weight[at].isfinite().all()):
                    raise ValueError("holds NaN or infinite values and cannot be quantized")
                for name, value in self.quantize_matrix(weight[at].float()).items():
                    if name not in stored:
                        stored[name] = value.new_empty(*self.lead, N, *value.shape[1:])
                    stored[name][at] = value
        return stored

    def canonical(self, at=...) -> dict[str, Tensor]:
        """The stored tensors, packed or not. at: of a stack, the expert, or a tensor of experts, that is wanted."""
        return {name: getattr(self, name)[at] for name in self.layout()}

    def dequantize(self) -> Tensor:
        """The weight that the stored tensors stand for: float32 [(E,) out, in]."""
        return self.dequantize_stored(**self.canonical())

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] without bias, in x's dtype, sums in float32."""
        return F.linear(x, self.dequantize().to(x.dtype))

    def forward(self, x: Tensor, expert: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]; with expert int64 [N], row n of x [N, in] through matrix expert[n]."""
        if expert is not None:
            return self.experts(x, expert)
        y = self.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def experts(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n of x [N, in] through matrix expert[n] of a stack -> [N, out]."""
        chosen = self.dequantize_stored(**self.canonical(expert))
        return torch.bmm(chosen.to(x.dtype), x[:, :, None])[:, :, 0]

    def one(self, x: Tensor, e: int) -> Tensor:
        """x [N, in] through expert e -> [N, out]."""
        if kernels.use_triton(x):
            return kernels.linear(x, self.weight[e], self.scale[e])
        return F.linear(x, self.dequantize_stored(**self.canonical(e)).to(x.dtype))

    def shard(self, rows=None, columns=None, bias: bool = True) -> tuple["QuantLinear", dict]:
        """The linear of some output rows or some input columns -> (it, empty; what it holds of each stored tensor).

        rows, columns: the [start, stop) ranges to keep, None: all. bias: of a linear cut by columns, whose results are
        summed, only one may keep it. What it holds: name -> (dimension counted from the end, ranges along it), no
        ranges for a tensor that is left out; whole tensors are not named. ValueError where a cut cannot be kept.
        """
        parts = self.column_parts(columns) if columns else {n: (-len(s), rows) for n, (s, _) in self.layout().items()}
        if self.bias is not None and (rows or not bias):
            parts["bias"] = -1, rows or []
        K = sum(b - a for a, b in columns) if columns else self.in_features
        N = sum(b - a for a, b in rows) if rows else self.out_features
        with torch.device(self.weight.device):
            has_bias = self.bias is not None and (bias or not columns)
            return type(self)(K, N, has_bias, self.n_experts, **self.settings(columns)), parts

    def column_parts(self, columns) -> dict:
        """What is kept of each stored tensor by a cut to these ranges of input columns; scales are of whole rows."""
        return {"weight": (-1, columns)}

    def settings(self, columns) -> dict:
        """The constructor's further arguments for a linear of these columns."""
        return {}

    def pack(self) -> None:
        """Rearrange the stored tensors as this device's kernel wants them; the state dict does not change."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, n_experts={self.n_experts}"


class Int8Linear(QuantLinear):
    """weight int8 [out, in], scale float32 [out]: W = weight * scale."""

    def layout(self):
        N, K = self.out_features, self.in_features
        return {"weight": ((N, K), torch.int8), "scale": ((N,), torch.float32)}

    def quantize_matrix(self, weight: Tensor) -> dict[str, Tensor]:
        """float32 [out, in] -> stored tensors."""
        scale = (weight.abs().amax(-1) * (1 / 127)).clamp_min(1e-12)  # CUDA divides by a constant inexactly
        return {"weight": (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), "scale": scale}

    @staticmethod
    def dequantize_stored(weight, scale):
        """Stored tensors -> float32."""
        return weight.float() * scale[..., None]

    def matmul(self, x):
        if kernels.use_triton(x):
            return kernels.linear(x, self.weight, self.scale)
        if x.dtype == torch.float16:  # which the C++ does not know
            return super().matmul(x)
        return kernels_cpu.linear_int8(x, self.weight, self.scale)

    def experts(self, x, expert):
        if streams(x):
            return torch.ops.hotloop.experts_int8(x, self.weight, self.scale, expert)
        return super().experts(x, expert)

    def one(self, x, e):
        return kernels_cpu.linear_int8(x, self.weight[e], self.scale[e]) if streams(x) else super().one(x, e)


class Fp8Linear(QuantLinear):
    """weight float8_e4m3fn [out, in], scale float32 [out]: W = weight * scale."""

    def layout(self):
        N, K = self.out_features, self.in_features
        return {"weight": ((N, K), FP8), "scale": ((N,), torch.float32)}

    def quantize_matrix(self, weight: Tensor) -> dict[str, Tensor]:
        """float32 [out, in] -> stored tensors."""
        limit = torch.finfo(FP8).max  # 448; beyond it the cast gives NaN
        scale = (weight.abs().amax(-1) * (1 / limit)).clamp_min(1e-12)
        return {"weight": (weight / scale[:, None]).clamp(-limit, limit).to(FP8), "scale": scale}

    @staticmethod
    def dequantize_stored(weight, scale):
        """Stored tensors -> float32."""
        return weight.float() * scale[..., None]

    def matmul(self, x):
        if x.dtype == torch.float16 and not kernels.use_triton(x):  # sums of up to 448 times x can leave its range
            return super().matmul(x)
        return kernels.linear(x, self.weight, self.scale)


class Int4Linear(QuantLinear):
    """weight uint8 [out, in / 2], scale and zero float16 [out, in / groupsize]: W = (nibble - zero) * scale.

    method: "rtn" or "hqq", what `quantize` does; with "gptq" the stored tensors are made by `calibrate`.
    """

    column_unit = GROUPSIZES[0]

    def __init__(self, in_features, out_features, bias=False, n_experts=0, groupsize: int = 64, method: str = "rtn"):
        self.groupsize, self.method = groupsize, method  # before layout() is asked for
        super().__init__(in_features, out_features, bias, n_experts)

    def layout(self):
        N, K, groups = self.out_features, self.in_features, self.in_features // self.groupsize
        return {
            "weight": ((N, K // 2), torch.uint8),
            "scale": ((N, groups), torch.float16),
            "zero": ((N, groups), torch.float16),
        }

    def settings(self, columns):
        groupsize = self.groupsize
        if columns:
            # Where a cut runs through a group, both sides hold smaller groups of its scale and zero: the same values.
            edges = [edge for pair in columns for edge in pair]
            fitting = [g for g in GROUPSIZES if g <= groupsize and not any(edge % g for edge in edges)]
            if not fitting:
                raise ValueError(f"a cut at columns {edges} is not at multiples of {GROUPSIZES[0]}, the smallest int4 "
                                 "group; use fewer ranks, or int8")  # fmt: skip
            groupsize = fitting[-1]
        return {"groupsize": groupsize, "method": self.method}

    def column_parts(self, columns):
        small, large = self.settings(columns)["groupsize"], self.groupsize
        if small == large:
            groups = [(a // large, b // large) for a, b in columns]
        else:
            groups = [(i // large, i // large + 1) for a, b in columns for i in range(a, b, small)]
        return {"weight": (-1, [(a // 2, b // 2) for a, b in columns]), "scale": (-1, groups), "zero": (-1, groups)}

    def quantize_matrix(self, weight: Tensor) -> dict[str, Tensor]:
        """float32 [out, in] -> stored tensors."""
        import gptq

        if self.method == "gptq":
            raise ValueError("gptq needs calibration text: use quantize.py, and load what it writes")
        return self.stored(*(gptq.hqq if self.method == "hqq" else gptq.rtn)(weight, self.groupsize))

    @staticmethod
    def stored(q, scale, zero):
        """What gptq.py returns, q uint8 [out, in] -> stored tensors."""
        return {"weight": pack_nibbles(q), "scale": scale, "zero": zero}

    @staticmethod
    def dequantize_stored(weight, scale, zero):
        """Stored tensors -> float32."""
        q = unpack_nibbles(weight).float().unflatten(-1, (scale.shape[-1], -1))
        return ((q - zero[..., None].float()) * scale[..., None].float()).flatten(-2)

    def pack(self):
        if kernels.use_triton(self.weight):
            self.register_buffer("scale_zero", kernels.join_scales(self.scale, self.zero), persistent=False)
            self.scale = self.zero = None
            return
        if not (self.weight.is_cpu and kernels_cpu.available()):
            return
        stored = list(self.canonical().values())
        packed = kernels_cpu.pack_int4(*(t[0] if self.n_experts else t for t in stored), self.groupsize)
        if self.n_experts:  # one by one: packing takes several times the memory of what is packed
            packed = [t.new_empty(self.n_experts, *t.shape) for t in packed]
            for e in range(self.n_experts):
                parts = kernels_cpu.pack_int4(*(t[e] for t in stored), self.groupsize)
                for whole, part in zip(packed, parts, strict=True):
                    whole[e] = part
        self.weight = self.scale = self.zero = None
        self.register_buffer("packed", packed[0], persistent=False)
        self.register_buffer("packed_scales", packed[1], persistent=False)

    def canonical(self, at=...):
        if self.scale is not None:
            return super().canonical(at)
        if self.weight is not None:
            scale, zero = kernels.split_scales(self.scale_zero[at])
            return {"weight": self.weight[at], "scale": scale, "zero": zero}
        packed = self.packed[at], self.packed_scales[at]
        rows = [t.flatten(0, -2) for t in packed]
        tensors = kernels_cpu.unpack_int4(*rows, self.groupsize, self.in_features)
        return dict(zip(self.layout(), (t.unflatten(0, packed[0].shape[:-1]) for t in tensors), strict=True))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.canonical().items()})

    def experts(self, x, expert):
        if self.weight is None and streams(x):
            return torch.ops.hotloop.experts_int4(x, self.packed, self.packed_scales, self.groupsize, expert)
        return super().experts(x, expert)

    def one(self, x, e):
        if self.weight is None and streams(x):
            return kernels_cpu.linear_int4(x, self.packed[e], self.packed_scales[e], self.groupsize)
        if self.scale is None and self.weight is not None:
            return kernels.linear(x, self.weight[e], self.scale_zero[e])
        # Not packed; on a GPU the parent's would take `scale`, of groups, for one of rows.
        return F.linear(x, self.dequantize_stored(**self.canonical(e)).to(x.dtype))

    def matmul(self, x):
        if self.weight is None:
            if streams(x):
                return kernels_cpu.linear_int4(x, self.packed, self.packed_scales, self.groupsize)
            return super().matmul(x)  # moved to a GPU after loading, or float16 on a CPU
        if self.scale is None:
            return kernels.linear(x, self.weight, self.scale_zero)
        return super().matmul(x)


def streams(x: Tensor) -> bool:
    """Whether the C++ kernels run for x: on a CPU, where there is a compiler; they do not know float16."""
    return x.is_cpu and x.dtype != torch.float16 and kernels_cpu.available()


def pack_nibbles(q: Tensor) -> Tensor:
    """uint8 [..., K] of values 0 ... 15 -> uint8 [..., K / 2], the even column in the low nibble."""
    return q[..., 0::2] | (q[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


# -------------------------------------------------------------------------------------------------------- the recipe
def make_recipe(mode: str, groupsize: int | None = None, method: str | None = None, skip: Iterable[str] = ()) -> dict:
    """The recipe that a checkpoint's JSON stores and `swap_linears` obeys; ValueError for what is not known.

    groupsize (32, 64 or 128; default 64) and method (default rtn) are of int4. skip: parts of module names, such as
    "output" (the head) or "layers.0.", whose linears stay as they are; "lm_head" is taken as "output".
    """
    if mode not in MODES:
        raise ValueError(f"quantization mode {mode!r} is not known; known: {', '.join(MODES)}")
    recipe = {"mode": mode, "skip": ["output" if s == "lm_head" else s for s in skip]}
    if mode == "int4":
        groupsize = 64 if groupsize is None else groupsize  # 0 is an error
        recipe |= {"groupsize": groupsize, "method": method or "rtn", "groupsizes": {}}
    elif groupsize is not None or method not in (None, "rtn"):
        what = f"groupsize {groupsize}" if groupsize is not None else f"method {method}"
        raise ValueError(f"{what} does not apply to {mode}: it has one scale an output channel, by rounding")
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: dict) -> None:
    """ValueError where a recipe, say of a newer version's checkpoint, is not understood in full."""
    if not isinstance(recipe, dict) or recipe.get("mode") not in MODES:
        mode = recipe.get("mode") if isinstance(recipe, dict) else recipe
        raise ValueError(f"quantization mode {mode!r} is not known; known: {', '.join(MODES)}")
    for field in recipe.keys() - RECIPE_FIELDS:
        raise ValueError(f"quantization field {field!r} is not known to this version of hotloop; upgrade it")
    if recipe["mode"] == "int4":
        if recipe.get("groupsize") not in GROUPSIZES:
            raise ValueError(f"groupsize {recipe.get('groupsize')} is not supported; known: {GROUPSIZES}")
        if recipe.get("method") not in METHODS:
            raise ValueError(f"quantization method {recipe.get('method')!r} is not known; known: {', '.join(METHODS)}")
    skip, groupsizes = recipe.get("skip", []), recipe.get("groupsizes", {})
    if not isinstance(skip, list) or not all(isinstance(part, str) and part for part in skip):
        raise ValueError(f"quantization skip {skip!r}: a list of parts of module names is expected")
    if not isinstance(groupsizes, dict) or any(g not in GROUPSIZES for g in groupsizes.values()):
        raise ValueError(f"quantization groupsizes {groupsizes!r}: linears with one of {GROUPSIZES} are expected")


def swap_linears(model: nn.Module, recipe: dict) -> dict[str, QuantLinear]:
    """Replace every linear of `model`, stacks of experts included, by a quantized one with empty buffers.

    Routers stay (tiny, and their error changes which experts run), and so does what the recipe skips. Where an int4
    group does not divide in_features, the largest smaller one that does is used and recorded in
    recipe["groupsizes"][name]; what is recorded there already is obeyed. ValueError where not even 32 divides, or where
    the recipe skips what no linear is called. Returns the new modules by name.
    """
    check_recipe(recipe)
    swapped, unused = {}, set(recipe.get("skip", ()))
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        stack = isinstance(weight, nn.Parameter) and weight.ndim == 3
        if not (isinstance(module, nn.Linear) or stack) or name.endswith("router"):
            continue
        if skipping := {part for part in recipe.get("skip", ()) if part in name}:
            unused -= skipping
            continue
        K, N = module.in_features, module.out_features
        more = {}
        if recipe["mode"] == "int4":
            limit = recipe.get("groupsizes", {}).get(name, recipe["groupsize"])
            groupsize = next((g for g in reversed(GROUPSIZES) if g <= limit and K % g == 0), None)
            if groupsize is None:
                raise ValueError(
                    f"{name}: in_features {K} is not a multiple of {GROUPSIZES[0]}, the smallest int4 group; "
                    f"leave it out with --skip {name.rsplit('.', 1)[-1]} or use int8"
                )
            if groupsize != recipe["groupsize"]:
                recipe.setdefault("groupsizes", {})[name] = groupsize
            more = {"groupsize": groupsize, "method": recipe["method"]}
        kind = {"int8": Int8Linear, "int4": Int4Linear, "fp8": Fp8Linear}[recipe["mode"]]
        bias = getattr(module, "bias", None) is not None
        with torch.device(weight.device):
            swapped[name] = kind(K, N, bias, module.n_experts if stack else 0, **more)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, swapped[name])
    if unused:
        known = sorted({part for name in swapped for part in name.split(".") if not part.isdigit()})
        raise ValueError(f"--skip {min(unused)}: no linear is called so; parts of names: {', '.join(known)}")
    return swapped


def quantize_tensor(name: str, tensor: Tensor, linears: dict[str, QuantLinear]) -> Iterator[tuple[str, Tensor]]:
    """One named tensor of a float checkpoint -> the stored tensors it becomes; itself where it is not quantized.

    ValueError, with its name, for a weight that is not finite.
    """
    module_name, _, leaf = name.rpartition(".")
    linear = linears.get(module_name)
    if leaf != "weight" or linear is None or tensor.dtype == linear.weight.dtype:
        yield name, tensor
        return
    try:
        stored = linear.quantize(tensor)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    yield from ((f"{module_name}.{key}", value) for key, value in stored.items())


# ------------------------------------------------------------------------------------------------------- the program
def main(checkpoint_path: str, mode: str, groupsize: int | None, method: str | None, out_dir: str, skip: list[str],
         calibration_text: str | None, calibration_samples: int, calibration_length: int, no_act_order: bool,
         device: str | None, overwrite: bool, json_line: bool) -> None:  # fmt: skip
    """Quantize a checkpoint, one layer in memory at a time, into a converted directory."""
    from calibrate import calibrate, read_calibration
    from checkpoint import META, check_out_dir, metadata, open_checkpoint, resolve, with_tied_head, write_checkpoint
    from machine import pick_device
    from model import Transformer

    begin = time.perf_counter()
    device = pick_device(device, ("cuda", "cpu"))
    recipe = make_recipe(mode, groupsize, method, skip)
    out = check_out_dir(out_dir, overwrite)
    directory = resolve(checkpoint_path)
    args, existing, tensors, nbytes = open_checkpoint(directory)
    if existing is not None:
        raise ValueError(f"{directory}: is quantized already ({existing['mode']}); start from the original checkpoint")
    with torch.device("meta"):
        model = Transformer(args)
    linears = swap_linears(model, recipe)
    missing = {k: v.shape for k, v in model.state_dict().items()}
    if args.tie_embeddings and "output" not in linears:
        del missing["output.weight"]
    if recipe.get("method") == "gptq":
        if calibration_text is None:
            raise ValueError("--method gptq learns from text: give --calibration_text FILE")
        tokens = read_calibration(calibration_text, directory, calibration_samples, calibration_length)
        if int(tokens.max()) >= args.vocab_size:
            raise ValueError(f"{directory}: the tokenizer has ids beyond the model's vocabulary of {args.vocab_size}")
        stored = calibrate(args, tensors, linears, tokens, device, not no_act_order)
    else:
        stored = (
            pair
            for name, tensor in with_tied_head(tensors, args, "output" in linears)
            for pair in quantize_tensor(name, tensor.to(device), linears)
        )
    written = {"bytes": 0}

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stored:
            if missing.pop(name, None) != tensor.shape:
                raise ValueError(f"{directory}: tensor {name} {list(tensor.shape)} is not part of this architecture")
            written["bytes"] += tensor.nbytes
            if sys.stderr.isatty():
                print(f"\r\033[K{name}  {written['bytes'] / 1e6:,.0f} MB", end="", file=sys.stderr, flush=True)
            yield name, tensor
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if missing:
            raise ValueError(f"{directory}: {len(missing)} tensors are missing, the first is {min(missing)}")

    write_checkpoint(out, counted(), META, metadata(args, directory, recipe), directory, overwrite)
    figures = {
        "out_dir": str(out),
        "recipe": recipe,
        "megabytes_before": nbytes / 1e6,
        "megabytes": written["bytes"] / 1e6,
        "seconds": time.perf_counter() - begin,
    }
    if device.type == "cuda":
        figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(f"{nbytes / 1e6:,.1f} MB -> {figures['megabytes']:,.1f} MB in {figures['seconds']:.1f} s: {out}")
    if json_line:
        print(json.dumps(figures))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, but for those that the help tells in words, whose value is None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Write a quantized copy of a checkpoint. It loads on any device, without --quant.",
        formatter_class=lambda prog: Help(prog, width=110, max_help_position=32),
    )
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")
    a = p.add_argument
    a("--checkpoint_path", default=Path(__file__).parent / "demo", metavar="DIR_OR_HUB_ID", help="what to quantize")
    a("--mode", required=True, metavar="MODE", help="int8, int4 or fp8")
    a("--groupsize", type=int, metavar="G", help="columns that share an int4 scale: 32, 64 or 128; default: 64")
    a("--method", metavar="M", help="of int4: rtn (default), hqq (better, no data) or gptq (best, calibration text)")
    a("--out_dir", required=True, metavar="DIR", help="where the quantized checkpoint goes")
    a("--skip", nargs="+", default=[], metavar="NAME", help="leave out linears whose names contain this, e.g. lm_head")
    a("--calibration_text", metavar="FILE", help="text for gptq; form feeds part documents")
    a("--calibration_samples", type=int, default=128, metavar="N", help="sequences taken from it at most")
    a("--calibration_length", type=int, default=2048, metavar="T", help="tokens a sequence")
    a("--no_act_order", action="store_true", help="gptq: columns in their stored order, not the largest inputs first")
    a("--device", metavar="D", help="where to compute: cuda or cpu; default: cuda where there is one")
    a("--overwrite", action="store_true", help="replace what is in --out_dir")
    a("--json", action="store_true", dest="json_line", help="last line of stdout: one JSON object with all figures")
    return p


if __name__ == "__main__":
    try:
        main(**vars(parser().parse_args()))
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"quantize.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
