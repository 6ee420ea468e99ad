"""Named problems, their inputs, and the error budget: shared by the tests, the benchmarks, `tfkern verify` and the demo.

Correct means: the error against the float64 oracle is at most twice the error that plain PyTorch makes in the same dtype, plus
one rounding of the result. Plain PyTorch is the naive formula and its autograd.

In float32 it is three times, and for gradients the larger error of that and of the flash backward written out naively. A flash
backward takes P from a rounded lse and subtracts two sums that autograd never forms (with one key autograd gives an exact 0),
so that none, PyTorch's own among them, keeps to the first rule; and where two computations differ only in the order of their
float32 sums, their largest errors were seen to differ by 2.4 times. Flash-attention's tests use three times as well.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import tfkern
from tfkern import reference


@dataclass(frozen=True)
class Case:
    """A problem: q is (batch, heads, n_q, head_dim), k and v have kv_heads, n_k and v_head_dim where given; options are
    keyword arguments of tfkern.attention, key_lengths as a tuple."""

    name: str
    heads: int
    n_q: int
    head_dim: int
    n_k: int | None = None
    kv_heads: int | None = None
    v_head_dim: int | None = None
    batch: int = 1
    layout: str = "bhnd"
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


GRADIENTS = ("dq", "dk", "dv")
CAUSAL = dict(is_causal=True)
LOWER_RIGHT = dict(is_causal=True, causal_alignment="lower_right")

CASES = [
    Case("full", 2, 128, 64),
    Case("vit-197", 1, 197, 64, layout="packed"),
    Case("one-query", 2, 1, 32, n_k=77),
    Case("one-key", 2, 77, 32, n_k=1),
    Case("one-by-one", 1, 1, 1),
    Case("239x1", 1, 239, 40, n_k=1),
    Case("113x203", 1, 113, 64, n_k=203),
    Case("causal", 2, 129, 64, layout="packed", options=CAUSAL),
    Case("causal-wide", 1, 50, 32, n_k=110, options=CAUSAL),
    Case("causal-tall", 1, 110, 32, n_k=50, options=CAUSAL),
    Case("lower-right-wide", 1, 50, 32, n_k=110, options=LOWER_RIGHT),
    Case("lower-right-tall", 1, 110, 32, n_k=50, options=LOWER_RIGHT),
    Case("decode", 2, 1, 64, n_k=99, options=LOWER_RIGHT),
    Case("window", 1, 150, 32, options=dict(window=(20, 10))),
    Case("window-left", 1, 150, 32, options=dict(window=(33, None))),
    Case("window-right", 1, 150, 32, options=dict(window=(None, 7))),
    Case("window-zero", 1, 70, 16, options=dict(window=(0, 0))),
    Case("window-beyond", 1, 70, 16, options=dict(window=(10**12, 10**12))),
    Case("window-causal", 1, 150, 32, options=dict(window=(40, 99), **CAUSAL)),
    Case("window-dead-rows", 1, 150, 32, n_k=60, options=dict(window=(20, 10))),
    Case("window-lower-right", 1, 60, 32, n_k=150, options=dict(window=(20, 10), causal_alignment="lower_right")),
    Case("padded", 2, 90, 32, batch=4, options=dict(key_lengths=(90, 1, 0, 41))),
    Case("padded-causal", 1, 90, 32, batch=2, options=dict(key_lengths=(90, 37), **CAUSAL)),
    Case("padded-lower-right", 1, 40, 32, n_k=90, batch=3, options=dict(key_lengths=(90, 55, 20), **LOWER_RIGHT)),
    Case("padded-window", 1, 90, 32, batch=2, options=dict(key_lengths=(80, 33), window=(15, 20))),
    Case("gqa", 4, 70, 32, kv_heads=2),
    Case("mqa-causal", 3, 100, 32, kv_heads=1, options=CAUSAL),
    Case("gqa-everything", 4, 60, 24, kv_heads=2, n_k=140, v_head_dim=40, batch=2,
         options=dict(key_lengths=(140, 101), window=(50, 30), scale=0.3, **LOWER_RIGHT)),
    Case("d3", 1, 70, 3),
    Case("d59", 1, 70, 59, options=CAUSAL),
    Case("d80", 1, 70, 80),
    Case("d96-v-wider", 1, 70, 96, v_head_dim=111),
    Case("d128", 1, 70, 128, options=CAUSAL),
    Case("d160-v-narrow", 1, 70, 160, v_head_dim=8),
    Case("d256", 1, 70, 256),
    Case("scale-zero", 1, 70, 32, options=dict(scale=0.0, **CAUSAL)),
    Case("scale-negative", 1, 70, 32, options=dict(scale=-0.5, **CAUSAL)),
    Case("large-logits", 1, 70, 32, options=dict(scale=8.0)),
    Case("layout-bnhd", 2, 70, 32, batch=2, layout="bnhd", options=CAUSAL),
    Case("layout-strided", 2, 70, 32, batch=2, layout="strided", options=CAUSAL),
    Case("layout-expanded", 2, 70, 32, batch=2, layout="expanded"),
    Case("empty-batch", 2, 10, 16, batch=0),
    Case("empty-heads", 0, 10, 16),
    Case("empty-queries", 2, 0, 16, n_k=10),
    Case("empty-keys", 2, 10, 16, n_k=0, options=CAUSAL),
]  # fmt: skip


@dataclass
class Inputs:
    """q, k, v, do (the gradient of out) and dlse (of lse) for one case, and attention's keyword arguments. What no result may
    depend on (keys that no query sees, all of queries that see no key) is NaN in `tensors` and 0 in `clean`."""

    tensors: list[Tensor]
    clean: list[Tensor]
    options: dict


@dataclass(frozen=True)
class Error:
    """One quantity's largest error against the oracle, the plain PyTorch error, and the budget that follows."""

    quantity: str
    error: float
    plain: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # False for NaN

    def __str__(self) -> str:
        return f"{self.quantity}: error {self.error:.2e}, budget {self.budget:.2e} (plain PyTorch {self.plain:.2e})"


def make_inputs(case: Case, dtype: torch.dtype, device="cpu", seed: int = 0) -> Inputs:
    """Normal random inputs in the case's memory layout, with the poison."""
    generator = torch.Generator().manual_seed(seed)
    n_k, kv_heads = (case.n_q if case.n_k is None else case.n_k), case.kv_heads or case.heads
    options = dict(case.options)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"], device=device)
    band = {k: v for k, v in options.items() if k != "scale"}
    keep = reference.visible(case.n_q, n_k, device=device, **band)
    dead_q = ~keep.any(3).expand(case.batch, 1, -1)[..., None]
    dead_k = ~keep.any(2).expand(case.batch, 1, -1)[..., None]
    v_head_dim = case.v_head_dim or case.head_dim
    makes = [
        (case.layout, case.heads, case.n_q, case.head_dim, dead_q), (case.layout, kv_heads, n_k, case.head_dim, dead_k),
        (case.layout, kv_heads, n_k, v_head_dim, dead_k), ("bhnd", case.heads, case.n_q, v_head_dim, dead_q),
    ]  # fmt: skip
    tensors, clean = [], []
    for layout, *shape, dead in makes:

        def normal(*sizes):  # on the device before views are taken of it: moving a view would make it dense
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        x = _in_layout(layout, normal, case.batch, *shape)
        poison = layout != "expanded"  # one memory for all batches: nothing in it is dead for all
        clean.append(x.masked_fill(dead, 0.0) if poison else x.clone())
        tensors.append(x.masked_fill_(dead, float("nan")) if poison else x)
    dlse = torch.randn(case.batch, case.heads, case.n_q, generator=generator).to(device)
    clean.append(dlse.masked_fill(dead_q[..., 0], 0.0))
    tensors.append(dlse.masked_fill(dead_q[..., 0], float("nan")))
    return Inputs(tensors, clean, options)


def _in_layout(layout: str, normal, b: int, h: int, n: int, d: int) -> Tensor:
    """(b, h, n, d) normal numbers: contiguous, as transformers have them, with gaps everywhere, or with stride 0."""
    if layout == "bhnd":
        return normal(b, h, n, d)
    if layout == "bnhd":
        return normal(b, n, h, d).transpose(1, 2)
    if layout == "packed":
        return normal(b, n, 3, h, d).permute(2, 0, 3, 1, 4)[1]
    if layout == "strided":
        return normal(n, d, b + 1, 2 * h).permute(2, 3, 0, 1)[1:, ::2]
    if layout == "expanded":
        return normal(1, h, n, d).expand(b, h, n, d)
    raise ValueError(f"layout must be bhnd, bnhd, packed, strided or expanded, but is {layout!r}")


def results(function, tensors, options: dict) -> dict[str, Tensor]:
    """out, lse and the gradients of (out . do + lse . dlse), by any function with attention's arguments."""
    q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
    do, dlse = tensors[3:]
    out, lse = function(q, k, v, enable_gqa=True, return_lse=True, **options)
    grads = torch.autograd.grad([out, lse], [q, k, v], [do.to(out.dtype), dlse.to(lse.dtype)])
    return dict(zip(("out", "lse", *GRADIENTS), (out, lse, *grads), strict=True))


def check(case: Case, dtype: torch.dtype, backend: str, device="cpu", seed: int = 0) -> list[Error]:
    """Run a case forward and backward by a backend and measure every result against its budget."""
    inputs = make_inputs(case, dtype, device, seed)
    found = results(tfkern.attention, inputs.tensors, dict(inputs.options, backend=backend))
    truth = results(reference.attention, [x.double() for x in inputs.clean], inputs.options)
    plain = results(reference.attention, inputs.clean, inputs.options)
    return judge(found, truth, plain, inputs.clean, inputs.options)


def judge(found: dict, truth: dict, plain: dict, clean: list[Tensor], options: dict) -> list[Error]:
    """The Error of everything found, by the rule above. `clean` is q, k, v, do, dlse in the dtype judged."""
    plains = [plain]
    if clean[0].dtype == torch.float32:
        plains.append(dict(zip(GRADIENTS, reference.backward(*clean, **options), strict=True)))
    return [compare(name, found[name], truth[name], [p[name] for p in plains if name in p]) for name in found]


def compare(quantity: str, found: Tensor, truth: Tensor, plains: list[Tensor]) -> Error:
    """The Error of `found` beside the largest of `plains`. -inf (the lse of rows that see no key) must stand where it does in
    the truth."""
    if found.shape != truth.shape or not torch.equal(found == -torch.inf, truth == -torch.inf):
        return Error(quantity, float("nan"), 0.0, 0.0)
    finite = truth != -torch.inf
    one_rounding = torch.finfo(found.dtype).eps / 2
    factor = 3.0 if found.dtype == torch.float32 else 2.0
    found, truth, *plains = (x.detach().double()[finite] for x in (found, truth, *plains))
    if truth.numel() == 0:
        return Error(quantity, 0.0, 0.0, 0.0)
    error, *plain_errors = ((x - truth).abs().max().item() for x in (found, *plains))
    plain_error = max(plain_errors)
    return Error(quantity, error, plain_error, factor * plain_error + one_rounding * truth.abs().max().item())
