"""Every optional argument has cases, an oracle that knows it, and a numerical check of its gradients. The arguments are found by
introspection: a new one that lacks any of these fails here."""

import functools
import inspect
from dataclasses import fields, replace

import pytest
import torch

import tfkern
from tfkern import call, features, testing
from tfkern.kernels.features import Features
from tfkern.kernels.score_mods import signed_log, signed_log_derivative
from tfkern.problem import Gradients, Problem

CASES = {case.name: case for case in (*testing.CASES, *testing.FEATURE_CASES)}
TOGETHER = {"cu_q": {"cu_q", "cu_k"}, "cu_k": {"cu_q", "cu_k"}}  # neither is given without the other
PUBLIC = {**inspect.signature(tfkern.attention).parameters, **inspect.signature(tfkern.attention_varlen).parameters}
OPTIONAL = [name for name in PUBLIC if name not in ("query", "key", "value", "enable_gqa", "return_lse", "backend")]


@functools.cache
def present() -> dict[str, set[str]]:
    """The fields of Features that each case makes use of."""
    found = {}
    for name, case in CASES.items():
        inputs = testing.make_inputs(case, torch.float32)
        there, _ = features.of(*call.build(**inputs.tensors, enable_gqa=True, **inputs.options))
        found[name] = {field for field in Features._fields if getattr(there, field) is not None}
    return found


def own_case(field: str) -> testing.Case:
    """A case with this field and no other."""
    names = [name for name, there in present().items() if there == TOGETHER.get(field, {field})]
    assert names, f"no case in tfkern/testing/cases.py has {field} alone"
    return CASES[names[0]]


@pytest.mark.parametrize("field", Features._fields)
def test_cases_have_it_alone_and_with_others(field):
    assert own_case(field)
    assert any(there > TOGETHER.get(field, {field}) for there in present().values())


def without(argument: str, inputs: testing.Inputs) -> testing.Inputs:
    """The inputs as if the argument had not been given; of packed sequences one sequence remains."""

    def rest(some: dict) -> dict:
        return {name: x for name, x in some.items() if name != argument}

    options = rest(inputs.options)
    if argument.startswith("cu_seqlens"):
        rows = inputs.clean["query" if argument == "cu_seqlens_q" else "key"].shape[0]
        options = inputs.options | {argument: torch.tensor([0, rows], dtype=torch.int32)}
        other = "cu_seqlens_k" if argument == "cu_seqlens_q" else "cu_seqlens_q"
        options[other] = options[other][[0, -1]]
    return replace(inputs, tensors=rest(inputs.tensors), clean=rest(inputs.clean), options=options)


@pytest.mark.parametrize("argument", OPTIONAL)
def test_the_oracle_knows_it(argument):
    """Some result of the reference is another without it. bfloat16, for what changes nothing in exact arithmetic."""
    given = {}
    for case in CASES.values():
        inputs = testing.make_inputs(case, torch.bfloat16)
        if argument in {**inputs.tensors, **inputs.options} and inputs.do.numel():
            given[len(inputs.tensors) + len(inputs.options), case.name] = case, inputs
    assert given, f"no case in tfkern/testing/cases.py gives {argument}"
    case, inputs = given[min(given)]
    different = []
    for form in (lambda x: [testing.truth(case, x)], lambda x: testing.plain(case, x)):
        for found, other in zip(form(inputs), form(without(argument, inputs)), strict=True):
            different += [name for name in ("out", "lse", "dq", "dk", "dv") if not torch.equal(found[name], other[name])]
    assert different, f"tfkern/reference.py ignores {argument}"


def small(case: testing.Case) -> testing.Case:
    """A case of the same kind, with few numbers."""
    if case.lengths:
        return replace(case, head_dim=3, lengths=((3, 0, 2), (2, 1, 3)))
    options = dict(case.options)
    if "key_lengths" in options:
        options["key_lengths"] = (5, 2, 0)[: case.batch]
    return replace(case, n_q=4, n_k=5, head_dim=3, batch=min(case.batch, 3), options=options)


@pytest.mark.parametrize("field", Features._fields)
def test_gradients_are_numerical_derivatives(field):
    """In float64, of out and lse by every differentiable tensor."""
    case = small(own_case(field))
    inputs = testing.make_inputs(case, torch.float64)
    function = tfkern.attention_varlen if case.lengths else tfkern.attention

    def run(*leaves):
        torch.manual_seed(0)
        tensors = dict(zip(inputs.clean, leaves, strict=True))
        out, lse = function(**tensors, **inputs.options, enable_gqa=True, return_lse=True, backend="eager")
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, tuple(x.double().requires_grad_() for x in inputs.clean.values()), fast_mode=True)


def test_every_gradient_is_compared_somewhere():
    """With one that is not 0."""
    found = set()
    for field in Features._fields:
        case = own_case(field)
        truth = testing.truth(case, testing.make_inputs(case, torch.float64))
        found |= {name for name, x in truth.items() if x.any()}
    assert found >= {f"d{field}" for field in Gradients._fields}


def a_call(batch=2, heads=4, kv_heads=2, n_q=5, n_k=6, head_dim=8, v_head_dim=8, dtype=torch.float32, device="cpu", packed=False,
           **options) -> Problem:  # fmt: skip
    shapes = (heads, n_q, head_dim), (kv_heads, n_k, head_dim), (kv_heads, n_k, v_head_dim)
    q, k, v = (torch.empty(batch, *shape, dtype=dtype, device=device) for shape in shapes)
    if packed:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        options |= {f"cu_seqlens_{x}": torch.arange(batch + 1) * n for x, n in (("q", n_q), ("k", n_k))}
    return call.build(q, k, v, enable_gqa=True, **options)[0]


# What changes one field of a Problem.
CHANGES = {
    "batch": dict(batch=3), "heads": dict(heads=8), "kv_heads": dict(kv_heads=4), "n_q": dict(n_q=7), "n_k": dict(n_k=7),
    "head_dim": dict(head_dim=16), "v_head_dim": dict(v_head_dim=16), "dtype": dict(dtype=torch.float16),
    "device": dict(device="meta"), "scale": dict(scale=0.5), "left": dict(window=(1, None)), "right": dict(is_causal=True),
    "lower_right": dict(causal_alignment="lower_right"), "packed": dict(packed=True),
    "has_key_lengths": dict(key_lengths=torch.tensor([6, 3])), "mask": dict(attn_mask=torch.ones(5, 6) > 0),
    "bias": dict(attn_mask=torch.ones(5, 6)), "dropout_p": dict(dropout_p=0.1), "softcap": dict(softcap=2.0),
    "has_slopes": dict(alibi_slopes=torch.ones(4)), "has_sinks": dict(sinks=torch.ones(4)),
    "score_mod": dict(score_mod=(signed_log, signed_log_derivative)), "precise_delta": dict(precise_delta=True),
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in fields(Problem) if field.compare])
def test_a_known_call_is_not_taken_for_another(field, monkeypatch):
    """What a call is found by, among the calls before it, tells every field of its Problem."""
    monkeypatch.setattr(call, "_problems", {})
    usual, changed = a_call(), a_call(**CHANGES[field])
    assert getattr(usual, field) != getattr(changed, field)
    assert a_call() is usual
    assert a_call(**CHANGES[field]) == changed != usual
