"""Every mutant of a kernel file: the source with one operator, bound, sign, constant, mask or condition changed."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.RShift: ast.LShift,
}  # fmt: skip
CALLS = {"minimum": "maximum", "maximum": "minimum"}


@dataclass(frozen=True)
class Mutant:
    """A changed source, and where: file, line, the piece before and after."""

    file: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}: {self.before} -> {self.after}"


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """All mutants of the device functions of a file."""
    return changed(file, source, _changes)


def changed(file: str, source: str, changes) -> Iterator[Mutant]:
    """A file with one node of its device functions changed: `changes` gives for (node, its statement) functions that change one
    in place."""
    tree = ast.parse(source)
    nodes = list(_mutable(tree))
    for index, (node, statement) in enumerate(nodes):
        for change in changes(node, statement):
            other = copy.deepcopy(tree)
            node_there, whole = list(_mutable(other))[index]
            change(node_there)
            before, after = (_text(s) for s in (statement, whole))
            if before != after:
                yield Mutant(file, statement.lineno, *_shorten(before, after), ast.unparse(other))


def _text(statement: ast.stmt) -> str:
    """A statement, or the head of one that has a body."""
    return ast.unparse(statement).splitlines()[0]


def _shorten(before: str, after: str) -> tuple[str, str]:
    """Both without what they share far from the change."""
    start = 0
    while before[start : start + 1] == after[start : start + 1]:
        start += 1
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    lo = max(0, start - 30)
    return before[lo : len(before) - max(0, end - 20)], after[lo : len(after) - max(0, end - 20)]


def _mutable(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.stmt]]:
    """(node, the statement that it is in) of everything that runs on the device: bodies of jit functions."""
    for function in tree.body:
        jit = isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list)
        if jit:
            for statement in function.body:
                yield from _within(statement)


def _within(statement: ast.stmt) -> Iterator[tuple[ast.AST, ast.stmt]]:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return  # a docstring
    for _, value in ast.iter_fields(statement):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.stmt):
                yield from _within(child)
            elif isinstance(child, ast.expr):
                yield from ((node, statement) for node in ast.walk(child) if isinstance(node, ast.expr))
    if isinstance(statement, ast.AugAssign):
        yield statement, statement


def _changes(node: ast.AST, _statement: ast.stmt):
    """Functions that change a node in place, each in one way."""
    if (isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in SWAPS) or isinstance(node, ast.BoolOp):
        yield lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield lambda n: setattr(n, "op", ast.UAdd())
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield lambda n: setattr(n, "value", n.value + 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in CALLS:
            yield lambda n: setattr(n.func, "attr", CALLS[n.func.attr])
        if node.func.attr == "where" and len(node.args) == 3:
            yield _keep_only(1)
            yield _keep_only(2)


def _keep_only(index: int):
    """Turn where(c, x, y) into where(c, x, x) or where(c, y, y): the mask without effect."""

    def change(call: ast.Call) -> None:
        call.args[3 - index] = copy.deepcopy(call.args[index])

    return change
