"""Hugging Face transformers' masks: which keys a query sees, told by a band and only written out where that can't tell."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType

import torch
from torch import Tensor

from tfkern import compat


@dataclass(frozen=True)
class Band:
    """What tfkern.attention takes for a mask. `keys`: only so many of the keys are there yet. `packed`: within each of the
    sequences that lie behind each other, whose starts the band doesn't know."""

    left: int | None = None
    right: int | None = None
    alignment: str = "upper_left"
    keys: int | None = None
    key_lengths: Tensor | None = None  # (B,)
    padding: Tensor | None = None  # (B, 1, 1, Nk) bool, True = attend
    packed: bool = False


class BandMask(Tensor):
    """A mask (B, 1, Nq, Nk) in the form of eager attention, 0 = attend and the dtype's lowest number = hidden, that has no
    elements: `band` tells them, and they are written out for the first operation that wants them. Whoever adds it to scores
    gets what eager attention would, whether or not attention is tfkern's there."""

    __torch_function__ = compat.no_torch_function

    @staticmethod
    def __new__(
        cls, band: Band | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, write: Callable[[], Tensor]
    ):
        mask = compat.wrapper(cls, shape, dtype, device)
        mask.band, mask._write, mask._seen, mask._written = band, write, None, None
        return mask

    def seen(self) -> Tensor:
        """The mask as tfkern takes it, made once: bool, True = attend."""
        if self._seen is None:
            self._seen = self._write()
        return self._seen

    def written(self) -> Tensor:
        """The mask as an ordinary tensor, made once."""
        if self._written is None:
            self._written = _added(self.seen(), self.dtype)
        return self._written

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def write(x):
            if not isinstance(x, BandMask):
                return x
            written = x.written()
            if compat.mutates(func):
                x.band, x._seen = None, written  # the band tells no longer what is in the tensor
            return written

        args, kwargs = compat.mapped(write, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **kwargs) -> str:
        return f"BandMask({tuple(self.shape)}, {self.dtype}, {self.band})"


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0, mask_function=None,
    attention_mask: Tensor | None = None, local_size: int | None = None, use_vmap: bool = False, device="cpu",
    dtype: torch.dtype = torch.float32, **kwargs,
) -> Tensor:  # fmt: skip
    """What transformers calls to make a mask: a BandMask, with its elements where no band can tell them; under tracing the
    tensor that a BandMask stands for (with no more elements than there are keys, where padding is all it tells).

    Args:
        batch_size, q_length, kv_length: B, Nq, Nk; the result is (B, 1, Nq, Nk).
        q_offset, kv_offset: positions of the first query and the first key. A static cache's q_offset is a tensor.
        mask_function: tells from (b, h, position of the query, position of the key) whether it is seen.
        attention_mask: (B, length) bool, False where positions are padding; what it doesn't reach is padding.
        local_size: the sliding window or the size of chunks, if there is one.
        dtype: the model's.

    Never None: then a module's `is_causal` would have to tell what is seen.
    """
    theirs = sys.modules["transformers.masking_utils"]  # who calls; PyTorch 2.11's Dynamo can't import from transformers itself
    from transformers.utils.import_utils import is_tracing

    mask_function = theirs.causal_mask_function if mask_function is None else mask_function
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # the cache counts on in the same tensor
    write = functools.partial(
        theirs.sdpa_mask, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
        **kwargs | dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False), use_vmap=use_vmap, device=device,
    )  # fmt: skip
    if torch.compiler.is_compiling() and mask_function is theirs.bidirectional_mask_function and _plain(attention_mask):
        return _for_all_queries(batch_size, q_length, kv_length, kv_offset, attention_mask, dtype, device)
    if is_tracing(attention_mask) or not compat.WRAPPERS:
        return _added(write(), dtype)
    found = None if use_vmap else _edges(theirs, mask_function, local_size)
    band = None if found is None else _band(found, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
    mask = BandMask(band, (batch_size, 1, q_length, kv_length), dtype, torch.device(device), write)
    if band is None:
        mask.seen()  # now: what the function looks at may change
    return mask


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _edges(theirs, mask_function, local_size: int | None) -> tuple[int | None, int | None, bool] | None:
    """(left, right, packed) of a function of positions, if it is one that a band can tell."""
    forms = [(theirs.bidirectional_mask_function, None, None), (theirs.causal_mask_function, None, 0)]
    if local_size is not None:
        forms.append((theirs.sliding_window_causal_mask_function(local_size), local_size - 1, 0))
        forms.append((theirs.sliding_window_bidirectional_mask_function(local_size), local_size, local_size))
    anything = torch.empty(0)
    for function, left, right in forms:
        if _same(mask_function, function):
            return left, right, False
        if _same(mask_function, theirs.packed_sequence_compatibility_function(function, anything, anything)):
            return left, right, True
    return None


def _same(a, b) -> bool:
    """Whether two functions do the same because they have the same code and hold the same. b's tensors stand for any."""
    if isinstance(b, Tensor):
        return isinstance(a, Tensor)
    if type(a) is not type(b):
        return False
    if isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(b, FunctionType):
        return a is b or (isinstance(b, int) and a == b)
    if a.__code__ is not b.__code__ or a.__defaults__ != b.__defaults__:
        return False
    return _same(*(tuple(cell.cell_contents for cell in f.__closure__ or ()) for f in (a, b)))


def _band(edges, batch: int, n_q: int, n_k: int, q_offset, kv_offset, attention_mask, device) -> Band | None:
    """The band, if one can tell where queries and keys stand and which keys are padding."""
    if not _plain(attention_mask):
        return None
    left, right, packed = edges
    band = Band(left, right, packed=packed)
    if left is not None or right is not None:
        band = _aligned(band, batch, n_q, n_k, q_offset, kv_offset, device)
    if band is None or attention_mask is None:
        return band
    return _padded(band, _padding(attention_mask, n_k, kv_offset, device)[:, : band.keys])


def _for_all_queries(
    batch: int, n_q: int, n_k: int, kv_offset: int, attention_mask: Tensor | None, dtype: torch.dtype, device
) -> Tensor:
    """The mask of a function that hides nothing, with nothing stored for each query."""
    if attention_mask is None:
        return torch.zeros((), dtype=dtype, device=device).expand(batch, 1, n_q, n_k)
    padding = _added(_padding(attention_mask, n_k, kv_offset, device), dtype)
    return padding[:, None, None].expand(batch, 1, n_q, n_k)


def _plain(attention_mask: Tensor | None) -> bool:
    return attention_mask is None or (attention_mask.dim() == 2 and attention_mask.dtype == torch.bool)


def _padding(attention_mask: Tensor, n_k: int, kv_offset: int, device) -> Tensor:
    """(B, Nk), False where a key is padding."""
    padding = attention_mask[:, kv_offset : kv_offset + n_k].to(device)
    return torch.nn.functional.pad(padding, (0, n_k - padding.shape[1]))


def _aligned(band: Band, batch: int, n_q: int, n_k: int, q_offset, kv_offset: int, device) -> Band | None:
    """The band with where it stands."""
    if isinstance(q_offset, Tensor):  # a static cache: it alone knows how many keys are there
        if q_offset.numel() != 1 or kv_offset != 0 or band.right != 0:
            return None
        lengths = (q_offset.reshape(1) + n_q).expand(batch).to(device)
        return replace(band, alignment="lower_right", key_lengths=lengths)
    if q_offset == kv_offset:
        return band
    keys = q_offset + n_q - kv_offset
    if not 0 < keys <= n_k or (keys < n_k and band.right != 0):  # what is behind the last query can only be cut if unseen
        return None
    return replace(band, alignment="lower_right", keys=keys if keys < n_k else None)


def _padded(band: Band, padding: Tensor) -> Band:
    """The band with the padding (B, Nk): nothing, lengths, or a mask."""
    there = padding.sum(-1)
    at_the_end = padding == (torch.arange(padding.shape[1], device=padding.device) < there[:, None])
    whole = there == (padding.shape[1] if band.key_lengths is None else band.key_lengths)
    at_the_end, whole = torch.stack([at_the_end.all(), whole.all()]).tolist()  # one wait for the device, not two
    if at_the_end and whole:
        return band
    if at_the_end and band.alignment == "upper_left":
        return replace(band, key_lengths=there)
    return replace(band, padding=padding[:, None, None])
