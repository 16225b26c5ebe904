"""This process's ranks within the run, as ``launch.environment`` reads them from the environment."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnv:
    """One process of a run: ``rank`` of ``world_size`` overall, ``local_rank`` of ``local_world_size`` on its node.

    ``restart_count``: how often the launcher has restarted the group before.
    Raises SpecError if the values contradict each other.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int = 0
    restart_count: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise SpecError(f"rank {self.rank} does not exist in a world of {self.world_size}")
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise SpecError(
                f"local rank {self.local_rank} of {self.local_world_size} does not fit a world of {self.world_size}"
            )

    @property
    def is_single_node(self) -> bool:
        return self.local_world_size == self.world_size
