"""Planned addresses in a training run: when the arena is made, and which microbatches are of the same kind."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from memory.arena import AddressArena, ArenaError, install_on_cuda
from memory.policy import ActivationPolicy
from parallel.program import RankMicrobatch
from planner.errors import SpecError
from planner.plan import AttentionKind
from trainer.rank_env import RankEnv
from trainer.settings.tree import TrainConfig


def make_arena(config: TrainConfig, env: RankEnv) -> AddressArena | None:
    """The arena, if the settings ask for one. Call it before anything that starts CUDA, as choosing a device does.

    Raises SpecError if this device or machine cannot have an arena.
    """
    if not config.memory.static_plan:
        return None
    if config.run.device == "cpu" or torch.cuda.device_count() < env.local_world_size:
        raise SpecError("--memory.static-plan is for cuda, and this run is on cpu: leave it out")
    try:
        return install_on_cuda(env.local_rank)
    except ArenaError as error:
        raise SpecError(f"--memory.static-plan: {error}; leave it out") from error


def microbatch_kind(
    microbatch: RankMicrobatch, policy: ActivationPolicy, *, is_first: bool, loss_chunk_tokens: int, is_whole: bool,
    mlp_chunk_tokens: int = 0,
) -> Hashable:
    """A key, equal for microbatches whose memory requests are the same except for sizes that depend on the rows.

    If every group is local, the number of attention calls determines the requests. Otherwise, and in chunks (not
    ``is_whole``), message sizes do not depend on this rank's rows alone, so only equal layouts are of one kind. The
    first microbatch of a step is its own kind because it also allocates the gradients.
    """
    layout: Hashable = microbatch.groups, microbatch.moves
    if is_whole and microbatch.moves is None and all(g.kind is AttentionKind.LOCAL for g in microbatch.groups):
        layout = tuple(tuple(len(part.calls) for part in (*g.forward, *g.backward)) for g in microbatch.groups)
        if len(microbatch.groups) > 1:  # one group's rows may grow while another's shrink
            layout = layout, tuple(group.rows for group in microbatch.groups)
    rows = microbatch.num_rows
    num_pieces = -(-rows // loss_chunk_tokens), -(-rows // mlp_chunk_tokens) if mlp_chunk_tokens else 1
    return is_first, policy, layout, num_pieces


def begin_microbatch(arena: AddressArena, kind: Hashable, num_rows: int, device: torch.device) -> None:
    """Assign the current stream's requests to a microbatch of this kind from now on."""
    arena.begin(kind, num_rows, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
