"""The arguments of a call as the caller passes them: its tensors (Inputs) and its options (Options), each named once.

The public functions in functional.py pack their arguments into the two. call.py checks them and derives a Problem and its
Tensors. ops.py derives its schema from Options.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Scale = float | Tensor | None
Window = tuple[int | None, int | None] | None
ScoreMod = tuple[Callable, Callable] | None


class Inputs(NamedTuple):
    """The tensors of a call. Packed sequences have both cu_seqlens. problem.Tensors are the views that backends take."""

    query: Tensor  # (B, H, Nq, D); packed: (total_q, H, D)
    key: Tensor  # (B, Hkv, Nk, D); packed: (total_k, Hkv, D)
    value: Tensor  # (B, Hkv, Nk, Dv); packed: (total_k, Hkv, Dv)
    attn_mask: Tensor | None = None  # broadcasts to (B, H, Nq, Nk), bool or added to the scores
    alibi_slopes: Tensor | None = None  # (H,) or (B, H)
    sinks: Tensor | None = None  # (H,)
    key_lengths: Tensor | None = None  # (B,)
    cu_seqlens_q: Tensor | None = None  # (B + 1,)
    cu_seqlens_k: Tensor | None = None  # (B + 1,)


class Options(NamedTuple):
    """The options of a call, unchecked. Order and defaults are those of tfkern.attention, which documents each in full."""

    dropout_p: float = 0.0  # the probability that a weight is dropped
    is_causal: bool = False  # query i sees keys j <= i + shift only
    scale: Scale = None  # the factor of the scores; None: 1 / sqrt(D)
    enable_gqa: bool = False  # whether several query heads may share a key head
    causal_alignment: str = "upper_left"  # shift is 0; "lower_right": Nk - Nq
    window: Window = None  # (left, right): query i sees keys j with i + shift - left <= j <= i + shift + right
    softcap: float | None = None  # c: scores s become c * tanh(s / c)
    score_mod: ScoreMod = None  # (value, derivative), @triton.jit functions of (score, b, h, i, j)
    precise_delta: bool = False  # whether the backward corrects delta for the rounding of O to 16 bits
