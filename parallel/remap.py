"""Moves rows between the linear layout, used for everything but attention, and the attention layout.

One packed message in each direction: q, k and v rows before attention, output rows after it. Every row is on exactly
one rank in either layout, so each direction is the inverse and the adjoint of the other: gradients take the reverse
route and nothing is summed.
Shapes: T rows in the source layout, S in the target layout, X heads of all packed tensors, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from parallel.comm import Exchange, Message
from planner.schedules.linear_layout import RankMoves


@dataclass(frozen=True, slots=True)
class Remap:
    """One rank's part in the moves of one microbatch. Holds no state between calls."""

    moves: RankMoves
    wire: Exchange

    def qkv_to_attention(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From linear rows to attention rows. Differentiable. Communicates."""
        packed: torch.Tensor = _Move.apply(torch.cat((q_TNH, k_TKH, v_TKH), dim=1), self, True)
        q, k, v = packed.split((q_TNH.shape[1], k_TKH.shape[1], v_TKH.shape[1]), dim=1)
        return q.contiguous(), k.contiguous(), v.contiguous()

    def out_to_linear(self, out_TNH: torch.Tensor) -> torch.Tensor:
        """From attention rows to linear rows. Differentiable. Communicates."""
        moved: torch.Tensor = _Move.apply(out_TNH, self, False)
        return moved

    def exchange(self, x_TXH: torch.Tensor, *, to_attention: bool) -> torch.Tensor:
        """Takes the rows of one layout, returns those of the other."""
        moves, x_TXH = self.moves, x_TXH.contiguous()
        leaving, coming = (moves.guests, moves.lent) if to_attention else (moves.lent, moves.guests)
        num_rows = moves.num_attention_rows if to_attention else moves.num_linear_rows
        moved_SXH = x_TXH.new_empty((num_rows, *x_TXH.shape[1:]))
        sends = [Message(rank, x_TXH[start:stop]) for rank, start, stop in leaving]
        receives = [Message(rank, moved_SXH[start:stop]) for rank, start, stop in coming]
        pending = self.wire.post(sends, receives, f"remap to the {'attention' if to_attention else 'linear'} layout")
        moved_SXH[: moves.num_kept] = x_TXH[: moves.num_kept]
        pending.wait()
        return moved_SXH


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TXH: torch.Tensor, remap: Remap, to_attention: bool) -> torch.Tensor:
        ctx.remap, ctx.to_attention = remap, to_attention
        return remap.exchange(x_TXH, to_attention=to_attention)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_SXH,) = grad_outputs
        return ctx.remap.exchange(grad_SXH, to_attention=not ctx.to_attention), None, None
