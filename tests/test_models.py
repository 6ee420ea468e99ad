"""The reference models: sizes, structure, and that fused and naive attention make the same of them."""

import pytest
import torch

import tfkern
from tfkern import reference
from tfkern.models import bert, gpt, vit
from tfkern.nn import SelfAttention

BLOCK = 7_087_872


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(gpt.GPT, 124_439_808), (bert.BERT, 109_482_240), (vit.ViT, 86_567_656)],
    ids=["gpt", "bert", "vit"],
)
def test_parameters_at_base_size(build, parameters):
    with torch.device("meta"):
        model = build()
    assert count(model) == parameters
    assert [count(block) for block in model.blocks] == [BLOCK] * 12


TINY_GPT = gpt.GPTConfig(vocab_size=11, context=40, layers=2, heads=2, width=16)
TINY_BERT = bert.BERTConfig(vocab_size=11, context=40, layers=2, heads=2, width=16)
TINY_VIT = vit.ViTConfig(image=8, patch=2, channels=1, classes=5, layers=2, heads=2, width=16)


def tiny(name: str, attention):
    """A model and its inputs, the same for every attention."""
    torch.manual_seed(0)
    ids = torch.randint(11, (3, 33))
    build = {
        "gpt": lambda: (gpt.GPT(TINY_GPT, attention), (ids,)),
        "bert": lambda: (bert.MaskedLM(TINY_BERT, attention), (ids, torch.tensor([33, 7, 20]))),
        "vit": lambda: (vit.ViT(TINY_VIT, attention), (torch.randn(3, 1, 8, 8),)),
    }
    return build[name]()


def portable(*args, **kwargs):
    return tfkern.attention(*args, **kwargs, backend="portable")


@pytest.mark.parametrize("fused", [tfkern.attention, portable], ids=["default", "portable"])
@pytest.mark.parametrize("name", ["gpt", "bert", "vit"])
def test_naive_is_fused(name, fused, device):
    """Outputs and the gradient of every parameter."""
    results = []
    for attention in (reference.attention, fused):
        model, inputs = tiny(name, attention)
        model.to(device)
        out = model(*(x.to(device) for x in inputs))
        out.square().mean().backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters()}))
    (naive_out, naive_grads), (out, grads) = results
    torch.testing.assert_close(out, naive_out, rtol=1e-4, atol=1e-5)
    assert all(g is not None for g in grads.values())
    for parameter, grad in grads.items():
        torch.testing.assert_close(grad, naive_grads[parameter], rtol=1e-3, atol=1e-6, msg=lambda m, n=parameter: f"{n}: {m}")


def test_the_attention_given_is_the_one_called():
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return reference.attention(*args, **kwargs)

    for name, causal in (("gpt", True), ("bert", False), ("vit", False)):
        calls.clear()
        model, inputs = tiny(name, spy)
        model(*inputs)
        assert [c["is_causal"] for c in calls] == [causal] * 2


def test_packed_projection_reaches_the_kernel_without_a_copy():
    seen = {}

    def spy(q, k, v, **kwargs):
        seen.update(q=q, k=k, v=v)
        seen["out"] = tfkern.attention(q, k, v, **kwargs)
        return seen["out"]

    layer = SelfAttention(32, 4, attention=spy)
    layer.qkv.register_forward_hook(lambda m, i, out: seen.update(qkv=out))
    layer.proj.register_forward_pre_hook(lambda m, i: seen.update(projected=i[0]))
    layer(torch.randn(2, 10, 32))
    memory = {name: t.untyped_storage().data_ptr() for name, t in seen.items()}
    assert memory["q"] == memory["k"] == memory["v"] == memory["qkv"]
    assert memory["out"] == memory["projected"]
    assert seen["projected"].is_contiguous()


def test_gpt_is_causal_and_bert_ignores_padding():
    model, (ids,) = tiny("gpt", tfkern.attention)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 11
    torch.testing.assert_close(model(ids)[:, :20], model(changed)[:, :20])
    model, (ids, lengths) = tiny("bert", tfkern.attention)
    changed = ids.clone()
    changed[1, 7:] = (changed[1, 7:] + 1) % 11
    torch.testing.assert_close(model(ids, lengths)[1, :7], model(changed, lengths)[1, :7])
    assert not torch.allclose(model(ids)[1, :7], model(changed)[1, :7])


def test_bert_pooler_and_segments():
    model = bert.BERT(TINY_BERT)
    ids, segments = torch.randint(11, (2, 9)), torch.tensor([[0] * 4 + [1] * 5] * 2)
    assert model.pool(model(ids)).shape == (2, 16)
    assert not torch.equal(model(ids), model(ids, segments=segments))
    with pytest.raises(ValueError, match="pooler=True"):
        bert.BERT(TINY_BERT, pooler=False).pool(model(ids))


def test_tied_heads_share_their_weight():
    for name, embedding in (("gpt", lambda m: m.tokens), ("bert", lambda m: m.bert.tokens)):
        model, inputs = tiny(name, reference.attention)
        with torch.no_grad():
            embedding(model).weight.zero_()
        logits = model(*inputs)
        torch.testing.assert_close(logits, torch.zeros_like(logits))


def test_generate():
    model, (ids,) = tiny("gpt", tfkern.attention)
    out = model.generate(ids[:, :5], 50)  # beyond the context
    assert out.shape == (3, 55)
    assert torch.equal(out[:, :5], ids[:, :5])
    greedy = model.generate(ids[:, :5], 4, temperature=0.0)
    assert torch.equal(greedy, model.generate(ids[:, :5], 4, top_k=1))
    seeded = [model.generate(ids[:, :5], 9, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*seeded)


def test_bad_sizes():
    with pytest.raises(ValueError, match="at most 40 positions"):
        gpt.GPT(TINY_GPT)(torch.zeros(1, 41, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most 40 positions"):
        bert.BERT(TINY_BERT)(torch.zeros(1, 41, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple of patch"):
        vit.ViT(vit.ViTConfig(image=9, patch=2))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        SelfAttention(30, 4)
