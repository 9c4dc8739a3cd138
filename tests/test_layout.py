"""The layout as docs/development.md draws it: what a folder may import, no circles, callees above callers.

Assertions do nothing else, which has no better place.
Read from the imports and names themselves, nothing is imported here.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "lora_drop_runtime": ROOT / "runtime",
    "lora_drop_serve": ROOT / "runtime",
    "lora_drop_export": ROOT,
    "lora_drop_tools": ROOT / "tools",
}
# A room imports from rooms that stand further down, and from itself. Rooms of one line never meet.
RUNTIME = [
    ["grammars"],
    ["decoding"],
    ["engines"],
    ["bundle"],
    ["plan"],
    ["dtypes", "text", "command_line"],
    ["templates", "files", "bounds", "reasoning"],
    ["errors"],
]
SERVE = [
    ["server", "ray_app"],
    ["app"],
    ["records", "response_answers", "response_requests"],
    ["answers", "requests"],
    ["driver"],
    ["errors", "key", "log", "metrics", "names", "openapi"],
]
EXPORT = [
    ["__main__"],
    ["cli"],
    ["compiler"],
    ["targets"],
    ["check", "graphs"],
    ["decoder"],
    ["weights"],
    ["checkpoint"],
    ["quantize"],
    ["console", "staging"],
]
TOOLS = [
    ["__main__"],
    ["cli"],
    ["generate", "serve", "inspect", "compare", "profile", "fit", "eval", "bench"],
    ["teacher_forcing"],
    ["shared"],
]
FLOORS = {"lora_drop_runtime": RUNTIME, "lora_drop_serve": SERVE, "lora_drop_export": EXPORT, "lora_drop_tools": TOOLS}
BELOW = {
    "lora_drop_runtime": (),
    "lora_drop_serve": ("lora_drop_runtime",),
    "lora_drop_export": ("lora_drop_runtime",),
    "lora_drop_tools": tuple(SOURCES),
}
APART = ("ort", "openvino", "trt")
NEVER_MEET = {"lora_drop_export.targets": APART, "lora_drop_runtime.engines": APART}
CHANGES = {"setdefault", "pop", "popitem", "add", "append", "update", "extend", "insert", "remove", "discard", "next"}
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "polygraphy", "onnx_graphsurgeon", "safetensors"}


def module_files() -> dict[str, Path]:
    """Dotted name → file of every module of the product."""
    found = {}
    for package, source in SOURCES.items():
        for file in sorted((source / package).rglob("*.py")):
            parts = file.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = module_files()


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


@functools.cache
def imported_modules(name: str) -> frozenset[str]:
    """Modules that a module imports, also inside functions; those of the product by their full name."""
    found: set[str] = set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in MODULES else base)
    return frozenset(found)


def test_the_page_draws_these_floors() -> None:
    page = (ROOT / "docs/development.md").read_text().split("## Who may import what\n", 1)[1]
    drawn = page.split("```\n", 2)[1].replace(" →\n", " →").splitlines()
    for path, floors in zip(drawn[::2], drawn[1::2], strict=True):
        said = [sorted(re.findall(r"\w+", part)) for part in floors.split("→")]
        assert said == [sorted(rooms) for rooms in FLOORS[Path(path).name]], path


def room(module: str) -> str:
    """`lora_drop_export.graphs.match` → `graphs`; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def floor(module: str) -> int:
    """How far down the room of a module stands; 0 is the top."""
    floors = FLOORS[module.partition(".")[0]]
    (number,) = [i for i, rooms in enumerate(floors) if room(module) in rooms]
    return number


def test_a_room_imports_only_what_stands_below_it() -> None:
    for name in filter(room, MODULES):
        package = name.partition(".")[0]
        for other in imported_modules(name) & set(MODULES):
            other_package = other.partition(".")[0]
            assert other_package in (package, *BELOW[package]), f"{name} imports {other}"
            if other_package != package or room(other) == room(name):
                continue
            assert room(other), f"{name} imports the package {other} that it belongs to"
            assert floor(name) < floor(other), f"{name} imports {other}"


@pytest.mark.parametrize(("rooms", "parts"), NEVER_MEET.items())
def test_targets_never_meet_nor_do_their_engines(rooms: str, parts: tuple[str, ...]) -> None:
    for name in MODULES:
        mine = [part for part in parts if name.startswith(f"{rooms}.{part}.")]
        for other in imported_modules(name) if mine else ():
            assert not any(other.startswith(f"{rooms}.{part}.") for part in parts if part not in mine), name


def test_the_runtime_imports_no_library_of_the_exporter() -> None:
    for name in MODULES:
        if name.startswith(("lora_drop_runtime", "lora_drop_serve")):
            assert not {other.partition(".")[0] for other in imported_modules(name)} & HEAVY, name


def test_no_assertion_does_something() -> None:
    """`python -O` leaves assertions out, with what is done in them: graphs lacked their weights."""
    for name in MODULES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Assert):
                calls = [ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]
                assert not [call for call in calls if call.rpartition(".")[2] in CHANGES], f"{name}, line {node.lineno}"


def test_nothing_imports_from_the_tests() -> None:
    for name in MODULES:
        assert not {other for other in imported_modules(name) if other.partition(".")[0] == "tests"}, name
    for file in [*(ROOT / "plugins").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] != "tests", file
            elif isinstance(node, ast.Import):
                assert all(alias.name.partition(".")[0] != "tests" for alias in node.names), file


def test_no_file_is_in_a_circle() -> None:
    """Imports inside functions count as well: moving one there does not open a circle."""
    imports = {name: imported_modules(name) & set(MODULES) - {name} for name in MODULES}
    imports = {name: {other for other in found if room(other)} for name, found in imports.items()}
    done: set[str] = set()
    while True:
        free = {name for name in imports if name not in done and imports[name] <= done | {name}}
        if not free:
            break
        done |= free
    stuck = sorted(name for name in set(imports) - done if room(name))
    assert not stuck, f"in a circle, or above one: {stuck}"


def test_callees_stand_above_callers() -> None:
    """A function uses only functions and classes above it; two that call each other are alone excepted."""
    for name in MODULES:
        check_order(name)


def check_order(module: str) -> None:
    definitions = [n for n in tree(module).body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)]
    number = {node.name: i for i, node in enumerate(definitions)}
    uses = [
        {number[n.id] for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in number} for node in definitions
    ]

    def reaches(begin: int, end: int) -> bool:
        seen, todo = set(), [begin]
        while todo:
            here = todo.pop()
            todo += [other for other in uses[here] if other not in seen]
            seen |= uses[here]
        return end in seen

    for caller, callees in enumerate(uses):
        for callee in callees:
            later = callee > caller and not reaches(callee, caller)
            assert not later, f"{module}: {definitions[caller].name} stands above {definitions[callee].name}"
