"""Ulysses: exchange heads for tokens within a team of ranks, so that each rank holds all tokens for some heads.

Works at any degree up to the number of query heads; heads need not divide evenly. With fewer KV heads than ranks, each
KV head is sent only to the ranks whose query heads read it. KV heads are never repeated for sending. Where the kernel's
rule for pairing query and KV heads would be wrong, KV heads are repeated only for the kernel call.
Shapes: T own rows, S rows of the whole team, N/K query/KV heads, n/k those of this rank, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from parallel.comm import Exchange, Message
from parallel.kernel import AttentionKernel, Pairs
from parallel.lse import accumulate_dtype
from planner.errors import PlanError


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Which query heads and which KV heads each of ``degree`` ranks works on. Raises PlanError if they do not fit."""

    num_query_heads: int
    num_kv_heads: int
    degree: int

    def __post_init__(self) -> None:
        if not 1 <= self.degree <= self.num_query_heads or self.num_query_heads % self.num_kv_heads:
            raise PlanError(
                f"cannot split {self.num_query_heads} query heads ({self.num_kv_heads} KV heads) "
                f"over {self.degree} ranks"
            )

    def query_heads(self, index: int) -> tuple[int, int]:
        """Half-open range of query heads of group member ``index``."""
        heads = self.num_query_heads
        return heads * index // self.degree, heads * (index + 1) // self.degree

    def kv_heads(self, index: int) -> tuple[int, int]:
        """Half-open range of the KV heads that the member's query heads read."""
        first, stop = self.query_heads(index)
        ratio = self.num_query_heads // self.num_kv_heads
        return first // ratio, (stop - 1) // ratio + 1

    def width(self, index: int) -> int:
        """Number of q, k and v heads in one row of member ``index``."""
        (q0, q1), (k0, k1) = self.query_heads(index), self.kv_heads(index)
        return q1 - q0 + 2 * (k1 - k0)

    def irregular_kv_map(self, index: int) -> tuple[int, ...] | None:
        """The KV head (counted from the member's first) that each of the member's query heads reads; None where the
        kernel's rule ``n // (N // K)`` gives the same heads."""
        (q0, q1), (k0, k1) = self.query_heads(index), self.kv_heads(index)
        ratio = self.num_query_heads // self.num_kv_heads
        wanted = tuple(head // ratio - k0 for head in range(q0, q1))
        count, kv_count = q1 - q0, k1 - k0
        if count % kv_count == 0 and wanted == tuple(head // (count // kv_count) for head in range(count)):
            return None
        return wanted


@dataclass(frozen=True, slots=True)
class HeadExchange:
    """Both directions of the exchange for one group. ``rows``: own rows of every member, by group index."""

    layout: HeadLayout
    ranks: tuple[int, ...]
    group_index: int
    rows: tuple[int, ...]
    wire: Exchange

    def _row_ranges(self) -> list[tuple[int, int]]:
        edges = [0]
        for count in self.rows:
            edges.append(edges[-1] + count)
        return list(zip(edges, edges[1:], strict=False))

    def tokens_from_heads(self, parts_TXH: SequenceOf[torch.Tensor], what: str) -> torch.Tensor:
        """``parts_TXH[j]``: own rows of member j's heads. Returns all rows ``[S, x, H]`` of this rank's heads."""
        me = self.group_index
        mine = parts_TXH[me]
        gathered_SXH = mine.new_empty((sum(self.rows), *mine.shape[1:]))
        ranges = self._row_ranges()
        sends = [Message(r, parts_TXH[j].contiguous()) for j, r in enumerate(self.ranks) if j != me]
        receives = [Message(r, gathered_SXH[slice(*ranges[i])]) for i, r in enumerate(self.ranks) if i != me]
        pending = self.wire.post(sends, receives, what)
        gathered_SXH[slice(*ranges[me])] = mine
        pending.wait()
        return gathered_SXH

    def heads_from_tokens(self, x_SXH: torch.Tensor, widths: SequenceOf[int], what: str) -> list[torch.Tensor]:
        """The reverse: takes all rows of this rank's heads, returns own rows, one ``[T, widths[i], H]`` per member."""
        me = self.group_index
        ranges = self._row_ranges()
        parts = [
            x_SXH[slice(*ranges[me])] if i == me else x_SXH.new_empty((self.rows[me], width, x_SXH.shape[-1]))
            for i, width in enumerate(widths)
        ]
        sends = [Message(r, x_SXH[slice(*ranges[j])].contiguous()) for j, r in enumerate(self.ranks) if j != me]
        receives = [Message(r, parts[i]) for i, r in enumerate(self.ranks) if i != me]
        self.wire.post(sends, receives, what).wait()
        return parts

    def gather_qkv(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Own rows of all heads -> all rows of this rank's heads: q ``[S, n, H]``, k and v ``[S, k, H]``."""
        parts = [
            torch.cat((_heads(q_TNH, self.layout.query_heads(j)), _heads(k_TKH, self.layout.kv_heads(j)),
                       _heads(v_TKH, self.layout.kv_heads(j))), dim=1)
            for j in range(len(self.ranks))
        ]
        q0, q1 = self.layout.query_heads(self.group_index)
        k0, k1 = self.layout.kv_heads(self.group_index)
        q, k, v = self.tokens_from_heads(parts, "head exchange of q, k, v").split((q1 - q0, k1 - k0, k1 - k0), dim=1)
        return q, k, v

    def scatter_qkv_grads(
        self, dq_SNH: torch.Tensor, dk_SKH: torch.Tensor, dv_SKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adjoint of ``gather_qkv``: gradients of KV heads that went to several ranks are summed at their owner."""
        packed = torch.cat((dq_SNH, dk_SKH.to(dq_SNH.dtype), dv_SKH.to(dq_SNH.dtype)), dim=1)
        widths = [self.layout.width(i) for i in range(len(self.ranks))]
        parts = self.heads_from_tokens(packed, widths, "head exchange of dq, dk, dv")
        rows, head_dim = self.rows[self.group_index], dq_SNH.shape[-1]
        dq = packed.new_empty((rows, self.layout.num_query_heads, head_dim))
        wide = accumulate_dtype(packed.dtype)
        dk = packed.new_zeros((rows, self.layout.num_kv_heads, head_dim), dtype=wide)
        dv = torch.zeros_like(dk)
        for i, part in enumerate(parts):
            (q0, q1), (k0, k1) = self.layout.query_heads(i), self.layout.kv_heads(i)
            dq[:, q0:q1], part_k, part_v = part.split((q1 - q0, k1 - k0, k1 - k0), dim=1)
            dk[:, k0:k1] += part_k
            dv[:, k0:k1] += part_v
        return dq, dk.to(packed.dtype), dv.to(packed.dtype)

    def scatter_out(self, out_SNH: torch.Tensor) -> torch.Tensor:
        """All rows of this rank's heads -> own rows of all heads ``[T, N, H]``."""
        ranges = [self.layout.query_heads(i) for i in range(len(self.ranks))]
        parts = self.heads_from_tokens(out_SNH, [stop - start for start, stop in ranges], "head exchange of out")
        return torch.cat(parts, dim=1)

    def gather_out_grad(self, dout_TNH: torch.Tensor) -> torch.Tensor:
        """Adjoint of ``scatter_out``: own rows of all heads -> all rows of this rank's heads ``[S, n, H]``."""
        parts = [_heads(dout_TNH, self.layout.query_heads(j)) for j in range(len(self.ranks))]
        return self.tokens_from_heads(parts, "head exchange of dout")

    def mapped_kernel(self, kernel: AttentionKernel, device: torch.device) -> AttentionKernel:
        """``kernel`` for this rank's heads, wrapped if its own rule would pair query heads with wrong KV heads."""
        irregular = self.layout.irregular_kv_map(self.group_index)
        return kernel if irregular is None else MappedHeadsKernel(kernel, torch.tensor(irregular, device=device))


@dataclass(frozen=True, slots=True)
class MappedHeadsKernel:
    """Wraps a kernel so that query head n reads KV head ``kv_index_N[n]``: repeats KV heads for the call and sums their
    gradients afterwards."""

    kernel: AttentionKernel
    kv_index_N: torch.Tensor

    @property
    def name(self) -> str:
        return self.kernel.name

    def forward(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, pairs: Pairs, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kernel.forward(q_TNH, k_SKH[:, self.kv_index_N], v_SKH[:, self.kv_index_N], pairs, scale)

    def backward(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor, pairs: Pairs, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = self.kernel.backward(
            dout_TNH, q_TNH, k_SKH[:, self.kv_index_N], v_SKH[:, self.kv_index_N], out_TNH, lse_TN, pairs, scale
        )
        return dq, self._fold(dk, k_SKH.shape[1]), self._fold(dv, v_SKH.shape[1])

    def query_gradient(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor, pairs: Pairs, scale: float,
    ) -> torch.Tensor:
        k_SNH, v_SNH = k_SKH[:, self.kv_index_N], v_SKH[:, self.kv_index_N]
        return self.kernel.query_gradient(dout_TNH, q_TNH, k_SNH, v_SNH, out_TNH, lse_TN, pairs, scale)

    def _fold(self, dk_SNH: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        wide = accumulate_dtype(dk_SNH.dtype)
        folded = dk_SNH.new_zeros((dk_SNH.shape[0], num_kv_heads, dk_SNH.shape[2]), dtype=wide)
        return folded.index_add_(1, self.kv_index_N, dk_SNH.to(wide))


def _heads(x_TNH: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    return x_TNH[:, heads[0] : heads[1]]
