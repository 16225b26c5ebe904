"""``longhaul report``: figures, files, runs that are not complete, one-line refusals, no torch."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from planner.pages.step_trace import MEASURED, PREDICTED
from tests.launch.measured_run import write_run
from tests.planner.pages.trace_rules import place_of
from tests.planner.replay.executed import cost_here, slower
from trainer.prices.plan_inputs import load_cost

ROOT = Path(__file__).resolve().parents[2]
SLOWER = 1.5


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", slower(cost_here(), SLOWER))
    return tmp_path / "run"


def report_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["report", *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_figures_are_those_of_the_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = report_json(capsys, str(run_dir))
    assert (value["schema"], value["num_steps"], value["num_planned"], value["num_judged"]) == (1, 12, 20, 10)
    assert (value["loss_first"], value["loss_last"]) == (5.0, 5.0 - 1.1)
    assert value["bias"] == pytest.approx(1 / SLOWER - 1, rel=1e-3)
    assert value["absolute_error"] == pytest.approx(1 - 1 / SLOWER, rel=1e-3)
    assert value["drift"]["ratio"] == pytest.approx(SLOWER, rel=1e-3)
    assert value["drift"]["factor"] == 1.25 and value["drift"]["is_off"]  # the run's own setting
    assert value["refit"]["error_before"] == pytest.approx(1 - 1 / SLOWER, rel=1e-3)
    assert value["refit"]["error_after"] < 1e-3
    assert [shape["ratio"] for shape in value["shapes"]] == pytest.approx([SLOWER] * len(value["shapes"]), rel=1e-3)
    assert sum(value["plan_statuses"].values()) == 12
    assert len(value["worst_steps"]) == 3 and len(value["steps"]) == 12
    for rank in value["ranks"]:
        busy_s = rank["compute_s"] + rank["wait_s"]
        assert busy_s == pytest.approx(SLOWER * rank["predicted_busy_s"], rel=1e-3)
        assert rank["wait_s"] == pytest.approx(0.1 * busy_s, rel=1e-3)
        assert rank["idle_s"] == pytest.approx(SLOWER * rank["predicted_idle_s"], abs=1e-4)
    assert value["parts_s"]["exchange_wait_s"] == pytest.approx(0.1)


def test_people_read_the_answer_first(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run_dir)]) == 0
    text = capsys.readouterr().out
    first, *rest = text.splitlines()
    assert first.startswith("step time: predicted ") and "bias -33.3%" in first and "first 2 left out" in first
    assert rest[0].startswith("run: 12 of 20 steps, loss 5.0000 -> 3.9000")
    assert "drift: the cost model is off: microbatches take 1.50 times" in text and "limit 1.25" in text
    assert "refit to " in text and "--refit FILE" in text
    for column in ("busy predicted", "busy measured", "idle measured", "median ratio", "worst steps"):
        assert column in text


def test_a_run_that_has_just_ended_names_its_refit_file(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "cost-refit.json").write_text("{}")
    assert cli.main(["report", str(run_dir)]) == 0
    assert f"--plan.cost {run_dir / 'cost-refit.json'}" in capsys.readouterr().out


def test_the_refit_is_written_and_can_be_planned_with(run_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "refit.json"
    assert cli.main(["report", str(run_dir), "--refit", str(target)]) == 0
    ours, machine = load_cost(str(target)), slower(cost_here(), SLOWER)
    for fit, true in zip(ours.times, machine.times, strict=True):
        assert fit.group_s(num_tokens=900, num_tokens2=500_000, num_sequences=3) == pytest.approx(
            true.group_s(num_tokens=900, num_tokens2=500_000, num_sequences=3), rel=1e-2
        )


def test_trace_and_page_show_one_step_from_both_sides(run_dir: Path, tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.json", tmp_path / "page.html"
    assert cli.main(["report", str(run_dir), "--trace", str(trace), "--html", str(page), "--step", "7"]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert {place_of(event)[0] for event in events if event["ph"] == "X"} == {PREDICTED, MEASURED}
    assert {event["args"]["step"] for event in events if event.get("cat") == "step"} == {7}
    text = page.read_text()
    for words in ("Step 7, rank by rank", "Step time over the run", "Ranks: planned and measured", "bias -33.3%"):
        assert words in text
    sources = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']([^\"']+)", text)
    assert sources == [], "the page loads nothing from anywhere"


def test_the_last_recorded_step_is_shown_where_none_is_named(run_dir: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    assert cli.main(["report", str(run_dir), "--trace", str(trace)]) == 0
    assert json.loads(trace.read_text())["otherData"]["step"] == "11"


def test_a_run_still_going_on_has_lines_cut_short(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "plans.jsonl", "spans.jsonl"):
        text = (run_dir / name).read_text()
        (run_dir / name).write_text(text[: len(text) - 40])
    value = report_json(capsys, str(run_dir))
    assert (value["num_steps"], value["num_recorded"]) == (11, 11)
    assert value["drift"]["ratio"] == pytest.approx(SLOWER, rel=1e-3)


def test_times_that_are_not_of_their_plan_are_left_out(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run_dir / "spans.jsonl").read_text().splitlines()
    foreign = json.loads(lines[3])
    foreign["microbatch"] = [99] * len(foreign["microbatch"])
    lines[3] = json.dumps(foreign)
    (run_dir / "spans.jsonl").write_text("\n".join(lines) + "\n")
    assert report_json(capsys, str(run_dir))["num_recorded"] == 11


def test_a_run_without_recorded_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, trace, page = tmp_path / "run", tmp_path / "trace.json", tmp_path / "page.html"
    write_run(run_dir, slower(cost_here(), SLOWER), spans_from=12)
    value = report_json(capsys, str(run_dir), "--trace", str(trace), "--html", str(page))
    assert value["bias"] == pytest.approx(1 / SLOWER - 1, rel=1e-3)
    assert (value["ranks"], value["shapes"], value["refit"], value["drift"]) == ([], [], None, None)
    events = json.loads(trace.read_text())["traceEvents"]
    assert {place_of(event)[0] for event in events if "tid" in event} == {PREDICTED}
    assert "rank by rank" not in page.read_text()
    assert cli.main(["report", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "drift: too few steps" in text and "refit: none (too few recorded" in text


def test_the_mean_leaves_the_first_steps_out_only_where_there_are_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = write_run(tmp_path / "short", slower(cost_here(), SLOWER), num_steps=4)
    value = report_json(capsys, str(tmp_path / "short"))
    assert value["num_judged"] == 4
    assert value["measured_s"] == pytest.approx(statistics.fmean(m.span_s + m.fixed_s for _, m in steps))


def test_a_cost_model_that_is_gone_costs_the_refit_only(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "cost.json").unlink()
    assert cli.main(["report", str(run_dir)]) == 0
    assert "refit: none (the cost model of this run is not in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a run folder"),
        (["{run}/nowhere"], "no such folder"),
        (["{tmp}"], "no metrics.jsonl in it"),
        (["{run}", "--htm", "x"], "unknown argument '--htm' (did you mean '--html'?)"),
        (["{run}", "--html", "{tmp}/no/x.html"], "--html: folder"),
        (["{run}", "--trace", "{tmp}"], "is a folder; name a file"),
        (["{run}", "--step", "x", "--trace", "{tmp}/t"], "expected the number of a step"),
        (["{run}", "--step", "99", "--trace", "{tmp}/t"], "step 99 has no plan"),
        (["{run}", "--step", "99", "--html", "{tmp}/t"], "not among the 12 recorded steps that are shown, 0 to 11"),
        (["{run}", "--step", "3"], "--step belongs to --trace or --html"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [text.format(run=run_dir, tmp=tmp_path) for text in arguments]
    assert cli.main(["report", *filled]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_an_empty_or_foreign_metrics_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "hello\n", '{"step": 1}\n', "\x00\xff\n"):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert cli.main(["report", str(tmp_path)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "holds no step yet" in lines[0]


def test_nothing_heavy_is_loaded(run_dir: Path, tmp_path: Path) -> None:
    probe = (
        "import sys\nfrom launch import cli\ncode = cli.main(sys.argv[1:])\n"
        "print('heavy:', sorted({'torch', 'megatron', 'pulp', 'plotly'} & set(sys.modules)))\nsys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", probe, "report", str(run_dir), "--trace", str(tmp_path / "t.json")], cwd=ROOT,
        capture_output=True, text=True, timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("heavy: []\n")
