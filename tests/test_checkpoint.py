"""Whatever is wrong with a checkpoint folder is said in one line, before anything is computed."""

import io
import json
import os
import shutil

import pytest
import sentencepiece
import tiny
import torch
from safetensors.torch import load_file, save_file

from checkpoint.beside import tokenizer_config
from checkpoint.config import Config
from checkpoint.reader import Checkpoint
from checkpoint.writer import Writer
from demo.tour import BUNDLED
from model import load
from text.tokenizer import load_tokenizer


def shard(path):
    """Split a single-file checkpoint into two shards with an index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file(
            {name: tensors[name] for name in names if places[name] == file},
            path / file,
            {"format": "pt"},
        )
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    return places


def edit_config(path, **changes):
    raw = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "DELETE"}))


def edit_weights(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def refusal(path) -> str:
    with pytest.raises(ValueError) as caught:
        Checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shards_read_like_one_file(tmp_path):
    one, two = tiny.checkpoint(tmp_path / "a"), tiny.checkpoint(tmp_path / "b")
    shard(two)
    a, b = Checkpoint(one), Checkpoint(two)
    assert all(torch.equal(a.block(3)[name], b.block(3)[name]) for name in a.block(3))
    assert a.size() == b.size() == (a.config.parameters(), a.config.parameters() * 4)


def test_all_wrong_tensors_are_listed_in_one_error(ckpt):
    def change(t):
        del t["model.layers.1.mlp.up_proj.weight"], t["model.norm.weight"]
        t["model.layers.2.post_feedforward_layernorm.weight"] = torch.ones(32)
        t["model.layers.0.self_attn.q_proj.weight"] = torch.ones(48, 16)

    edit_weights(ckpt, change)
    message = refusal(ckpt)
    for part in (
        "2 tensors missing",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "1 tensors unexpected",
        "post_feedforward_layernorm",
        "q_proj.weight (48, 16) instead of (48, 32)",
    ):
        assert part in message


def test_of_many_wrong_tensors_the_first_few_are_named_and_all_are_counted(ckpt):
    edit_config(ckpt, num_hidden_layers=100)
    message = refusal(ckpt)
    assert (
        "1140 tensors missing: model.layers.10.input_layernorm.weight, " in message
        and len(message) < 500
    )


@pytest.mark.parametrize(
    "prefix, advice",
    [
        ("_orig_mod.", "save model._orig_mod with"),
        ("module.", "save model.module with"),
        ("base_model.model.", "save model.merge_and_unload() with"),
        ("encoder.", "save the model inside with"),
    ],
)
def test_a_foreign_prefix_is_named(ckpt, prefix, advice):
    edit_weights(ckpt, lambda t: [t.update({prefix + name: t.pop(name)}) for name in list(t)])
    message = refusal(ckpt)
    assert (
        f"its 63 tensors have '{prefix}' in front" in message
        and advice in message
        and len(message) < 500
    )


@pytest.mark.parametrize("tied, advice", [(True, "from_pretrained"), (False, "with its head")])
def test_the_base_of_a_model_without_its_prefix_is_refused_with_what_to_do(tmp_path, tied, advice):
    transformers = pytest.importorskip("transformers")
    path = tiny.checkpoint(tmp_path / "m", tie_word_embeddings=tied)
    transformers.AutoModel.from_pretrained(path).save_pretrained(tmp_path / "base")
    message = refusal(tmp_path / "base")
    assert 'lack the "model." in front' in message and advice in message and len(message) < 500


@pytest.mark.parametrize(
    "files",
    [["adapter_config.json", "adapter_model.safetensors"], ["config.json", "adapter_config.json"]],
)
def test_an_adapter_is_told_from_a_model(ckpt, files):
    for name in {"config.json", "model.safetensors"} - set(files):
        (ckpt / name).unlink()
    for name in files:
        (ckpt / name).touch()
    if "config.json" in files:
        (ckpt / "config.json").write_text(json.dumps(tiny.RAW))
    message = refusal(ckpt)
    assert "adapter" in message and "merge_and_unload" in message


def test_old_rope_buffers_and_copies_of_a_tied_head_are_harmless(tmp_path):
    path = tiny.checkpoint(tmp_path / "m", tie_word_embeddings=True)
    edit_weights(
        path,
        lambda t: t.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "lm_head.weight": t["model.embed_tokens.weight"].clone(),
            }
        ),
    )
    source = Checkpoint(path)
    assert "lm_head.weight" not in source.outer() and source.size()[0] == source.config.parameters()


def test_a_tied_model_that_kept_the_heads_name_is_read_and_written_in_the_usual_form(tmp_path):
    transformers = pytest.importorskip("transformers")
    usual = tiny.checkpoint(tmp_path / "usual", tie_word_embeddings=True)
    path = tiny.checkpoint(tmp_path / "m", tie_word_embeddings=True)
    edit_weights(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    source = Checkpoint(path)
    assert source.size() == Checkpoint(usual).size() and source.dtype == torch.float32
    assert torch.equal(
        source.outer()["model.embed_tokens.weight"],
        Checkpoint(usual).outer()["model.embed_tokens.weight"],
    )
    copy(source, tmp_path / "out")
    written, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", usual)
    )
    assert written.keys() == before.keys()
    net, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(net.lm_head.weight, before["model.embed_tokens.weight"])
    edit_config(path, tie_word_embeddings=False)
    assert "1 tensors missing: model.embed_tokens.weight" in refusal(path)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    path = tiny.checkpoint(tmp_path / "m", tie_word_embeddings=True)
    edit_weights(path, lambda t: t.update({"lm_head.weight": torch.ones(300, 32)}))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        Checkpoint(path).outer()


def test_missing_folder_config_and_weights(tmp_path, ckpt):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "not a folder" in refusal(ckpt / "config.json")
    (ckpt / "model.safetensors").rename(ckpt / "other")
    assert "not a checkpoint" in refusal(ckpt)
    (ckpt / "config.json").unlink()
    assert "no config.json" in refusal(ckpt)


def test_pickles_are_never_opened_and_the_error_says_how_to_convert(ckpt):
    (ckpt / "model.safetensors").unlink()
    (ckpt / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    message = refusal(ckpt)
    assert "never opened" in message and "save_pretrained" in message


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_truncated_files_are_refused(ckpt, keep):
    file = ckpt / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated or corrupt" in refusal(ckpt)


def test_a_corrupt_header_is_refused(ckpt):
    file = ckpt / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[:8] = (2**60).to_bytes(8, "little")
    file.write_bytes(data)
    assert "truncated or corrupt" in refusal(ckpt)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_a_git_lfs_pointer_is_named_with_the_command_that_fetches_the_file(ckpt, name):
    if name.startswith("model") and name != "model.safetensors":
        shard(ckpt)
    (ckpt / name).write_text(POINTER)
    message = refusal(ckpt)
    assert f"{name} is a git-lfs pointer" in message and "git lfs pull" in message


def test_a_missing_shard_is_named(ckpt):
    places = shard(ckpt)
    gone = sorted(set(places.values()))[1]
    (ckpt / gone).unlink()
    assert f"{gone} is missing" in refusal(ckpt)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x", "C:x"]
)
def test_an_index_may_not_leave_the_folder(ckpt, name):
    places = shard(ckpt)
    places["model.norm.weight"] = name
    (ckpt / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "outside the folder" in refusal(ckpt)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\xff"]
)
def test_a_broken_index_is_refused(ckpt, content):
    shard(ckpt)
    (ckpt / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    refusal(ckpt)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"attention_bias": True, "model_type": "llama"}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "gemma2"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"no_rope_layers": [1, 1, 1, 0, 1]}, "no_rope_layers"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"layer_types": ["chunked_attention"] * 5}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "softcapping"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"no_rope_layers": 5}, "no_rope_layers"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rope_type"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": None},
            "max_window_layers",
        ),
    ],
)
def test_unsupported_wiring_is_refused_with_the_name_of_its_field(ckpt, changes, field):
    edit_config(ckpt, **changes)
    assert field in refusal(ckpt)


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", "DELETE"),
        ("hidden_size", -1),
        ("hidden_size", "32"),
        ("hidden_size", 1e400),
        ("hidden_size", True),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 2 * 10**9),
        ("rms_norm_eps", 10**400),
        ("layer_types", [{}] * 5),
        ("num_hidden_layers", 2.5),
        ("vocab_size", 2**40),
        ("num_key_value_heads", 4),
        ("head_dim", 7),
        ("rms_norm_eps", 0),
        ("rope_theta", None),
        ("rope_scaling", [1]),
        ("tie_word_embeddings", "false"),
        ("max_position_embeddings", "512"),
    ],
)
def test_nonsense_in_config_is_refused_with_the_name_of_its_field(ckpt, field, value):
    if (field, value) == ("rope_theta", None):
        value = "fast"
    edit_config(ckpt, **{field: value})
    assert field in refusal(ckpt)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a":', b"\xff\xfe", b"[" * 100000])
def test_a_broken_config_is_refused(ckpt, content):
    (ckpt / "config.json").write_bytes(content)
    assert "config.json" in refusal(ckpt)


@pytest.mark.parametrize(
    "types", [None, ["sliding_attention", "full_attention"] * 2 + ["full_attention"]]
)
def test_a_sliding_window_of_llama_is_ignored_as_transformers_ignores_it(tmp_path, types):
    transformers = pytest.importorskip("transformers")
    path = tiny.checkpoint(
        tmp_path / "m",
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        num_attention_heads=4,
        sliding_window=8,
        layer_types=types,
    )
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(path)(ids).logits
        torch.testing.assert_close(load(path)(ids), expected, atol=1e-4, rtol=1e-4)


def test_sizes_are_checked_before_memory_is_taken(ckpt):
    edit_config(ckpt, hidden_size=2**30, num_hidden_layers=3)
    assert "of the wrong shape" in refusal(ckpt)


def test_an_unknown_storage_type_is_refused(ckpt):
    edit_weights(ckpt, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}))
    assert "F64" in refusal(ckpt)


def test_parameters_are_those_of_known_models():
    llama2 = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    }
    qwen25 = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    qwen3 = {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    sizes = [
        (Config.parse(raw).block_parameters(), Config.parse(raw).parameters())
        for raw in (llama2, qwen25, qwen3)
    ]
    assert sizes == [(202383360, 6738415616), (233057792, 7615616512), (192946432, 8190735360)]


# ---- writing


def copy(source: Checkpoint, out, overwrite=False, groups=None):
    with Writer(out, source, overwrite) as writer:
        groups = groups or [[i] for i in range(source.config.num_hidden_layers)]
        for group in groups:
            writer.add(source.block(group[0]))
        return writer.finish(groups, {})


def test_a_written_copy_is_bit_identical_and_leaves_nothing_beside_it(ckpt, tmp_path):
    (ckpt / "generation_config.json").write_text("{}")
    (ckpt / "evil.py").write_text("")
    out = tmp_path / "results" / "copy"
    copy(Checkpoint(ckpt), out)
    assert sorted(os.listdir(out.parent)) == ["copy"]
    assert (
        len({path.stat().st_mode for path in out.iterdir()}) == 1
    )  # the weights are as readable as the rest
    assert sorted(os.listdir(out)) == [
        "README.md",
        "config.json",
        "flatten.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    before, after = load_file(ckpt / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


def test_licenses_and_templates_are_copied_whatever_the_case_of_their_names(ckpt, tmp_path):
    copied = [
        "License.txt",
        "notice",
        "tekken.json",
        "Use_Policy.md",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    ]
    others = [
        "README.md",
        "tokenizer_fast.py",
        "modeling.py",
        "additional_chat_templates/x.py",
        "original/params.json",
    ]
    for name in copied + others:
        (ckpt / name).parent.mkdir(exist_ok=True)
        (ckpt / name).write_text(name)
    copy(Checkpoint(ckpt), tmp_path / "out")
    assert all((tmp_path / "out" / name).read_text() == name for name in copied)
    assert not any((tmp_path / "out" / name).exists() for name in others[1:])
    assert (tmp_path / "out" / "README.md").read_text() != "README.md"
    assert os.access(tmp_path / "out" / "additional_chat_templates", os.X_OK)


def test_a_result_names_no_code_and_no_folder_that_it_was_not_given(ckpt, tmp_path):
    transformers = pytest.importorskip("transformers")
    names = {
        "auto_map": {
            "AutoConfig": "configuration.Custom",
            "AutoModelForCausalLM": "modeling.Custom",
        },
        "_name_or_path": "/home/someone",
        "_model_name_or_path": "/home/someone",
    }
    edit_config(ckpt, **names)
    settings = {
        "auto_map": {"AutoTokenizer": ["tokenization.Custom", None]},
        "tokenizer_class": "LlamaTokenizer",
    }
    (ckpt / "tokenizer_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    copy(Checkpoint(ckpt), out)
    assert not names.keys() & json.loads((out / "config.json").read_text()).keys()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "LlamaTokenizer"
    }
    ids = torch.arange(3, 20)[None]
    net = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(net(ids).logits, load(out)(ids), atol=1e-4, rtol=1e-4)


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4}


def llama_kind(folder):
    """A folder with only a tokenizer.model like LLaMA-2's: spaces are kept, one is put in front."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.text().split("\n")),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tiny.checkpoint(folder, **LLAMA)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def real_llama2(folder):
    if not tiny.DATA.exists():
        pytest.skip("needs LLaMA-2's tokenizer.model")
    shutil.copy(
        tiny.DATA / "tokenizers" / "llama2" / "tokenizer.model", tiny.checkpoint(folder, **LLAMA)
    )
    return folder


def alpaca_kind(folder):
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    (llama_kind(folder) / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


@pytest.mark.parametrize("make", [lambda folder: BUNDLED, llama_kind, alpaca_kind, real_llama2])
def test_the_tokenizer_of_a_result_reads_alike_in_transformers(tmp_path, make):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")  # by which transformers reads tokenizer.model
    source = Checkpoint(make(tmp_path / "m"))
    copy(source, tmp_path / "out")
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
        load_tokenizer(tmp_path / "out"),
    )
    for text in (
        "kabe fonad",
        " one space",
        "   three",
        "\n a line\nand\n\nmore\n",
        "a</s>b",
        "<s> <unk> x",
        "<s>",
        "  <s>",
        "</s>\n",
        "é😀\t\x00",
        "▁a",
        "",
    ):
        assert theirs(text).input_ids == ours.encode(text), text
    assert ours.encode("a")[0] == load_tokenizer(source.path).encode("a")[0] == theirs.bos_token_id


@pytest.mark.parametrize("make", [lambda folder: tiny.checkpoint(folder), llama_kind, real_llama2])
def test_a_result_is_read_with_the_ids_of_its_source(tmp_path, make):
    """Also where sentencepiece normalizes in a way of its own, as the tiny model does."""
    source = Checkpoint(make(tmp_path / "m"))
    copy(source, tmp_path / "out")
    before, after = load_tokenizer(source.path), load_tokenizer(tmp_path / "out")
    for text in (
        "kabe fonad",
        " one space",
        "   three  and  more ",
        "\n a line\nand\n\nmore\n",
        "a</s>b  c",
        "é😀\t\x00",
    ):
        assert before.encode(text) == after.encode(text), text
        assert before.decode(before.encode(text)) == after.decode(after.encode(text))


def test_a_tokenizers_own_settings_are_left_as_they_are(ckpt, tmp_path):
    for name, given in (
        ("tokenizer_config.json", '{"add_bos_token":  false}'),
        ("tokenizer.json", '{"model": {}}'),
    ):
        (ckpt / name).write_text(given)
        copy(Checkpoint(ckpt), tmp_path / name)
        assert (tmp_path / name / name).read_text() == given
        (ckpt / name).unlink()
    assert not (tmp_path / "tokenizer.json" / "tokenizer_config.json").exists()


def test_the_bundled_checkpoint_describes_its_tokenizer_as_the_writer_would(tmp_path):
    given = json.loads((BUNDLED / "tokenizer_config.json").read_text())
    assert (
        given == tokenizer_config((BUNDLED / "tokenizer.model").read_bytes())
        and given["add_prefix_space"] is False
    )


def test_the_model_card_says_what_was_done_and_how_to_load_it(ckpt, tmp_path):
    yaml = pytest.importorskip("yaml")
    out, source = tmp_path / "out", Checkpoint(tiny.hub_cache(ckpt, tmp_path / "hub"))
    with Writer(out, source) as writer:
        for i in (0, 2, 4):
            writer.add(source.block(i))
        groups = [[0], [1, 2], [3, 4]]
        record = {
            "method": "joined",
            "ratio_asked": 0.25,
            "command": "python flatten.py --ckpt x",
            "groups": [{"blocks": blocks} for blocks in groups],
        }
        record = writer.finish(groups, record)
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/Tiny-1B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["flattengpt", "depth-compression"],
    }
    for part in (
        "# Tiny-1B with 3 blocks",
        "method: joined",
        f"{record['ratio_reached']:.4f}",
        "(asked: 0.25)",
        "one block in place of: 1+2, 3+4",
        "`python flatten.py --ckpt x`",
        'from_pretrained("this/folder")',
    ):
        assert part in card
    assert json.loads((out / "flatten.json").read_text())["base_model"] == "org/Tiny-1B"


def test_large_results_are_sharded_with_an_index(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.writer.SHARD", 30000)
    copy(Checkpoint(ckpt), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (
        len(set(index["weight_map"].values())) > 2
        and index["metadata"]["total_size"] == Checkpoint(ckpt).size()[1]
    )
    assert Checkpoint(tmp_path / "out").size() == Checkpoint(ckpt).size()


def test_lists_with_one_entry_a_block_are_cut(tmp_path):
    path = tiny.checkpoint(
        tmp_path / "m",
        layer_types=["full_attention"] * 5,
        max_window_layers=5,
        use_sliding_window=False,
    )
    copy(Checkpoint(path), tmp_path / "out", groups=[[0], [1, 2], [3, 4]])
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["num_hidden_layers"] == len(raw["layer_types"]) == raw["max_window_layers"] == 3
    changed = {k for k in raw if raw[k] != json.loads((path / "config.json").read_text()).get(k)}
    assert changed == {"num_hidden_layers", "layer_types", "max_window_layers"}


def test_an_error_in_the_middle_leaves_nothing(ckpt, tmp_path):
    source = Checkpoint(ckpt)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), Writer(tmp_path / "r" / "out", source) as writer:
            writer.add(source.block(0))
            raise error
    assert not (tmp_path / "r").exists()


def test_a_full_disk_is_noticed_at_the_start(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with (
        pytest.raises(ValueError, match="free"),
        Writer(tmp_path / "new" / "out", Checkpoint(ckpt)),
    ):
        pass
    assert not (tmp_path / "new").exists()


def test_existing_outputs_are_replaced_only_when_asked_and_only_our_own(ckpt, tmp_path):
    source, out = Checkpoint(ckpt), tmp_path / "out"
    copy(source, out)
    with pytest.raises(ValueError, match="--overwrite"):
        copy(source, out)
    (out / "mark").write_text("old")
    copy(source, out, overwrite=True)
    assert not (out / "mark").exists() and sorted(os.listdir(tmp_path)) == ["out", "tiny"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a result"):
        copy(source, tmp_path / "link", overwrite=True)
    (tmp_path / "link").unlink()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not a result"):
        copy(source, foreign, overwrite=True)
    assert (foreign / "thesis.tex").exists()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_if_replacing_fails_the_earlier_result_is_put_back(ckpt, tmp_path, monkeypatch, error):
    from pathlib import Path

    source, out = Checkpoint(ckpt), tmp_path / "r" / "out"
    copy(source, out)
    (out / "mark").write_text("old")
    rename = Path.rename

    def fail(self, target):
        if ".partial-" in self.name and self.is_dir():
            raise error("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error):
        copy(source, out, overwrite=True)
    assert (out / "mark").read_text() == "old" and os.listdir(out.parent) == ["out"]


def test_a_hub_caches_links_are_read_and_copied_as_the_files_they_lead_to(ckpt, tmp_path):
    shard(ckpt)
    source = Checkpoint(tiny.hub_cache(ckpt, tmp_path / "hub"))
    assert source.size()[0] == source.config.parameters()
    copy(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "hub")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tiny.tokenizer_model()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_checkpoint_is_named_after_its_folder_and_in_a_hub_cache_after_the_model(
    ckpt, tmp_path, monkeypatch
):
    monkeypatch.chdir(ckpt)
    assert (Checkpoint(".").name, Checkpoint(".").hub_id) == ("tiny", None)
    source = Checkpoint(tiny.hub_cache(ckpt, tmp_path / "hub"))
    assert (source.name, source.hub_id) == ("Tiny-1B", "org/Tiny-1B")
    shutil.copytree(source.path, tmp_path / "models--other--Name")
    assert Checkpoint(tmp_path / "models--other--Name").hub_id == "other/Name"


def test_output_and_input_may_not_overlap(ckpt, tmp_path):
    for out in (ckpt, ckpt / "sub", tmp_path, ckpt / ".." / "tiny"):
        with pytest.raises(ValueError, match="overlap"):
            copy(Checkpoint(ckpt), out, overwrite=True)
