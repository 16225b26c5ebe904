"""The walk over a schedule's rounds: post the next round's messages, run this round's kernels, merge.

One executor for every schedule: local attention is one round without messages, a ring is degree rounds, and whatever
``planner.schedules`` learns to write later runs here unchanged.
Shapes: T own rows, R held rows (received K/V of one round), N query heads, K KV heads, H head dim.
K and V travel together as ``kv_T2KH``; gradients travel in the accumulation dtype (fp32 or wider).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel.comm import Exchange, Message, Pending
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
class _Flight:
    """Messages under way, and the gradients among them with their places. ``messages`` keeps their memory until they
    are through: a send that is posted early outlives the round whose K/V it takes."""

    pending: Pending
    messages: tuple[Message, ...]
    grads: tuple[tuple[PeerRows, torch.Tensor], ...]


class _Traffic:
    """The messages of one walk. K/V buffers by the round that they are held in, flights by the round that waits for
    them: a message posted early is in flight while shorter ones come and go."""

    def __init__(self, rounds: tuple[BoundRound, ...], wire: Exchange, what: str) -> None:
        self._rounds, self._wire, self._what = rounds, wire, what
        self._arriving: dict[int, torch.Tensor] = {}
        self._flights: dict[int, list[_Flight]] = {}

    def post(
        self, number: int, own: torch.Tensor, held: torch.Tensor | None, grad: torch.Tensor | None,
        held_grad: torch.Tensor | None,
    ) -> None:
        """Start everything that is posted while round ``number`` runs. ``own``, ``held``: K/V of own rows and of this
        round's held rows; ``grad``, ``held_grad``: gradients of own rows and of the previous round's held rows."""
        for departure in self._rounds[number].plan.departures:
            sends = _outgoing(departure.sends, own, held)
            receives: list[Message] = []
            if departure.receives:
                receives += _incoming(departure.receives, self._buffer(departure.wait_after + 1, own))
            grads: tuple[tuple[PeerRows, torch.Tensor], ...] = ()
            if grad is not None:
                sends += _outgoing(departure.grad_sends, grad, held_grad)
                grads = tuple(
                    (peer, grad.new_empty((peer.num_rows, *grad.shape[1:]))) for peer in departure.grad_receives
                )
                receives += [Message(peer.rank, buffer) for peer, buffer in grads]
            pending = self._wire.post(sends, receives, f"{self._what}, round {number}")
            self._flights.setdefault(departure.wait_after, []).append(
                _Flight(pending, (*sends, *receives), grads)
            )

    def finish(self, number: int) -> list[tuple[PeerRows, torch.Tensor]]:
        """Wait for what must be through when round ``number`` ends; the gradients that came."""
        came: list[tuple[PeerRows, torch.Tensor]] = []
        for flight in self._flights.pop(number, ()):
            flight.pending.wait()
            came += flight.grads
        return came

    def held(self, number: int) -> torch.Tensor | None:
        """K/V received for this round, once: whoever asks keeps it."""
        return self._arriving.pop(number, None)

    def _buffer(self, number: int, own: torch.Tensor) -> torch.Tensor:
        if number not in self._arriving:
            self._arriving[number] = own.new_empty((self._rounds[number].plan.num_held, *own.shape[1:]))
        return self._arriving[number]


@dataclass(frozen=True, slots=True)
class StartedWalk:
    """A forward whose first messages are on their way."""

    traffic: _Traffic
    kv_T2KH: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class RoundWalker:
    """Runs one group's rounds on one rank. Stateless between calls."""

    group: GroupProgram
    forward_rounds: tuple[BoundRound, ...]
    backward_rounds: tuple[BoundRound, ...]
    kernel: AttentionKernel
    wire: Exchange
    scale: float

    def start(self, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> StartedWalk:
        """Post the forward's first messages. Between other groups' ``start`` and ``forward``, ranks must agree on the
        order."""
        traffic = _Traffic(self.forward_rounds, self.wire, self._what)
        if len(self.forward_rounds) == 1:
            return StartedWalk(traffic, None)
        kv_T2KH = torch.stack((k_TKH.detach(), v_TKH.detach()), dim=1)
        traffic.post(0, kv_T2KH, None, None, None)
        return StartedWalk(traffic, kv_T2KH)

    def forward(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, started: StartedWalk | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of own queries over everything they may see: out ``[T, N, H]`` (q's dtype), lse ``[T, N]``.
        ``started``: by ``start`` with the same K and V, else it is now."""
        started = self.start(k_TKH, v_TKH) if started is None else started
        traffic, kv_T2KH = started.traffic, started.kv_T2KH
        result = _PartialResult(q_TNH)
        held = None
        for number, step in enumerate(self.forward_rounds):
            if kv_T2KH is not None and number:
                traffic.post(number, kv_T2KH, held, None, None)
            for call, pairs in step.pairs:
                keys, values = (held[:, 0], held[:, 1]) if call.held and held is not None else (k_TKH, v_TKH)
                result.add(pairs, *self.kernel.forward(q_TNH, keys, values, pairs, self.scale))
            traffic.finish(number)
            held = traffic.held(number + 1)
        return result.finish()

    def backward(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of own q, k and v. K/V are fetched again; partial dK/dV go home along the backward rounds."""
        rounds = self.backward_rounds
        traffic = _Traffic(rounds, self.wire, self._what)
        wide = accumulate_dtype(q_TNH.dtype)
        kv_T2KH = torch.stack((k_TKH, v_TKH), dim=1) if len(rounds) > 1 else None
        dq = torch.zeros_like(q_TNH, dtype=wide)
        dkv = torch.zeros((k_TKH.shape[0], 2, *k_TKH.shape[1:]), dtype=wide, device=k_TKH.device)
        held, leaving = None, None
        for number, step in enumerate(rounds):
            dheld = dkv.new_zeros((step.plan.num_held, *dkv.shape[1:]))
            if kv_T2KH is not None:
                traffic.post(number, kv_T2KH, held, dkv, leaving)
            for call, pairs in step.pairs:
                remote = call.held and held is not None
                keys, values = (held[:, 0], held[:, 1]) if remote and held is not None else (k_TKH, v_TKH)
                grads = self.kernel.backward(dout_TNH, q_TNH, keys, values, out_TNH, lse_TN, pairs, self.scale)
                _accumulate(dq, pairs.query_index, grads[0])
                _accumulate((dheld if remote else dkv)[:, 0], pairs.key_index, grads[1])
                _accumulate((dheld if remote else dkv)[:, 1], pairs.key_index, grads[2])
            for peer, buffer in traffic.finish(number):
                _add_rows(dheld if peer.held else dkv, peer, buffer)
            held, leaving = traffic.held(number + 1), dheld
        return dq.to(q_TNH.dtype), dkv[:, 0].to(k_TKH.dtype), dkv[:, 1].to(v_TKH.dtype)

    @property
    def _what(self) -> str:
        return f"{self.group.kind} attention of group {self.group.ranks}"


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
