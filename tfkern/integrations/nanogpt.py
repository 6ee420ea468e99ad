"""nanoGPT and minGPT: their CausalSelfAttention, and any that is like it for tfkern.patch(model)."""

import copy
import inspect

import torch
from torch import Tensor, nn

from tfkern import compat, tracing
from tfkern.functional import attention_packed
from tfkern.integrations.adapters import Adapter, full_name, register
from tfkern.integrations.torch_sdpa import PYTORCHS

_WAS = "_tfkern_class"  # in a changed module's __dict__: the class it had
_CHILDREN = {"c_attn", "c_proj", "attn_dropout", "resid_dropout"}
_MASKS = ("bias", "masked_bias")  # buffers with the causal mask, of some versions


class CausalSelfAttention(compat.Loading):
    """The causal self-attention of nanoGPT and minGPT with tfkern's attention: their names of parameters, `c_attn` and
    `c_proj`, so that their state dicts load. The buffer `bias` that some of theirs hold, the causal mask, is not loaded.

    In nanoGPT's model.py: `from tfkern.integrations.nanogpt import CausalSelfAttention` in place of its own class.

    Args:
        config: an object with n_embd, a multiple of n_head; and, if there are any, bias (whether the projections have one,
            True if there is none), dropout (nanoGPT's), or attn_pdrop and resid_pdrop (minGPT's).

    Raises: ValueError where n_embd isn't a multiple of n_head.

    Source: the interface of nanoGPT's and minGPT's layer.
    """

    __prepare_scriptable__ = tracing.unscriptable

    def __init__(self, config):
        super().__init__()
        if config.n_head < 1 or config.n_embd % config.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, but they are {config.n_embd} and {config.n_head}")
        bias, dropout = bool(getattr(config, "bias", True)), getattr(config, "dropout", 0.0)
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=bias)
        self.attn_dropout = nn.Dropout(getattr(config, "attn_pdrop", dropout))
        self.resid_dropout = nn.Dropout(getattr(config, "resid_pdrop", dropout))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, n_embd) -> (B, T, n_embd); position i sees positions j <= i."""
        if not isinstance(self, CausalSelfAttention):  # changed back, and called by who kept the bound method
            return type(self).forward(self, x)
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, self.n_embd // self.n_head))
        dropout_p = self.attn_dropout.p if self.training else 0.0
        if tracing.pytorchs(x):
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = PYTORCHS(q, k, v, None, dropout_p, True).transpose(1, 2)
        else:
            y = attention_packed(qkv, None, dropout_p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.flatten(2)))

    def before_loading(self, state_dict: dict, prefix: str) -> None:
        kept = dict(self.named_buffers(recurse=False))
        for name in _MASKS:
            if name not in kept:
                state_dict.pop(prefix + name, None)


def _looks_like_it(module: nn.Module) -> bool:
    """By names, as there is no package that these classes come from."""
    return (
        type(module).__name__ == "CausalSelfAttention"
        and type(module) is not CausalSelfAttention
        and isinstance(getattr(module, "c_attn", None), nn.Linear)
        and isinstance(getattr(module, "c_proj", None), nn.Linear)
        and all(isinstance(getattr(module, name, None), int) for name in ("n_head", "n_embd"))
    )


def _unsupported(module: nn.Module) -> str | None:
    """Whether it does what ours does: its parts are those, and for a few numbers it gives the same."""
    name = full_name(type(module))
    children, buffers, parameters = (
        dict(found)
        for found in (module.named_children(), module.named_buffers(recurse=False), module.named_parameters(recurse=False))
    )
    if set(children) != _CHILDREN or parameters or not set(buffers) <= set(_MASKS):
        extra = (set(children) ^ _CHILDREN) | set(parameters) | (set(buffers) - set(_MASKS))
        return f"{name} differs from nanoGPT's in {', '.join(sorted(extra))}"
    if not all(isinstance(children[part], nn.Dropout) for part in ("attn_dropout", "resid_dropout")):
        return f"{name} has other layers of dropout than nanoGPT's"
    if list(inspect.signature(type(module).forward).parameters) != ["self", "x"]:
        return f"{name}'s forward takes other arguments than x"
    if _watched(module):
        return f"{name} writes its weights out: its flash is False, or attn_dropout has hooks, which would see nothing"
    if module.c_attn.weight.is_meta:
        return f"{name} has no weights yet, and without them nobody can see that it does what nanoGPT's does"
    return _tried(module, name)


def _watched(module: nn.Module) -> bool:
    """Whether someone wants the weights to go through attn_dropout: by nanoGPT's switch, or by hooks where it always does."""
    return not module.flash if hasattr(module, "flash") else compat.has_hooks(module.attn_dropout)


def _tried(module: nn.Module, name: str) -> str | None:
    """Whether a copy of the module computes what ours does, for a few numbers; None if so."""
    trial, weight = _bare(module).eval(), module.c_attn.weight
    x = torch.linspace(-1, 1, 3 * weight.shape[1], device=weight.device).sin().view(1, 3, -1).to(weight.dtype)
    with torch.no_grad():
        try:
            theirs = trial(x)
        except Exception as error:
            return f"{name} can't be tried: {error}"
        trial.__class__ = CausalSelfAttention
        ours = trial(x)
    if isinstance(theirs, Tensor) and theirs.shape == ours.shape:
        error, largest = (x.abs().max().item() for x in (theirs - ours, ours))
        if error <= 64 * torch.finfo(weight.dtype).eps * largest:
            return None
    return f"{name} computes something else than nanoGPT's"


def _bare(module: nn.Module) -> nn.Module:
    """A copy without hooks that shares the tensors, so that a trial leaves no trace."""
    bare = copy.copy(module)
    bare.__dict__ = {name: dict(x) if name.startswith("_") and isinstance(x, dict) else x for name, x in vars(module).items()}
    for name, x in bare.__dict__.items():
        if "hooks" in name and isinstance(x, dict):
            x.clear()
    for name, child in module.named_children():
        setattr(bare, name, _bare(child))
    return bare


def _apply(module: nn.Module) -> None:
    module.__dict__[_WAS] = type(module)
    module.__class__ = CausalSelfAttention


def _revert(module: nn.Module) -> None:
    module.__class__ = module.__dict__.pop(_WAS)


register(
    Adapter(
        name="nanoGPT's CausalSelfAttention",
        matches=_looks_like_it,
        unsupported=_unsupported,
        apply=_apply,
        revert=_revert,
        becomes="tfkern.integrations.nanogpt.CausalSelfAttention",
        ours=CausalSelfAttention,
    )
)
