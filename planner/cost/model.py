"""What a microbatch costs on a given machine for a given model: seconds and bytes, with where the numbers come from.

A group of ``degree`` ranks that runs sequences of s_1 .. s_n tokens takes, forward plus backward over all layers,

    seconds = s_per_token2 * sum(s_i^2) + s_per_token * sum(s_i) + s_per_sequence * n + fixed_s

with one set of coefficients per (attention kind, degree), communication included. This is FlexSP's model (arXiv
2412.01523, eq. 11-14) with the 1/degree folded into the coefficients, plus a per-sequence term that matters where a
kernel is launched once per document. There are no default coefficients: a CostModel is measured
(``trainer.prices.calibration``) or derived from data sheets (``planner.cost.data_sheet``), and says which.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from planner.codec import LATER
from planner.cost.chunk_fit import ChunkFit
from planner.cost.fits import ActivationFit, MemoryFit, Provenance, RemapFit, TimeFit
from planner.errors import PlanError, SpecError
from planner.plan import AttentionKind, MemoryPolicy, Sharding, digest_of

KEEP = MemoryPolicy()


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


