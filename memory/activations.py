"""The run's memory policy, the tier it swaps to and that tier's accounts, the arena it allocates from."""

from __future__ import annotations

from dataclasses import dataclass, field

from memory.arena import AddressArena
from memory.ledger import MemoryLedger
from memory.policy import KEEP_ALL, ActivationPolicy
from memory.tiers import Tier
from memory.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationMemory:
    """``policy`` holds for every microbatch whose plan does not say otherwise; ``tier_bytes_per_token``: what it puts
    into the tier for a token that a rank holds. ``kept_layers``: last layers of the model that stay whole in
    microbatches whose plan swaps or recomputes (None: as few as possible). ``ledger``: where the tier reserves.
    ``note``: one line for the log. ``arena``: planned addresses (None: torch's own allocator). ``timeline``: where
    layers and copies note their times while ``record`` says so.
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
        """From now on, or no longer, layers and copies note their times."""
        self.timeline.is_on = on
        if self.tier is not None:
            self.tier.timeline = self.timeline if on else None

    @property
    def recorder(self) -> Timeline | None:
        """Where to note times now; None: nowhere."""
        return self.timeline if self.timeline.is_on else None

    def restart_peak(self) -> None:
        """Count the tier's peak anew."""
        if self.tier is not None:
            self.ledger.restart_peak(self.tier.name)

    @property
    def peak_tier_bytes(self) -> int:
        """Most bytes in the tier since ``restart_peak``, padding of its places included."""
        return 0 if self.tier is None else self.ledger.peak_bytes(self.tier.name)

    def close(self) -> None:
        if self.tier is not None:
            self.tier.close()
