"""Planned addresses in a training run: when the arena is made, and what makes two microbatches of one kind."""

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
    """The arena where it is asked for. Must come before anything that starts CUDA, as choosing a device does.

    Raises SpecError where this device or machine cannot have it.
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
    """Equal for microbatches that ask for the same blocks up to the number of rows.

    Where every group is local the number of attention calls says it; elsewhere the messages' sizes do not follow the
    rows of this rank alone, nor do chunks (not ``is_whole``), and only equal layouts are of one kind. The first
    microbatch of a step also makes the gradients.
    """
    layout: Hashable = microbatch.groups, microbatch.moves
    if is_whole and microbatch.moves is None and all(g.kind is AttentionKind.LOCAL for g in microbatch.groups):
        layout = tuple(tuple(len(part.calls) for part in (*g.forward, *g.backward)) for g in microbatch.groups)
        if len(microbatch.groups) > 1:  # rows of one group may grow while another's shrink
            layout = layout, tuple(group.rows for group in microbatch.groups)
    rows = microbatch.num_rows
    num_pieces = -(-rows // loss_chunk_tokens), -(-rows // mlp_chunk_tokens) if mlp_chunk_tokens else 1
    return is_first, policy, layout, num_pieces


def begin_microbatch(arena: AddressArena, kind: Hashable, num_rows: int, device: torch.device) -> None:
    """Requests of the current stream now belong to a microbatch of this kind."""
    arena.begin(kind, num_rows, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
