"""The naive oracle: attention as its formula is written, N x N scores and all, differentiable by PyTorch, in the inputs' dtype.

Call it with float64 inputs for the truth, with low-precision inputs for what plain PyTorch makes of them.
"""

import math

import torch
from torch import Tensor

LOG2E = math.log2(math.e)


def visible(n_q: int, n_k: int, *, is_causal=False, causal_alignment="upper_left", window=None, key_lengths=None, device=None):
    """(B or 1, 1, n_q, n_k) bool: True where query i sees key j, written out from the definitions in tfkern.attention."""
    i = torch.arange(n_q, device=device)[:, None]
    j = torch.arange(n_k, device=device)[None, :]
    lengths = torch.tensor([n_k], device=device) if key_lengths is None else key_lengths
    lengths = lengths.to(torch.int64)[:, None, None, None]
    position = i + (lengths - n_q if causal_alignment == "lower_right" else 0)
    left, right = window if window is not None else (None, None)
    keep = (j < lengths).expand(-1, 1, n_q, n_k)
    if is_causal:
        keep = keep & (j <= position)
    if left is not None:
        keep = keep & (j >= position - left)
    if right is not None:
        keep = keep & (j <= position + right)
    return keep


def attention_weights(
    query: Tensor, key: Tensor, is_causal=False, scale=None, *, causal_alignment="upper_left", window=None, key_lengths=None
) -> tuple[Tensor, Tensor]:
    """P = softmax(scale * Q K^T) of shape (B, H, Nq, Nk) and lse (B, H, Nq). Rows that see no key: P = 0, lse = -inf."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(-2, -1)) * scale
    keep = visible(
        query.shape[2], key.shape[2], is_causal=is_causal, causal_alignment=causal_alignment, window=window,
        key_lengths=key_lengths, device=query.device,
    )  # fmt: skip
    scores = scores.masked_fill(~keep, -math.inf)
    dead = ~keep.any(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(dead, 0.0), torch.logsumexp(scores, -1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    causal_alignment="upper_left", window=None, key_lengths=None, return_lse=False,
):  # fmt: skip
    """The naive counterpart of tfkern.attention, with its arguments and results; O(N^2) memory; any device and dtype."""
    if attn_mask is not None or dropout_p:
        raise NotImplementedError("the reference has no attn_mask and no dropout_p yet")
    p, lse = attention_weights(
        query, key, is_causal, scale, causal_alignment=causal_alignment, window=window, key_lengths=key_lengths
    )
    if value.shape[1] != query.shape[1]:
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    out = p @ value
    return (out, lse) if return_lse else out


def backward(query: Tensor, key: Tensor, value: Tensor, do: Tensor, dlse: Tensor, *, scale=None, enable_gqa=False, **band):
    """dq, dk, dv by the formula that flash backwards compute, written out, N x N and all: P = 2^(S log2(e) - lse log2(e)),
    delta = rowsum(O * dO) - dlse, dS = P * (dP - delta) (Dao et al., FlashAttention, 2022, section B.4). In the inputs' dtype.
    """
    batch, heads, n_q, head_dim = query.shape
    kv_heads, n_k = key.shape[1:3]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    wide_key, wide_value = (x.repeat_interleave(heads // max(kv_heads, 1), dim=1) for x in (key, value))
    out, lse = attention(query, key, value, scale=scale, return_lse=True, **band)
    keep = visible(n_q, n_k, device=query.device, **band)
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    p = ((query @ wide_key.mT) * (scale * LOG2E) - lse[..., None] * LOG2E).exp2().masked_fill(~keep, 0.0)
    delta = (out * do).sum(-1) - dlse
    ds = p * (do @ wide_value.mT - delta[..., None])

    def shared(x):  # the sum over the query heads that share a key head
        return x.reshape(batch, kv_heads, heads // max(kv_heads, 1), n_k, x.shape[3]).sum(2)

    return ds @ wide_key * scale, shared(ds.mT @ query * scale), shared(p.mT @ do)
