"""DTensors whose batch or heads are sharded: each rank attends to what it has, and nothing is communicated."""

import sys

from torch import Tensor


def attention(function, query, key, value, attn_mask=None, *args, enable_gqa: bool = False, **options) -> Tensor | None:
    """`function`, which is scaled_dot_product_attention, of each rank's part: a DTensor placed as query.

    None where none of them is a DTensor, or a rank hasn't all that its part needs, on a GPU: PyTorch's operator has rules for
    its kernels there. On a CPU it has none, and may search for minutes: NotImplementedError.
    """
    module = sys.modules.get("torch.distributed.tensor")  # whoever has a DTensor has imported it
    given = (query, key, value, attn_mask)
    if module is None or not any(isinstance(x, module.DTensor) for x in given):
        return None
    if reason := _cut_apart(module, query, key, value, enable_gqa) or _mask_cut_apart(module, query, attn_mask):
        if query.device.type == "cuda":
            return None
        raise NotImplementedError(f"{reason}; redistribute() it so, or attend to its full_tensor()")
    parts = [x.to_local(grad_placements=x.placements) for x in given[:3]]
    if isinstance(attn_mask, module.DTensor):
        pairs = zip(query.placements, attn_mask.placements, strict=True)
        # Of a mask that several ranks have whole, each has the gradient of its own scores.
        summed = [module.Partial() if q.is_shard() and m.is_replicate() else m for q, m in pairs]
        attn_mask = attn_mask.to_local(grad_placements=summed)
    out = function(*parts, attn_mask, *args, enable_gqa=enable_gqa, **options)
    shape = query.shape[:-1] + value.shape[-1:]
    return module.DTensor.from_local(
        out, query.device_mesh, query.placements, run_check=False, shape=shape, stride=_strides(out, shape)
    )


def _cut_apart(module, query, key, value, enable_gqa: bool) -> str | None:
    """Why the three aren't cut at the same places, before their last two dims."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, module.DTensor):
            return f"{name} must be a DTensor, as another one is, but is {type(x).__name__}"
        if x.device_mesh != query.device_mesh or x.placements != query.placements or x.dim() != query.dim():
            return f"{name} must have the dims, mesh and placements of query, {query.placements}, but has {x.placements}"
    for n, placement in enumerate(query.placements):
        whole = type(placement) is module.Replicate
        if not whole and not (type(placement) is module.Shard and placement.dim < query.dim() - 2):
            return f"query, key and value must be replicated or sharded along batch or heads, but are placed as {placement}"
        sizes = set() if whole else {x.shape[placement.dim] for x in (query, key, value)}
        grouped = enable_gqa and not whole and placement.dim == query.dim() - 3
        if len(sizes) > 1 and not (grouped and all(size % query.device_mesh.size(n) == 0 for size in sizes)):
            return f"query, key and value must be cut alike along dim {placement.dim}, but have {sizes} there"
    return None


def _mask_cut_apart(module, query, attn_mask) -> str | None:
    """Why a rank hasn't of the mask what its scores need. (A CausalBias is no DTensor, and everybody's.)"""
    if attn_mask is None or hasattr(attn_mask, "variant"):
        return None
    if not isinstance(attn_mask, module.DTensor) or attn_mask.device_mesh != query.device_mesh:
        return "attn_mask must be a DTensor of query's mesh"
    for q, m in zip(query.placements, attn_mask.placements, strict=True):
        dim = attn_mask.dim() - query.dim() + q.dim if q.is_shard() else -1
        cut = dim >= 0 and attn_mask.shape[dim] > 1
        if not (m.is_shard(dim) if cut else m.is_replicate()):
            wanted = f"sharded along dim {dim}" if cut else "replicated"
            return f"attn_mask must be {wanted} where query is {q}, but is {m}"
    return None


def _strides(out: Tensor, shape) -> tuple[int, ...]:
    """Of the whole, in the memory order of a part."""
    order = sorted(range(out.dim()), key=lambda dim: (-out.stride(dim), dim))
    strides, step = [0] * out.dim(), 1
    for dim in reversed(order):
        strides[dim], step = step, step * shape[dim]
    return tuple(strides)
