"""Who may import whom: read the table from top to bottom and you know the house.

Packages: ``launch -> trainer -> {memory, parallel} -> planner``. Inside a package a room may import the rooms named
beside it. What stands at a package's door (files that are in no room) is listed with its own arrows; a file at the door
that is not in the table may import everything in its package. No circle is left between any two files, imports for
type checking included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

PACKAGES = {
    "planner": (),
    "parallel": ("planner",),
    "memory": ("planner",),
    "trainer": ("memory", "parallel", "planner"),
    "launch": ("trainer", "memory", "parallel", "planner"),
}

_GROUND = ("planner.errors", "planner.units", "planner.codec", "planner.plan", "planner.solver")
_STEPS = ("planner.step_planner", "planner.service")
_SEARCH, _FLEXSP = "planner.strategies.search", "planner.strategies.flexsp"

ROOMS: Mapping[str, tuple[str, ...]] = {
    # planner/, the door: values that everybody speaks
    "planner.errors": (),
    "planner.units": ("planner.errors",),
    "planner.codec": ("planner.errors",),
    "planner.plan": ("planner.errors", "planner.codec"),
    "planner.solver": ("planner.errors",),
    # planner/, room by room
    "planner.inputs": _GROUND,
    "planner.addresses": _GROUND,
    "planner.schedules": (*_GROUND, "planner.inputs"),
    "planner.cost": (*_GROUND, "planner.inputs", "planner.schedules"),
    "planner.pricing": (*_GROUND, "planner.inputs", "planner.schedules", "planner.cost"),
    "planner.measured": (*_GROUND, "planner.cost", "planner.pricing"),
    "planner.replay": (*_GROUND, "planner.inputs", "planner.schedules", "planner.cost", "planner.pricing"),
    "planner.strategies.search": (*_GROUND, "planner.schedules", "planner.cost", "planner.pricing"),
    "planner.strategies": (*_GROUND, "planner.schedules", "planner.cost", "planner.pricing", _SEARCH),
    "planner.strategies.flexsp": (
        *_GROUND, "planner.schedules", "planner.cost", "planner.pricing", _SEARCH, "planner.strategies",
    ),
    "planner.strategies.adaptive": (
        *_GROUND, "planner.schedules", "planner.cost", "planner.pricing", _SEARCH, "planner.strategies", _FLEXSP,
    ),
    # planner/, the door again: one step planned
    "planner.step_planner": (
        *_GROUND, "planner.cost", "planner.pricing", "planner.strategies", _FLEXSP, "planner.strategies.adaptive",
    ),
    "planner.service": (*_GROUND, "planner.cost", "planner.pricing", "planner.step_planner"),
    # planner/, what people read
    "planner.pages": (
        *_GROUND, *_STEPS, "planner.inputs", "planner.schedules", "planner.cost", "planner.pricing",
        "planner.measured", "planner.replay",
    ),
    "planner.reproduce": (
        *_GROUND, *_STEPS, "planner.inputs", "planner.schedules", "planner.cost", "planner.pricing",
        "planner.strategies", _SEARCH, _FLEXSP, "planner.strategies.adaptive", "planner.replay",
    ),
    # trainer/
    "trainer.rank_env": (),
    "trainer.stop_flag": (),
    "trainer.settings": (),
    "trainer.data": ("trainer.settings",),
    "trainer.model": ("trainer.settings",),
    "trainer.step": ("trainer.rank_env", "trainer.settings", "trainer.data", "trainer.model"),
    "trainer.prices": ("trainer.rank_env", "trainer.settings", "trainer.data", "trainer.model", "trainer.step"),
    "trainer.checkpoint": ("trainer.settings", "trainer.model", "trainer.step"),
    "trainer.record": ("trainer.settings", "trainer.step"),
}


def room_of(module: str) -> str:
    """The longest entry of the table that the module is, or lies in; else its package."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 1, -1))
    return next((name for name in names if name in ROOMS), parts[0])


def imports_of(path: str, tree: ast.AST, modules: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Modules of the house that a file imports, at any depth, with the line. ``modules``: path of each by name."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in full]
        for name in names:
            if name in modules and modules[name] != path:
                yield name, getattr(node, "lineno", 0)


def module_names(paths: Iterator[str] | list[str]) -> dict[str, str]:
    """Path of each module by its dotted name; a package's name is that of its ``__init__.py``."""
    found = {}
    for path in paths:
        parts = PurePosixPath(path).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def check_rooms(sources: Mapping[str, str]) -> list[str]:
    """One line per import that the table does not allow. ``sources``: text by path."""
    modules = module_names(list(sources))
    by_path = {path: name for name, path in modules.items()}
    found = []
    for path, text in sources.items():
        here = room_of(by_path[path])
        package = here.split(".")[0]
        for module, line in imports_of(path, ast.parse(text), modules):
            there = room_of(module)
            if there.split(".")[0] != package:
                allowed = there.split(".")[0] in PACKAGES[package]
            else:
                allowed = here == there or here not in ROOMS or there in ROOMS[here]
            if not allowed:
                found.append(f"{path}:{line}: {here} must not import {there}")
    return found


def find_circles(sources: Mapping[str, str]) -> list[str]:
    """Each circle of imports between files, as one line with its files in order of names (Tarjan's components)."""
    modules = module_names(list(sources))
    arrows = {
        name: sorted({found for found, _ in imports_of(path, ast.parse(sources[path]), modules)})
        for name, path in modules.items()
    }
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles: list[str] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in arrows[name]:
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            members = [stack.pop()]
            while members[-1] != name:
                members.append(stack.pop())
            if len(members) > 1:
                circles.append(", ".join(sorted(members)))

    for name in arrows:
        if name not in order:
            visit(name)
    return circles


def check_prefix(path: str) -> list[str]:
    """No file repeats the name of its folder: the folder says it already."""
    place = PurePosixPath(path)
    folder = place.parent.name
    repeats = place.stem.startswith((folder, f"{folder.rstrip('s')}_"))
    return [f"{path}: repeats the name of its folder"] if repeats else []
