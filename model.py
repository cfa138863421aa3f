"""A LLaMA/Qwen decoder in plain PyTorch, with the checkpoint's own parameter names and RoPE layout.

A block reads the residual stream x, adds attention to it, then a gated MLP (Pre-LN):

    x' = x  + o_proj( attention( rope(q_proj(n)), rope(k_proj(n)), v_proj(n) ) )      n  = input_layernorm(x)
    y  = x' + down_proj( silu(gate_proj(n')) * up_proj(n') )                          n' = post_attention_layernorm(x')

Both sums are what the method lives on: attention is a sum over heads, the MLP a sum over channels, so two blocks that
read the same input are one block with twice the heads and channels. A block therefore takes its number of heads and
channels from the shapes of its weights, never from the config.

Shapes: B sequences, T tokens, C residual width (hidden_size), H query heads, KV key/value heads, D head size
(head_dim), F MLP channels (intermediate_size), L blocks, V vocabulary. Symbols of the paper and their names here:
W_Q, W_K, W_V, W_O = q_proj, k_proj, v_proj, o_proj;  W_up, W_gate, W_down = up_proj, gate_proj, down_proj.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint.config import Config
from checkpoint.reader import Checkpoint, Weights


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, the rms in float32 (or better) whatever the dtype of x."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        # Queries and keys (B, T, H, D): `weight` holds one vector of D for each member of a wide block, (width * D,).
        weight = self.weight.view(-1, x.shape[-1])
        if len(weight) > 1:
            weight = weight.repeat_interleave(x.shape[-2] // len(weight), dim=0)  # (H, D)
        return weight.squeeze(0) * h.to(x.dtype)


def rope_frequencies(config: Config) -> Tensor:
    """Angle per position of each of the D/2 rotated pairs (radians, float32), scaled as config.rope_scaling says.

    "linear" divides all by `factor`. "llama3" (LLaMA 3.1) divides the slow ones, whose wavelength exceeds
    original_max_position_embeddings / low_freq_factor, leaves the fast ones, and blends in between.
    """
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / scaling["factor"] + keep * frequency


def rope_table(config: Config, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at positions start..stop-1, each (T, 1, D/2).

    Computed in float32, then cast to the dtype and device of `like`. ValueError beyond a sliding window.
    """
    if config.sliding_window and stop > config.sliding_window:
        raise ValueError(f"sliding_window is {config.sliding_window} tokens and the text has {stop}: "
                         "attention that slides is not supported; use a shorter text (--window, --length)")
    angles = torch.outer(torch.arange(start, stop).float(), rope_frequencies(config))[:, None]
    return angles.cos().to(like.device, like.dtype), angles.sin().to(like.device, like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, T, H, D): turns each pair (i, i + D/2) by its angle at that position.

    It acts inside each head and depends on the position only, so heads may be joined or dropped freely.
    """
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Cache:
    """Keys and values of the tokens seen so far, one pair of (B, KV, T, D) a block, in memory taken once."""

    def __init__(self, capacity: int):
        self.capacity, self.length, self.store = capacity, 0, {}

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k, v (B, KV, T, D) of a block; return all of that block's keys and values."""
        if block not in self.store:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.store[block] = k.new_empty(shape), v.new_empty(shape)
        stop = self.length + k.shape[2]
        for stored, new in zip(self.store[block], (k, v), strict=True):
            stored[:, :, self.length:stop] = new
        return tuple(stored[:, :, :stop] for stored in self.store[block])


def linear(weights: Weights, name: str) -> nn.Linear:
    """nn.Linear around the tensors name.weight (out, in) and, where there is one, name.bias; nothing is copied."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return assign(layer, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})


def assign(module: nn.Module, weights: Weights) -> nn.Module:
    """Put tensors into a module under their names, without a copy; strict."""
    module.load_state_dict(weights, assign=True)
    return module


class Attention(nn.Module):
    """Causal grouped-query self-attention: KV head j serves the query heads j*g .. j*g+g-1, g = H / KV."""

    def __init__(self, weights: Weights, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, linear(weights, f"self_attn.{name}"))
        if config.qk_norm:
            self.q_norm = RMSNorm(weights["self_attn.q_norm.weight"], config.rms_norm_eps)
            self.k_norm = RMSNorm(weights["self_attn.k_norm.weight"], config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def project(self, n: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (rotated) and values, (B, H or KV, T, D), for normed inputs n (B, T, C)."""
        q, k, v = (proj(n).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def heads(self, n: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None, block: int = 0) -> Tensor:
        """What the heads hand to o_proj, (B, T, H*D), for normed inputs n (B, T, C)."""
        q, k, v = self.project(n, rope)
        if cache is not None:
            k, v = cache.append(block, k, v)
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=n.device).tril(S - T) if 1 < T < S else None
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < T == S, enable_gqa=q.shape[1] != k.shape[1])
        return o.transpose(1, 2).flatten(2)

    def forward(self, n: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None, block: int = 0) -> Tensor:
        return self.o_proj(self.heads(n, rope, cache, block))


class MLP(nn.Module):
    """Gated MLP."""

    def __init__(self, weights: Weights):
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, linear(weights, f"mlp.{name}"))

    def channels(self, n: Tensor) -> Tensor:
        """psi, what the channels hand to down_proj, (..., F), for normed inputs n (..., C)."""
        gate, up = self.gate_proj(n), self.up_proj(n)
        return F.silu(gate) * up if torch.is_grad_enabled() else F.silu(gate, inplace=True).mul_(up)  # saves memory

    def forward(self, n: Tensor) -> Tensor:
        return self.down_proj(self.channels(n))


class Block(nn.Module):
    """One decoder block, of any width, built around a dict of tensors under their checkpoint names (no copy)."""

    def __init__(self, weights: Weights, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(weights["input_layernorm.weight"], config.rms_norm_eps)
        self.self_attn = Attention(weights, config)
        self.post_attention_layernorm = RMSNorm(weights["post_attention_layernorm.weight"], config.rms_norm_eps)
        self.mlp = MLP(weights)

    def attend(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None, block: int = 0) -> Tensor:
        """What attention adds to the stream x (B, T, C)."""
        return self.self_attn(self.input_layernorm(x), rope, cache, block)

    def feed(self, x: Tensor) -> Tensor:
        """What the MLP adds to the stream x (B, T, C)."""
        return self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None, block: int = 0) -> Tensor:
        x = x + self.attend(x, rope, cache, block)
        return x + self.feed(x)


class Transformer(nn.Module):
    """The whole model. `Transformer(config, blocks, outer)` wraps given tensors; `load` builds one from a checkpoint."""

    def __init__(self, config: Config, blocks: list[Block], outer: Weights):
        super().__init__()
        self.config = config
        V, C = outer["model.embed_tokens.weight"].shape
        self.model = nn.ModuleDict({
            "embed_tokens": assign(nn.Embedding(V, C, device="meta"), {"weight": outer["model.embed_tokens.weight"]}),
            "layers": nn.ModuleList(blocks),
            "norm": RMSNorm(outer["model.norm.weight"], config.rms_norm_eps),
        })
        self.lm_head = linear(outer, "lm_head") if "lm_head.weight" in outer else None  # None: tied to embed_tokens

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Final normed states (B, T, C) of token ids (B, T); with a cache, ids continue what it holds."""
        check_ids(ids, self.config.vocab_size)
        x = self.model["embed_tokens"](ids)
        start = cache.length if cache is not None else 0
        rope = rope_table(self.config, start, start + ids.shape[1], like=x)
        for i, block in enumerate(self.model["layers"]):
            x = block(x, rope, cache, i)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.model["norm"](x)

    def head(self, states: Tensor) -> Tensor:
        """Logits (..., V) of final normed states (..., C)."""
        return F.linear(states, (self.lm_head or self.model["embed_tokens"]).weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of token ids (B, T)."""
        return self.head(self.hidden(ids))


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """ValueError unless every id has a row in the embedding table."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"token ids run from {int(ids.min())} to {int(ids.max())}, but the model has {vocab_size} "
                         "embeddings: is this the model's own tokenizer?")


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """The model in a checkpoint folder, ready to run; dtype None keeps the stored one. Errors as in Checkpoint."""
    source = Checkpoint(path)
    dtype = dtype or source.dtype
    blocks = [Block(move(source.block(i), device, dtype), source.config) for i in range(source.config.num_hidden_layers)]
    return Transformer(source.config, blocks, move(source.outer(), device, dtype)).eval().requires_grad_(False)


def move(weights: Weights, device: str | torch.device, dtype: torch.dtype) -> Weights:
    """The same tensors on a device, in a dtype."""
    return {name: tensor.to(device, dtype) for name, tensor in weights.items()}


@torch.inference_mode()
def generate(net: Transformer, ids: Tensor, new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
             seed: int = 0, stop: tuple[int, ...] = (), use_cache: bool = True) -> Tensor:
    """Continue token ids (B, T) by up to new_tokens; (B, T + new). Ends early when every sequence has met a `stop` id.

    temperature 0 takes the likeliest token; above 0 samples from softmax(logits / temperature), from the top_k
    likeliest only if given. Without the cache every step reads the whole text again: slow, and the same.
    """
    cache = Cache(ids.shape[1] + new_tokens) if use_cache else None
    generator = torch.Generator(ids.device).manual_seed(seed)
    done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for _ in range(new_tokens):
        states = net.hidden(ids[:, cache.length:] if cache is not None else ids, cache)
        logits = net.head(states[:, -1]).float()                                   # (B, V)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        if stop:
            token = token.masked_fill(done, stop[0])                               # a finished sequence is padded
            done |= torch.isin(token, torch.tensor(stop, device=ids.device))
        ids = torch.cat([ids, token], dim=1)
        if stop and bool(done.all()):
            break
    return ids
