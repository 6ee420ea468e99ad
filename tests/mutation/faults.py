"""Every fault of synchronisation of a Gluon kernel: a call taken out, a wait for the wrong phase or for too little, a barrier that
counts wrongly, a buffer of the wrong stage, memory given free one statement early."""

import ast
import copy
from collections.abc import Iterator

from mutants import Mutant, changed

BUFFERS = {"slot": "C.TILES", "place": "C.RING", "do_stage": "(C.STAGES - 1)"}  # how many there are of what has such a number
OPPOSITE = {"'sync'": "'arrive'", "'arrive'": "'sync'"}


def faults(file: str, source: str) -> Iterator[Mutant]:
    """All of them, of the device functions of a file."""
    yield from changed(file, source, _changes)
    yield from _early(file, source)


def _changes(node: ast.AST, statement: ast.stmt):
    """Functions that change a node in place, each in one way."""
    for text in _instead(node, statement):
        yield _become(ast.parse(text, mode="eval").body)


def _become(other: ast.expr):
    def change(node: ast.AST) -> None:
        node.__class__, node.__dict__ = type(other), vars(other)

    return change


def _instead(node: ast.AST, statement: ast.stmt) -> Iterator[str]:
    """What wrongly stands in the place of an expression."""
    if isinstance(node, ast.Constant) and repr(node.value) in OPPOSITE:
        yield OPPOSITE[repr(node.value)]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mod, ast.BitAnd)):  # of stages and phases
        yield f"({ast.unparse(node.left)}) + {ast.unparse(node.right)}"
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name == "warpgroup_mma_wait":
            deps = node.keywords[0].value
            yield ast.unparse(deps.elts[0] if len(deps.elts) == 1 else deps)
        elif isinstance(statement, ast.Expr) and statement.value is node and name != "gl.static_assert":
            yield "None"
        yield from _wrong_arguments(node, name)


def _wrong_arguments(call: ast.Call, name: str) -> Iterator[str]:
    """The call with one argument changed."""
    if name in ("warpgroup_mma_wait", "tma.store_wait"):  # how many may be in flight
        yield _with(call, 0, "{} + 1")
    elif name == "mbarrier.wait":
        yield _with(call, 1, "({}) ^ 1")
    elif name == "mbarrier.expect":
        yield _with(call, 1, "({}) // 2")
    elif name == "barriers":
        yield _with(call, 1, "{} + 1")
        if not isinstance(call.args[1], ast.Constant):
            yield _with(call, 1, "{} - 1")
    elif name == "stage_of":
        yield _with(call, 0, "{} + 1")
    elif name == "named_barrier":
        yield _with(call, 1, "{} + 1")
        yield _with(call, 2, "{} // 2")
    elif name.endswith(".index"):
        stage = isinstance(call.args[0], ast.Name) and call.args[0].id not in ("c", "i", "CONSUMER")
        number = BUFFERS.get(ast.unparse(call.args[0]), "C.STAGES")
        yield _with(call, 0, f"({{}} + 1) % {number}" if stage else "1 - {}")
    for i, keyword in enumerate(call.keywords):
        if keyword.arg == "count":
            yield _with(call, i - len(call.keywords), "{} + 1")
        if keyword.arg == "pred":
            yield _with(call, i - len(call.keywords), "True")


def _with(call: ast.Call, place: int, text: str) -> str:
    """A call whose argument number `place` is changed to `text`; negative numbers count keywords from the last."""
    other = copy.deepcopy(call)
    if place < 0:
        keyword = other.keywords[place]
        keyword.value = ast.parse(text.format(ast.unparse(keyword.value)), mode="eval").body
    else:
        other.args[place] = ast.parse(text.format(ast.unparse(other.args[place])), mode="eval").body
    return ast.unparse(other)


def _early(file: str, source: str) -> Iterator[Mutant]:
    """Each arrival at an mbarrier one statement early."""
    for index in range(len(_arrivals(ast.parse(source)))):
        tree = ast.parse(source)
        body, place = _arrivals(tree)[index]
        one, two = body[place - 1 : place + 1]
        body[place - 1 : place + 1] = two, one
        before = [ast.unparse(x).splitlines()[0] for x in (one, two)]
        yield Mutant(file, two.lineno, "; ".join(before), "; ".join(reversed(before)), ast.unparse(tree))


def _arrivals(tree: ast.Module) -> list[tuple[list[ast.stmt], int]]:
    """(the statements among which it stands, its place there) of each that has one before it."""
    bodies = [body for node in ast.walk(tree) for body in (getattr(node, "body", None), getattr(node, "orelse", None))]
    return [
        (body, place)
        for body in bodies
        if isinstance(body, list)
        for place, statement in enumerate(body)
        if place and isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("mbarrier.arrive(")
    ]
