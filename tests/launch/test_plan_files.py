"""``longhaul plan``: the files it writes, JSON beside the table, trace and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.plan_command import run
from planner.errors import SpecError


def test_json_file_beside_the_table(lengths: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    assert run(["--lengths", lengths, "--strategy", "static", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["schema"] == 1 and "solver: " in capsys.readouterr().out


def test_trace_and_page(lengths: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    trace, page = tmp_path / "t.json", tmp_path / "p.html"
    assert run(["--lengths", lengths, "--strategy", "all", "--trace", str(trace), "--html", str(page)]) == 0
    assert {event["ph"] for event in json.loads(trace.read_text())["traceEvents"]} == {"M", "X"}
    text = page.read_text()
    assert "FITS: rank" in text and "every strategy on the same batches" in text
    assert "FITS: rank" in capsys.readouterr().out


def test_the_trace_has_lanes_of_the_replay(lengths: str, tmp_path: Path) -> None:
    target = tmp_path / "t.json"
    assert run(["--lengths", lengths, "--strategy", "static", "--degree", "4", "--attention", "ring", "--steps", "2",
                "--trace", str(target)]) == 0
    trace = json.loads(target.read_text())
    lanes = {event["cat"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert lanes == {"microbatch", "step", "replay compute", "replay exchange"}  # one node, nothing swapped
    assert "4 of 4 ranks" in trace["otherData"]["replay"]


def test_a_page_without_plotly_is_refused_before_planning(lengths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.pages import html_parts as page_parts

    monkeypatch.setattr(page_parts, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match="--html needs plotly"):
        run(["--lengths", lengths, "--html", "page.html"])
    assert not Path("page.html").exists()
