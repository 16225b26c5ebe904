"""Reading a run folder back: only what is whole, only as much as is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.plan import plan_to_json
from tests.launch.measured_run import write_run
from tests.planner.replay.executed import cost_here, slower
from trainer.record import run_records
from trainer.record.run_records import read_executed, read_plans, read_run


def test_plans_and_times_come_back_as_they_were(tmp_path: Path) -> None:
    steps = write_run(tmp_path / "run", slower(cost_here(), 1.5))
    records = read_run(tmp_path / "run")
    assert [plan for plan, _ in records.executed] == [plan for plan, _ in steps]
    for (_, ours), (_, written) in zip(records.executed, steps, strict=True):
        assert ours.span_s == pytest.approx(written.span_s, abs=1e-6)
    assert records.cost == cost_here()
    assert (records.setting("run", "steps"), records.setting("run", "x"), records.setting("x", "y")) == (20, None, None)


def test_of_a_large_file_only_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    steps = write_run(folder, cost_here())
    sizes = [len(plan_to_json(plan)) + 1 for plan, _ in steps]
    for spare, num_whole in ((0, 4), (1, 4), (sizes[-5] - 1, 4), (sizes[-5], 5)):
        monkeypatch.setattr(run_records, "_LAST_BYTES", sum(sizes[-4:]) + spare)
        assert [plan.step for plan, _ in read_executed(folder)] == list(range(12))[-num_whole:]
    assert set(read_plans(folder, range(3))) == {0, 1, 2}, "a step that is asked for by number is found anywhere"


def test_only_the_last_steps_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", cost_here())
    monkeypatch.setattr(run_records, "MAX_STEPS", 3)
    assert [plan.step for plan, _ in read_executed(tmp_path / "run")] == [9, 10, 11]


def test_a_cost_model_named_in_the_settings_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, cost_here())
    moved = folder / "cost.json"
    moved.rename(tmp_path / "named.json")
    assert read_run(folder).cost is None
    (folder / "config.yaml").write_text(f"plan:\n  cost: {tmp_path / 'named.json'}\n")
    assert read_run(folder).cost == cost_here()
