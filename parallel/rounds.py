"""The walk over a schedule's rounds: post the next round's messages, run this round's kernels, merge.

One executor for every schedule: local attention is one round without messages, a ring is degree rounds, and whatever
``planner.schedule`` learns to write later runs here unchanged.
Shapes: T own rows, R held rows (received K/V of one round), N query heads, K KV heads, H head dim.
K and V travel together as ``kv_T2KH``; gradients travel in the accumulation dtype (fp32 or wider).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel.comm import Exchange, Message
from parallel.kernel import AttentionKernel, Pairs
from parallel.lse import accumulate_dtype, merge_partial
from parallel.program import GroupProgram, KernelCall, PeerRows, RankRound


@dataclass(frozen=True, slots=True)
class BoundRound:
    """A round with its kernel calls' index tensors made."""

    plan: RankRound
    pairs: tuple[tuple[KernelCall, Pairs], ...]


def bind_rounds(rounds: tuple[RankRound, ...], device: torch.device) -> tuple[BoundRound, ...]:
    """Prepare a walk for ``device``, once per microbatch, for all layers."""
    return tuple(
        BoundRound(
            plan=step,
            pairs=tuple((call, Pairs(call.causal, call.query_rows, call.key_rows, device)) for call in step.calls),
        )
        for step in rounds
    )


@dataclass(frozen=True, slots=True)
class RoundWalker:
    """Runs one group's rounds on one rank. Stateless between calls."""

    group: GroupProgram
    forward_rounds: tuple[BoundRound, ...]
    backward_rounds: tuple[BoundRound, ...]
    kernel: AttentionKernel
    wire: Exchange
    scale: float

    def forward(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of own queries over everything they may see: out ``[T, N, H]`` (q's dtype), lse ``[T, N]``."""
        rounds = self.forward_rounds
        result = _PartialResult(q_TNH)
        kv_T2KH = torch.stack((k_TKH, v_TKH), dim=1) if len(rounds) > 1 else None
        held = None
        for number, step in enumerate(rounds):
            pending, arriving = None, None
            if kv_T2KH is not None and number + 1 < len(rounds):
                after = rounds[number + 1].plan
                arriving = kv_T2KH.new_empty((after.num_held, *kv_T2KH.shape[1:]))
                pending = self.wire.post(
                    _outgoing(after.sends, kv_T2KH, held), _incoming(after.receives, arriving), self._what(number + 1)
                )
            for call, pairs in step.pairs:
                keys, values = (held[:, 0], held[:, 1]) if call.held and held is not None else (k_TKH, v_TKH)
                result.add(pairs, *self.kernel.forward(q_TNH, keys, values, pairs, self.scale))
            if pending is not None:
                pending.wait()
            held = arriving
        return result.finish()

    def backward(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of own q, k and v. K/V are fetched again; partial dK/dV go home along the backward rounds."""
        rounds = self.backward_rounds
        wide = accumulate_dtype(q_TNH.dtype)
        kv_T2KH = torch.stack((k_TKH, v_TKH), dim=1) if len(rounds) > 1 else None
        dq = torch.zeros_like(q_TNH, dtype=wide)
        dkv = torch.zeros((k_TKH.shape[0], 2, *k_TKH.shape[1:]), dtype=wide, device=k_TKH.device)
        held, leaving = None, None
        grad_sends: tuple[PeerRows, ...] = ()
        for number, step in enumerate(rounds):
            dheld = dkv.new_zeros((step.plan.num_held, *dkv.shape[1:]))
            returning = [(peer, dkv.new_empty((peer.num_rows, *dkv.shape[1:]))) for peer in step.plan.grad_receives]
            sends = _outgoing(grad_sends, dkv, leaving)
            receives = [Message(peer.rank, buffer) for peer, buffer in returning]
            arriving = None
            if kv_T2KH is not None and number + 1 < len(rounds):
                after = rounds[number + 1].plan
                arriving = kv_T2KH.new_empty((after.num_held, *kv_T2KH.shape[1:]))
                sends = _outgoing(after.sends, kv_T2KH, held) + sends
                receives = _incoming(after.receives, arriving) + receives
            pending = self.wire.post(sends, receives, self._what(number)) if sends or receives else None
            for call, pairs in step.pairs:
                remote = call.held and held is not None
                keys, values = (held[:, 0], held[:, 1]) if remote and held is not None else (k_TKH, v_TKH)
                grads = self.kernel.backward(dout_TNH, q_TNH, keys, values, out_TNH, lse_TN, pairs, self.scale)
                _accumulate(dq, pairs.query_index, grads[0])
                _accumulate((dheld if remote else dkv)[:, 0], pairs.key_index, grads[1])
                _accumulate((dheld if remote else dkv)[:, 1], pairs.key_index, grads[2])
            if pending is not None:
                pending.wait()
            for peer, buffer in returning:
                _add_rows(dheld if peer.held else dkv, peer, buffer)
            held, leaving, grad_sends = arriving, dheld, step.plan.grad_sends
        return dq.to(q_TNH.dtype), dkv[:, 0].to(k_TKH.dtype), dkv[:, 1].to(v_TKH.dtype)

    def _what(self, number: int) -> str:
        return f"{self.group.kind} attention of group {self.group.ranks}, round {number}"


class _PartialResult:
    """Running output of own queries. One call that covers all rows is passed through untouched."""

    def __init__(self, q_TNH: torch.Tensor) -> None:
        self._q_TNH = q_TNH
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, pairs: Pairs, part_TNH: torch.Tensor, part_lse_TN: torch.Tensor) -> None:
        rows = pairs.query_index
        wide = accumulate_dtype(self._q_TNH.dtype)
        if self._out is None or self._lse is None:
            if rows == slice(0, self._q_TNH.shape[0]):
                self._out, self._lse = part_TNH, part_lse_TN
                return
            self._out = torch.zeros_like(self._q_TNH, dtype=wide)
            self._lse = torch.full(self._q_TNH.shape[:2], -torch.inf, dtype=part_lse_TN.dtype, device=part_TNH.device)
        self._out = self._out.to(wide)
        out, lse = self._out[rows], self._lse[rows]
        merge_partial(out, lse, part_TNH, part_lse_TN)
        if not isinstance(rows, slice):
            self._out[rows], self._lse[rows] = out, lse

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._out is None or self._lse is None:  # a rank without rows still passes K/V on
            return torch.zeros_like(self._q_TNH), self._q_TNH.new_zeros(self._q_TNH.shape[:2])
        return self._out.to(self._q_TNH.dtype), self._lse


def _outgoing(peers: tuple[PeerRows, ...], own: torch.Tensor, held: torch.Tensor | None) -> list[Message]:
    messages = []
    for peer in peers:
        source = held if peer.held and held is not None else own
        parts = [source[start:stop] for start, stop in peer.rows]
        messages.append(Message(peer.rank, parts[0] if len(parts) == 1 else torch.cat(parts)))
    return messages


def _incoming(peers: tuple[PeerRows, ...], buffer: torch.Tensor) -> list[Message]:
    """Received rows of one message are one run of the buffer: the compiler numbers them in message order."""
    return [Message(peer.rank, buffer[peer.rows[0][0] : peer.rows[0][1]]) for peer in peers]


def _accumulate(total: torch.Tensor, rows: torch.Tensor | slice, part: torch.Tensor) -> None:
    if isinstance(rows, slice):
        total[rows] += part
    else:
        total.index_add_(0, rows, part.to(total.dtype))


def _add_rows(total: torch.Tensor, peer: PeerRows, part: torch.Tensor) -> None:
    offset = 0
    for start, stop in peer.rows:
        total[start:stop] += part[offset : offset + stop - start]
        offset += stop - start
