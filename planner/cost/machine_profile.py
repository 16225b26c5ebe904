"""What ``calibrate`` writes: measurements of a machine's single operations, and the cost model of one model on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from planner.codec import from_plain
from planner.cost.fitting import SizeSample
from planner.cost.model import CostModel
from planner.inputs.yaml_file import read_yaml

MACHINE_FILE = "machine.yaml"
"""Name of the profile that the measuring ranks write into their run folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineProfile:
    """One measured machine. ``samples``: single operations by size, with all ranks working at once. ``cost``: fitted to
    whole microbatches of the model that its provenance names, run through the engine that trains."""

    name: str
    device: str
    num_ranks: int
    samples: tuple[SizeSample, ...]
    cost: CostModel


def load_cost(path: str) -> CostModel:
    """Read a cost model from the file that ``longhaul calibrate`` writes, or from a file of the cost model alone.

    Raises SpecError on an unreadable file, malformed YAML, an unknown or missing key, or an impossible value.
    """
    where = f"cost file {path}"
    data = read_yaml(Path(path), where)
    if isinstance(data, dict) and "cost" in data:
        return from_plain(MachineProfile, data, where=where).cost
    return from_plain(CostModel, data, where=where)
