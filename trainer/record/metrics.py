"""The record of one step, and the file that holds one record per line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

METRICS = "metrics.jsonl"
"""Name of the metrics file in a run folder."""
PLANS = "plans.jsonl"
"""Name of the file with every executed plan, one canonical JSON per line."""
SPANS = "spans.jsonl"
"""Name of the file with the microbatch times of recorded steps, one step per line; see
``planner.measured.step_times``."""
LANES = "lanes.jsonl"
"""Name of the file with the times of layers and of activation copies in a few steps; see
``planner.measured.copy_times``."""
REFIT = "cost-refit.json"
"""Name of the cost model that is fitted to the run's own steps when it ends, for the next run's ``--plan.cost``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Predicted and measured facts of one executed step; the field names are the keys of ``metrics.jsonl``.

    ``loss``: mean over the valid tokens of the step, nats. ``num_tokens``: all tokens of the step, all ranks.
    ``measured_s``: wall seconds of the step. ``plan_s``: seconds the planner worked on this step's plan, in parallel
    with training; ``plan_wait_s``: seconds the step waited for it. ``gap``: (predicted - bound) / predicted, 0 .. 1.
    ``gather_s``, ``reduce_s``: those of the quickest rank, which waited for no other. ``compute_s``,
    ``exchange_wait_s``: seconds in microbatches spent computing and waiting for messages, means over ranks.
    ``update_s``: clipping and optimizer. ``drift_ratio``: measured over predicted seconds of the microbatches, median
    of the last steps; None until there are enough.
    ``idle_fraction``: share of rank-seconds spent waiting. ``imbalance``: slowest rank's busy time over the mean,
    minus 1. ``model_flops``: forward and backward, attention counted from the sum of squared document lengths.
    ``mfu``: model_flops over the devices' peak FLOP in ``measured_s``; None if that peak is not known.
    ``host_peak_bytes``, ``predicted_host_bytes``: bytes of one device in the tier of swapped activations; the measured
    ones include alignment padding.
    ``gradients``: "exact", or a text that says how the gradients (and the loss) are estimated.
    ``group_summary``: degrees of the attention groups, ``+`` within a microbatch, ``|`` between: ``"4 | 2+1+1"``.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    num_sequences: int
    max_sequence_tokens: int
    strategy: str
    plan_status: str
    predicted_s: float
    measured_s: float
    bound_s: float
    gap: float
    plan_s: float
    plan_wait_s: float
    idle_fraction: float
    imbalance: float
    peak_bytes: int
    predicted_peak_bytes: int
    host_peak_bytes: int
    predicted_host_bytes: int
    tokens_per_s: float
    model_flops: float
    mfu: float | None
    padding_tokens: int
    num_microbatches: int
    group_summary: str
    gather_s: float
    compute_s: float
    exchange_wait_s: float
    reduce_s: float
    update_s: float
    drift_ratio: float | None
    gradients: str = "exact"


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line, flushed after every step, each step at most once.

    Opening it for ``first_step`` drops the records of that step and later ones, which a resumed run will repeat, and a
    line cut short by a kill. Blocks on the disk; used by rank 0 only.
    """

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_steps_before(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def append(self, report: StepReport) -> None:
        self._file.write(json_line(asdict(report)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def json_line(record: dict[str, Any]) -> str:
    """One line of strict JSON. Infinite and undefined numbers become null, because JSON cannot express them."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order; incomplete lines are skipped."""
    if not path.exists():
        return []
    records = (_parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [record for record in records if record is not None]


def keep_steps_before(path: Path, first_step: int) -> None:
    """Reduce ``path`` to the complete records of steps below ``first_step``, unchanged, in one atomic replacement."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _parse(line)
        if record is not None and record["step"] < first_step:
            kept.append(line + "\n")
    replacement = path.with_name(path.name + ".new")
    replacement.write_text("".join(kept), encoding="utf-8")
    replacement.replace(path)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    if isinstance(record, dict) and isinstance(record.get("step"), int):
        return record
    return None
