"""Makes the tier of chunked training from the settings: ``--memory seco|spaco --tier host|disk``."""

from __future__ import annotations

import dataclasses

from memory.activations import ActivationMemory
from memory.chunked_tier import NUM_DKV_BUFFERS, NUM_KV_BUFFERS
from planner.errors import InfeasibleError
from planner.units import KIB, format_bytes
from trainer.prices.tier_setup import make_tier, most_rows, tier_limit_bytes, tier_name_of
from trainer.settings.tree import TrainConfig
from trainer.step.chunks import layer_row_bytes
from trainer.step.runtime import Runtime

_PLACE_BYTES = 4 * KIB


def chunk_memory(
    config: TrainConfig, runtime: Runtime, memory: ActivationMemory, local_world_size: int
) -> ActivationMemory:
    """``memory`` with a tier for K/V and dK/dV of earlier chunks, if the settings name one for chunked training.
    Collective. Raises TierError or MemoryFullError if the tier cannot be made, InfeasibleError if the longest sample
    cannot fit into it."""
    chunking = runtime.chunking
    if chunking is None or not chunking.offloads:
        return memory
    tier_name = tier_name_of(config, runtime.mesh.device)
    limit_bytes = tier_limit_bytes(config, runtime, tier_name, local_world_size)
    rows, pieces = most_rows(config), -(-most_rows(config) // chunking.chunk_tokens) + 1
    num_layers, kv_bytes, dkv_bytes = layer_row_bytes(runtime)
    needed_bytes = int(num_layers * ((kv_bytes + dkv_bytes) * rows + 2 * pieces * _PLACE_BYTES))
    capacity_bytes = min(limit_bytes, needed_bytes) if config.memory.tier_budget == "auto" else limit_bytes
    # the last chunk of a document is not stored; with sampled chunks there may be few dK/dV
    longest = -(-config.data.max_length // (config.plan.degree or runtime.mesh.data_size)) - chunking.chunk_tokens
    certain_bytes = int(num_layers * max(longest, 0) * (kv_bytes + (dkv_bytes if chunking.sampler is None else 0)))
    if capacity_bytes < certain_bytes:
        raise InfeasibleError(
            f"{tier_name} tier: need {format_bytes(certain_bytes)} per rank for K/V and dK/dV of the earlier chunks of "
            f"a sample of {config.data.max_length} tokens, have {format_bytes(capacity_bytes)}: raise "
            "--memory.tier-budget, lower --max-length or use more ranks",
            binding="chunk tier", needed_bytes=certain_bytes, available_bytes=capacity_bytes,
        )
    tier, ledger = make_tier(config, runtime, tier_name, capacity_bytes)
    resident = f"{min(NUM_KV_BUFFERS, num_layers)} layers' K/V and {min(NUM_DKV_BUFFERS, num_layers)} layers' dK/dV"
    note = (
        f"memory: K/V and dK/dV of earlier chunks in a {tier_name} tier of {format_bytes(capacity_bytes)} per rank; "
        f"{resident} of {num_layers} on the device"
    )
    if capacity_bytes < needed_bytes:
        note += f"; a whole step on one rank would need {format_bytes(needed_bytes)}"
    padded = sum(_in_places(size * chunking.chunk_tokens) for size in (kv_bytes, dkv_bytes)) / chunking.chunk_tokens
    return dataclasses.replace(
        memory, tier=tier, ledger=ledger, note=note, tier_bytes_per_token=num_layers * padded
    )


def _in_places(num_bytes: float) -> float:
    return -(-num_bytes // _PLACE_BYTES) * _PLACE_BYTES
