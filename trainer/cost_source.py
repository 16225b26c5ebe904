"""The cost model of a run: a file the user names, or this machine's own measurements, made once and cached."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch
import yaml

from parallel import comm
from planner.codec import from_plain, to_plain
from planner.cost import CostModel, PlanLimits
from planner.errors import SpecError
from planner.machine import MachineProfile
from planner.plan import AttentionKind, digest_of
from planner.units import KIB, parse_bytes
from trainer.calibration import calibrate
from trainer.config import TrainConfig
from trainer.step import Runtime

_USABLE_SHARE = 0.8
"""Of a device's memory: the rest is for what no plan can see (fragmentation, other processes)."""

KINDS = {
    "auto": (AttentionKind.ULYSSES, AttentionKind.RING),
    "ulysses": (AttentionKind.ULYSSES,),
    "ring": (AttentionKind.RING,),
}


def make_limits(config: TrainConfig, runtime: Runtime, local_world_size: int) -> PlanLimits:
    """What plans of this run may use. The same on every rank of a job with equal devices."""
    budget = config.plan.device_budget
    if budget == "auto":
        total_bytes = device_memory_bytes(runtime.mesh.device, local_world_size)
        lowest = torch.tensor([-_USABLE_SHARE * total_bytes], dtype=torch.float64)
        device_budget_bytes = -int(comm.all_reduce_max(lowest, runtime.mesh.control_group))
    else:
        device_budget_bytes = parse_bytes(budget, what="--plan.device-budget")
    return PlanLimits(
        device_budget_bytes=device_budget_bytes,
        max_ulysses_degree=runtime.model.spec.num_query_heads // runtime.mesh.tensor_size,
        kinds=KINDS[config.plan.attention],
        max_nodes=config.plan.max_nodes,
        time_limit_s=config.plan.time_limit_s,
        relative_gap=config.plan.relative_gap,
        devices_per_node=max(1, local_world_size // runtime.mesh.tensor_size),
    )


def device_memory_bytes(device: torch.device, local_world_size: int) -> int:
    """Bytes this rank's device has: the GPU's, or an equal share of the host's memory for a CPU rank."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * KIB // local_world_size
    raise SpecError("cannot read the host's memory; set --plan.device-budget")


def priced_pairs(config: TrainConfig, num_ranks: int, max_ulysses_degree: int) -> tuple[tuple[AttentionKind, int], ...]:
    """The (kind, degree) pairs a run's planner may choose from: powers of two, all ranks, a given degree and the
    group left over beside it."""
    degrees = {1 << power for power in range(1, num_ranks.bit_length()) if 1 << power <= num_ranks} | {num_ranks}
    if config.plan.degree is not None:
        degrees = {config.plan.degree, num_ranks % config.plan.degree}
    pairs = [(AttentionKind.LOCAL, 1)]
    for kind in KINDS[config.plan.attention]:
        most = max_ulysses_degree if kind is AttentionKind.ULYSSES else num_ranks
        pairs += [(kind, degree) for degree in sorted(degrees) if 2 <= degree <= most]
    return tuple(pairs)


def obtain_cost(
    config: TrainConfig, runtime: Runtime, limits: PlanLimits, cache_root: Path
) -> tuple[CostModel, str]:
    """The run's cost model and one line saying where it is from. Collective; every rank gets rank 0's numbers."""
    if config.plan.cost != "auto":
        cost = load_cost(config.plan.cost)
        return cost, f"cost model: {config.plan.cost} ({cost.provenance.source})"
    mesh = runtime.mesh
    pairs = priced_pairs(config, mesh.data_size, limits.max_ulysses_degree)
    path = cache_root / "cost" / f"{_cache_key(config, runtime, pairs)}.json"
    payload = None
    if mesh.rank == 0:
        payload = path.read_bytes() if path.exists() else b""
    cached = comm.broadcast_bytes(payload, source=0, group=mesh.control_group)
    if cached:
        cost = from_plain(CostModel, json.loads(cached), where=str(path))
        return cost, f"cost model: measured on this machine on {cost.provenance.measured_on}, cached in {path}"
    cost = calibrate(runtime, pairs, max_length=config.data.max_length, machine=platform.node()).cost
    payload = json.dumps(to_plain(cost)).encode() if mesh.rank == 0 else None
    shared = comm.broadcast_bytes(payload, source=0, group=mesh.control_group)
    cost = from_plain(CostModel, json.loads(shared), where="calibration")
    if mesh.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".new")
        partial.write_bytes(shared)
        partial.replace(path)
    return cost, (
        f"cost model: measured now, {cost.provenance.num_samples} samples, mean error of the fit "
        f"{cost.provenance.mean_relative_error:.1%}, worst {cost.provenance.max_relative_error:.1%}; cached in {path}"
    )


def load_cost(file: str) -> CostModel:
    """A cost model from JSON or YAML: the model itself, or the machine file that ``longhaul calibrate`` writes."""
    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"--plan.cost {file}: cannot be read ({str(error).splitlines()[0]})") from None
    if isinstance(data, dict) and "cost" in data:
        return from_plain(MachineProfile, data, where=file).cost
    return from_plain(CostModel, data, where=file)


def _cache_key(config: TrainConfig, runtime: Runtime, pairs: tuple[tuple[AttentionKind, int], ...]) -> str:
    mesh = runtime.mesh
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else platform.processor()
    return digest_of(
        {
            "host": platform.node(), "device": device, "torch": torch.__version__, "world_size": mesh.world_size,
            "tensor_size": mesh.tensor_size, "dtype": config.run.dtype, "model": to_plain(runtime.model.spec),
            "max_length": config.data.max_length, "pairs": [[str(kind), degree] for kind, degree in pairs],
        }
    )[:24]
