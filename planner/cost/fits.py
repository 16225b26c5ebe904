"""Coefficients of a cost model: groups, memory, activations, moved tokens, and where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from planner.codec import LATER
from planner.errors import SpecError
from planner.plan import AttentionKind


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeFit:
    """Coefficients of one (kind, degree), in seconds for one forward plus backward of one microbatch.

    ``inner_degree`` (see ``AttentionGroup``) is the one that was priced, and so the one that plans of this cost model
    run. Raises SpecError where a coefficient is negative (the planner's lower bounds rely on more work never being
    cheaper) or not finite, or where ``inner_degree`` does not divide ``degree``."""

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
        """Seconds that sequences with these sums of lengths (tokens) and of squared lengths take, fixed part left
        out."""
        return self.s_per_token2 * num_tokens2 + self.s_per_token * num_tokens + self.s_per_sequence * num_sequences

    def sequence_s(self, num_tokens: float) -> float:
        """Seconds that one sequence of ``num_tokens`` tokens adds to a group, fixed part left out."""
        return self.s_per_token2 * num_tokens**2 + self.s_per_token * num_tokens + self.s_per_sequence

    def adds_at_most(self, other: TimeFit, *, times: int = 1) -> bool:
        """Whether every sequence adds at most ``times`` the seconds here that it adds to ``other``."""
        return (
            self.s_per_token2 <= times * other.s_per_token2
            and self.s_per_token <= times * other.s_per_token
            and self.s_per_sequence <= times * other.s_per_sequence
        )

    @property
    def prices(self) -> tuple[float, float, float, float]:
        """Seconds per squared token, per token, per sequence, and fixed."""
        return self.s_per_token2, self.s_per_token, self.s_per_sequence, self.fixed_s

    def with_prices(self, prices: Sequence[float]) -> TimeFit:
        """This fit with other prices, in the order of ``prices``."""
        token2, token, sequence, fixed = prices
        return replace(self, s_per_token2=token2, s_per_token=token, s_per_sequence=sequence, fixed_s=fixed)

    def group_s(self, *, num_tokens: float, num_tokens2: float, num_sequences: int) -> float:
        """Seconds of a microbatch of one group over sequences with these sums, fixed part included."""
        return self.fixed_s + self.marginal_s(
            num_tokens=num_tokens, num_tokens2=num_tokens2, num_sequences=num_sequences
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """Bytes on one device.

    ``fixed_bytes`` are there whatever the plan (weights, gradients, optimizer, runtime). Each token of a microbatch
    that the device holds adds ``bytes_per_token`` (saved activations and workspace). ``update_bytes`` is the peak of
    reduction and update at the end of a step, when no activations are held; 0 where it is never the higher one. A
    step's peak is the higher of the two."""

    fixed_bytes: int
    bytes_per_token: float
    update_bytes: int = field(default=0, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationFit:
    """What a device can do with saved activations instead of keeping them, per token of a microbatch that it holds.

    - ``swap_bytes_per_token``: bytes freed on the device by swapping a token to the host (all layers but two).
    - ``recompute_bytes_per_token``, ``recompute_s_per_token``: bytes freed by recomputing a token, and the seconds it
      takes. Attention is never recomputed, so layer inputs and attention outputs stay.
    - ``copy_bytes_per_s``: bandwidth from device to host, one way.
    - ``hidden_share``: the share of a microbatch's seconds under which the copy hides. It is the forward's share: the
      copy out has to end with the forward, and the backward, which copies back, is longer.
    - ``host_bytes_per_byte``: bytes on the host for each byte freed. It is above 1 with pipeline stages: they copy all
      layers, but two of them stay on the device for each microbatch in flight.

    Raises SpecError where a number is out of its range.
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
        """Bytes on the host for a swapped token; as many are copied each way."""
        return self.swap_bytes_per_token * self.host_bytes_per_byte

    def hidden_fraction(self, fit: TimeFit) -> tuple[float, float]:
        """The fraction r(s) of a sequence's s tokens whose copy hides under the forward of a group of this fit.

            r(s) = degree * hidden_share * copy_bytes_per_s / copied_bytes_per_token * (s_per_token2 * s + s_per_token)

        Returned is (r(0), slope) of this line, before any cap. It is the overlap condition of ByteScale (arXiv
        2502.21231, eq. 3) and MEMO (arXiv 2407.12117) for a single sequence."""
        per_s = fit.degree * self.hidden_share * self.copy_bytes_per_s / self.copied_bytes_per_token
        return per_s * fit.s_per_token, per_s * fit.s_per_token2


@dataclass(frozen=True, slots=True, kw_only=True)
class RemapFit:
    """Seconds of token-wise work and of moving it to another rank: forward plus backward of a microbatch, all layers.

    ``linear_s_per_token``: token-wise work for a token that a rank holds. Divided by a group's degree it is a part of
    the ``s_per_token`` of every TimeFit. A moved token costs ``intra_s_per_token`` at both of its ranks, or
    ``inter_s_per_token`` between nodes (of ``node_size`` consecutive data ranks). A rank with any move pays ``fixed_s``
    for latency as well. Raises SpecError where one of them is negative or not finite, or a node has no rank."""

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
    """Where the numbers come from. ``source`` is ``measured`` or ``derived``; errors are the fit's, relative."""

    source: str
    cluster: str
    model: str
    measured_on: str = ""
    torch_version: str = ""
    num_samples: int = 0
    mean_relative_error: float = 0.0
    max_relative_error: float = 0.0
    notes: tuple[str, ...] = ()
