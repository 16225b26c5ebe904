"""Attention of one microbatch on one rank, whatever its groups: differentiable, exact, documents never mixed.

Shapes: T rows of the microbatch on this rank, N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from parallel.comm import Exchange
from parallel.heads import HeadExchange, HeadLayout
from parallel.kernel import AttentionKernel
from parallel.program import GroupProgram, RankMicrobatch
from parallel.remap import Remap
from parallel.rounds import RoundWalker, StartedWalk, bind_rounds


@dataclass(frozen=True, slots=True)
class _GroupRunner:
    """One group: an optional head exchange around a walk over rounds."""

    group: GroupProgram
    walker: RoundWalker
    heads: HeadExchange | None
    regather: bool


@dataclass(frozen=True, slots=True)
class MicrobatchAttention:
    """Callable ``(q_TNH, k_TKH, v_TKH) -> out_TNH`` for all layers of one microbatch. Communicates with its groups, and
    with ``remap`` with the ranks that its rows come from or go to: T rows in the linear layout, in and out."""

    runners: tuple[_GroupRunner, ...]
    remap: Remap | None = None

    def __call__(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> torch.Tensor:
        if not self.runners:  # the empty microbatch that ends a step: no rows, but k and v stay in the graph
            return q_TNH + 0 * (k_TKH.sum() + v_TKH.sum())
        if self.remap is not None:
            q_TNH, k_TKH, v_TKH = self.remap.qkv_to_attention(q_TNH, k_TKH, v_TKH)
        parts = self._parts(q_TNH, k_TKH, v_TKH)
        # every group's first messages fly while the first group's kernels run; heads have to be traded before that
        started = [
            None if runner.heads is not None else runner.walker.start(part[1], part[2])
            for runner, part in zip(self.runners, parts, strict=True)
        ]
        outs = [
            _GroupAttention.apply(*part, runner, walk)
            for runner, part, walk in zip(self.runners, parts, started, strict=True)
        ]
        out_TNH = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out_TNH if self.remap is None else self.remap.out_to_linear(out_TNH)

    def _parts(self, *qkv: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """q, k and v by group: groups' rows stand one behind the other. A split's backward is one copy where that of
        slices adds up a whole tensor for each."""
        if len(self.runners) == 1:
            return [qkv]
        sizes = [runner.group.rows[1] - runner.group.rows[0] for runner in self.runners]
        return list(zip(*(x.split(sizes) for x in qkv), strict=True))


@dataclass(frozen=True, slots=True)
class AttentionEngine:
    """Makes a microbatch's attention. ``wire``: point-to-point exchange over the data axis (rank = data rank)."""

    kernel: AttentionKernel
    wire: Exchange
    device: torch.device

    def bind(
        self, microbatch: RankMicrobatch, *, num_query_heads: int, num_kv_heads: int, head_dim: int,
        regather: bool = False,
    ) -> MicrobatchAttention:
        """Prepare one microbatch: pure set-up, no communication. Head counts are those of one tensor rank.

        ``regather``: save q, k and v as they were before a head exchange and repeat it in the backward, so that they
        are rows of this rank, which a memory policy can recompute. The same on all ranks of a group.
        """
        return MicrobatchAttention(
            tuple(
                self._runner(group, num_query_heads, num_kv_heads, head_dim, regather) for group in microbatch.groups
            ),
            None if microbatch.moves is None else Remap(microbatch.moves, self.wire),
        )

    def _runner(
        self, group: GroupProgram, num_query_heads: int, num_kv_heads: int, head_dim: int, regather: bool
    ) -> _GroupRunner:
        kernel, heads = self.kernel, None
        if group.team is not None:
            team = group.team
            layout = HeadLayout(num_query_heads, num_kv_heads, len(team.ranks))
            heads = HeadExchange(layout, team.ranks, team.place, team.rows, self.wire)
            kernel = heads.mapped_kernel(kernel, self.device)
        walker = RoundWalker(
            group=group,
            forward_rounds=bind_rounds(group.forward, self.device),
            backward_rounds=bind_rounds(group.backward, self.device),
            kernel=kernel,
            wire=self.wire,
            scale=head_dim**-0.5,
        )
        return _GroupRunner(group, walker, heads, regather)


class _GroupAttention(torch.autograd.Function):
    """What is saved is what flash attention saves: q, k, v (after the head exchange, or before it where it is repeated
    in the backward), out and lse."""

    @staticmethod
    def forward(
        ctx: Any, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, runner: _GroupRunner,
        started: StartedWalk | None,
    ) -> torch.Tensor:
        own = (q_TNH, k_TKH, v_TKH)
        if runner.heads is not None:
            q_TNH, k_TKH, v_TKH = runner.heads.gather_qkv(q_TNH, k_TKH, v_TKH)
        out_TNH, lse_TN = runner.walker.forward(q_TNH, k_TKH, v_TKH, started)
        ctx.save_for_backward(*(own if runner.regather else (q_TNH, k_TKH, v_TKH)), out_TNH, lse_TN)
        ctx.runner = runner
        return runner.heads.scatter_out(out_TNH) if runner.heads is not None else out_TNH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dout_TNH,) = grad_outputs
        runner: _GroupRunner = ctx.runner
        q_TNH, k_TKH, v_TKH, out_TNH, lse_TN = ctx.saved_tensors
        if runner.heads is not None:
            if runner.regather:
                q_TNH, k_TKH, v_TKH = runner.heads.gather_qkv(q_TNH, k_TKH, v_TKH)
            dout_TNH = runner.heads.gather_out_grad(dout_TNH)
        grads = runner.walker.backward(dout_TNH.contiguous(), q_TNH, k_TKH, v_TKH, out_TNH, lse_TN)
        if runner.heads is not None:
            grads = runner.heads.scatter_qkv_grads(*grads)
        return (*grads, None, None)
