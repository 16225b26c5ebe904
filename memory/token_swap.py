"""The policy executor of one microbatch: which layers put their activations away, when, and when they come back.

Two layers' activations are on the device at most, besides those of the layers that stay: while layer i computes, layer
i-1 is being written, and layer i+1 waits until that is done; in the backward the prefetch of layer i-1 runs while layer
i computes. These are MEMO's two rounding buffers as a bound on live blocks; fixed addresses are the allocator's matter.
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
"""Beside the layer that computes."""


class MicrobatchMemory:
    """Hands out a tape for each layer of one microbatch: one forward through ``num_layers`` layers, one backward.

    ``keeps_last``: the last layers' backward follows their forward at once, so they stay on the device (on a pipeline
    stage with stages behind it, it does not). ``timeline``: where its layers note their times, None: nowhere. Raises
    ValueError where the policy swaps and there is no tier.
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
        """For the layer at ``place`` (from 0). ``constants``: its parameters. Call in the order of the layers."""
        if self._timeline is not None:
            self._timeline.begin(f"forward {place}")
        if place >= self._num_put_away:
            return PlainTape()
        tape = LayerTape(self._policy, self._tier, constants, self._num_rows, self._timeline)
        self._tapes.append(tape)
        return tape

    def finish(self, place: int, output: torch.Tensor) -> None:
        """The forward of the layer at ``place`` is over and returned ``output``."""
        if not self._num_put_away:
            return
        if self._timeline is not None:
            self._timeline.end()
            self._timeline.subject = f"layer {place}"
        self._in_flight.append(self._tapes[place].finish() if place < self._num_put_away else ())
        self._settle(_LAYERS_IN_FLIGHT)
        if output.requires_grad:
            output.register_hook(lambda _: self._before_backward(place))

    def saved_bytes(self) -> tuple[dict[str, int], ...]:
        """By layer that puts its activations away: bytes its backward needs, by step."""
        return tuple(tape.saved_bytes() for tape in self._tapes)

    @property
    def recomputed_rows(self) -> int:
        """Rows that steps computed again so far, all layers."""
        return sum(tape.recomputed_rows for tape in self._tapes)

    @property
    def unsplit_bytes(self) -> int:
        return sum(tape.unsplit_bytes for tape in self._tapes)

    def _settle(self, most_in_flight: int) -> None:
        """Wait for the oldest copies out; their memory is free afterwards."""
        while len(self._in_flight) > most_in_flight:
            copies = self._in_flight.popleft()
            with waiting(self._timeline if copies else None, "for copies out"):
                for transfer, _ in copies:
                    transfer.wait()

    def _before_backward(self, place: int) -> None:
        if self._timeline is not None:
            self._timeline.begin(f"backward {place}")
        self._settle(0)
        for layer in (place, place - 1):
            if 0 <= layer < self._num_put_away:
                if self._timeline is not None:
                    self._timeline.subject = f"layer {layer}"
                self._tapes[layer].start_loads()
