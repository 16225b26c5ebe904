"""Attention of one microbatch on one rank, for any groups: differentiable and exact; documents never attend to others.

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
from parallel.rounds import RoundWalker, bind_rounds


@dataclass(frozen=True, slots=True)
class _GroupRunner:
    """One group: its walk over rounds, and the head exchange around that walk if the group has one."""

    group: GroupProgram
    walker: RoundWalker
    heads: HeadExchange | None
    regather: bool


@dataclass(frozen=True, slots=True)
class MicrobatchAttention:
    """Callable ``(q_TNH, k_TKH, v_TKH) -> out_TNH`` for all layers of one microbatch. Communicates with its groups.
    With ``remap``, input and output are in the linear layout, and ranks that exchange rows with this one take part."""

    runners: tuple[_GroupRunner, ...]
    remap: Remap | None = None

    def __call__(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> torch.Tensor:
        if not self.runners:  # the empty microbatch that ends a step has no rows, but k and v must stay in the graph
            return q_TNH + 0 * (k_TKH.sum() + v_TKH.sum())
        if self.remap is not None:
            q_TNH, k_TKH, v_TKH = self.remap.qkv_to_attention(q_TNH, k_TKH, v_TKH)
        out_TNH: torch.Tensor = _GroupsAttention.apply(q_TNH, k_TKH, v_TKH, self.runners)
        return out_TNH if self.remap is None else self.remap.out_to_linear(out_TNH)


@dataclass(frozen=True, slots=True)
class AttentionEngine:
    """Binds microbatches to their groups. ``wire``: point-to-point exchange over the data axis (rank = data rank)."""

    kernel: AttentionKernel
    wire: Exchange
    device: torch.device

    def bind(
        self, microbatch: RankMicrobatch, *, num_query_heads: int, num_kv_heads: int, head_dim: int,
        regather: bool = False,
    ) -> MicrobatchAttention:
        """Prepare one microbatch without communication. Head counts are those of one tensor rank.

        ``regather``: save q, k and v from before the head exchange and repeat the exchange in the backward. The saved
        tensors are then rows of this rank, which a memory policy can recompute. All ranks of a group must agree on it.
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


class _GroupsAttention(torch.autograd.Function):
    """All groups of a microbatch, run one after the other, in the order of the plan in both forward and backward: the
    groups with the longest communication come first. One autograd function per group would reverse the backward order.

    The first messages of every group are in flight while the first group's kernels run. Groups with a head exchange are
    the exception: they must complete it first, so they start when their turn comes. Saved tensors are those of flash
    attention: q, k, v (after the head exchange, or from before it with ``regather``), out and lse.
    """

    @staticmethod
    def forward(
        ctx: Any, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, runners: tuple[_GroupRunner, ...]
    ) -> torch.Tensor:
        parts = list(zip(*(_split(x, runners) for x in (q_TNH, k_TKH, v_TKH)), strict=True))
        started = [
            None if runner.heads is not None else runner.walker.start(k, v)
            for runner, (_, k, v) in zip(runners, parts, strict=True)
        ]
        outs, saved = [], []
        for runner, (q, k, v), walk in zip(runners, parts, started, strict=True):
            own = (q, k, v)
            if runner.heads is not None:
                q, k, v = runner.heads.gather_qkv(q, k, v)
            out_TNH, lse_TN = runner.walker.forward(q, k, v, walk)
            saved += [*(own if runner.regather else (q, k, v)), out_TNH, lse_TN]
            outs.append(out_TNH if runner.heads is None else runner.heads.scatter_out(out_TNH))
        ctx.save_for_backward(*saved)
        ctx.runners = runners
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        runners: tuple[_GroupRunner, ...] = ctx.runners
        douts = _split(grad_outputs[0].contiguous(), runners)
        tensors = ctx.saved_tensors  # read once: memory policies restore each tensor only a single time
        saved = [tensors[place : place + 5] for place in range(0, len(tensors), 5)]
        started = [
            None if runner.heads is not None else runner.walker.start_backward(k, v)
            for runner, (_, k, v, _, _) in zip(runners, saved, strict=True)
        ]
        grads = []
        for runner, dout, (q, k, v, out, lse), walk in zip(runners, douts, saved, started, strict=True):
            if runner.heads is None:
                grads.append(runner.walker.backward(dout, q, k, v, out, lse, walk))
                continue
            if runner.regather:
                q, k, v = runner.heads.gather_qkv(q, k, v)
            dout = runner.heads.gather_out_grad(dout)
            grads.append(runner.heads.scatter_qkv_grads(*runner.walker.backward(dout, q, k, v, out, lse)))
        if len(grads) == 1:
            return (*grads[0], None)
        return (*(torch.cat(of_groups) for of_groups in zip(*grads, strict=True)), None)


def _split(x_TXH: torch.Tensor, runners: tuple[_GroupRunner, ...]) -> tuple[torch.Tensor, ...]:
    """Split by group: each group's rows are contiguous."""
    if len(runners) == 1:
        return (x_TXH,)
    return x_TXH.split([runner.group.rows[1] - runner.group.rows[0] for runner in runners])
