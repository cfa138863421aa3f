"""Ids equal those of the reference implementations, for every form of vocabulary."""

import base64
import functools
import io
import json
import random
import shutil
import unicodedata

import pytest
import sentencepiece
import tiny

from text.tokenizer import load_tokenizer, merge_ranks, split_pattern
from text.wikitext import evaluation_text

tokenizers = pytest.importorskip("tokenizers")
REAL = tiny.DATA / "tokenizers"
real = pytest.mark.skipif(not REAL.exists(), reason="needs the real vocabularies")
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def random_texts(n: int, seed: int = 0, specials=()) -> list[str]:
    """Words, spaces, digits, contractions, scripts, emoji, controls and marks, in no order."""
    rng = random.Random(seed)
    assigned = [
        c for c in map(chr, range(1, 0x1FAFF)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")
    ]
    common = [
        *" \n\t'.,!?-_()<>|#0123456789",
        "  ",
        "    ",
        "\r\n",
        "don't",
        "WE'LL",
        "hello",
        " World",
        "über",
        "é",
        "e\u0301",
        "日本語",
        "привет",
        "123456",
        "🙂",
        "👩\u200d💻",
        "\u0338",
        *specials,
    ]
    return [
        "".join(
            rng.choice(common if rng.random() < 0.7 else assigned)
            for _ in range(rng.randint(1, 60))
        )
        for _ in range(n)
    ]


def qwen_json(folder) -> "tokenizers.Tokenizer":
    """The reference byte-level BPE over Qwen's vocabulary, as in its tokenizer.json."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    merges = [
        tuple(line.split(" "))
        for line in (folder / "merges.txt").read_text().split("\n")[1:]
        if line.strip()
    ]
    t = Tokenizer(models.BPE(json.loads((folder / "vocab.json").read_text()), merges))
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_REGEX.replace("{1,3}", "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ]
    )
    return t


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen_json")
    reference = qwen_json(REAL / "qwen2")
    reference.save(str(folder / "tokenizer.json"))
    shutil.copy(REAL / "qwen2" / "tokenizer_config.json", folder)
    return folder, reference


@real
@pytest.mark.skipif(not (tiny.DATA / "wikitext-2-raw").exists(), reason="needs WikiText-2")
@pytest.mark.parametrize(
    "name, count, bos",
    [
        ("llama2", 341469, 1),
        ("llama3", 289077, 128000),
        ("qwen2", 299078, None),
        ("qwen1", 299078, None),
        ("mistral", 334661, 1),
    ],
)
def test_the_joined_test_split_has_the_known_number_of_ids(name, count, bos):
    tokenizer = load_tokenizer(REAL / name)
    text, label = evaluation_text(str(tiny.DATA / "wikitext-2-raw"))
    ids = tokenizer.encode(text)
    assert (len(ids), label) == (count, "WikiText-2 test")
    assert (
        tokenizer.bos_id == bos
        and tokenizer.add_bos == (bos is not None)
        and (bos is None or ids[0] == bos)
    )


@real
def test_a_tokenizer_json_counts_like_vocab_and_merges(qwen):
    text, _ = evaluation_text(str(tiny.DATA / "wikitext-2-raw"))
    ids = load_tokenizer(qwen[0]).encode(text)
    assert len(ids) == 299078 and ids == load_tokenizer(REAL / "qwen2").encode(text)


@real
def test_byte_level_ids_equal_the_reference_on_random_unicode(qwen):
    folder, reference = qwen
    ours = [load_tokenizer(folder), load_tokenizer(REAL / "qwen2")]
    for text in random_texts(1500, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|")):
        expected = reference.encode(text).ids
        for tokenizer in ours:
            assert tokenizer.encode(text) == expected, repr(text)
            assert tokenizer.decode(expected) == reference.decode(expected), repr(text)


@real
def test_qwen1_ranks_are_qwen2_merges():
    one, two = load_tokenizer(REAL / "qwen1"), load_tokenizer(REAL / "qwen2")
    for text in random_texts(300, seed=1, specials=("<|endoftext|>", "<|im_start|>")):
        assert one.encode(text) == two.encode(text)


@real
def test_llama3_ranks_and_a_tokenizer_json_of_them_agree(tmp_path):
    """Meta's list of ranks against the same vocabulary in hub form, run by the reference."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

    from text.tokenizer import byte_alphabet

    lines = (REAL / "llama3" / "tokenizer.model").read_bytes().splitlines()
    letter = {byte: char for char, byte in byte_alphabet().items()}
    tokens = ["".join(letter[b] for b in base64.b64decode(line.split()[0])) for line in lines]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (token[:k], token[k:])
        for token in tokens
        for k in range(1, len(token))
        if token[:k] in vocab and token[k:] in vocab
    ]
    reference = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ours = load_tokenizer(REAL / "llama3")
    assert len(ours.added) == 256 and ours.vocab_size == 128256
    by_id = sorted(ours.added, key=lambda name: ours.added[name].id)
    reference.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in by_id]
    )
    reference.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
            ),
        ]
    )
    reference.save(str(tmp_path / "tokenizer.json"))
    from_json = load_tokenizer(tmp_path)
    assert (from_json.bos_id, from_json.add_bos, from_json.vocab_size) == (128000, True, 128256)
    for text in random_texts(
        500, seed=2, specials=("<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_7|>")
    ):
        assert ours.encode(text) == from_json.encode(text) == reference.encode(text).ids, repr(text)


@real
@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_sentencepiece_ids_equal_sentencepiece(name):
    ours = load_tokenizer(REAL / name)
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(REAL / name / "tokenizer.model")
    )
    for text in random_texts(500, seed=3):
        ids = reference.encode(text.removeprefix(" "))  # a first space of its own is enough
        assert ours.encode(text) == [1, *ids], repr(text)
        assert ours.decode([1, *ids, 2]) == reference.decode(ids)


@real
def test_added_tokens_of_a_sentencepiece_checkpoint_are_cut_out_first(tmp_path):
    shutil.copy(REAL / "llama2" / "tokenizer.model", tmp_path)
    config = {
        "add_bos_token": False,
        "bos_token": {"content": "<s>"},
        "added_tokens_decoder": {
            "1": {"content": "<s>"},
            "2": {"content": "</s>"},
            "32010": {"content": "<|im_start|>", "special": True},
            "32001": {"content": "<think>", "special": False, "normalized": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert ours.encode("<|im_start|>user</s>hi") == [
        32010,
        1792,
        2,
        2918,
    ]  # no space in front of the two
    assert ours.vocab_size == 32011
    assert ours.decode([32010, 1404, 32005, 32001, 15043, -1, 32011]) == "user<think> Hello"


def small_bpe(tmp_path, pre, **settings):
    """A byte-level BPE trained on the spot by the reference, saved as tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator([tiny.text(), "don't 123 4567 WE'LL   go  \n\n é日本 12.5"] * 3, trainer)
    t.add_special_tokens([AddedToken("<|late|>", normalized=False)])
    t.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return t


def gpt2_pre():
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False)


def smollm_pre():
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


@pytest.mark.parametrize("pre", [gpt2_pre, smollm_pre])
def test_gpt2_and_smollm_vocabularies_equal_the_reference(tmp_path, pre):
    reference, ours = (
        small_bpe(tmp_path, pre(), bos_token="<|endoftext|>"),
        load_tokenizer(tmp_path),
    )
    assert (ours.bos_id, ours.add_bos) == (0, False)
    for text in random_texts(
        1500, seed=4, specials=("<|endoftext|>", "<|late|>", "<|pad|>", "   7", "a  b")
    ):
        assert ours.encode(text) == reference.encode(text).ids, repr(text)
        assert ours.decode(ours.encode(text)) == reference.decode(reference.encode(text).ids)


def test_merges_out_of_order_are_refused(tmp_path):
    small_bpe(tmp_path, gpt2_pre())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="order"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["model"].update(type="Unigram"), "Unigram"),
        (lambda d: d["model"].update(byte_fallback=True), "tokenizer.model"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda d: d["model"]["vocab"].pop("a"), "vocabulary|bytes"),
        (lambda d: d["model"]["vocab"].update(a=d["model"]["vocab"]["b"]), "different"),
        (lambda d: d.update(model=5), "malformed"),
        (lambda d: d.update(pre_tokenizer=[1]), "malformed"),
        (lambda d: d.update(post_processor="x"), "malformed"),
        (lambda d: d.update(added_tokens=5), "malformed"),
        (lambda d: d.update(added_tokens=[{"content": "", "id": 1}]), "added tokens"),
        (lambda d: d.update(added_tokens=[{"content": "a", "id": 10**30}]), "added tokens"),
        (lambda d: d["model"].update(merges=None), "malformed"),
        (lambda d: d["model"].update(merges=5), "malformed"),
    ],
)
def test_unsupported_tokenizers_are_refused_by_what_they_are(tmp_path, change, message):
    small_bpe(tmp_path, gpt2_pre())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\n\x00garbage", b"aGk= 0\n", b"aGk= x\n", b"\xff\xff"]
)
def test_broken_vocabulary_files_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_folder_without_vocabulary_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.model.*merges\.txt"):
        load_tokenizer(tmp_path)


def test_helpers_name_the_file_in_their_errors():
    with pytest.raises(ValueError, match="here"):
        merge_ranks("here", {"a": 0}, [["a", "b"]], {})
    with pytest.raises(ValueError, match="here"):
        split_pattern("here", None)


def test_sentencepiece_alone_adds_bos(ckpt):
    tokenizer = load_tokenizer(ckpt)
    assert tokenizer.encode("abc")[0] == tokenizer.bos_id == 1
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"


def added(content, **flags):
    return {
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
        "special": True,
    } | flags


@functools.cache
def small_model(**settings) -> bytes:
    """A sentencepiece model in LLaMA's manner, trained on the spot."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.text().split("\n")),
        model_writer=model,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


FLAGGED = {
    "0": added("<unk>"),
    "1": added("<s>"),
    "2": added("</s>"),
    "360": added("<user>", rstrip=True),
    "361": added("<one>", single_word=True, special=False),
    "362": added("<n>", normalized=True, special=False),
    "363": added("<think>", special=False),
    "364": added("<left>", lstrip=True),
}
TEXTS = [
    "",
    "Hello",
    " Hello",
    "▁x",
    "<s>Hi",
    "a</s>b",
    "</s> x",
    "I love you.</s>",
    "<unk>?",
    "<user>\nHi there",
    "x <user> \n Hi<user>Hi <left>",
    "in 2019 the",
    "<user><user>",
    "word<one>word <one> x_<one>",
    "a <n> b a<n>b",
    "<think>a</think>",
    " <s> Hi",
    "é 🙂\x00\t",
]
BOS_FIRST = {
    "type": "TemplateProcessing",
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
}


def oracle(folder, config, model_type="llama", **files):
    """What transformers makes of a folder, after the files are written into it."""
    transformers = pytest.importorskip("transformers")
    for name, content in {
        "config": {"model_type": model_type},
        "tokenizer_config": config,
        **files,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return transformers.AutoTokenizer.from_pretrained(folder)


def check_like(reference, ours, texts):
    for text in texts:
        ids = reference(text)["input_ids"]
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True), repr(text)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"special_tokens_map": {"bos_token": "</s>", "eos_token": added("</s>")}},
        {"added_tokens": {"<think>": 360, "[PAD]": 361}},
    ],
)
@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True},
        {"add_bos_token": True, "legacy": True},
        {"legacy": None, "pad_token": "[PAD]"},
        {"add_bos_token": True, "legacy": False, "added_tokens_decoder": FLAGGED},
        {"add_prefix_space": False},
        {"add_bos_token": False, "legacy": True, "added_tokens_decoder": FLAGGED},
    ],
)
def test_a_tokenizer_model_with_settings_is_read_as_transformers_does(tmp_path, config, files):
    pytest.importorskip("google.protobuf")
    (tmp_path / "tokenizer.model").write_bytes(small_model())
    reference = oracle(
        tmp_path, {"tokenizer_class": "LlamaTokenizer", "pad_token": "</s>"} | config, **files
    )
    check_like(reference, load_tokenizer(tmp_path), [*TEXTS, *random_texts(30, seed=10)])


def resaved(folder, content: bytes) -> dict:
    """The tokenizer.json that transformers 5 writes for a tokenizer.model."""
    pytest.importorskip("google.protobuf")
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer.model").write_bytes(content)
    transformers.LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": BOS_FIRST}


@pytest.fixture(scope="module")
def small_json(tmp_path_factory):
    return resaved(tmp_path_factory.mktemp("small_json"), small_model())


@pytest.fixture(scope="module")
def llama_json(tmp_path_factory):
    return resaved(
        tmp_path_factory.mktemp("llama_json"), (REAL / "llama2" / "tokenizer.model").read_bytes()
    )


PREPEND = (
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
)


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "bos_token": "</s>",
            "legacy": True,
        },
        {
            "tokenizer_class": "TokenizersBackend",
            "added_tokens_decoder": {"2": added("</s>", lstrip=True)},
        },
    ],
)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"added_tokens": [{"id": int(i)} | token for i, token in FLAGGED.items()]},
        {"post_processor": None},
        {
            "pre_tokenizer": None,
            "normalizer": {"type": "Sequence", "normalizers": PREPEND},
            "added_tokens": [{"id": int(i)} | token for i, token in FLAGGED.items()],
        },
        {
            "pre_tokenizer": None,
            "normalizer": PREPEND[1],
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
        },
    ],
)
def test_a_tokenizer_json_with_byte_fallback_is_read_as_transformers_does(
    tmp_path, small_json, change, config
):
    reference = oracle(tmp_path, config, tokenizer=small_json | change)
    check_like(reference, load_tokenizer(tmp_path), [*TEXTS, *random_texts(30, seed=11)])


def test_a_wide_checkpoint_is_read_as_the_family_it_was_made_of(tmp_path, small_json):
    prepend = {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": PREPEND}}
    llama = oracle(tmp_path, {"tokenizer_class": "LlamaTokenizer"}, tokenizer=small_json | prepend)
    mistral = oracle(tmp_path, {"tokenizer_class": "LlamaTokenizer"}, "mistral")
    assert llama(" abc")["input_ids"] != mistral(" abc")["input_ids"]
    check_like(mistral, load_tokenizer(tmp_path), TEXTS)
    wide = {"model_type": "flattened_wide", "base_model_type": "mistral"}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    check_like(mistral, load_tokenizer(tmp_path), TEXTS)


@real
def test_byte_fallback_ids_equal_tokenizers_on_real_text(tmp_path, llama_json):
    (tmp_path / "tokenizer.json").write_text(json.dumps(llama_json))
    reference, ours = (
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        load_tokenizer(tmp_path),
    )
    c4 = tiny.DATA / "text" / "c4_demo.jsonl"
    texts = (
        [json.loads(line)["text"] for line in c4.read_text().splitlines()[:100]]
        if c4.exists()
        else []
    )
    wiki, _ = evaluation_text(str(tiny.DATA / "wikitext-2-raw"))
    spaces = [" " * n + "x" + " " * n for n in range(2, 60)]
    for text in [
        *texts,
        *spaces,
        wiki[:300_000],
        *random_texts(500, seed=5, specials=("<s>", "</s>", "<unk>")),
    ]:
        assert ours.encode(text) == reference.encode(text).ids, repr(text[:200])


def scatter(merges):
    """Put the second of two ways to make a piece before all others."""
    second = next(k for k in range(1, len(merges)) if "".join(merges[k]) == "".join(merges[k - 1]))
    merges.insert(0, merges.pop(second))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["model"]["merges"].pop(5), "tokenizer.model"),
        (lambda d: d["model"]["vocab"].pop("<0x41>"), "0 to"),
        (lambda d: scatter(d["model"]["merges"]), "stand together"),
        (lambda d: d["model"]["vocab"].update(x=-1), "0 to"),
        (lambda d: d["pre_tokenizer"].update(split=True), "Metaspace"),
        (lambda d: d["model"].update(vocab=[1]), "malformed"),
        (lambda d: d["model"].update(merges=[3]), "malformed"),
    ],
)
def test_other_merges_than_a_sentencepiece_model_has_are_refused(
    tmp_path, small_json, change, message
):
    data = json.loads(json.dumps(small_json))
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_pieces_of_the_model_that_are_also_added_get_no_space(tmp_path):
    folder, content = tmp_path, small_model(user_defined_symbols="0,1,2,3,4,5,6,7,8,9")
    (folder / "tokenizer.model").write_bytes(content)
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    digits = {str(reference.piece_to_id(d)): added(d, special=False) for d in "0123456789"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": False,
        "added_tokens_decoder": digits,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(folder)
    for text in ("in 2019 the", "2019", "abc12 3", "a  7"):
        assert (
            ours.encode(text) == reference.encode(text)
            and ours.decode(reference.encode(text)) == text
        )


@pytest.mark.skipif(not REAL.exists(), reason="needs the real vocabularies")
def test_a_bare_tokenizer_model_knows_its_own_special_tokens():
    ours = load_tokenizer(REAL / "llama2")
    assert ours.encode("I love you.</s>") == [1, 306, 5360, 366, 29889, 2]
    assert ours.decode([1, 306, 5360, 366, 29889, 2]) == "I love you."


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken", "tokenizer.json"])
def test_a_pointer_of_git_lfs_instead_of_a_vocabulary_is_named(tmp_path, name):
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
        load_tokenizer(tmp_path)


def edited(tmp_path, change, **settings):
    """Change a small tokenizer.json. Returns the reference for the folder and for the file."""
    small_bpe(tmp_path, gpt2_pre())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    auto = oracle(tmp_path, settings, tokenizer=data)
    return auto, tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def with_flags(data):
    top = max(token["id"] for token in data["added_tokens"]) + 1
    extra = [
        added("<user>", rstrip=True),
        added("<one>", single_word=True, special=False),
        added("lead", lstrip=True),
        added("<n\u00e9>", normalized=True),
        added("<think>", special=False),
    ]
    data["added_tokens"] += [{"id": top + k} | token for k, token in enumerate(extra)]
    data["added_tokens"].append({"id": data["model"]["vocab"]["7"]} | added("7", special=False))


def with_template(data):
    pad = {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}}
    data["post_processor"] = json.loads(json.dumps(BOS_FIRST).replace("<s>", "<|pad|>")) | {
        "special_tokens": pad
    }


@pytest.mark.parametrize(
    "change, settings",
    [
        (with_flags, {}),
        (
            lambda d: (
                with_flags(d),
                d.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
            ),
            {},
        ),
        (lambda d: d.update(normalizer={"type": "Sequence", "normalizers": []}), {}),
        (with_template, {"bos_token": "<|endoftext|>"}),
        (with_template, {"add_bos_token": False}),
        (lambda d: None, {"add_bos_token": True, "bos_token": "<|pad|>"}),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), {"add_prefix_space": False}),
        (
            lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
            {"tokenizer_class": "GPT2Tokenizer"},
        ),
        (lambda d: None, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    ],
)
def test_byte_level_folders_are_read_as_transformers_does(tmp_path, change, settings):
    auto, raw = edited(
        tmp_path, change, **{"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    )
    ours, names = (
        load_tokenizer(tmp_path),
        ("<|pad|>", "<|late|>", "<one>", "<user>", "lead", "<think>", "7", "ne\u0301>"),
    )
    texts = [*TEXTS, "<n\u00e9> e\u0301<ne\u0301>", *random_texts(80, seed=6, specials=names)]
    check_like(auto, ours, [text for text in texts if "<n" not in text])
    for text in texts:
        assert auto(text)["input_ids"] == ours.encode(text), repr(text)
    if "GPT2Tokenizer" not in settings.values():
        assert all(raw.encode(text).ids == ours.encode(text) for text in texts)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "bos_token": "<|pad|>"},
        {"added_tokens_decoder": {"1": added("<|pad|>", lstrip=True)}},
    ],
)
def test_vocab_and_merges_are_read_as_transformers_does(tmp_path, kind, settings):
    small_bpe(tmp_path, gpt2_pre())
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n"
    )
    reference = oracle(tmp_path, {"tokenizer_class": kind} | settings, vocab=model["vocab"])
    check_like(
        reference,
        load_tokenizer(tmp_path),
        random_texts(60, seed=7, specials=("<|pad|>", "<|endoftext|>")),
    )


@pytest.mark.parametrize("pre", [gpt2_pre, smollm_pre])
def test_bytes_without_a_token_vanish(tmp_path, pre):
    from tokenizers import Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    from text.tokenizer import byte_alphabet

    missing = {4, 6, 0xC3, 0xF0, *range(0xF5, 0x100)}
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer, reference.decoder = pre(), decoders.ByteLevel()
    reference.train_from_iterator(
        [tiny.text(), "don't 123 4567 12.5" + " a-- -- ... ''" * 500] * 3,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=[
                char for char in ByteLevel.alphabet() if byte_alphabet()[char] not in missing
            ],
        ),
    )
    reference.save(str(tmp_path / "tokenizer.json"))
    ours, seen = load_tokenizer(tmp_path), 0
    signs, rng = (
        ["\x04", "\x06", "\x1c", "-", "'", "s", " ", "a", "1", "_", "\n", ".", "é"],
        random.Random(9),
    )
    close = [
        "".join(rng.choices(signs, k=rng.randint(2, 9))) for _ in range(3000)
    ]  # signs next to lost bytes
    for text in [
        *close,
        *random_texts(1500, seed=8, specials=("<|endoftext|>", "a\x04b", "cé\x06d")),
    ]:
        ids = ours.encode(text)
        assert ids == reference.encode(text).ids, repr(text)
        assert ours.decode(ids) == reference.decode(ids)
        seen += any(byte in missing for byte in text.encode())
    assert seen > 500 and len(ours.encode("a\x04b")) == 2 and len(ours.encode("-\x04-")) == 1


def test_ids_in_gaps_are_left_out(tmp_path):
    edited(tmp_path, lambda d: d["added_tokens"].append({"id": 900} | added("<far>")))
    ours = load_tokenizer(tmp_path)
    assert (
        ours.vocab_size == 901
        and ours.decode([*ours.encode("a b"), 700, 899, 900, 5000, -3]) == "a b"
    )


def test_a_million_spaces_in_one_run_give_one_line(tmp_path):
    small_bpe(tmp_path, gpt2_pre())
    with pytest.raises(ValueError, match="run of more than"):
        load_tokenizer(tmp_path).encode("a" + " " * 1_200_000 + "b")


def test_a_bpe_over_letters_says_what_it_is(tmp_path):
    small_bpe(tmp_path, gpt2_pre())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["vocab"]["日"] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"letters as they are.*日"):
        load_tokenizer(tmp_path)
