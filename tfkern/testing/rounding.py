"""The error that any correct implementation may make, on any machine and in any order of sums: float64 operations made to err.

A sum in floating point rounds each of its partial sums. Added one after the other, terms of random signs give an error with a
standard deviation of about u/2 times the sum of their magnitudes, where u is half the distance from 1 to the next number: the
partial sums grow as the square root of their number, and so do errors of random signs. Where terms cancel, that is far more
than u times the result. With one key, for example, dP - delta is 0, and either of the two is off by u times the sum of
|dO| |V|.

So a run of a formula in float64 shows what the formula may err in float32, if each operation is made to err: a product of
matrices or a sum by a random part of u times itself over the magnitudes, any other operation by a random part of u times its
result. This is Monte Carlo arithmetic (Parker, 1997). Random parts are uniform from -1 to 1 and drawn by a seed, so every
machine gets the same.
"""

import torch
from torch import Tensor

from tfkern import compat

PRODUCTS = {"mm", "bmm", "mv", "dot", "addmm", "baddbmm", "convolution", "convolution_backward"}
# Sums of products of their arguments, without signs of their own: of magnitudes they give the sum of magnitudes.
SUMS = PRODUCTS | {"sum", "mean", "cumsum", "embedding_dense_backward", "index_add", "index_put"}
# These return bits of their arguments, so nothing is rounded.
EXACT = {
    "clone", "copy_", "_to_copy", "where", "masked_fill", "masked_fill_", "cat", "stack", "index", "gather", "neg", "abs",
}  # fmt: skip


class Rounding(compat.DispatchMode):
    """Within it, operations on float64 err as they may in float32. `products` is the type that products of matrices take and
    give, such as that of autocast; a type of 16 bits is accumulated in float32."""

    def __init__(self, seed: int, products: torch.dtype = torch.float32):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.unit = torch.finfo(torch.float32).eps / 2
        self.products = torch.finfo(products).eps / 2

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in EXACT or func.is_view or not any(map(_wide, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if name in PRODUCTS and self.products > self.unit:
            args = compat.mapped(lambda x: self._moved(x, self.products * x.abs()) if _wide(x) else x, args)
        out = func(*args, **kwargs)
        outs = out if isinstance(out, (tuple, list)) else (out,)
        for x, total in zip(outs, self._totals(func, name, args, kwargs, len(outs)), strict=True):
            if _wide(x):
                size = (self.products if name in PRODUCTS else self.unit) * x.abs()
                x.copy_(self._moved(x, size if total is None else size + self.unit * total))
        return out

    def _totals(self, func, name: str, args: tuple, kwargs: dict, count: int):
        """For each result, the sum of the magnitudes of its terms; None where it is no sum."""
        if name == "_softmax_backward_data":  # P * (dP - sum(P * dP))
            grad, p, dim = args[0].abs(), args[1], args[2]
            return [p * (grad + (grad * p).sum(dim, keepdim=True))]
        if name not in SUMS:
            return [None] * count
        totals = func(*compat.mapped(lambda x: x.abs() if _wide(x) else x, args), **kwargs)
        return totals if isinstance(totals, (tuple, list)) else [totals]

    def _moved(self, x: Tensor, size: Tensor) -> Tensor:
        """x plus a random part of `size`; infinities stay."""
        part = torch.rand(x.shape, generator=self.generator, dtype=torch.float64).to(x.device) * 2 - 1
        return x + torch.where(x.isfinite(), size * part, 0.0)


def _wide(x) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float64
