"""The attention function that models of transformers call: its arguments, and what it refuses."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tfkern
from tfkern.integrations import transformers as integration

sys.path.append(str(Path(__file__).resolve().parent))
import model_runs
from zoo import NAMED

pytestmark = pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def registered():
    """transformers is imported here, not by whoever only collects."""
    return model_runs.registered()


def attend(mask=None, n_q=4, n_k=4, module=None, **options):
    q, k = torch.ones(2, 2, n_q, 4), torch.ones(2, 2, n_k, 4)
    return integration.attention_forward(nn.Identity() if module is None else module, q, k, k, mask, **options)[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(block_indices=torch.zeros(1)), NotImplementedError, "block_indices must be None: tfkern's attention doesn't know"),
        (dict(cache=object()), NotImplementedError, "cache must be None"),
        (dict(head_mask=torch.ones(2)), NotImplementedError, "head_mask must be None"),
        (dict(output_attentions=True), NotImplementedError, "output_attentions=True needs the weights"),
        (dict(cu_seq_lens_q=torch.tensor([0, 4])), ValueError, "cu_seq_lens_q and cu_seq_lens_k must be given together"),
        (dict(cu_seq_lens_q=torch.tensor([0, 4]), cu_seq_lens_k=torch.tensor([0, 4])), ValueError, "query must have a batch of 1"),
        (dict(sliding_window=2, n_q=2), ValueError, "attention_mask must be given where a sliding_window"),
        (dict(mask=torch.ones(2, 1, 4, 4, dtype=torch.int)), TypeError, "attn_mask must be bool"),
    ],
)  # fmt: skip
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        attend(**options)


def test_a_keyword_through_a_model():
    model = NAMED["Llama"].make("tfkern")
    with pytest.raises(NotImplementedError, match="some_keyword must be None"):
        model(**NAMED["Llama"].inputs(), some_keyword=3)
    attend(output_attentions=False, indices=None, use_cache=True, position_ids=torch.arange(4))


def test_masks_beside_starts():
    """What is seen can't be told twice."""
    starts = torch.tensor([0, 1, 4])
    q = torch.randn(1, 2, 4, 4)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    call = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts)
    with pytest.raises(ValueError, match="attention_mask and position_bias must be None with cu_seq_lens_q"):
        integration.attention_forward(nn.Identity(), q, q, q, mask, **call)
    found = integration.attention_forward(nn.Identity(), q, q, q, None, sliding_window=2, **call)[0]
    q1, q2 = q[:, :, :1], q[:, :, 1:]
    want = [tfkern.attention(x, x, x, is_causal=True, window=(1, None)) for x in (q1, q2)]
    torch.testing.assert_close(found, torch.cat(want, 2).transpose(1, 2))


def test_without_a_mask():
    """The keyword is_causal, then the module's attribute, then True; for one query nothing is hidden, but by a window."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 6, 4)
    module = nn.Identity()

    def found(q, k, **options):
        return integration.attention_forward(module, q, k, k, None, **options)[0].transpose(1, 2)

    causal, full = (tfkern.attention(q, k, k, is_causal=c) for c in (True, False))
    torch.testing.assert_close(found(q, k), causal)  # a static cache's empty keys are behind
    torch.testing.assert_close(found(q, k, is_causal=False), full)
    module.is_causal = False
    torch.testing.assert_close(found(q, k), full)
    torch.testing.assert_close(found(q, k, is_causal=True), causal)
    torch.testing.assert_close(found(q[:, :, :1], k, is_causal=True), full[:, :, :1])
    torch.testing.assert_close(found(q, q, is_causal=True, sliding_window=2), tfkern.attention(q, q, q, window=(1, 0)))
    last = tfkern.attention(q[:, :, :1], k[:, :, -3:], k[:, :, -3:])
    torch.testing.assert_close(found(q[:, :, :1], k, is_causal=True, sliding_window=3), last)
    both = found(q, k.expand(2, -1, -1, -1), is_causal=False)
    torch.testing.assert_close(both, full.expand(2, -1, -1, -1))  # learned queries, one for the batch
    with pytest.raises(ValueError, match="attention_mask must be given where"):
        found(q, k, sliding_window=3)


def test_dropout_is_trainings():
    module = nn.Identity()
    assert not torch.equal(attend(module=module, dropout=0.5), attend(module=module))
    module.eval()
    assert torch.equal(attend(module=module, dropout=0.5), attend(module=module))


def test_autocast_keeps_the_bias():
    """T5's bias stays float32 beside queries in bfloat16."""
    torch.manual_seed(0)
    q, bias = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    with torch.autocast("cpu", dtype=BF16):
        found = integration.attention_forward(nn.Identity(), q, q, q.to(BF16), None, position_bias=bias, is_causal=False)[0]
    wide, narrow = (tfkern.attention(*[q.to(BF16)] * 3, x).transpose(1, 2) for x in (bias, bias.to(BF16)))
    assert torch.equal(found, wide)
    assert not torch.equal(found, narrow)
