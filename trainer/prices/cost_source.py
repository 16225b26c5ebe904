"""The cost model of a run: from a file the user names, or measured on this machine once and cached."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from parallel import comm
from planner.codec import from_plain, to_plain
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import SpecError
from planner.inputs.model import ModelSpec
from planner.plan import AttentionKind, digest_of
from planner.schedules.exchange import GroupLimits, attention_kinds, schedule_of
from planner.units import KIB, parse_bytes
from trainer.prices.calibration import CALIBRATION_VERSION, MeasuredShape, calibrate
from trainer.prices.plan_inputs import load_run_cost, plan_limits
from trainer.prices.tier_setup import most_rows
from trainer.settings.tree import TrainConfig
from trainer.step.runtime import Runtime

RUN_COST = "cost.json"
"""The run's own cost model, in its folder."""
AUTO_MEASURED = (AttentionKind.ULYSSES, AttentionKind.RING)
_FEW_RANKS = 8
_USABLE_SHARE = 0.8
"""Share of a device's memory that plans may use; the rest is for fragmentation, other processes and the like."""
_AMPLE_SHARE = 0.5
"""Share of the budget. An estimate below it stays within the budget even if the true value is twice as large."""
_STATE_BYTES = 20
"""Bytes per parameter on one rank: fp32 weight as shard and gathered, gradient, AdamW's two moments."""


def make_limits(config: TrainConfig, runtime: Runtime, local_world_size: int) -> PlanLimits:
    """Limits for plans of this run. The same on every rank of a job with equal devices."""
    budget_bytes = own_budget_bytes(config, runtime.mesh.device, local_world_size)
    if config.plan.device_budget == "auto":
        lowest = torch.tensor([-budget_bytes], dtype=torch.float64)
        budget_bytes = -int(comm.all_reduce_max(lowest, runtime.mesh.control_group))
    return plan_limits(
        config, runtime.model.spec, device_budget_bytes=budget_bytes,
        devices_per_node=max(1, local_world_size // runtime.mesh.tensor_size),
    )


def own_budget_bytes(config: TrainConfig, device: torch.device, local_world_size: int) -> int:
    """Bytes that this rank's device may use."""
    if config.plan.device_budget == "auto":
        return int(_USABLE_SHARE * device_memory_bytes(device, local_world_size))
    return parse_bytes(config.plan.device_budget, what="--plan.device-budget")


def memory_may_bind(config: TrainConfig, spec: ModelSpec, budget_bytes: int) -> bool:
    """Whether all of a step's tokens on one rank, with everything kept, would need more than half of the budget,
    estimated from the model's sizes before anything is measured. If not, no plan depends on a predicted peak."""
    element_bytes = 2 if config.run.dtype == "bf16" else 4
    layers, parallel = spec.num_layers, config.parallel
    held_bytes = layers * spec.saved_bytes_per_token(element_bytes) * most_rows(config) + _STATE_BYTES * spec.num_params
    return held_bytes / (parallel.tensor_parallel * parallel.pipeline_parallel) > _AMPLE_SHARE * budget_bytes


def device_memory_bytes(device: torch.device, local_world_size: int) -> int:
    """Memory of this rank's device: the GPU's, or for a CPU rank an equal share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * KIB // local_world_size
    raise SpecError("cannot read the host's memory; set --plan.device-budget")


def measured_shapes(config: TrainConfig, num_ranks: int, limits: PlanLimits) -> tuple[MeasuredShape, ...]:
    """The shapes that a run's planner may choose from. Degrees are powers of two and all ranks; or a given degree and
    the left-over ranks; or, with few ranks and a planner that uses any degree, every degree.

    ``--attention auto`` measures only ulysses and ring, to keep the first step's wait short: on one node the other
    kinds are combinations of these. A cost model from a file may price all kinds.
    """
    degrees = {1 << power for power in range(1, num_ranks.bit_length()) if 1 << power <= num_ranks} | {num_ranks}
    if config.plan.strategy not in ("flexsp", "static") and num_ranks <= _FEW_RANKS:
        degrees = set(range(2, num_ranks + 1))
    if config.plan.degree is not None:
        degrees = {config.plan.degree, num_ranks % config.plan.degree}
    kinds = AUTO_MEASURED if config.plan.attention == "auto" else attention_kinds(config.plan.attention)
    group_limits = GroupLimits(num_heads=limits.max_ulysses_degree, node_size=limits.node_size(num_ranks))
    shapes = [MeasuredShape(AttentionKind.LOCAL, 1)]
    for kind in kinds:
        for degree in sorted(degrees):
            inner_degree = schedule_of(kind).inner_degree(degree, group_limits) if degree > 1 else None
            if inner_degree is not None:
                shapes.append(MeasuredShape(kind, degree, inner_degree))
    return tuple(shapes)


def obtain_cost(
    config: TrainConfig, runtime: Runtime, limits: PlanLimits, cache_root: Path
) -> tuple[CostModel, str]:
    """The run's cost model and one line for the log on its origin. Collective; every rank gets rank 0's numbers.

    A resumed run uses the cost model it began with (``RUN_DIR/cost.json``), because equal prices give equal plans.
    """
    if config.plan.cost != "auto":
        cost = load_run_cost(config)
        return cost, f"cost model: {config.plan.cost} ({cost.provenance.source})"
    mesh = runtime.mesh
    shapes = measured_shapes(config, mesh.data_size, limits)
    key = _cost_key(config, runtime, shapes, limits)
    own, cached = Path(config.run.dir) / RUN_COST, cache_root / "cost" / f"{key}.json"
    places = [own, cached] if config.run.resume else [cached]
    found = _shared(runtime, _first_stored(places, key) if mesh.rank == 0 else None)
    if found:
        cost, how = _decode(found), "from an earlier run on this machine"
    else:
        measured = calibrate(
            runtime, shapes, max_length=config.data.max_length, machine=platform.node(),
            node_size=limits.node_size(mesh.data_size),
        ).cost
        found = _shared(runtime, json.dumps({"key": key, "cost": to_plain(measured)}).encode())
        cost, how = _decode(found), "now"
    if mesh.rank == 0:
        for path in (own, cached):
            _store(path, found)
    origin = cost.provenance
    return cost, (
        f"cost model: measured {how} ({origin.measured_on}), {origin.num_samples} samples, error of the fit "
        f"{origin.mean_relative_error:.1%} in the mean, {origin.max_relative_error:.1%} at worst; kept in {cached}"
    )


def _shared(runtime: Runtime, payload: bytes | None) -> bytes:
    mesh = runtime.mesh
    return comm.broadcast_bytes(payload if mesh.rank == 0 else None, source=0, group=mesh.control_group)


def _first_stored(places: list[Path], key: str) -> bytes:
    """Content of the first of these files that holds a cost model made under ``key``; empty if none does."""
    for path in places:
        try:
            payload = path.read_bytes()
            if json.loads(payload)["key"] == key:
                _decode(payload)
                return payload
        except (OSError, ValueError, KeyError, TypeError):  # absent, incomplete or from another version: measure again
            continue
    return b""


def _decode(payload: bytes) -> CostModel:
    return from_plain(CostModel, json.loads(payload)["cost"], where="stored cost model")


def _store(path: Path, payload: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".new")
    partial.write_bytes(payload)
    partial.replace(path)


def _cost_key(config: TrainConfig, runtime: Runtime, shapes: tuple[MeasuredShape, ...], limits: PlanLimits) -> str:
    mesh, node_size = runtime.mesh, limits.node_size(runtime.mesh.data_size)
    scarce = memory_may_bind(config, runtime.model.spec, limits.device_budget_bytes)  # decides how memory is mapped
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else platform.processor()
    conditions = {
        "calibration": CALIBRATION_VERSION, "host": platform.node(), "device": device, "torch": torch.__version__,
        "world_size": mesh.world_size, "node_size": node_size, "tensor_size": mesh.tensor_size,
        "num_stages": mesh.num_stages, "shard_size": mesh.shape.shard_size, "sharding": str(runtime.sharding),
        "dtype": config.run.dtype, "gradient_dtype": config.parallel.gradient_dtype,
        "model": to_plain(runtime.model.spec), "max_length": config.data.max_length,
        "memory": to_plain(config.memory), "scarce": scarce, "memory_policy": to_plain(runtime.memory.policy),
        "pairs": [[str(s.kind), s.degree, *([s.inner_degree] if s.inner_degree > 1 else [])] for s in shapes],
    }
    return digest_of(conditions)[:24]
