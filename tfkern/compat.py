"""The private names of PyTorch that tfkern uses, all of them: beside each, the public behaviour that it stands for, and what is
done in a PyTorch that has it elsewhere, slower or with less. tests/test_compat.py fails where one has moved."""

import contextlib
import functools
import pkgutil
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

MOVED: list[str] = []  # the names that this PyTorch has not


def _private(name: str):
    """What "module:name" is, None if it is not there."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        MOVED.append(name)
        return None


# Whether torch.func transforms are at work. Else: perhaps, and Function.apply asks them each time.
_transforms = _private("torch._C:_are_functorch_transforms_active")


def transforms() -> bool:
    return _transforms is None or _transforms()


# Whether forward mode is (forward_ad.dual_level). Else: perhaps, and every tensor is asked for its tangent.
_dual_level = _private("torch.autograd.forward_ad:_current_level")


def forward_mode() -> bool:
    return _dual_level is None or forward_ad._current_level >= 0


# Function.apply without its look for transforms: the same where none are at work. Else: Function.apply.
_Function = _private("torch.autograd.function:_SingleLevelFunction")


def apply_of(function):
    """function.apply for where transforms() is false: a bound C function, which adds no Python frame to a call."""
    return function.apply if _Function is None else super(torch.autograd.Function, function).apply


# In the Autograd kernel of an op, which transforms have met already: a Function for the one that calls it, and ops as those see
# them that are further out. Else: torch.library.register_autograd, which torch.func can't get through.
_allowed = _private("torch._functorch.utils:enable_single_level_autograd_function")
_below = _private("torch._C:_AutoDispatchBelowAutograd")
KERNELS = None not in (_Function, _allowed, _below, _transforms)
below_autograd = _below if KERNELS else contextlib.nullcontext


@functools.cache
def _of_one_transform(function):
    return type(function.__name__, (_Function,), dict(vars(function)))


def apply_within_op(function, *args):
    with _allowed():
        return _of_one_transform(function).apply(*args)


# Whether a tensor has values, which under vmap and in FakeTensorMode it has not. Else: by asking for one.
_FakeTensor = _private("torch._subclasses:FakeTensor")
_is_batched = _private("torch._C._functorch:is_batchedtensor")


def fake(x: Tensor) -> bool:
    """Whether x is of FakeTensorMode. Else: nobody tells, and its shapes come by the operations that make them."""
    return _FakeTensor is not None and isinstance(x, _FakeTensor)


def has_values(x: Tensor) -> bool:
    if None not in (_FakeTensor, _is_batched):
        return not (isinstance(x, _FakeTensor) or _is_batched(x))
    try:
        return type(x.detach().sum().item()) in (int, float, bool)
    except (RuntimeError, NotImplementedError):
        return False


# The classes of tensors that stand for plain ones while torch.compile and torch.export trace. Else: all tensors do meanwhile.
_FunctionalTensor = _private("torch._subclasses.functional_tensor:FunctionalTensor")
PLAIN = tuple(kind for kind in (_FakeTensor, _FunctionalTensor) if kind is not None)

# F.scaled_dot_product_attention, whatever somebody has put into its place before tfkern was imported. Else: what stands there.
sdpa = _private("torch._C._nn:scaled_dot_product_attention") or F.scaled_dot_product_attention

# What F.scaled_dot_product_attention runs on a CPU, with its lse. Else: tiles of queries by PyTorch's operations.
_flash = _private("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu.default")
_flash_backward = _private("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default")
flash, flash_backward = (_flash, _flash_backward) if None not in (_flash, _flash_backward) else (None, None)

# A softmax along the last dim into memory that is there, and what autograd runs for its gradient: y * (g - sum(y * g)), in one
# pass. On a CPU both go row by row, and may write where they read. Else: into new memory, the gradient in three passes.
_softmax_out = _private("torch:ops.aten._softmax.out")
_softmax_backward_out = _private("torch:ops.aten._softmax_backward_data.out")


def softmax_(x: Tensor) -> Tensor:
    """Along the last dim; x may be overwritten."""
    if _softmax_out is None or x.device.type != "cpu":
        return torch.softmax(x, -1)
    return _softmax_out(x, -1, False, out=x)


def softmax_backward_(grad: Tensor, output: Tensor) -> Tensor:
    """The gradient of what a softmax was taken of, in place of that of its output."""
    if _softmax_backward_out is None or grad.device.type != "cpu":
        return grad.sub_((output * grad).sum(-1, keepdim=True)).mul_(output)
    return _softmax_backward_out(grad, output, -1, output.dtype, grad_input=grad)


# The number of the backend (torch.nn.attention.SDPBackend) that F.scaled_dot_product_attention takes. Else: nobody tells.
sdp_choice = _private("torch:_fused_sdp_choice")

# A tensor without elements that makes them when an operation wants them. Else: masks that are written out.
_wrapper = _private("torch:Tensor._make_wrapper_subclass")
no_torch_function = _private("torch._C:_disabled_torch_function_impl")
WRAPPERS = None not in (_wrapper, no_torch_function)


def wrapper(kind: type[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return _wrapper(kind, shape, dtype=dtype, device=device)


# What torch.jit.script takes a function for. Else: torch.jit.script says that it can't compile the function.
_register = _private("torch.jit._builtins:_register_builtin")


def scripted_as(function, operator: str) -> None:
    if _register is not None:
        _register(function, operator)


# Several gradients as one tensor, as torch.autograd.grad(..., is_grads_batched=True) makes them with a vmap of its own, within
# which there is no other. Else: PyTorch tells whoever asks for them which operation it can't batch.
_is_batch = _private("torch._C._functorch:is_legacy_batchedtensor")
_add_dim, _remove_dim = _private("torch:_add_batch_dim"), _private("torch:_remove_batch_dim")
_LEVEL = 1


def batched(x) -> bool:
    return None not in (_is_batch, _add_dim, _remove_dim) and isinstance(x, Tensor) and _is_batch(x)


def batch(x: Tensor) -> Tensor:
    """x (gradients, ...) as one tensor, as PyTorch has them."""
    return _add_dim(x, 0, _LEVEL)


def unbatched(x: Tensor) -> Tensor:
    """The inverse of `batch`."""
    return _remove_dim(x, _LEVEL, 0, 0)


# Whether an op changes one of its arguments. Else: perhaps.
_schema = _private("torch:ops.aten.add_.Tensor._schema.is_mutable")


def mutates(op) -> bool:
    return _schema is None or op._schema.is_mutable


# Every operation within it comes to __torch_dispatch__. Else: none does, and errors are judged by plain PyTorch's alone.
DispatchMode = _private("torch.utils._python_dispatch:TorchDispatchMode") or contextlib.nullcontext


# The share of what a forward computes that torch.compile may keep for the backward. Else: all, as it is unless somebody asks.
_budget = _private("torch._functorch.config:activation_memory_budget")


def activation_memory_budget() -> float:
    return 1.0 if _budget is None else torch._functorch.config.activation_memory_budget


def dynamo_imported() -> bool:
    """Whether torch.compile may be at work; asking torch.compiler would import it, and with it Triton."""
    return "torch._dynamo" in sys.modules


def while_tracing(function):
    """torch.compiler.assume_constant_result, which imports Dynamo: called once, while tracing, and not in the graph."""
    function._dynamo_marked_constant = True
    return function


def mapped(f, x):
    """x with f of everything in it that is no list, tuple or dict, as arguments of ops are. (torch.utils._pytree.tree_map.)"""
    if isinstance(x, dict):
        return {key: mapped(f, value) for key, value in x.items()}
    return type(x)(mapped(f, value) for value in x) if type(x) in (list, tuple) else f(x)
