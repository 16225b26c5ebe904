"""What a microbatch costs on a given machine for a given model: seconds and bytes, with where the numbers come from.

A group of ``degree`` ranks that runs sequences of s_1 .. s_n tokens takes, forward plus backward over all layers,

    seconds = s_per_token2 * sum(s_i^2) + s_per_token * sum(s_i) + s_per_sequence * n + fixed_s

with one set of coefficients per (attention kind, degree), communication included. This is FlexSP's model (arXiv
2412.01523, eq. 11-14) with the 1/degree folded into the coefficients, plus a per-sequence term that matters where a
kernel is launched once per document. There are no default coefficients: a CostModel is measured
(``trainer.calibration``) or derived from data sheets (``planner.analytic``), and says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from planner.chunk_fit import ChunkFit
from planner.codec import LATER
from planner.errors import PlanError, SpecError
from planner.plan import AttentionKind, MemoryAction, MemoryPolicy, Sharding, digest_of

KEEP = MemoryPolicy()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """All a planner knows about speed and memory. ``step_fixed_s``: parameter gather, gradient reduction and
    optimizer, once a step whatever the plan. ``sharding``: what fixed bytes and fixed seconds were priced for.
    ``activation``: None where swapping and recomputing activations are not priced, ``chunks``: where running chunk by
    chunk is not. ``remap``: None where tokens cannot be moved for the token-wise layers. Raises SpecError where
    activations free more than a token takes, or a token's work outside attention takes longer than all of it.

    ``num_stages``: pipeline stages that all of this was priced for, evenly: seconds and bytes are those of one of them,
    and its peak counts as many microbatches between forward and backward as there are stages. Raises SpecError for
    stages together with zero3 or ``chunks``: neither is priced so."""

    times: tuple[TimeFit, ...]
    memory: MemoryFit
    step_fixed_s: float
    peak_flop_per_s: float
    provenance: Provenance
    sharding: Sharding = Sharding.GATHER_ONCE
    activation: ActivationFit | None = field(default=None, metadata=LATER)
    remap: RemapFit | None = field(default=None, metadata=LATER)
    num_stages: int = field(default=1, metadata=LATER)
    chunks: ChunkFit | None = field(default=None, metadata=LATER)
    _digest: str = field(default="", init=False, repr=False, compare=False)
    _fits: dict[tuple[AttentionKind, int], TimeFit] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for time in reversed(self.times):
            self._fits[time.kind, time.degree] = time  # the first of equal ones counts
        if self.num_stages < 1:
            raise SpecError(f"num_stages must be at least 1, got {self.num_stages}")
        if self.num_stages > 1 and (self.sharding is Sharding.ZERO3 or self.chunks is not None):
            what = f"sharding {self.sharding}" if self.chunks is None else "running in chunks"
            raise SpecError(f"num_stages {self.num_stages}: {what} is not priced with pipeline stages")
        fit = self.activation
        if fit and max(fit.swap_bytes_per_token, fit.recompute_bytes_per_token) > self.memory.bytes_per_token:
            raise SpecError("activations: a token cannot free more than memory.bytes_per_token")
        linear_s = self.remap.linear_s_per_token if self.remap else 0.0
        for time in self.times if linear_s > 0 else ():
            if linear_s > time.degree * time.s_per_token * (1 + 1e-9):
                raise SpecError(f"remap: linear_s_per_token is above all of {time.kind} {time.degree}'s s_per_token")

    @property
    def runs_free(self) -> bool:
        """Whether a microbatch waits for nobody but its own ranks: neither lockstep nor pipeline stages."""
        return self.sharding is not Sharding.ZERO3 and self.num_stages == 1

    @property
    def prices_policies(self) -> bool:
        """Whether anything but keeping all activations is priced."""
        return self.activation is not None or self.chunks is not None

    @property
    def digest(self) -> str:
        if not self._digest:  # asked for in every step, and takes milliseconds
            object.__setattr__(self, "_digest", digest_of(self))
        return self._digest

    def degrees(self, kind: AttentionKind) -> tuple[int, ...]:
        """The degrees this model can price for ``kind``, ascending."""
        return tuple(sorted(fit.degree for fit in self.times if fit.kind is kind))

    def find_fit(self, kind: AttentionKind, degree: int) -> TimeFit | None:
        """``time_fit``, or None where there is none."""
        return self._fits.get((kind, degree))

    def time_fit(self, kind: AttentionKind, degree: int) -> TimeFit:
        """Raises PlanError where the cost model has no such (kind, degree)."""
        fit = self.find_fit(kind, degree)
        if fit is not None:
            return fit
        raise PlanError(f"cost model has no {kind} of degree {degree} (it has {self.degrees(kind)})")

    def group_s(self, kind: AttentionKind, degree: int, lengths: Iterable[int]) -> float:
        """Predicted seconds of one microbatch with one group over sequences of these lengths (tokens)."""
        sizes = tuple(lengths)
        return self.time_fit(kind, degree).group_s(
            num_tokens=sum(sizes), num_tokens2=sum(size * size for size in sizes), num_sequences=len(sizes)
        )

    def policy_fit(self, kind: AttentionKind, degree: int, policy: MemoryPolicy) -> TimeFit:
        """``time_fit`` for a microbatch that may run in chunks. What swapping and recomputing take is not in it. Raises
        PlanError where it is not priced."""
        fit = self.time_fit(kind, degree)
        return self._chunks(policy).time_fit(fit, policy.chunk_tokens) if policy.chunk_tokens else fit

    def token_bytes(self, policy: MemoryPolicy = KEEP) -> float:
        """Bytes on the device per token it holds, of a microbatch that runs whole. Raises PlanError where the policy is
        not priced."""
        if policy.is_keep:
            return self.memory.bytes_per_token
        fit = self._activation(policy)
        freed = policy.swap_fraction * fit.swap_bytes_per_token
        freed += policy.recompute_fraction * fit.recompute_bytes_per_token
        return self.memory.bytes_per_token - freed

    def held_bytes(
        self, num_local_tokens: int, policy: MemoryPolicy = KEEP, kind: AttentionKind = AttentionKind.LOCAL,
        degree: int = 1,
    ) -> float:
        """Most bytes of a microbatch on a device that holds this many tokens of it; ``kind`` and ``degree`` of its
        group matter in chunks only. Raises PlanError where the policy is not priced."""
        if not policy.chunk_tokens:
            return self.token_bytes(policy) * num_local_tokens
        fit, chunk_tokens = self._chunks(policy), min(policy.chunk_tokens, num_local_tokens)
        return fit.chunk_bytes(kind, degree, chunk_tokens) + fit.kept_bytes_per_token(kind, degree) * num_local_tokens

    def device_bytes(
        self, num_local_tokens: int, policy: MemoryPolicy = KEEP, kind: AttentionKind = AttentionKind.LOCAL,
        degree: int = 1,
    ) -> int:
        """Peak bytes of a device that holds this many tokens of its largest microbatch, run under this policy in such
        a group."""
        held_bytes = int(self.memory.fixed_bytes + self.held_bytes(num_local_tokens, policy, kind, degree))
        return max(held_bytes, self.memory.update_bytes)

    def host_bytes(self, num_local_tokens: int, policy: MemoryPolicy = KEEP) -> int:
        """Bytes on the host of one device that holds this many tokens of a microbatch under this policy."""
        if policy.swap_fraction == 0:
            return 0
        return int(policy.swap_fraction * self._activation(policy).copied_bytes_per_token * num_local_tokens)

    def recompute_s(self, num_local_tokens: float, policy: MemoryPolicy) -> float:
        """Seconds that recomputing adds to a microbatch on a rank that holds this many tokens of it."""
        if policy.recompute_fraction == 0:
            return 0.0
        return policy.recompute_fraction * self._activation(policy).recompute_s_per_token * num_local_tokens

    def exposed_copy_s(self, num_local_tokens: float, busy_s: float, policy: MemoryPolicy) -> float:
        """Seconds by which the copy to the host outlasts its share of ``busy_s``, a microbatch without recomputing."""
        if policy.swap_fraction == 0:
            return 0.0
        fit = self._activation(policy)
        copy_s = policy.swap_fraction * fit.copied_bytes_per_token * num_local_tokens / fit.copy_bytes_per_s
        return max(0.0, copy_s - fit.hidden_share * busy_s)

    def _activation(self, policy: MemoryPolicy) -> ActivationFit:
        if self.activation is None:
            raise PlanError(f"cost model prices neither swapping nor recomputing activations: {policy}")
        return self.activation

    def _chunks(self, policy: MemoryPolicy) -> ChunkFit:
        if self.chunks is None:
            raise PlanError(f"cost model does not price chunks of {policy.chunk_tokens} tokens")
        return self.chunks

    def max_local_tokens(self, budget_bytes: int) -> int:
        """The most tokens of one microbatch that a device with this budget can hold (0 if the fixed part is over): of
        several stages the first one, which holds as many such microbatches at once."""
        spare = budget_bytes - self.memory.fixed_bytes
        if budget_bytes < self.memory.update_bytes:
            return 0
        if spare < 0 or self.memory.bytes_per_token <= 0:
            return 0 if spare < 0 else 2**62 // self.num_stages
        tokens = int(spare / self.memory.bytes_per_token) + 1  # device_bytes cuts fractions off: one more may fit
        while tokens > 0 and self.device_bytes(tokens) > budget_bytes:
            tokens -= 1
        return tokens // self.num_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """What a plan may use, and how long a solver may look for it.

    ``device_budget_bytes``: peak bytes allowed per device. ``max_ulysses_degree``: query heads per tensor rank.
    ``kinds``: attention kinds allowed for groups of two and more. Solver work is counted in nodes
    (``max_nodes``), so the same inputs give the same plan; ``time_limit_s`` only guards. ``num_buckets`` (Q) and
    ``num_round_trials`` (M') are FlexSP's 16 and 5. ``devices_per_node``: consecutive data ranks that share a node
    (None: all of them). ``policies``: what may happen to saved activations; keeping them always may. A device may have
    ``host_budget_bytes`` of its node's memory for what it swaps.
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
