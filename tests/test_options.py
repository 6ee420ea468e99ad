"""The arguments of a call on their way: from each public function to the Problem, through an op and back, and to the launch."""

import inspect
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern import backends, interpreter, ops
from tfkern.kernels.score_mods import signed_log, signed_log_derivative
from tfkern.options import Inputs, Options
from tfkern.problem import Problem

PUBLIC = [tfkern.attention, tfkern.attention_varlen, tfkern.attention_packed]
NAMED = pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
# Another value of each option, and what changes of the Problem.
OTHERS = {
    "dropout_p": (0.25, "dropout_p"), "is_causal": (True, "right"), "scale": (0.5, "scale"), "enable_gqa": (True, "kv_heads"),
    "causal_alignment": ("lower_right", "lower_right"), "window": ((3, None), "left"), "softcap": (2.0, "softcap"),
    "score_mod": ((signed_log, signed_log_derivative), "score_mod"), "precise_delta": (True, "precise_delta"),
}  # fmt: skip


def arguments(function, kv_heads: int = 4) -> dict:
    """Tensors for one of the public functions: one sequence of 6 rows, 4 heads, head dim 8."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 6, 8, generator=generator) for h in (4, kv_heads, kv_heads))
    if function is tfkern.attention:
        return dict(query=query, key=key, value=value)
    if function is tfkern.attention_packed:
        return dict(qkv=torch.stack((query, key, value), 2).permute(0, 3, 2, 1, 4))
    rows = dict(zip(("query", "key", "value"), (x[0].transpose(0, 1) for x in (query, key, value)), strict=True))
    return rows | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 6]))


@NAMED
def test_signatures_have_the_options_with_their_defaults(function):
    parameters = inspect.signature(function).parameters
    absent = {"enable_gqa"} if function is tfkern.attention_packed else set()
    defaults = {name: x for name, x in Options._field_defaults.items() if name not in absent}
    assert {name: x.default for name, x in parameters.items() if name in Options._fields} == defaults
    positional = [name for name, x in parameters.items() if x.kind is x.POSITIONAL_OR_KEYWORD and name in Options._fields]
    assert positional == list(defaults)[: len(positional)]


@pytest.mark.parametrize(
    ("function", "option"),
    [(f, name) for f in PUBLIC for name in Options._fields if name in inspect.signature(f).parameters],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_each_option_reaches_the_problem(function, option, monkeypatch):
    """And changes nothing else of it."""
    value, field = OTHERS[option]
    seen, choose = [], backends.choose
    monkeypatch.setattr(backends, "choose", lambda problem, *more: (seen.append(problem), choose(problem, "portable"))[1])
    function(**arguments(function))
    function(**arguments(function, kv_heads=2 if option == "enable_gqa" else 4), **{option: value})
    one, other = seen
    names = [x.name for x in fields(Problem) if x.compare]
    assert [name for name in names if getattr(one, name) != getattr(other, name)] == [field]


def test_explain_takes_what_attention_takes():
    x = arguments(tfkern.attention)
    tensors = tuple(x.values())
    assert "right=0" in tfkern.explain(*tensors, None, 0.0, True)
    assert tfkern.explain(*tensors, None, 0.0, True) == tfkern.explain(**x, is_causal=True, dropout_p=0.0, return_lse=True)
    for function in (tfkern.attention, tfkern.explain):
        with pytest.raises(TypeError, match=r"positional|passed by name"):
            function(*tensors, None, 0.0, False, None, False, "lower_right")
        with pytest.raises(TypeError, match="causal"):
            function(*tensors, causal=True)


@pytest.mark.parametrize("scale", [None, 0.5, torch.tensor(0.5)], ids=str)
def test_options_come_out_of_an_op_as_they_went_in(scale):
    x = arguments(tfkern.attention)
    mod = tfkern.ScoreMod(signed_log, signed_log_derivative)
    options = Options(**{name: value for name, (value, _) in OTHERS.items()})._replace(scale=scale, score_mod=mod)
    tensors, asked = ops.op_arguments(Inputs(**x), options, "eager")
    assert asked.backend == "eager"
    assert ops._options(asked, tensors.scale) == options
    plain = Options(window=(None, None))  # as None
    assert ops._options(ops.op_arguments(Inputs(**x), Options())[1], None) == plain


def frames_to_the_launch(monkeypatch, function, tensors: dict) -> list[str]:
    """The Python functions of tfkern between a warm call and the launch, the one that launches included."""
    home, found = str(Path(interpreter.__file__).parent), []

    def run(*_):
        frame = sys._getframe(1)
        while frame:
            if frame.f_code.co_filename.startswith(home):
                found.append(frame.f_code.co_name)
            frame = frame.f_back

    monkeypatch.setattr(interpreter, "run", run)
    for _ in range(2):
        found.clear()
        function(**tensors, backend="portable")
    return found


@pytest.mark.cpu
@NAMED
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_a_warm_call_is_a_few_frames_from_its_launch(function, grad, monkeypatch):
    tensors = {name: x.requires_grad_() if grad and x.is_floating_point() else x for name, x in arguments(function).items()}
    found = frames_to_the_launch(monkeypatch, function, tensors)
    assert found[-1] == function.__name__
    assert len(found) < 6, found  # with the launcher 6
