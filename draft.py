"""The model that proposes tokens for speculative.py: another checkpoint, or the target's own weights quantized.

    python generate.py --compile --draft_checkpoint_path demo/draft --compare
    python generate.py --compile --draft int8 --speculate_k 3

What a draft has to share with its target (tokenizer, context, memory) is checked before its weights are read.

Sources: speculative.py's; a model as its own draft (arXiv 2309.08168), with quantized weights (2502.10424).
"""

import copy
from pathlib import Path

import torch

import tp
from checkpoint import load_model, read_config, resolve
from machine import free_memory
from model import ModelArgs, Transformer
from quantize import make_recipe, swap_linears
from speculative import MAX_K
from tokenizer import Tokenizer


def pick_k(speculate_k: str | None, draft: str | None, draft_path: str | None, compare: bool) -> int | str | None:
    """How many tokens to propose, a number or "auto"; None without a proposer."""
    if draft == "lookup" and draft_path:
        raise ValueError(f"--draft lookup looks in the text itself; leave out --draft_checkpoint_path {draft_path}")
    if not (draft or draft_path):
        if speculate_k is not None or compare:
            flag = "--compare" if speculate_k is None else f"--speculate_k {speculate_k}"
            raise ValueError(f"{flag}: nothing proposes; give --draft lookup|int8|int4 or --draft_checkpoint_path DIR")
        return None
    speculate_k = "4" if speculate_k is None else speculate_k
    if speculate_k != "auto" and not (speculate_k.isdecimal() and 1 <= int(speculate_k) <= MAX_K):
        raise ValueError(f"--speculate_k {speculate_k}: it must be auto, or a number from 1 to {MAX_K}")
    return speculate_k if speculate_k == "auto" else int(speculate_k)


def load_draft(model: Transformer, directory: Path, draft_path: str | None, draft: str | None, quant: str | None,
               dtype: torch.dtype | None, context: int,
               kv_dtype: torch.dtype | None = None) -> Transformer | None:  # fmt: skip
    """The model that proposes: of another checkpoint, or the target's own weights quantized; None for a lookup.

    draft: "int8" or "int4" quantizes it, "lookup" is none. context: tokens that both caches have to hold, in kv_dtype
    or the model's. ValueError where it has another tokenizer, too short a context, or no room in memory.
    """
    if draft == "lookup":
        return None
    device = model.tok_embeddings.weight.device
    source = resolve(draft_path) if draft_path else directory
    args, config = read_config(source)
    stored = config.get("quantization")
    if draft_path is None and draft == (stored["mode"] if stored else quant):
        raise ValueError(f"--draft {draft}: the model itself is {draft} already; give --draft lookup or another model")
    if stored and draft:
        raise ValueError(f"--draft {draft}: {source} is quantized already ({stored['mode']}), and a draft is quantized "
                         "from plain weights; give " + ("it without --draft" if draft_path else "--draft lookup"))
    if draft_path:
        if difference := Tokenizer(source).difference(Tokenizer(directory)):
            raise ValueError(f"{source}: another tokenizer than {directory} has, so it cannot propose: {difference}")
        if args.max_seq_len < context:
            raise ValueError(f"{source}: the draft has a context of {args.max_seq_len} tokens, {context} are needed; "
                             "give fewer --max_new_tokens, a shorter prompt or (in a chat) a smaller --max_seq_len")
    recipe = make_recipe(draft) if draft else None
    plain = dtype or model.tok_embeddings.weight.dtype
    need = memory_of(args, recipe or stored, plain, context, kv_dtype)
    need += cache_memory(model.args, plain, context, kv_dtype)  # which will be made later
    need //= tp.current().world if tp.current() else 1
    free = free_memory(device)
    if free is not None and need > free:
        raise ValueError(f"{source}: the draft needs {need / 1e9:.1f} GB beside the model, caches of both included, "
                         f"and {free / 1e9:.1f} GB are free; give --draft int4, a smaller draft, a shorter context, or "
                         "--draft lookup, which needs none")
    model_of_draft = load_model(source, device, dtype, recipe)
    if not draft_path:
        share_weights(model_of_draft, model)
    return model_of_draft


def share_weights(draft: Transformer, model: Transformer) -> None:
    """What was not quantized in a model's self-draft becomes the model's own: embedding and norms are held once."""
    mine = dict(model.named_parameters())
    for name, parameter in draft.named_parameters():
        if name in mine and (mine[name].shape, mine[name].dtype) == (parameter.shape, parameter.dtype):
            parameter.data = mine[name].data


def memory_of(
    args: ModelArgs, recipe: dict | None, dtype: torch.dtype, context: int, kv_dtype: torch.dtype | None = None
) -> int:
    """Bytes of a model's weights, quantized by a recipe or not, and of its KV cache for so many tokens."""
    with torch.device("meta"):
        model = Transformer(args)
    if recipe:
        swap_linears(model, copy.deepcopy(recipe))
    weights = sum(p.numel() * dtype.itemsize for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    return weights + cache_memory(args, dtype, context, kv_dtype)


def cache_memory(args: ModelArgs, dtype: torch.dtype, context: int, kv_dtype: torch.dtype | None = None) -> int:
    """Bytes of a KV cache for so many tokens, in kv_dtype or else the model's dtype."""
    head = args.head_dim * kv_dtype.itemsize + 2 if kv_dtype else args.head_dim * dtype.itemsize  # 2: its scale
    return 2 * args.n_layers * args.n_kv_heads * context * head
