"""The ladder: each rung is its formula, and with its new part taken out it is the rung before."""

import functools
import importlib.util
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tfkern
from tfkern import reference
from tfkern.models import ladder, vit
from tfkern.models.ladder import looking, measures, pictures, sentences, sentiment, tables
from tfkern.models.ladder.b_inner_product import fold
from tfkern.models.ladder.e_softmax import weights

pytestmark = pytest.mark.cpu

B, N, C, D = 2, 5, 8, 4
TIGHT = dict(rtol=1e-12, atol=1e-12)
LENGTHS = torch.tensor([5, 3])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TIGHT)


@pytest.fixture
def x():
    return torch.randn(B, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made(rung, *args, **options):
    torch.manual_seed(1)
    return rung(*args, **options).double()


def rungs():
    """Every layer that maps (B, N, C) to (B, N, C) at any N."""
    return {
        "each token": made(ladder.EachToken, C), "a": made(ladder.Products), "b": made(ladder.InnerProduct, C),
        "c": made(ladder.Values, C), "d": made(ladder.QueriesKeysValues, C), "e": made(ladder.SoftmaxAttention, C),
        "f": made(ladder.Head, C, C), "g": made(ladder.Heads, C, 2), "h": made(ladder.Block, C, 2),
    }  # fmt: skip


def test_a_is_its_formula(x):
    layer = ladder.Products()
    for b, i in itertools.product(range(B), range(N)):
        close(layer(x)[b, i], sum((x[b, i] @ x[b, j]) * x[b, j] for j in range(N)))
    assert not list(layer.parameters())


def test_a_fully_connected_layer_fits_one_length(x):
    layer = made(ladder.AllTokens, N, C)
    assert sum(p.numel() for p in layer.parameters()) == (N * C) ** 2
    close(layer(x).flatten(1), x.flatten(1) @ layer.linear.weight.T)
    with pytest.raises(ValueError, match="x must have 5 tokens, for which this layer has weights, but has 4"):
        layer(x[:, :4])


def test_who_learns_of_whom(x):
    """Changing token 0 changes every token of the result, or itself alone."""
    other = x.clone()
    other[:, 0, 0] += 1
    for name, layer in rungs().items():
        changed = (layer(other) - layer(x)).abs().amax(-1) > 1e-9
        assert changed[:, 0].all(), name
        assert changed[:, 1:].all() != (name == "each token"), name
        assert changed[:, 1:].any() != (name == "each token"), name


def test_b_with_the_identity_is_a(x):
    layer = made(ladder.InnerProduct, C)
    close(layer(x), torch.einsum("bic,cd,bjd,bje->bie", x, layer.weight, x, x))
    nn.init.eye_(layer.weight)
    close(layer(x), ladder.Products()(x))


def test_b_is_queries_and_keys(x):
    query, key = (made(nn.Linear, C, D, bias=False) for _ in range(2))
    nn.init.normal_(key.weight)
    layer = ladder.InnerProduct.of(query, key)
    close(layer.scores(x), query(x) @ key(x).mT)
    assert torch.linalg.matrix_rank(layer.weight) == D


@pytest.mark.parametrize("bias", [True, False])
def test_values_fold_into_what_follows(x, bias):
    value, following = made(nn.Linear, C, D, bias=False), made(nn.Linear, D, 3, bias=bias)
    scores = ladder.Products().scores(x)
    close(fold(value, following)(scores @ x), following(scores @ value(x)))


def test_c_is_b_with_every_score_one(x):
    """A constant feature, and a W that looks at it alone."""
    x = x.clone()
    x[..., -1] = 1
    before, layer = made(ladder.InnerProduct, C), made(ladder.Values, C)
    nn.init.zeros_(before.weight)
    before.weight.data[-1, -1] = 1
    close(layer(x), (x @ layer.value.weight.T).sum(1, keepdim=True).expand(B, N, C))
    nn.init.eye_(layer.value.weight)
    close(layer(x), before(x))


def test_c_and_single_tokens_are_additive():
    """logit(not shabby) + logit(great) = logit(shabby) + logit(not great) but for the average over words; rung d is not bound."""
    texts = ["attention is not shabby", "attention is great", "attention is shabby", "attention is not great"]
    words = torch.tensor([4, 3, 3, 4])

    def apart(layer):
        torch.manual_seed(0)
        model = sentiment.Sentiment(layer, C)
        nn.init.normal_(model.words.weight)
        logits = model.logits(texts)
        logits = logits * words if isinstance(layer, ladder.EachToken) else logits  # their average, not their sum
        return (logits[0] + logits[1] - logits[2] - logits[3]).abs().item()

    assert apart(ladder.Values(C)) < 1e-5
    assert apart(ladder.EachToken(C)) < 1e-5
    assert apart(ladder.QueriesKeysValues(C)) > 1e-2


def test_d_without_scale_and_values_is_b(x):
    layer = made(ladder.QueriesKeysValues, C)
    q, k, v = (x @ linear.weight.T for linear in (layer.query, layer.key, layer.value))
    close(layer(x), torch.einsum("bid,bjd,bje->bie", q, k, v) / C**0.5)
    layer.scale = 1.0
    nn.init.eye_(layer.value.weight)
    before = made(ladder.InnerProduct, C)
    before.weight.data = layer.query.weight.T @ layer.key.weight
    close(layer(x), before(x))


def test_the_scale_keeps_the_deviation():
    rows = {(row.head_dim, row.scale): row for row in measures.deviations(head_dims=(8, 256), draws=8)}
    t = measures.TOKENS
    for (d, name), row in rows.items():
        factor = measures.SCALES[name](d, t)
        assert row.scores == pytest.approx(factor * d**0.5, rel=0.2)
        assert row.summed == pytest.approx(factor * (t * t + t * d) ** 0.5, rel=0.2)
    assert rows[256, "1/√D"].averaged == pytest.approx((math.e / t) ** 0.5, rel=0.1)
    assert rows[256, "1"].largest > 0.8
    assert 0.2 > rows[256, "1/√D"].largest > rows[256, "1/D"].largest > 1 / t
    assert rows[256, "1"].gradient < rows[8, "1"].gradient


def test_e_is_its_formula_and_d_when_the_softmax_is_undone(x):
    layer, before = made(ladder.SoftmaxAttention, C), made(ladder.QueriesKeysValues, C)
    before.load_state_dict(layer.state_dict())
    values = layer.value(x)
    close(layer(x), torch.softmax(before.scores(x), -1) @ values)
    q, k = (linear(x)[:, None] for linear in (layer.query, layer.key))
    _, lse = tfkern.attention(q, k, values[:, None], return_lse=True)
    scores = (weights(q, k).log() + lse[..., None])[:, 0]  # the weights are exp(scores - lse)
    close(scores @ values, before(x))
    layer.scale = before.scale = 2.0
    close(layer(x), torch.softmax(before.scores(x), -1) @ values)


def test_the_weights_are_the_kernels(x):
    q, k = x.view(B, 1, N, C), x.flip(1).view(B, 1, N, C)
    expected, _ = reference.attention_weights(q, k, key_lengths=LENGTHS)
    close(weights(q, k, key_lengths=LENGTHS), expected)


def test_f_at_full_width_is_e(x):
    layer, before = made(ladder.Head, C, C), made(ladder.SoftmaxAttention, C)
    layer.load_state_dict(before.state_dict())
    close(layer(x), before(x))
    narrow = made(ladder.Head, C, D)
    q, k, v = narrow.query(x), narrow.key(x), narrow.value(x)
    close(narrow(x), torch.softmax(q @ k.mT / D**0.5, -1) @ v)
    assert sum(p.numel() for p in narrow.parameters()) == 3 * C * D


def test_g_is_heads_side_by_side(x):
    one = made(ladder.Head, C, C)
    close(ladder.Heads.of([one])(x), one(x))  # one head, projected by the identity, is rung f
    heads = [ladder.Head(C, D).double() for _ in range(C // D)]
    close(ladder.Heads.of(heads)(x), torch.cat([head(x) for head in heads], -1))
    with pytest.raises(ValueError, match=r"heads must have dims that add up to their width 8, but they are \[4\]"):
        ladder.Heads.of(heads[:1])


def test_g_is_the_layer_of_tfkern(x):
    layer, packed = made(ladder.Heads, C, 2), tfkern.nn.SelfAttention(C, 2).double()
    packed.load_state_dict(layer.state_dict())
    close(layer(x, LENGTHS), packed(x, LENGTHS))


def test_g_drops_weights_in_training_alone(x):
    layer = made(ladder.Heads, C, 2, dropout=0.5)
    plain = made(ladder.Heads, C, 2)
    close(layer.eval()(x), plain(x))
    torch.manual_seed(3)
    dropped = layer.train()(x)
    torch.manual_seed(3)
    layer.attention = reference.attention
    close(layer(x), dropped)
    assert (dropped - plain(x)).abs().max() > 1e-3


def test_h_without_mlp_norms_and_skip_is_g(x):
    layer, before = made(ladder.Block, C, 2), made(ladder.Heads, C, 2)
    before.load_state_dict(layer.attn.state_dict())
    layer.norm_1 = nn.Identity()
    for p in layer.mlp[-1].parameters():
        nn.init.zeros_(p)
    close(layer(x) - x, before(x))


def test_h_is_vits_block(x):
    layer, theirs = made(ladder.Block, C, 2), vit.Block(vit.ViTConfig(width=C, heads=2, eps=1e-5), tfkern.attention).double()
    theirs.load_state_dict(layer.state_dict())
    close(layer(x), theirs(x))


def test_the_counts():
    counts = measures.counts()
    assert counts["queries, keys, values"] == 3 * 768**2 + 3 * 768
    assert counts["projection"] == 768**2 + 768
    assert counts["MLP"] == 8 * 768**2 + 5 * 768
    assert counts["two norms"] == 4 * 768
    assert counts["block"] == 7_087_872
    assert counts["twelve blocks"] == 85_054_464
    assert counts["BERT-base"] == 109_482_240 == 85_054_464 + counts["BERT-base, embeddings"] + counts["BERT-base, pooler"]
    assert counts["BERT-base, embeddings"] == (30522 + 512 + 2) * 768 + 2 * 768


@pytest.mark.parametrize("name", rungs())
def test_padding_is_not_there(x, name):
    layer = rungs()[name]
    full = layer(x, LENGTHS)
    x = x.clone()
    x[1, 3:] = 1e3
    close(layer(x, LENGTHS)[1, :3], full[1, :3])
    close(full[1, :3], layer(x[1:, :3])[0])
    close(full[0], layer(x[:1])[0])


@pytest.mark.parametrize("name", "efgh")
def test_softmax_runs_on_the_fused_kernels(x, name):
    """Output and gradients are the naive formula's, and the function given is the one that is called."""
    layer = rungs()[name]
    layer(x).square().sum().backward()
    fused = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with looking.attending_by(layer, lambda attention: reference.attention):
        layer(x).square().sum().backward()
    for p, grad in zip(layer.parameters(), fused, strict=True):
        close(grad, p.grad)
    attending = layer.attn if name == "h" else layer
    assert attending.attention is tfkern.attention


@pytest.mark.needs("Triton", importlib.util.find_spec("triton") is not None)
@pytest.mark.parametrize("name", "efgh")
def test_softmax_runs_on_the_triton_kernels(x, name):
    """In Triton's interpreter, forward and backward."""
    layer, x = rungs()[name].float(), x.float()

    def run(attention):
        layer.zero_grad()
        with looking.attending_by(layer, lambda _: attention):
            out = layer(x, LENGTHS)
        out.square().sum().backward()
        return [out, *(p.grad for p in layer.parameters())]

    torch.testing.assert_close(
        run(functools.partial(tfkern.attention, backend="portable")), run(reference.attention), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", "bcdefgh")
def test_other_shapes_are_refused(x, name):
    with pytest.raises(
        ValueError, match=r"x must have the shape \(batch, tokens, 8\), but has \(2, 5, 7\)|normalized_shape"
    ) as e:
        (rungs()[name].attn if name == "h" else rungs()[name])(x[..., :7])
    assert "embed the tokens to that width first" in str(e.value)
    with pytest.raises(ValueError, match=r"but has \(5, 8\)"):
        rungs()["a"](x[0])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width must be a multiple of heads, but they are 8 and 3; change either"):
        ladder.Heads(8, 3)


def test_the_sentences_are_balanced():
    for texts, truth in (sentences.TRAIN, sentences.HELD_OUT):
        assert sum(truth) == len(truth) / 2
        assert len(set(texts)) == len(texts)
    trained = [text.split() for text in sentences.TRAIN[0]]
    assert not set(sentences.TRAIN[0]) & set(sentences.HELD_OUT[0])
    for text in sentences.HELD_OUT[0]:
        assert set(text.split()) <= {word for words in trained for word in words}
        adjective = next(w for w in reversed(text.split()) if w not in ("at", "all"))
        assert {"not" in words for words in trained if adjective in words} == {True, False}
    with pytest.raises(ValueError, match=r"but have \['cold'\]; replace them"):
        sentiment.encode(["attention is cold"])
    with pytest.raises(ValueError, match=r"have \[3, 0\] words; leave out the empty"):
        sentiment.encode(["attention is great", ""])


def test_hiding_is_one_way():
    """Hidden from "shabby", "not" still sees "shabby"."""
    torch.manual_seed(0)
    model = sentiment.Sentiment(ladder.SoftmaxAttention(C), C)
    nn.init.normal_(model.words.weight)
    text = "attention is not shabby"
    x = model.words(sentiment.encode([text])[0])
    scores = model.layer.scores(x)
    scores[0, 3, 2] = -math.inf
    expected = model.readout(torch.softmax(scores, -1) @ model.layer.value(x)).mean()
    assert looking.logit_hiding(model, text, [("shabby", "not")]) == pytest.approx(expected.item(), rel=1e-4)
    assert looking.logit_hiding(model, text, []) != pytest.approx(expected.item(), rel=1e-3)


@pytest.fixture(scope="module")
def block():
    return measures.trained("h", seed=0)


def test_the_block_learns_what_not_does(block):
    model, fit = block
    assert fit.right == 1.0
    assert fit.held_out_right > 0.8
    shabby, not_shabby = model.logits(["attention is shabby", "attention is not too shabby"])
    assert shabby < 0 < not_shabby


def test_values_alone_cant():
    _, fit = measures.trained("c", seed=0)
    assert fit.right < 0.8
    assert fit.held_out_right < 0.6


def test_looking(block):
    model, _ = block
    text = "attention is not too shabby"
    torch.testing.assert_close(looking.contributions(model, text).sum(), model.logits([text])[0])
    seen = looking.maps(model, text)
    assert seen.shape == (measures.HEADS, 5, 5)
    torch.testing.assert_close(seen.sum(-1), torch.ones(measures.HEADS, 5))
    assert looking.logit_hiding(model, text, []) == pytest.approx(model.logits([text]).item(), abs=1e-5)
    deaf = looking.logit_hiding(model, text, [(word, "not") for word in text.split() if word != "not"])
    assert abs(deaf - model.logits([text]).item()) > 1
    assert model.layer.attn.attention is tfkern.attention
    with pytest.raises(ValueError, match=r"but have \['bad'\]; leave them out"):
        looking.logit_hiding(model, text, [("bad", "not")])


def test_tables_are_put_into_their_places(tmp_path):
    text = tmp_path / "text.md"
    text.write_text("before\n<!-- counts -->\nold\n<!-- /counts -->\nafter\n", "utf-8")
    pictures.main(["--only", "counts", "--text", str(text), "--out", str(tmp_path)])
    found = text.read_text("utf-8")
    assert "| block | 7,087,872 |" in found
    assert "old" not in found
    assert (found[:7], found[-6:]) == ("before\n", "after\n")
    pictures.main(["--only", "counts", "--text", str(text), "--out", str(tmp_path)])
    assert text.read_text("utf-8") == found
    with pytest.raises(ValueError, match=r"text must have one place for the table 'scale', but .* has 0; mark it"):
        tables.fill(text, {"scale": "a table"})


def test_the_text_has_what_the_models_count():
    text = (Path(__file__).resolve().parent.parent / "docs" / "ladder.md").read_text("utf-8")
    assert tables.counts().partition("\n\n")[0] in text
    for name in ("scale", "rungs", "heads"):
        assert re.search(rf"<!-- {name} -->\n\|.*\|\n\n[^\n]*computed by .*\n<!-- /{name} -->", text, re.S), name


@pytest.mark.parametrize("name", ["a", "b", "h", "sentiment"])
def test_pictures_say_what_computed_them(name, tmp_path):
    plt = pytest.importorskip("matplotlib.figure")
    figure = {"a": pictures.a_products, "b": pictures.b_inner_product, "h": pictures.h_block}.get(
        name, pictures.sentiment_block
    )()
    assert isinstance(figure, plt.Figure)
    by = figure.get_supxlabel()
    assert by.startswith("computed by tfkern's backend cpu" if name == "sentiment" else "computed by plain PyTorch")
    assert all(at.get_xlabel() or at.get_ylabel() for at in figure.axes)


def test_unknown_pictures_are_refused(capsys):
    with pytest.raises(SystemExit):
        pictures.main(["--only", "z"])
    assert "--only takes names of a, b, c" in capsys.readouterr().err
