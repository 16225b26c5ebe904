"""Hardware: devices, hosts and links. Data files are in ``planner/inputs/hardware``; every number names its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.errors import SpecError


def _require_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise SpecError(f"{owner}: {name} must be a positive number, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One direction of one device's link. ``source``: where the numbers come from; 'guess' is shown to the user."""

    bytes_per_s: float
    latency_s: float
    source: str

    def __post_init__(self) -> None:
        _require_positive("link", bytes_per_s=self.bytes_per_s)
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise SpecError(f"link: latency_s must be 0 or more seconds, got {self.latency_s}")

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds for one message of this size (latency plus bytes over bandwidth)."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One accelerator (or one CPU process). ``reserved_bytes``: context, communicators and allocator slack.

    Efficiencies are the fractions of ``peak_flop_per_s`` (dense, training dtype) that large matrix products and flash
    attention reach.
    """

    name: str
    memory_bytes: int
    reserved_bytes: int
    memory_bytes_per_s: float
    peak_flop_per_s: float
    linear_efficiency: float
    attention_efficiency: float
    source: str

    def __post_init__(self) -> None:
        _require_positive(
            f"device {self.name}", memory_bytes_per_s=self.memory_bytes_per_s, peak_flop_per_s=self.peak_flop_per_s
        )
        if self.memory_bytes <= self.reserved_bytes:
            raise SpecError(f"device {self.name}: memory_bytes must exceed reserved_bytes")
        for name in ("linear_efficiency", "attention_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise SpecError(f"device {self.name}: {name} must be in (0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """One node's host: memory and the rate of one device's copies when all devices copy at once."""

    memory_bytes: int
    copy_bytes_per_s: float
    source: str

    def __post_init__(self) -> None:
        _require_positive("host", memory_bytes=self.memory_bytes, copy_bytes_per_s=self.copy_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """``num_nodes`` equal nodes of ``devices_per_node`` devices."""

    name: str
    num_nodes: int
    devices_per_node: int
    nics_per_node: int
    device: DeviceSpec
    host: HostSpec
    intra_node: LinkSpec
    inter_node: LinkSpec

    def __post_init__(self) -> None:
        for name in ("num_nodes", "devices_per_node", "nics_per_node"):
            if getattr(self, name) < 1:
                raise SpecError(f"cluster {self.name}: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.devices_per_node

    def node_of(self, rank: int) -> int:
        """The node of a rank: ranks fill nodes in order, as torchrun numbers them."""
        return rank // self.devices_per_node
