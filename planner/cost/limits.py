"""What a plan may use of the machine and of a solver's time."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import SpecError
from planner.plan import AttentionKind, MemoryAction


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """What a plan may use, and how long a solver may look for it.

    - ``device_budget_bytes``: peak bytes allowed per device.
    - ``max_ulysses_degree``: query heads per tensor rank.
    - ``kinds``: attention kinds allowed for groups of two and more ranks.
    - ``max_nodes``: the solver's work is limited by its nodes, so that the same inputs give the same plan;
      ``time_limit_s`` is only a guard. ``relative_gap``: a plan this close to its bound counts as proven.
    - ``num_buckets`` and ``num_round_trials``: FlexSP's Q = 16 and M' = 5.
    - ``devices_per_node``: consecutive data ranks that share a node (None: all ranks).
    - ``policies``: what may be done with saved activations. Keeping them is always allowed.
    - ``host_budget_bytes``: bytes of its node's memory that a device may use for what it swaps.
    """

    device_budget_bytes: int
    max_ulysses_degree: int
    kinds: tuple[AttentionKind, ...] = (AttentionKind.ULYSSES,)
    max_nodes: int = 2000
    time_limit_s: float = 10.0
    relative_gap: float = 0.02
    num_buckets: int = 16
    num_round_trials: int = 5
    devices_per_node: int | None = None
    policies: tuple[MemoryAction, ...] = (MemoryAction.KEEP,)
    host_budget_bytes: int = 0

    def allows(self, action: MemoryAction) -> bool:
        return action is MemoryAction.KEEP or action in self.policies

    def node_size(self, num_ranks: int) -> int:
        """Data ranks of a full node, at most ``num_ranks``. Raises SpecError where ``devices_per_node`` is below 1."""
        if self.devices_per_node is None:
            return num_ranks
        if self.devices_per_node < 1:
            raise SpecError(f"devices_per_node must be at least 1, got {self.devices_per_node}")
        return min(self.devices_per_node, num_ranks)
