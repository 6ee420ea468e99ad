"""Recorders of calls, and tensor subclasses that override operators.

torch.compile and torch.export record tfkern's ops (ops.py). The other recorders need PyTorch's own operators:
torch.fx.symbolic_trace, whose tensors are Proxies; torch.jit.trace, whose sizes are tensors; make_fx; torch.onnx.export, with
either of its exporters.
"""

import sys

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from tfkern import compat

_PLAIN = frozenset((Tensor, nn.Parameter, type(None), *compat.PLAIN))
_INHERITED = (Tensor.__torch_function__.__func__, compat.no_torch_function)


def pytorchs(*tensors) -> bool:
    """Whether a call with these tensors must be PyTorch's own operator: a recorder other than torch.compile and torch.export is
    active, or a tensor is foreign."""
    return _recorder() is not None or make_fx() or any(foreign(x) for x in tensors)


def make_fx() -> bool:
    """Whether make_fx is recording. It takes any op."""
    return not torch.compiler.is_compiling() and compat.proxy_mode() is not None


def _plain(x) -> bool:
    """Whether x is an ordinary tensor, or stands for one while torch.compile or torch.export traces."""
    return type(x) in _PLAIN or (not compat.PLAIN and isinstance(x, Tensor) and torch.compiler.is_compiling())


def foreign(x) -> bool:
    """Whether the class of x overrides PyTorch's functions: a Proxy, a MaskedTensor, or a dispatching one."""
    if _plain(x):
        return False
    function = getattr(type(x), "__torch_function__", None)
    if not isinstance(x, Tensor):
        return function is not None
    return not x.is_nested and (dispatching(x) or getattr(function, "__func__", function) not in _INHERITED)


def dispatching(x) -> bool:
    """Whether the class of x overrides operators, as DTensor does. Jagged nested tensors don't count."""
    if _plain(x) or not isinstance(x, Tensor):
        return False
    return type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not x.is_nested


def refuse(name: str, *tensors) -> None:
    """Raise NotImplementedError if a call with these tensors can't be recorded, or one of them overrides operators."""
    if _PLAIN.issuperset(map(type, tensors)) and _recorder() is None:
        return
    if recorder := "torch.fx.symbolic_trace" if proxied(*tensors) else _recorder():
        raise NotImplementedError(
            f"{name} can't be recorded by {recorder}. Call tfkern.scaled_dot_product_attention, which is PyTorch's operator "
            "then, or tfkern.reference.attention, which is made of PyTorch's operators; or use torch.export, or, in torch.fx, "
            "torch.fx.wrap, which records the call as it is"
        )
    if kinds := [type(x).__name__ for x in tensors if dispatching(x)]:
        raise NotImplementedError(
            f"{name} takes no {kinds[0]}. Call tfkern.scaled_dot_product_attention, which takes DTensors whose batch or heads "
            "are sharded, and leaves others to PyTorch; or give it the tensors within, as with "
            "torch.distributed.tensor.experimental.local_map"
        )


def leaf(module: nn.Module, *args, **kwargs) -> Proxy:
    """A call of `module`, recorded as a whole, as torch.fx records PyTorch's own layers."""
    tracer = next(x for x in (*args, *kwargs.values()) if isinstance(x, Proxy)).tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def unscriptable(module: nn.Module):
    """The `__prepare_scriptable__` of a layer, which torch.jit.script calls first: raises NotImplementedError. (It can't return
    PyTorch's layer, because torch.jit.script would put that into the user's model.)"""
    raise NotImplementedError(
        f"torch.jit.script can't compile tfkern's {type(module).__name__}: tfkern.unpatch(model) gives PyTorch's back; or use "
        "torch.export, or torch.jit.trace, which records PyTorch's operator"
    )


def proxied(*tensors) -> bool:
    return any(isinstance(x, Proxy) for x in tensors)


def _recorder() -> str | None:
    """The active recorder of PyTorch's own operators that passes tensors, or None."""
    if torch.compiler.is_compiling():  # true in torch.export too, which one of ONNX's exporters calls
        return "torch.onnx.export" if _for_onnx() else None
    if torch.jit.is_tracing():
        return "torch.onnx.export" if _for_onnx() else "torch.jit.trace"
    return None


@compat.while_tracing  # Dynamo would evaluate is_in_onnx_export() to False
def _for_onnx() -> bool:
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()
