"""The architecture's laws on imports, held against the sources themselves."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Imports point down, or to the side without a circle.
LAYERS = {
    1: ("errors", "partial", "values"),
    2: ("arrays", "integers", "protocols"),
    3: (
        "dilation",
        "documents",
        "dropout",
        "grouping",
        "layout",
        "merge",
        "partition",
        "pieces",
        "positions",
        "routes",
        "schedule",
        "tile",
        "tiling",
    ),
    4: (
        "agreement",
        "arguments",
        "backward_work",
        "balance",
        "call",
        "discovery",
        "exchange",
        "forward_work",
        "grid",
        "grid_session",
        "inputs",
        "keywords",
        "local",
        "prepared",
        "probation",
        "remembered",
        "replicated",
        "resumption",
        "ring",
        "session",
        "sums",
        "trading",
        "visiting_queries",
    ),
    5: ("__init__", "api", "cli", "decoding", "dilated", "explanation", "testing"),
}
LAYER = {module: layer for layer, modules in LAYERS.items() for module in modules}
PORTABLE = {"array_api_compat"}  # what layers 1 to 4 may import besides the standard library
TOP = {"pyproject.toml", "ringcore", "adapters", "tests", "docs", "noxfile.py", "README.md", "LICENSE"}
# Imported by another name:
IMPORTED = {"flash-attn-4": "flash_attn", "nvidia-cudnn-frontend": "cudnn", "cupy-cuda13x": "cupy"}
BROUGHT = {"torch": ("triton",), "cupy-cuda13x": ("cupyx", "numpy")}  # what a library brings where it is of use
# Whose arrays kernels take beside what their extra lists: each imported in one file alone, which nothing else needs.
BORDERS = {("ringcore_cudnn", "torch_arrays.py"): "torch", ("ringcore_cudnn", "cupy_arrays.py"): "cupy"}
BUILT = {"build", "dist", "PKG-INFO", "__pycache__"}  # what a tree without git may hold as well

MODULES = sorted(path.relative_to(ROOT / "ringcore") for path in (ROOT / "ringcore").rglob("*.py"))
ADAPTERS = sorted(path.name for path in (ROOT / "adapters").glob("ringcore_*"))


@cache
def imports(path: Path) -> tuple[tuple[str, str | None], ...]:
    """(module, name or None) of every import statement of a file, wherever it stands."""
    return tuple(imports_of(ast.parse(path.read_text(), str(path))))


def imports_of(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            yield from ((node.module or "", alias.name) for alias in node.names)


def top(module: str) -> str:
    return module.partition(".")[0]


def unit(module: str) -> str:
    """The row of the table that a ringcore module belongs to: "ring", "cli", "__init__"."""
    return module.split(".")[1] if "." in module else "__init__"


def imported_units(path: Path) -> set[str]:
    """The rows of the table that a file imports; ``from ringcore import ring`` may name a module, too."""
    found = set()
    for module, name in imports(path):
        if top(module) == "ringcore":
            found.add(name if module == "ringcore" and name in LAYER else unit(module))
    return found


def row(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def test_every_module_has_a_layer():
    assert {row(module) for module in MODULES} == set(LAYER)
    assert len(LAYER) == sum(map(len, LAYERS.values())), "a module has two layers"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down(module):
    wrong = {name for name in imported_units(ROOT / "ringcore" / module) if LAYER[name] > LAYER[row(module)]}
    assert not wrong, f"{module} is in layer {LAYER[row(module)]} and imports {sorted(wrong)} from above"


def test_imports_form_no_circle():
    files = {module: ROOT / "ringcore" / module for module in MODULES if len(module.parts) == 1}
    graph = {row(module): imported_units(path) - {row(module)} for module, path in files.items()}
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)


@pytest.mark.parametrize("module", [m for m in MODULES if LAYER.get(row(m), 0) < 5], ids=str)
def test_lower_layers_import_the_standard_library_and_array_api_compat_alone(module):
    path = ROOT / "ringcore" / module
    used = {top(name) for name, _ in imports(path)} - {"ringcore"}
    assert used <= sys.stdlib_module_names | PORTABLE
    # Nor do they import by name what they may not import by statement.
    called = {node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not {getattr(f, "attr", getattr(f, "id", "")) for f in called} & {"import_module", "__import__"}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_import_public_names_of_ringcore(adapter):
    public = public_names()
    wrong = []
    for path in sorted((ROOT / "adapters" / adapter).rglob("*.py")):
        for module, name in imports(path):
            if top(module) == "ringcore" and (module != "ringcore" or name not in public):
                wrong.append(f"{path.name}: {module}" + (f".{name}" if name else ""))
    assert not wrong, "not public: " + ", ".join(wrong)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_import_what_their_extra_lists_and_no_other_adapter(adapter):
    allowed = sys.stdlib_module_names | {"ringcore", adapter} | listed(adapter.removeprefix("ringcore_"))
    for path in (ROOT / "adapters" / adapter).rglob("*.py"):
        used = {top(module) for module, _ in imports(path)}
        assert used <= allowed | {BORDERS.get((adapter, path.name))}, path.name


def public_names() -> set[str]:
    tree = ast.parse((ROOT / "ringcore" / "__init__.py").read_text())
    (names,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets)
    )
    return set(ast.literal_eval(names))


def listed(extra: str) -> set[str]:
    """The import names of what ringcore and one of its extras require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = set()
    for requirement in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        name, extras = re.match(r"([\w.-]+)(?:\[(.*)\])?", requirement).groups()
        if name == "ringcore":
            found |= {library for other in extras.split(",") for library in listed(other.strip())}
        else:
            found |= {IMPORTED.get(name, name.replace("-", "_")), *BROUGHT.get(name, ())}
    return found


def test_importing_ringcore_loads_no_array_library_and_no_mpi():
    program = "import sys, ringcore; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, timeout=150
    )
    assert not set(done.stdout.split()) & {"numpy", "torch", "mpi4py", "cupy", "jax", "array_api_strict", *ADAPTERS}


def test_adapters_folder_holds_packages_alone():
    held = [path for path in (ROOT / "adapters").iterdir() if path.name != "__pycache__"]
    assert held
    assert all(path.is_dir() and path.name.startswith("ringcore_") for path in held)
    assert all((path / "__init__.py").is_file() and (path / "py.typed").is_file() for path in held)


def test_top_of_the_tree_holds_known_names():
    names = {name for name in top_names() if not name.startswith(".")}
    assert names <= TOP, f"unknown: {sorted(names - TOP)}"


def top_names() -> set[str]:
    """What git tracks, or where there is no git, what lies there and no build left behind."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=True)
        return {name.partition("/")[0] for name in done.stdout.split("\0") if name}
    names = {path.name for path in ROOT.iterdir()} - BUILT
    return {name for name in names if not name.endswith(".egg-info")}
