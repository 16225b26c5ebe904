"""Makes the run's memory policy and tier from its settings: ``--memory``, ``--swap-fraction``, ``--tier``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from memory.activations import ActivationMemory
from memory.disk_tier import DISK, DiskTier, free_disk_bytes
from memory.ledger import MemoryLedger
from memory.policy import KEEP_ALL, RECOMPUTE_ALL, ActivationPolicy
from memory.tiers import HOST, HostTier, Tier
from parallel import comm
from planner.addresses.swap_fractions import PairPlace, SwapProblem, solve_fractions
from planner.codec import from_plain, to_plain
from planner.errors import InfeasibleError, SpecError
from planner.plan import digest_of
from planner.units import KIB, format_bytes, parse_bytes
from trainer.prices.layer_profile import LINK_TIER_BYTES, LayerProfile, measure_link, profile_layer
from trainer.settings.tree import TrainConfig
from trainer.step.runtime import Runtime

SWAP_FOLDER = "swap"
"""Folder of the disk tier's files in a run folder."""
POLICY_FILE = "memory.json"
"""The fractions a run began with, in its folder; a resumed run continues with them."""
_PROFILE_TOKENS = 4096
_BACKWARD_OVER_FORWARD = 2.0
_CUDA_ROW_MULTIPLE = 128
_USABLE_HOST_SHARE = 0.5
_USABLE_DISK_SHARE = 0.9
_PLACE_BYTES = 4 * KIB
_PLACES_PER_LAYER = 32
_FRACTION_STEPS = 32
"""Fractions from measured speeds are rounded down to multiples of 1/32; finer differences are noise."""


def make_memory(config: TrainConfig, runtime: Runtime, local_world_size: int) -> ActivationMemory:
    """The run's policy for saved activations, and its tier. Collective; every rank gets the same fractions.

    Raises TierError or InfeasibleError if the tier has too little space.
    """
    policy, device = config.memory.policy, runtime.mesh.device
    row_multiple = _CUDA_ROW_MULTIPLE if device.type == "cuda" else 1
    if policy == "recompute":
        return ActivationMemory(
            policy=dataclasses.replace(RECOMPUTE_ALL, row_multiple=row_multiple),
            note="memory: activations recomputed, except layer inputs and attention outputs, which are kept",
        )
    if policy != "swap":
        return ActivationMemory(policy=dataclasses.replace(KEEP_ALL, row_multiple=row_multiple))
    tier_name = tier_name_of(config, device)
    profile = profile_layer(runtime, num_tokens=profile_tokens(config))
    limit_bytes = tier_limit_bytes(config, runtime, tier_name, local_world_size)
    fraction = config.memory.swap_fraction
    if fraction is not None:
        chosen = ActivationPolicy(
            swap_fraction=fraction, keep_fraction=0.0, swap_pair=True, row_multiple=row_multiple
        )
        how = f"{fraction:.0%} of the tokens swapped, the rest recomputed (--swap-fraction)"
    else:
        chosen, how = _best_fractions(config, runtime, profile, tier_name, limit_bytes, row_multiple)
    needed_bytes = _needed_bytes(config, runtime, profile, chosen)
    capacity_bytes = min(limit_bytes, needed_bytes) if config.memory.tier_budget == "auto" else limit_bytes
    tier, ledger = make_tier(config, runtime, tier_name, capacity_bytes)
    note = f"memory: {tier_name} tier of {format_bytes(capacity_bytes)} per rank; {how}"
    if capacity_bytes < needed_bytes:
        note += f"; a whole step on one rank would need {format_bytes(needed_bytes)}"
    if runtime.model.stage.is_last and len(runtime.model.layers) <= chosen.num_kept_layers:
        note += f"; the last {chosen.num_kept_layers} layers are kept and there are no others: nothing is swapped"
    return ActivationMemory(
        policy=chosen, tier=tier, ledger=ledger, note=note,
        tier_bytes_per_token=_swapped_bytes_per_token(runtime, profile, chosen),
    )


def tier_name_of(config: TrainConfig, device: torch.device) -> str:
    """The name of the tier that this run swaps to."""
    return config.memory.tier or (HOST if device.type == "cuda" else DISK)


def profile_tokens(config: TrainConfig) -> int:
    """Number of local tokens with which layers are measured."""
    return min(config.data.max_length, _PROFILE_TOKENS)


def link_bytes_per_s(config: TrainConfig, runtime: Runtime, tier_name: str) -> tuple[float, float]:
    """Measured bytes per second to a tier of this name and back. Collective."""
    probe, _ = make_tier(config, runtime, tier_name, LINK_TIER_BYTES)
    rates = measure_link(runtime, probe)
    probe.close()
    return rates


def _best_fractions(
    config: TrainConfig, runtime: Runtime, profile: LayerProfile, tier_name: str, limit_bytes: int, row_multiple: int
) -> tuple[ActivationPolicy, str]:
    """The fractions of the linear program for rank 0's measurements, or those the run began with if it resumes."""
    mesh = runtime.mesh
    store_bytes_per_s, load_bytes_per_s = link_bytes_per_s(config, runtime, tier_name)
    answer = b""
    if mesh.rank == 0:
        problem = SwapProblem(
            tensors=profile.tensors, pair_bytes_per_token=profile.pair_bytes_per_token,
            num_tokens=profile.num_tokens, num_layers=len(runtime.model.layers),
            num_kept_layers=2 if runtime.model.stage.is_last else 0, forward_s=profile.forward_s,
            backward_s=_BACKWARD_OVER_FORWARD * profile.forward_s, store_bytes_per_s=store_bytes_per_s,
            load_bytes_per_s=load_bytes_per_s,
            # speeds were measured with num_tokens, but the tier must hold all tokens that a rank may have
            tier_capacity_bytes=limit_bytes * profile.num_tokens / most_rows(config),
        )
        try:
            answer = _stored_or_solved(config, problem, row_multiple)
        except InfeasibleError as error:  # every rank must raise it, not just this one
            answer = json.dumps({"infeasible": [str(error), error.needed_bytes, error.available_bytes]}).encode()
    found = json.loads(comm.broadcast_bytes(answer if mesh.rank == 0 else None, source=0, group=mesh.control_group))
    if "infeasible" in found:
        message, needed, available = found["infeasible"]
        raise InfeasibleError(message, binding="swap tier", needed_bytes=needed, available_bytes=available)
    return from_plain(ActivationPolicy, found["policy"], where=POLICY_FILE), found["how"]


def _stored_or_solved(config: TrainConfig, problem: SwapProblem, row_multiple: int) -> bytes:
    path = Path(config.run.dir) / POLICY_FILE
    key = digest_of({"memory": to_plain(config.memory), "tensors": [tensor.name for tensor in problem.tensors]})
    if config.run.resume:
        try:
            stored = json.loads(path.read_bytes())
            if stored["key"] == key:
                from_plain(ActivationPolicy, stored["policy"], where=str(path))
                return json.dumps({**stored, "how": f"{stored['how']}, as the run began"}).encode()
        except (OSError, ValueError, KeyError, TypeError):  # absent or of another version: solve again
            pass
    plan = solve_fractions(problem)
    shares = zip(problem.tensors, plan.swap_fractions, plan.keep_fractions, strict=True)
    policy = ActivationPolicy(
        swap_fraction=0.0, keep_fraction=0.0, swap_pair=plan.pair is PairPlace.TIER, row_multiple=row_multiple,
        by_step=tuple((tensor.name, _rounded_down(swap), _rounded_down(keep)) for tensor, swap, keep in shares),
    )
    answer = json.dumps({"key": key, "policy": to_plain(policy), "how": plan.describe(problem)}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(answer)
    return answer


def _rounded_down(fraction: float) -> float:
    return int(fraction * _FRACTION_STEPS + 1e-6) / _FRACTION_STEPS


def most_rows(config: TrainConfig) -> int:
    """Most tokens that one rank may hold at once: a whole step, or the longest sequence that calibration runs."""
    return max(config.data.tokens_per_step, config.data.max_length, 256)


def _needed_bytes(config: TrainConfig, runtime: Runtime, profile: LayerProfile, policy: ActivationPolicy) -> int:
    """Tier bytes for ``most_rows`` tokens. Head exchanges add to the pair: attention's output in both layouts and, if
    nothing is recomputed, the exchanged q, k and v (with uneven heads, up to twice their size)."""
    spec, mesh = runtime.model.spec, runtime.mesh
    rows, swapped = most_rows(config), 0.0
    for tensor in profile.tensors:
        swapped += tensor.bytes_per_token * policy.split(tensor.name, rows)[0] / rows
    if policy.swap_pair:
        swapped += profile.pair_bytes_per_token
        if mesh.data_size > 1:
            heads = spec.num_query_heads + (0 if policy.recomputes else spec.num_query_heads + 2 * spec.num_kv_heads)
            swapped += 2 * heads * spec.head_dim * runtime.compute_dtype.itemsize / mesh.tensor_size
    return int(swapped * rows * len(runtime.model.layers)) + padding_bytes(runtime)


def _swapped_bytes_per_token(runtime: Runtime, profile: LayerProfile, policy: ActivationPolicy) -> float:
    """Bytes in the tier per token of a group of one rank, over all layers that swap."""
    layers = len(runtime.model.layers) - (policy.num_kept_layers if runtime.model.stage.is_last else 0)
    rows = profile.num_tokens
    swapped = sum(tensor.bytes_per_token * policy.split(tensor.name, rows)[0] / rows for tensor in profile.tensors)
    return max(layers, 0) * (swapped + (profile.pair_bytes_per_token if policy.swap_pair else 0.0))


def padding_bytes(runtime: Runtime) -> int:
    """Most bytes of a tier that alignment can waste."""
    return len(runtime.model.layers) * _PLACES_PER_LAYER * _PLACE_BYTES * (runtime.mesh.num_stages + 1)


def tier_limit_bytes(config: TrainConfig, runtime: Runtime, tier_name: str, local_world_size: int) -> int:
    """Most bytes that this rank's tier may take: as set, or a share of what is free now, the same on every rank."""
    if config.memory.tier_budget != "auto":
        return int(parse_bytes(config.memory.tier_budget, what="--memory.tier-budget"))
    if tier_name == DISK:
        free_bytes = _USABLE_DISK_SHARE * free_disk_bytes(_swap_file(config, runtime))
    else:
        free_bytes = _USABLE_HOST_SHARE * _free_host_bytes()
    lowest = torch.tensor([-free_bytes / local_world_size], dtype=torch.float64)
    return -int(comm.all_reduce_max(lowest, runtime.mesh.control_group))


def _free_host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * KIB
    raise SpecError("cannot read how much host memory is free; set --memory.tier-budget")


def _swap_file(config: TrainConfig, runtime: Runtime) -> Path:
    return Path(config.run.dir) / SWAP_FOLDER / f"rank-{runtime.mesh.rank}.swap"


def make_tier(
    config: TrainConfig, runtime: Runtime, tier_name: str, capacity_bytes: int
) -> tuple[Tier, MemoryLedger]:
    """A tier of this size and the ledger it reserves from. Raises TierError and MemoryFullError."""
    ledger = MemoryLedger({tier_name: capacity_bytes})
    if tier_name == DISK:
        return DiskTier(_swap_file(config, runtime), capacity_bytes, ledger, device=runtime.mesh.device), ledger
    return HostTier(capacity_bytes, ledger, runtime.mesh.device), ledger
