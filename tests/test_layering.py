"""The arrows of the design: who may import whom."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Each may import the layers after it; modules of one line must not import each other, except within one package.
LAYERS = [
    ["tfkern.cli"],
    ["tfkern.commands"],
    ["tfkern.bench"],
    ["tfkern.training"],
    ["tfkern.models"],
    ["tfkern.testing"],
    ["tfkern"],
    ["tfkern.integrations"],
    ["tfkern.nn"],
    ["tfkern.functional"],
    ["tfkern.ops"],
    ["tfkern.autograd", "tfkern.nested"],
    ["tfkern.call"],
    ["tfkern.backends"],
    [
        "tfkern.backends.portable",
        "tfkern.backends.cpu",
        "tfkern.backends.eager",
        "tfkern.backends.hopper",
    ],
    ["tfkern.cpu_fused", "tfkern.eager_groups"],
    ["tfkern.cpu_calls", "tfkern.eager_tiles", "tfkern.groups"],
    ["tfkern.band", "tfkern.sequences"],
    ["tfkern.reference"],
    ["tfkern.features"],
    ["tfkern.problem", "tfkern.launch", "tfkern.dropout", "tfkern.score_mods"],
    ["tfkern.tma"],
    ["tfkern.layout"],
    ["tfkern.checks"],
    ["tfkern.interpreter", "tfkern.configs", "tfkern.extras", "tfkern.dynamo", "tfkern.tracing", "tfkern.options"],
    ["tfkern.tiles", "tfkern.compat", "tfkern.ending", "tfkern.progress", "tfkern.whole"],
    ["tfkern.kernels"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def layer(module: str) -> str:
    while module not in RANK:
        module = module.rpartition(".")[0]
    return module


def modules():
    for folder, package in (("tfkern", "tfkern"), ("kernels", "tfkern.kernels"), ("bench", "tfkern.bench")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield path, ".".join([package, *(p for p in parts if p != "__init__")])


def imports(path: Path, module: str):
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module}".rstrip(".") if node.level else node.module
            base = package if node.level and not node.module else base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def known(name: str, names: set[str]) -> str | None:
    """The module of ours that an import of `name` needs."""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name or None


def test_arrows_point_one_way():
    all_modules = {module: path for path, module in modules()}
    wrong = []
    for module, path in all_modules.items():
        for name in imports(path, module):
            target = known(name, set(all_modules))
            if target is None or layer(target) == layer(module):
                continue
            if RANK[layer(target)] <= RANK[layer(module)]:
                wrong.append(f"{module} imports {name}")
    assert not wrong
    assert len(all_modules) > 30


def test_kernels_import_triton_and_siblings_only():
    for path, module in modules():
        if not module.startswith("tfkern.kernels"):
            continue
        for name in imports(path, module):
            assert name.split(".")[0] in ("triton", "typing") or name.startswith("tfkern.kernels."), (module, name)


def test_backends_do_not_import_each_other():
    for path, module in modules():
        if module.startswith("tfkern.backends."):
            assert not any(n.startswith("tfkern.backends") for n in imports(path, module)), module


def test_tile_sizes_are_plain_data():
    """The compile gate loads them where there is no torch."""
    for name in ("tiles", "configs"):
        found = set(imports(ROOT / "tfkern" / f"{name}.py", f"tfkern.{name}"))
        assert not any(n.split(".")[0] in ("torch", "triton", "tfkern") and not n.startswith("tfkern.tiles.") for n in found)


def test_no_file_or_function_outgrows_its_reader():
    for path, module in modules():
        assert len(path.read_text().splitlines()) <= 600, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                limit = 120 if module.startswith("tfkern.kernels") else 75
                assert node.end_lineno - node.lineno < limit, (path, node.name)
