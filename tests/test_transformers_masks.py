"""Masks of transformers: bands that stand for them, and what no band can tell."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tfkern.integrations import transformers as integration
from tfkern.integrations.transformers_masks import Band, BandMask

sys.path.append(str(Path(__file__).resolve().parent))
import model_runs
from zoo import NAMED, padding

pytestmark = pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def registered():
    """transformers is imported here, not by whoever only collects."""
    return model_runs.registered()


def forms():
    """Arguments of a mask function, (n_q, n_k, q_offset, kv_offset), as caches ask for them."""
    from transformers import masking_utils as theirs

    functions = [
        (theirs.causal_mask_function, None), (theirs.bidirectional_mask_function, None),
        (theirs.sliding_window_causal_mask_function(3), 3), (theirs.sliding_window_bidirectional_mask_function(2), 2),
    ]  # fmt: skip
    places = [(7, 7, 0, 0), (1, 7, 6, 0), (3, 7, 4, 0), (3, 9, 2, 0), (3, 5, 6, 4), (4, 4, 0, 0), (2, 9, torch.tensor(3), 0)]
    pads = [None, "none", "right", "left", "middle", "short"]
    return itertools.product(functions, places, pads)


def test_bands_tell_what_masks_tell():
    """By attention with the band against attention with the mask that it stands for."""
    from transformers import masking_utils as theirs

    torch.manual_seed(0)
    count, kinds = 0, set()
    for (function, local_size), (n_q, n_k, q_offset, kv_offset), pad in forms():
        length = int(q_offset) + n_q
        attention_mask = None if pad is None else torch.ones(2, length, dtype=torch.bool)
        if pad in ("right", "left", "middle"):
            attention_mask[1, {"right": slice(-1, None), "left": slice(0, 1), "middle": slice(1, 2)}[pad]] = False
        if pad == "short":
            attention_mask = attention_mask[:, :-1]
        arguments = dict(
            batch_size=2, q_length=n_q, kv_length=n_k, q_offset=q_offset, kv_offset=kv_offset, mask_function=function,
            attention_mask=attention_mask, local_size=local_size,
        )  # fmt: skip
        mask = integration.transformers_masks.mask(**arguments, dtype=torch.float32, config=None)
        want = theirs.sdpa_mask(**arguments, allow_is_causal_skip=False)
        assert torch.equal(mask + 0, theirs.eager_mask(**arguments))
        assert torch.equal(mask.seen(), want)
        if mask.band is None:
            assert local_size == 2
            assert n_k == 9
            continue
        kinds.add((mask.band.alignment, mask.band.keys is None, mask.band.key_lengths is None, mask.band.padding is None))
        q, k, v = (torch.randn(2, 2, n, 4) for n in (n_q, n_k, n_k))
        module = nn.Identity()
        for more in ({}, dict(position_bias=torch.randn(1, 2, n_q, n_k))):
            found, dense = (integration.attention_forward(module, q, k, v, m, **more)[0] for m in (mask, want))
            torch.testing.assert_close(found, dense)
        count += 1
    assert count == 168 - 12
    assert len(kinds) > 6


def test_masks_that_no_band_tells():
    from transformers import masking_utils as theirs

    make = integration.transformers_masks.mask
    chunked = theirs.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long))
    either = theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: k < 2)
    for function in (chunked, either, theirs.sliding_window_causal_mask_function(4)):
        arguments = dict(batch_size=2, q_length=7, kv_length=7, mask_function=function, local_size=3)
        mask = make(**arguments)
        assert mask.band is None
        assert torch.equal(mask.seen(), theirs.sdpa_mask(**arguments, allow_is_causal_skip=False))
        assert torch.equal(mask + 0, theirs.eager_mask(**arguments))


def test_a_band_mask_is_an_ordinary_mask_to_others():
    make = integration.transformers_masks.mask
    mask = make(batch_size=1, q_length=3, kv_length=4, q_offset=1)
    assert mask._written is None
    assert (mask.shape, mask.dtype, mask.ndim) == ((1, 1, 3, 4), torch.float32, 4)
    assert "BandMask" in repr(mask)
    seen = torch.ones(3, 4).tril(1).bool()[None, None]
    want = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(mask[:, :, :2], want[:, :, :2])
    assert type(mask[0]) is torch.Tensor
    assert torch.equal(mask + torch.ones(3, 1), want + 1.0)
    assert torch.equal(mask.clone(), want)
    assert mask.band is not None
    mask.fill_(0.0)
    assert mask.band is None  # it would tell what was
    q = torch.randn(1, 1, 4, 4)
    found = integration.attention_forward(nn.Identity(), q[:, :, :3], q, q, mask)[0]
    torch.testing.assert_close(found, integration.attention_forward(nn.Identity(), q[:, :, :3], q, q, ~seen | seen)[0])
    assert make(batch_size=1, q_length=3, kv_length=4, dtype=BF16).clone().dtype == BF16


def test_a_static_cache_counts_on():
    """A mask remembers where it stood."""
    offset = torch.tensor(2)
    mask = integration.transformers_masks.mask(batch_size=1, q_length=1, kv_length=5, q_offset=offset)
    offset += 1
    assert torch.equal(mask.seen(), torch.tensor([True, True, True, False, False])[None, None, None])
    assert mask.band.key_lengths.tolist() == [3]


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma-2", "gpt-oss", "BERT", "T5", "BART"])
@pytest.mark.parametrize("side", [None, "right", "left"])
def test_no_mask_is_written_out(name, side, monkeypatch):
    """Windows, causality and padding are features of the kernels, not a tensor of N x N."""
    seen = []
    real = integration.attention
    monkeypatch.setattr(integration, "attention", lambda *a, **k: (seen.append((a, k)), real(*a, **k))[1])
    monkeypatch.setattr(BandMask, "written", lambda self: pytest.fail("written out"))
    m = NAMED[name]
    model = m.make("tfkern")
    with torch.no_grad():
        model(**m.inputs(pad=side))
    assert len(seen) == m.calls
    for (*_, mask), options in seen:
        assert mask is None or mask.shape[2] == 1 or name == "T5"
        assert (options["key_lengths"] is not None) == (side == "right")
        if name in ("Llama", "Mistral", "Gemma-2", "gpt-oss"):
            assert options["window"] in ((None, 0), (3, 0))
    windows = {options["window"] for _, options in seen}
    assert ((3, 0) in windows) == (name in ("Mistral", "Gemma-2", "gpt-oss"))
    assert all((options["softcap"] == 2.0) == (name == "Gemma-2") for _, options in seen)
    assert all((options["sinks"] is not None) == (name == "gpt-oss") for _, options in seen)


@pytest.mark.parametrize("kind", ["bool", "float", "bf16"])
@pytest.mark.parametrize("name", ["Llama", "BERT", "GPT-2"])
def test_masks_of_users(name, kind):
    """4-D, as they come, and one mask hides a key in the middle."""
    m = NAMED[name]
    mask = torch.ones(11, 11).tril().bool().expand(3, 1, 11, 11).clone()
    mask[1, :, 5:, 3] = False

    def change(model, inputs):
        dtype = next(model.parameters()).dtype
        additive = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        if model.config._attn_implementation == "tfkern" and kind != "float":
            additive = mask if kind == "bool" else torch.zeros(mask.shape, dtype=BF16).masked_fill(~mask, -torch.inf)
        if model.config._attn_implementation == model_runs.NAIVE:
            additive = mask
        inputs["attention_mask"] = additive

    model_runs.assert_within(model_runs.judge(model_runs.prepared(m, change=change)))


def test_padding_of_the_zoo():
    """It is what the tests say."""
    assert padding("left", 7)[1].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert Band() == Band(None, None, "upper_left")
