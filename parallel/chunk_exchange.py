"""What a group sends to compute attention of one chunk: nothing, heads for tokens, or queries and partial outputs.

Shapes: T own rows of the chunk, S rows of all members, N/K query/KV heads, n/k those of this rank, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch

from parallel.comm import Exchange, Message
from parallel.heads import HeadExchange
from parallel.lse import accumulate_dtype, merge_partial

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Saved = tuple[torch.Tensor, ...]


class ChunkExchange(Protocol):
    """The exchanges of one layer: two in the forward, two in the backward; just one if only keys are wanted."""

    def gather_keys(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as ``gather_qkv`` returns them, without the queries."""

    def gather_qkv(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> Triple:
        """The tensors this rank computes on: queries of the whole chunk, and its own keys and values."""

    def return_out(
        self, q_TNH: torch.Tensor, q_SNH: torch.Tensor, out_SNH: torch.Tensor, lse_SN: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Output of own rows, followed by what ``gather_backward`` needs saved: queries, outputs and LSE."""

    def gather_backward(self, dout_TNH: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(dout, q, final out, final lse) of the rows and heads this rank computes on."""

    def return_gradients(
        self, dq_SNH: torch.Tensor, dk_RKH: torch.Tensor, dv_RKH: torch.Tensor, dtype: torch.dtype
    ) -> Triple:
        """Gradients of own q, k and v in ``dtype``, from gradients in fp32 or wider."""


class NoExchange:
    """A group of one rank."""

    def gather_keys(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return k_TKH, v_TKH

    def gather_qkv(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> Triple:
        return q_TNH, k_TKH, v_TKH

    def return_out(
        self, q_TNH: torch.Tensor, q_SNH: torch.Tensor, out_SNH: torch.Tensor, lse_SN: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        out_TNH = out_SNH.to(q_TNH.dtype)
        return out_TNH, q_TNH, out_TNH, lse_SN

    def gather_backward(self, dout_TNH: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return dout_TNH.contiguous(), *saved

    def return_gradients(
        self, dq_SNH: torch.Tensor, dk_RKH: torch.Tensor, dv_RKH: torch.Tensor, dtype: torch.dtype
    ) -> Triple:
        return dq_SNH.to(dtype), dk_RKH.to(dtype), dv_RKH.to(dtype)


@dataclass(frozen=True, slots=True)
class ChunkHeads:
    """Ulysses: each rank computes all of the chunk's rows for some heads and keeps their dK/dV in its own store."""

    heads: HeadExchange

    def gather_keys(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.heads.gather_qkv(q_TNH, k_TKH, v_TKH)[1:]

    def gather_qkv(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> Triple:
        return self.heads.gather_qkv(q_TNH, k_TKH, v_TKH)

    def return_out(
        self, q_TNH: torch.Tensor, q_SNH: torch.Tensor, out_SNH: torch.Tensor, lse_SN: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        out_SNH = out_SNH.to(q_SNH.dtype)
        return self.heads.scatter_out(out_SNH), q_SNH, out_SNH, lse_SN

    def gather_backward(self, dout_TNH: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.heads.gather_out_grad(dout_TNH).contiguous(), *saved

    def return_gradients(
        self, dq_SNH: torch.Tensor, dk_RKH: torch.Tensor, dv_RKH: torch.Tensor, dtype: torch.dtype
    ) -> Triple:
        return self.heads.scatter_qkv_grads(dq_SNH.to(dtype), dk_RKH, dv_RKH)


@dataclass(frozen=True, slots=True)
class QueryExchange:
    """Each rank keeps its K/V, sends its queries to all members and receives partial results in at least fp32.

    ``rows``: the chunk's rows of every member, by group index, in token order. Every query sees at least its own key,
    so a rank's own partial result is never empty and the others can be merged into it.
    """

    ranks: tuple[int, ...]
    group_index: int
    rows: tuple[int, ...]
    wire: Exchange

    def gather_keys(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return k_TKH, v_TKH

    def gather_qkv(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> Triple:
        return self._to_all(q_TNH, "queries of a chunk"), k_TKH, v_TKH

    def return_out(
        self, q_TNH: torch.Tensor, q_SNH: torch.Tensor, out_SNH: torch.Tensor, lse_SN: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        wide = accumulate_dtype(q_TNH.dtype)
        partial_SNX = torch.cat((out_SNH.to(wide), lse_SN.unsqueeze(-1).to(wide)), dim=-1)
        parts = self._home(partial_SNX, "partial outputs of a chunk")
        mine_TNX = parts[self.group_index]
        out_TNH, lse_TN = mine_TNX[..., :-1].contiguous(), mine_TNX[..., -1].contiguous()
        for index, part_TNX in enumerate(parts):
            if index != self.group_index:
                merge_partial(out_TNH, lse_TN, part_TNX[..., :-1], part_TNX[..., -1])
        out_TNH = out_TNH.to(q_TNH.dtype)
        return out_TNH, q_TNH, out_TNH, lse_TN

    def gather_backward(self, dout_TNH: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q_TNH, out_TNH, lse_TN = saved
        packed = self._to_all(torch.cat((dout_TNH, q_TNH, out_TNH), dim=-1), "dout, q and out of a chunk")
        lse_SN = self._to_all(lse_TN, "log-sum-exp of a chunk")
        return *(part.contiguous() for part in packed.chunk(3, dim=-1)), lse_SN

    def return_gradients(
        self, dq_SNH: torch.Tensor, dk_RKH: torch.Tensor, dv_RKH: torch.Tensor, dtype: torch.dtype
    ) -> Triple:
        dq_TNH = torch.stack(self._home(dq_SNH, "partial dq of a chunk")).sum(0)
        return dq_TNH.to(dtype), dk_RKH.to(dtype), dv_RKH.to(dtype)

    def _ranges(self) -> list[slice]:
        return [slice(*edges) for edges in pairwise((0, *accumulate(self.rows)))]

    def _to_all(self, own: torch.Tensor, what: str) -> torch.Tensor:
        """Send own rows to all members; return the rows of all members in order."""
        own = own.contiguous()
        whole = own.new_empty((sum(self.rows), *own.shape[1:]))
        ranges, others = self._ranges(), [i for i in range(len(self.ranks)) if i != self.group_index]
        pending = self.wire.post(
            [Message(self.ranks[i], own) for i in others],
            [Message(self.ranks[i], whole[ranges[i]]) for i in others],
            what,
        )
        whole[ranges[self.group_index]] = own
        pending.wait()
        return whole

    def _home(self, whole: torch.Tensor, what: str) -> list[torch.Tensor]:
        """Send every member's rows back to it; return what each member computed for own rows, by group index."""
        ranges, others = self._ranges(), [i for i in range(len(self.ranks)) if i != self.group_index]
        mine = whole[ranges[self.group_index]]
        parts = [mine if i == self.group_index else torch.empty_like(mine) for i in range(len(self.ranks))]
        sends = [Message(self.ranks[i], whole[ranges[i]]) for i in others]
        self.wire.post(sends, [Message(self.ranks[i], parts[i]) for i in others], what).wait()
        return parts
