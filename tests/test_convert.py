"""config.json of well-known models -> ModelArgs; what is not supported is an error that names it.

Try it:  python -m pytest tests/test_convert.py
"""

import json
import math

import pytest
import torch

from convert_hf_checkpoint import (
    FAMILIES,
    REQUIRED,
    args_from_hf,
    convert_state_dict,
    export_state_dict,
    parameter_shapes,
    stop_ids_from_hf,
    weight_sources,
)
from model import ModelArgs

# As on the hub (typed from the model cards), the fields that fine-tunes and tools add among them.
HUB = {
    "Llama-2-7b": (
        """{"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}""",
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, hidden_dim=11008, vocab_size=32000,
             max_seq_len=4096, norm_eps=1e-5),
    ),
    "llama-7b, 2023": (
        """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1,
        "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": true,
        "vocab_size": 32000}""",
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, hidden_dim=11008, vocab_size=32000,
             max_seq_len=2048, norm_eps=1e-6),
    ),
    "CodeLlama-7b": (
        """{"_name_or_path": "codellama/CodeLlama-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 16384, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "rope_theta": 1000000, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.33.0.dev0", "use_cache": true, "vocab_size": 32016}""",
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, hidden_dim=11008, vocab_size=32016,
             max_seq_len=16384, norm_eps=1e-5, rope_theta=1e6),
    ),
    "TinyLlama-1.1B": (
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0", "use_cache": true, "vocab_size": 32000}""",
        dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, head_dim=64, hidden_dim=5632, vocab_size=32000,
             max_seq_len=2048, norm_eps=1e-5),
    ),
    "Llama-3.1-8B": (
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3", "unsloth_version": "2024.9", "use_cache": true, "vocab_size": 128256}""",
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=128256,
             max_seq_len=131072, norm_eps=1e-5, rope_theta=5e5,
             rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                               original_max_position_embeddings=8192)),
    ),
    "Llama-3.2-1B": (
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}""",
        dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, hidden_dim=8192, vocab_size=128256,
             max_seq_len=131072, norm_eps=1e-5, rope_theta=5e5, tie_embeddings=True,
             rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                               original_max_position_embeddings=8192)),
    ),
    "Mistral-7B-v0.1": (
        """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}""",
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32000,
             max_seq_len=32768, norm_eps=1e-5, sliding_window=4096),
    ),
    "Mistral-7B-v0.3": (
        """{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
        "use_cache": true, "vocab_size": 32768}""",
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32768,
             max_seq_len=32768, norm_eps=1e-5, rope_theta=1e6),
    ),
    "Mixtral-8x7B-v0.1": (
        """{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000}""",
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32000,
             max_seq_len=32768, norm_eps=1e-5, rope_theta=1e6, n_experts=8, n_experts_per_token=2),
    ),
    "Qwen2.5-7B": (
        """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
        "vocab_size": 152064}""",
        dict(dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128, hidden_dim=18944, vocab_size=152064,
             max_seq_len=131072, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True),
    ),
    "Qwen3-8B with YaRN": (
        """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 32768}, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
        dict(dim=4096, n_layers=36, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=12288, vocab_size=151936,
             max_seq_len=40960, norm_eps=1e-6, rope_theta=1e6, qk_norm=True,
             rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)),
    ),
    "Qwen3-30B-A3B": (
        """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
        dict(dim=2048, n_layers=48, n_heads=32, n_kv_heads=4, head_dim=128, hidden_dim=768, vocab_size=151936,
             max_seq_len=40960, norm_eps=1e-6, rope_theta=1e6, qk_norm=True, n_experts=128, n_experts_per_token=8),
    ),
    "gemma-7b": (
        """{"architectures": ["GemmaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": null,
        "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 24576, "max_position_embeddings": 8192,
        "model_type": "gemma", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16,
        "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 10000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.38.0.dev0", "use_cache": true, "vocab_size": 256000}""",
        dict(dim=3072, n_layers=28, n_heads=16, n_kv_heads=16, head_dim=256, hidden_dim=24576, vocab_size=256000,
             max_seq_len=8192, norm_eps=1e-6, norm_offset=1.0, activation="gelu_tanh", tie_embeddings=True,
             embedding_scale=math.sqrt(3072)),
    ),
    "gemma-2-9b": (
        """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "sliding_window_size": 4096, "torch_dtype": "float32", "transformers_version": "4.42.0.dev0",
        "use_cache": true, "vocab_size": 256000}""",
        dict(dim=3584, n_layers=42, n_heads=16, n_kv_heads=8, head_dim=256, hidden_dim=14336, vocab_size=256000,
             max_seq_len=8192, norm_eps=1e-6, norm_offset=1.0, activation="gelu_tanh", tie_embeddings=True,
             embedding_scale=math.sqrt(3584), post_norms=True, attn_scale=1 / 16, attn_softcap=50.0,
             logit_softcap=30.0, sliding_window=4096, sliding_layers=[True, False] * 21),
    ),
    "gemma-3-1b-it": (
        """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}""",
        dict(dim=1152, n_layers=26, n_heads=4, n_kv_heads=1, head_dim=256, hidden_dim=6912, vocab_size=262144,
             max_seq_len=32768, norm_eps=1e-6, norm_offset=1.0, activation="gelu_tanh", tie_embeddings=True,
             embedding_scale=math.sqrt(1152), post_norms=True, attn_scale=1 / 16, qk_norm=True, rope_theta=1e6,
             rope_local_theta=1e4, sliding_window=512, sliding_layers=([True] * 5 + [False]) * 4 + [True] * 2),
    ),
    "gemma-3-4b-it": (
        """{"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
        "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024}, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
        "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
        "vision_use_head": false}}""",
        dict(dim=2560, n_layers=34, n_heads=8, n_kv_heads=4, head_dim=256, hidden_dim=10240, vocab_size=262208,
             max_seq_len=131072, norm_eps=1e-6, norm_offset=1.0, activation="gelu_tanh", tie_embeddings=True,
             embedding_scale=math.sqrt(2560), post_norms=True, attn_scale=1 / 16, qk_norm=True, rope_theta=1e6,
             rope_scaling=dict(rope_type="linear", factor=8.0), rope_local_theta=1e4, sliding_window=1024,
             sliding_layers=([True] * 5 + [False]) * 5 + [True] * 4),
    ),
}  # fmt: skip


def hub(name: str) -> dict:
    return json.loads(HUB[name][0])


def through_transformers(config: dict) -> dict:
    """The same config, read by transformers and written again in its present layout."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoConfig.for_model(**config).to_dict()


@pytest.mark.parametrize("name", HUB)
def test_hub_config(name):
    assert args_from_hf(hub(name)) == ModelArgs(**HUB[name][1])


@pytest.mark.parametrize("name", HUB)
def test_hub_config_as_transformers_writes_it(name):
    assert args_from_hf(through_transformers(hub(name))) == ModelArgs(**HUB[name][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    sizes = dict(hidden_size=2048, intermediate_size=99, num_hidden_layers=7, num_attention_heads=64, vocab_size=9)
    needed = {k: v for k, v in sizes.items() if FAMILIES[family][k] is REQUIRED}
    config = {"model_type": family} | needed
    if family == "gemma3":
        config["text_config"] = {"model_type": "gemma3_text"}
    assert args_from_hf(config) == args_from_hf(through_transformers(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_not_changed(family):
    name = next(n for n in HUB if hub(n)["model_type"] == family)
    config = hub(name)
    args_from_hf(config)
    weight_sources(config)
    assert config == hub(name)


# ---------------------------------------------------------------------------------------------- what is refused
REFUSED = [
    ("Llama-2-7b", {"model_type": "gpt_neox"}, ["gpt_neox", "llama", "qwen3_moe"]),
    ("Llama-2-7b", {"model_type": None}, ["model_type None", "mistral"]),
    ("Llama-2-7b", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
    ("gemma-3-4b-it", {"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
    ("Llama-2-7b", {"hidden_act": "relu"}, ["hidden_act", "relu"]),
    ("Llama-2-7b", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ("Llama-2-7b", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.25}}, ["0.25"]),
    ("Llama-2-7b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic", "linear", "llama3", "yarn"]),
    ("Llama-2-7b", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, ["longrope", "yarn"]),
    ("Llama-2-7b", {"rope_scaling": {"type": "linear"}}, ["factor", "linear"]),
    ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "llama3"]),
    ("Qwen2.5-7B", {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, ["mrope_section"]),
    ("Llama-2-7b", {"rope_interleaved": True}, ["rope_interleaved", "True"]),
    ("Llama-2-7b", {"logits_scaling": 8.0}, ["logits_scaling", "8.0"]),
    ("Llama-2-7b", {"embedding_multiplier": 12.0}, ["embedding_multiplier"]),
    ("Llama-2-7b", {"residual_multiplier": 0.2}, ["residual_multiplier"]),
    ("Llama-2-7b", {"sliding_window": 4096}, ["sliding_window", "4096"]),
    ("Llama-2-7b", {"hidden_size": 4100}, ["4100", "32"]),
    ("Llama-2-7b", {"num_hidden_layers": "32"}, ["num_hidden_layers", "'32'"]),
    ("Llama-2-7b", {"num_key_value_heads": 5}, ["32", "5"]),
    ("Mistral-7B-v0.1", {"attention_bias": True}, ["attention_bias", "mistral"]),
    ("Mistral-7B-v0.1", {"layer_types": ["sliding_attention"] * 32}, ["layer_types"]),
    ("Qwen2.5-7B", {"attention_bias": True}, ["attention_bias", "qwen2"]),
    ("Qwen2.5-7B", {"layer_types": ["sliding_attention"] * 28}, ["sliding_window"]),
    ("Qwen2.5-7B", {"layer_types": ["linear_attention"] * 28}, ["layer_types", "linear_attention"]),
    ("Qwen2.5-7B", {"layer_types": ["full_attention"] * 27}, ["layer_types"]),
    ("Qwen3-30B-A3B", {"mlp_only_layers": [0, 3]}, ["mlp_only_layers", "[0, 3]"]),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, ["decoder_sparse_step", "2"]),
    ("gemma-7b", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ("gemma-2-9b", {"hidden_activation": "mish"}, ["hidden_activation", "mish"]),
    ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping"]),
    ("gemma-3-1b-it", {"sliding_window": None}, ["sliding_window"]),
    ("gemma-3-1b-it", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, ["rope_parameters"]),
    ("gemma-3-1b-it", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, ["linear"]),
    ("gemma-3-4b-it", {"text_config": {"layer_scalar": 0.5}}, ["layer_scalar"]),
    *[
        ("Llama-2-7b", {field: None}, [field, "missing"])
        for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    ],
]


@pytest.mark.parametrize("name, change, words", REFUSED, ids=lambda v: ",".join(v) if isinstance(v, dict) else None)
def test_unsupported_is_named(name, change, words):
    with pytest.raises(ValueError) as error:
        args_from_hf(hub(name) | change)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, change", [
    ("Llama-2-7b", {"pretraining_tp": 2, "auto_map": {"AutoConfig": "x.Y"}, "neftune_noise_alpha": 5.0}),
    ("Llama-2-7b", {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 4096, "prefix": ""}),
    ("Llama-2-7b", {"quantization_config": None, "rope_interleaved": False, "mlp_bias": None, "clip_qkv": None}),
    ("Llama-2-7b", {"rope_scaling": {}, "head_dim": None, "num_key_value_heads": None, "_anything": 3}),
    ("Llama-2-7b", {"rope_scaling": {"type": "default", "factor": 1.0}, "is_llama_config": True}),
    ("Mistral-7B-v0.1", {"attention_bias": False}),
    ("gemma-7b", {"hidden_act": "gelu_pytorch_tanh", "use_bidirectional_attention": None}),
    ("gemma-7b", {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
])  # fmt: skip
def test_harmless_fields_change_nothing(name, change):
    assert args_from_hf(hub(name) | change) == args_from_hf(hub(name))


@pytest.mark.parametrize("name, change, field, value", [
    ("Llama-2-7b", {"attention_bias": True}, "out_bias", True),
    ("Llama-2-7b", {"mlp_bias": True}, "mlp_bias", True),
    ("Llama-2-7b", {"head_dim": 64}, "head_dim", 64),
    ("Llama-2-7b", {"tie_word_embeddings": True}, "tie_embeddings", True),
    ("Llama-2-7b", {"hidden_act": "gelu"}, "activation", "gelu"),
    ("gemma-7b", {"tie_word_embeddings": False}, "tie_embeddings", False),
    ("gemma-3-4b-it", {"tie_word_embeddings": False}, "tie_embeddings", False),
    ("gemma-2-9b", {"attn_logit_softcapping": None}, "attn_softcap", None),
    ("gemma-2-9b", {"layer_types": ["full_attention"] * 42}, "sliding_window", None),
    ("Qwen2.5-7B", {"use_sliding_window": True}, "sliding_window", None),  # max_window_layers is every layer
    ("Qwen2.5-7B", {"use_sliding_window": True, "max_window_layers": 0}, "sliding_layers", None),
    ("Qwen2.5-7B", {"use_sliding_window": True, "max_window_layers": 27}, "sliding_layers", [False] * 27 + [True]),
    ("Qwen3-8B with YaRN", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling",
     dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=40960)),
    # the place that transformers prefers, where two say something
    ("CodeLlama-7b", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta", 7.0),
    ("CodeLlama-7b", {"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
     "rope_theta", 1e6),
])  # fmt: skip
def test_a_field_has_its_effect(name, change, field, value):
    assert getattr(args_from_hf(hub(name) | change), field) == value


# ------------------------------------------------------------------------------------------------------- weights
TINY = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4)  # fmt: skip
LLAMA = TINY | dict(model_type="llama")
MIXTRAL = TINY | dict(model_type="mixtral", num_local_experts=3)


def weights(config: dict) -> dict[str, torch.Tensor]:
    """Random Hugging Face tensors for a config."""
    shapes = parameter_shapes(args_from_hf(config))
    return dict(export_state_dict(config, {name: torch.randn(shape) for name, shape in shapes.items()}))


def test_weight_sources():
    sources = weight_sources(LLAMA)
    p = "model.layers.1."
    assert sources["layers.1.qkv.linear.weight"] == [p + f"self_attn.{x}_proj.weight" for x in "qkv"]
    assert sources["layers.1.gate_up.linear.weight"] == [p + f"mlp.{x}_proj.weight" for x in ("gate", "up")]
    assert sources["layers.1.gate_up.norm.weight"] == [p + "post_attention_layernorm.weight"]
    assert sources["output.weight"] == ["lm_head.weight"]
    assert list(sources) == list(parameter_shapes(args_from_hf(LLAMA)))
    assert "output.weight" not in weight_sources(LLAMA | {"tie_word_embeddings": True})
    experts = weight_sources(MIXTRAL)["layers.1.moe.gate_up.weight"]
    assert experts == [[p + f"block_sparse_moe.experts.{e}.{w}.weight" for w in ("w1", "w3")] for e in range(3)]
    gemma = weight_sources(TINY | dict(model_type="gemma2"))
    assert gemma["layers.1.out.post_norm.weight"] == [p + "post_attention_layernorm.weight"]
    assert gemma["layers.1.gate_up.norm.weight"] == [p + "pre_feedforward_layernorm.weight"]


@pytest.mark.parametrize("prefix", ["", "model.language_model.", "language_model.model."])
def test_other_prefixes(prefix):
    config = LLAMA | {"tie_word_embeddings": True}
    theirs = weights(config)
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in theirs.items()}
    ours, other = dict(convert_state_dict(config, theirs)), dict(convert_state_dict(config, renamed))
    assert ours.keys() == other.keys() and all(torch.equal(ours[k], other[k]) for k in ours)


def test_reads_each_tensor_once_and_lazily():
    class Lazy(dict):
        read = []

        def __getitem__(self, name):
            self.read.append(name)
            return super().__getitem__(name)

    tensors = Lazy(weights(MIXTRAL))
    stream = convert_state_dict(MIXTRAL, tensors)
    assert tensors.read == []
    assert next(stream)[0] == "tok_embeddings.weight" and tensors.read == ["model.embed_tokens.weight"]
    list(stream)
    assert sorted(tensors.read) == sorted(tensors)


def test_dtypes_are_kept():
    tensors = {name: tensor.bfloat16() for name, tensor in weights(LLAMA).items()}
    assert {tensor.dtype for _, tensor in convert_state_dict(LLAMA, tensors)} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(name):
    tensors = weights(LLAMA)
    del tensors[name]
    with pytest.raises(ValueError, match=name):
        convert_state_dict(LLAMA, tensors)
    ours = dict(convert_state_dict(LLAMA, weights(LLAMA)))
    del ours["norm.weight"]
    with pytest.raises(ValueError, match="norm.weight"):
        list(export_state_dict(LLAMA, ours))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight",
                                  "lm_head.bias", "model.layers.1.self_attn.q_norm.weight"])  # fmt: skip
def test_a_tensor_left_over_is_named(name):
    with pytest.raises(ValueError, match=name):
        convert_state_dict(LLAMA, weights(LLAMA) | {name: torch.zeros(8)})


def test_harmless_tensors_are_left_over():
    tied = LLAMA | {"tie_word_embeddings": True}
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2), "lm_head.weight": torch.zeros(11, 8),
             "vision_tower.vision_model.post_layernorm.weight": torch.zeros(2)}  # fmt: skip
    assert "output.weight" not in dict(convert_state_dict(tied, weights(tied) | extra))


def test_a_wrong_shape_is_named():
    tensors = weights(LLAMA) | {"model.embed_tokens.weight": torch.zeros(12, 8)}
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight.*\[12, 8\].*\[11, 8\]"):
        list(convert_state_dict(LLAMA, tensors))


def test_stop_ids():
    llama, qwen = {"model_type": "llama"}, {"model_type": "qwen3"}
    assert stop_ids_from_hf({"eos_token_id": [5, 6]}, llama | {"eos_token_id": 7}) == [5, 6]
    assert stop_ids_from_hf({"eos_token_id": 0}, llama | {"eos_token_id": 7}) == [0]
    assert stop_ids_from_hf({}, llama | {"eos_token_id": 7}) == [7]
    assert stop_ids_from_hf({}, llama | {"eos_token_id": [7, 8]}) == [7, 8]
    assert stop_ids_from_hf({}, llama) == [2]  # transformers' default
    assert stop_ids_from_hf({}, llama | {"eos_token_id": None}) == stop_ids_from_hf({}, qwen) == []
    assert stop_ids_from_hf({}, {"model_type": "gemma3", "text_config": {"eos_token_id": [1, 106]}}) == [1, 106]


def test_main(tmp_path, capsys):
    from safetensors.torch import save_file

    from convert_hf_checkpoint import main

    (tmp_path / "hf").mkdir()
    save_file(weights(LLAMA), tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(LLAMA))
    assert main(str(tmp_path / "hf"), str(tmp_path / "out"), False) == 0
    assert "safetensors" in capsys.readouterr().out
    assert main(str(tmp_path / "hf"), str(tmp_path / "out"), False) == 2  # it is there already
    assert capsys.readouterr().err.count("\n") == 1
    assert main(str(tmp_path / "hf"), str(tmp_path / "out"), True) == 0
    (tmp_path / "hf" / "config.json").write_text(json.dumps(LLAMA | {"logits_scaling": 8.0}))
    assert main(str(tmp_path / "hf"), str(tmp_path / "out2"), False) == 2
    out, err = capsys.readouterr()
    assert "logits_scaling" in err and err.count("\n") == 1 and "wrote" not in err
    assert not (tmp_path / "out2").exists()
