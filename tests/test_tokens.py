"""Tokenizers: characters, and the package `tokenizers`."""

import json

import pytest
import tokenizers

from tfkern.models.tokens import Characters, Subwords, TokenizerError, from_json


def wordpiece() -> str:
    """A tokenizer.json of WordPiece with BERT's special tokens."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "sat"]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(words[:5])
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer.to_str()


def test_characters():
    known = Characters.of("hello", ["mask", "pad"])
    assert (known.characters, known.size) == ("ehlo", 6)
    assert known.encode("hole") == [1, 3, 2, 0]
    assert known.decode([1, 3, 2, 0, 4]) == "hole[MASK]"
    assert [known.special(name) for name in ("mask", "pad", "cls")] == [4, 5, None]
    assert known.encode("") == []
    with pytest.raises(TokenizerError, match=r"characters \['x', 'y'\] that are not known"):
        known.encode("hexy")


def test_characters_are_told_once_and_specials_by_purpose():
    with pytest.raises(TokenizerError, match="each character once"):
        Characters("aba")
    with pytest.raises(TokenizerError, match="specials must be of mask, pad, cls, sep, end, but have bos"):
        Characters("ab", ["bos"])


def test_subwords(tmp_path):
    (tmp_path / "tokenizer.json").write_text(wordpiece())
    known = Subwords.read(tmp_path)
    assert known.size == 9
    assert known.encode("a cats sat") == [5, 6, 7, 8]
    assert known.encode("a cats", special=True) == [2, 5, 6, 7, 3]
    assert known.decode([2, 5, 6, 7, 3]) == "a cats"
    assert [known.special(name) for name in ("mask", "pad", "cls", "sep", "end")] == [4, 0, 2, 3, None]


def test_whole_texts_without_padding():
    """Whatever the file has for its own training."""
    tokenizer = tokenizers.Tokenizer.from_str(wordpiece())
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(3)
    assert len(tokenizer.encode("a cat sat").ids) == 8
    assert Subwords.parsed(tokenizer.to_str()).encode("a cat sat", special=True) == [2, 5, 6, 8, 3]


def test_there_and_back():
    for known in (Characters("ab", ["cls"]), Subwords.parsed(wordpiece())):
        again = from_json(known.to_json())
        assert (type(again), again.size, again.encode("a")) == (type(known), known.size, known.encode("a"))
        assert again.special("cls") == known.special("cls") is not None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1, 2", json.dumps({"model": 1}).encode()])
def test_what_is_no_tokenizer(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=str(path)):
        Subwords.read(path)
    with pytest.raises(TokenizerError, match="can't be read"):
        Subwords.read(tmp_path / "missing.json")
