"""Every family against Hugging Face transformers: tiny random models, float32, logits and greedy tokens.

Each case is saved by transformers, then loaded by us directly and through conversion, with config.json in the layout
that transformers 5 writes and in the older one, its default fields left out.

Try it:  python -m pytest tests/test_families.py -k gemma
"""

import dataclasses
import json
from functools import cache

import pytest
import torch
from safetensors import safe_open

from checkpoint import convert_checkpoint, load_model
from convert_hf_checkpoint import args_from_hf, convert_state_dict, export_state_dict
from model import Transformer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.usefixtures("one_thread")

PREFILL, LENGTH, NEW = 33, 45, 64  # windows and original contexts below are shorter than PREFILL
TOLERANCE = 1e-4  # of the largest logit

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500.0,
              original_max_position_embeddings=16)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1000.0, original_max_position_embeddings=16)
# theta, length and betas chosen so that the ramp from kept to stretched frequencies lies within the head
YARN_ALL = YARN | dict(beta_fast=4.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=0.3, truncate=False)
MOE = dict(num_experts_per_tok=2)
GEMMA3 = dict(head_dim=32, sliding_window=8, query_pre_attn_scalar=24)

CASES = {
    "llama": ("Llama", dict(num_key_value_heads=4)),
    "llama-tied-gqa4": ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "llama-gqa7-head_dim": ("Llama", dict(hidden_size=56, num_attention_heads=7, num_key_value_heads=1, head_dim=16)),
    "llama-bias": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-gelu": ("Llama", dict(hidden_act="gelu", rope_parameters=dict(rope_type="default", rope_theta=50.0))),
    "llama-linear": ("Llama", dict(rope_parameters=LINEAR)),
    "llama-llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama-yarn": ("Llama", dict(rope_parameters=YARN)),
    "llama-yarn-all": ("Llama", dict(rope_parameters=YARN_ALL)),
    "llama-yarn-factor": ("Llama", dict(rope_parameters=YARN | dict(attention_factor=1.7))),
    "mistral": ("Mistral", dict(sliding_window=None, num_key_value_heads=1)),
    "mistral-window": ("Mistral", dict(sliding_window=8, head_dim=32, tie_word_embeddings=True)),
    "mixtral": ("Mixtral", MOE | dict(num_local_experts=4)),
    "mixtral-window-tied": ("Mixtral", MOE | dict(num_local_experts=8, sliding_window=8, tie_word_embeddings=True)),
    "qwen2-tied-gqa7": ("Qwen2", dict(num_attention_heads=14, num_key_value_heads=2, hidden_size=112,
                                      tie_word_embeddings=True)),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen2-yarn": ("Qwen2", dict(rope_parameters=YARN, num_key_value_heads=4)),
    "qwen3-tied": ("Qwen3", dict(head_dim=32, tie_word_embeddings=True)),
    "qwen3-bias-yarn": ("Qwen3", dict(head_dim=8, attention_bias=True, rope_parameters=YARN)),
    "qwen3-window": ("Qwen3", dict(head_dim=16, use_sliding_window=True, sliding_window=8, max_window_layers=2)),
    "qwen3_moe": ("Qwen3Moe", MOE | dict(num_experts=8, moe_intermediate_size=24, norm_topk_prob=True, head_dim=32)),
    "qwen3_moe-window": ("Qwen3Moe", MOE | dict(num_experts=4, moe_intermediate_size=24, num_experts_per_tok=3,
                                                use_sliding_window=True, sliding_window=8, rope_parameters=YARN)),
    "gemma-mqa": ("Gemma", dict(head_dim=32, num_key_value_heads=1)),
    "gemma-untied-gelu": ("Gemma", dict(head_dim=16, tie_word_embeddings=False, hidden_act="gelu")),
    "gemma2": ("Gemma2", dict(head_dim=32, sliding_window=8, query_pre_attn_scalar=24, final_logit_softcapping=0.5)),
    "gemma2-caps": ("Gemma2", dict(head_dim=16, sliding_window=8, attn_logit_softcapping=2.0,
                                   final_logit_softcapping=None, tie_word_embeddings=False)),
    "gemma3": ("Gemma3Text", GEMMA3 | dict(num_hidden_layers=7)),
    "gemma3-linear": ("Gemma3Text", GEMMA3 | dict(
        final_logit_softcapping=5.0, layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters=dict(full_attention=LINEAR, sliding_attention=dict(rope_type="default", rope_theta=100.0)))),
    "gemma3-multimodal": ("Gemma3", GEMMA3 | dict(num_hidden_layers=6)),
}  # fmt: skip


def hf_model(name: str):
    """A random transformers model whose logits are a few units apart, so that greedy decoding has no near ties."""
    family, changes = CASES[name]
    sizes = SIZES | changes
    if family == "Gemma3":
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                      patch_size=14)  # fmt: skip
        config = transformers.Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4)
    else:
        config = getattr(transformers, f"{family}Config")(**sizes)
    kind = {"Gemma3": "Gemma3ForConditionalGeneration", "Gemma3Text": "Gemma3ForCausalLM"}.get(family)
    torch.manual_seed(list(CASES).index(name))
    model = getattr(transformers, kind or f"{family}ForCausalLM")._from_config(config, attn_implementation="eager")
    for key, weight in model.named_parameters():
        if key.endswith("norm.weight"):  # around what it is at rest, 1 or Gemma's 0
            weight.data += 0.3 * torch.randn_like(weight)
        elif key.endswith("bias"):
            weight.data.normal_(std=0.5)
        else:
            weight.data.normal_(std=2.0 * weight.shape[-1] ** -0.5)
        if "embed_tokens" in key and config.get_text_config().tie_word_embeddings:
            weight.data /= 4 if "gemma" not in config.model_type else 32  # or each token would only predict itself
    return model.float().eval()


@cache
def reference(name: str):
    """(transformers model, tokens [2, LENGTH], its logits [2, LENGTH, V], its greedy continuation [2, NEW])."""
    model = hf_model(name)
    tokens = torch.randint(0, 96, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # no eos: it never stops
        greedy = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW, use_cache=True
        )[:, LENGTH:]
    assert greedy.shape == (2, NEW)
    return model, tokens, logits, greedy


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> the directory that transformers' save_pretrained wrote for it."""

    @cache
    def save(name: str):
        path = tmp_path_factory.mktemp(name)
        reference(name)[0].save_pretrained(path)
        return path

    yield save
    reference.cache_clear()


def error(logits, expected) -> float:
    """The largest difference relative to the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def cached_logits(model, tokens):
    """Logits [B, T, V] by a prefill of PREFILL tokens, then one token at a time."""
    B, T = tokens.shape
    model.setup_caches(batch_size=B, max_seq_len=LENGTH + NEW)
    pos = torch.arange(T).expand(B, T)
    steps = [slice(0, PREFILL), *(slice(t, t + 1) for t in range(PREFILL, T))]
    return torch.cat([model(tokens[:, s], pos[:, s]) for s in steps], dim=1)


@torch.no_grad()
def greedy_tokens(model, tokens, n: int):
    """n greedy tokens [B, n] after a prompt [B, T]."""
    B, T = tokens.shape
    model.setup_caches(batch_size=B, max_seq_len=LENGTH + NEW)
    pos = torch.arange(T).expand(B, T)
    new = []
    for t in range(n):
        tokens = model(tokens, pos)[:, -1:].argmax(-1)
        new.append(tokens)
        pos = torch.full((B, 1), T + t)
    return torch.cat(new, dim=1)


def check(model, name: str) -> None:
    """Full forward, prefill and decode, and greedy tokens, all against transformers."""
    _, tokens, logits, greedy = reference(name)
    with torch.no_grad():
        assert error(model(tokens), logits) < TOLERANCE
    assert error(cached_logits(model, tokens), logits) < TOLERANCE
    assert torch.equal(greedy_tokens(model, tokens, NEW), greedy)


@pytest.mark.parametrize("name", CASES)
def test_loaded_directly_equals_transformers(name, saved):
    check(load_model(saved(name), device="cpu", dtype=torch.float32), name)


@pytest.mark.parametrize("name", CASES)
def test_converted_equals_transformers(name, saved, tmp_path):
    convert_checkpoint(saved(name), tmp_path / "out")
    converted, direct = (load_model(p, device="cpu", dtype=torch.float32) for p in (tmp_path / "out", saved(name)))
    assert converted.args == direct.args
    a, b = converted.state_dict(), direct.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with torch.no_grad():
        assert error(converted(reference(name)[1]), reference(name)[2]) < TOLERANCE


# ------------------------------------------------------------------------------------------- the older config.json
KEEP = {"model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads"}  # fmt: skip


def old_layout(config: dict, hf_config) -> dict:
    """What transformers 4 wrote for the same model, and with every field left out that has its default."""
    if "text_config" in config:
        text = old_layout(config["text_config"], hf_config.text_config)
        return {k: v for k, v in config.items() if k != "dtype"} | {"text_config": text, "torch_dtype": "float32"}
    config = dict(config)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        rope = rope["full_attention"]
    config["rope_theta"] = rope["rope_theta"]
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    if scaling["rope_type"] in ("linear", "yarn") and "rope_local_base_freq" not in config:  # the oldest name of it
        scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    config["torch_dtype"] = config.pop("dtype", "float32")
    defaults = type(hf_config)().to_dict()
    defaults |= {"rope_theta": type(hf_config).default_theta, "rope_scaling": None, "pretraining_tp": 1}
    if isinstance(defaults["rope_theta"], dict):
        defaults |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"] and defaults.get(
        "head_dim", 0
    ) in (None, 128) and type(hf_config).__name__ != "Qwen3Config":
        del config["head_dim"]
    pattern = config.get("sliding_window_pattern", 2)
    kinds = [("sliding" if (i + 1) % pattern else "full") + "_attention" for i in range(config["num_hidden_layers"])]
    if config.get("layer_types") == kinds or "max_window_layers" in config:
        config.pop("layer_types", None)
    return {k: v for k, v in config.items() if k in KEEP or k not in defaults or v != defaults[k]}


@pytest.mark.parametrize("name", CASES)
def test_old_config_layout(name, saved, tmp_path):
    hf, tokens, logits, _ = reference(name)
    new = json.loads((saved(name) / "config.json").read_text())
    old = old_layout(new, hf.config)
    assert "rope_parameters" not in old and "dtype" not in old and len(str(old)) < len(str(new))
    assert args_from_hf(old) == args_from_hf(new)
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "model.safetensors").symlink_to(saved(name) / "model.safetensors")
    # transformers must read the rewritten file as the same model, or this test would prove nothing
    again = type(hf).from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        assert error(again(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits, logits) < 1e-6
        assert error(load_model(tmp_path, device="cpu", dtype=torch.float32)(tokens), logits) < TOLERANCE


# --------------------------------------------------------------------------------------------- other ways to store
@pytest.mark.parametrize("name", ["llama-tied-gqa4", "mixtral", "qwen3_moe", "gemma2"])
def test_sharded_safetensors(name, saved, tmp_path):
    reference(name)[0].save_pretrained(tmp_path, max_shard_size="24KB")
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    gate, up = (
        next(file for key, file in sorted(where.items()) if part in key)
        for part in [("gate_proj", "up_proj"), ("0.w1", "0.w3")][name == "mixtral"]
    )
    assert gate != up  # fused from two files
    check(load_model(tmp_path, device="cpu", dtype=torch.float32), name)


@pytest.mark.parametrize("name", ["llama", "llama-tied-gqa4", "mixtral", "qwen3_moe", "gemma3-multimodal"])
def test_pytorch_bin(name, saved, tmp_path):
    """A dump of the state dict: transformers 5 names it otherwise than save_pretrained, and a tied head is in it."""
    state_dict = reference(name)[0].state_dict()
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((saved(name) / "config.json").read_text())
    if name in ("mixtral", "qwen3_moe"):
        assert "model.layers.0.mlp.experts.gate_up_proj" in state_dict
    if "tied" in name:
        assert "lm_head.weight" in state_dict
    check(load_model(tmp_path, device="cpu", dtype=torch.float32), name)


@pytest.mark.parametrize("name", CASES)
def test_export_is_the_inverse(name, saved):
    config = json.loads((saved(name) / "config.json").read_text())
    with safe_open(saved(name) / "model.safetensors", framework="pt") as file:
        theirs = {key: file.get_tensor(key) for key in file.keys()}
    exported = dict(export_state_dict(config, dict(convert_state_dict(config, theirs))))
    text = {k for k in theirs if not k.startswith(("vision_tower", "multi_modal_projector"))}
    assert exported.keys() == text
    assert all(torch.equal(exported[k], theirs[k]) for k in text)
    assert len({t.untyped_storage().data_ptr() for t in exported.values()}) == len(exported)  # safetensors needs it


# ------------------------------------------------------------------------------- the comparisons above can fail
MUTATIONS = [
    ("llama", dict(rope_theta=9000.0)),
    ("llama", dict(activation="gelu")),
    ("llama-tied-gqa4", dict(norm_eps=1e-6)),
    ("llama-gelu", dict(activation="gelu_tanh")),
    ("llama-linear", dict(rope_scaling={"rope_type": "default"})),
    ("llama-llama3", dict(rope_scaling={"rope_type": "default"})),
    ("llama-llama3", dict(rope_scaling=LLAMA3 | dict(high_freq_factor=3.0))),
    ("llama-yarn", dict(rope_scaling={"rope_type": "linear", "factor": 4.0})),
    ("llama-yarn", dict(rope_scaling=YARN | dict(original_max_position_embeddings=128))),
    ("llama-yarn-all", dict(rope_scaling=YARN)),
    ("llama-yarn-all", dict(rope_scaling=YARN_ALL | dict(truncate=True))),
    ("llama-yarn-factor", dict(rope_scaling=YARN)),
    ("mistral-window", dict(sliding_window=9)),
    ("mistral-window", dict(sliding_window=7)),
    ("mixtral", dict(norm_expert_weights=False)),
    ("mixtral-window-tied", dict(sliding_window=None)),
    ("qwen2-window", dict(sliding_layers=[False, False, True])),
    ("qwen3-window", dict(sliding_layers=None)),
    ("qwen3_moe", dict(n_experts_per_token=3)),
    ("qwen3_moe-window", dict(norm_expert_weights=True)),
    ("gemma-mqa", dict(embedding_scale=1.0)),
    ("gemma-mqa", dict(norm_offset=0.0)),
    ("gemma-untied-gelu", dict(activation="gelu")),
    ("gemma2", dict(attn_softcap=None)),
    ("gemma2", dict(logit_softcap=None)),
    ("gemma2", dict(attn_scale=None)),
    ("gemma2-caps", dict(sliding_layers=[False, True, False])),
    ("gemma3", dict(rope_local_theta=None)),
    ("gemma3", dict(sliding_layers=None)),
    ("gemma3-linear", dict(rope_scaling={"rope_type": "default"})),
    ("gemma3-linear", dict(rope_local_theta=10000.0)),
]


@pytest.mark.parametrize("name, change", MUTATIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_a_wrong_field_is_noticed(name, change, saved):
    model = load_model(saved(name), device="cpu", dtype=torch.float32)
    wrong = Transformer(dataclasses.replace(model.args, **change)).eval()
    wrong.load_state_dict(model.state_dict())
    _, tokens, logits, _ = reference(name)
    with torch.no_grad():
        assert error(wrong(tokens), logits) > 2 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_worth_comparing(name, saved):
    model, tokens, _, greedy = reference(name)
    assert len(set(greedy.flatten().tolist())) > 8  # not one token over and over
    tokens = torch.cat([tokens, greedy], dim=1)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, LENGTH - 1 : -1]
    first, second = logits.topk(2).values.unbind(-1)
    assert (first - second).min() > 1e-5 * logits.abs().max()  # no tie that rounding could break
