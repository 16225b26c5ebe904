"""Reads what a run left in its folder: metrics, plans and measured times. Imports no torch and writes nothing.

The run may still be going on, so lines that are incomplete or not valid are skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.codec import from_plain
from planner.cost.model import CostModel
from planner.errors import PlanError, SpecError
from planner.inputs.yaml_file import read_yaml
from planner.measured.copy_times import StepLanes, lanes_from_plain
from planner.measured.drift import Executed
from planner.measured.step_times import MeasuredStep, measured_from_plain
from planner.plan import StepPlan, plan_from_json
from planner.units import MIB
from trainer.record.metrics import LANES, METRICS, PLANS, SPANS, read_metrics

MAX_STEPS = 500
"""How many recorded steps are compared in detail: the last ones, so that a report of a long run is still quick."""
_LAST_BYTES = 256 * MIB
"""How much of a file's end is read for its last steps: plans of thousands of ranks make very large files."""
# Canonical JSON has sorted keys and no spaces; earlier versions kept spaces in a resumed run's lines.
_STEP_OF_PLAN = re.compile(r'"step": ?(\d+), ?"strategy":')
_COST_OF_PLAN = re.compile(r'"cost_digest": ?"([0-9a-f]+)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """``metrics``: one record per step. ``executed``: plan and measured times of the recorded steps, in order of steps.
    ``lanes``: times of layers and copies, by step, for steps that have them. ``cost``: the cost model that the plans
    were made with; None if the folder no longer has it. ``settings``: the contents of config.yaml."""

    folder: Path
    metrics: tuple[dict[str, Any], ...]
    executed: tuple[Executed, ...]
    lanes: dict[int, StepLanes]
    cost: CostModel | None
    settings: dict[str, Any]

    def setting(self, section: str, key: str) -> Any:
        """A setting of the run; None if it is not known."""
        found = self.settings.get(section)
        return found.get(key) if isinstance(found, dict) else None


def read_run(folder: Path) -> RunRecords:
    """Read a run folder. Raises SpecError, one line, if ``folder`` is not a run's or holds no step yet."""
    if not folder.is_dir():
        raise SpecError(f"{folder}: no such folder; give the --run-dir of a training run")
    if not (folder / METRICS).exists():
        raise SpecError(f"{folder}: no {METRICS} in it, so no training run wrote here; give the --run-dir of one")
    metrics = tuple(record for record in read_metrics(folder / METRICS) if _is_step(record))
    if not metrics:
        raise SpecError(f"{folder}: {METRICS} holds no step yet: wait until the run has finished its first step")
    executed = read_executed(folder)
    settings = _settings(folder / "config.yaml")
    digest = executed[-1][0].cost_digest if executed else _last_digest(folder / PLANS)
    return RunRecords(
        folder=folder, metrics=metrics, executed=executed, lanes=read_lanes(folder, executed),
        cost=_cost(folder, settings, digest), settings=settings,
    )


def read_executed(folder: Path) -> tuple[Executed, ...]:
    """The last MAX_STEPS recorded steps with their plans."""
    measured = {step.step: step for step in _measured(folder / SPANS)}
    wanted = sorted(measured)[-MAX_STEPS:]
    plans = _plans(_lines(folder / PLANS, last_bytes=_LAST_BYTES), set(wanted))
    return tuple((plans[step], measured[step]) for step in wanted if _fit(plans.get(step), measured[step]))


def read_lanes(folder: Path, executed: SequenceOf[Executed]) -> dict[int, StepLanes]:
    """Times of layers and copies of these steps, by step, where the folder has them and they can belong to the plan."""
    num_ranks = {plan.step: plan.num_ranks for plan, _ in executed}
    found = {}
    for line in _lines(folder / LANES, last_bytes=_LAST_BYTES):
        try:
            lanes = lanes_from_plain(json.loads(line))
        except ValueError:
            continue
        if all(rank.rank < num_ranks.get(lanes.step, 0) for rank in lanes.ranks):
            found[lanes.step] = lanes
    return found


def read_plans(folder: Path, steps: Collection[int]) -> dict[int, StepPlan]:
    """The executed plans of these steps that are on disk. Reads the whole file."""
    return _plans(_lines(folder / PLANS), set(steps))


def _plans(lines: Iterator[str], wanted: set[int]) -> dict[int, StepPlan]:
    plans = {}
    for line in lines:
        match = _STEP_OF_PLAN.search(line)
        if match is not None and int(match.group(1)) in wanted:
            try:
                plan = plan_from_json(line)
            except PlanError:
                continue
            plans[plan.step] = plan
    return plans


def _fit(plan: StepPlan | None, measured: MeasuredStep) -> bool:
    """Whether these times can belong to this plan."""
    if plan is None or len(measured.ranks) != plan.num_ranks:
        return False
    return all(
        each.microbatch < len(plan.microbatches) and rank in plan.microbatches[each.microbatch].ranks
        for rank, times in enumerate(measured.ranks)
        for each in times.microbatches
    )


def _measured(path: Path) -> Iterator[MeasuredStep]:
    for line in _lines(path, last_bytes=_LAST_BYTES):
        try:
            yield measured_from_plain(json.loads(line))
        except ValueError:  # includes json.JSONDecodeError
            continue


def _lines(path: Path, *, last_bytes: int | None = None) -> Iterator[str]:
    """The file's lines, or only those that lie completely in its last ``last_bytes``."""
    try:
        with path.open("rb") as file:
            skipped = 0 if last_bytes is None else path.stat().st_size - last_bytes
            if skipped > 0:
                file.seek(skipped - 1)
                file.readline()  # skip the rest of a line that the cut went through
            for line in file:
                yield line.decode("utf-8", errors="replace")
    except FileNotFoundError:
        return


def _is_step(record: dict[str, Any]) -> bool:
    return all(isinstance(record.get(key), int | float) for key in ("predicted_s", "measured_s", "num_tokens"))


def _settings(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path, str(path))
    except SpecError:
        return {}
    return data if isinstance(data, dict) else {}


def _last_digest(path: Path) -> str:
    digest = ""
    for line in _lines(path, last_bytes=_LAST_BYTES):
        match = _COST_OF_PLAN.search(line)
        digest = match.group(1) if match else digest
    return digest


def _cost(folder: Path, settings: dict[str, Any], digest: str) -> CostModel | None:
    """The cost model with this digest: the run's own, the one with prices of memory policies, or the file that the
    settings name."""
    plan = settings.get("plan")
    named = plan.get("cost") if isinstance(plan, dict) else None
    own = (folder / "cost.json", folder / "memory.json")
    for path in (*own, *([Path(named)] if isinstance(named, str) and named != "auto" else [])):
        try:
            data = read_yaml(path, str(path))
            cost = from_plain(CostModel, data.get("cost", data), where=str(path))
        except (AttributeError, SpecError):
            continue
        if cost.digest == digest:
            return cost
    return None
