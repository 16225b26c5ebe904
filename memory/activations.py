"""The run's activation memory: its policy, the tier it swaps to with that tier's ledger, and its allocator."""

from __future__ import annotations

from dataclasses import dataclass, field

from memory.arena import AddressArena
from memory.ledger import MemoryLedger
from memory.policy import KEEP_ALL, ActivationPolicy
from memory.tiers import Tier
from memory.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationMemory:
    """What a run uses to keep, swap or recompute activations.

    ``policy``: for every microbatch whose plan names no other. ``tier_bytes_per_token``: bytes that this policy swaps
    per token of a rank. ``kept_layers``: last layers of the model that are kept whole in microbatches whose plan swaps
    or recomputes (None: as few as possible). ``ledger``: where the tier reserves its bytes. ``note``: one line for the
    log. ``arena``: allocator with planned addresses (None: torch's own). ``timeline``: where the times of layers and
    copies are recorded while ``record(True)`` holds.
    """

    policy: ActivationPolicy = KEEP_ALL
    tier_bytes_per_token: float = 0.0
    kept_layers: int | None = None
    tier: Tier | None = None
    ledger: MemoryLedger = field(default_factory=lambda: MemoryLedger({}))
    note: str = ""
    arena: AddressArena | None = None
    timeline: Timeline = field(default_factory=Timeline)

    def record(self, on: bool) -> None:
        """Start or stop recording the times of layers and copies."""
        self.timeline.is_on = on
        if self.tier is not None:
            self.tier.timeline = self.timeline if on else None

    @property
    def recorder(self) -> Timeline | None:
        """The timeline while times are recorded, else None."""
        return self.timeline if self.timeline.is_on else None

    def restart_peak(self) -> None:
        """Start a new peak of the tier's bytes."""
        if self.tier is not None:
            self.ledger.restart_peak(self.tier.name)

    @property
    def peak_tier_bytes(self) -> int:
        """Most bytes in the tier since ``restart_peak``, including alignment padding."""
        return 0 if self.tier is None else self.ledger.peak_bytes(self.tier.name)

    def close(self) -> None:
        if self.tier is not None:
            self.tier.close()
