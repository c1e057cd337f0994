"""The native transformer of the Llama family and its static KV cache, in plain PyTorch.

One forward serves Llama, CodeLlama, TinyLlama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE and Gemma 1 to 3: families
differ by `ModelArgs` fields, never by classes. The file knows `nn.Linear` and nothing of kernels, quantization or
ranks; a layer is five small modules (`qkv`, `attention`, `out`, `gate_up`, `down`; or `moe` for the last two) between
`embed` and `head`, and whoever wants to be faster swaps one of them after construction.

Try it:  python -c "import torch, model as m; a = m.ModelArgs(dim=128, n_layers=2, n_heads=2, n_kv_heads=1,
         head_dim=64, hidden_dim=256, vocab_size=99, max_seq_len=64); print(m.Transformer(a)(torch.zeros(1, 5).long()))"

Shapes: B batch, T new tokens, S cache slots, H query heads, K kv heads (in a suffix: KV heads), G = H / K, D head dim,
        V vocab, E experts, C = dim. A suffix names a layout: q_BTHD is [B, T, H, D].
Sources: Llama (arXiv 2302.13971), RoPE (2104.09864), GQA (2305.13245), YaRN (2309.00071), Mistral (2310.06825),
        Mixtral (2401.04088), Gemma 1 / 2 / 3 (2403.08295, 2408.00118, 2503.19786), Qwen2 / Qwen3 technical reports.
        Numbers agree with Hugging Face transformers; its rotate-half RoPE layout is the native one here.
"""

import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

# Queries attended at once. Bounds every attention mask to QUERY_BLOCK x S: no S x S tensor exists anywhere.
QUERY_BLOCK = 512
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
KV_DTYPES = {"fp8": torch.float8_e4m3fn}  # of a KV cache, beside the model's own dtype
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass
class ModelArgs:
    """Everything that tells one checkpoint's architecture from another's. Sizes count elements, not bytes."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int  # stored, never derived: Gemma and Qwen3 have head_dim != dim / n_heads
    hidden_dim: int
    vocab_size: int
    max_seq_len: int  # the longest context the checkpoint was made for
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # RMSNorm multiplies by (norm_offset + weight): 1 in Gemma
    post_norms: bool = False  # RMSNorm on each branch before the residual add: Gemma 2 and 3
    activation: str = "silu"
    embedding_scale: float = 1.0  # sqrt(dim) in Gemma
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before RoPE: Qwen3, Gemma 3
    attn_scale: float | None = None  # multiplies q.k; None: head_dim ** -0.5
    attn_softcap: float | None = None  # scores = cap * tanh(scores / cap): Gemma 2
    logit_softcap: float | None = None
    sliding_window: int | None = None  # a query sees this many positions, itself included
    sliding_layers: list[bool] | None = None  # which layers slide; None: all, where sliding_window is set
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=lambda: {"rope_type": "default"})
    rope_local_theta: float | None = None  # base of the unscaled RoPE of sliding layers: Gemma 3
    n_experts: int = 0  # 0: a dense feed-forward
    n_experts_per_token: int = 0
    norm_expert_weights: bool = True  # the chosen experts' probabilities are scaled to sum to one

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not known; known: {', '.join(ACTIVATIONS)}")
        if self.rope_scaling.get("rope_type") not in ROPE_TYPES:
            kind = self.rope_scaling.get("rope_type")
            raise ValueError(f"rope_type {kind!r} is not supported; known: {', '.join(ROPE_TYPES)}")

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, or None where it attends to the whole context."""
        slides = self.sliding_layers is None or self.sliding_layers[layer]
        return self.sliding_window if slides else None


def rope_frequencies(args: ModelArgs, local: bool = False) -> tuple[Tensor, float]:
    """Inverse frequencies (float32 [D/2], radians a position) and the factor on cos and sin.

    `local` asks for the plain RoPE of Gemma 3's sliding layers. YaRN after arXiv 2309.00071, llama3 after Meta's
    reference code; both with Hugging Face's parameter names.
    """
    theta, scaling = args.rope_theta, args.rope_scaling
    if local:
        theta, scaling = args.rope_local_theta, {"rope_type": "default"}
    D = args.head_dim
    inv_freq = theta ** -(torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    kind, factor = scaling["rope_type"], scaling.get("factor", 1.0)
    if kind == "linear":
        return inv_freq / factor, 1.0
    if kind == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # over the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return inv_freq * (keep + (1 - keep) / factor), 1.0
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings") or args.max_seq_len

        def dim_of(turns: float) -> float:  # the dimension that makes so many turns over the original context
            return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dim_of(scaling.get("beta_fast") or 32), dim_of(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        ramp = ((torch.arange(D // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)

        def mscale(m: float) -> float:
            return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

        attention_factor = scaling.get("attention_factor")
        if attention_factor is None:
            m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
            attention_factor = mscale(m) / mscale(m_all) if m and m_all else mscale(1.0)
        return inv_freq * (1 - ramp) + inv_freq / factor * ramp, attention_factor
    return inv_freq, 1.0


class RoPE(nn.Module):
    """Rotary embedding in float32: positions [B, T] -> (cos, sin), each [B, T, 1, D/2]."""

    def __init__(self, args: ModelArgs, local: bool = False):
        super().__init__()
        inv_freq, self.factor = rope_frequencies(args, local)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn, recurse=True):
        # model.to(torch.bfloat16) must not round the frequencies: follow the device, keep the values.
        inv_freq = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = inv_freq.to(self.inv_freq.device)
        return self

    def forward(self, input_pos: Tensor) -> tuple[Tensor, Tensor]:
        angle = (input_pos[..., None].float() * self.inv_freq)[:, :, None]
        return angle.cos() * self.factor, angle.sin() * self.factor


def rotate(x_BTHD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + D/2) of each head, in float32."""
    cos, sin = rope
    a, b = x_BTHD.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BTHD.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last dimension, in float32."""

    def __init__(self, dim: int, args: ModelArgs):
        super().__init__()
        self.eps, self.offset = args.norm_eps, args.norm_offset
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - args.norm_offset))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * (self.weight.float() + self.offset)).to(x.dtype)


def pick_kv_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """The dtype of a KV cache by its name in KV_DTYPES; None: the model's own. ValueError where there is none such."""
    if name is None:
        return None
    if name not in KV_DTYPES:
        raise ValueError(f"--kv_dtype {name}: not known; known: {', '.join(KV_DTYPES)} (without it, the model's dtype)")
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    if old or device.type == "mps":
        what = "an older GPU" if old else "an Apple GPU"
        raise ValueError(f"--kv_dtype {name}: needs a CPU or a GPU of compute capability 8.9, this is {what}; "
                         "leave it out")  # fmt: skip
    return KV_DTYPES[name]


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (float8_e4m3fn [..., D], its scales bfloat16 [...]), whose product is x.

    Within 1/16 of each element, but for those so small that 2^-18 of the vector's largest is more. The largest itself
    is kept, as 256 (e4m3 ends at 448): a few large channels are what makes keys hard, and where a scale only brings
    them near, a power of two, perplexity suffers twice as much (benchmarks/NOTES.md). A 256th of a bf16 is a bf16.
    """
    scale = (x.abs().amax(-1).float().clamp_min(2.0**-100) / 256).to(torch.bfloat16)
    return (x.float() / scale.float()[..., None]).to(torch.float8_e4m3fn), scale


def from_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_fp8`, in a dtype."""
    return (x.float() * scale.float()[..., None]).to(dtype)


class KVCache(nn.Module):
    """Keys and values of one layer, allocated once: k and v are [B, K, S, D].

    In float8_e4m3fn each of their vectors has a scale of its own, [B, K, S]. It is found when the token is written and
    depends on nothing else: no calibration, and a slot may be overwritten at any time, as when speculation rolls back.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        super().__init__()
        scale = torch.zeros(shape[:3], dtype=torch.bfloat16, device=device) if dtype == torch.float8_e4m3fn else None
        self.register_buffer("k", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("k_scale", scale, persistent=False)
        self.register_buffer("v_scale", scale if scale is None else scale.clone(), persistent=False)

    def update(self, input_pos: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Write slot input_pos[b, t] of row b. Rows beyond B keep what they hold."""
        rows = torch.arange(input_pos.shape[0], device=input_pos.device)[:, None]
        if self.k_scale is None:
            self.k[rows, :, input_pos], self.v[rows, :, input_pos] = k_BTKD, v_BTKD
        else:
            self.k[rows, :, input_pos], self.k_scale[rows, :, input_pos] = to_fp8(k_BTKD)
            self.v[rows, :, input_pos], self.v_scale[rows, :, input_pos] = to_fp8(v_BTKD)

    def read(self, B: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """k and v of the first B rows and n slots, [B, K, n, D] each: only these are read, however many there are."""
        k, v = self.k[:B, :, :n], self.v[:B, :, :n]
        if self.k_scale is None:
            return k, v
        return from_fp8(k, self.k_scale[:B, :, :n], dtype), from_fp8(v, self.v_scale[:B, :, :n], dtype)


def masked_attention(q_BHTD, k_BKSD, v_BKSD, mask_BTS, scale: float, softcap: float | None) -> Tensor:
    """Attention under a mask -> [B, H, T, D].

    The G query heads that share a kv head are stacked along T, so K and V are read once and never expanded.
    """
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    G = H // K
    q = q_BHTD.reshape(B, K, G * T, D)
    mask = mask_BTS[:, None, None].expand(B, 1, G, T, S).reshape(B, 1, G * T, S)
    if softcap is None:
        y = F.scaled_dot_product_attention(q, k_BKSD, v_BKSD, attn_mask=mask, scale=scale)
    else:  # SDPA has no soft-capping
        scores = softcap * torch.tanh(q.float() @ k_BKSD.float().transpose(-1, -2) * (scale / softcap))
        y = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v_BKSD.dtype) @ v_BKSD
    return y.reshape(B, H, T, D)  # some of CUDA's kernels return other strides


def flash_attends(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> bool:
    """Whether flash attention is there for these: on a GPU, in half precision. A mask takes longer."""
    return can_use_flash_attention(SDPAParams(q_BHTD, k_BKSD, v_BKSD, None, 0.0, False, True))


class Attention(nn.Module):
    """RoPE, the KV write and causal attention: everything between the QKV and the output projection.

    This is the seam for a decode kernel: one that takes (qkv, rope, input_pos, the cache) replaces the module.
    """

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.head_dim, self.group = args.head_dim, args.n_heads // args.n_kv_heads
        self.scale = args.head_dim**-0.5 if args.attn_scale is None else args.attn_scale
        self.softcap, self.window = args.attn_softcap, args.window(layer)
        self.q_norm = RMSNorm(args.head_dim, args) if args.qk_norm else None
        self.k_norm = RMSNorm(args.head_dim, args) if args.qk_norm else None
        self.cache: KVCache | None = None

    def mask(self, input_pos_BT: Tensor, slots_S: Tensor) -> Tensor:
        """Which slots each query sees -> bool [B, T, S]."""
        distance = input_pos_BT[:, :, None] - slots_S
        return distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)

    def forward(self, qkv: Tensor, rope, input_pos: Tensor, slots: Tensor | int | None) -> Tensor:
        """qkv [B, T, (H + 2K) D] -> [B, T, H D]. `slots` are the cache slots to attend to; None: no cache.

        A number instead: so many tokens of every row precede these T, which are in order.
        """
        B, T = qkv.shape[:2]
        heads = qkv.view(B, T, -1, self.head_dim)
        K = heads.shape[2] // (self.group + 2)  # from the tensor, so that a sharded layer needs no edit
        q, k, v = heads.split([K * self.group, K, K], dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        q = q.transpose(1, 2)
        if slots is None:
            y = self.causal(q, k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
            return y.reshape(B, T, -1)
        self.cache.update(input_pos, k, v)
        return self.attended(q, input_pos, slots)

    def attended(self, q: Tensor, input_pos: Tensor, slots: Tensor | int) -> Tensor:
        """Rotated queries [B, H, T, D], whose keys and values are in the cache, over that -> [B, T, H D]."""
        B, _, T, _ = q.shape
        if isinstance(slots, int):
            y = self.causal(q, *self.cache.read(B, slots + T, q.dtype))
        else:
            k, v = self.cache.read(B, slots.shape[0], q.dtype)
            y = torch.cat(
                [
                    masked_attention(q_block, k, v, self.mask(pos_block, slots), self.scale, self.softcap)
                    for q_block, pos_block in zip(q.split(QUERY_BLOCK, 2), input_pos.split(QUERY_BLOCK, 1), strict=True)
                ],
                dim=2,
            )
        return y.transpose(1, 2).reshape(B, T, -1)

    def causal(self, q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
        """Plain causal attention of the last T of S tokens -> [B, H, T, D]: training, perplexity, prompts."""
        T, S = q_BHTD.shape[2], k_BKSD.shape[2]
        if self.softcap is None and (self.window is None or self.window >= S):
            attend = functools.partial(F.scaled_dot_product_attention, scale=self.scale, enable_gqa=True)
            if T == S:
                return attend(q_BHTD, k_BKSD, v_BKSD, is_causal=True)
            if flash_attends(q_BHTD, k_BKSD, v_BKSD):
                from torch.nn.attention.bias import causal_lower_right  # imports a compiler: a second of every start

                return attend(q_BHTD, k_BKSD, v_BKSD, causal_lower_right(T, S))
        pos, past = torch.arange(S, device=q_BHTD.device), S - T
        blocks = []
        for start in range(past, S, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, S)
            first = 0 if self.window is None else max(0, start - self.window + 1)
            mask = self.mask(pos[None, start:stop], pos[first:stop]).expand(q_BHTD.shape[0], -1, -1)
            q, k, v = q_BHTD[:, :, start - past : stop - past], k_BKSD[:, :, first:stop], v_BKSD[:, :, first:stop]
            blocks.append(masked_attention(q, k, v, mask, self.scale, self.softcap))
        return torch.cat(blocks, dim=2)


class NormLinear(nn.Module):
    """norm -> linear: [B, T, C] -> [B, T, out]."""

    def __init__(self, args: ModelArgs, out_features: int, bias: bool):
        super().__init__()
        self.norm = RMSNorm(args.dim, args)
        self.linear = nn.Linear(args.dim, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class NormGateUp(nn.Module):
    """norm -> gate and up in one linear -> act(gate) * up: [B, T, C] -> [B, T, hidden]."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.norm = RMSNorm(args.dim, args)
        self.linear = nn.Linear(args.dim, 2 * args.hidden_dim, bias=args.mlp_bias)
        self.activation = ACTIVATIONS[args.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear(self.norm(x)).chunk(2, dim=-1)
        return self.activation(gate) * up


class LinearResidual(nn.Module):
    """x + linear(y), with Gemma 2's norm on the branch where the checkpoint has one: -> [B, T, C]."""

    def __init__(self, args: ModelArgs, in_features: int, bias: bool):
        super().__init__()
        self.linear = nn.Linear(in_features, args.dim, bias=bias)
        self.post_norm = RMSNorm(args.dim, args) if args.post_norms else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        y = self.linear(y)
        return x + (y if self.post_norm is None else self.post_norm(y))


class ExpertLinear(nn.Module):
    """E bias-free linears stacked: weight [E, out, in]."""

    def __init__(self, n_experts: int, in_features: int, out_features: int):
        super().__init__()
        self.n_experts, self.in_features, self.out_features = n_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))
        nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)  # as nn.Linear does

    def one(self, x_NC: Tensor, e: int) -> Tensor:
        """All rows through expert e -> [N, out]."""
        return F.linear(x_NC, self.weight[e])

    def forward(self, x_NC: Tensor, expert_N: Tensor) -> Tensor:
        """Row n through expert expert_N[n] -> [N, out]. For few rows: each row reads its expert's matrix."""
        return torch.bmm(self.weight[expert_N], x_NC[:, :, None])[:, :, 0]


class MoE(nn.Module):
    """norm -> router -> the top experts of each token, weighted -> residual: the feed-forward of Mixtral, Qwen3-MoE."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.norm = RMSNorm(args.dim, args)
        self.router = nn.Linear(args.dim, args.n_experts, bias=False)
        self.gate_up = ExpertLinear(args.n_experts, args.dim, 2 * args.hidden_dim)
        self.down = ExpertLinear(args.n_experts, args.hidden_dim, args.dim)
        self.activation = ACTIVATIONS[args.activation]
        self.top, self.norm_weights = args.n_experts_per_token, args.norm_expert_weights

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(x)

    def experts(self, x: Tensor) -> Tensor:
        """The branch without the residual: [B, T, C] -> [B, T, C]."""
        h = self.norm(x).view(-1, x.shape[-1])
        probs = self.router(h).float().softmax(-1)
        weight, expert = probs.topk(self.top, dim=-1)  # [N, top]
        if self.norm_weights:
            weight = weight / weight.sum(-1, keepdim=True)
        weight = weight.to(h.dtype)
        rows, expert_flat = h.repeat_interleave(self.top, 0), expert.flatten()
        # Reading one matrix a row costs less than visiting the experts one by one until there are as many rows as
        # experts; and only this form has static shapes, so it is the one that compiles.
        if torch.compiler.is_compiling() or expert_flat.numel() <= self.gate_up.n_experts:
            gate, up = self.gate_up(rows, expert_flat).chunk(2, dim=-1)
            y = self.down(self.activation(gate) * up, expert_flat)
        else:
            y = torch.empty_like(rows)
            for e in expert_flat.unique().tolist():
                mine = (expert_flat == e).nonzero()[:, 0]
                gate, up = self.gate_up.one(rows[mine], e).chunk(2, dim=-1)
                y[mine] = self.down.one(self.activation(gate) * up, e)
        y = (y.view(-1, self.top, y.shape[-1]) * weight[:, :, None]).sum(1)
        return y.view(x.shape)


class Block(nn.Module):
    """One layer: five operations, each a module of its own."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        qkv_dim = (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
        self.qkv = NormLinear(args, qkv_dim, args.qkv_bias)
        self.attention = Attention(args, layer)
        self.out = LinearResidual(args, args.n_heads * args.head_dim, args.out_bias)
        if args.n_experts:
            self.moe = MoE(args)
        else:
            self.gate_up = NormGateUp(args)
            self.down = LinearResidual(args, args.hidden_dim, args.mlp_bias)
        self.is_moe = bool(args.n_experts)

    def forward(self, x: Tensor, rope, input_pos: Tensor, slots: Tensor | int | None) -> Tensor:
        y = self.attention(self.qkv(x), rope, input_pos, slots)
        x = self.out(y, x)
        return self.moe(x) if self.is_moe else self.down(self.gate_up(x), x)


class Transformer(nn.Module):
    """The model. `setup_caches` once, then `model(tokens, input_pos)`; or `model(tokens)` with no cache at all."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        # Uniform with std 0.02, since a normal_ on the meta device imports torch._dynamo: two seconds of every start.
        embedding = torch.empty(args.vocab_size, args.dim).uniform_(-0.02 * 3**0.5, 0.02 * 3**0.5)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, _weight=embedding)
        self.layers = nn.ModuleList(Block(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.rope = RoPE(args)
        self.rope_local = RoPE(args, local=True) if args.rope_local_theta is not None else None
        # A tensor, since Gemma was trained with the scale rounded to the embedding's dtype.
        self.register_buffer("embedding_scale", torch.tensor(args.embedding_scale, device="cpu"), persistent=False)
        self.register_buffer("slots", None, persistent=False)
        self.max_batch_size = self.max_seq_len = 0
        self.kv_dtype: torch.dtype | None = None  # of the caches; None: the embedding's
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding with the head where the checkpoint does (and the head is still a plain linear)."""
        if self.args.tie_embeddings and isinstance(self.output, nn.Linear):
            self.output.weight = self.tok_embeddings.weight

    def setup_caches(self, batch_size: int, max_seq_len: int, kv_dtype: str | None = None) -> None:
        """Allocate the KV caches, [batch_size, K, max_seq_len, D] a layer, on the embedding's device.

        kv_dtype: one of KV_DTYPES, "fp8" for caches of half the size; None: as the present ones, at first the
        embedding's. A call that the present caches already satisfy changes nothing, so prompts of any length and
        smaller batches reuse them. ValueError for a kv_dtype that is unknown, that the device lacks, or too late.
        """
        weight = self.tok_embeddings.weight
        wanted = pick_kv_dtype(kv_dtype, weight.device)
        if wanted and self.max_batch_size and self.kv_dtype is None:  # captured graphs would read the old ones
            raise ValueError(f"kv_dtype {kv_dtype}: there are other caches already; give it in the first call")
        self.kv_dtype = wanted or self.kv_dtype
        if batch_size <= self.max_batch_size and max_seq_len <= self.max_seq_len:
            return
        self.max_batch_size, self.max_seq_len = max(batch_size, self.max_batch_size), max(max_seq_len, self.max_seq_len)
        n_slots = -(-self.max_seq_len // 64) * 64  # a round number, as kernels like it
        for layer in self.layers:
            a = layer.attention
            a.cache = None  # free the old one first
            n_kv_heads = layer.qkv.linear.out_features // (a.head_dim * (a.group + 2))
            # Slots to spare: a compiler specializes on a slice of all of a dimension, and would compile that again.
            shape = (self.max_batch_size, n_kv_heads, n_slots + 64, a.head_dim)
            a.cache = KVCache(shape, self.kv_dtype or weight.dtype, weight.device)
        self.slots = torch.arange(n_slots, device=weight.device)

    def embed(self, tokens: Tensor, pos: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """tokens int [B, T] at pos int [B or 1, T] -> (x [B, T, C], what RoPE returns, and what local layers take)."""
        x = self.tok_embeddings(tokens)
        if self.args.embedding_scale != 1.0:
            x = x * self.embedding_scale.to(x.dtype)
        rope = self.rope(pos)
        return x, rope, rope if self.rope_local is None else self.rope_local(pos)

    def features(self, tokens: Tensor, input_pos: Tensor | None = None, slots: Tensor | int | None = None) -> Tensor:
        """tokens int [B, T] -> the last layer's hidden states [B, T, C], before the final norm, which `head` has.

        input_pos int [B, T]: each row's own positions; keys and values go to those cache slots. None: no cache,
        plain causal over the T tokens. slots int [S']: the cache slots to attend to, 0 ... S' - 1, at least up to
        the largest position; None: all that are allocated. Fewer slots, less to read. Where the tokens are at
        positions n, n + 1, ... of every row, as those of a prompt are, the number n will do: attention needs no mask.
        """
        if input_pos is None:
            pos = torch.arange(tokens.shape[1], device=tokens.device)[None]
        else:
            pos, slots = input_pos, self.slots if slots is None else slots
        return self.run_layers(*self.embed(tokens, pos), pos, slots)

    def run_layers(self, x: Tensor, rope, rope_local, pos: Tensor, slots: Tensor | int | None) -> Tensor:
        """All layers, of what `embed` returns: [B, T, C] -> [B, T, C]."""
        for layer in self.layers:
            x = layer(x, rope if layer.attention.window is None else rope_local, pos, slots)
        return x

    def head(self, x: Tensor) -> Tensor:
        """The final norm and the linear over the vocabulary: [B, T, C] -> [B, T, V]."""
        return self.output(self.norm(x))

    def logits(self, features: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, V]."""
        logits = self.head(features)
        cap = self.args.logit_softcap
        return logits if cap is None else (cap * torch.tanh(logits.float() / cap)).to(logits.dtype)

    def forward(self, tokens: Tensor, input_pos: Tensor | None = None, slots: Tensor | int | None = None) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]; arguments as in `features`."""
        return self.logits(self.features(tokens, input_pos, slots))
