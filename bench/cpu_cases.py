"""What `tfkern bench cpu` times: one kind of attention at a time, by tfkern, by F.scaled_dot_product_attention with the mask
that the problem needs, by the naive formula, and forward by compiled FlexAttention.

All masks that PyTorch needs are made before the clock starts; tfkern gets the problem as its user has it.
"""

import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import tfkern
from tfkern import reference

HEADS, DIM, WINDOW, CAP, DROPPED = 12, 64, 64, 20.0, 0.1
GROUP = 3  # query heads of a key head in the case "grouped heads"
SHORT = 16  # tokens of a sequence in the case "short, packed"
NAIVE_BYTES = 3 * 2**30  # of scores
TOO_LARGE = "its scores would take more than 3 GiB"


def as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass
class Provider:
    """A function of tensors that may have gradients, and those; `padded` brings results to (B, H, N, ...), as the truth is."""

    function: Callable
    leaves: list[Tensor]
    padded: Callable = as_it_is


@dataclass
class Task:
    """A problem. `truth` is the naive formula, of the leaves (B, H, N, D). `rows` (B, 1, N, 1) are those that count, where a
    batch is padded. What is random is not `exact`: it can't be held against one truth."""

    providers: dict[str, Provider | str]  # a text is the reason why there is none
    leaves: list[Tensor]
    truth: Callable
    rows: Tensor | None = None
    exact: bool = True

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.leaves[0].shape[1] // self.leaves[1].shape[1]


def batch_of(length: int) -> int:
    return 2 if length <= 2048 else 1


def task(name: str, length: int, dtype: torch.dtype) -> Task:
    """The case of that name."""
    generator = torch.Generator().manual_seed(0)
    shape = batch_of(length), HEADS, length, DIM
    if name == "short, packed":
        shape = max(1, shape[0] * length // SHORT), HEADS, SHORT, DIM
    leaves = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    if name == "grouped heads":
        leaves[1:] = (x[:, : HEADS // GROUP].contiguous() for x in leaves[1:])
    own, mask = CASES[name](length, dtype, generator)
    if name == "packed":
        return _packed(leaves, _lengths(length), mask)
    if name == "short, packed":
        return _packed(leaves, torch.full((shape[0],), SHORT), None)
    more = {key: own[key] for key in ("softcap", "sinks", "dropout_p") if key in own}
    if name == "bias with gradient":
        leaves, own, mask = [*leaves, mask], {}, None
    functions: dict[str, Callable | str] = {"tfkern": functools.partial(tfkern.attention, **own)}
    options = dict(is_causal=True) if name == "causal" else dict(enable_gqa=True) if name == "grouped heads" else {}
    if mask is not None and not options:
        options = dict(attn_mask=mask)
    functions["sdpa"] = functools.partial(F.scaled_dot_product_attention, **options, **more)
    if "softcap" in own or "sinks" in own:
        functions["sdpa"] = f"F.scaled_dot_product_attention has no {next(iter(more))}"
    functions["naive"] = functools.partial(naive, **({} if mask is None else dict(mask=mask)), **more)
    if shape[0] * HEADS * length**2 * dtype.itemsize > NAIVE_BYTES:
        functions["naive"] = TOO_LARGE
    functions["flex"] = flex(name, length, own)
    truth = functools.partial(reference.attention, **{key: x for key, x in own.items() if key != "dropout_p"})
    providers = {key: x if isinstance(x, str) else Provider(x, leaves) for key, x in functions.items()}
    return Task(providers, leaves, truth, exact="dropout_p" not in own)


def _packed(leaves: list[Tensor], lengths: Tensor, mask: Tensor) -> Task:
    """Sequences behind each other for tfkern; the others get them padded, with a mask of keys if there is padding."""
    ends = F.pad(lengths.cumsum(0), (1, 0))
    seen = torch.arange(leaves[0].shape[2]) < lengths[:, None]
    own = [x.transpose(1, 2)[seen] for x in leaves]

    def padded(x: Tensor) -> Tensor:
        whole = x.new_zeros(*seen.shape, *x.shape[1:])
        whole[seen] = x
        return whole.transpose(1, 2)

    ours = functools.partial(tfkern.attention_varlen, cu_seqlens_q=ends, cu_seqlens_k=ends)
    providers = {
        "tfkern": Provider(ours, own, padded),
        "sdpa": Provider(functools.partial(F.scaled_dot_product_attention, attn_mask=mask), leaves),
        "naive": Provider(functools.partial(naive, mask=mask), leaves),
    }
    if leaves[0].numel() // DIM * leaves[0].shape[2] * leaves[0].dtype.itemsize > NAIVE_BYTES:
        providers["naive"] = TOO_LARGE
    truth = functools.partial(reference.attention, attn_mask=mask)
    return Task(providers, leaves, truth, rows=seen[:, None, :, None])


def naive(q: Tensor, k: Tensor, v: Tensor, mask=None, softcap=None, sinks=None, dropout_p=0.0) -> Tensor:
    """The formula written out, in the dtype of q."""
    k, v = (x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * (1 / math.sqrt(q.shape[-1]))
    if softcap is not None:
        s = torch.tanh(s / softcap) * softcap
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)
    weights = torch.softmax(s, -1)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout_p) @ v


def _places(length: int) -> tuple[Tensor, Tensor]:
    return torch.arange(length)[:, None], torch.arange(length)


def _lengths(length: int) -> Tensor:
    """Lengths by which half of the last row is padding."""
    lengths = torch.full((batch_of(length),), length)
    lengths[-1] = max(1, length // 2)
    return lengths


def _full(length, dtype, generator):
    return {}, None


def _causal(length, dtype, generator):
    i, j = _places(length)
    return dict(is_causal=True), j <= i


def _padding(length, dtype, generator):
    lengths = _lengths(length)
    return dict(key_lengths=lengths), (torch.arange(length) < lengths[:, None])[:, None, None]


def _mask(length, dtype, generator):
    mask = _padding(length, dtype, generator)[1]
    return dict(attn_mask=mask), mask


def _window(length, dtype, generator):
    i, j = _places(length)
    return dict(window=(WINDOW, WINDOW)), (i - j).abs() <= WINDOW


def _bias(length, dtype, generator):
    bias = torch.randn(1, HEADS, length, length, generator=generator).to(dtype)
    return dict(attn_mask=bias), bias


def _alibi(length, dtype, generator):
    i, j = _places(length)
    slopes = 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS)
    return dict(alibi_slopes=slopes), (-(i - j).abs() * slopes[:, None, None])[None].to(dtype)


def _softcap(length, dtype, generator):
    return dict(softcap=CAP), None


def _grouped(length, dtype, generator):
    return dict(enable_gqa=True), None


def _dropout(length, dtype, generator):
    return dict(dropout_p=DROPPED), None


def _sinks(length, dtype, generator):
    return dict(sinks=torch.randn(HEADS, generator=generator)), None


CASES = {
    "full": _full, "causal": _causal, "padding": _padding, "padding mask": _mask, "packed": _padding,
    "short, packed": _full, "grouped heads": _grouped, "window": _window, "bias": _bias,
    "bias with gradient": _bias, "ALiBi": _alibi, "softcap": _softcap, "dropout": _dropout, "sinks": _sinks,
}  # fmt: skip


def flex(name: str, length: int, own: dict) -> Callable | str:
    """Compiled FlexAttention, or the reason why it can't run."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "no C++ compiler was found"
    if name in ("padding mask", "bias", "bias with gradient", "dropout", "sinks", "padding", "packed", "grouped heads"):
        return "not written for FlexAttention here"
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mods = {
        "ALiBi": lambda s, b, h, i, j: s - own["alibi_slopes"][h] * (i - j).abs(),
        "softcap": lambda s, b, h, i, j: CAP * torch.tanh(s / CAP),
    }
    masks = {"causal": lambda b, h, i, j: i >= j, "window": lambda b, h, i, j: (i - j).abs() <= WINDOW}
    block = create_block_mask(masks[name], None, None, length, length, device="cpu") if name in masks else None
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return functools.partial(compiled, score_mod=mods.get(name), block_mask=block)
