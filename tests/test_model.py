"""Our forward and generation equal transformers', for every family and layout of config.json."""
import json

import pytest
import tiny
import torch

import model
from model import Cache, generate, load
from text.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64, "rope_theta": 500000.0}
FAMILIES = {
    "llama1_mha": ("Llama", {"num_key_value_heads": 8}),
    "llama3_gqa": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
                             "rms_norm_eps": 1e-5}),
    "llama31_scaled": ("Llama", {"rope_parameters": LLAMA31}),
    "llama32_tied": ("Llama", {"rope_parameters": LLAMA31 | {"factor": 32.0},
                               "tie_word_embeddings": True}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0,
                                                   "rope_theta": 10000.0}}),
    "smollm_tied_mqa": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "tinyllama": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "mistral_window": ("Mistral", {"sliding_window": 256, "head_dim": 16}),
    "qwen15_mha": ("Qwen2", {"num_key_value_heads": 8}),
    "qwen25_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3_free_head": ("Qwen3", {"head_dim": 32}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """Transformers' model, and the folder it was saved in.

    Its weights are not the defaults: norms of one and biases of zero would hide mistakes.
    """
    name, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    cfg = getattr(transformers, f"{name}Config")(**SMALL | changes)
    net = getattr(transformers, f"{name}ForCausalLM")(cfg).eval()
    with torch.no_grad():
        for key, weight in net.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in key else
                         torch.randn_like(weight) * 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    net.save_pretrained(folder, max_shard_size="60KB" if "gqa" in request.param else "1GB")
    return net, folder


def random_ids(first, beyond, *shape, seed):
    return torch.randint(first, beyond, shape, generator=torch.Generator().manual_seed(seed))


def assert_same_logits(net, path, ids=None):
    ids = random_ids(0, 300, 2, 100, seed=1) if ids is None else ids
    with torch.no_grad():
        expected, ours = net(ids).logits, load(path, dtype=torch.float32)(ids)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def assert_same_continuation(net, path, ids):
    """Greedy, with the cache and without."""
    expected = net.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None,
                            pad_token_id=0)
    ours = load(path, dtype=torch.float32)
    assert torch.equal(generate(ours, ids, 64), expected)
    assert torch.equal(generate(ours, ids, 64, use_cache=False), expected)


def test_logits_equal_those_of_transformers(pair):
    assert_same_logits(*pair)


def test_the_older_layout_of_config_gives_the_same_model(pair, tmp_path):
    net, folder = pair
    raw = json.loads((folder / "config.json").read_text())
    parameters = raw.pop("rope_parameters")
    raw["rope_theta"] = parameters.pop("rope_theta")
    raw["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    if raw["rope_scaling"] and parameters["rope_type"] == "linear":
        raw["rope_scaling"] = {"type": "linear", "factor": parameters["factor"]}
    raw["torch_dtype"] = raw.pop("dtype")
    if raw["num_key_value_heads"] == raw["num_attention_heads"]:
        del raw["num_key_value_heads"]
    raw.pop("layer_types", None)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)  # as in a hub's cache, where files are links
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same_logits(net, tmp_path)


@pytest.mark.parametrize("theta", [{}, {"rope_theta": 500000.0}])
def test_of_both_layouts_in_one_config_the_older_counts_as_in_transformers(tmp_path, theta):
    cfg = transformers.LlamaConfig(**SMALL)
    transformers.LlamaForCausalLM(cfg).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | theta
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    raw["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(net, tmp_path)


def test_greedy_generation_equals_transformers_with_and_without_cache(pair):
    assert_same_continuation(*pair, random_ids(3, 300, 1, 20, seed=2))


@pytest.mark.skipif(not tiny.DATA.exists(), reason="needs the trained checkpoints")
@pytest.mark.parametrize("name", ["stories260K", "wiki24"])
def test_trained_checkpoints_equal_transformers(name):
    path = tiny.DATA / "models" / name
    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = random_ids(3, 500, 2, 120, seed=2)
    assert_same_logits(net, path, ids)
    assert_same_continuation(net, path, ids[:1])


@pytest.mark.skipif(not tiny.DATA.exists(), reason="needs the trained checkpoints")
def test_a_trained_model_tells_its_story():
    path = tiny.DATA / "models" / "stories260K"
    tokenizer = load_tokenizer(path)
    ids = generate(load(path), torch.tensor([tokenizer.encode("Once upon a time")]), 60)
    assert tokenizer.decode(ids[0].tolist()).startswith(
        "Once upon a time, there was a little girl named Lily. "
        "She loved to play outside in the park.")


def test_text_read_in_pieces_with_a_cache_gives_the_same_states(ckpt):
    net, ids = load(ckpt), torch.arange(3, 43)[None]
    cache = Cache(40)
    with torch.no_grad():
        pieces = [net.hidden(part, cache) for part in ids.split([7, 1, 20, 12], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), net.hidden(ids), atol=1e-5, rtol=1e-5)


def test_sampling_repeats_with_its_seed_and_top_1_is_greedy(ckpt):
    net, ids = load(ckpt), torch.tensor([[5, 6, 7]])
    a, again, b = (generate(net, ids, 30, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert torch.equal(generate(net, ids, 30, temperature=1.0, top_k=1), generate(net, ids, 30))


def test_generation_stops_when_every_sequence_has_met_a_stop_id(ckpt):
    net, ids = load(ckpt), torch.tensor([[5, 6, 7], [9, 4, 3]])
    free = generate(net, ids, 20)
    stop = int(free[0, 5])
    first = [row[3:].index(stop) if stop in row[3:] else 19 for row in free.tolist()]
    stopped = generate(net, ids, 20, stop=(stop,))
    assert stopped.shape[1] == 4 + max(first)
    for row, expected, n in zip(stopped.tolist(), free.tolist(), first, strict=True):
        assert row[:4 + n] == expected[:4 + n] and set(row[4 + n:]) <= {stop}


def test_text_longer_than_a_sliding_window_is_refused(tmp_path):
    path = tiny.checkpoint(tmp_path / "m", model_type="mistral", sliding_window=16)
    net = load(path)
    net(torch.ones(1, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="sliding_window"):
        net(torch.ones(1, 17, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_can_be_widened(tmp_path, dtype):
    path = tiny.checkpoint(tmp_path / "m", dtype=dtype)
    ids = torch.arange(3, 20)[None]
    assert load(path)(ids).dtype == dtype
    narrow, wide = load(path)(ids).float(), load(path, dtype=torch.float32)(ids)
    assert (narrow - wide).abs().max() < 0.03 * wide.abs().max()


def test_ids_without_an_embedding_are_refused(ckpt):
    with pytest.raises(ValueError, match="300 embeddings"):
        load(ckpt)(torch.tensor([[300]]))


def rotated(x, position):
    cos, sin = model.rope_table(tiny.config(), position, position + 1, like=x)
    return model.rotate(x, cos, sin)[0, 0, 0]


def test_rotation_depends_on_the_distance_only():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=g, dtype=torch.float64)
    tiny.expect("turned by position 0, a head stays as it is", q[0, 0, 0], rotated(q, 0))
    scores = [float(rotated(q, m) @ rotated(k, n)) for m, n in ((7, 3), (104, 100), (4, 0))]
    tiny.expect("q k at positions 7 and 3, 104 and 100, 4 and 0", [scores[0]] * 3, scores,
                rtol=1e-5, atol=0)
    other = float(rotated(q, 7) @ rotated(k, 4))
    assert other != pytest.approx(scores[0], rel=1e-3), \
        f"q k at another distance\nexpected: not {scores[0]}\ncame:     {other}"


def test_rotation_turns_pairs_half_a_head_apart():
    """Channel i and i + D/2 turn together, by position * theta^(-2i/D)."""
    x = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    x[..., 1] = 1.0
    angle = 5 * 10000.0 ** (-2 / 8)
    expected = torch.zeros(8, dtype=torch.float64)
    expected[1], expected[5] = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    tiny.expect(f"a head {x[0, 0, 0].tolist()} at position 5", expected, rotated(x, 5),
                atol=1e-6, rtol=1e-6)


def test_rope_llama3_blends_between_the_two_wavelengths():
    plain = model.rope_frequencies(tiny.config(rope_theta=500000.0, head_dim=64))
    scaled = model.rope_frequencies(tiny.config(rope_scaling=LLAMA31, head_dim=64))
    turns = 64 * plain / (2 * torch.pi)  # within the original context
    fast, slow, between = turns > 4, turns < 1, (turns > 1) & (turns < 4)
    assert torch.equal(scaled[fast], plain[fast])
    assert torch.equal(scaled[slow], plain[slow] / 8)
    assert between.any() and (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()
