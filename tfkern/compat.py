"""The undocumented names of PyTorch that tfkern and bench use: beside each, what it is for and what is done without it.

`import tfkern` and plain calls work without any of them, slower or with less. tests/test_compat.py fails where one has moved.
compat_triton.py has the names of Triton.
"""

import contextlib
import functools
import sys

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from tfkern.compat_triton import found

# Whether torch.func transforms are at work. Without it: perhaps, and Function.apply asks them each time.
_transforms = found("torch._C:_are_functorch_transforms_active")


def transforms() -> bool:
    return _transforms is None or _transforms()


# Whether forward mode is at work (forward_ad.dual_level). Without it: perhaps, and every tensor is asked for its tangent.
_dual_level = found("torch.autograd.forward_ad:_current_level")


def forward_mode() -> bool:
    return _dual_level is None or forward_ad._current_level >= 0


# Function.apply without its check for transforms: the same where none are at work. Without it: Function.apply.
_Function = found("torch.autograd.function:_SingleLevelFunction")


def apply_of(function):
    """function.apply for where transforms() is false: a bound C function, which adds no Python frame to a call."""
    return function.apply if _Function is None else super(torch.autograd.Function, function).apply


# For the Autograd kernel of an op. Transforms of torch.func peel off one by one before that kernel runs, so it differentiates
# for one of them: by a Function of a single level, whose ops the outer ones see. Without them:
# torch.library.register_autograd, through which torch.func can't differentiate.
_allowed = found("torch._functorch.utils:enable_single_level_autograd_function")
_below = found("torch._C:_AutoDispatchBelowAutograd")
KERNELS = None not in (_Function, _allowed, _below, _transforms)
below_autograd = _below if KERNELS else contextlib.nullcontext


@functools.cache
def _of_one_transform(function):
    return type(function.__name__, (_Function,), dict(vars(function)))


def apply_within_op(function, *args):
    with _allowed():
        return _of_one_transform(function).apply(*args)


# Whether a tensor has values: under vmap and in FakeTensorMode it has none. Without them: one value is asked for.
_FakeTensor = found("torch._subclasses:FakeTensor")
_is_batched = found("torch._C._functorch:is_batchedtensor")


def fake(x: Tensor) -> bool:
    """Whether x is of FakeTensorMode. Without it: False, and shapes come from the operations that make them."""
    return _FakeTensor is not None and isinstance(x, _FakeTensor)


def has_values(x: Tensor) -> bool:
    if None not in (_FakeTensor, _is_batched):
        return not (isinstance(x, _FakeTensor) or _is_batched(x))
    try:
        return type(x.detach().sum().item()) in (int, float, bool)
    except (RuntimeError, NotImplementedError):
        return False


# The classes of tensors that stand for plain ones while torch.compile and torch.export trace. Without them: every tensor does.
_FunctionalTensor = found("torch._subclasses.functional_tensor:FunctionalTensor")
PLAIN = tuple(kind for kind in (_FakeTensor, _FunctionalTensor) if kind is not None)

# PyTorch's own F.scaled_dot_product_attention, also if another was put in its place before tfkern was imported. Without it: the
# other.
sdpa = found("torch._C._nn:scaled_dot_product_attention") or F.scaled_dot_product_attention

# What F.scaled_dot_product_attention runs on a CPU, with its lse. Without them: tiles of queries by PyTorch's operations.
_flash = found("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu.default")
_flash_backward = found("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default")
flash, flash_backward = (_flash, _flash_backward) if None not in (_flash, _flash_backward) else (None, None)

# A softmax along the last dim into given memory, and its gradient y * (g - sum(y * g)) in one pass, which autograd runs. On a
# CPU both go row by row and may write where they read. Without them: into new memory, and the gradient in three passes.
_softmax_out = found("torch:ops.aten._softmax.out")
_softmax_backward_out = found("torch:ops.aten._softmax_backward_data.out")


def softmax_(x: Tensor) -> Tensor:
    """Along the last dim; x may be overwritten."""
    if _softmax_out is None or x.device.type != "cpu":
        return torch.softmax(x, -1)
    return _softmax_out(x, -1, False, out=x)


def softmax_backward_(grad: Tensor, output: Tensor) -> Tensor:
    """The gradient of the input of a softmax, from the gradient of its output, which may be overwritten."""
    if _softmax_backward_out is None or grad.device.type != "cpu":
        return grad.sub_((output * grad).sum(-1, keepdim=True)).mul_(output)
    return _softmax_backward_out(grad, output, -1, output.dtype, grad_input=grad)


# The number of the backend (torch.nn.attention.SDPBackend) that F.scaled_dot_product_attention takes. Without it: not told.
sdp_choice = found("torch:_fused_sdp_choice")

# A tensor that makes its elements when an operation wants them. Without them: masks are written out at once.
_wrapper = found("torch:Tensor._make_wrapper_subclass")
no_torch_function = found("torch._C:_disabled_torch_function_impl")
WRAPPERS = None not in (_wrapper, no_torch_function)


def wrapper(kind: type[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return _wrapper(kind, shape, dtype=dtype, device=device)


# The operator that torch.jit.script puts in the place of a function. Without it: it says that it can't compile the function.
_register = found("torch.jit._builtins:_register_builtin")


def scripted_as(function, operator: str) -> None:
    if _register is not None:
        _register(function, operator)


# Several gradients as one tensor: torch.autograd.grad(..., is_grads_batched=True) makes them with a vmap of its own, which does
# not nest. Without them: PyTorch says which operation it can't batch.
_is_batch = found("torch._C._functorch:is_legacy_batchedtensor")
_add_dim, _remove_dim = found("torch:_add_batch_dim"), found("torch:_remove_batch_dim")
_LEVEL = 1


def batched(x) -> bool:
    return None not in (_is_batch, _add_dim, _remove_dim) and isinstance(x, Tensor) and _is_batch(x)


def batch(x: Tensor) -> Tensor:
    """x (gradients, ...) as PyTorch's one tensor."""
    return _add_dim(x, 0, _LEVEL)


def unbatched(x: Tensor) -> Tensor:
    """The inverse of `batch`."""
    return _remove_dim(x, _LEVEL, 0, 0)


# Whether an op changes one of its arguments. Without it: perhaps.
_schema = found("torch:ops.aten.add_.Tensor._schema.is_mutable")


def mutates(op) -> bool:
    return _schema is None or op._schema.is_mutable


# A context in which every operation comes to __torch_dispatch__. Without it: none does, and the error budget of tests is
# that of plain PyTorch alone.
DispatchMode = found("torch.utils._python_dispatch:TorchDispatchMode") or contextlib.nullcontext


# What is noted for the nodes of a graph while operations are traced, such as whether the partitioner may recompute them.
# Without it: nothing is noted, and the backward may draw other random bits if a budget below 1 makes the partitioner recompute
# them.
_current_meta = found("torch.fx.traceback:get_current_meta")


def current_meta() -> dict:
    return {} if _current_meta is None else _current_meta()


# The share of what a forward computes that torch.compile may keep for the backward, overall or for a region of the graph.
# Without it: all, the default.
_budget = found("torch._functorch.config:activation_memory_budget")


def activation_memory_budget() -> float:
    overall = 1.0 if _budget is None else torch._functorch.config.activation_memory_budget
    return current_meta().get("custom", {}).get("_region_activation_memory_budget", overall)


# What makes a graph of operations (make_fx). Without it: nobody is known to, and make_fx records ops of ours as they are.
_proxy_mode = found("torch.fx.experimental.proxy_tensor:get_proxy_mode")


def proxy_mode():
    """The mode that records a graph, or None."""
    return None if _proxy_mode is None else _proxy_mode()


def traces_backward() -> bool:
    """Whether the graph that is being recorded is a forward with its backward, by the names that partitioners know them by."""
    mode = proxy_mode()
    return mode is not None and any("tangents" in x.target for x in mode.tracer.graph.find_nodes(op="placeholder"))


# Conditions on sizes of which torch.compile may not know whether they hold, as data decide on the sizes: then False or True is
# taken. Without them: the condition itself, at which PyTorch raises if it does not know. (Here and below, symbolic_shapes is
# imported late: it takes a second, and whoever has such sizes has imported it.)
def guard_or(unknown: bool, condition) -> bool:
    try:
        from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true
    except ImportError:
        return bool(condition)
    return guard_or_true(condition) if unknown else guard_or_false(condition)


# A symbolic size in which every size that data decide on is `many`. Without it: the size itself.
def with_unknown_as(n: torch.SymInt, many: int):
    try:
        from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
    except ImportError:
        return n
    if not free_unbacked_symbols(n):
        return n
    expression = n.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, many)))


# The dim of a jagged nested tensor along which sequences differ. Without it: the first whose size is no number.
def ragged_dim(x: Tensor) -> int:
    dim = getattr(x, "_ragged_idx", None)
    return next(d for d, n in enumerate(x.shape) if type(n) is not int) if dim is None else dim


# The Function of reentrant checkpoints. Without it: a replay attends by what is patched when it runs.
CheckpointFunction = found("torch.utils.checkpoint:CheckpointFunction")

# Makes an implementation known to torch.nn.attention.activate_flash_attention_impl. Without it: the name is not known there.
register_flash = found("torch.nn.attention:register_flash_attention_impl")


# The hooks that see what goes into a module and comes out of it. Without them: none is seen, and none can be removed by itself.
def has_hooks(module: nn.Module) -> bool:
    return bool(getattr(module, "_forward_hooks", None) or getattr(module, "_forward_pre_hooks", None))


def remove_forward_hook(module: nn.Module, hook) -> None:
    hooks = getattr(module, "_forward_hooks", {})
    for key in [key for key, other in hooks.items() if other is hook]:
        del hooks[key]


class Loading(nn.Module):
    """A layer whose `before_loading(state_dict, prefix)` is called before it takes its tensors from a state dict. Without
    nn.Module's name for that: it is not called, and load_state_dict says which keys it has no use for."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        self.before_loading(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def dynamo_imported() -> bool:
    """Whether torch.compile may be at work. (torch.compiler would import it to answer, and with it Triton.)"""
    return "torch._dynamo" in sys.modules


def while_tracing(function):
    """torch.compiler.assume_constant_result, which imports Dynamo: `function` is called once, while tracing, and is no part of
    the graph. In a PyTorch that does not know the mark, Dynamo traces it."""
    function._dynamo_marked_constant = True
    return function


def mapped(f, x):
    """x with f of everything in it that is no list, tuple or dict, as arguments of ops are. (torch.utils._pytree.tree_map.)"""
    if isinstance(x, dict):
        return {key: mapped(f, value) for key, value in x.items()}
    return type(x)(mapped(f, value) for value in x) if type(x) in (list, tuple) else f(x)
