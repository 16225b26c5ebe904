"""The walk over a schedule's rounds: post the next round's messages, run this round's kernels, merge the results.

One executor runs every schedule: local attention is one round without messages, a ring has as many rounds as ranks, and
a new schedule in ``planner.schedules`` needs no change here.
Shapes: T own rows, R held rows (received K/V of one round), N query heads, K KV heads, H head dim.
K and V travel together as ``kv_T2KH``; gradients travel in the accumulation dtype (fp32 or wider).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel.comm import Exchange, Message, Pending
from parallel.kernel import AttentionKernel, Pairs
from parallel.lse import RowIndex, RowSum, RunningResult, accumulate_dtype
from parallel.program import GroupProgram, KernelCall, PeerRows, RankRound


@dataclass(frozen=True, slots=True)
class BoundRound:
    """A round with the index tensors of its kernel calls."""

    plan: RankRound
    pairs: tuple[tuple[KernelCall, Pairs], ...]


def bind_rounds(rounds: tuple[RankRound, ...], device: torch.device) -> tuple[BoundRound, ...]:
    """Prepare the rounds for ``device``, once per microbatch, for all layers."""
    return tuple(
        BoundRound(
            plan=step,
            pairs=tuple((call, Pairs(call.causal, call.query_rows, call.key_rows, device)) for call in step.calls),
        )
        for step in rounds
    )


@dataclass(frozen=True, slots=True)
class _Flight:
    """Messages in flight, and the gradients among them with their target rows. ``messages`` keeps their memory alive
    until they have arrived: a send that is posted early outlives the round whose K/V it sends."""

    pending: Pending
    messages: tuple[Message, ...]
    grads: tuple[tuple[PeerRows, torch.Tensor], ...]


class _Traffic:
    """The messages of one walk. K/V buffers are keyed by the round that holds them, flights by the round that waits for
    them, because a message posted early stays in flight while later ones start and finish."""

    def __init__(self, rounds: tuple[BoundRound, ...], wire: Exchange, what: str) -> None:
        self._rounds, self._wire, self._what = rounds, wire, what
        self._arriving: dict[int, torch.Tensor] = {}
        self._flights: dict[int, list[_Flight]] = {}

    def post(
        self, number: int, own: torch.Tensor, held: torch.Tensor | None, grad: RowSum | None = None,
        held_grad: RowSum | None = None,
    ) -> None:
        """Start all messages that are posted in round ``number``. ``own``, ``held``: K/V of own rows and of this
        round's held rows. ``grad``, ``held_grad``: gradients of own rows and of the previous round's held rows."""
        for departure in self._rounds[number].plan.departures:
            sends = _outgoing(departure.sends, own, held)
            receives: list[Message] = []
            if departure.receives:
                receives += _incoming(departure.receives, self._buffer(departure.wait_after + 1, own))
            grads: tuple[tuple[PeerRows, torch.Tensor], ...] = ()
            if grad is not None:
                if departure.grad_sends:
                    leaving = None if held_grad is None else held_grad.total
                    sends += _outgoing(departure.grad_sends, grad.total, leaving)
                wide = accumulate_dtype(own.dtype)
                grads = tuple(
                    (peer, own.new_empty((peer.num_rows, *own.shape[1:]), dtype=wide))
                    for peer in departure.grad_receives
                )
                receives += [Message(peer.rank, buffer) for peer, buffer in grads]
            pending = self._wire.post(sends, receives, f"{self._what}, round {number}")
            self._flights.setdefault(departure.wait_after, []).append(
                _Flight(pending, (*sends, *receives), grads)
            )

    def finish(self, number: int) -> list[tuple[PeerRows, torch.Tensor]]:
        """Wait for the messages due when round ``number`` ends; return the gradients that arrived."""
        came: list[tuple[PeerRows, torch.Tensor]] = []
        for flight in self._flights.pop(number, ()):
            flight.pending.wait()
            came += flight.grads
        return came

    def held(self, number: int) -> torch.Tensor | None:
        """K/V received for this round. Can be called once: the caller takes ownership."""
        return self._arriving.pop(number, None)

    def _buffer(self, number: int, own: torch.Tensor) -> torch.Tensor:
        if number not in self._arriving:
            self._arriving[number] = own.new_empty((self._rounds[number].plan.num_held, *own.shape[1:]))
        return self._arriving[number]


@dataclass(frozen=True, slots=True)
class StartedWalk:
    """A forward or backward whose first messages are in flight. ``dkv``: dK/dV of own rows, in a backward."""

    traffic: _Traffic
    kv_T2KH: torch.Tensor | None
    dkv: RowSum | None = None


@dataclass(frozen=True, slots=True)
class RoundWalker:
    """Runs one group's rounds on one rank. Holds no state between calls."""

    group: GroupProgram
    forward_rounds: tuple[BoundRound, ...]
    backward_rounds: tuple[BoundRound, ...]
    kernel: AttentionKernel
    wire: Exchange
    scale: float

    def start(self, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> StartedWalk:
        """Post the forward's first messages. All ranks must start and run their groups in the same order."""
        traffic = _Traffic(self.forward_rounds, self.wire, self._what)
        if len(self.forward_rounds) == 1:
            return StartedWalk(traffic, None)
        kv_T2KH = torch.stack((k_TKH.detach(), v_TKH.detach()), dim=1)
        traffic.post(0, kv_T2KH, None)
        return StartedWalk(traffic, kv_T2KH)

    def forward(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, started: StartedWalk | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of own queries over all keys they may see: out ``[T, N, H]`` (q's dtype) and lse ``[T, N]``.
        ``started``: the result of ``start`` with the same K and V; None starts the walk now."""
        started = self.start(k_TKH, v_TKH) if started is None else started
        traffic, kv_T2KH = started.traffic, started.kv_T2KH
        result = RunningResult(q_TNH)
        held = None
        for number, step in enumerate(self.forward_rounds):
            if kv_T2KH is not None and number:
                traffic.post(number, kv_T2KH, held)
            for call, pairs in step.pairs:
                keys, values = (held[:, 0], held[:, 1]) if call.held and held is not None else (k_TKH, v_TKH)
                result.add(pairs.query_index, *self.kernel.forward(q_TNH, keys, values, pairs, self.scale))
            traffic.finish(number)
            held = traffic.held(number + 1)
        out_TNH, lse_TN = result.finish()
        return out_TNH.to(q_TNH.dtype), lse_TN

    def start_backward(self, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> StartedWalk:
        """Post the backward's first messages; ``start`` is the same for the forward."""
        traffic = _Traffic(self.backward_rounds, self.wire, self._what)
        dkv = RowSum((k_TKH.shape[0], 2, *k_TKH.shape[1:]), k_TKH)
        if len(self.backward_rounds) == 1:
            return StartedWalk(traffic, None, dkv)
        kv_T2KH = torch.stack((k_TKH, v_TKH), dim=1)
        traffic.post(0, kv_T2KH, None, dkv)
        return StartedWalk(traffic, kv_T2KH, dkv)

    def backward(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor, started: StartedWalk | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of own q, k and v. K/V are received again; partial dK/dV return to their owners in the backward
        rounds. ``started``: the result of ``start_backward`` with the same K and V; None starts the walk now."""
        rounds = self.backward_rounds
        started = self.start_backward(k_TKH, v_TKH) if started is None else started
        traffic, kv_T2KH, dkv = started.traffic, started.kv_T2KH, started.dkv
        assert dkv is not None, "start_backward makes it"
        dq = RowSum(q_TNH.shape, q_TNH)
        held: torch.Tensor | None = None
        leaving: RowSum | None = None
        for number, step in enumerate(rounds):
            if kv_T2KH is not None and number:
                traffic.post(number, kv_T2KH, held, dkv, leaving)
            from_held: list[tuple[RowIndex, torch.Tensor, torch.Tensor]] = []
            for call, pairs in step.pairs:
                remote = call.held and held is not None
                keys, values = (held[:, 0], held[:, 1]) if remote and held is not None else (k_TKH, v_TKH)
                grads = self.kernel.backward(dout_TNH, q_TNH, keys, values, out_TNH, lse_TN, pairs, self.scale)
                dq.add(pairs.query_index, grads[0])
                if remote:
                    from_held.append((pairs.key_index, grads[1], grads[2]))
                else:
                    dkv.add_keys_values(pairs.key_index, grads[1], grads[2])
            # add what arrived first: it usually covers all held rows, and then it is kept without a copy
            leaving = RowSum((step.plan.num_held, 2, *k_TKH.shape[1:]), k_TKH)
            for peer, buffer in traffic.finish(number):
                _add_message(leaving if peer.held else dkv, peer, buffer)
            for rows, dk, dv in from_held:
                leaving.add_keys_values(rows, dk, dv)
            held = traffic.held(number + 1)
        return dq.total.to(q_TNH.dtype), dkv.total[:, 0].to(k_TKH.dtype), dkv.total[:, 1].to(v_TKH.dtype)

    @property
    def _what(self) -> str:
        return f"{self.group.kind} attention of group {self.group.ranks}"


def _outgoing(peers: tuple[PeerRows, ...], own: torch.Tensor, held: torch.Tensor | None) -> list[Message]:
    messages = []
    for peer in peers:
        source = held if peer.held and held is not None else own
        parts = [source[start:stop] for start, stop in peer.rows]
        messages.append(Message(peer.rank, parts[0] if len(parts) == 1 else torch.cat(parts)))
    return messages


def _incoming(peers: tuple[PeerRows, ...], buffer: torch.Tensor) -> list[Message]:
    """Received rows of one message are contiguous in the buffer: the compiler numbers them in message order."""
    return [Message(peer.rank, buffer[peer.rows[0][0] : peer.rows[0][1]]) for peer in peers]


def _add_message(total: RowSum, peer: PeerRows, part: torch.Tensor) -> None:
    offset = 0
    for start, stop in peer.rows:
        total.add(slice(start, stop), part[offset : offset + stop - start])
        offset += stop - start
