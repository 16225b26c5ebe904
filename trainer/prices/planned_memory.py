"""``--memory auto``: what the planner needs to choose a memory policy per microbatch, and the tier it swaps to.

If one device can hold all of a step, no plan gains from a policy and nothing is measured. Otherwise one layer runs
under a tape and the link to the tier is timed, once per machine and model (cached). The planner gets:

    swap bytes per token       what a layer saves, times the number of layers that are not kept whole
    recompute bytes per token  the same without layer input and attention's output, which are never recomputed
    recompute seconds          seconds of the token-wise steps whose outputs the backward needs
    copy rate                  bytes per second from the device, or twice the rate back if that is lower: a backward
                               takes twice as long as a forward
    hidden share               the forwards of layers that are not kept whole, as a share of a microbatch's seconds
    chunks                     only for ``adaptive``, and only if they keep fewer bytes per token than recompute: see
                               ``trainer.prices.chunk_prices``

The tier's capacity decides how much one device may swap. Plans depend on all of these values, so a resumed run uses
those it began with (``RUN_DIR/memory.json``).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from memory.activations import ActivationMemory
from memory.policy import RECOMPUTE_ALL, RECOMPUTE_KEEPS_LAYERS, SWAP_KEEPS_LAYERS
from parallel import comm
from planner.codec import from_plain, to_plain
from planner.cost.chunk_fit import ChunkFit
from planner.cost.fits import ActivationFit
from planner.cost.limits import PlanLimits
from planner.cost.model import KEEP, CostModel
from planner.pages.policy_reasons import chooses_none
from planner.pages.policy_words import policy_name
from planner.plan import AttentionKind, StepPlan, digest_of
from planner.pricing.microbatch import price_microbatch
from planner.pricing.simulate import step_lengths
from planner.strategies.search.memory_policy import swaps
from planner.units import format_bytes, format_seconds
from trainer.model.transformer import StageShard
from trainer.prices.calibration import MeasuredShape
from trainer.prices.chunk_prices import chunks_may_pay, map_chunk_blocks, measure_chunks
from trainer.prices.layer_profile import LayerProfile, profile_layer
from trainer.prices.plan_inputs import measures_policies, plans_chunks, plans_policies, with_policies
from trainer.prices.tier_setup import (
    POLICY_FILE,
    link_bytes_per_s,
    make_tier,
    most_rows,
    padding_bytes,
    profile_tokens,
    tier_limit_bytes,
    tier_name_of,
)
from trainer.settings.tree import TrainConfig
from trainer.step.runtime import Runtime

_VERSION = 2
"""Increase it with every change of what is measured; older stored results are then not used."""
_ROOM_TO_SPARE = 1.02
"""Tier bytes per byte that plans put there: places of unequal size leave gaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """The measured values that plans depend on, as they are stored."""

    activation: ActivationFit
    host_budget_bytes: int
    chunks: ChunkFit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Bytes that one layer saves per token of a rank; they differ by kind of group. The device counts on the fewest
    bytes to be freed, and the tier has room for the most. ``alone``: the layer in a group of one rank."""

    alone: LayerProfile
    least_bytes: float
    most_bytes: float
    recomputable_bytes: float

    @property
    def tier_bytes_per_byte(self) -> float:
        """Tier bytes to reserve per byte that a plan swaps."""
        return _ROOM_TO_SPARE * self.most_bytes / self.least_bytes


def plan_memory(
    config: TrainConfig, runtime: Runtime, cost: CostModel, limits: PlanLimits, cache_root: Path, local_world_size: int
) -> tuple[ActivationMemory, CostModel, PlanLimits]:
    """The run's memory, cost model and limits, with policies if plans may gain from them. Collective; the same on all
    ranks. Raises the errors of tiers without enough space."""
    if not plans_policies(config):
        return _with_note(runtime.memory, _why_none_planned(config)), cost, limits
    reason = _why_keep(config, runtime, cost, limits)
    if reason:
        return _with_note(runtime.memory, reason), cost, limits
    layer = _profile(config, runtime, cost, limits)
    tier_name = tier_name_of(config, runtime.mesh.device)
    capacity_bytes = _capacity_bytes(config, runtime, layer, tier_name, local_world_size)
    key = _key(config, cost, layer.alone, tier_name)
    cached = cache_root / "cost" / f"{key}-memory.json"
    measured = _stored_or_measured(config, runtime, cost, limits, layer, tier_name, capacity_bytes, key, cached)
    cost = _with_prices(cost, measured, layer.alone.num_tokens, tier_name)
    if cost.chunks is not None:
        map_chunk_blocks(runtime)
    if runtime.mesh.rank == 0:
        _write(cached, {"key": key, "measured": to_plain(measured)})
        own = {"key": key, "measured": to_plain(measured), "cost": to_plain(cost)}  # the cost: for longhaul report
        _write(Path(config.run.dir) / POLICY_FILE, own)
    limits = with_policies(limits, host_budget_bytes=measured.host_budget_bytes)
    memory = dataclasses.replace(runtime.memory, kept_layers=_kept_layers(runtime))
    if swaps(cost, limits):
        room = int(measured.host_budget_bytes * layer.tier_bytes_per_byte) + padding_bytes(runtime)
        tier, ledger = make_tier(config, runtime, tier_name, room)
        memory = dataclasses.replace(memory, tier=tier, ledger=ledger)
    return memory, cost, limits


def _with_prices(cost: CostModel, measured: _Measured, num_tokens: int, tier_name: str) -> CostModel:
    if cost.activation is not None:
        return cost
    notes = [f"activations: measured on layers of {num_tokens} tokens a rank and copies to the {tier_name} tier"]
    if measured.chunks is not None:
        notes.append("chunks: measured on whole microbatches in chunks of two sizes")
    provenance = dataclasses.replace(cost.provenance, notes=(*cost.provenance.notes, *notes))
    return dataclasses.replace(cost, activation=measured.activation, chunks=measured.chunks, provenance=provenance)


def policy_note(plan: StepPlan, cost: CostModel, limits: PlanLimits) -> str:
    """One line for the log: the policy chosen for the longest sequence (``plan`` is its plan) and its prices."""
    fit = cost.activation
    assert fit is not None
    (microbatch,) = plan.microbatches
    kept = price_microbatch(dataclasses.replace(microbatch, memory=KEEP), step_lengths(plan), cost)
    budget, host = limits.device_budget_bytes, limits.host_budget_bytes
    chosen = policy_name(microbatch.memory)
    if not microbatch.memory.is_keep:
        chosen += (
            f", {format_bytes(microbatch.peak_bytes)} per device instead of {format_bytes(kept.peak_bytes(cost))}, "
            f"for {format_seconds(microbatch.predicted_s - kept.seconds)} more"
        )
    return (
        f"memory: chosen by the plan; {format_bytes(budget)} hold {cost.max_local_tokens(budget):,} kept tokens; "
        f"the longest sequence ({plan.num_tokens:,}) on {len(microbatch.ranks)} of {plan.num_ranks} ranks: {chosen}; "
        f"swapping a token frees {format_bytes(fit.swap_bytes_per_token)} (room for {format_bytes(host)}, "
        f"{format_bytes(fit.copy_bytes_per_s)}/s), recomputing it {format_bytes(fit.recompute_bytes_per_token)} "
        f"for {format_seconds(fit.recompute_s_per_token)}{_chunk_note(cost)}"
    )


def _chunk_note(cost: CostModel) -> str:
    if cost.chunks is None:
        return ""
    return f", chunks all but {format_bytes(cost.chunks.resident_bytes_per_token)} of it for a second forward"


def _with_note(memory: ActivationMemory, reason: str) -> ActivationMemory:
    """``memory`` with a line for the log that says why everything is kept; unchanged if ``reason`` is empty."""
    return dataclasses.replace(memory, note=f"memory: all activations kept: {reason}") if reason else memory


def _why_none_planned(config: TrainConfig) -> str:
    """Why plans of this run do not choose policies; empty if the user set a policy that is not keep."""
    if config.memory.policy == "auto":
        return f"{chooses_none(config.plan.strategy)}; --memory recompute, swap or seco hold for a whole run"
    return "as --memory keep says" if config.memory.policy == "keep" else ""


def _why_keep(config: TrainConfig, runtime: Runtime, cost: CostModel, limits: PlanLimits) -> str:
    """Why plans keep everything; empty if they may choose."""
    most, budget = cost.device_bytes(most_rows(config) * cost.num_stages), limits.device_budget_bytes
    if most <= budget:
        return f"a whole step on one device would take {format_bytes(most)} of {format_bytes(budget)}"
    if _fewest_layers(runtime) <= RECOMPUTE_KEEPS_LAYERS:
        where = "the model has" if cost.num_stages == 1 else "a pipeline stage has"
        return f"{where} one layer, and the last one is always kept"
    if cost.activation is None and not measures_policies(cost):
        return f"{config.plan.cost} does not price swapping and recomputing"
    return ""


def _kept_layers(runtime: Runtime) -> int:
    """How many last layers are kept whole. Swap needs one more than recompute, which would leave none of two layers."""
    can_swap = _fewest_layers(runtime) > SWAP_KEEPS_LAYERS
    return SWAP_KEEPS_LAYERS if can_swap else RECOMPUTE_KEEPS_LAYERS


def _stage_layers(runtime: Runtime) -> tuple[int, ...]:
    """Number of layers in each pipeline stage."""
    num_layers, num_stages = runtime.model.spec.num_layers, runtime.mesh.num_stages
    return tuple(len(StageShard(stage, num_stages).layers(num_layers)) for stage in range(num_stages))


def _fewest_layers(runtime: Runtime) -> int:
    return min(_stage_layers(runtime))


def _profile(config: TrainConfig, runtime: Runtime, cost: CostModel, limits: PlanLimits) -> _Layer:
    """Measure a layer on single ranks and, if plans may use it, in a ulysses group of all ranks. There attention saves
    its tensors in both layouts, except those that are exchanged again if something is recomputed."""
    num_tokens, degree = profile_tokens(config), runtime.mesh.data_size
    alone = profile_layer(runtime, num_tokens=num_tokens)
    whole, freed = [_saved_bytes(alone)], [_saved_bytes(alone) - alone.pair_bytes_per_token]
    exchanges = AttentionKind.ULYSSES in limits.kinds and degree <= limits.max_ulysses_degree
    if degree > 1 and exchanges and degree in cost.degrees(AttentionKind.ULYSSES):
        shape, rows = MeasuredShape(AttentionKind.ULYSSES, degree), max(1, num_tokens // degree)
        shared = profile_layer(runtime, num_tokens=rows, shape=shape)
        recomputing = dataclasses.replace(runtime.memory, policy=RECOMPUTE_ALL)
        again = profile_layer(dataclasses.replace(runtime, memory=recomputing), num_tokens=rows, shape=shape)
        whole.append(_saved_bytes(shared))
        freed.append(_saved_bytes(shared) - again.pair_bytes_per_token)
    return _Layer(alone=alone, least_bytes=min(whole), most_bytes=max(whole), recomputable_bytes=max(0.0, min(freed)))


def _saved_bytes(profile: LayerProfile) -> float:
    return profile.pair_bytes_per_token + sum(tensor.bytes_per_token for tensor in profile.tensors)


def _capacity_bytes(
    config: TrainConfig, runtime: Runtime, layer: _Layer, tier_name: str, local_world_size: int
) -> int:
    """Size of the tier: all that a step could swap, but at most what is free or set."""
    if _kept_layers(runtime) < SWAP_KEEPS_LAYERS:
        return 0
    limit_bytes = tier_limit_bytes(config, runtime, tier_name, local_world_size)
    layers = len(runtime.model.layers) - (SWAP_KEEPS_LAYERS if runtime.model.stage.is_last else 0)
    needed = int(layers * layer.most_bytes * most_rows(config) * _ROOM_TO_SPARE) + padding_bytes(runtime)
    return min(limit_bytes, needed)


def _stored_or_measured(
    config: TrainConfig, runtime: Runtime, cost: CostModel, limits: PlanLimits, layer: _Layer, tier_name: str,
    capacity_bytes: int, key: str, cached: Path,
) -> _Measured:
    """Rank 0's numbers: those the run began with if it resumes, else the cached fit with the tier's current
    capacity."""
    host_budget = max(0, int((capacity_bytes - padding_bytes(runtime)) / layer.tier_bytes_per_byte))
    found = None
    if runtime.mesh.rank == 0:
        began = _read(Path(config.run.dir) / POLICY_FILE, key) if config.run.resume else None
        fit = _read(cached, key)
        found = began or (dataclasses.replace(fit, host_budget_bytes=host_budget) if fit else None)
    found = _shared(runtime, found)
    if found is None:
        activation, chunks = cost.activation, None
        if activation is None:
            activation = _measure(config, runtime, cost, layer, tier_name)
            if plans_chunks(config) and cost.num_stages == 1 and chunks_may_pay(runtime, cost, activation):
                # half the tokens of the layer profile: calibration has run that many whole on one rank
                chunks = measure_chunks(runtime, cost, limits, num_tokens=max(1, layer.alone.num_tokens // 2))
        found = _shared(runtime, _Measured(activation=activation, host_budget_bytes=host_budget, chunks=chunks))
        assert found is not None
    return found


def _key(config: TrainConfig, cost: CostModel, profile: LayerProfile, tier_name: str) -> str:
    """A hash of everything that the measurement depends on."""
    conditions = {
        "cost": cost.digest, "memory": to_plain(config.memory), "tier": tier_name, "tokens": profile.num_tokens,
        "disk": _disk_of(Path(config.run.dir)), "version": _VERSION, "chunks": plans_chunks(config),
        "attention": config.plan.attention,
    }
    return digest_of(conditions)[:24]


def _write(path: Path, values: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(values), encoding="utf-8")
    partial.replace(path)


def _shared(runtime: Runtime, measured: _Measured | None) -> _Measured | None:
    """Rank 0's value, on every rank."""
    mesh = runtime.mesh
    payload = json.dumps(to_plain(measured)).encode() if mesh.rank == 0 else None
    answer = json.loads(comm.broadcast_bytes(payload, source=0, group=mesh.control_group))
    return None if answer is None else from_plain(_Measured, answer, where=POLICY_FILE)


def _measure(
    config: TrainConfig, runtime: Runtime, cost: CostModel, layer: _Layer, tier_name: str
) -> ActivationFit:
    """Prices of swap and recompute. Bytes freed per token are the minimum over stages. With several stages, all but the
    last one swap or recompute every layer, so more is copied and recomputed than counts as freed: each microbatch in
    flight is charged for its layers in use as if no other microbatch could use their memory."""
    layers, profile = _fewest_layers(runtime) - _kept_layers(runtime), layer.alone
    num_busy = layers if cost.num_stages == 1 else max(_stage_layers(runtime))
    can_swap = _kept_layers(runtime) == SWAP_KEEPS_LAYERS
    store, load = link_bytes_per_s(config, runtime, tier_name) if can_swap else (1.0, 1.0)
    microbatch_s = cost.group_s(AttentionKind.LOCAL, 1, [profile.num_tokens])
    most = cost.memory.bytes_per_token
    return ActivationFit(
        swap_bytes_per_token=min(layers * layer.least_bytes, most) if can_swap else 0.0,
        recompute_bytes_per_token=min(layers * layer.recomputable_bytes, most),
        recompute_s_per_token=num_busy * sum(t.recompute_s_per_token for t in profile.tensors if t.bytes_per_token),
        copy_bytes_per_s=min(store, 2 * load),
        hidden_share=min(1.0, layers * profile.forward_s / microbatch_s) if microbatch_s > 0 else 0.0,
        host_bytes_per_byte=num_busy / layers if can_swap else 1.0,
    )


def _read(path: Path, key: str) -> _Measured | None:
    """What was stored under ``key``; None if the file is absent, incomplete or of another version."""
    try:
        stored = json.loads(path.read_bytes())
        return from_plain(_Measured, stored["measured"], where=str(path)) if stored["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _disk_of(folder: Path) -> int:
    """Number of the file system that holds, or will hold, a folder that need not exist yet."""
    folder = folder.resolve()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.stat().st_dev
