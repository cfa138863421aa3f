"""A LLaMA/Qwen decoder in plain PyTorch, with the checkpoint's own parameter names and RoPE layout.

A block reads the residual stream x, adds attention to it, then a gated MLP (Pre-LN):

    n  = input_layernorm(x)
    x' = x + o_proj( attention( rope(q_proj(n)), rope(k_proj(n)), v_proj(n) ) )
    n' = post_attention_layernorm(x')
    y  = x' + down_proj( silu(gate_proj(n')) * up_proj(n') )

The method lives on both sums: attention is a sum over heads, the MLP a sum over channels. So two
blocks that read the same input are one block with twice the heads and channels. That is why a block
takes its number of heads and channels from the shapes of its weights, never from the config.

Shapes     B sequences, T tokens, C residual width (hidden_size), H query heads, KV key/value heads,
           D head size (head_dim), F MLP channels (intermediate_size), L blocks, V vocabulary
Symbols    of the paper, and their names here: W_Q, W_K, W_V, W_O = q_proj, k_proj, v_proj, o_proj;
           W_up, W_gate, W_down = up_proj, gate_proj, down_proj
"""
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
from checkpoint.config import Config
from checkpoint.reader import Checkpoint, Weights
from console import forecast
from console.forecast import BATCH_TOKENS


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension. The rms is taken in float32 or better."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(sum_dtype(x.dtype))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rope_frequencies(config: Config) -> Tensor:
    """Return by what angle each of the D/2 rotated pairs turns per position (radians, float32).

    The angles are scaled as config.rope_scaling says. "linear" divides all by `factor`. "llama3"
    (LLaMA 3.1) divides the slow ones, whose wavelength exceeds original_max_position_embeddings /
    low_freq_factor; it leaves the fast ones, and blends in between.
    """
    pairs = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequency = 1.0 / config.rope_theta ** pairs                            # (D/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    turns = context * frequency / (2 * math.pi)  # of each pair, within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / scaling["factor"] + keep * frequency


def rope_table(config: Config, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles at positions start..stop-1, each (T, 1, D/2).

    They are computed in float32, then cast to the dtype and device of `like`. ValueError beyond a
    sliding window.
    """
    if config.sliding_window and stop > config.sliding_window:
        raise ValueError(f"sliding_window is {config.sliding_window} tokens and the text has "
                         f"{stop}: attention that slides is not supported; use a shorter text "
                         "(--window, --length)")
    positions = torch.arange(start, stop).float()
    angles = torch.outer(positions, rope_frequencies(config))[:, None]      # (T, 1, D/2)
    return angles.cos().to(like.device, like.dtype), angles.sin().to(like.device, like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of x (B, T, H, D) by its angle at that position.

    This is rotary position embedding. It acts inside each head and depends on the position only,
    so heads may be joined or dropped freely.
    """
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Cache:
    """Keys and values of the tokens seen so far: for each block a pair of (B, KV, T, D).

    The memory for `capacity` tokens is taken once, and their angles are computed once.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length, self.store, self.angles = capacity, 0, {}, None

    def rope(self, config: Config, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return rope_table of the next tokens, cut out of one table for the whole capacity."""
        if self.angles is None:
            self.angles = rope_table(config, 0, self.capacity, like)
        return tuple(part[self.length:self.length + tokens] for part in self.angles)

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k, v (B, KV, T, D) of a block; return all keys and values of that block."""
        if block not in self.store:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.store[block] = k.new_empty(shape), v.new_empty(shape)
        stop = self.length + k.shape[2]
        for stored, new in zip(self.store[block], (k, v), strict=True):
            stored[:, :, self.length:stop] = new
        return tuple(stored[:, :, :stop] for stored in self.store[block])


def linear(weights: Weights, name: str) -> nn.Linear:
    """Make an nn.Linear of the tensors name.weight (out, in) and, where there is one, name.bias.

    Nothing is copied.
    """
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return assign(layer, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})


def assign(module: nn.Module, weights: Weights) -> nn.Module:
    """Put tensors into a module under their names, without a copy. All must fit."""
    module.load_state_dict(weights, assign=True)
    return module


def head_norm(weight: Tensor, heads: int, config: Config) -> RMSNorm:
    """Make the norm of queries or keys (B, T, heads, D), which Qwen3 has.

    `weight` (width*D,) holds one vector for all heads of a block. In a wide block it holds one
    vector for the heads of each member.
    """
    members = weight.view(-1, config.head_dim)                              # (width, D)
    per_head = members.repeat_interleave(heads // len(members), dim=0)      # (heads, D)
    return RMSNorm(weight if len(members) == 1 else per_head, config.rms_norm_eps)


class Attention(nn.Module):
    """Causal grouped-query self-attention.

    KV head j serves the query heads j*g .. j*g + g-1, with g = H / KV.
    """

    def __init__(self, weights: Weights, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = linear(weights, "self_attn.q_proj")                   # C -> H*D
        self.k_proj = linear(weights, "self_attn.k_proj")                   # C -> KV*D
        self.v_proj = linear(weights, "self_attn.v_proj")                   # C -> KV*D
        self.o_proj = linear(weights, "self_attn.o_proj")                   # H*D -> C
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            heads = self.q_proj.out_features // self.head_dim
            kv_heads = self.k_proj.out_features // self.head_dim
            self.q_norm = head_norm(weights["self_attn.q_norm.weight"], heads, config)
            self.k_norm = head_norm(weights["self_attn.k_norm.weight"], kv_heads, config)

    def project(self, n: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, H or KV, T, D), of normed inputs n (B, T, C).

        Queries and keys are rotated.
        """
        q = self.q_proj(n).unflatten(-1, (-1, self.head_dim))               # (B, T, H, D)
        k = self.k_proj(n).unflatten(-1, (-1, self.head_dim))               # (B, T, KV, D)
        v = self.v_proj(n).unflatten(-1, (-1, self.head_dim))               # (B, T, KV, D)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)      # (B, H or KV, T, D)

    def heads(self, n: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None,
              block: int = 0) -> Tensor:
        """Return what the heads hand to o_proj, (B, T, H*D), for normed inputs n (B, T, C)."""
        q, k, v = self.project(n, rope)
        if cache is not None:
            k, v = cache.append(block, k, v)                                # (B, KV, S, D), S >= T
        (_, H, T, _), (_, KV, S, _) = q.shape, k.shape
        if H > KV:  # each KV head serves H / KV query heads that follow each other
            k, v = (part.repeat_interleave(H // KV, 1) for part in (k, v))
        # Three cases. One new token (T = 1) sees all S keys: no mask. A whole text (T = S): the
        # plain causal mask. T new tokens after S - T cached ones: row t sees keys 0 .. S-T+t.
        mask = None
        if 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=n.device).tril(S - T)
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < T == S)  # (B, H, T, D)
        return o.transpose(1, 2).flatten(2)                                 # (B, T, H*D)

    def forward(self, n: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None,
                block: int = 0) -> Tensor:
        return self.o_proj(self.heads(n, rope, cache, block))               # (B, T, C)


class MLP(nn.Module):
    """Gated MLP."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.gate_proj = linear(weights, "mlp.gate_proj")                   # C -> F
        self.up_proj = linear(weights, "mlp.up_proj")                       # C -> F
        self.down_proj = linear(weights, "mlp.down_proj")                   # F -> C

    def channels(self, n: Tensor) -> Tensor:
        """Return psi (..., F), what the channels hand to down_proj, for normed n (..., C)."""
        return F.silu(self.gate_proj(n)) * self.up_proj(n)

    def forward(self, n: Tensor) -> Tensor:
        return self.down_proj(self.channels(n))


class Block(nn.Module):
    """One decoder block of any width, around a dict of tensors under their names in a checkpoint.

    Nothing is copied.
    """

    def __init__(self, weights: Weights, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(weights["input_layernorm.weight"], config.rms_norm_eps)
        self.self_attn = Attention(weights, config)
        self.post_attention_layernorm = RMSNorm(weights["post_attention_layernorm.weight"],
                                                config.rms_norm_eps)
        self.mlp = MLP(weights)

    def attend(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None,
               block: int = 0) -> Tensor:
        """Return what attention adds to the stream x (B, T, C)."""
        return self.self_attn(self.input_layernorm(x), rope, cache, block)

    def feed(self, x: Tensor) -> Tensor:
        """Return what the MLP adds to the stream x (B, T, C)."""
        return self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None,
                block: int = 0) -> Tensor:
        x = x + self.attend(x, rope, cache, block)
        return x + self.feed(x)


class Transformer(nn.Module):
    """The whole model, around blocks and the tensors outside them. `load` reads one from disk."""

    def __init__(self, config: Config, blocks: list[Block], outer: Weights):
        super().__init__()
        self.config = config
        table = outer["model.embed_tokens.weight"]                          # (V, C)
        self.model = nn.ModuleDict({
            "embed_tokens": assign(nn.Embedding(*table.shape, device="meta"), {"weight": table}),
            "layers": nn.ModuleList(blocks),
            "norm": RMSNorm(outer["model.norm.weight"], config.rms_norm_eps),
        })
        tied = "lm_head.weight" not in outer  # the embedding table is the head
        self.lm_head = None if tied else linear(outer, "lm_head")

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the final normed states (B, T, C) of token ids (B, T).

        With a cache, the ids continue what it holds. They are not checked here: to read them, the
        CPU would have to wait for the GPU.
        """
        x = self.model["embed_tokens"](ids)
        rope = (rope_table(self.config, 0, ids.shape[1], like=x) if cache is None
                else cache.rope(self.config, ids.shape[1], like=x))
        for i, block in enumerate(self.model["layers"]):
            x = block(x, rope, cache, i)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.model["norm"](x)

    def head(self, states: Tensor) -> Tensor:
        """Return the logits (..., V) of final normed states (..., C)."""
        return F.linear(states, (self.lm_head or self.model["embed_tokens"]).weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) of token ids (B, T)."""
        check_ids(ids, self.config.vocab_size)
        return self.head(self.hidden(ids))


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """ValueError unless every id has a row in the embedding table."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"token ids run from {int(ids.min())} to {int(ids.max())}, but the model "
                         f"has {vocab_size} embeddings: is this the model's own tokenizer?")


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """Load the model in a checkpoint folder, ready to run. dtype None keeps the stored one.

    ValueError as from Checkpoint.
    """
    source = Checkpoint(path)
    dtype = dtype or source.dtype
    blocks = [Block(move(source.block(i), device, dtype), source.config)
              for i in range(source.config.num_hidden_layers)]
    net = Transformer(source.config, blocks, move(source.outer(), device, dtype))
    return net.eval().requires_grad_(False)


def move(weights: Weights, device: str | torch.device, dtype: torch.dtype) -> Weights:
    """Move tensors to a device, and change their dtype there."""
    return {name: tensor.to(device).to(dtype) for name, tensor in weights.items()}


# ---- running blocks over the streams of a whole text

def batches(xs: Tensor, tokens: int | None = None) -> Iterator[slice]:
    """Cut the N windows of xs (N, T, ...) into slices of about `tokens` tokens each (BATCH_TOKENS).

    Without any windows there is one empty slice, so that sums over them still have a shape.
    """
    step = max(1, (tokens or BATCH_TOKENS) // xs.shape[1])
    return (slice(i, i + step) for i in range(0, max(1, len(xs)), step))


def count(xs: Tensor) -> int:
    """Return how many tokens the streams xs (N, T, ...) have, those of all processes together."""
    return parallel.total(xs.shape[0] * xs.shape[1])


def embed(outer: Weights, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the stream (N, T, C) that enters the first block, on the CPU, for token ids (N, T)."""
    table = outer["model.embed_tokens.weight"]
    check_ids(tokens, len(table))
    return F.embedding(tokens, table).to(dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums of numbers of this dtype are kept: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def check_finite(tensors: Weights, where: str, device: torch.device | None = None) -> None:
    """ValueError that names the place if any number is NaN or infinite, looked at on the device."""
    for name, tensor in tensors.items():
        # the least and the greatest tell, and take no memory: NaN is both
        if tensor.numel() and not torch.stack(
                tensor.to(device or tensor.device).aminmax()).isfinite().all():
            raise ValueError(f"{where}: NaN or infinity in {name}; the checkpoint is broken, or "
                             "--dtype is too narrow for this model (try float32)")


class Runner:
    """Runs blocks, one at a time, over the streams xs (N, T, C) of all windows of a text.

    Weights move to the device block by block, so memory does not grow with depth. Streams live
    where `home` puts them. If that is not the device, batches of them move there and back.
    """

    def __init__(self, config: Config, length: int, device: str, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        like = torch.empty(0, device=device, dtype=dtype)
        self.rope = rope_table(config, 0, length, like)
        self.tokens = forecast.batch_tokens(config, self.device, dtype.itemsize)

    def home(self, xs: Tensor, needs: dict[str, int]) -> Tensor:
        """Return the stream xs where it will live during work that takes the memory `needs`.

        `needs` are those of console/forecast.py, with all streams in them. If they fit, the stream
        lives on the device, else on the host: for a GPU in pinned memory, which it reads and writes
        while it works. On a CPU xs stays what it is.
        """
        if self.device.type == "cpu" or forecast.fits(needs, self.device):
            return xs.to(self.device)
        return xs.pin_memory() if self.device.type == "cuda" else xs

    def batches(self, *streams: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield slices of the windows, each with that part of all streams, on the device.

        A GPU copies from the host what comes next while it works on what came before. In the end it
        has done all work, so that the host may read what was written there.
        """
        away = self.device.type == "cuda" and not all(stream.is_cuda for stream in streams)
        copies = torch.cuda.Stream(self.device) if away else None

        def fetch(rows: slice) -> list[Tensor]:
            with torch.cuda.stream(copies):  # of None: nothing changes
                return [stream[rows].to(self.device, non_blocking=True) for stream in streams]
        slices = list(batches(streams[0], None if self.device.type == "cpu" else self.tokens))
        following = fetch(slices[0])
        for rows, after in zip(slices, [*slices[1:], None], strict=True):
            parts = following
            if away:
                work = torch.cuda.current_stream(self.device)
                work.wait_stream(copies)  # `parts` have arrived
                for part in parts:
                    part.record_stream(work)  # their memory is not used again before it is done
            if after is not None:
                following = fetch(after)
            yield rows, parts
        if away:
            torch.cuda.current_stream(self.device).synchronize()

    def block(self, weights: Weights) -> Block:
        """Make a block that is ready to run."""
        return Block(move(weights, self.device, self.dtype), self.config)

    @torch.inference_mode()
    def update(self, xs: Tensor, step: Callable[[Tensor], Tensor]) -> None:
        """xs <- step(xs), in place, batch by batch. step maps a batch (B, T, C) on the device."""
        for rows, (x,) in self.batches(xs):
            xs[rows].copy_(step(x), non_blocking=True)

    def run_block(self, weights: Weights, *streams: Tensor) -> None:
        """xs <- block(xs), in place, for each stream xs."""
        block = self.block(weights)
        for xs in streams:
            self.update(xs, lambda x: block(x, self.rope))

    def attend(self, weights: Weights, xs: Tensor) -> None:
        """xs <- xs + the block's attention, in place."""
        block = self.block(weights)
        self.update(xs, lambda x: x + block.attend(x, self.rope))

    def feed(self, weights: Weights, xs: Tensor) -> None:
        """xs <- xs + the block's MLP, in place."""
        block = self.block(weights)
        self.update(xs, lambda x: x + block.feed(x))

    @torch.inference_mode()
    def sums(self, streams: Sequence[Tensor], terms: Callable) -> list[Tensor]:
        """Add up, over all tokens of the streams (each (N, T, C)), what `terms` makes of a batch.

        terms(*batch) returns a list. What is in it decides what is summed:

            a tensor (..., n)              its sum over tokens, (n,)
            a pair a (..., A), b (..., B)  a^T b, (A, B)
            a pair a, a                    of a^T a only the lower triangle, see `symmetric`

        Sums are kept in float32 or better, on the device. Of several processes each adds up its
        own windows first.
        """
        totals = []
        for _, parts in self.batches(*streams):
            addends = terms(*parts)
            totals = totals or [zeros_for(addend) for addend in addends]
            for total, addend in zip(totals, addends, strict=True):
                add_to(total, addend)
            del addends, addend  # large: before the next ones are made
        return [parallel.total(total) for total in totals]


def zeros_for(addend: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Make the zeros that Runner.sums starts from, for a tensor or a pair of tensors."""
    parts = [addend] if isinstance(addend, Tensor) else addend
    dtype = max((sum_dtype(part.dtype) for part in parts), key=lambda kind: kind.itemsize)
    return torch.zeros([part.shape[-1] for part in parts], dtype=dtype, device=parts[0].device)


def add_to(total: Tensor, addend: Tensor | tuple[Tensor, Tensor]) -> None:
    """Add what Runner.sums makes of a tensor or a pair of tensors to total, in place."""
    if isinstance(addend, Tensor):
        total += addend.flatten(0, -2).sum(0, dtype=total.dtype)
        return
    a, b = (part.flatten(0, -2).to(total.dtype) for part in addend)
    if addend[0] is addend[1]:
        add_gram(total, a)
    else:
        total.addmm_(a.T, b)


def add_gram(total: Tensor, a: Tensor) -> None:
    """Add the lower triangle of a^T a, for a (tokens, n), to total (n, n), in place.

    total is filled in four strips of rows. Each strip ends where its last row meets the diagonal:
    5/8 of the work of the whole product. Above the diagonal total means nothing.
    """
    strip = -(-len(total) // 4)
    for i in range(0, len(total), strip):
        total[i:i + strip, :i + strip].addmm_(a[:, i:i + strip].T, a[:, :i + strip])


@torch.inference_mode()
def symmetric(lower: Tensor) -> Tensor:
    """Make a symmetric matrix (n, n) of its lower triangle, in place."""
    return lower.tril_().add_(lower.tril(-1).T)


# ---- text

@torch.inference_mode()
def generate(net: Transformer, ids: Tensor, new_tokens: int, temperature: float = 0.0,
             top_k: int | None = None, seed: int = 0, stop: tuple[int, ...] = (),
             use_cache: bool = True, steps: Callable[[int], Iterable] = range) -> Tensor:
    """Continue token ids (B, T) by up to new_tokens. Returns old and new ids, (B, T + new).

    Temperature 0 takes the likeliest token. Above 0, tokens are drawn from softmax(logits /
    temperature), with top_k only from the top_k likeliest. Stops early once every sequence has met
    one of the `stop` ids. Without the cache every step reads the whole text again: the same result,
    slowly. `steps` counts the new tokens; it may tell of them.
    """
    check_ids(ids, net.config.vocab_size)
    cache = Cache(ids.shape[1] + new_tokens) if use_cache else None
    generator = torch.Generator(ids.device).manual_seed(seed)
    done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for _ in steps(new_tokens):
        states = net.hidden(ids[:, cache.length:] if cache is not None else ids, cache)
        logits = net.head(states[:, -1]).float()                            # (B, V)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)                         # (B, 1)
        else:
            logits = logits / temperature
            if top_k is not None:
                smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        if stop:
            token = token.masked_fill(done, stop[0])  # pads a sequence that has ended
            done |= torch.isin(token, torch.tensor(stop, device=ids.device))
        ids = torch.cat([ids, token], dim=1)
        if stop and bool(done.all()):
            break
    return ids
