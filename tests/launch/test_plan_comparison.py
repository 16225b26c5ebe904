"""``longhaul plan --strategy all``, and what is replayed: every strategy beside the others."""

from __future__ import annotations

from typing import NoReturn

import pytest

from launch.plan_command import run
from planner.errors import InfeasibleError
from planner.step_planner import STRATEGIES
from tests.launch.plan_cases import REPLAY_KEYS, STEP_KEYS, SUMMARY_KEYS, planned


def test_all_compares_every_strategy(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--lengths", lengths, "--batch-sequences", "20", "--steps", "2", "--strategy", "all")
    result = planned(capsys, *flags)
    assert result["strategy"] == "all" and [row["strategy"] for row in result["comparison"]] == list(STRATEGIES)
    known = [row for row in result["comparison"] if "refused" not in row]
    assert all(set(row["summary"]) == SUMMARY_KEYS and len(row["steps"]) == 2 for row in known)
    means = [row["summary"]["mean_step_s"] for row in known]
    assert result["summary"]["mean_step_s"] == min(means) and max(means) > min(means)
    assert all(set(step) == STEP_KEYS for row in known for step in row["steps"])
    assert run(list(flags)) == 0
    out = capsys.readouterr().out
    assert "ratio to best" in out and all(f"│ {row['strategy']} " in out for row in known)
    assert "replayed" in out and " * │" in out and "fastest: " in out


def test_all_replays_every_first_step(
    lengths: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--lengths", lengths, "--batch-sequences", "20", "--steps", "2", "--strategy", "all")
    known = [row for row in planned(capsys, *flags)["comparison"] if "refused" not in row]
    assert all(set(row["first_step_replay"]) == REPLAY_KEYS for row in known)
    times = [row["first_step_replay"]["step_s"] for row in known]
    assert [row["is_fastest_by_replay"] for row in known].index(True) == times.index(min(times))
    assert sum(row["is_fastest_by_replay"] for row in known) == 1
    monkeypatch.setattr("launch.plan_replay.MAX_COMPARING_S", 0.0)
    result = planned(capsys, *flags)
    fastest = min((row for row in result["comparison"] if "refused" not in row),
                  key=lambda row: row["summary"]["mean_step_s"])["strategy"]
    for row in result["comparison"]:
        assert row.get("first_step_replay") is None or row["strategy"] == fastest
        assert not row.get("is_fastest_by_replay")
    assert all(step["replay"] is not None for step in result["steps"])
    assert run(list(flags)) == 0
    out = capsys.readouterr().out
    assert f"note: of the strategies only {fastest} is replayed: the first step of the others would take about" in out
    assert "fastest: " not in out
    monkeypatch.setattr("launch.plan_replay.MAX_REPLAYING_S", 0.0)
    assert run(list(flags)) == 0
    assert "note: not replayed: it would take about" in capsys.readouterr().out


def test_a_strategy_that_cannot_is_a_line_not_the_end(
    lengths: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(lengths: object, **_: object) -> NoReturn:
        raise InfeasibleError("no room for it", binding="memory", needed_bytes=2, available_bytes=1)

    monkeypatch.setitem(STRATEGIES, "hdp", refuse)
    flags = ("--lengths", lengths, "--steps", "1", "--strategy", "all")
    result = planned(capsys, *flags)
    assert {"strategy": "hdp", "refused": "step 0: no room for it"} in result["comparison"] and result["steps"]
    assert run(list(flags)) == 0
    assert "hdp refuses step 0: no room for it" in capsys.readouterr().out
    for name in STRATEGIES:
        monkeypatch.setitem(STRATEGIES, name, refuse)
    with pytest.raises(InfeasibleError, match="DOES NOT FIT: tiny on laptop-cpu: no room for it"):
        run(list(flags))


def test_very_many_ranks_are_not_replayed(
    lengths: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from planner.replay import step as replay

    monkeypatch.setattr(replay, "MAX_RANKS", 3)
    flags = ("--lengths", lengths, "--strategy", "static")
    assert planned(capsys, *flags)["steps"][0]["replay"] is None
    assert run(list(flags)) == 0
    out = capsys.readouterr().out
    assert "note: not replayed: 4 ranks, the replay takes at most 3" in out and "replay of step" not in out
