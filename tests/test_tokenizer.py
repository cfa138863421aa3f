"""Ids equal those of the reference implementations, and the field's token counts, for every form of vocabulary."""
import base64
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
LLAMA3_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
                r"\s+(?!\S)|\s+")


def random_texts(n: int, seed: int = 0, specials=()) -> list[str]:
    """Words, spaces, digits, contractions, scripts, emoji, controls and combining marks, in no order."""
    rng = random.Random(seed)
    assigned = [c for c in map(chr, range(1, 0x1FAFF)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    common = [*" \n\t'.,!?-_()<>|#0123456789", "  ", "    ", "\r\n", "don't", "WE'LL", "hello", " World", "über", "é",
              "e\u0301", "日本語", "привет", "123456", "🙂", "👩\u200d💻", "\u0338", *specials]
    return ["".join(rng.choice(common if rng.random() < 0.7 else assigned) for _ in range(rng.randint(1, 60)))
            for _ in range(n)]


def qwen_json(folder) -> "tokenizers.Tokenizer":
    """The reference byte-level BPE over Qwen's vocabulary, as its published tokenizer.json has it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().split("\n")[1:] if line.strip()]
    t = Tokenizer(models.BPE(json.loads((folder / "vocab.json").read_text()), merges))
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_REGEX.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(name, special=True, normalized=False)
                          for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
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
@pytest.mark.parametrize("name, count, bos", [("llama2", 341469, 1), ("llama3", 289077, 128000), ("qwen2", 299078, None),
                                              ("qwen1", 299078, None), ("mistral", 334661, 1)])
def test_the_joined_test_split_has_the_known_number_of_ids(name, count, bos):
    tokenizer = load_tokenizer(REAL / name)
    text, label = evaluation_text(str(tiny.DATA / "wikitext-2-raw"))
    ids = tokenizer.encode(text)
    assert (len(ids), label) == (count, "WikiText-2 test")
    assert tokenizer.bos_id == bos and tokenizer.add_bos == (bos is not None) and (bos is None or ids[0] == bos)


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
    """Meta's list of ranks against the same vocabulary in the form hubs carry, run by the reference implementation."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

    from text.tokenizer import byte_alphabet
    lines = (REAL / "llama3" / "tokenizer.model").read_bytes().splitlines()
    letter = {byte: char for char, byte in byte_alphabet().items()}
    tokens = ["".join(letter[b] for b in base64.b64decode(line.split()[0])) for line in lines]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [(token[:k], token[k:]) for token in tokens for k in range(1, len(token))
              if token[:k] in vocab and token[k:] in vocab]
    reference = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    reference.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ours = load_tokenizer(REAL / "llama3")
    assert len(ours.added) == 256 and ours.vocab_size == 128256
    by_id = sorted(ours.added, key=lambda name: ours.added[name].id)
    reference.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in by_id])
    reference.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)])])
    reference.save(str(tmp_path / "tokenizer.json"))
    from_json = load_tokenizer(tmp_path)
    assert (from_json.bos_id, from_json.add_bos, from_json.vocab_size) == (128000, True, 128256)
    for text in random_texts(500, seed=2, specials=("<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_7|>")):
        assert ours.encode(text) == from_json.encode(text) == reference.encode(text).ids, repr(text)


@real
@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_sentencepiece_ids_equal_sentencepiece(name):
    ours = load_tokenizer(REAL / name)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(REAL / name / "tokenizer.model"))
    for text in random_texts(500, seed=3):
        ids = reference.encode(text)
        assert ours.encode(text) == [1, *ids], repr(text)
        assert ours.decode([1, *ids, 2]) == reference.decode(ids)


@real
def test_added_tokens_of_a_sentencepiece_checkpoint_are_cut_out_first(tmp_path):
    shutil.copy(REAL / "llama2" / "tokenizer.model", tmp_path)
    config = {"add_bos_token": False, "bos_token": {"content": "<s>"}, "added_tokens_decoder": {
        "1": {"content": "<s>"}, "2": {"content": "</s>"}, "32010": {"content": "<|im_start|>", "special": True},
        "32001": {"content": "<think>", "special": False, "normalized": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert ours.encode("<|im_start|>user</s>hi") == [32010, 1792, 2, 2918]  # no space in front of the two
    assert ours.vocab_size == 32011
    assert ours.decode([32010, 1404, 32005, 32001, 15043, -1, 32011]) == "user<think> Hello"


def small_bpe(tmp_path, pre, **settings):
    """A byte-level BPE trained on the spot by the reference, saved as tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>", "<|pad|>"],
                                  initial_alphabet=ByteLevel.alphabet(), show_progress=False)
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
    reference, ours = small_bpe(tmp_path, pre(), bos_token="<|endoftext|>"), load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.add_bos) == (0, False)
    for text in random_texts(1500, seed=4, specials=("<|endoftext|>", "<|late|>", "<|pad|>", "   7", "a  b")):
        assert ours.encode(text) == reference.encode(text).ids, repr(text)
        assert ours.decode(ours.encode(text)) == reference.decode(reference.encode(text).ids)




def test_merges_out_of_order_are_refused(tmp_path):
    small_bpe(tmp_path, gpt2_pre())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="order"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda d: d["model"].update(type="Unigram"), "Unigram"),
    (lambda d: d["model"].update(byte_fallback=True), "tokenizer.model"),
    (lambda d: d.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    (lambda d: d["model"]["vocab"].pop("a"), "vocabulary|bytes"),
    (lambda d: d["model"]["vocab"].update(a=d["model"]["vocab"]["b"]), "different"),
    (lambda d: d.update(model=5), "malformed"), (lambda d: d.update(pre_tokenizer=[1]), "malformed"),
    (lambda d: d.update(post_processor="x"), "malformed"), (lambda d: d.update(added_tokens=5), "malformed"),
    (lambda d: d.update(added_tokens=[{"content": "", "id": 1}]), "added tokens"),
    (lambda d: d.update(added_tokens=[{"content": "a", "id": 10**30}]), "added tokens"),
    (lambda d: d["model"].update(merges=None), "malformed"), (lambda d: d["model"].update(merges=5), "malformed")])
def test_unsupported_tokenizers_are_refused_by_what_they_are(tmp_path, change, message):
    small_bpe(tmp_path, gpt2_pre())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\n\x00garbage", b"aGk= 0\n", b"aGk= x\n", b"\xff\xff"])
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
