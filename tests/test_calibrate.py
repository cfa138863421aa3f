"""Calibration: seeded windows, the similarity matrix in one pass, statistics that are plain sums."""
import pytest
import tiny
import torch
from torch.testing import assert_close

import calibrate
from calibrate import Runner, calibration_tokens, cosine_sums, embed, measure
from checkpoint.reader import Checkpoint
from model import Block, load


def test_windows_are_seeded_and_come_from_the_text():
    ids = torch.arange(1000)
    a, again, b = (calibration_tokens(ids, 5, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert a.shape == (5, 20) and (a.diff(dim=1) == 1).all()
    last = calibration_tokens(torch.arange(20), 1, 20, 3)
    assert last.tolist() == [list(range(20))]


def test_a_text_shorter_than_asked_is_refused():
    with pytest.raises(ValueError, match="--samples 4"):
        calibration_tokens(torch.arange(99), 5, 20, 0)


def test_similarity_is_the_mean_cosine_of_the_streams_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tiny.checkpoint(tmp_path / "m")
    tokens = torch.randint(3, 300, (7, 30), generator=torch.Generator().manual_seed(0))
    found = measure(Checkpoint(path), tokens, Runner(Checkpoint(path), 30, "cpu", torch.float32))
    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        states = net(tokens, output_hidden_states=True).hidden_states[:-1]  # the last one is normed
    for i in range(5):
        for j in range(5):
            assert float(found.S[i, j]) == pytest.approx(float(torch.cosine_similarity(states[i], states[j], -1).mean()),
                                                         abs=1e-5)
    variance = torch.stack([state.var(-1, correction=0).mean() for state in states])
    assert_close(found.variance, variance.double(), rtol=1e-4, atol=1e-6)


def test_similarity_does_not_depend_on_how_the_text_is_cut(ckpt, monkeypatch):
    tokens = torch.randint(3, 300, (13, 16), generator=torch.Generator().manual_seed(0))
    source = Checkpoint(ckpt)
    whole = measure(source, tokens, Runner(source, 16, "cpu", torch.float32))
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", 20)
    small = measure(source, tokens, Runner(source, 16, "cpu", torch.float32))
    for name in ("similarity", "variance", "attention", "mlp"):
        assert_close(getattr(small, name), getattr(whole, name), atol=1e-6, rtol=1e-5)


def test_relative_norms_are_those_of_the_parts(ckpt):
    source, tokens = Checkpoint(ckpt), torch.arange(3, 33)[None]
    run = Runner(source, 30, "cpu", torch.float32)
    found = measure(source, tokens, run)
    net = load(ckpt)
    with torch.no_grad():
        x = net.model["embed_tokens"](tokens)
        for i, block in enumerate(net.model["layers"]):
            a = block.attend(x, run.rope)
            m = block.feed(x + a)
            assert float(found.attention[i]) == pytest.approx(float((a.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-4)
            assert float(found.mlp[i]) == pytest.approx(float((m.norm(dim=-1) / (x + a).norm(dim=-1)).mean()), rel=1e-4)
            x = x + a + m


def test_cosines_of_zero_and_equal_streams():
    x = torch.randn(3, 4, 8)
    sums = cosine_sums([x, 2 * x, -x, torch.zeros_like(x)])
    assert_close(sums[:3, :3] / 12, torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]]), atol=1e-5, rtol=0)
    assert (sums[3] == 0).all()


def test_cosine_sums_of_two_streams_written_out():
    a = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    b = torch.tensor([[[4.0, 3.0], [0.0, 2.0]]])
    assert_close(cosine_sums([a, b]), torch.tensor([[2.0, 0.96], [0.96, 2.0]]))


def test_statistics_are_sums_over_tokens(monkeypatch):
    cfg, xs = tiny.config(), tiny.stream(tiny.config(), n=6)
    run, weights = tiny.runner(cfg, 12), tiny.block(cfg, 0)
    block = Block(weights, cfg)
    gram, heads = run.mlp_gram(block, xs), run.head_sums(block, xs)
    assert_close(gram, run.mlp_gram(block, xs[:2]) + run.mlp_gram(block, xs[2:]))
    assert_close(heads, run.head_sums(block, xs[:1]) + run.head_sums(block, xs[1:]))
    with torch.no_grad():
        psi = block.mlp.channels(block.post_attention_layernorm(xs)).flatten(0, 1)
    assert_close(gram, psi.T @ psi)
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", 12)
    assert_close(run.mlp_gram(block, xs), gram)


def test_head_sums_are_of_absolute_values_for_normed_inputs():
    cfg, xs = tiny.config(num_key_value_heads=6, model_type="llama"), tiny.stream(tiny.config(), length=1)
    weights = tiny.block(cfg, 0)
    normed = xs / (xs.square().mean(-1, keepdim=True) + cfg.rms_norm_eps).sqrt() * weights["input_layernorm.weight"]
    expected = (normed @ weights["self_attn.v_proj.weight"].T).abs().sum((0, 1))  # one token: attention is the value
    assert_close(tiny.runner(cfg, 1).head_sums(Block(weights, cfg), xs), expected)


def test_sums_are_float32_when_the_model_is_not():
    cfg = tiny.config()
    weights = {name: t.bfloat16() for name, t in tiny.block(cfg, 0).items()}
    run = tiny.runner(cfg, 12, torch.bfloat16)
    block = run.block(weights)
    xs = tiny.stream(cfg).bfloat16()
    assert run.mlp_gram(block, xs).dtype == run.head_sums(block, xs).dtype == torch.float32
    many = xs.repeat(200, 1, 1)  # in bfloat16 a sum stops growing when its terms are 256 times smaller
    assert_close(run.head_sums(block, many), 200 * run.head_sums(block, xs), rtol=1e-3, atol=0)
    assert_close(run.mlp_gram(block, many), 200 * run.mlp_gram(block, xs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name, where", [("model.layers.3.mlp.up_proj.weight", "block 3"),
                                         ("model.norm.weight", "outside the blocks")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_with_the_place(tmp_path, name, where, value):
    from safetensors.torch import load_file, save_file
    path = tiny.checkpoint(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, path / "model.safetensors")
    source = Checkpoint(path)
    with pytest.raises(ValueError, match=where):
        measure(source, torch.arange(3, 23)[None], Runner(source, 20, "cpu", torch.float32))


def test_an_overflow_in_a_narrow_dtype_names_the_block(tmp_path):
    from safetensors.torch import load_file, save_file
    path = tiny.checkpoint(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e5
    save_file(tensors, path / "model.safetensors")
    source = Checkpoint(path)
    with pytest.raises(ValueError, match=r"block 2.*float32"):
        measure(source, torch.arange(3, 23)[None], Runner(source, 20, "cpu", torch.float16))


def test_embedding_refuses_ids_beyond_the_table(ckpt):
    with pytest.raises(ValueError, match="embeddings"):
        embed(Checkpoint(ckpt).outer(), torch.tensor([[1, 999]]), torch.float32)
