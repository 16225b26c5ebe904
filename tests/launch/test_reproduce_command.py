"""``longhaul reproduce``: exit codes, JSON, one-line refusals."""

import json
from pathlib import Path

import pytest

from launch import cli, reproduce_command
from planner.reproduce.table import Reproduction, Row, Rule


def of_figure(ours: float) -> Reproduction:
    rule = Rule(name="ten", below=0.1, above=0.1)
    return Reproduction(
        system="memo", title="a table [1]", assumptions=("a guess",),
        rows=(Row(name="figure", paper=10.0, ours=ours, rule=rule),),
    )


def test_memo_prints_rows_assumptions_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "memo"]) == 0
    text = capsys.readouterr().out
    assert "MFU" in text and "assumed" in text and "tolerances" in text
    assert text.splitlines()[-1].startswith("memo: met, 12 of 12 rows")


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "memo", "--json", "-"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["schema"], value["system"], value["met"]) == (1, "memo", True)
    assert set(value["rows"][0]) == {"row", "paper", "ours", "error", "within"}
    assert value["worst_error"] == max(abs(row["error"]) for row in value["rows"])


@pytest.mark.parametrize(("ours", "code"), [(10.5, 0), (12.0, 1), (8.0, 1), (float("nan"), 1)])
def test_exit_code_says_whether_it_was_met(
    ours: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(reproduce_command._SYSTEMS, "memo", lambda: of_figure(ours))
    target = tmp_path / "out.json"
    assert cli.main(["reproduce", "memo", "--json", str(target)]) == code
    assert json.loads(target.read_text(encoding="utf-8"))["met"] is (code == 0)
    assert ("MISSED" in capsys.readouterr().out) is (code == 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a system; available: flexsp"),
        (["flexps"], "unknown system 'flexps' (did you mean 'flexsp'?)"),
        (["memo", "--jsn", "-"], "--jsn"),
        (["memo", "--json", "no/such/folder/x.json"], "folder no/such/folder does not exist"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]
