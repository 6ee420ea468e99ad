"""Forward and backward passes of whole models, judged by the rule of tfkern.testing.budget: against a float64 run, beside what
eager attention errs."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from tfkern import reference
from tfkern.integrations import transformers as integration
from tfkern.testing import budget

NAIVE = "naive"  # the flash backward written out, as an attention of transformers


class Doubled(TorchFunctionMode):
    """What models compute in float32 whatever their dtype (softmax, norms, rotations), in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def double(x):
            return torch.float64 if x is torch.float32 else x

        if func is Tensor.float:
            func = Tensor.double
        return func(*tree_map(double, args), **tree_map(double, kwargs or {}))


def registered():
    """transformers, with ours and the naive attention in it."""
    import transformers

    transformers.logging.set_verbosity_error()
    integration.register()
    register_naive()
    return transformers


def register_naive() -> str:
    """tfkern.reference.flash as attn_implementation, with masks written out."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def forward(module, query, key, value, mask, dropout=0.0, scaling=None, position_bias=None, softcap=None, s_aux=None,
                is_causal=None, **kwargs):  # fmt: skip
        bias = position_bias
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if mask is not None and bias is not None:
            mask, bias = torch.where(mask, bias, -torch.inf), None
        dtype = value.dtype  # queries and keys may come in float32 under autocast
        wide = [x.float() if dtype in (torch.bfloat16, torch.float16) else x for x in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            out = reference.flash(
                *wide, bias if mask is None else mask, dropout if module.training else 0.0,
                mask is None and causal and query.shape[2] > 1, scaling, softcap=softcap, sinks=s_aux, out_dtype=dtype,
            )  # fmt: skip
        return out.to(dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAIVE, forward)
    AttentionMaskInterface.register(NAIVE, sdpa_mask)
    return NAIVE


def results(model, inputs: dict, seen=None, autocast=None, seed: int = 7) -> dict[str, Tensor]:
    """The rows of the first output that count, seen(output), and every parameter's gradient of a random sum of them."""
    dtype = next(model.parameters()).dtype
    inputs = {name: x.to(dtype) if name == "pixel_values" else x for name, x in inputs.items()}
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = model(**inputs)[0]
    out = out if seen is None else out[seen(out)]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    model.zero_grad()
    (out * weights.to(out.dtype)).sum().backward()
    return {"out": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def prepared(m, pad=None, autocast=None, change=None):
    """A function for judge: forward and backward of a model of the zoo, which must attend by tfkern as often as it says."""

    def run(attn, dtype):
        inputs, model = m.inputs(pad=pad), m.make(attn, dtype)
        if change is not None:
            change(model, inputs)
        cast = None if dtype == torch.float64 else autocast
        found = results(model, inputs, lambda out: m.seen(inputs, out), cast)
        assert integration.calls(model) == (m.calls if attn == "tfkern" else 0)
        return found

    return run


def judge(run, products: torch.dtype = torch.float32) -> list[budget.Error]:
    """The errors of run("tfkern", float32) against run("eager", float64), beside those of eager attention and of the flash
    backward written out; `products` is the type of autocast, where `run` uses it."""

    def wide(attn: str) -> dict[str, Tensor]:
        with Doubled():
            return run(attn, torch.float64)

    found, truth = run("tfkern", torch.float32), wide("eager")
    plains = [run(attn, torch.float32) for attn in ("eager", NAIVE)]
    assert found.keys() == truth.keys() == plains[0].keys()
    return budget.judge(found, truth, plains, lambda: wide(NAIVE), products)


def assert_within(errors: list[budget.Error]) -> None:
    bad = [str(e) for e in errors if not e.ok]
    assert not bad, f"{len(bad)} of {len(errors)} quantities: " + "; ".join(bad[:8])
