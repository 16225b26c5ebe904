"""The objects that a step uses, and how one microbatch is bound to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memory.activations import ActivationMemory
from memory.peak import PeakMemory
from memory.policy import ActivationPolicy
from memory.token_swap import MicrobatchMemory
from parallel.engine import AttentionEngine, MicrobatchAttention
from parallel.mesh import RankMesh
from parallel.program import RankMicrobatch
from parallel.stages import StageLink
from parallel.timing import StepClock
from planner.errors import PlanError
from planner.plan import Sharding, Span
from trainer.data.batch import TokenRows, token_rows
from trainer.model.optimizer import ShardedAdamW
from trainer.model.transformer import Decoder
from trainer.step.chunk_policy import ChunkPolicy

ReadSpans = Callable[[tuple[Span, ...]], TokenRows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The objects that a step uses; made once in ``trainer.build``. ``chunking``: the run's chunk policy (None: whole
    microbatches)."""

    mesh: RankMesh
    model: Decoder
    engine: AttentionEngine
    link: StageLink | None
    optimizer: ShardedAdamW
    clock: StepClock
    peak: PeakMemory
    memory: ActivationMemory
    compute_dtype: torch.dtype
    sharding: Sharding
    chunking: ChunkPolicy | None = None


def run_empty_microbatch(runtime: Runtime) -> None:
    """Forward and backward of zero tokens through this rank's stage."""
    run_alone(runtime, token_rows([], [], runtime.mesh.device), MicrobatchAttention(()))


def run_alone(runtime: Runtime, rows: TokenRows, attention: MicrobatchAttention) -> None:
    """Forward and backward of this rank's stage without its neighbours; later stages start from zeros."""
    hidden_TD = None
    if not runtime.model.stage.is_first:
        shape = (len(rows.tokens_T), runtime.model.spec.hidden_dim)
        hidden_TD = torch.zeros(shape, device=runtime.mesh.device, dtype=runtime.compute_dtype, requires_grad=True)
    memory = bind_memory(runtime, runtime.memory.policy, len(rows.tokens_T))
    runtime.model(rows.tokens_T, rows.positions_T, rows.labels_T, attention, hidden_TD, memory).sum().backward()


def bind_attention(runtime: Runtime, microbatch: RankMicrobatch) -> MicrobatchAttention:
    """The microbatch's attention with this tensor rank's heads."""
    spec, size = runtime.model.spec, runtime.mesh.tensor_size
    return runtime.engine.bind(
        microbatch,
        num_query_heads=spec.num_query_heads // size,
        num_kv_heads=spec.num_kv_heads // size,
        head_dim=spec.head_dim,
        regather=memory_policy(runtime, microbatch).recomputes,
    )


def memory_policy(runtime: Runtime, microbatch: RankMicrobatch) -> ActivationPolicy:
    """The plan's policy for this microbatch, or the run's policy if the plan keeps everything."""
    planned = microbatch.memory
    if planned.is_keep:
        return runtime.memory.policy
    return ActivationPolicy(
        swap_fraction=planned.swap_fraction, keep_fraction=planned.keep_fraction,
        swap_pair=planned.swap_fraction > 0, pair_fraction=planned.swap_fraction,
        row_multiple=runtime.memory.policy.row_multiple, kept_layers=runtime.memory.kept_layers,
    )


def bind_memory(runtime: Runtime, policy: ActivationPolicy, num_rows: int) -> MicrobatchMemory:
    """Applies ``policy`` to the activations of one microbatch of ``num_rows`` local rows. Raises PlanError if the
    policy swaps and the run has no tier."""
    if policy.swaps and runtime.memory.tier is None:
        raise PlanError("the plan swaps activations, but the run has no tier to swap to")
    stage = runtime.model.stage
    return MicrobatchMemory(
        policy, runtime.memory.tier, num_layers=len(runtime.model.layers), num_rows=num_rows, keeps_last=stage.is_last,
        timeline=runtime.memory.recorder,
    )
