"""The table of rooms holds on the whole house, and a planted import is caught."""

import pytest

from tests.laws import rooms
from tests.laws.test_laws import ROOT, sources


def test_rooms_and_circles() -> None:
    house = sources()
    assert not rooms.check_rooms(house)
    assert not rooms.find_circles(house)


def test_every_room_of_the_table_is_there() -> None:
    names = rooms.module_names(list(sources()))
    assert not [room for room in rooms.ROOMS if room not in names]
    folders = {name for name, path in names.items() if path.endswith("__init__.py") and name.count(".")}
    assert not {name for name in folders if rooms.room_of(name) == name.split(".")[0]}, "a room that the table lacks"


def test_a_room_says_in_one_line_what_it_is_for() -> None:
    for path, text in sources().items():
        if path.endswith("__init__.py"):
            assert text.startswith('"""') and text.count("\n") == 1, path


def test_no_file_repeats_its_folder() -> None:
    assert not [line for path in sources() for line in rooms.check_prefix(path)]
    assert rooms.check_prefix("planner/replay/replay_work.py") and rooms.check_prefix("planner/pages/page_parts.py")
    assert not rooms.check_prefix("planner/plan.py")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("planner/inputs/files.py", "from planner.cost.model import CostModel"),
        ("planner/pricing/simulate.py", "from planner.strategies.search.shapes import GroupShape"),
        ("planner/strategies/static.py", "from planner.strategies.adaptive import strategy"),
        ("planner/errors.py", "def f():\n    import planner.plan"),
        ("trainer/data/batch.py", "if TYPE_CHECKING:\n    from trainer.step import spans"),
        ("parallel/engine.py", "from memory import tiers"),
        ("trainer/loop.py", "from launch import local"),
    ],
)
def test_a_planted_import_is_caught(path: str, line: str) -> None:
    house = sources()
    house[path] += f"\n{line}\n"
    assert [found for found in rooms.check_rooms(house) if found.startswith(path)]


@pytest.mark.parametrize("guard", ["", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "])
def test_a_planted_circle_is_caught(guard: str) -> None:
    house = sources()
    house["launch/worker.py"] += f"\n{guard}from launch.cli import main\n"
    assert rooms.find_circles(house) == ["launch.calibrate_command, launch.cli, launch.local, launch.worker"]
    assert (ROOT / "launch/worker.py").read_text(encoding="utf-8") != house["launch/worker.py"]
