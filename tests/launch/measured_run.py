"""A run folder as training leaves it, without training: real plans, made-up times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.codec import to_plain
from planner.cost.model import CostModel
from planner.measured.drift import Executed
from planner.measured.step_times import measured_to_plain
from planner.plan import plan_to_json
from tests.planner.replay.executed import cost_here, executed_on, make_plan
from trainer.record.metrics import json_line


def record_of(executed: Executed) -> dict[str, Any]:
    """The step's line of metrics.jsonl."""
    plan, measured = executed
    return {
        "step": plan.step, "loss": 5.0 - plan.step / 10, "num_tokens": plan.num_tokens,
        "predicted_s": plan.predicted_s, "measured_s": measured.span_s + measured.fixed_s,
        "plan_status": plan.solver.status.value, "plan_wait_s": measured.plan_wait_s, "peak_bytes": 10**9,
        "predicted_peak_bytes": plan.peak_bytes, "group_summary": "4 | 2+1+1", "gather_s": 0.01, "compute_s": 1.0,
        "exchange_wait_s": 0.1, "reduce_s": 0.02, "update_s": 0.01, "drift_ratio": None,
    }


def write_run(
    folder: Path, machine: CostModel, *, num_steps: int = 12, num_planned: int = 20, spans_from: int = 0,
) -> Sequence[Executed]:
    """Steps on a machine with these true prices; the times of those before ``spans_from`` are not recorded."""
    cost = cost_here()
    folder.mkdir(parents=True)
    steps = [executed_on(make_plan(step, cost), machine) for step in range(num_steps)]
    (folder / "metrics.jsonl").write_text("".join(json_line(record_of(each)) for each in steps))
    (folder / "plans.jsonl").write_text("".join(plan_to_json(plan) + "\n" for plan, _ in steps))
    recorded = [json_line(measured_to_plain(measured)) for _, measured in steps[spans_from:]]
    if recorded:
        (folder / "spans.jsonl").write_text("".join(recorded))
    (folder / "cost.json").write_text(json.dumps({"key": "x", "cost": to_plain(cost)}))
    (folder / "config.yaml").write_text(f"run: {{steps: {num_planned}}}\nmetrics: {{drift_factor: 1.25}}\n")
    return steps
