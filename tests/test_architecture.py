"""The order of rooms, over all imports: inside functions and under TYPE_CHECKING too. See docs/architecture.md."""

import ast
import graphlib

import pytest
from helpers_paths import ROOT

import glm4v_jax

FLOORS = (
    ("errors",),
    ("batch", "files"),
    ("config", "devices"),
    ("inputs", "model"),
    ("checkpoints", "data"),
    ("generate",),
    ("hf", "planning", "serve", "tiny"),
    ("console",),
    ("cli", "convert", "eval"),
    ("train",),
    ("bench",),
    ("tools", "examples"),
)
"""Rooms from the ground up; a room imports from the floors below it and from itself. `glm4v_jax.X` is the room X."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_JAX = ("config", "inputs")


def room_of(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "glm4v_jax" and len(parts) > 1 else parts[0]


def all_modules():
    """Module name -> path, of everything but tests."""
    found = {}
    for folder in ("glm4v_jax", "convert", "eval", "train", "bench", "tools", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = all_modules()
# The face of the package: its names come from every room, when they are first used.
FACE = ("glm4v_jax", "glm4v_jax.__main__")


def imports_of(path):
    """Every module that a file names in an import, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in submodules if name in MODULES]
            yield from modules
            if len(modules) < len(submodules):
                yield node.module


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(FACE)))
def test_a_room_imports_from_lower_floors_alone(module):
    room = room_of(module)
    assert room in FLOOR, f"{module}: its room has no floor here"
    above = [
        name
        for name in imports_of(MODULES[module])
        if (other := room_of(name)) in FLOOR and name not in FACE and other != room and FLOOR[other] >= FLOOR[room]
    ]
    assert not above, f"{module} imports {', '.join(above)}, which are not on a lower floor"


def test_no_file_imports_itself_through_others():
    graph = {name: {other for other in imports_of(path) if other in MODULES} - {name} for name, path in MODULES.items()}
    for face in FACE:
        graph.pop(face)
    for name in graph:
        graph[name] -= set(FACE)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room_of(name) in WITHOUT_JAX))
def test_the_host_side_imports_no_jax(module):
    assert not {"jax", "flax", "jaxlib"} & {name.partition(".")[0] for name in imports_of(MODULES[module])}


@pytest.mark.parametrize(
    "module", sorted(name for name in MODULES if room_of(name) not in ("hf", *FLOORS[-2], *FLOORS[-1]))
)
def test_only_users_import_the_transformers_shaped_classes(module):
    skin = {name for name, place in glm4v_jax._EXPORTS.items() if place.startswith("hf.")}
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and module not in FACE:
            assert not (node.module or "").startswith("glm4v_jax.hf"), module
            assert node.module != "glm4v_jax" or not skin & {alias.name for alias in node.names}, module


def test_no_path_imports_the_judge():
    """PyTorch and transformers are for tests and benchmarks alone."""
    for module, path in MODULES.items():
        if room_of(module) not in ("bench", "examples"):
            roots = {name.partition(".")[0] for name in imports_of(path)}
            assert not {"torch", "transformers"} & roots, module
