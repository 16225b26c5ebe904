"""The run's memory policy, the tier it swaps to and the arena it allocates from."""

from __future__ import annotations

from dataclasses import dataclass

from memory.arena import AddressArena
from memory.policy import KEEP_ALL, ActivationPolicy
from memory.tiers import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationMemory:
    """``policy`` holds for every microbatch whose plan does not say otherwise. ``note``: one line for the log.
    ``arena``: planned addresses (None: torch's own allocator)."""

    policy: ActivationPolicy = KEEP_ALL
    tier: Tier | None = None
    note: str = ""
    arena: AddressArena | None = None

    def close(self) -> None:
        if self.tier is not None:
            self.tier.close()
