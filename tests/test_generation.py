"""Text token by token: sampling, the cache of keys and values, and the window past the context."""

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tfkern import reference
from tfkern.models import generation
from tfkern.models.gpt import GPT, GPTConfig
from tfkern.nn import KeyValueCache, SelfAttention

VOCAB, CONTEXT = 50, 24
SAMPLING = {"greedy": dict(temperature=0.0), "sampled": dict(temperature=0.9, top_k=20, top_p=0.95)}


def gpt(**options) -> GPT:
    """One whose tokens depend on all before, on their order and on the block: as drawn first, GPT repeats its last token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCAB, context=CONTEXT, layers=2, heads=2, width=32), **options).eval()
    with torch.no_grad():
        model.positions.weight.mul_(3)
        for block in model.blocks:
            block.attn.proj.weight.mul_(10)
            block.mlp[-1].weight.mul_(10)
    return model


def prompts(n: int) -> torch.Tensor:
    return torch.randint(VOCAB, (3, n), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [1, pytest.param(5, marks=pytest.mark.slow), CONTEXT, CONTEXT + 9])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_same_tokens_with_and_without_cache(sampling, n, device):
    """Far past the context: its window moves more than five times."""
    model, ids, found = gpt().to(device), prompts(n).to(device), []
    for cache in (True, False):
        generator = torch.Generator(device).manual_seed(7)
        found.append(model.generate(ids, 90, generator=generator, cache=cache, **SAMPLING[sampling]))
    assert torch.equal(*found)
    assert torch.equal(found[0][:, :n], ids)
    assert found[0].shape == (3, n + 90)
    assert len(found[0][:, n:].unique()) > 10


@pytest.fixture(scope="module")
def learned() -> tuple[GPT, torch.Tensor]:
    """A text of 60 tokens in which each comes several times, and a GPT that knows it by heart, whichever part it sees."""
    text = torch.randint(20, (60,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=20, context=CONTEXT, layers=2, heads=2, width=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    endless = text.repeat(2)
    for _ in range(100):
        batch = torch.stack([endless[i : i + CONTEXT + 1] for i in torch.randint(60, (32,))])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), endless


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_known_by_heart(dtype, learned, device):
    """Each prompt goes on as in the text, past the context, with and without cache, in bfloat16 too: what rounding changes is
    less than what the model is sure of."""
    model, text = copy.deepcopy(learned[0]).to(device, dtype), learned[1].to(device)
    ids = torch.stack([text[i : i + 8] for i in (0, 9, 31)])
    for cache in (True, False):
        found = model.generate(ids, 60, temperature=0.0, cache=cache)
        assert torch.equal(found, torch.stack([text[i : i + 68] for i in (0, 9, 31)]))
        sampled = model.generate(ids, 60, temperature=0.5, top_p=0.8, cache=cache)
        assert torch.equal(found, sampled)


def test_logits_in_pieces(device):
    """A prompt that passes in pieces has the logits that it has as a whole, by any attention."""
    ids = prompts(CONTEXT).to(device)
    for options in ({}, dict(attention=reference.attention)):
        model = gpt(**options).to(device)
        with torch.no_grad():
            whole, cache = model(ids), [KeyValueCache(CONTEXT) for _ in model.blocks]
            pieces = [model(piece, cache) for piece in ids.split([7, 1, 1, 10, 5], 1)]
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(ids, last=True), whole[:, -1:], rtol=1e-4, atol=1e-5)
            with pytest.raises(ValueError, match=f"at most {CONTEXT} positions, the context, but has {CONTEXT + 1}"):
                model(ids[:, :1], cache)


class Recorder(nn.Module):
    """A language model of one idea: the next token is the sum of those that it sees. It notes what passes through it."""

    def __init__(self, context: int):
        super().__init__()
        self.config, self.blocks, self.passed = SimpleNamespace(context=context), [None], []

    def forward(self, ids, cache, last):
        self.passed.append(ids[0].tolist())
        values = ids[:, None, :, None].float()
        seen = cache[0].extended(values, values)[0] if cache else values
        return nn.functional.one_hot(seen.sum((1, 2, 3)).long()[:, None] % VOCAB, VOCAB).float()


def test_the_window_moves_by_half():
    model = Recorder(6)
    out = generation.generate(model, torch.tensor([[3, 1]]), 8, temperature=0.0, cache=False)[0].tolist()
    windows = [out[0:2], out[0:3], out[0:4], out[0:5], out[0:6], out[4:7], out[4:8], out[4:9]]
    assert model.passed == windows
    cached = Recorder(6)
    assert generation.generate(cached, torch.tensor([[3, 1]]), 8, temperature=0.0)[0].tolist() == out
    assert cached.passed == [out[0:2], [out[2]], [out[3]], [out[4]], [out[5]], out[4:7], [out[7]], [out[8]]]
    long = Recorder(6)
    generation.generate(long, torch.arange(1, 9)[None], 1, temperature=0.0)
    assert long.passed == [[3, 4, 5, 6, 7, 8]]
    alone = Recorder(1)
    generation.generate(alone, torch.tensor([[4]]), 3, temperature=0.0)
    assert alone.passed == [[4]] * 3


@pytest.mark.parametrize("context", [8, 100, 301])
def test_work_per_token_is_flat(context):
    """Counted in tokens that pass through the model: at most two for each that comes, far past the context too."""
    model, count = Recorder(context), 1000
    generation.generate(model, torch.ones(1, 4, dtype=torch.int64), count, temperature=0.0)
    assert sum(map(len, model.passed)) <= 4 + 2 * count
    assert len(model.passed) == count


def test_stream():
    model, ids = gpt(), prompts(5)
    tokens = generation.stream(model, ids, 6, generator=torch.Generator().manual_seed(1))
    first = next(tokens)
    assert (first.shape, first.dtype, first.requires_grad) == ((3, 1), torch.int64, False)
    whole = generation.generate(model, ids, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([ids, first, *tokens], 1), whole)
    assert torch.equal(generation.generate(model, ids, 0), ids)
    assert model(ids).requires_grad  # outside of it, gradients are as they were


@pytest.mark.parametrize("cache", [True, False])
def test_a_row_that_has_stopped_stays_so(cache):
    """The others go on as they would, and the text ends where all have stopped."""
    model, ids = gpt(), prompts(5)
    whole = generation.generate(model, ids, 60, temperature=0.0, cache=cache)
    stop = whole[0, 9].item()
    first = [(row[5:] == stop).nonzero()[0, 0].item() if stop in row[5:] else 60 for row in whole]
    found = generation.generate(model, ids, 60, temperature=0.0, cache=cache, stop=stop)
    assert found.shape[1] == 5 + min(60, max(first) + 1)
    for row, wanted, end in zip(found, whole, first, strict=True):
        assert torch.equal(row[: 5 + end], wanted[: 5 + end])
        assert torch.all(row[5 + end :] == stop)
    one = generation.generate(model, ids[:1], 60, temperature=0.0, cache=cache, stop=stop)
    assert one.shape[1] == 5 + first[0] + 1 < 65


def drawn(logits, **options) -> set[int]:
    """Which tokens come in many draws."""
    generator = torch.Generator().manual_seed(0)
    return set(generation.choose(torch.tensor([logits]).expand(2000, -1), generator=generator, **options).flatten().tolist())


def test_top_k_and_top_p():
    logits = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log().tolist()
    assert drawn(logits) == {0, 1, 2, 3, 4}
    assert drawn(logits, top_k=2) == {1, 3}
    assert drawn(logits, top_k=99, top_p=1.0) == {0, 1, 2, 3, 4}
    assert drawn(logits, top_p=0.01) == {1}
    assert drawn(logits, top_p=0.41) == {1, 3}
    assert drawn(logits, top_p=0.64) == {1, 3}
    assert drawn(logits, top_p=0.66) == {1, 3, 4}
    assert drawn(logits, top_k=2, top_p=0.63) == {1, 3}
    assert drawn(logits, top_k=2, top_p=0.6) == {1}  # of the two, 0.4 / 0.65 is 0.615
    assert drawn(logits, temperature=0.5, top_p=0.55) == {1}  # squared and summed to one again, 0.4 becomes 0.59
    assert drawn([0.0, 0.0, -3.0], top_k=1) == {0, 1}  # as likely as each other
    assert drawn([0.0, 0.0], top_p=0.5) == {0}  # one is enough to reach 0.5


@pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
@pytest.mark.parametrize("options", [(0.7, 5, 0.8), (1.3, None, 0.9), (1.0, 12, None), (0.5, 3, 0.4), (2.0, 50, 0.99)])
def test_probabilities_are_those_of_transformers(options):
    """Temperature, then top_k, then top_p."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    temperature, top_k, top_p = options
    logits = 3 * torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0))
    wanted = TemperatureLogitsWarper(temperature)(None, logits)
    wanted = TopKLogitsWarper(top_k)(None, wanted) if top_k else wanted
    wanted = TopPLogitsWarper(top_p)(None, wanted) if top_p else wanted
    found = generation.probabilities(logits, temperature, top_k, top_p)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), wanted.softmax(-1).double(), rtol=1e-5, atol=1e-7)


def test_frequencies():
    """Draws come as often as the temperature says."""
    logits, generator = torch.tensor([[0.0, 1.0, 2.0]]), torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        found = generation.choose(logits.expand(20_000, -1), temperature, generator=generator).flatten().bincount() / 20_000
        torch.testing.assert_close(found, torch.softmax(logits[0] / temperature, -1), rtol=0, atol=0.015)
    assert drawn([0.0, 1.0, 2.0], temperature=1e-300) == {2}
    assert drawn([0.0, 1.0, 2.0], temperature=0.0) == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1.0), "temperature must be 0 or more and finite, but is -1.0"),
        (dict(temperature=float("nan")), "temperature must be 0 or more and finite, but is nan"),
        (dict(top_k=0), "top_k must be 1 or more, or None, but is 0"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, or None, but is 0.0"),
        (dict(top_p=1.5), "top_p must be above 0 and at most 1, or None, but is 1.5"),
        (dict(count=-1), "count must be 0 or more, but is -1"),
        (dict(ids=torch.zeros(2, 0, dtype=torch.int64)), r"ids must be integers \(B, N\) with N >= 1, but are torch.int64 \(2, 0\)"),
        (dict(ids=torch.zeros(3, dtype=torch.int64)), r"ids must be integers .* but are torch.int64 \(3,\)"),
        (dict(ids=torch.zeros(2, 3)), r"ids must be integers .* but are torch.float32 \(2, 3\)"),
    ],
)  # fmt: skip
def test_bad_arguments(options, message):
    """Before the first token is asked for."""
    with pytest.raises(ValueError, match=message):
        generation.stream(gpt(), **{"ids": prompts(3), "count": 2, **options})


def test_a_cache_refuses_what_does_not_fit():
    def kv(*shape):
        return torch.ones(shape), torch.ones(shape)

    cache = KeyValueCache(5)
    keys, values = cache.extended(*kv(2, 3, 4, 8))
    assert keys.shape == values.shape == (2, 3, 4, 8)
    with pytest.raises(ValueError, match="room for 5 positions, but 6 come"):
        cache.extended(*kv(2, 3, 2, 8))
    with pytest.raises(ValueError, match=r"k must have the shape \(2, 3, 1, 8\) to fit the cache, but has \(1, 3, 1, 8\)"):
        cache.extended(*kv(1, 3, 1, 8))
    assert cache.length == 4
    cache.clear()
    assert cache.extended(*kv(2, 3, 1, 8))[0].shape == (2, 3, 1, 8)
    layer, x = SelfAttention(16, 2, is_causal=True), torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match=r"keeps no gradients, but k needs one; call the model under torch.no_grad\(\)"):
        layer(x, cache=KeyValueCache(3))
    with pytest.raises(ValueError, match="key_lengths can't be combined with a cache"):
        layer(x, torch.tensor([1, 2]), cache=KeyValueCache(3))
    with pytest.raises(ValueError, match="a cache needs is_causal=True"):
        SelfAttention(16, 2)(x, cache=KeyValueCache(3))
    k, v = kv(1, 1, 1, 8)
    with pytest.raises(ValueError, match="keeps no gradients, but v needs one"):
        KeyValueCache(3).extended(k, v.requires_grad_())


@torch.no_grad()
def test_each_layer_has_a_cache_of_its_own():
    """All of one length. One for all layers would mix their keys up."""
    model, ids = gpt(), prompts(4)
    one, longer = KeyValueCache(CONTEXT), KeyValueCache(CONTEXT)
    longer.extended(*torch.ones(2, 3, 2, 1, 16))
    for wrong in ([one, one], [one], [one, KeyValueCache(CONTEXT), KeyValueCache(CONTEXT)], [one, longer], []):
        with pytest.raises(
            ValueError, match="cache must have a KeyValueCache of its own for each of 2 blocks, all of one length"
        ):
            model(ids, wrong)
