"""The planning-time benchmark reports every strategy and divides by the greedy plan."""

from __future__ import annotations

import pytest

from benchmarks import planner_speed
from planner.step_planner import STRATEGIES


def test_every_strategy_has_a_row(tmp_path, monkeypatch, capsys):
    small = planner_speed.make_case("h200-8", 12)
    assert (len(small.problem.lengths), small.problem.num_ranks) == (12, 8)
    monkeypatch.setattr(planner_speed, "make_case", lambda *_: small)
    monkeypatch.setattr(planner_speed, "start_ratio", lambda repeats: 3.0)
    path = tmp_path / "speed.md"
    planner_speed.main(["--quick", "--repeats", "1", "--out", str(path)])
    text = path.read_text()
    assert capsys.readouterr().out == text
    assert all(f"| {name} | " in text for name in (*STRATEGIES, "greedy"))
    assert text.count("times the greedy plan") == 1


def test_ratios_are_to_the_greedy_plan(monkeypatch):
    monkeypatch.setattr(planner_speed, "measure", lambda case, repeats: {"greedy": 0.002, "hdp": 0.003})
    monkeypatch.setattr(planner_speed, "start_ratio", lambda repeats: 3.0)
    lines = list(planner_speed.report([planner_speed.make_case("h200-8", 1)], 1))
    assert "| greedy | 2.0 | 1.00 |" in lines
    assert "| hdp | 3.0 | 1.50 |" in lines
    assert lines[-1].endswith("3.0 times the time of a bare interpreter")


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit) as ended:
        planner_speed.main(["--repeats", "0"])
    assert ended.value.code == 2
    assert "at least 1" in capsys.readouterr().err
