"""Calibration: seeded windows, similarities in one pass, and statistics that are plain means."""
import pytest
import tiny
import torch
from torch.testing import assert_close

import calibrate
import model
from calibrate import (
    calibration_tokens,
    cosine_sums,
    mean_cosines,
    measure,
    mixed_tokens,
    spread,
)
from checkpoint.reader import Checkpoint
from model import Block, embed, load
from prune import channel_covariance, head_sizes


def random_tokens(n, length):
    return torch.randint(3, 300, (n, length), generator=torch.Generator().manual_seed(0))


def test_windows_are_seeded_and_come_from_the_text():
    ids = torch.arange(1000)
    a, again, b = (calibration_tokens(ids, 5, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert a.shape == (5, 20) and (a.diff(dim=1) == 1).all()
    last = calibration_tokens(torch.arange(20), 1, 20, 3)
    assert last.tolist() == [list(range(20))]


def test_a_text_shorter_than_asked_is_refused():
    with pytest.raises(ValueError, match=r"the calibration text has 99 .*\(4 windows fit"):
        calibration_tokens(torch.arange(99), 5, 20, 0)


def numbered(*lengths):
    """Return texts of these lengths; the ids of text i are 1000 * i, 1000 * i + 1, and so on."""
    return [1000 * i + torch.arange(length) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("seed", [0, 1])
def test_one_text_gives_the_windows_that_it_gives_alone_named_once_or_twice(seed):
    ids = torch.arange(1000)
    alone = calibration_tokens(ids, 7, 20, seed)
    assert torch.equal(mixed_tokens([ids], 7, 20, seed), alone)
    assert torch.equal(mixed_tokens([ids, ids.clone()], 7, 20, seed), alone)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_in_each_round_of_windows_every_text_has_a_turn(m):
    texts = numbered(*range(700, 700 + m))
    tokens, again, other = (mixed_tokens(texts, 8 * m, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(tokens, again) and tokens.shape == (8 * m, 20)
    assert (tokens.diff(dim=1) == 1).all()  # cut from one text, and in one piece
    turns = tokens[:, 0].view(8, m) // 1000
    assert (turns.sort(dim=1).values == torch.arange(m)).all()
    assert not torch.equal(turns, other[:, 0].view(8, m) // 1000)
    for i, ids in enumerate(texts):
        mine = tokens[tokens[:, 0] // 1000 == i]
        assert torch.equal(mine, calibration_tokens(ids, 8, 20, 0))


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("step", [2, 4, 8])
def test_every_second_fourth_or_eighth_window_is_not_always_of_one_text(m, step):
    tokens = mixed_tokens(numbered(*[900] * m), 128, 5, 0)
    assert set((tokens[::step, 0] // 1000).tolist()) == set(range(m))


def test_a_text_given_twice_gets_a_double_share_of_other_windows():
    a, b = numbered(900, 900)
    tokens = mixed_tokens([a, b, a], 12, 20, 0)
    turns = tokens[:, 0] // 1000
    assert (turns.view(4, 3).sum(dim=1) == 1).all()  # b once in three
    assert torch.equal(tokens[turns == 0], calibration_tokens(a, 8, 20, 0))


def test_of_several_texts_each_must_be_long_enough_for_its_share_and_have_one():
    long, short = numbered(900, 99)
    assert mixed_tokens([long, short], 8, 20, 0).shape == (8, 20)
    with pytest.raises(ValueError, match=r"text 2 of --data has 99 .* 5 windows .*\(4 win"):
        mixed_tokens([long, short], 10, 20, 0)
    with pytest.raises(ValueError, match=r"text 2 of --data has 99 .* 6 windows .*\(4 win"):
        mixed_tokens([long, short, short], 9, 20, 0)
    with pytest.raises(ValueError, match="--samples 1 is too few for 2 texts"):
        mixed_tokens([long, short], 1, 20, 0)


def test_similarity_is_the_mean_cosine_of_the_streams_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tiny.checkpoint(tmp_path / "m")
    tokens, source = random_tokens(7, 30), Checkpoint(path)
    measured = measure(source, tokens, tiny.runner(source.config, 30, torch.float32))
    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        states = net(tokens, output_hidden_states=True).hidden_states[:-1]  # the last one is normed
    for i in range(5):
        for j in range(5):
            expected = float(torch.cosine_similarity(states[i], states[j], -1).mean())
            assert float(measured.S[i, j]) == pytest.approx(expected, abs=1e-5)
    variance = torch.stack([state.var(-1, correction=0).mean() for state in states])
    assert_close(measured.variance, variance.double(), rtol=1e-4, atol=1e-6)


def test_similarity_does_not_depend_on_how_the_text_is_cut(ckpt, monkeypatch):
    tokens, source = random_tokens(13, 16), Checkpoint(ckpt)
    run = tiny.runner(source.config, 16, torch.float32)
    whole = measure(source, tokens, run)
    monkeypatch.setattr(model, "BATCH_TOKENS", 20)
    small = measure(source, tokens, run)
    for name in ("similarity", "variance", "attention", "mlp"):
        assert_close(getattr(small, name), getattr(whole, name), atol=1e-6, rtol=1e-5)


def test_of_a_long_text_evenly_spread_windows_are_measured(ckpt, monkeypatch):
    tokens, source = random_tokens(13, 16), Checkpoint(ckpt)
    run = tiny.runner(source.config, 16, torch.float32)
    monkeypatch.setattr(calibrate, "MEASURED", 5 * 16 + 15)
    assert calibrate.windows_measured(13, 16) == 5 and calibrate.windows_measured(3, 16) == 3
    assert calibrate.windows_measured(13, 1000) == 1
    assert_close(measure(source, tokens, run).S, measure(source, tokens[[0, 2, 5, 7, 10]], run).S)
    assert float((measure(source, tokens[:5], run).S - measure(source, tokens, run).S).abs().max())


def test_every_token_of_a_short_text_is_in_the_sample():
    for tokens in (1, 5, calibrate.SAMPLE):
        tiny.expect(f"the sample of {tokens} tokens", torch.arange(tokens), spread(tokens))


@pytest.mark.parametrize("size, tokens", [(4, 12), (4, 10), (2048, 8 * 2048), (2048, 5000)])
def test_each_stretch_of_the_text_gives_one_token_of_the_sample(monkeypatch, size, tokens):
    monkeypatch.setattr(calibrate, "SAMPLE", size)
    places = spread(tokens)
    assert len(places) == size, f"tokens in the sample\nexpected: {size}\ncame:     {len(places)}"
    starts = torch.arange(size) * tokens / size  # whole numbers only if `size` divides `tokens`
    stops = starts + tokens / size
    inside = (places > starts - 1) & (places < stops)
    assert inside.all(), (f"a sample of {size} of {tokens} tokens\nexpected: one each from the "
                          f"stretches that start at {tiny.shown(starts)}\n"
                          f"came:     {tiny.shown(places)}")


def test_a_sample_is_the_same_each_time_and_meets_any_position_of_a_window():
    n, length = calibrate.SAMPLE, 256
    places = spread(8 * n)
    tiny.expect("the same sample, drawn again", places, spread(8 * n))
    most = int((places % length).bincount(minlength=length).max())
    assert most < n / 64, ("tokens at one position of their windows of 256, at most\n"
                           f"expected: fewer than {n // 64}\ncame:     {most}")


def test_the_sample_is_cut_into_pieces_of_neighbours():
    pieces, sample = calibrate.pieces_of(64, 256), spread(64 * 256)
    assert torch.equal((pieces.flatten() >= 0).nonzero().flatten(), sample)
    assert torch.equal(pieces[pieces >= 0], torch.arange(32).repeat_interleave(64))


def test_distant_streams_are_compared_on_the_sample_and_neighbours_on_all_tokens(ckpt, monkeypatch):
    tokens, source = random_tokens(13, 16), Checkpoint(ckpt)
    run, net = tiny.runner(source.config, 16, torch.float32), load(ckpt)
    streams = [net.model["embed_tokens"](tokens)]
    with torch.no_grad():
        for block in net.model["layers"]:
            streams.append(block(streams[-1], run.rope))
    whole = measure(source, tokens, run)
    monkeypatch.setattr(calibrate, "SAMPLE", 50)
    part = measure(source, tokens, run)
    sampled = cosine_sums([x.flatten(0, 1)[spread(13 * 16)] for x in streams]).double() / 50
    for i in range(6):
        for j in range(6):
            expected = whole.similarity if abs(i - j) == 1 else sampled
            assert float(part.similarity[i, j]) == pytest.approx(float(expected[i, j]), abs=1e-6)
    assert float((sampled - whole.similarity).abs().max()) > 1e-3
    for name in ("variance", "attention", "mlp"):
        assert_close(getattr(part, name), getattr(whole, name), atol=1e-6, rtol=1e-5)


def test_the_error_of_a_cosine_is_that_of_a_mean_over_pieces(monkeypatch):
    """Two pieces of two tokens, with cosines 1 and 0: their mean is 0.5 with an error of 0.5."""
    monkeypatch.setattr(calibrate, "PIECES", 2)
    x = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    y = torch.tensor([[2.0, 0], [0, 3], [0, 1], [1, 0]])
    mean, error = mean_cosines([x, y], torch.tensor([0, 0, 1, 1]), torch.device("cpu"))
    assert_close(mean, torch.tensor([[1, 0.5], [0.5, 1]]).double())
    assert_close(error, torch.tensor([[0, 0.5], [0.5, 0]]).double())


def test_relative_norms_are_those_of_the_parts(ckpt):
    source, tokens = Checkpoint(ckpt), torch.arange(3, 33)[None]
    run = tiny.runner(source.config, 30, torch.float32)
    measured = measure(source, tokens, run)
    net = load(ckpt)

    def ratio(part, stream):
        return pytest.approx(float((part.norm(dim=-1) / stream.norm(dim=-1)).mean()), rel=1e-4)
    with torch.no_grad():
        x = net.model["embed_tokens"](tokens)
        for i, block in enumerate(net.model["layers"]):
            a = block.attend(x, run.rope)
            m = block.feed(x + a)
            assert float(measured.attention[i]) == ratio(a, x)
            assert float(measured.mlp[i]) == ratio(m, x + a)
            x = x + a + m


def test_cosines_of_zero_and_equal_streams():
    x = torch.randn(3, 4, 8)
    sums = cosine_sums([x, 2 * x, -x, torch.zeros_like(x)])
    expected = torch.tensor([[12.0, 12, -12, 0], [12, 12, -12, 0], [-12, -12, 12, 0], [0, 0, 0, 0]])
    tiny.expect("12 tokens x; the streams x, 2x, -x and 0", expected, sums, atol=1e-4, rtol=0)


def test_cosine_sums_of_two_streams_written_out():
    a = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    b = torch.tensor([[[4.0, 3.0], [0.0, 2.0]]])
    tiny.expect(f"streams of two tokens, {a.tolist()} and {b.tolist()}",
                torch.tensor([[2.0, 0.96], [0.96, 2.0]]), cosine_sums([a, b]))


@pytest.mark.parametrize("batch_tokens", [12, 2048])
def test_channel_covariance_is_a_mean_of_products_in_any_batches(monkeypatch, batch_tokens):
    cfg, xs = tiny.config(), tiny.stream(tiny.config(), n=6)
    run, block = tiny.runner(cfg, 12), Block(tiny.block(cfg, 0), cfg)
    monkeypatch.setattr(model, "BATCH_TOKENS", batch_tokens)
    with torch.no_grad():
        psi = block.mlp.channels(block.post_attention_layernorm(xs)).flatten(0, 1)
    assert_close(channel_covariance(block, xs, run), psi.T @ psi / len(psi))


@pytest.mark.parametrize("batch_tokens", [12, 2048])
def test_head_sizes_are_means_of_absolute_values_in_any_batches(monkeypatch, batch_tokens):
    cfg, xs = tiny.config(), tiny.stream(tiny.config(), n=6)
    run, block = tiny.runner(cfg, 12), Block(tiny.block(cfg, 0), cfg)
    monkeypatch.setattr(model, "BATCH_TOKENS", batch_tokens)
    with torch.no_grad():
        written = block.self_attn.heads(block.input_layernorm(xs), run.rope)
    assert_close(head_sizes(block, xs, run), written.abs().mean((0, 1)))


def test_head_sizes_of_one_token_are_those_of_its_values():
    """Attention to a single token hands on its value, and heads read normed inputs."""
    cfg = tiny.config(num_key_value_heads=6, model_type="llama")
    xs, weights = tiny.stream(cfg, length=1), tiny.block(cfg, 0)
    rms = (xs.square().mean(-1, keepdim=True) + cfg.rms_norm_eps).sqrt()
    normed = xs / rms * weights["input_layernorm.weight"]
    expected = (normed @ weights["self_attn.v_proj.weight"].T).abs().mean((0, 1))
    assert_close(head_sizes(Block(weights, cfg), xs, tiny.runner(cfg, 1)), expected)


def test_sums_are_float32_when_the_model_is_not():
    """In bfloat16 a sum would stop growing when its terms are 256 times smaller."""
    cfg = tiny.config()
    weights = {name: t.bfloat16() for name, t in tiny.block(cfg, 0).items()}
    run = tiny.runner(cfg, 12, torch.bfloat16)
    block = run.block(weights)
    xs = tiny.stream(cfg).bfloat16()
    C, sizes = channel_covariance(block, xs, run), head_sizes(block, xs, run)
    assert C.dtype == sizes.dtype == torch.float32
    many = xs.repeat(200, 1, 1)
    assert_close(head_sizes(block, many, run), sizes, rtol=1e-3, atol=0)
    assert_close(channel_covariance(block, many, run), C, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name, where", [("model.layers.3.mlp.up_proj.weight", "block 3"),
                                         ("model.norm.weight", "outside the blocks")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_with_the_place(ckpt, name, where, value):
    def spoil(tensors):
        tensors[name].view(-1)[5] = value
    tiny.change_tensors(ckpt, spoil)
    source = Checkpoint(ckpt)
    with pytest.raises(ValueError, match=where):
        measure(source, torch.arange(3, 23)[None], tiny.runner(source.config, 20, torch.float32))


def test_an_overflow_in_a_narrow_dtype_names_the_block(ckpt):
    def enlarge(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"] *= 1e5
    tiny.change_tensors(ckpt, enlarge)
    source = Checkpoint(ckpt)
    with pytest.raises(ValueError, match=r"block 2.*float32"):
        measure(source, torch.arange(3, 23)[None], tiny.runner(source.config, 20, torch.float16))


def test_embedding_refuses_ids_beyond_the_table(ckpt):
    with pytest.raises(ValueError, match="embeddings"):
        embed(Checkpoint(ckpt).outer(), torch.tensor([[1, 999]]), torch.float32)
