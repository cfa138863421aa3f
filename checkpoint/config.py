"""config.json -> Config: which LLaMA/Qwen this is, and a refusal of what model.py cannot compute.

Families differ in four things only:

    biases on q/k/v                       Qwen1.5, 2, 2.5
    norms on queries and keys             Qwen3
    the RoPE frequencies                  LLaMA 3.1, 3.2
    the number of key/value heads         any

All are read from fields of config.json; a name or a path never decides.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WIDE = "flattened_wide"  # model_type of a checkpoint of wide blocks; see Config.widths
MOST_JSON_BYTES = 64 * 2**20  # no honest JSON file of a checkpoint is larger
MOST_BLOCKS = 10_000     # far beyond any model, and few enough to list
POINTER = b"version https://git-lfs"  # so a file begins that git-lfs has not fetched yet

# Fields that switch on wiring we do not compute, each with the values that switch it off.
OFF = {
    "attention_bias": (None, False), "mlp_bias": (None, False), "use_qk_norm": (None, False),
    "partial_rotary_factor": (None, 1), "quantization_config": (None, {}), "clip_qkv": (None,),
    "num_experts": (None, 0, 1), "num_local_experts": (None, 0, 1), "n_routed_experts": (None, 0),
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,), "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1), "attention_multiplier": (None, 1),
    "logits_scaling": (None, 1), "scale_emb": (None, 1), "scale_depth": (None, 1),
    "use_parallel_residual": (None, False), "parallel_attn": (None, False),
}
ROPE_NUMBERS = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def refuse_pointer(path: Path) -> None:
    """ValueError if the file is only git-lfs's note of where the file itself is kept."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a git-lfs pointer, not the file itself; "
                             "run `git lfs pull` in its folder")


def read_json(path: Path) -> dict:
    """Read the object in a JSON file.

    ValueError names the file if it is too large, not UTF-8, not JSON or not an object.
    """
    refuse_pointer(path)
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"{path} is larger than {MOST_JSON_BYTES >> 20} MB; "
                         "a checkpoint's JSON files are not")
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(data).__name__}")
    return data


@dataclass(frozen=True)
class Config:
    """The numbers that shape a model, under the names config.json gives them."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None     # {"rope_type": "linear" | "llama3", ...}; None is plain RoPE
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_position_embeddings: int | None  # longest text the model was made for, in tokens
    sliding_window: int | None    # in tokens; on a text no longer than this, attention is full
    layer_types: tuple[str, ...]  # "full_attention" or "sliding_attention", one for each block
    widths: tuple[int, ...]       # block i is as wide as widths[i] ordinary blocks

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Read the Config of the checkpoint folder `path`.

        ValueError names the field that is missing, wrong or not supported.
        """
        raw = read_json(Path(path) / "config.json")
        try:
            return cls.parse(raw)
        except ValueError as error:
            raise ValueError(f"{path}/config.json: {error}") from None

    @classmethod
    def parse(cls, raw: dict) -> "Config":
        """Make a Config of the object in config.json.

        The object may have either layout: rope_theta and rope_scaling, or rope_parameters.
        """
        model_type = raw.get("model_type")
        if model_type == WIDE:
            model_type = raw.get("base_model_type")
        refuse_unsupported(raw, model_type)
        layers, heads = size(raw, "num_hidden_layers"), size(raw, "num_attention_heads")
        if layers > MOST_BLOCKS:
            raise ValueError(f"num_hidden_layers is {layers}, more than {MOST_BLOCKS}")
        hidden = size(raw, "hidden_size")
        theta, scaling = rope(raw)
        kv_heads = size(raw, "num_key_value_heads", heads)
        head_dim = size(raw, "head_dim", 128 if model_type == "qwen3" else hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise ValueError(f"num_attention_heads {heads} must be a multiple of "
                             f"num_key_value_heads {kv_heads}, and head_dim {head_dim} even")
        context = raw.get("max_position_embeddings")
        if context is not None:
            context = size(raw, "max_position_embeddings")
        tied = raw.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise ValueError("tie_word_embeddings must be true or false; "
                             f"got {json.dumps(tied)[:80]}")
        window, types = attention_kinds(raw, model_type, layers)
        return cls(vocab_size=size(raw, "vocab_size"), hidden_size=hidden,
                   intermediate_size=size(raw, "intermediate_size"), num_hidden_layers=layers,
                   num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
                   rms_norm_eps=number(raw, "rms_norm_eps", 1e-6), rope_theta=theta,
                   rope_scaling=scaling, tie_word_embeddings=tied,
                   qkv_bias=model_type == "qwen2", qk_norm=model_type == "qwen3",
                   max_position_embeddings=context, sliding_window=window,
                   layer_types=types, widths=block_widths(raw, layers))

    def block_shapes(self, width: int = 1) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a block's tensors, under their checkpoint names.

        The block is as wide as `width` ordinary blocks.
        """
        C, F = self.hidden_size, self.intermediate_size * width
        Q = self.num_attention_heads * self.head_dim * width
        K = self.num_key_value_heads * self.head_dim * width
        shapes = {"input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,),
                  "self_attn.q_proj.weight": (Q, C), "self_attn.k_proj.weight": (K, C),
                  "self_attn.v_proj.weight": (K, C), "self_attn.o_proj.weight": (C, Q),
                  "mlp.gate_proj.weight": (F, C), "mlp.up_proj.weight": (F, C),
                  "mlp.down_proj.weight": (C, F)}
        if self.qkv_bias:
            shapes |= {"self_attn.q_proj.bias": (Q,), "self_attn.k_proj.bias": (K,),
                       "self_attn.v_proj.bias": (K,)}
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (self.head_dim * width,),
                       "self_attn.k_norm.weight": (self.head_dim * width,)}
        return shapes

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors outside the blocks, under their checkpoint names."""
        table = (self.vocab_size, self.hidden_size)
        return {"model.embed_tokens.weight": table, "model.norm.weight": (self.hidden_size,),
                **({} if self.tie_word_embeddings else {"lm_head.weight": table})}

    @property
    def n_rep(self) -> int:
        """How many query heads share a KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    def block_parameters(self) -> int:
        """Count the parameters of one ordinary block."""
        return sum(math.prod(shape) for shape in self.block_shapes().values())

    def parameters(self) -> int:
        """Count the parameters of the ordinary model: embeddings and head too, once if tied."""
        return (sum(math.prod(shape) for shape in self.outer_shapes().values())
                + self.num_hidden_layers * self.block_parameters())


def refuse_unsupported(raw: dict, model_type: str | None) -> None:
    """ValueError names the field by which config.json asks for what model.py does not compute."""
    for field, off in OFF.items():
        if field == "attention_bias" and model_type == "qwen2":
            continue  # it has these biases
        if field in raw and raw[field] not in off:
            raise ValueError(f"{field} = {json.dumps(raw[field])[:80]} is not supported "
                             f"(only {json.dumps(off[-1])})")
    nope = raw.get("no_rope_layers") or []
    if not isinstance(nope, list) or not all(nope):
        raise ValueError("no_rope_layers marks blocks without position encoding; "
                         "they are not supported")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported, only {', '.join(FAMILIES)} "
                         "(others differ in wiring: post-norms, experts, parallel blocks)")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported, only silu")


def number(raw: dict, field: str, default: float | None = None) -> float:
    """Read a positive number from config.json. ValueError if it is anything else."""
    value = default if raw.get(field) is None else raw[field]
    if value is None:
        raise ValueError(f"{field} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise ValueError(f"{field} must be a positive number; got {json.dumps(value)[:80]}")
    return value


def size(raw: dict, field: str, default: int | None = None) -> int:
    """Read a positive integer below 2^31 from config.json. ValueError if it is anything else."""
    value = number(raw, field, default)
    if not isinstance(value, int) or value >= 2**31:
        raise ValueError(f"{field} must be a positive integer; got {json.dumps(value)[:80]}")
    return value


def rope(raw: dict) -> tuple[float, dict | None]:
    """Read rope_theta and rope_scaling (None for plain RoPE).

    They are old fields of these names, or lie in the newer rope_parameters. Where both are filled,
    transformers reads rope_scaling only: people add it by hand for longer texts.
    """
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    scaling = raw.get(field) or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError(f"{field} must be one flat object for all blocks; "
                         f"got {json.dumps(scaling)[:80]}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        raise ValueError(f"{field}: rope_type {kind!r} is not supported, "
                         f"only {', '.join(ROPE_NUMBERS)}")
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{field}: partial_rotary_factor {scaling['partial_rotary_factor']} "
                         "is not supported")
    numbers = {name: number(scaling, name) for name in ROPE_NUMBERS[kind]}
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise ValueError(f"{field}: low_freq_factor must be smaller than high_freq_factor")
    theta = number(scaling if "rope_theta" in scaling else raw, "rope_theta", 10000.0)
    return theta, {"rope_type": kind, **numbers} if numbers else None


def attention_kinds(raw: dict, model_type: str, layers: int) -> tuple[int | None, tuple[str, ...]]:
    """Read the sliding window, None if no block uses one, and each block's kind of attention.

    LLaMA's code never looks at these fields: all its blocks see the whole text.
    """
    window = raw.get("sliding_window", 4096)
    first = 0  # the first block that slides
    if model_type in ("qwen2", "qwen3"):
        window = window if raw.get("use_sliding_window", False) else None
        first = raw.get("max_window_layers", 28)
        if type(first) is not int:
            raise ValueError(f"max_window_layers must be an integer; got {json.dumps(first)[:80]}")
    types = raw.get("layer_types")
    if types is None:
        types = ["sliding_attention" if window and i >= first else "full_attention"
                 for i in range(layers)]
    kinds = ("full_attention", "sliding_attention")
    if (not isinstance(types, list) or len(types) != layers
            or not all(kind in kinds for kind in types)):
        raise ValueError(f"layer_types must hold {layers} times full_attention or "
                         f"sliding_attention; got {json.dumps(types)[:80]}")
    if model_type == "llama":
        return None, ("full_attention",) * layers
    if "sliding_attention" not in types:
        return None, tuple(types)
    return size(raw, "sliding_window", 4096), tuple(types)


def block_widths(raw: dict, layers: int) -> tuple[int, ...]:
    """Read how many ordinary blocks wide each block is.

    All are 1, except in a checkpoint that flatten.py --keep-wide wrote.
    """
    if raw.get("model_type") != WIDE:
        return (1,) * layers
    widths = raw.get("block_widths")
    if (not isinstance(widths, list) or len(widths) != layers
            or not all(type(width) is int and 0 < width < 2**15 for width in widths)):
        raise ValueError(f"block_widths must hold {layers} positive integers; "
                         f"got {json.dumps(widths)[:80]}")
    return tuple(widths)
