"""The naive oracle: attention written as its formula, with N x N scores, differentiated by PyTorch, in the dtype of the inputs.

Call it with float64 inputs for the truth, and with low-precision inputs for the result of plain PyTorch.
"""

import itertools
import math

import torch
from torch import Tensor

from tfkern import dropout
from tfkern.score_mods import each_head


def visible(n_q: int, n_k: int, *, is_causal=False, causal_alignment="upper_left", window=None, key_lengths=None, device=None):
    """(B or 1, 1, n_q, n_k) bool: True where query i sees key j, by the definitions in the docstring of tfkern.attention."""
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


def logits(
    query: Tensor, key: Tensor, attn_mask=None, is_causal=False, scale=None, *, causal_alignment="upper_left", window=None,
    key_lengths=None, softcap=None, alibi_slopes=None, score_mod=None, first=0,
) -> Tensor:  # fmt: skip
    """(B, H, Nq, Nk), -inf where the query does not see the key. `first` is the number of the first sequence of the batch."""
    (_, heads, n_q, head_dim), n_k, device = query.shape, key.shape[2], query.device
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
    s = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(max(head_dim, 1)) if scale is None else scale)
    band = dict(is_causal=is_causal, causal_alignment=causal_alignment, window=window, key_lengths=key_lengths)
    keep = visible(n_q, n_k, **band, device=device)
    i, j = torch.arange(n_q, device=device)[:, None], torch.arange(n_k, device=device)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if score_mod is not None:
        s = each_head(score_mod[0], s, range(first, first + len(s)), 0, i, j)
    if alibi_slopes is not None:
        lengths = torch.tensor([n_k], device=device) if key_lengths is None else key_lengths
        shift = (lengths - n_q)[:, None, None, None] if causal_alignment == "lower_right" else 0
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        s = s - slopes[:, :, None, None].to(s.dtype) * (i + shift - j).abs()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    elif attn_mask is not None:
        s = s + attn_mask.to(s.dtype)
        keep = keep & (attn_mask != -math.inf)
    return s.masked_fill(~keep, -math.inf)


def attention_weights(query: Tensor, key: Tensor, *args, sinks=None, **options) -> tuple[Tensor, Tensor]:
    """P = softmax(logits) of shape (B, H, Nq, Nk), before dropout, and lse (B, H, Nq); arguments as `logits`, and sinks. Rows
    that see no key: P = 0, and lse = -inf if there is no sink."""
    s = logits(query, key, *args, **options)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)
    dead = (s == -math.inf).all(-1, keepdim=True)
    p, lse = torch.softmax(s, -1).masked_fill(dead, 0.0), torch.logsumexp(s, -1)
    return (p if sinks is None else p[..., :-1]), lse


def kept(seed: Tensor, dropout_p: float, shape, first: int = 0) -> Tensor:
    """(B, H, Nq, Nk) float64 factors of dropout: 0 for dropped weights, 1 / (1 - p) for others."""
    batch, heads, n_q, n_k = shape
    bh = torch.arange(first * heads, (first + batch) * heads, device=seed.device).view(batch, heads, 1, 1)
    rows = torch.arange(n_q, device=seed.device)[:, None]
    return dropout.keep(seed, dropout_p, bh, rows, 0, n_k, torch.float64) * dropout.factor(dropout_p)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    return_lse=False, seed=None, first=0, precise_delta=False, **options,
):  # fmt: skip
    """The naive counterpart of tfkern.attention, with its arguments and results; O(N^2) memory; any device and dtype.

    With dropout it draws the same random bits from the same state of torch's generator, unless `seed`, two int64, gives them.
    precise_delta has no effect, because autograd uses no delta.
    """
    p, lse = attention_weights(query, key, attn_mask, is_causal, scale, first=first, **options)
    if dropout_p:
        seed = dropout.draw_seed(query.device) if seed is None else seed
        p = p * kept(seed, dropout_p, p.shape, first).to(p.dtype)
    if value.shape[1] != query.shape[1]:
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    out = p @ value
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q, cu_seqlens_k, attn_mask=None, dropout_p=0.0, *args,
    alibi_slopes=None, return_lse=False, naive=None, **options,
):  # fmt: skip
    """The naive counterpart of tfkern.attention_varlen. It computes one sequence after another."""
    naive = naive or attention
    outs, lses = [], []
    seed = dropout.draw_seed(query.device) if dropout_p else None
    for b, (rows, keys) in enumerate(zip(_slices(cu_seqlens_q), _slices(cu_seqlens_k), strict=True)):
        q, k, v = (x[at].transpose(0, 1)[None] for x, at in ((query, rows), (key, keys), (value, keys)))
        mask = of_sequence(attn_mask, b, q.shape[2], k.shape[2])
        slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = naive(
            q, k, v, mask, dropout_p, *args, alibi_slopes=slopes, return_lse=True, seed=seed, first=b, **options
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    left = query.shape[0] - int(cu_seqlens_q[-1])  # rows of no sequence
    heads = query.shape[1]
    outs.append(query.new_zeros(left, heads, value.shape[2]))
    lses.append(query.new_full((heads, left), -math.inf))
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    return (out, lse) if return_lse else out


def of_sequence(attn_mask: Tensor | None, b: int, n_q: int, n_k: int) -> Tensor | None:
    """The part of the mask for packed sequences that sequence b, of lengths n_q and n_k, uses."""
    if attn_mask is None:
        return None
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if mask.shape[0] > 1:
        mask = mask[b : b + 1]
    return mask[:, :, : n_q if mask.shape[2] > 1 else None, : n_k if mask.shape[3] > 1 else None]


def _slices(cu) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise(cu.tolist())]


def flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    return_lse=False, seed=None, first=0, sinks=None, precise_delta=False, out_dtype=None,
    **options,
):  # fmt: skip
    """`attention` with the backward of flash attention, written out with N x N matrices: delta = rowsum(O * dO) - dlse,
    dS = P * (dP - delta) (Dao et al., FlashAttention, 2022, section B.4). O is rounded to out_dtype before delta is computed
    from it, unless precise_delta."""
    if dropout_p and seed is None:
        seed = dropout.draw_seed(query.device)
    with torch.no_grad():
        out, lse = attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, return_lse=True, seed=seed, first=first, sinks=sinks,
            **options,
        )  # fmt: skip
    if out_dtype is not None and not precise_delta:
        out = out.to(out_dtype).to(out.dtype)
    s = logits(query, key, attn_mask, is_causal, scale, first=first, **options)
    factors = kept(seed, dropout_p, s.shape, first).to(s.dtype) if dropout_p else None
    wide_value = value.repeat_interleave(query.shape[1] // max(value.shape[1], 1), dim=1)
    sink = s.new_full((s.shape[1],), -math.inf) if sinks is None else sinks.to(s.dtype)
    out, lse = _Flash.apply(s, sink, wide_value, out, lse, factors)
    return (out, lse) if return_lse else out


class _Flash(torch.autograd.Function):
    """The forward returns the given (out, lse). The backward gives the gradients of logits, sink (H,) and values by the flash
    formula."""

    @staticmethod
    def forward(ctx, s, sink, value, out, lse, factors):
        ctx.save_for_backward(s, sink, value, out, lse, factors)
        return out.clone(), lse.clone()

    @staticmethod
    def backward(ctx, do, dlse):
        s, sink, value, out, lse, factors = ctx.saved_tensors
        dead = lse == -math.inf
        both = torch.cat([s, sink[:, None, None].expand(*s.shape[:3], 1)], -1)
        p, p_sink = torch.softmax(both, -1).masked_fill(dead[..., None], 0.0).split([s.shape[-1], 1], -1)
        delta = ((out * do).sum(-1) - dlse).masked_fill(dead, 0.0)
        dropped = p if factors is None else p * factors
        dp = do @ value.mT
        ds = p * ((dp if factors is None else dp * factors) - delta[..., None])
        return ds, -(p_sink.squeeze(-1) * delta).sum((0, 2)), dropped.mT @ do, None, None, None
