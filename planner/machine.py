"""What ``calibrate`` writes: single-operation measurements of a machine and the cost model of one model on it."""

from __future__ import annotations

from dataclasses import dataclass

from planner.cost import CostModel
from planner.fitting import SizeSample

MACHINE_FILE = "machine.yaml"
"""What the measuring ranks call the file in their run folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineProfile:
    """One measured machine. ``samples``: operations by size, all ranks working at once. ``cost``: fitted from whole
    microbatches of the model named in its provenance, run through the same engine that trains."""

    name: str
    device: str
    num_ranks: int
    samples: tuple[SizeSample, ...]
    cost: CostModel
