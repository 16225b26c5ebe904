"""What ``calibrate`` writes: single-operation measurements of a machine and the cost model of one model on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from planner.codec import from_plain
from planner.cost.fitting import SizeSample
from planner.cost.model import CostModel
from planner.inputs.yaml_file import read_yaml

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


def load_cost(path: str) -> CostModel:
    """A measured cost model: the file ``longhaul calibrate`` writes, or the cost model in it alone.

    Raises SpecError: unreadable file, malformed YAML, unknown or missing key, impossible value.
    """
    where = f"cost file {path}"
    data = read_yaml(Path(path), where)
    if isinstance(data, dict) and "cost" in data:
        return from_plain(MachineProfile, data, where=where).cost
    return from_plain(CostModel, data, where=where)
