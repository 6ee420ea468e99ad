"""Private names of PyTorch: all in one file, none has moved, each does what it stands for, and where they are missing, others serve."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from tfkern import compat

ROOT = Path(__file__).resolve().parent.parent
ROOTS = {"torch", "forward_ad", "F"}
ELSEWHERE = {"_schema", "_make_wrapper_subclass", "_dynamo_marked_constant"}  # of what torch's names lead to


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def private_names(tree):
    """Those of PyTorch in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if (node.attr in ELSEWHERE) or (name.split(".")[0] in ROOTS and re.fullmatch(r"[\w.]+", name) and private(name)):
                yield name
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            yield from (name for alias in node.names if private(name := f"{node.module}.{alias.name}"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("torch.") and private(alias.name))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"torch(\.\w+)*\._[\w.]+", node.value)
        ):
            yield node.value


def test_they_stand_in_one_file():
    found = {}
    for path in (*sorted((ROOT / "tfkern").rglob("*.py")), *sorted((ROOT / "bench").glob("*.py"))):
        if names := set(private_names(ast.parse(path.read_text()))):
            found[path.name] = names
    assert len(found.pop("compat.py")) >= 4
    assert found == {}


def test_none_has_moved():
    assert compat.MOVED == []
    assert compat.KERNELS
    assert compat.WRAPPERS
    assert len(compat.PLAIN) == 2


def test_each_does_what_it_stands_for(monkeypatch):
    x, seen = torch.randn(2, 3, 5, 4), []

    def note(x):
        seen.append((compat.transforms(), compat.has_values(x)))
        return x.sum()

    note(x)
    torch.func.grad(note)(x)
    torch.vmap(note)(x)
    with torch._subclasses.FakeTensorMode() as mode:
        note(mode.from_tensor(x))
    assert seen == [(False, True), (True, True), (True, False), (False, False)]
    monkeypatch.setattr(compat, "_FakeTensor", None)
    assert compat.has_values(x)
    with torch._subclasses.FakeTensorMode() as mode:
        assert not compat.has_values(mode.from_tensor(x))
    assert torch.vmap(lambda x: (seen.append(compat.has_values(x)), x)[1])(x) is not None
    assert not seen[-1]
    assert not compat.forward_mode()
    with forward_ad.dual_level():
        assert compat.forward_mode()
    assert compat.sdpa is F.scaled_dot_product_attention
    torch.testing.assert_close(compat.flash(x, x, x, 0.0, True)[0], F.scaled_dot_product_attention(x, x, x, is_causal=True))
    assert compat.sdp_choice(x, x, x) in {int(kind) for kind in torch.nn.attention.SDPBackend.__members__.values()}
    assert compat.mutates(torch.ops.aten.add_.Tensor)
    assert not compat.mutates(torch.ops.aten.add.Tensor)
    assert compat.mapped(lambda x: x + 1, ([1, (2,)], {"a": 3})) == ([2, (3,)], {"a": 4})


def test_dynamo_takes_functions_for_constants():
    def theirs():
        pass

    def ours():
        pass

    assert vars(torch.compiler.assume_constant_result(theirs)) == vars(compat.while_tracing(ours)) != {}
    assert compat.dynamo_imported()


WITHOUT = """
import pkgutil, torch
def moved(name): raise AttributeError(name)
kept, pkgutil.resolve_name = pkgutil.resolve_name, moved
import tfkern
from tfkern import compat, reference
pkgutil.resolve_name = kept
assert len(compat.MOVED) > 10 and not compat.KERNELS
close = torch.testing.assert_close
q, k, v = qkv = [torch.randn(2, 3, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
def loss(*qkv, attend=tfkern.attention): return attend(*qkv, is_causal=True).square().sum()
wanted = torch.autograd.grad(loss(*qkv, attend=reference.attention), qkv)
def refused(error, f, *args):
    try: f(*args)
    except error as raised: return str(raised)
    raise AssertionError("did not raise")
"""
EAGERLY = """
from torch.nn import functional as F
from tfkern import checks
from tfkern.testing.rounding import Rounding
close(torch.autograd.grad(loss(*qkv), qkv), wanted)
leaves = [x.detach() for x in qkv]
close(torch.func.grad(loss, (0, 1, 2))(*leaves), wanted)
close(torch.vmap(torch.func.grad(loss))(*(x[:, None] for x in leaves))[:, 0], wanted[0])
assert "jvp" in refused(NotImplementedError, torch.func.jvp, tfkern.attention, tuple(leaves), tuple(leaves))
assert "second" in refused(NotImplementedError, lambda: torch.func.grad(lambda x: torch.func.grad(loss)(x, k, v).sum())(q))
lengths = torch.tensor([4, 9])
padded = torch.vmap(lambda n: tfkern.attention(q, k, v, key_lengths=n))(lengths[None])
close(padded[0], reference.attention(q, k, v, key_lengths=lengths))
with tfkern.patched(): close(F.scaled_dot_product_attention(q, k, v), reference.attention(q, k, v))
with Rounding(0): close(loss(*qkv), loss(*qkv, attend=reference.attention))
"""
COMPILED = """
for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)):
    close(f(*qkv), loss(*qkv))
    close(torch.autograd.grad(f(*qkv), qkv), wanted)
tensors, options = tfkern.ops.op_arguments(*tfkern.call.given(*qkv, is_causal=True))
out = torch.ops.tfkern.attention(*tensors, *options)[0]
close(torch.autograd.grad(out.square().sum(), qkv, retain_graph=True), wanted)
(grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
assert "second derivatives" in refused(NotImplementedError, torch.autograd.grad, grad.sum(), q)
class Model(torch.nn.Module):
    def forward(self, q, k, v): return tfkern.attention(q, k, v, is_causal=True)
exported = torch.export.export(Model(), tuple(qkv)).module()
close(torch.autograd.grad(exported(*qkv).square().sum(), qkv), wanted)
"""


@pytest.mark.parametrize("what", [EAGERLY, pytest.param(COMPILED, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_where_all_have_moved(what):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT + what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def versions(file: str, pattern: str) -> list[str]:
    found = re.findall(pattern, (ROOT / file).read_text())
    assert found, (file, pattern)
    return found


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_the_versions_that_are_named_are_those_that_are_tested(package):
    """What pyproject.toml and README.md call the oldest is the oldest pair; the gates have every pair's Triton."""
    pairs = {name: versions(f"constraints{name}.txt", rf"(?m)^{package}==([\d.]+)")[0] for name in ("-oldest", "", "-newest")}
    assert list(pairs.values()) == sorted(pairs.values(), key=lambda version: [int(n) for n in version.split(".")])
    lowest = versions("pyproject.toml", rf'"{package}>=([\d.]+)')
    assert lowest == [".".join(pairs["-oldest"].split(".")[:2])]
    assert set(versions("README.md", rf"(?i)\b{package} >= ([\d.]*\d)")) == set(lowest)
    if package == "triton":
        gated = {version for line in versions(".ci/run", r"for version in ([\d. ]+); do") for version in line.split()}
        assert {pairs["-oldest"], pairs["-newest"]} <= gated
        assert set(re.findall(r"\b3\.\d\.\d\b", versions("README.md", r"CI does so with Triton ([^\n]*)")[0])) <= gated | {
            pairs[""]
        }
