"""Translate a Hugging Face checkpoint to ours: its config.json to `ModelArgs`, its weight names to `Transformer` names.

Everything is decided by config.json, read as transformers reads it: a field left out takes the default of its family.
Both layouts are understood, the older one (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5
(`rope_parameters`, `dtype`). A field that is neither used here nor known to be harmless is an error, never ignored.
QKV and gate/up are fused and experts stacked; nothing is permuted, since rotate-half RoPE is the native layout.

Try it:  python convert_hf_checkpoint.py --hf_dir demo --out_dir /tmp/converted

Sources: transformers' configuration_*.py, modeling_*.py, modeling_rope_utils.py and conversion_mapping.py (5.x, and
         4.x where the hub's configs were written by it).
"""

import argparse
import itertools
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from model import ModelArgs, Transformer

# The fields that each family uses, with the defaults that transformers gives to fields left out; REQUIRED marks sizes
# that nobody should guess. head_dim None: hidden_size / num_attention_heads; num_key_value_heads None: one per head.
# fmt: off
REQUIRED = object()
COMMON = dict(
    hidden_size=REQUIRED, intermediate_size=REQUIRED, num_hidden_layers=REQUIRED, num_attention_heads=REQUIRED,
    vocab_size=REQUIRED, num_key_value_heads=None, head_dim=None, hidden_act="silu", rms_norm_eps=1e-6,
    tie_word_embeddings=False, rope_theta=10000.0, rope_scaling=None, rope_parameters=None, partial_rotary_factor=1.0,
)
QWEN = COMMON | dict(
    max_position_embeddings=32768, num_key_value_heads=32, use_sliding_window=False, sliding_window=4096,
)
GEMMA = COMMON | dict(
    max_position_embeddings=8192, num_key_value_heads=16, head_dim=256, hidden_act="gelu_pytorch_tanh",
    hidden_activation=None, tie_word_embeddings=True, attention_bias=False,
)
GEMMA2 = GEMMA | dict(
    num_key_value_heads=4, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, sliding_window=4096,
    layer_types=None, final_logit_softcapping=30.0, attn_logit_softcapping=50.0,
)
GEMMA3 = GEMMA2 | dict(  # the text_config of a multimodal one leaves out even the sizes
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, vocab_size=262208,
    max_position_embeddings=131072, rope_theta=1e6, rope_local_base_freq=10000.0, sliding_window_pattern=6,
    final_logit_softcapping=None, attn_logit_softcapping=None,
)
FAMILIES = {
    "llama": COMMON | dict(max_position_embeddings=2048, attention_bias=False, mlp_bias=False),
    "mistral": COMMON | dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    "mixtral": COMMON | dict(
        max_position_embeddings=131072, num_key_value_heads=8, sliding_window=None, rms_norm_eps=1e-5, rope_theta=1e6,
        num_local_experts=8, num_experts_per_tok=2,
    ),
    "qwen2": QWEN | dict(max_window_layers=28, layer_types=None),
    "qwen3": QWEN | dict(max_window_layers=28, layer_types=None, head_dim=128, attention_bias=False),
    "qwen3_moe": QWEN | dict(
        intermediate_size=None, num_key_value_heads=4, attention_bias=False, moe_intermediate_size=768,
        num_local_experts=128, num_experts_per_tok=8, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=(),
    ),
    "gemma": GEMMA, "gemma2": GEMMA2, "gemma3_text": GEMMA3, "gemma3": GEMMA3,
}
EOS_DEFAULTS = {"llama": 2, "mistral": 2, "mixtral": 2, "gemma": 1, "gemma2": 1, "gemma3_text": 1, "gemma3": 1}

# Fields that change no logit: ids, training, generation settings, bookkeeping of tools. So does a leading underscore.
HARMLESS = set("""
    model_type architectures auto_map torch_dtype dtype transformers_version transformers.js_config name_or_path
    model_name bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    tokenizer_class tokenizer_model_max_length tokenizer_padding_side model_max_length max_sequence_length seq_length
    initializer_range initializer_factor attention_dropout hidden_dropout resid_pdrop embd_pdrop dropout pretraining_tp
    output_router_logits router_aux_loss_coef router_jitter_noise gradient_checkpointing neftune_noise_alpha
    use_cache cache_implementation attn_implementation experts_implementation torchscript use_bfloat16 is_decoder
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate is_llama_config
    id2label label2id num_labels problem_type finetuning_task task_specific_params prefix keys_to_ignore_at_inference
    unsloth_version unsloth_fixed unsloth_optimized do_sample temperature top_p top_k min_p typical_p num_beams
    num_beam_groups num_return_sequences repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size
    early_stopping max_length min_length max_new_tokens""".split())
HARMLESS_IN = {  # transformers reads none of these in these families
    "qwen3_moe": {"max_window_layers"},
    "gemma2": {"sliding_window_size"},
    "gemma3": {"text_config", "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
               "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id"},
}
# Where a null is a value of its own and not another way to leave the field out.
NULLABLE = {"num_key_value_heads", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}  # does it slide?
ROPE_KEYS = {
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    "yarn": ["factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"],
}
# Our modules within a layer and theirs. Several are concatenated along dim 0; {e} runs over the experts.
ATTENTION_NAMES = {
    "qkv.norm": ["input_layernorm"],
    "qkv.linear": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "out.linear": ["self_attn.o_proj"],
}
DENSE_NAMES = ATTENTION_NAMES | {
    "gate_up.norm": ["post_attention_layernorm"],
    "gate_up.linear": ["mlp.gate_proj", "mlp.up_proj"],
    "down.linear": ["mlp.down_proj"],
}
POST_NORM_NAMES = DENSE_NAMES | {
    "out.post_norm": ["post_attention_layernorm"],
    "gate_up.norm": ["pre_feedforward_layernorm"],
    "down.post_norm": ["post_feedforward_layernorm"],
}
MOE_NAMES = ATTENTION_NAMES | {
    "moe.norm": ["post_attention_layernorm"],
    "moe.router": ["mlp.gate"],
    "moe.gate_up": ["mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"],
    "moe.down": ["mlp.experts.{e}.down_proj"],
}
MIXTRAL_NAMES = MOE_NAMES | {
    "moe.router": ["block_sparse_moe.gate"],
    "moe.gate_up": ["block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"],
    "moe.down": ["block_sparse_moe.experts.{e}.w2"],
}
# What transformers 5 holds in memory; its save_pretrained writes the names above, other writers may not.
STACKED_NAMES = {"moe.router": "mlp.gate.weight", "moe.gate_up": "mlp.experts.gate_up_proj",
                 "moe.down": "mlp.experts.down_proj"}
LAYER_NAMES = {"mixtral": MIXTRAL_NAMES, "qwen3_moe": MOE_NAMES, "gemma2": POST_NORM_NAMES,
               "gemma3_text": POST_NORM_NAMES, "gemma3": POST_NORM_NAMES}  # the others: DENSE_NAMES
# fmt: on
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")  # "": saved without the head
# May be left over: buffers of old checkpoints, and the parts of a multimodal one that text never meets.
IGNORED_SOURCES = re.compile(r"rotary_emb\.inv_freq$|(^|\.)(vision_tower|multi_modal_projector)\.")


def unsupported(name: str, value, family: str) -> ValueError:
    """The error, to be raised, for a field whose value we cannot honour."""
    return ValueError(f"config field {name} = {value!r} is not supported for model_type {family!r}")


def read_fields(config: dict) -> dict:
    """Every field that the family uses, with its value or its default.

    Raises ValueError for an unknown model_type, a missing field, and one that is set and neither used nor harmless.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; known: {', '.join(FAMILIES)}")
    defaults, config = FAMILIES[family], dict(config)
    if family == "gemma3":  # multimodal: the text part, in a model that ties or not as the top level says
        text = config.pop("text_config", None) or {}
        config = config | text | {"tie_word_embeddings": config.get("tie_word_embeddings", True)}
    if "num_experts" in config and "num_local_experts" in defaults:  # two names of one field
        config.setdefault("num_local_experts", config.pop("num_experts"))
    known = defaults.keys() | HARMLESS | HARMLESS_IN.get(family, set())
    for name, value in config.items():
        # Null, false, 0 and empty are how a feature is turned off.
        if name not in known and not name.startswith("_") and value:
            raise unsupported(name, value, family)
    fields = dict(defaults)
    fields.update((k, v) for k, v in config.items() if k in defaults and (v is not None or k in NULLABLE))
    for name, default in COMMON.items():
        if fields[name] is REQUIRED:
            raise ValueError(f"config field {name} is missing; model_type {family!r} needs it")
        if default is REQUIRED and fields[name] is not None and not (type(fields[name]) is int and fields[name] > 0):
            raise ValueError(f"config field {name} = {fields[name]!r} is not a positive integer")
    return fields


def read_rope(params: dict | None, theta: float, partial: float, max_seq_len: int) -> tuple[float, dict]:
    """A `rope_scaling` or `rope_parameters` -> (theta, ModelArgs.rope_scaling).

    Keeps only what the type reads, so that both layouts of config.json give equal ModelArgs. `theta` and `partial`
    (the rotated share of a head) hold where params has none. Raises ValueError for what `model.RoPE` does not do.
    """
    params = {k: v for k, v in (params or {}).items() if v is not None}
    old_kind = params.pop("type", "default")
    kind = params.pop("rope_type", old_kind)
    if kind not in ROPE_KEYS:
        raise ValueError(f"rope_type {kind!r} is not supported; known: {', '.join(ROPE_KEYS)}")
    theta, partial = params.pop("rope_theta", theta), params.pop("partial_rotary_factor", partial)
    if partial != 1:
        raise ValueError(f"partial_rotary_factor = {partial!r} is not supported; only 1.0 is")
    for key, value in params.items():  # a key of another RoPE type has no effect, one of no type might
        if value and not any(key in keys for keys in ROPE_KEYS.values()) and key != "finetuned":
            raise ValueError(f"RoPE parameter {key} = {value!r} is not supported")
    if kind in ("llama3", "yarn"):
        original = params.setdefault("original_max_position_embeddings", max_seq_len)
        if kind == "yarn":
            params.setdefault("factor", max_seq_len / original)
    for key in ROPE_KEYS[kind]:
        if key not in params and kind != "yarn":  # the rest of YaRN's are optional
            raise ValueError(f"RoPE parameter {key} is missing; rope_type {kind!r} needs it")
    return float(theta), {"rope_type": kind} | {key: params[key] for key in ROPE_KEYS[kind] if key in params}


def read_ropes(f: dict) -> dict:
    """Fields -> the ModelArgs fields rope_theta, rope_scaling and rope_local_theta."""
    where = f["partial_rotary_factor"], f["max_position_embeddings"]
    if "rope_local_base_freq" not in f:
        theta, scaling = read_rope(f["rope_scaling"] or f["rope_parameters"], f["rope_theta"], *where)
        return dict(rope_theta=theta, rope_scaling=scaling)
    # Gemma 3: rope_parameters is nested by layer type, rope_scaling is for the full attention layers.
    nested = f["rope_parameters"] or {}
    for key in sorted(nested.keys() - {"full_attention", "sliding_attention"}):
        raise ValueError(f"rope_parameters is keyed by full_attention and sliding_attention in Gemma 3, not by {key!r}")
    full = (nested.get("full_attention") or {}) | (f["rope_scaling"] or {})
    theta, scaling = read_rope(full, f["rope_theta"], *where)
    local_theta, local = read_rope(nested.get("sliding_attention"), f["rope_local_base_freq"], *where)
    if local["rope_type"] != "default":
        raise ValueError(f"rope_type {local['rope_type']!r} of sliding_attention is not supported; known: default")
    return dict(rope_theta=theta, rope_scaling=scaling, rope_local_theta=local_theta)


def read_sliding(f: dict, family: str) -> dict:
    """Fields -> the ModelArgs fields sliding_window and sliding_layers."""
    layers = range(f["num_hidden_layers"])
    window = f.get("sliding_window") if f.get("use_sliding_window", True) else None
    if f.get("layer_types"):
        if len(f["layer_types"]) != len(layers) or not set(f["layer_types"]) <= LAYER_TYPES.keys():
            raise unsupported("layer_types", f["layer_types"], family)
        slides = [LAYER_TYPES[kind] for kind in f["layer_types"]]
    elif "max_window_layers" in f:
        slides = [window is not None and i >= f["max_window_layers"] for i in layers]
    elif "layer_types" in f:  # Gemma 2 and 3: every second, every sixth layer is full
        slides = [(i + 1) % f.get("sliding_window_pattern", 2) != 0 for i in layers]
    else:
        slides = [window is not None for _ in layers]
    if not any(slides):
        return {}
    if window is None:
        raise ValueError("config field sliding_window is off, but some layers slide by their layer type")
    return dict(sliding_window=window, sliding_layers=None if all(slides) else slides)


def args_from_hf(config: dict) -> ModelArgs:
    """A parsed config.json -> ModelArgs.

    Raises ValueError, naming field and value, for an unknown `model_type` or RoPE type, a missing size, and any field
    that would change the result and is not supported.
    """
    f, family = read_fields(config), config["model_type"]
    is_gemma, is_gemma3 = family.startswith("gemma"), family.startswith("gemma3")
    if f.get("decoder_sparse_step", 1) != 1:  # Qwen3-MoE with some layers dense
        raise unsupported("decoder_sparse_step", f["decoder_sparse_step"], family)
    if f.get("mlp_only_layers"):
        raise unsupported("mlp_only_layers", f["mlp_only_layers"], family)
    if is_gemma3 and f["attn_logit_softcapping"] is not None:  # transformers has the field and does not apply it
        raise unsupported("attn_logit_softcapping", f["attn_logit_softcapping"], family)

    heads, head_dim = f["num_attention_heads"], f["head_dim"]
    if head_dim is None and f["hidden_size"] % heads:
        raise ValueError(f"hidden_size {f['hidden_size']} is no multiple of num_attention_heads {heads}: set head_dim")
    act_field = "hidden_activation" if f.get("hidden_activation") else "hidden_act"
    if f[act_field] not in ACTIVATION_NAMES:
        raise unsupported(act_field, f[act_field], family)
    activation = ACTIVATION_NAMES[f[act_field]]
    if is_gemma and act_field == "hidden_act":  # the first Gemma configs say "gelu" and mean the tanh form
        activation = {"gelu": "gelu_tanh"}.get(activation, activation)
    attention_bias = f.get("attention_bias", False)
    scalar = f.get("query_pre_attn_scalar")
    return ModelArgs(
        dim=f["hidden_size"],
        n_layers=f["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=f["num_key_value_heads"] or heads,
        head_dim=head_dim or f["hidden_size"] // heads,
        hidden_dim=f.get("moe_intermediate_size") or f["intermediate_size"],
        vocab_size=f["vocab_size"],
        max_seq_len=f["max_position_embeddings"],
        norm_eps=f["rms_norm_eps"],
        norm_offset=1.0 if is_gemma else 0.0,
        post_norms=family == "gemma2" or is_gemma3,
        activation=activation,
        embedding_scale=f["hidden_size"] ** 0.5 if is_gemma else 1.0,
        tie_embeddings=f["tie_word_embeddings"],
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        mlp_bias=f.get("mlp_bias", False),
        qk_norm=family.startswith("qwen3") or is_gemma3,
        attn_scale=None if scalar is None else scalar**-0.5,
        attn_softcap=f.get("attn_logit_softcapping"),
        logit_softcap=f.get("final_logit_softcapping"),
        n_experts=f.get("num_local_experts", 0),
        n_experts_per_token=f.get("num_experts_per_tok", 0),
        norm_expert_weights=f.get("norm_topk_prob", True),
        **read_ropes(f),
        **read_sliding(f, family),
    )


def parameter_shapes(args: ModelArgs) -> dict[str, torch.Size]:
    """Name -> shape of every parameter of Transformer(args), in order; a tied head is left out. Allocates nothing."""
    with torch.device("meta"):
        state_dict = Transformer(args).state_dict()
    return {k: v.shape for k, v in state_dict.items() if not (args.tie_embeddings and k == "output.weight")}


def weight_sources(config: dict, names: Collection[str] = ()) -> dict[str, list]:
    """Each parameter of our Transformer, in order -> the Hugging Face tensors that it is made of.

    A list of names: one is taken as it is, several are concatenated along dim 0. A list of lists: each inner list is
    concatenated, and these are stacked along a new dim 0 (experts). `names`, the tensors that there are, decides
    where writers differ: the prefix, and experts stored one by one or stacked; without it, the hub's usual names.
    """
    args, family = args_from_hf(config), config["model_type"]
    usual = PREFIXES[1] if family == "gemma3" else PREFIXES[0]
    prefix = next((p for p in (usual, *PREFIXES) if f"{p}embed_tokens.weight" in names), usual)
    table = LAYER_NAMES.get(family, DENSE_NAMES)
    head = "language_model.lm_head.weight" if prefix == PREFIXES[1] else "lm_head.weight"
    outer = {
        "tok_embeddings.weight": f"{prefix}embed_tokens.weight",
        "norm.weight": f"{prefix}norm.weight",
        "output.weight": head,
    }
    sources = {}
    for name in parameter_shapes(args):
        if name in outer:
            sources[name] = [outer[name]]
            continue
        _, layer, path = name.split(".", 2)
        module, leaf = path.rsplit(".", 1)
        where = f"{prefix}layers.{layer}."
        stacked = where + STACKED_NAMES.get(module, "?")
        theirs = [f"{where}{n}.{leaf}" for n in table[module]]
        if stacked in names:
            sources[name] = [stacked]
        elif "{e}" in theirs[0]:
            sources[name] = [[n.replace("{e}", str(e)) for n in theirs] for e in range(args.n_experts)]
        else:
            sources[name] = theirs
    return sources


def convert_state_dict(
    config: dict, tensors: Mapping[str, Tensor], parts: Mapping[str, tuple] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) for every parameter, read and fused one at a time; `tensors` may read from disk on access.

    parts: our name -> (dimension counted from the end, [start, stop) ranges along it), where only that part of the
    tensor is wanted; it is looked up as the stream gets there, and no ranges leave a tensor out. `tensors` then has
    `shape` and `read`, as checkpoint.Weights. Dtypes are kept. Raises ValueError at the call for a
    tensor that is missing and for one that is left over and would change the result, and during the iteration for a
    shape that contradicts the config.
    """
    names, args = set(tensors), args_from_hf(config)
    sources, shapes = weight_sources(config, names), parameter_shapes(args)
    used = [s for group in sources.values() for part in group for s in ([part] if isinstance(part, str) else part)]
    for source in used:
        if source not in names:
            raise ValueError(f"the checkpoint has no tensor {source}, which its config.json implies")
    for name in sorted(names.difference(used)):
        tied_head = args.tie_embeddings and name.endswith("lm_head.weight")
        if not tied_head and not IGNORED_SOURCES.search(name):
            raise ValueError(f"the checkpoint has a tensor {name} that its config.json does not account for")

    def read(group: list) -> Tensor:
        if isinstance(group[0], list):
            return torch.stack([read(part) for part in group])
        parts = [tensors[source] for source in group]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole_shape(group: list) -> tuple[int, ...]:
        if isinstance(group[0], list):
            return len(group), *whole_shape(group[0])
        shapes = [tensors.shape(source) for source in group]
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def read_part(group: list, part: tuple | None) -> Tensor:
        if isinstance(group[0], list):
            return torch.stack([read_part(inner, part) for inner in group])
        if len(group) == 1:
            return tensors.read(group[0], part)
        sizes = [tensors.shape(source) for source in group]
        if not part or part[0] != -len(sizes[0]):  # not cut along what is concatenated
            return torch.cat([tensors.read(source, part, copy=False) for source in group])
        pieces, ends = [], list(itertools.accumulate(shape[0] for shape in sizes))
        for start, stop in part[1]:
            for source, end, shape in zip(group, ends, sizes, strict=True):
                a, b = (min(max(x - (end - shape[0]), 0), shape[0]) for x in (start, stop))
                if a < b:
                    pieces.append(tensors.read(source, (part[0], [(a, b)]), copy=False))
        return torch.cat(pieces)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, group in sources.items():
            part = (parts or {}).get(name)
            if parts and whole_shape(group) == shapes[name]:
                if part is None or part[1]:
                    yield name, read_part(group, part)
                continue
            tensor = read(group)
            if tensor.shape != shapes[name]:
                raise ValueError(f"{name}, made of {group[0]} ..., has shape {list(tensor.shape)}; "
                                 f"config.json implies {list(shapes[name])}")  # fmt: skip
            yield name, tensor

    return stream()


def export_state_dict(config: dict, state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `convert_state_dict`: ours -> (Hugging Face name, tensor), under the hub's usual names.

    Pieces of a fused tensor are copies, so that no two share storage (safetensors refuses that).
    """
    args = args_from_hf(config)
    qkv_rows = [n * args.head_dim for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)]
    for name, group in weight_sources(config).items():
        if name not in state_dict:
            raise ValueError(f"the state dict has no tensor {name}, which config.json implies")
        tensor = state_dict[name]
        if len(group) == 1 and isinstance(group[0], str):
            yield group[0], tensor
            continue
        stack = zip(group, tensor, strict=True) if isinstance(group[0], list) else [(group, tensor)]
        for names, fused in stack:
            rows = qkv_rows if ".qkv." in name else fused.shape[0] // len(names)
            yield from ((n, piece.clone()) for n, piece in zip(names, fused.split(rows), strict=True))


def stop_ids_from_hf(generation_config: dict, config: dict) -> list[int]:
    """The end-of-sequence ids: those of generation_config.json, else of config.json, else the family's default."""
    family_default = EOS_DEFAULTS.get(config.get("model_type"))
    text_config = config.get("text_config") or {}
    ids = generation_config.get("eos_token_id")
    if ids is None:
        ids = config.get("eos_token_id", text_config.get("eos_token_id", family_default))
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, but for those that the help tells in words, whose value is None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def main(hf_dir: str, out_dir: str, overwrite: bool) -> int:
    from checkpoint import convert_checkpoint  # here, since checkpoint imports this file

    try:
        convert_checkpoint(hf_dir, out_dir, overwrite)
    except ValueError as error:
        print(f"convert_hf_checkpoint.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out_dir}:")
    for path in sorted(p for p in Path(out_dir).iterdir() if p.is_file()):
        print(f"  {path.stat().st_size:>15,} bytes  {path.name}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=Help
    )
    parser.add_argument("--hf_dir", required=True, help="a Hugging Face checkpoint directory, or a hub repo id")
    parser.add_argument("--out_dir", required=True, help="where to write the converted checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace out_dir if it already holds something")
    sys.exit(main(**vars(parser.parse_args())))
