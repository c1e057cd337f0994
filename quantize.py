"""Weight-only quantization: int8, int4 and fp8 linears, swapped into a model; and the program that writes checkpoints.

    python quantize.py --checkpoint_path demo --mode int4 --groupsize 64 --method gptq --out_dir runs/demo-int4

Modes: int8, symmetric with one scale an output channel; fp8, e4m3 with one scale an output channel; int4, asymmetric
with a scale and a zero point for each group of `groupsize` input columns. Activations keep their dtype, and sums are
float32. What a state dict holds is portable: plain integers (int4 as two nibbles a byte, the even column in the low
one) and float scales, the same on every device.

Sources: LLM.int8 (arXiv 2208.07339) for per-channel int8, FP8 formats (2209.05433), and gptq.py's for int4.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import kernels_cpu

MODES = ("int8", "int4", "fp8")
METHODS = ("rtn", "hqq", "gptq")
GROUPSIZES = (32, 64, 128)
RECIPE_FIELDS = {"mode", "groupsize", "method", "skip", "groupsizes"}
FP8 = torch.float8_e4m3fn


# ------------------------------------------------------------------------------------------------------ the linears
class QuantLinear(nn.Module):
    """A linear with quantized weight [out, in], or E of them stacked [E, out, in]; subclasses say how.

    Buffers: `weight` in the stored format, its scales (and zeros), and `bias` [out] or None. `forward(x)` serves a
    plain linear; `forward(x, expert)` and `one(x, e)` a stack, as model.ExpertLinear does.
    """

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
        if not bool(weight.isfinite().all()):
            raise ValueError("holds NaN or infinite values and cannot be quantized")
        if self.n_experts:  # one by one: the float32 copies of all experts would be the largest thing in memory
            parts = [self.quantize_matrix(w.float()) for w in weight]
            return {k: torch.stack([p[k] for p in parts]) for k in parts[0]}
        return self.quantize_matrix(weight.float())

    def dequantize(self) -> Tensor:
        """The weight that the stored tensors stand for: float32 [(E,) out, in]."""
        return self.dequantize_stored(**{name: getattr(self, name) for name in self.layout()})

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] without bias, in x's dtype, sums in float32."""
        return F.linear(x, self.dequantize().to(x.dtype))

    def forward(self, x: Tensor, expert: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]; with expert int64 [N], row n of x [N, in] through matrix expert[n]."""
        if expert is None:
            y = self.matmul(x)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        chosen = self.dequantize_stored(**{name: getattr(self, name)[expert] for name in self.layout()})
        return torch.bmm(chosen.to(x.dtype), x[:, :, None])[:, :, 0]

    def one(self, x: Tensor, e: int) -> Tensor:
        """x [N, in] through expert e -> [N, out]."""
        return F.linear(x, self.dequantize_stored(**{n: getattr(self, n)[e] for n in self.layout()}).to(x.dtype))

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
        scale = (weight.abs().amax(-1) / 127).clamp_min(1e-12)
        return {"weight": (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), "scale": scale}

    @staticmethod
    def dequantize_stored(weight, scale):
        """Stored tensors -> float32."""
        return weight.float() * scale[..., None]

    def matmul(self, x):
        if kernels.use_triton(x):
            return kernels.linear(x, self.weight, self.scale)
        return kernels_cpu.linear_int8(x, self.weight, self.scale)


class Fp8Linear(QuantLinear):
    """weight float8_e4m3fn [out, in], scale float32 [out]: W = weight * scale."""

    def layout(self):
        N, K = self.out_features, self.in_features
        return {"weight": ((N, K), FP8), "scale": ((N,), torch.float32)}

    def quantize_matrix(self, weight: Tensor) -> dict[str, Tensor]:
        """float32 [out, in] -> stored tensors."""
        limit = torch.finfo(FP8).max  # 448; beyond it the cast gives NaN
        scale = (weight.abs().amax(-1) / limit).clamp_min(1e-12)
        return {"weight": (weight / scale[:, None]).clamp(-limit, limit).to(FP8), "scale": scale}

    @staticmethod
    def dequantize_stored(weight, scale):
        """Stored tensors -> float32."""
        return weight.float() * scale[..., None]

    def matmul(self, x):
        return kernels.linear(x, self.weight, self.scale)


class Int4Linear(QuantLinear):
    """weight uint8 [out, in / 2], scale and zero float16 [out, in / groupsize]: W = (nibble - zero) * scale.

    method: "rtn" or "hqq", what `quantize` does; with "gptq" the stored tensors are made elsewhere.
    """

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

    def quantize_matrix(self, weight: Tensor) -> dict[str, Tensor]:
        """float32 [out, in] -> stored tensors."""
        import gptq

        q, scale, zero = (gptq.hqq if self.method == "hqq" else gptq.rtn)(weight, self.groupsize)
        return {"weight": pack_nibbles(q), "scale": scale, "zero": zero}

    @staticmethod
    def dequantize_stored(weight, scale, zero):
        """Stored tensors -> float32."""
        q = unpack_nibbles(weight).float().unflatten(-1, (scale.shape[-1], -1))
        return ((q - zero[..., None].float()) * scale[..., None].float()).flatten(-2)

    def pack(self):
        if self.n_experts or kernels.use_triton(self.weight) or not (self.weight.is_cpu and kernels_cpu.available()):
            return
        packed, scales = kernels_cpu.pack_int4(self.weight, self.scale, self.zero, self.groupsize)
        self.weight = self.scale = self.zero = None
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("packed_scales", scales, persistent=False)

    def canonical(self) -> dict[str, Tensor]:
        """The stored tensors, packed or not."""
        if self.weight is not None:
            return {name: getattr(self, name) for name in self.layout()}
        tensors = kernels_cpu.unpack_int4(self.packed, self.packed_scales, self.groupsize, self.in_features)
        return dict(zip(self.layout(), tensors, strict=True))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.canonical().items()})

    def dequantize(self):
        return self.dequantize_stored(**self.canonical())

    def matmul(self, x):
        if self.weight is None:
            if x.is_cpu:
                return kernels_cpu.linear_int4(x, self.packed, self.packed_scales, self.groupsize)
            return kernels.linear(x, **self.canonical())  # moved to a GPU after loading
        return kernels.linear(x, self.weight, self.scale, self.zero)


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
        recipe |= {"groupsize": groupsize or 64, "method": method or "rtn", "groupsizes": {}}
    elif groupsize is not None or method not in (None, "rtn"):
        what = f"groupsize {groupsize}" if groupsize is not None else f"method {method}"
        raise ValueError(f"{what} does not apply to {mode}: it has one scale an output channel, by rounding")
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: dict) -> None:
    """ValueError where a recipe, say of a newer version's checkpoint, is not understood in full."""
    if recipe.get("mode") not in MODES:
        raise ValueError(f"quantization mode {recipe.get('mode')!r} is not known; known: {', '.join(MODES)}")
    for field in recipe.keys() - RECIPE_FIELDS:
        raise ValueError(f"quantization field {field!r} is not known to this version of hotloop; upgrade it")
    if recipe["mode"] == "int4":
        if recipe.get("groupsize") not in GROUPSIZES:
            raise ValueError(f"groupsize {recipe.get('groupsize')} is not supported; known: {GROUPSIZES}")
        if recipe.get("method") not in METHODS:
            raise ValueError(f"quantization method {recipe.get('method')!r} is not known; known: {', '.join(METHODS)}")


def swap_linears(model: nn.Module, recipe: dict) -> dict[str, QuantLinear]:
    """Replace every linear of `model`, stacks of experts included, by a quantized one with empty buffers.

    Routers stay (tiny, and their error changes which experts run), and so does what the recipe skips. Where an int4
    group does not divide in_features, the largest smaller one that does is used and recorded in
    recipe["groupsizes"][name]; ValueError where not even 32 does. Returns the new modules by name.
    """
    check_recipe(recipe)
    swapped = {}
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        stack = isinstance(weight, nn.Parameter) and weight.ndim == 3
        if not (isinstance(module, nn.Linear) or stack) or name.endswith("router"):
            continue
        if any(part in name for part in recipe.get("skip", ())):
            continue
        K, N = module.in_features, module.out_features
        more = {}
        if recipe["mode"] == "int4":
            groupsize = next((g for g in reversed(GROUPSIZES) if g <= recipe["groupsize"] and K % g == 0), None)
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
