"""torch.nn.MultiheadAttention with tfkern's attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfkern import tracing
from tfkern.functional import attention, attention_packed


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: its arguments, parameters, state dict, results and types of errors.

    With need_weights=False, tfkern attends. Boolean masks stay boolean and are not expanded. Without padding the is_causal hint
    skips the keys that it hides. Self-attention reads its three projections from one tensor, without a copy. With
    need_weights=True (PyTorch's default) N x N weights of each head have to be written. That is left to PyTorch, with no gain.

    Dropout draws other random bits than PyTorch's, from the same generator. A query that sees no key gets an attention of 0
    with need_weights=False, and NaN with weights, both as PyTorch's. Nested tensors work where they do in PyTorch: on the
    fused inference path of torch.nn.MultiheadAttention.

    `MultiheadAttention.from_torch(module)` makes one that shares the parameters of a torch.nn.MultiheadAttention.

    Raises: AssertionError and RuntimeError where PyTorch does.

    Source: Vaswani et al., "Attention Is All You Need" (2017); the contract is PyTorch 2.13's.
    """

    __prepare_scriptable__ = tracing.unscriptable

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> "MultiheadAttention":
        """A layer with the parameters, output projection, hooks and mode of `module`; parameters are shared, not copied.

        Raises TypeError if it is none.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"module must be a torch.nn.MultiheadAttention, but is {type(module).__name__}")
        new = cls.__new__(cls)
        new.__dict__.update({name: x.copy() if isinstance(x, dict) else x for name, x in vars(module).items()})
        return new

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(output, weights), the weights None unless need_weights. All as in torch.nn.MultiheadAttention.

        Args:
            query: (L, N, E), with batch_first (N, L, E), or without batch (L, E).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S,). bool: True = ignore; float: added to the scores.
            attn_mask: (L, S) or (N * num_heads, L, S). bool: True = ignore; float: added to the scores, differentiable.
            is_causal: says that attn_mask, which must be there, is the causal mask and nothing else. Without key_padding_mask
                the mask is not looked at then, in inference either.
        """
        given = query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        changed_back = not isinstance(self, MultiheadAttention)  # by tfkern.unpatch, while a caller kept the bound method
        if tracing.proxied(*given):
            return tracing.leaf(self, *given)
        if changed_back or need_weights or tracing.pytorchs(query, key, value) or any(x.is_nested for x in given[:3]):
            return nn.MultiheadAttention.forward(self, *given)
        self._check(query, key, value)
        self._check_masks(query, key, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        if not batched:
            key_is_query, value_is_key = key is query, value is key  # equal tensors stay one tensor
            query = query.unsqueeze(0)
            key = query if key_is_query else key.unsqueeze(0)
            value = key if value_is_key else value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        seq_first = batched and not self.batch_first
        mask, is_causal = self._masked(attn_mask, key_padding_mask, is_causal, query, key, seq_first)
        out = self._attended(query, key, value, mask, is_causal, seq_first)
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        return out if batched else out.squeeze(0), None

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """PyTorch's errors for inputs that don't fit the layer or each other."""
        dims = query.dim()
        if dims not in (2, 3):
            raise AssertionError(
                f"query should be unbatched 2D or batched 3D tensor but received {dims}-D query tensor, {tuple(query.shape)}"
            )
        if {key.dim(), value.dim()} != {dims}:
            raise AssertionError(
                f"For {_batchedness(query)} `query`, expected `key` and `value` to be {dims}-D but found {key.dim()}-D and "
                f"{value.dim()}-D tensors respectively"
            )
        own = not self._qkv_same_embed_dim
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]} in query")
        for name, x, width in (("key", key, self.kdim), ("value", value, self.vdim)):
            if own and x.shape[-1] != width:
                weights = f"({self.embed_dim}, {x.shape[-1]}), but got {torch.Size((self.embed_dim, width))}"
                raise AssertionError(f"expecting {name} weights shape of {weights}: {name}'s last dim must be {width}")
        if own and key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}; value must fit key"
            )
        if not own and key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}; value must fit key")

    def _check_masks(self, query: Tensor, key: Tensor, key_padding_mask, attn_mask, is_causal: bool) -> None:
        """PyTorch's errors for masks that can't be right whatever the batch."""
        masks = (("key_padding_mask", key_padding_mask, (query.dim() - 1,)), ("attn_mask", attn_mask, (2, 3)))
        for name, x, dims in masks:
            if x is not None and x.dtype != torch.bool and not x.is_floating_point():
                raise AssertionError(
                    f"only bool and floating types of {name} are supported, but it is {x.dtype}; convert it (True = ignore)"
                )
            if x is not None and x.dim() not in dims:
                wanted = " or ".join(f"{n}-D" for n in dims)
                raise AssertionError(
                    f"For {_batchedness(query)} `query`, expected `{name}` to be `None`{',' * (len(dims) > 1)} "
                    f"{'or ' * (len(dims) == 1)}{wanted} but found {x.dim()}-D tensor instead, {tuple(x.shape)}"
                )
        unbatched = (self.num_heads, query.shape[0], key.shape[0])
        if query.dim() == 2 and attn_mask is not None and attn_mask.dim() == 3 and tuple(attn_mask.shape) != unbatched:
            raise AssertionError(f"Expected `attn_mask` shape to be {unbatched} but got {attn_mask.shape}: (num_heads, L, S)")
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. attn_mask must be the causal mask then, but is None"
            )

    def _masked(self, attn_mask, key_padding_mask, is_causal: bool, query, key, seq_first: bool) -> tuple[Tensor | None, bool]:
        """The arguments (mask, is_causal) of tfkern.attention for the masks."""
        if is_causal and key_padding_mask is None:  # as in PyTorch: with padding the mask counts, not the hint
            return None, True
        batch, n_q, n_k = query.shape[seq_first], query.shape[1 - seq_first], key.shape[1 - seq_first]
        mask = self._mask(attn_mask, key_padding_mask, (batch, n_q, n_k), query.dtype)
        appended = (self.bias_k is not None) + self.add_zero_attn
        if mask is not None and appended:  # the appended keys are visible to every query
            mask = F.pad(mask, (0, appended), value=mask.dtype == torch.bool)
        return mask, False

    def _mask(self, attn_mask, key_padding_mask, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor | None:
        """Both as one mask for tfkern.attention: bool (True = attend) if both are, else float."""
        batch, n_q, n_k = shape
        masks = []
        if attn_mask is not None:
            wanted = shape[1:] if attn_mask.dim() == 2 else (batch * self.num_heads, n_q, n_k)
            if tuple(attn_mask.shape) != wanted:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {wanted}."
                )
            masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(batch, self.num_heads, n_q, n_k))
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (batch, n_k):
                at = int(key_padding_mask.shape[0] == batch)
                raise AssertionError(
                    f"Expected key_padded_mask.shape[{at}] to be {(batch, n_k)[at]}, but got {key_padding_mask.shape[at]}: "
                    f"key_padding_mask must be (N, S), {(batch, n_k)}"
                )
            masks.append(key_padding_mask[:, None, None])
        if not masks:
            return None
        if all(mask.dtype == torch.bool for mask in masks):
            return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
        masks = [_added(mask, dtype) for mask in masks]
        mask = masks[0] if len(masks) == 1 else masks[0] + masks[1]
        cast = torch.is_autocast_enabled(mask.device.type) and mask.dtype != torch.float64
        if mask.dtype not in (torch.float32, dtype) and not cast:
            raise RuntimeError(
                "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: "
                f"{mask.dtype} and  query.dtype: {dtype} instead; convert it"
            )
        return mask

    def _attended(self, query, key, value, mask, is_causal: bool, seq_first: bool) -> Tensor:
        """The outputs of the heads, concatenated, (N, L, E) or (L, N, E)."""
        dropout_p = self.dropout if self.training else 0.0
        if query is key and key is value and self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn:
            qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))
            out = attention_packed(qkv.transpose(0, 1) if seq_first else qkv, mask, dropout_p, is_causal)  # (N, L, H, D)
        else:
            q, k, v = self._projected(query, key, value, seq_first)
            out = attention(q, *self._appended(k, v), mask, dropout_p, is_causal).transpose(1, 2)
        return (out.transpose(0, 1) if seq_first else out).flatten(2)

    def _projected(self, query, key, value, seq_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (N, H, length, D), views of the projections."""
        if query.shape[seq_first] != key.shape[seq_first]:
            raise RuntimeError(
                f"key must have the batch size of query, {query.shape[seq_first]}, but has shape {tuple(key.shape)}"
            )
        bias = self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        if key is value and self._qkv_same_embed_dim:
            width = self.embed_dim
            kv = F.linear(key, self.in_proj_weight[width:], None if bias is None else bias[width:])
            projections = (F.linear(query, weights[0], biases[0]), *kv.chunk(2, -1))
        else:
            projections = (F.linear(*x) for x in zip((query, key, value), weights, biases, strict=True))
        order = (1, 2, 0, 3) if seq_first else (0, 2, 1, 3)
        return tuple(x.unflatten(-1, (self.num_heads, self.head_dim)).permute(order) for x in projections)

    def _appended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v with bias_k and bias_v, and with a key and value of zeros, where the layer has them."""
        if self.bias_k is not None:
            biases = (
                x.view(1, self.num_heads, 1, self.head_dim).expand(k.shape[0], -1, -1, -1) for x in (self.bias_k, self.bias_v)
            )
            k, v = (torch.cat([x, bias], 2) for x, bias in zip((k, v), biases, strict=True))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return k, v


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (True = ignore) as one to add to scores; a float mask as it is."""
    return mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _batchedness(query: Tensor) -> str:
    return "batched (3-D)" if query.dim() == 3 else "unbatched (2-D)"
