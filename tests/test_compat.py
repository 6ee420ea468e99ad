"""Undocumented names of PyTorch and Triton: in compat.py and compat_triton.py alone, none has moved, each does what it stands for,
and where they are missing, others serve."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from tfkern import compat, compat_triton

ROOT = Path(__file__).resolve().parent.parent
HOMES = {"compat.py", "compat_triton.py"}
ROOTS = {"torch", "triton", "forward_ad", "F", "nn", "tl", "gl"}  # names by which their modules go
# Public by their spelling, but in no documentation.
UNDOCUMENTED = (
    "torch.fx.experimental", "torch.fx.traceback", "torch.utils.checkpoint.CheckpointFunction", "triton.runtime",
    "triton.backends", "triton.compiler", "triton.knobs",
)  # fmt: skip
# Attributes of what torch's and Triton's names lead to.
ELSEWHERE = {
    "_schema", "_make_wrapper_subclass", "_dynamo_marked_constant", "_ragged_idx", "_buffers", "_parameters", "_modules",
    "_forward_hooks", "_forward_pre_hooks", "_load_from_state_dict", "_patch_lang", "packed_metadata",
}  # fmt: skip


def private(name: str) -> bool:
    """Whether a dotted name has a private part, or is below an undocumented one."""
    below = any(f"{name}.".startswith(f"{other}.") for other in UNDOCUMENTED)
    return below or any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def named(node: ast.AST):
    """The names of PyTorch and Triton that a node has."""
    if isinstance(node, ast.Attribute):
        name = ast.unparse(node)
        if node.attr in ELSEWHERE or (name.split(".")[0] in ROOTS and re.fullmatch(r"[\w.]+", name) and private(name)):
            yield name
    elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("torch", "triton"):
        yield from (name for alias in node.names if private(name := f"{node.module}.{alias.name}"))
    elif isinstance(node, ast.Import):
        names = (alias.name for alias in node.names if alias.name.split(".")[0] in ("torch", "triton"))
        yield from filter(private, names)
    elif isinstance(node, ast.FunctionDef) and node.name == "_load_from_state_dict":  # which nn.Module calls
        yield node.name
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        name = node.value.replace(":", ".")
        if node.value in ELSEWHERE or (re.fullmatch(r"(torch|triton)(\.\w+)+", name) and private(name)):
            yield name


def places(folder: Path):
    """(file:line, name) of all in the modules of a folder, but those whose place it is."""
    for path in sorted(folder.rglob("*.py")):
        if path.name not in HOMES:
            for node in ast.walk(ast.parse(path.read_text())):
                yield from ((f"{path}:{node.lineno}", name) for name in named(node))


@pytest.mark.parametrize("folder", ["tfkern", "bench"])
def test_they_stand_in_two_files(folder):
    found = [f"{place} has {name}" for place, name in places(ROOT / folder)]
    assert not found, "undocumented names belong into tfkern/compat.py or compat_triton.py:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("x = torch._C._nn.gelu", "torch._C._nn.gelu"), ("from torch._subclasses import FakeTensor", "torch._subclasses.FakeTensor"),
        ("from torch.fx.experimental.proxy_tensor import make_fx", "torch.fx.experimental.proxy_tensor.make_fx"),
        ("import torch.fx.experimental.symbolic_shapes", "torch.fx.experimental.symbolic_shapes"),
        ("from torch.fx import traceback", "torch.fx.traceback"), ("from triton import knobs", "triton.knobs"),
        ("from triton.runtime import driver", "triton.runtime.driver"), ("import triton.backends", "triton.backends"),
        ("from triton.experimental.gluon._runtime import X", "triton.experimental.gluon._runtime.X"),
        ("module._buffers.clear()", "module._buffers"), ("getattr(x, '_ragged_idx')", "_ragged_idx"),
        ("resolve('triton.compiler:ASTSource')", "triton.compiler.ASTSource"), ("run = kernel.packed_metadata", "kernel.packed_metadata"),
        ("class Layer:\n def _load_from_state_dict(self): pass", "_load_from_state_dict"),
        ("import torch, triton.language as tl", None), ("from torch.nn.attention import sdpa_kernel", None),
        ("from triton.experimental.gluon import language", None), ("self._kept = torch.Tensor.__torch_function__", None),
    ],
)  # fmt: skip
def test_they_are_seen_wherever_else_they_stand(line, name, tmp_path):
    (tmp_path / "module.py").write_text(f"\n{line}\n")
    (tmp_path / "compat.py").write_text(line)
    found = list(places(tmp_path))
    assert {seen for _, seen in found} >= ({name} if name else set())
    assert bool(found) is (name is not None)
    assert all(re.search(r"module\.py:[23]$", place) for place, _ in found)


def test_none_has_moved():
    assert compat_triton.MOVED == []
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


def test_sizes_that_data_decide_on_without_their_names(monkeypatch):
    """A condition is PyTorch's to decide on, and a size what it was."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    unknown = env.create_unbacked_symint()
    assert compat.guard_or(True, unknown == 3)
    assert not compat.guard_or(False, unknown == 3)
    assert compat.with_unknown_as(unknown * 2, 5) == 10
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)
    assert compat.guard_or(False, torch.zeros(()) == 0) is True
    assert compat.guard_or(True, torch.zeros(()) == 1) is False
    assert compat.with_unknown_as(unknown, 5) is unknown


WITHOUT = """
import pkgutil, torch
def moved(name): raise AttributeError(name)
kept, pkgutil.resolve_name = pkgutil.resolve_name, moved
import tfkern
from tfkern import compat, compat_triton, reference
pkgutil.resolve_name = kept
assert len(compat_triton.MOVED) > 25 and not compat.KERNELS
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


ONE_BY_ONE = """
import os, pkgutil, sys, traceback, torch
original, hidden = pkgutil.resolve_name, None
def resolve(name):
    if name == hidden: raise AttributeError(name)
    return original(name)
pkgutil.resolve_name = resolve
def both(attend):
    qkv = [torch.linspace(-1, 1, 72).view(1, 2, 9, 4).roll(i, 2).requires_grad_() for i in range(3)]
    out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), qkv)]
def plain(q, k, v):
    return (q @ k.mT / 2).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1) @ v
def child(name):  # a process of its own, as a library of ops is registered once; no autograd before the fork, which has threads
    global hidden
    hidden = name
    if (pid := os.fork()) == 0:
        try:
            import tfkern
            found = both(lambda *qkv: tfkern.attention(*qkv, is_causal=True))
            assert tfkern.compat_triton.MOVED == [hidden], tfkern.compat_triton.MOVED
            for got, want in zip(found, both(plain), strict=True): torch.testing.assert_close(got, want)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0
names = eval(sys.argv[1])
print(*[name for name in names if not child(name)])
"""


@pytest.mark.slow  # all at once are in make test
def test_each_may_move_by_itself():
    """Every name that is asked for on import: without it tfkern is imported, and a plain call and its gradients are right."""
    names = set(re.findall(r'found\("([\w.:]+)"\)', (ROOT / "tfkern" / "compat.py").read_text()))
    assert len(names) > 25
    command = [sys.executable, "-W", "ignore", "-c", ONE_BY_ONE, repr(sorted(names))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


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
        assert set(re.findall(r"\b3\.\d\.\d\b", versions("README.md", r"CI does this with Triton ([^\n]*)")[0])) <= gated | {
            pairs[""]
        }
