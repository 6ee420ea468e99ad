"""BERT beside transformers: bodies, heads, padding, segments, old names, files with less or more, and both ways."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tfkern.models.bert import BERT, BERTConfig, Classifier, MaskedLM
from tfkern.models.files import WeightsError
from tfkern.models.pretrained import from_pretrained, save_pretrained

sys.path.append(str(Path(__file__).resolve().parent))
import foreign

pytestmark = pytest.mark.needs("transformers", foreign.there("transformers"))
SIZES = {  # of transformers' config
    "even": dict(hidden_size=32, num_attention_heads=4, intermediate_size=128, num_hidden_layers=2, vocab_size=40,
                 max_position_embeddings=24, type_vocab_size=2),
    "odd": dict(hidden_size=21, num_attention_heads=3, intermediate_size=17, num_hidden_layers=3, vocab_size=29,
                max_position_embeddings=19, type_vocab_size=3, layer_norm_eps=1e-3),
}  # fmt: skip
MODELS = {BERT: "BertModel", MaskedLM: "BertForMaskedLM", Classifier: "BertForSequenceClassification"}
LENGTHS = torch.tensor([19, 7, 1])


@pytest.fixture(scope="module")
def transformers():
    return foreign.transformers()


def theirs(transformers, ours: type, size: str = "even", **more):
    """A model of transformers of the kind of ours."""
    config = transformers.BertConfig(**SIZES[size], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more)
    return foreign.filled(getattr(transformers, MODELS[ours])(config))


def batch(config: BERTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids, and segments of every kind."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (3, 19), generator=generator)
    return ids, torch.randint(config.segments, (3, 19), generator=generator)


@torch.no_grad()
def results(model, ids, segments) -> list[torch.Tensor]:
    """What a model, ours or theirs, makes of a padded batch, without what it makes of padding."""
    there = torch.arange(19) < LENGTHS[:, None]
    if isinstance(model, (BERT, MaskedLM, Classifier)):
        out = model(ids, LENGTHS, segments)
        return [out[there], model.pool(out)] if isinstance(model, BERT) else [out if out.dim() == 2 else out[there]]
    out = model(ids, attention_mask=there.long(), token_type_ids=segments)
    if hasattr(out, "last_hidden_state"):
        return [out.last_hidden_state[there], out.pooler_output]
    return [out.logits if out.logits.dim() == 2 else out.logits[there]]


def agree(ours, reference, inputs) -> None:
    pairs = list(zip(results(ours, *inputs), results(reference, *inputs), strict=True))
    for out, wanted in pairs:
        foreign.same(out, wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ours", MODELS, ids=lambda cls: cls.__name__)
def test_both_ways(ours, size, transformers, tmp_path):
    """The class comes from config.json. Written again, transformers' weights are the same bits."""
    more = dict(num_labels=5) if ours is Classifier else {}
    reference = theirs(transformers, ours, size, **more)
    reference.save_pretrained(tmp_path / "theirs")
    model = from_pretrained(tmp_path / "theirs")
    assert type(model) is ours
    assert not model.training
    inputs = batch(model.config)
    agree(model, reference, inputs)
    save_pretrained(model, tmp_path / "ours")
    again = foreign.loaded(type(reference), tmp_path / "ours")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    agree(from_pretrained(tmp_path / "ours"), reference, inputs)


@pytest.mark.parametrize("ours", MODELS, ids=lambda cls: cls.__name__)
def test_ours_first(ours, transformers, tmp_path):
    """A model of ours with the usual MLP, which our config leaves open and theirs must tell."""
    config = BERTConfig(vocab_size=40, context=24, layers=1, heads=2, width=16)
    model = foreign.filled(ours(config))
    save_pretrained(model, tmp_path)
    agree(model, foreign.loaded(getattr(transformers, MODELS[ours]), tmp_path), batch(config))
    assert from_pretrained(tmp_path).config == config


def test_old_names(transformers, tmp_path):
    """gamma and beta, ids of positions that are no weights, a head for next sentences, and a copy of the tied decoder."""
    reference = theirs(transformers, MaskedLM)
    reference.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for n, x in state.items()
    }
    assert any("gamma" in name for name in old)
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    old["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    old["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    save_file(old, tmp_path / "model.safetensors")
    model = from_pretrained(tmp_path)
    agree(model, reference, batch(model.config))
    old["cls.predictions.decoder.weight"][3, 4] += 1
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"not a copy of the weight it is tied to.*cls\.predictions\.decoder\.weight"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("ours", [MaskedLM, Classifier], ids=lambda cls: cls.__name__)
def test_a_fresh_head_on_a_body(ours, prefix, transformers, tmp_path):
    """A file of the body alone has its names with or without bert."""
    reference = theirs(transformers, BERT)
    reference.save_pretrained(tmp_path)
    state = {prefix + name: x for name, x in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    head = "classifier.weight" if ours is Classifier else "cls.predictions.transform.dense.weight"
    with pytest.raises(WeightsError, match=rf"missing .*{head}"):
        from_pretrained(tmp_path, ours)
    with foreign.warned("missing", head):
        model = from_pretrained(tmp_path, ours, strict=False)
    ids, segments = batch(model.config)
    foreign.same(model.bert(ids, segments=segments), reference(ids, token_type_ids=segments).last_hidden_state)


def test_the_body_of_a_whole_model(transformers, tmp_path):
    reference = theirs(transformers, Classifier)
    reference.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, BERT)
    agree(model, reference.bert, batch(model.config))


def test_pieces_and_changes(transformers, tmp_path):
    """A fine-tuned head may have another size: the rest is loaded."""
    theirs(transformers, Classifier, num_labels=5).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"of another shape .*classifier.weight \(5, 32\) instead of \(2, 32\)"):
        from_pretrained(tmp_path, classes=2)
    with foreign.warned("of another shape", "classifier.bias"):
        model = from_pretrained(tmp_path, classes=2, strict=False, dropout=0.25)
    assert (model.head.out_features, model.config.dropout, model.dropout.p) == (2, 0.25, 0.25)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
        ("model_type", "roberta"),
        ("is_decoder", True),
        ("is_causal", True),
    ],
)
def test_what_this_bert_does_not_compute(key, value, transformers, tmp_path):
    theirs(transformers, BERT).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(WeightsError, match=f"{key} must be .* for BERT, but is {value!r}"):
        from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.needs("rxnfp (make weights)", foreign.there("rxnfp"))
@torch.no_grad()
def test_real_weights_fill_in_as_transformers(transformers):
    """Every fourth token of a few reactions masked; the file is of 2020."""
    from tfkern.bench.reference import models as reference_models

    folder = reference_models.package("rxnfp") / "models" / "transformers"
    model = from_pretrained(folder / "bert_pretrained", MaskedLM)
    reference = transformers.BertForMaskedLM.from_pretrained(folder / "bert_pretrained").eval()
    seen, places, _ = reference_models.masked(folder / "bert_pretrained" / "vocab.txt")
    seen, places = seen[::4], places[::4]
    true = torch.cat([x[1:-1] for x in reference_models.tokens(folder / "bert_pretrained" / "vocab.txt")])[::4]
    there = seen != 0
    out = model(seen, there.sum(1))[places]
    wanted = reference(seen, attention_mask=there.long()).logits[places]
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-4)
    assert torch.equal(out.argmax(-1), wanted.argmax(-1))
    assert (out.argmax(-1) == true).double().mean() > 0.9
    body = from_pretrained(folder / "bert_ft", BERT)  # names without bert.
    foreign.same(body(seen), transformers.BertModel.from_pretrained(folder / "bert_ft").eval()(seen).last_hidden_state)
