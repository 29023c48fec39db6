"""The rooms of mclip: which there are, and that none imports from a higher one."""

import graphlib
from pathlib import Path

import grimp
import pytest

import mclip

# from low to high; rooms of one floor may import each other where that makes no circle
FLOORS = [
    ["system"],
    ["params"],
    ["losses", "models"],
    ["data"],
    ["balance", "cluster", "embed", "teachers", "reinforce", "distill", "evaluate"],
    ["report"],
    ["studies"],
    ["pipeline"],
    ["cli", "export"],
]
DOORS = {"__init__", "__main__"}  # they hand on to the rooms


@pytest.fixture(scope="module")
def imports():
    """{(room, room): [importing module -> imported module]}, those inside functions included."""
    graph, found = grimp.build_graph("mclip", cache_dir=None), {}
    for module in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            rooms = tuple(name.split(".")[1] if "." in name else "" for name in (module, imported))
            if all(rooms) and rooms[0] != rooms[1] and rooms[0] not in DOORS:
                found.setdefault(rooms, []).append(f"{module} -> {imported}")
    return found


def test_a_folder_has_the_rooms_and_nothing_else():
    here = {
        path.stem
        for path in Path(mclip.__file__).parent.iterdir()
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    assert here == {room for floor in FLOORS for room in floor} | DOORS


def test_no_import_runs_upward(imports):
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert len(imports) > 20  # the graph has been read
    upward = [
        line for (low, high), lines in imports.items() if floor[high] > floor[low] for line in lines
    ]
    assert not upward, "\n".join(upward)


def test_no_rooms_import_each_other_in_a_circle(imports):
    below = {}
    for high, low in imports:
        below.setdefault(high, set()).add(low)
    graphlib.TopologicalSorter(below).prepare()  # CycleError names the circle
