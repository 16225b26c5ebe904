"""The step record, its file, and what rank 0 shows of it."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from planner.inputs.files import load_model
from tests.planner.replay.executed import cost_here, make_plan
from trainer.record.metrics import MetricsLog, StepReport, keep_steps_before, read_metrics
from trainer.record.progress import Progress, sparkline
from trainer.record.step_report import make_report
from trainer.step.shared import StepOutcome

REPORT = StepReport(
    step=0, loss=3.25, grad_norm=1.5, lr=1e-3, num_tokens=16000, num_sequences=7, max_sequence_tokens=4096,
    strategy="flexsp", plan_status="optimal", predicted_s=0.4, measured_s=0.5, bound_s=0.39, gap=0.025, plan_s=0.0123,
    plan_wait_s=0.0, idle_fraction=0.1, imbalance=0.05, peak_bytes=3 * 10**8, predicted_peak_bytes=3 * 10**8,
    host_peak_bytes=0, predicted_host_bytes=0,
    tokens_per_s=32000.0, model_flops=1.5e12, mfu=None, padding_tokens=0, num_microbatches=2, group_summary="4 | 2+1+1",
    gather_s=0.02, compute_s=0.4, exchange_wait_s=0.03, reduce_s=0.04, update_s=0.01, drift_ratio=None,
)


def report(step: int, **changes: Any) -> StepReport:
    return dataclasses.replace(REPORT, step=step, **changes)


def test_the_keys_that_scripts_depend_on_are_there() -> None:
    promised = (
        "step loss grad_norm lr num_tokens num_sequences max_sequence_tokens strategy plan_status predicted_s "
        "measured_s bound_s gap plan_s plan_wait_s idle_fraction peak_bytes predicted_peak_bytes tokens_per_s "
        "model_flops mfu"
    ).split()
    assert set(promised) <= {field.name for field in dataclasses.fields(StepReport)}


def test_a_report_says_where_the_step_went() -> None:
    """Parts of the step itself are the quickest rank's: the others waited in them for slower ranks."""
    plan = make_plan(0, cost_here())
    outcome = StepOutcome(
        loss=2.0, grad_norm=1.0, measured_s=8.0, busy_s=(4.0, 2.0, 5.0, 1.0), span_s=(5.0, 4.0, 6.0, 1.0),
        gather_s=(0.5, 0.2, 0.9, 0.4), reduce_s=(1.5, 2.5, 0.5, 5.5), peak_bytes=(1, 2, 4, 3),
        tier_peak_bytes=(0, 7, 0, 5), update_s=0.25, ranks=(), stop_requested=False,
    )
    made = make_report(
        plan, outcome, lr=1e-3, spec=load_model("tiny"), plan_wait_s=2.0, flop_per_s=0.0, drift_ratio=1.2,
        predicted_host_bytes=8,
    )
    assert (made.host_peak_bytes, made.predicted_host_bytes) == (7, 8)
    assert (made.gather_s, made.reduce_s, made.update_s, made.plan_wait_s) == (0.2, 0.5, 0.25, 2.0)
    assert (made.compute_s, made.exchange_wait_s) == (3.0, 1.0)
    assert made.idle_fraction == pytest.approx(0.5) and made.imbalance == pytest.approx(5 / 3 - 1)
    assert (made.peak_bytes, made.drift_ratio, made.mfu) == (4, 1.2, None)
    assert made.tokens_per_s == pytest.approx(plan.num_tokens / 10.0)


def test_each_step_is_on_disk_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(report(0))
    assert read_metrics(path) == [dataclasses.asdict(REPORT)]
    log.close()


def test_resume_repeats_no_step_and_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(5):
            log.append(report(step, loss=1.0))
    with path.open("a") as file:
        file.write('{"step": 5, "loss": 1.')
    with MetricsLog(path, first_step=3) as log:
        for step in range(3, 6):
            log.append(report(step, loss=2.0))
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [
        (0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_keeps_whole_lines_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "plans.jsonl"
    lines = ['{"a":1,"step":0}\n', '{"step": 1,  "b": 2.50}\n', '{"step":2}\n', '{"step":1']
    path.write_text("".join(lines))
    keep_steps_before(path, 2)
    assert path.read_text() == "".join(lines[:2])


def test_a_fresh_run_in_an_old_folder_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnot json\n[1]\n{"other": 2}\n')
    MetricsLog(path).close()
    assert path.read_text() == ""


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(report(0, loss=float("nan"), grad_norm=float("inf"), gap=float("-inf")))
    record = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"invalid JSON: {word}"))
    assert (record["loss"], record["grad_norm"], record["gap"], record["lr"]) == (None, None, None, 1e-3)


def test_plain_progress_is_one_aligned_line_a_step() -> None:
    stream = io.StringIO()
    times_s = iter(range(0, 1000, 2))
    progress = Progress(120, stream=stream, clock=lambda: float(next(times_s)))
    progress.note("128 documents")
    for step, loss in ((0, 5.5), (1, 11.25), (99, 0.125)):
        progress.step(report(step, loss=loss))
    progress.close()
    note, *lines = stream.getvalue().splitlines()
    assert note == "128 documents"
    assert [line.index("tok/s") for line in lines] == [lines[0].index("tok/s")] * 3
    assert lines[1].startswith("step   2/120  loss 11.2500     32K tok/s  step   500 ms (predicted   400 ms)")
    assert "plan  12.3 ms optimal gap   2.5%  imbalance   5.0%  padding 0" in lines[1]
    assert lines[1].endswith("flexsp: 4 | 2+1+1")
    assert "eta     40 s" in lines[2]  # 20 steps are left at the 2 s that the clock measured, not at measured_s


def test_plain_progress_thins_out_but_always_shows_the_last_step() -> None:
    stream = io.StringIO()
    progress = Progress(10, first_step=3, stream=stream, every=4)
    for step in range(3, 10):
        progress.step(report(step))
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == ["step  4", "step  8", "step 10"]


def test_terminal_panel_shows_what_the_run_promises() -> None:
    stream = io.StringIO()
    progress = Progress(10, is_terminal=True, stream=stream, clock=lambda: 0.0)
    progress.note("resumed from step 0")
    for step in range(10):
        progress.step(report(step, loss=5.0 - step / 10))
    progress.close()
    progress.close()
    shown = stream.getvalue()
    for text in ("resumed from step 0", "step 10/10", "loss 4.1000", "32K tokens/s", "padding 0", "plan 12.3 ms",
                 "gap 2.5%", "predicted 400 ms", "imbalance 5.0%", "eta"):
        assert text in shown, text


def test_sparkline_spans_lowest_to_highest() -> None:
    assert sparkline([0.0, 7.0, 3.0], is_ascii=True) == "_#~"
    assert sparkline([2.0, 2.0]) == "\u2581\u2581"
    assert sparkline([1.0, float("nan"), float("inf"), 2.0], is_ascii=True) == "_??#"
    assert sparkline([float("nan")]) == "?"
    assert sparkline([]) == ""
