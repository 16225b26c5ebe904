"""Applies the activation policy to one microbatch: which layers swap or drop activations, when, and when to load them.

Besides the layers that are kept, at most two layers' activations are on the device. In the forward, layer i-1 is copied
out while layer i computes, and layer i+1 waits until that copy is done; in the backward, layer i-1 is prefetched while
layer i computes. This bounds live blocks as MEMO's two rounding buffers do; addresses are left to the allocator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from memory.policy import ActivationPolicy
from memory.tape import LayerTape, PlainTape, Tape
from memory.tiers import Tier, Transfer
from memory.timeline import Timeline, waiting

_LAYERS_IN_FLIGHT = 1
"""How many layers may still be copying out while the next layer computes."""


class MicrobatchMemory:
    """Provides a tape for each layer of one microbatch: one forward through ``num_layers`` layers, then one backward.

    ``keeps_last``: the last layers are kept on the device because their backward follows at once; False on a pipeline
    stage that is not the last. ``timeline``: where layers record their times (None: nowhere). Raises ValueError if the
    policy swaps and there is no tier.
    """

    def __init__(
        self, policy: ActivationPolicy, tier: Tier | None, *, num_layers: int, num_rows: int, keeps_last: bool = True,
        timeline: Timeline | None = None,
    ) -> None:
        if policy.swaps and tier is None:
            raise ValueError("a policy that swaps needs a tier")
        self._policy = policy
        self._tier = tier
        self._num_rows = num_rows
        last_kept = policy.num_kept_layers if keeps_last else 0
        self._num_put_away = 0 if policy.keeps_all or not num_rows else max(0, num_layers - last_kept)
        self._timeline = timeline if self._num_put_away else None
        self._tapes: list[LayerTape] = []
        self._in_flight: deque[tuple[tuple[Transfer, torch.Tensor], ...]] = deque()

    def tape(self, place: int, constants: Iterable[torch.Tensor]) -> Tape:
        """The tape for the layer at ``place`` (from 0). ``constants``: its parameters. Call it in layer order."""
        if self._timeline is not None:
            self._timeline.begin(f"forward {place}")
        if place >= self._num_put_away:
            return PlainTape()
        tape = LayerTape(self._policy, self._tier, constants, self._num_rows, self._timeline)
        self._tapes.append(tape)
        return tape

    def finish(self, place: int, output: torch.Tensor) -> None:
        """End the forward of the layer at ``place``, which returned ``output``."""
        if not self._num_put_away:
            return
        if self._timeline is not None:
            self._timeline.end()
            self._timeline.subject = f"layer {place}"
        self._in_flight.append(self._tapes[place].finish() if place < self._num_put_away else ())
        self._limit_in_flight(_LAYERS_IN_FLIGHT)
        if output.requires_grad:
            output.register_hook(lambda _: self._before_backward(place))

    def saved_bytes(self) -> tuple[dict[str, int], ...]:
        """Bytes that the backward needs, by step, for each layer that swaps or drops activations."""
        return tuple(tape.saved_bytes() for tape in self._tapes)

    @property
    def recomputed_rows(self) -> int:
        """Rows that steps recomputed so far, summed over all layers."""
        return sum(tape.recomputed_rows for tape in self._tapes)

    @property
    def unsplit_bytes(self) -> int:
        return sum(tape.unsplit_bytes for tape in self._tapes)

    def _limit_in_flight(self, most_in_flight: int) -> None:
        """Wait for the oldest copies out until at most ``most_in_flight`` layers are in flight; frees their memory."""
        while len(self._in_flight) > most_in_flight:
            copies = self._in_flight.popleft()
            with waiting(self._timeline if copies else None, "for copies out"):
                for transfer, _ in copies:
                    transfer.wait()

    def _before_backward(self, place: int) -> None:
        if self._timeline is not None:
            self._timeline.begin(f"backward {place}")
        self._limit_in_flight(0)
        for layer in (place, place - 1):
            if 0 <= layer < self._num_put_away:
                if self._timeline is not None:
                    self._timeline.subject = f"layer {layer}"
                self._tapes[layer].start_loads()
