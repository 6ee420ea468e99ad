"""Hugging Face transformers: attn_implementation="tfkern"."""

import contextlib
import functools
import warnings
import weakref

import torch
from torch import Tensor, nn

from tfkern import compat, reference, tracing
from tfkern.call import AUTOCAST
from tfkern.extras import require
from tfkern.functional import attention, attention_varlen
from tfkern.integrations import transformers_masks
from tfkern.integrations.torch_sdpa import PYTORCHS
from tfkern.integrations.transformers_asking import asks, eager_only, tables
from tfkern.integrations.transformers_masks import Band, BandMask

NAME = "tfkern"
# Keywords that reach attention and say nothing about its result; lengths and positions of packed sequences are in the mask.
_SILENT = {
    "cache_position", "deterministic", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "seq_idx", "use_cache",
}  # fmt: skip
_names: set[str] = set()
_calls: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()
_traced: set[type[nn.Module]] = set()  # classes that torch.compile has seen call tfkern
_told: "weakref.WeakSet[nn.Module | type[nn.Module]]" = weakref.WeakSet()


def register(name: str = NAME) -> str:
    """Make `attn_implementation=name` mean tfkern, for models made or loaded from now on and for model.set_attn_implementation.

    Registers both the attention and the masks (without these, transformers would drop padding without a word). A model whose
    attention doesn't ask transformers' AttentionInterface is made as it would be without tfkern, with a UserWarning; one that
    only shows it by not having called tfkern in its first forward pass gets its UserWarning then. For both,
    PreTrainedModel.get_correct_attn_implementation is wrapped. A second call with the same name does nothing.

    What can't be honoured raises NotImplementedError in the forward pass: weights (output_attentions=True, except by GPT-2 and
    OPT, which keep it to themselves and then return none, as with "sdpa"), and keywords that nobody here knows.

    Args:
        name: not one of transformers' own; without "flash", "/" or "|", which mean something else to it.

    Returns name.

    Raises:
        ImportError: transformers is missing.
        ValueError: a name that can't be had.

    Source: the AttentionInterface of transformers 5.23.
    """
    modeling = require("transformers.modeling_utils", "transformers")
    masking = require("transformers.masking_utils", "transformers")
    if name in _names:
        return name
    if not isinstance(name, str) or not name or any(part in name for part in ("flash", "/", "|")):
        raise ValueError(f"name must be a string without 'flash', '/' and '|', which transformers understands, but is {name!r}")
    if name == "eager" or name in modeling.ALL_ATTENTION_FUNCTIONS or name in masking.ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(f"name must be free, but transformers has a {name!r}; take another, such as {NAME!r}")
    modeling.AttentionInterface.register(name, attention_forward)
    masking.AttentionMaskInterface.register(name, transformers_masks.mask)
    if not _names:
        cls = modeling.PreTrainedModel
        cls.get_correct_attn_implementation = _watching(cls.get_correct_attn_implementation)
    _names.add(name)
    return name


def calls(model: nn.Module) -> int:
    """How often the attention modules of `model` have called tfkern, outside of graphs of torch.compile: a number that changes
    with each call would be nothing to compile."""
    return sum(_calls.get(module, 0) for module in model.modules())


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | Tensor | None = None, is_causal: bool | None = None, position_bias: Tensor | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None, indices: Tensor | None = None,
    sinks: Tensor | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls for attention. Not for users.

    Args:
        query, key, value: (B, H, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv), any strides.
        attention_mask: BandMask; bool (True = attend) or float (added), broadcasting to (B, H, Nq, Nk); or None: then
            is_causal, or else the module's attribute (or else True), tells, for more than one query. The attribute is nobody's
            word where all models of the module's file only have eager attention, which sees everything then.
        position_bias: broadcasts to (B, H, Nq, Nk), added, differentiable.
        sliding_window: looked at without a mask only; masks have it in them.
        s_aux: (H,), the sinks, differentiable.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,), where packed sequences start, with B = 1.
        indices: (B, Nq, keys), the only keys that a query may see, beside the mask.
        sinks: (B, H, Nq, 1), a sink of each query's own, differentiable.

    Returns (out (B, Nq, H, Dv), contiguous, None).

    Raises: NotImplementedError for other keywords that are neither None nor False; ValueError for what contradicts itself.
    """
    if torch.compiler.is_compiling():
        _note_traced(type(module))
    else:
        _calls[module] = _calls.get(module, 0) + 1
    _refuse(kwargs)
    packed = cu_seq_lens_q is not None or cu_seq_lens_k is not None
    if indices is not None:
        attention_mask = _chosen(attention_mask, indices, key.shape[2])
    if isinstance(attention_mask, BandMask) and (attention_mask.band is None or (attention_mask.band.packed and not packed)):
        attention_mask = attention_mask.seen()
    if isinstance(attention_mask, BandMask):
        band, mask = attention_mask.band, attention_mask.band.padding
    elif attention_mask is not None:
        band, mask = Band(), attention_mask
    else:
        causal = _is_causal(module) if is_causal is None else is_causal
        band, mask = _unmasked(query.shape[2], key.shape[2], bool(causal), sliding_window, packed), None
    if query.shape[0] == 1 and key.shape[0] > 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    if band.keys is not None:
        key, value = (x[:, :, : band.keys] for x in (key, value))
        position_bias = position_bias[..., : band.keys] if position_bias is not None else None
    mask = _merged(mask, position_bias, query)
    options = dict(
        dropout_p=dropout if module.training else 0.0, scale=scaling, enable_gqa=key.shape[1] != query.shape[1],
        window=(band.left, band.right), causal_alignment=band.alignment, softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    query, key, value, plain = _autocast(query, key, value)
    with plain:
        if packed:
            return _packed(query, key, value, cu_seq_lens_q, cu_seq_lens_k, mask, band, options), None
        attend = _recorded if tracing.pytorchs(query, key, value, mask) else attention
        if sinks is None:
            out = attend(query, key, value, mask, key_lengths=band.key_lengths, **options)
        else:
            out, lse = attend(query, key, value, mask, key_lengths=band.key_lengths, return_lse=True, **options)
            out = out * torch.sigmoid(lse.unsqueeze(-1) - sinks).to(out.dtype)  # what the sink leaves
    return out.transpose(1, 2).contiguous(), None


def _recorded(query, key, value, mask, *, dropout_p, scale, enable_gqa, window, causal_alignment, **features) -> Tensor:
    """For what records PyTorch's operators: its own attention where that has the features, or else all written out."""
    if enable_gqa:  # which not everybody knows of it
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    is_causal = window == (None, 0) and causal_alignment == "upper_left" and mask is None
    if (is_causal or window == (None, None)) and all(x is None for x in features.values()):
        return PYTORCHS(query, key, value, mask, dropout_p, is_causal, scale=scale)
    more = dict(dropout_p=dropout_p, scale=scale, window=window, causal_alignment=causal_alignment)
    return reference.attention(query, key, value, mask, **more, **features)


def _refuse(kwargs: dict) -> None:
    """Raise for what would change the result and isn't known."""
    for name, value in kwargs.items():
        if name in _SILENT or value is None or value is False:
            continue
        if name == "output_attentions":
            raise NotImplementedError(
                "output_attentions=True needs the weights, which fused attention never writes out; use "
                'model.set_attn_implementation("eager") for them'
            )
        raise NotImplementedError(
            f"{name} must be None: tfkern's attention doesn't know this keyword, and without it results might be wrong; use "
            'another attn_implementation for this model, such as "eager"'
        )


def _is_causal(module: nn.Module) -> bool:
    return getattr(module, "is_causal", True) and not eager_only(type(module))


def _chosen(mask: Tensor | None, indices: Tensor, n_k: int) -> Tensor:
    """What `indices` (B, Nq, keys) and the mask let be seen, as a mask of either kind."""
    chosen = indices.new_zeros((*indices.shape[:2], n_k), dtype=torch.bool).scatter(2, indices.long(), True)[:, None]
    if mask is None:
        return chosen
    mask = mask.seen() if isinstance(mask, BandMask) else mask
    if mask.dtype == torch.bool:
        return mask & chosen
    return torch.where(chosen, mask, -torch.inf)


def _unmasked(n_q: int, n_k: int, is_causal: bool, sliding_window: int | None, packed: bool) -> Band:
    """What is seen where there is no mask."""
    is_causal = is_causal and n_q > 1
    if sliding_window is None or (sliding_window >= n_k and not packed):
        return Band(right=0 if is_causal else None)
    if n_q > 1 and n_q != n_k and not packed:
        raise ValueError(
            f"attention_mask must be given where a sliding_window ({sliding_window}) stands between {n_q} queries and {n_k} "
            "keys: it tells how they are aligned"
        )
    return Band(sliding_window - 1, 0 if is_causal or n_q == 1 else sliding_window - 1, "lower_right")


def _merged(mask: Tensor | None, bias: Tensor | None, query: Tensor) -> Tensor | None:
    """Mask and bias as one tensor for tfkern.attention."""
    mask, bias = (_accepted(x, query) for x in (mask, bias))
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _accepted(x: Tensor | None, query: Tensor) -> Tensor | None:
    """A float mask in a dtype that tfkern.attention takes: 16-bit ones that aren't query's become float32."""
    if x is not None and x.dtype in (torch.float16, torch.bfloat16) and x.dtype != query.dtype:
        return x.float()
    return x


def _autocast(query: Tensor, key: Tensor, value: Tensor):
    """The three in the autocast dtype, and a context without autocast, so that biases and sinks keep their precision."""
    kind = query.device.type
    if kind not in AUTOCAST or not torch.is_autocast_enabled(kind) or query.dtype == torch.float64:
        return query, key, value, contextlib.nullcontext()
    dtype = torch.get_autocast_dtype(kind)
    return *(x.to(dtype) for x in (query, key, value)), torch.autocast(kind, enabled=False)


def _packed(query, key, value, cu_q: Tensor | None, cu_k: Tensor | None, mask, band: Band, options: dict) -> Tensor:
    """(1, total, H, Dv) of sequences that lie behind each other."""
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together, but one is None")
    if query.shape[0] != 1:
        raise ValueError(f"query must have a batch of 1 with cu_seq_lens_q, but has shape {tuple(query.shape)}")
    if mask is not None or band.key_lengths is not None or band.keys is not None:
        raise ValueError(
            "attention_mask and position_bias must be None with cu_seq_lens_q, which tell what is seen; drop one of them"
        )
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attention_varlen(query, key, value, cu_q, cu_k, **options).contiguous().unsqueeze(0)


def _watching(original):
    """PreTrainedModel.get_correct_attn_implementation, through which every choice of an attention goes."""

    @functools.wraps(original)
    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        chosen = original(self, requested_attention, *args, **kwargs)
        if chosen not in _names:
            return chosen
        default = original(self, None, *args, **kwargs)
        if not asks(type(self)):
            _tell_of_default(f"{type(self).__name__} doesn't ask transformers' AttentionInterface", chosen, default)
            return default
        for name, table in tables(type(self)):
            if chosen not in table:
                _tell_of_default(f"{type(self).__name__} takes part of its attention from {name}", chosen, default)
                table[chosen] = table.get(default, table["eager"])
        unwatch(self)
        self.register_forward_hook(_tell_if_ignored)
        return chosen

    return get_correct_attn_implementation


def _tell_of_default(why: str, chosen: str, default: str) -> None:
    warnings.warn(
        f"{why}: there attn_implementation={chosen!r} means {default!r}, which this model has without it",
        stacklevel=4,
    )


def unwatch(model: nn.Module) -> None:
    """Take the hook away that looks whether tfkern was called."""
    compat.remove_forward_hook(model, _tell_if_ignored)


def _tell_if_ignored(model: nn.Module, args, output) -> None:
    """After a model's first forward pass: a warning if it has attention and none of it was tfkern's."""
    chosen = model.config._attn_implementation
    if torch.compiler.is_compiling():  # the hook stays: its leaving would be a change for each graph to look out for
        _tell_while_tracing(chosen, *(type(m) for m in model.modules()))
        return
    unwatch(model)
    modules = list(model.modules())
    classes = [type(m) for m in modules]
    if not any(m in _calls or m in _told for m in modules) and _ignored(chosen, classes):
        _told.add(model)
        _tell(chosen, classes)


@compat.while_tracing
def _note_traced(module: type[nn.Module]) -> None:
    """A graph serves all modules of a class, and what was traced for one of them holds for all."""
    _traced.add(module)


@compat.while_tracing
def _tell_while_tracing(chosen: str, *classes: type[nn.Module]) -> None:
    """_tell_if_ignored by the classes of a model and of what is within it."""
    if _told.isdisjoint(classes) and _ignored(chosen, classes):
        _told.add(classes[0])
        _tell(chosen, classes)


def _ignored(chosen: str, classes) -> bool:
    return chosen in _names and _traced.isdisjoint(classes) and any("attention" in c.__name__.lower() for c in classes)


def _tell(chosen: str, classes) -> None:
    warnings.warn(
        f"{classes[0].__name__} ignores attn_implementation={chosen!r}: its attention doesn't ask transformers' "
        "AttentionInterface, and no call reached tfkern; results are right, and not tfkern's",
        stacklevel=3,
    )
