"""Coefficients of a cost model: seconds and bytes of groups, activations and moved tokens, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from planner.codec import LATER
from planner.errors import SpecError
from planner.plan import AttentionKind


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeFit:
    """Coefficients of one (kind, degree). All are seconds for one forward plus backward of one microbatch, and none
    may be negative: the planner's bounds rest on more work never being cheaper. Raises SpecError otherwise.

    ``inner_degree``: what was priced, and so what plans of this cost model run (see ``AttentionGroup``)."""

    kind: AttentionKind
    degree: int
    s_per_token2: float
    s_per_token: float
    s_per_sequence: float
    fixed_s: float
    inner_degree: int = field(default=1, metadata=LATER)

    def __post_init__(self) -> None:
        for name in ("s_per_token2", "s_per_token", "s_per_sequence", "fixed_s"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                which = f"{self.kind} of degree {self.degree}"
                raise SpecError(f"{which}: {name} must be 0 or more and finite, got {value}")
        if self.degree < 1 or self.inner_degree < 1 or self.degree % self.inner_degree:
            raise SpecError(f"{self.kind} of degree {self.degree}: inner_degree {self.inner_degree} does not divide it")

    def marginal_s(self, *, num_tokens: float, num_tokens2: float, num_sequences: int) -> float:
        """Seconds for sequences with these sums of lengths and of squared lengths, without the fixed part."""
        return self.s_per_token2 * num_tokens2 + self.s_per_token * num_tokens + self.s_per_sequence * num_sequences

    def sequence_s(self, num_tokens: float) -> float:
        """Seconds that one sequence of so many tokens adds to a group, without the fixed part."""
        return self.s_per_token2 * num_tokens**2 + self.s_per_token * num_tokens + self.s_per_sequence

    def longest_within(self, seconds: float, credit_s_per_token: float = 0.0) -> float:
        """The most tokens (not rounded) of one sequence that adds at most so many seconds, and so many more for each of
        its tokens; 0 where none does, infinite where there is no most. The root of ``sequence_s``, written so that it
        does not cancel."""
        spare_s, slope = seconds - self.s_per_sequence, self.s_per_token - credit_s_per_token
        square = slope**2 + 4 * self.s_per_token2 * spare_s
        if square < 0 or (slope >= 0 and spare_s <= 0):
            return 0.0
        root = math.sqrt(square) + abs(slope)
        if slope < 0:
            return root / (2 * self.s_per_token2) if self.s_per_token2 > 0 else math.inf
        return 2 * spare_s / root if root > 0 else math.inf

    def adds_at_most(self, other: TimeFit, *, times: int = 1) -> bool:
        """Whether any sequence adds no more seconds here than ``times`` those that it adds there."""
        return (
            self.s_per_token2 <= times * other.s_per_token2
            and self.s_per_token <= times * other.s_per_token
            and self.s_per_sequence <= times * other.s_per_sequence
        )

    @property
    def prices(self) -> tuple[float, float, float, float]:
        """Per squared token, per token, per sequence, fixed."""
        return self.s_per_token2, self.s_per_token, self.s_per_sequence, self.fixed_s

    def with_prices(self, prices: Sequence[float]) -> TimeFit:
        """The fit with these prices, in the order of ``prices``."""
        token2, token, sequence, fixed = prices
        return replace(self, s_per_token2=token2, s_per_token=token, s_per_sequence=sequence, fixed_s=fixed)

    def group_s(self, *, num_tokens: float, num_tokens2: float, num_sequences: int) -> float:
        """Seconds of a microbatch of one group over such sequences."""
        return self.fixed_s + self.marginal_s(
            num_tokens=num_tokens, num_tokens2=num_tokens2, num_sequences=num_sequences
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """Bytes on one device: ``fixed_bytes`` whatever the plan (weights, gradients, optimizer, runtime), and
    ``bytes_per_token`` for each token of a microbatch that the device holds (saved activations and workspace).
    ``update_bytes``: what the end of a step takes (reduction and update, when no activations are held), 0 where that is
    never more: the peak is the higher of the two."""

    fixed_bytes: int
    bytes_per_token: float
    update_bytes: int = field(default=0, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationFit:
    """What a device may do with saved activations other than keep them, per token that it holds of a microbatch.

    ``swap_bytes_per_token``: bytes that leave the device, and lie on the host, for a token swapped (all layers but the
    two in use). ``recompute_bytes_per_token``: bytes freed for a token recomputed, in ``recompute_s_per_token``;
    attention is never computed again, so layer inputs and attention outputs stay. ``copy_bytes_per_s``: one way, device
    to host. ``hidden_share``: share of a microbatch's seconds that the copy may take without being seen. It is the
    forward's: there the copy out must end, and the backward, which brings it back, is longer. ``host_bytes_per_byte``:
    on the host for a byte that is counted as freed: above 1 with pipeline stages, where all layers are copied, and the
    two in use stand for each microbatch in flight. Raises SpecError.
    """

    swap_bytes_per_token: float
    recompute_bytes_per_token: float
    recompute_s_per_token: float
    copy_bytes_per_s: float
    hidden_share: float
    host_bytes_per_byte: float = field(default=1.0, metadata=LATER)

    def __post_init__(self) -> None:
        for name in ("swap_bytes_per_token", "recompute_bytes_per_token", "recompute_s_per_token"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SpecError(f"activations: {name} must be 0 or more and finite, got {getattr(self, name)}")
        if not 0 < self.copy_bytes_per_s < math.inf:
            raise SpecError(f"activations: copy_bytes_per_s must be above 0, got {self.copy_bytes_per_s}")
        if not 0 <= self.hidden_share <= 1:
            raise SpecError(f"activations: hidden_share must be in 0 .. 1, got {self.hidden_share}")
        if not 1 <= self.host_bytes_per_byte < math.inf:
            raise SpecError(f"activations: host_bytes_per_byte must be 1 or more, got {self.host_bytes_per_byte}")

    @property
    def copied_bytes_per_token(self) -> float:
        """Bytes that a swapped token takes on the host, and that are copied there and back."""
        return self.swap_bytes_per_token * self.host_bytes_per_byte

    def hidden_fraction(self, fit: TimeFit) -> tuple[float, float]:
        """The share r(s) of a sequence's tokens whose copy hides under the forward of a group of this fit, as (r(0),
        slope) of a line in its s tokens, before any cap:

            r(s) = degree * hidden_share * copy_bytes_per_s / copied_bytes_per_token * (s_per_token2 * s + s_per_token)

        The overlap condition of ByteScale (arXiv 2502.21231, eq. 3) and MEMO (arXiv 2407.12117), for each sequence."""
        per_s = fit.degree * self.hidden_share * self.copy_bytes_per_s / self.copied_bytes_per_token
        return per_s * fit.s_per_token, per_s * fit.s_per_token2


@dataclass(frozen=True, slots=True, kw_only=True)
class RemapFit:
    """What a token costs outside attention, and what it costs to have that done elsewhere: seconds of one forward plus
    backward of one microbatch, all layers.

    ``linear_s_per_token``: token-wise work on one rank, for a token it holds; with a group's degree divided out it is a
    part of the ``s_per_token`` of every TimeFit. A moved token takes ``intra_s_per_token`` or, between nodes of
    ``node_size`` consecutive data ranks, ``inter_s_per_token`` at both of its ranks; a rank with any move takes
    ``fixed_s`` as well, for latency. Raises SpecError where one of them is below 0, or a node has no rank."""

    linear_s_per_token: float
    intra_s_per_token: float
    inter_s_per_token: float
    fixed_s: float
    node_size: int

    def __post_init__(self) -> None:
        for name in ("linear_s_per_token", "intra_s_per_token", "inter_s_per_token", "fixed_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SpecError(f"remap: {name} must be 0 or more and finite, got {getattr(self, name)}")
        if self.node_size < 1:
            raise SpecError(f"remap: a node needs at least 1 data rank, got {self.node_size}")

    def move_s(self, source: int, destination: int, num_tokens: int) -> float:
        """Seconds of one move at each of its two ranks, latency left out."""
        inside = source // self.node_size == destination // self.node_size
        return num_tokens * (self.intra_s_per_token if inside else self.inter_s_per_token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the numbers come from. ``source`` is ``measured`` or ``derived``; errors are relative, of the fit."""

    source: str
    cluster: str
    model: str
    measured_on: str = ""
    torch_version: str = ""
    num_samples: int = 0
    mean_relative_error: float = 0.0
    max_relative_error: float = 0.0
    notes: tuple[str, ...] = ()
