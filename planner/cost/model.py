"""What a microbatch costs on a given machine for a given model, in seconds and bytes, and where the numbers come from.

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
    """All that a planner knows about speed and memory.

    - ``step_fixed_s``: parameter gather, gradient reduction and optimizer, once a step whatever the plan.
    - ``sharding``: the mode for which fixed bytes and fixed seconds were priced.
    - ``activation``: None where swapping and recomputing activations are not priced.
    - ``chunks``: None where running chunk by chunk is not priced.
    - ``remap``: None where moving tokens for the token-wise layers is not priced.
    - ``num_stages``: pipeline stages, priced alike. All seconds and bytes are those of one stage; its peak counts as
      many microbatches in flight as there are stages.

    Raises SpecError where activations free more bytes than a token takes, where the token-wise work of a token takes
    longer than all its linear work, and for stages together with zero3 or ``chunks``, which are not priced."""

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
            self._fits[time.kind, time.degree] = time  # reversed, so that the first of several equal ones counts
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
        """Whether a microbatch waits for its own ranks only: there is neither lockstep nor a pipeline."""
        return self.sharding is not Sharding.ZERO3 and self.num_stages == 1

    @property
    def prices_policies(self) -> bool:
        """Whether any memory policy but keeping all activations is priced."""
        return self.activation is not None or self.chunks is not None

    @property
    def digest(self) -> str:
        if not self._digest:  # kept, because it takes milliseconds and every step asks for it
            object.__setattr__(self, "_digest", digest_of(self))
        return self._digest

    def degrees(self, kind: AttentionKind) -> tuple[int, ...]:
        """The degrees priced for ``kind``, ascending."""
        return tuple(sorted(fit.degree for fit in self.times if fit.kind is kind))

    def find_fit(self, kind: AttentionKind, degree: int) -> TimeFit | None:
        """The coefficients of this kind and degree, or None where they are not priced."""
        return self._fits.get((kind, degree))

    def time_fit(self, kind: AttentionKind, degree: int) -> TimeFit:
        """The coefficients of this kind and degree. Raises PlanError where they are not priced."""
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
        """``time_fit``, with the prices of chunks where the policy runs in chunks; swapping and recomputing are not
        included. Raises PlanError where it is not priced."""
        fit = self.time_fit(kind, degree)
        return self._chunks(policy).time_fit(fit, policy.chunk_tokens) if policy.chunk_tokens else fit

    def token_bytes(self, policy: MemoryPolicy = KEEP) -> float:
        """Bytes on the device per token that it holds of a microbatch that does not run in chunks. Raises PlanError
        where the policy is not priced."""
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
        """Peak bytes of a microbatch on a device that holds this many of its tokens. ``kind`` and ``degree`` of its
        group only matter in chunks. Raises PlanError where the policy is not priced."""
        if not policy.chunk_tokens:
            return self.token_bytes(policy) * num_local_tokens
        fit, chunk_tokens = self._chunks(policy), min(policy.chunk_tokens, num_local_tokens)
        return fit.chunk_bytes(kind, degree, chunk_tokens) + fit.kept_bytes_per_token(kind, degree) * num_local_tokens

    def device_bytes(
        self, num_local_tokens: int, policy: MemoryPolicy = KEEP, kind: AttentionKind = AttentionKind.LOCAL,
        degree: int = 1,
    ) -> int:
        """Peak bytes of a device, everything included, that holds this many tokens of its largest microbatch, run under
        this policy in a group of this kind and degree."""
        held_bytes = int(self.memory.fixed_bytes + self.held_bytes(num_local_tokens, policy, kind, degree))
        return max(held_bytes, self.memory.update_bytes)

    def host_bytes(self, num_local_tokens: int, policy: MemoryPolicy = KEEP) -> int:
        """Bytes that a device with this many tokens of a microbatch swaps to its host under this policy."""
        if policy.swap_fraction == 0:
            return 0
        return int(policy.swap_fraction * self._activation(policy).copied_bytes_per_token * num_local_tokens)

    def recompute_s(self, num_local_tokens: float, policy: MemoryPolicy) -> float:
        """Seconds that recomputing adds on a rank that holds this many tokens of a microbatch."""
        if policy.recompute_fraction == 0:
            return 0.0
        return policy.recompute_fraction * self._activation(policy).recompute_s_per_token * num_local_tokens

    def exposed_copy_s(self, num_local_tokens: float, busy_s: float, policy: MemoryPolicy) -> float:
        """Seconds of the copy to the host that do not hide under the microbatch, which takes ``busy_s`` seconds without
        recomputing."""
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
        """The most tokens of one microbatch that a device with this budget can hold; 0 where the fixed part alone
        exceeds it. With pipeline stages it is the first stage's device, which holds one such microbatch per stage."""
        spare = budget_bytes - self.memory.fixed_bytes
        if budget_bytes < self.memory.update_bytes:
            return 0
        if spare < 0 or self.memory.bytes_per_token <= 0:
            return 0 if spare < 0 else 2**62 // self.num_stages
        tokens = int(spare / self.memory.bytes_per_token) + 1  # one more may fit, because device_bytes rounds down
        while tokens > 0 and self.device_bytes(tokens) > budget_bytes:
            tokens -= 1
        return tokens // self.num_stages


