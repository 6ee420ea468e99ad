"""The arrows of the design: who may import whom, down to the modules of kernels/, integrations/ and bench/."""

import ast
import itertools
import re
import runpy
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent.parent


def inside(package: str, *lines: str) -> list[list[str]]:
    """Lines of a package's modules; a lone dot is the package itself."""
    return [[package if name == "." else f"{package}.{name}" for name in line.split()] for line in lines]


# Each may import the layers after it; modules of one line must not import each other. A package without lines of its own is one
# module here, whose parts may import each other as they like.
LAYERS = [
    ["tfkern.cli"],
    ["tfkern.commands"],
    *inside("tfkern.bench.gpu", "__main__", "chip_tests steps supervisor", "prewarm rows worker",
            "blocks peer_faults repeats sanitized tuning", "smoke"),
    *inside("tfkern.bench.reference", "models", "gpt onnx_weights", "rows"),
    *inside("tfkern.bench.suite", "conftest test_attention_speed"),
    *inside("tfkern.bench.static", "against calibrate rank", "hopper_model", "hopper_gate model", "sweep", "calibration compile_gate",
            "geometry", "cost_model", "amdgcn sass", "aot candidates compare machine_code"),
    *inside("tfkern.bench", "gpu reference static", "cpu_memory cpu_models overhead report runner", "cpu plots providers stub_gpu verify",
            "chips cpu_cases fake_gpu faults launches results shapes timing", "gpu.checkout", "."),
    ["tfkern.training"],
    ["tfkern.models"],
    ["tfkern.testing"],
    ["tfkern"],
    *inside("tfkern.integrations", "patching", "nanogpt served timm torch_flash torch_modules transformers_models", "transformers",
            "torch_sdpa", "adapters flash_attn replay sharded transformers_asking transformers_masks", "."),
    ["tfkern.nn"],
    ["tfkern.functional"],
    ["tfkern.ops"],
    ["tfkern.autograd", "tfkern.nested"],
    ["tfkern.call"],
    *inside("tfkern.backends", ".", "portable cpu eager hopper"),
    ["tfkern.cpu_fused", "tfkern.eager_groups"],
    ["tfkern.cpu_calls", "tfkern.eager_tiles", "tfkern.groups"],
    ["tfkern.band", "tfkern.sequences"],
    ["tfkern.reference"],
    ["tfkern.planner"],
    ["tfkern.features"],
    ["tfkern.problem", "tfkern.launch", "tfkern.dropout", "tfkern.score_mods"],
    ["tfkern.tma"],
    ["tfkern.layout"],
    ["tfkern.checks"],
    ["tfkern.interpreter", "tfkern.configs", "tfkern.extras", "tfkern.dynamo", "tfkern.tracing", "tfkern.options"],
    ["tfkern.tiles", "tfkern.compat", "tfkern.ending", "tfkern.progress", "tfkern.whole"],
    ["tfkern.compat_triton"],
    # No kernel imports another: what two of them need is a device function of a layer below.
    *inside("tfkern.kernels", "flash_bwd_dbias flash_bwd_dkdv flash_bwd_dq flash_fwd hopper.flash_bwd hopper.flash_bwd_dkdv"
            " hopper.flash_bwd_dq hopper.flash_fwd hopper.flash_fwd_short", "hopper.attend hopper.flash_bwd_consume"
            " hopper.flash_bwd_dkdv_consume hopper.flash_bwd_dq_consume hopper.flash_bwd_gather", "hopper.flash_bwd_parts hopper.loads",
            "hopper.parts hopper.work hopper", "softmax work", "score", "dropout",
            "band features rounding score_mods sequence tile", "static", "."),
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Whose modules have no places of their own.
WHOLE = ("tfkern.commands", "tfkern.models", "tfkern.nn", "tfkern.testing", "tfkern.training")


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
    """The full names that a module imports."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def known(name: str, names) -> str | None:
    """The module of ours that an import of `name` needs."""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name or None


def wrong_arrows(module: str, imported, names) -> list[str]:
    """What a module may not import."""
    targets = ((name, known(name, names)) for name in imported)
    return [
        f"{module} imports {name}: by LAYERS of tests/test_layering.py it may not"
        for name, target in targets
        if target and layer(target) != layer(module) and RANK[layer(target)] <= RANK[layer(module)]
    ]


def test_arrows_point_one_way():
    all_modules = {module: path for path, module in modules()}
    assert len(all_modules) > 30
    wrong = [w for module, path in all_modules.items() for w in wrong_arrows(module, imports(path, module), all_modules)]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_place():
    """And no place is for a module that went."""
    found = {module for _, module in modules()}
    lost = [module for module in sorted(found - set(RANK)) if not module.startswith(WHOLE)]
    assert not lost, (
        f"add {', '.join(lost)} to LAYERS of tests/test_layering.py, above what each imports and below who imports it"
    )
    assert set(RANK) <= found, f"LAYERS of tests/test_layering.py has {sorted(set(RANK) - found)}, which are no modules"
    assert set(WHOLE) <= set(RANK)


def test_arrows_that_point_up_are_seen():
    """In all the ways in which an import can be written."""
    names = {module for _, module in modules()}
    for module, line, wrong in [
        ("tfkern.kernels.tile", "from . import score", True), ("tfkern.kernels.tile", "from .score import mask", True),
        ("tfkern.kernels.score", "from . import tile", False), ("tfkern.kernels.flash_fwd", "from . import flash_bwd_dq", True),
        ("tfkern.kernels.tile", "from .hopper import parts", True), ("tfkern.kernels.hopper.parts", "from .. import tile", False),
        ("tfkern.kernels.hopper.parts", "from .attend import attend", True), ("tfkern.kernels.score", "import tfkern.kernels.softmax", True),
        ("tfkern.kernels.hopper.flash_fwd", "from ..flash_fwd import flash_fwd", True),
        ("tfkern.bench.report", "from tfkern.bench.static import cost_model", True), ("tfkern.bench.static.sass", "from . import sweep", True),
        ("tfkern.bench.runner", "from tfkern.bench import gpu", True), ("tfkern.bench.report", "from tfkern.bench import runner", True),
        ("tfkern.bench.static.cost_model", "from tfkern.bench import chips", False),
        ("tfkern.integrations.torch_sdpa", "from tfkern.integrations import patching", True),
        ("tfkern.integrations.timm", "from .nanogpt import patch", True), ("tfkern.nn.cache", "import tfkern.training.trainer", True),
    ]:  # fmt: skip
        path = _Text(line)
        assert bool(wrong_arrows(module, imports(path, module), names)) is wrong, (module, line)


class _Text:
    """A module that is not in a file."""

    name = "module.py"

    def __init__(self, text: str):
        self.text = text

    def read_text(self) -> str:
        return self.text


def shipped(monkeypatch) -> set[str]:
    """The modules that setup.py puts into the wheel."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return {module for path, module in modules() if _package(path, module) in given["packages"]}


def _package(path: Path, module: str) -> str:
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def started(path: Path):
    """The modules that a file runs in processes of their own: those that follow "-m" in a list."""
    for node in ast.walk(ast.parse(path.read_text())):
        texts = [getattr(one, "value", None) for one in node.elts] if isinstance(node, ast.List) else []
        yield from (b for a, b in itertools.pairwise(texts) if a == "-m" and re.fullmatch(r"tfkern[.\w]+", str(b)))


def test_the_wheel_ships_what_the_command_needs_and_no_more(monkeypatch):
    """Of bench/: all that `tfkern bench` imports or starts, and nothing beside that."""
    all_modules, inside = {module: path for path, module in modules()}, shipped(monkeypatch)
    assert {"tfkern.cli", "tfkern.kernels.flash_fwd", "tfkern.kernels.hopper.flash_fwd"} <= inside
    needed, todo = set(), ["tfkern.commands.bench"]
    while todo:
        module = todo.pop()
        needed.add(module)
        names = {known(name, all_modules) for name in (*imports(all_modules[module], module), *started(all_modules[module]))}
        todo += [name for name in names if name and name.startswith("tfkern.bench") and name not in needed]
    assert {module for module in inside if module.startswith("tfkern.bench")} == needed - {"tfkern.commands.bench"} | {
        "tfkern.bench"
    }


def test_what_the_wheel_ships_imports_nothing_that_it_lacks(monkeypatch):
    all_modules, inside = {module: path for path, module in modules()}, shipped(monkeypatch)
    for module in inside:
        lacking = {known(name, all_modules) for name in imports(all_modules[module], module)} - inside - {None}
        assert not lacking, (module, lacking)


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
