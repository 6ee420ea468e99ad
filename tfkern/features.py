"""Host side of the optional arguments: the tuple that kernels take (kernels/features.py), and gradients of what they leave."""

import torch
from torch import Tensor

from tfkern import dropout, layout
from tfkern.problem import Problem, Tensors


def of(p: Problem, t: Tensors) -> tuple[tuple, tuple]:
    """The optional arguments as kernels/features.py has them, and the tensors among them."""
    from tfkern.kernels import features as device

    if p.plain:
        return device.NONE, ()
    tensors = tuple(x for x in t[3:] if x is not None)

    def mask(x: Tensor | None):
        if x is None:
            return None
        rows, columns = (layout.encode(layout.MANY if n == 1 else n) for n in x.shape[2:])
        return device.Mask(x, layout.mask_strides(x)[1], rows, columns)

    def stepped(x: Tensor) -> list[int]:
        return [layout.encode(s if n > 1 else 0) for s, n in zip(x.stride(), x.shape, strict=True)]

    return device.Features(
        key_lengths=t.key_lengths, cu_q=t.cu_q, cu_k=t.cu_k, scale=t.scale, softcap=p.softcap, mask=mask(t.mask),
        bias=mask(t.bias), slopes=None if t.slopes is None else device.Slopes(t.slopes, *stepped(t.slopes)), sinks=t.sinks,
        dropout=device.Dropout(t.seed, layout.encode(dropout.threshold(p.dropout_p)), dropout.factor(p.dropout_p))
        if p.dropout_p else None,
    ), tensors  # fmt: skip


def mask_vec(t: Tensors) -> int:
    """MASK_VEC of the kernels: what they may assume of the mask's strides."""
    masks = [x for x in (t.mask, t.bias) if x is not None]
    return layout.mask_strides(masks[0])[0] if masks else 0


def plain_memory(p: Problem, t: Tensors) -> Tensors:
    """No lazy negation, and masks as bytes."""
    if any([x is not None and x.is_neg() for x in (t[:3] if p.plain else t)]):
        t = Tensors(*(None if x is None else x.resolve_neg() for x in t))
    return t if t.mask is None else t._replace(mask=t.mask.view(torch.uint8))


def empty_rows(p: Problem) -> Tensor:
    """A number for each row of queries, to be written: (B, H, Nq)."""
    return torch.empty(1 if p.packed else p.batch, p.heads, p.n_q, dtype=torch.float32, device=p.device)


def empty_stats(p: Problem) -> Tensor:
    """What a forward leaves of each row, to be written (problem.py)."""
    return torch.empty(1 if p.packed else p.batch, p.heads, p.stats_rows, p.n_q, dtype=torch.float32, device=p.device)


def slope_sums(p: Problem, t: Tensors, parts: Tensor) -> Tensor:
    """The gradient of the slopes from each query's part (B, H, Nq); each sum has one order."""
    if p.packed and p.batch == 0:
        return torch.zeros_like(t.slopes)
    if p.packed and len(t.slopes) > 1:
        offsets = t.cu_q.long().clamp(0, p.n_q).cummax(0).values  # whatever they hold, a check of them would stop the stream
        sums = torch.segment_reduce(parts[0].T.contiguous(), "sum", offsets=offsets, unsafe=True)
    else:
        sums = parts.sum(-1)
    return sums.sum_to_size(t.slopes.shape).to(t.slopes.dtype)


def sink_sums(sinks: Tensor, stats: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the sinks: a sink is one more logit, whose value is 0, so its dS is P * (0 - delta)."""
    m, log_l = stats[:, :, 0], stats[:, :, 1]
    p = (sinks.float()[:, None] - m).sub_(log_l).exp_()  # [H, 1] - [B, H, Nq]
    return -(p * delta).masked_fill_(log_l == -torch.inf, 0.0).sum((0, 2)).to(sinks.dtype)
