"""The direction of imports: a room knows those below it and never those above, so that each can be read by itself."""

import ast
from pathlib import Path

import purepg

HOUSE = Path(purepg.__file__).parent
# From the ground up; modules on one floor do not import each other.
FLOORS = [
    {"types", "runtime"},
    {"spread"},
    {"config", "lanes", "loops", "precision"},
    {"equations", "optimize", "envs"},
    {"networks", "experience"},
    {"train", "pbt", "language"},
    {"algorithms"},
    {"lab"},
    {"run"},
]


# What the rooms within `run` may import of it.
WITHIN_RUN = {
    "run.folder": {"console", "sweep"},
    "run.watch": {"console", "sweep", "reliability", "folder"},
    "run.films": {"console", "folder", "load", "evaluation", "cli", "watch"},
}


def imports() -> set[tuple[str, str]]:
    """(importing module, imported module), below purepg, as dotted names."""
    found = set()
    for file in HOUSE.rglob("*.py"):
        module = ".".join(file.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "purepg":
                inside = (node.module or "").removeprefix("purepg").removeprefix(".")
                for alias in node.names:
                    dotted = f"{inside}.{alias.name}".removeprefix(".")
                    is_module = any((HOUSE / dotted.replace(".", "/")).with_suffix(x).exists() for x in (".py", ""))
                    found.add((module, dotted if is_module else inside))
            assert not isinstance(node, ast.Import) or not any(x.name.startswith("purepg") for x in node.names)
    return {(a, b) for a, b in found if a not in ("__init__", b)}


def test_every_module_has_a_floor():
    assert {a.split(".")[0] for pair in imports() for a in pair} == set.union(*FLOORS)


def test_no_import_goes_up_or_sideways():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    for importing, imported in imports():
        a, b = importing.split(".")[0], imported.split(".")[0]
        assert a == b or floor[a] > floor[b], f"purepg.{importing} imports purepg.{imported}"


def test_a_room_within_run_imports_only_what_it_says():
    for importing, imported in imports():
        room = ".".join(importing.split(".")[:2])
        if room in WITHIN_RUN and imported.startswith("run.") and not imported.startswith(room):
            assert imported.split(".")[1] in WITHIN_RUN[room], f"purepg.{importing} imports purepg.{imported}"
    inside = {(a, b) for a, b in imports() if b.startswith("run.films") and not a.startswith("run.films")}
    assert not inside


def test_no_import_goes_round_in_a_circle():
    below = {}
    for a, b in imports():
        below.setdefault(a, set()).add(b)
    while below:
        ground = {a for a, known in below.items() if not known & below.keys()}
        assert ground, f"a circle among {sorted(below)}"
        below = {a: known for a, known in below.items() if a not in ground}
