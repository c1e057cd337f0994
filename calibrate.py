"""GPTQ over a whole model: what each linear sees of a calibration text, layer by layer, in one layer's memory.

    python quantize.py --checkpoint_path demo --mode int4 --method gptq --calibration_text demo/calibration.txt \\
        --out_dir runs/demo-gptq

The mathematics of one linear is gptq.py's, and quantize.py writes what comes out.

Sources: GPTQ (arXiv 2210.17323), whose later layers see what the quantized earlier ones give.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gptq
from model import Transformer
from tokenizer import Tokenizer


@torch.no_grad()
def calibrate(args, tensors: Iterable[tuple[str, Tensor]], linears: dict[str, nn.Module], tokens: Tensor,
              device: torch.device, act_order: bool) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """GPTQ over a whole model, streaming: yields (name, stored tensor), holding one layer and the activations.

    tensors: float weights in the model's order. tokens int64 [n, T]: the calibration text. Layer by layer, and within
    a layer linear by linear (QKV, output, gate and up, down), each with the inputs that the already quantized ones
    before it give; a linear that has been quantized is replaced by its dequantized self.
    """
    def quantized(name: str, weight: Tensor, hessian: Tensor | None) -> dict[str, Tensor]:
        linear = linears[name]
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name}.weight: holds NaN or infinite values and cannot be quantized")
        if hessian is None:  # an expert that no token of the calibration text was routed to
            q, scale, zero = gptq.rtn(weight.float(), linear.groupsize)
        else:
            q, scale, zero = gptq.gptq(weight.float(), hessian, linear.groupsize, act_order=act_order)
        return linear.stored(q, scale, zero)

    with torch.device("meta"):
        model = Transformer(args)
    rope, rope_local = model.rope.to(device), model.rope_local and model.rope_local.to(device)
    pos = torch.arange(tokens.shape[1], device=device)[None]
    rope, rope_local = rope(pos), (rope_local or rope)(pos)
    stream = iter(tensors)
    name, embedding = next(stream)
    if name != "tok_embeddings.weight":
        raise ValueError(f"the embedding should come first in the stream of tensors, not {name}")
    yield name, embedding
    embedding = embedding.to(device)
    h = F.embedding(tokens.to(device), embedding)
    if args.embedding_scale != 1.0:
        h = h * model.embedding_scale.to(h)
    rows = max(1, 16384 // tokens.shape[1])  # sequences that run through a layer together
    rest, layer_index, waiting = None, 0, {}
    for name, tensor in stream:
        prefix = f"layers.{layer_index}."
        if not name.startswith("layers."):
            rest = (name, tensor)
            break
        if not name.startswith(prefix):
            raise ValueError(f"tensors of layer {layer_index} are missing: {name} comes after {', '.join(waiting)}")
        waiting[name.removeprefix(prefix)] = tensor.to(device)
        layer = model.layers[layer_index]
        if len(waiting) < len(layer.state_dict()):
            continue
        layer.load_state_dict(waiting, assign=True)
        waiting = {}

        def run(x, layer=layer):
            return layer(x, rope if layer.attention.window is None else rope_local, pos, None)

        ffn = ("moe.gate_up", "moe.down") if layer.is_moe else ("gate_up.linear", "down.linear")
        order = [part for part in ("qkv.linear", "out.linear", *ffn) if prefix + part in linears]
        for part in order:
            module = layer.get_submodule(part)
            sums = _hessians(module, run, h.split(rows))
            if module.weight.ndim == 3:
                each = [quantized(prefix + part, w, sums.get(e)) for e, w in enumerate(module.weight)]
                stored = {k: torch.stack([s[k] for s in each]) for k in each[0]}
            else:
                stored = quantized(prefix + part, module.weight, sums[None])
            yield from ((f"{prefix}{part}.{k}", v) for k, v in stored.items())
            module.weight = nn.Parameter(linears[prefix + part].dequantize_stored(**stored).to(h.dtype), False)
        done = {f"{part}.weight" for part in order}
        yield from ((prefix + k, v) for k, v in layer.state_dict().items() if k not in done)
        h = torch.cat([run(x) for x in h.split(rows)])
        model.layers[layer_index] = layer.to("meta")
        layer_index += 1
    head = None
    for name, tensor in ([rest] if rest else []) + list(stream):
        if name == "norm.weight":
            model.norm.load_state_dict({"weight": tensor.to(device)}, assign=True)
        if name == "output.weight":
            head = tensor
        else:
            yield name, tensor
    if model.norm.weight.is_meta:
        raise ValueError("1 tensor is missing: norm.weight")
    if "output" in linears:
        hessian = torch.zeros(args.dim, args.dim, device=device)
        for x in h.split(rows):
            gptq.accumulate_hessian(hessian, model.norm(x))
        weight = (embedding if head is None else head).to(device)
        yield from ((f"output.{k}", v) for k, v in quantized("output", weight, hessian).items())
    elif head is not None:
        yield "output.weight", head


def _hessians(module: nn.Module, run, inputs: Iterable[Tensor]) -> dict[int | None, Tensor]:
    """Sum of x x^T over what reaches a linear (key None) or each expert of a stack, while `run` sees all inputs."""
    sums: dict[int | None, Tensor] = {}

    def record(key, x):
        if key not in sums:
            sums[key] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        gptq.accumulate_hessian(sums[key], x)

    def hook(_, args):
        if len(args) == 1:
            record(None, args[0])
        else:  # a stack, each row through its own expert
            for e in args[1].unique().tolist():
                record(e, args[0][args[1] == e])

    handle = module.register_forward_pre_hook(hook)
    plain = getattr(module, "one", None)
    if plain is not None:  # a stack's other way in, many rows through one expert
        module.one = lambda x, e: (record(e, x), plain(x, e))[1]
    for x in inputs:
        run(x)
    handle.remove()
    if plain is not None:
        del module.one
    return sums


def read_calibration(file: str | Path, directory: Path, samples: int, length: int) -> Tensor:
    """`samples` sequences of `length` tokens from a text file, documents joined in order -> int64 [samples, length]."""
    for flag, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ValueError(f"--calibration_{flag} {value}: it must be at least 1")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--calibration_text {file}: cannot be read: {error}") from None
    tokenizer = Tokenizer(directory)
    ids = [i for document in text.split("\f") for i in tokenizer.encode(document)]  # form feeds part documents
    if len(ids) < length:
        raise ValueError(
            f"--calibration_text {file}: {len(ids)} tokens are too few for one sequence of {length}; "
            "give a longer text or a smaller --calibration_length"
        )
    samples = min(samples, len(ids) // length)
    return torch.tensor(ids[: samples * length]).view(samples, length)
