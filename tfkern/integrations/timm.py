"""timm: an attention layer for `attn_layer=`, and for tfkern.patch(model). Imports no timm."""

import sys

import torch
from torch import Tensor, nn

from tfkern.extras import require
from tfkern.functional import attention, attention_packed
from tfkern.integrations.adapters import Adapter, register


class Attention(nn.Module):
    """timm.layers.Attention with tfkern's attention: its arguments, parameters, state dict and results.

    `timm.create_model("vit_base_patch16_224", attn_layer=tfkern.integrations.timm.Attention)` builds a model with it,
    tfkern.patch(model) changes one that is there. Query, key and value are read in place from the one projection, unless
    they are normalised first. Where its attribute `fused_attn` is set to False, the weights are written out and go through
    `attn_drop`, whose hooks see them.

    Args:
        dim: width C of the input.
        num_heads: number of heads.
        attn_head_dim: dim of each, dim / num_heads if None.
        dim_out: width of the output, dim if None.
        qkv_bias, proj_bias: whether these projections have a bias.
        qk_norm: whether norm_layer normalises each head's queries and keys.
        scale_norm: whether norm_layer normalises what the heads bring, before the last projection.
        gated: whether what the heads bring is multiplied by the sigmoid of a projection of the input.
        attn_drop: probability with which attention weights are dropped in training.
        proj_drop: the same for the output.
        norm_layer: makes a normalisation of a width; wanted for qk_norm and scale_norm.
        device, dtype: of the parameters.

    Raises: ValueError where dim isn't a multiple of num_heads, or norm_layer is missing.

    Source: the layer of timm 1.0.31.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, attn_head_dim: int | None = None, dim_out: int | None = None,
        qkv_bias: bool = False, qk_norm: bool = False, scale_norm: bool = False, proj_bias: bool = True, gated: bool = False,
        attn_drop: float = 0.0, proj_drop: float = 0.0, norm_layer=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if attn_head_dim is None and (num_heads < 1 or dim % num_heads):
            raise ValueError(f"dim must be a multiple of num_heads, but they are {dim} and {num_heads}; or give attn_head_dim")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer must be given with qk_norm or scale_norm, but is None")
        made = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **made)
        self.q_norm = norm_layer(self.head_dim, **made) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **made) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **made) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **made) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **made)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, dim) -> (B, N, dim_out).

        Args:
            attn_mask: broadcasts to (B, H, N, N). bool: True = attend; float: added to the scores, differentiable.
            is_causal: position i sees positions j <= i. With attn_mask both hold, where timm takes the one or raises.
        """
        if not isinstance(self, Attention):  # changed back, and called by who kept the bound method
            return type(self).forward(self, x, attn_mask, is_causal)
        dropout_p = self.attn_drop.p if self.training else 0.0
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if self.fused_attn and type(self.q_norm) is type(self.k_norm) is nn.Identity:
            y = attention_packed(qkv, attn_mask, dropout_p, is_causal, self.scale)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = (norm(z).to(v.dtype) for norm, z in ((self.q_norm, q), (self.k_norm, k)))
            if self.fused_attn:
                y = attention(q, k, v, attn_mask, dropout_p, is_causal, self.scale).transpose(1, 2)
            else:
                y = (self.attn_drop(self._weights(q, k, attn_mask, is_causal)) @ v).transpose(1, 2)
        y = self.norm(y.flatten(2))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x))
        return self.proj_drop(self.proj(y))

    def _weights(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """The softmax, (B, H, N, N), written out."""
        scores = (q * self.scale) @ k.mT
        if is_causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1)


def _is_theirs(module: nn.Module) -> bool:
    theirs = sys.modules.get("timm.layers.attention")  # whoever has such a layer has imported it
    return theirs is not None and type(module) is theirs.Attention


def _unsupported(module: nn.Module) -> str | None:
    if module.fused_attn:
        return None
    return "its fused_attn is False, so that hooks on attn_drop may see the weights; set it to True to have it changed"


def _apply(module: nn.Module) -> None:
    module.__class__ = Attention


def _revert(module: nn.Module) -> None:
    module.__class__ = require("timm.layers.attention", "timm").Attention  # a pickled one may have come without timm


register(
    Adapter(
        name="timm.layers.Attention",
        matches=_is_theirs,
        unsupported=_unsupported,
        apply=_apply,
        revert=_revert,
        becomes="tfkern.integrations.timm.Attention",
        ours=Attention,
    )
)
