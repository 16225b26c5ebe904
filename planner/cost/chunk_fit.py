"""What it costs to train a microbatch chunk by chunk (SeCO, arXiv 2505.16710; its gradients are exact).

The chunks of a microbatch first run forward and leave only their K/V. Then, from the last chunk to the first, each
runs forward once more, followed by its backward. So a chunked microbatch pays for a second forward and for every chunk,
and at any time the device holds only K/V, their gradients and the activations of one chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from planner.cost.fits import TimeFit
from planner.errors import SpecError
from planner.plan import AttentionKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFit:
    """Prices of chunks, summed over all layers. Tokens are those that one device holds, unless stated otherwise.

    - ``resident_bytes_per_token``: K/V and their gradients, for each token of the microbatch.
    - ``num_kv_heads``: KV heads of one device. A ulysses group of more ranks than this holds each head several times.
    - ``fixed_bytes``, ``bytes_per_token``: activations and workspace of the chunk at work, in all and per token.
    - ``shared_bytes_per_token``: what a device holds for each token of the chunk on any rank of its group. It counts in
      groups whose queries move (every kind but ulysses).
    - ``again_attention``, ``again_linear``: the second forward, as a share of a TimeFit's seconds per squared token and
      per token (which cover forward and backward).
    - ``s_per_chunk``: seconds on top for each chunk. T tokens a rank count as T / chunk_tokens + 1 chunks, an upper
      bound.

    Raises SpecError where a number is negative or not finite, or where there is no KV head.
    """

    resident_bytes_per_token: float
    num_kv_heads: int
    fixed_bytes: int
    bytes_per_token: float
    shared_bytes_per_token: float
    again_attention: float
    again_linear: float
    s_per_chunk: float

    def __post_init__(self) -> None:
        for name in (
            "resident_bytes_per_token", "fixed_bytes", "bytes_per_token", "shared_bytes_per_token", "again_attention",
            "again_linear", "s_per_chunk",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise SpecError(f"chunks: {name} must be 0 or more and finite, got {getattr(self, name)}")
        if self.num_kv_heads < 1:
            raise SpecError(f"chunks: num_kv_heads must be at least 1, got {self.num_kv_heads}")

    def time_fit(self, whole: TimeFit, chunk_tokens: int) -> TimeFit:
        """The prices of ``whole`` when its microbatch runs in chunks of ``chunk_tokens`` tokens a rank."""
        return replace(
            whole,
            s_per_token2=whole.s_per_token2 * (1 + self.again_attention),
            s_per_token=self.least_s_per_token(whole) + self.s_per_chunk / (chunk_tokens * whole.degree),
            fixed_s=whole.fixed_s + self.s_per_chunk,
        )

    def least_s_per_token(self, whole: TimeFit) -> float:
        """Lower bound of the seconds per token over all chunk sizes."""
        return whole.s_per_token * (1 + self.again_linear)

    def kept_bytes_per_token(self, kind: AttentionKind, degree: int) -> float:
        """Bytes of K/V and their gradients per token that the device holds in a group of this kind and degree."""
        if kind is not AttentionKind.ULYSSES:
            return self.resident_bytes_per_token
        # A rank has this many KV heads, of all tokens of the group. Where degree and heads do not divide each other,
        # the query heads of the fullest rank need one more.
        heads = -(-self.num_kv_heads // degree)
        if max(self.num_kv_heads, degree) % min(self.num_kv_heads, degree):
            heads = min(heads + 1, self.num_kv_heads)
        return self.resident_bytes_per_token * heads * degree / self.num_kv_heads

    def chunk_bytes(self, kind: AttentionKind, degree: int, chunk_tokens: int) -> float:
        """Most bytes of the chunk at work on one device."""
        return self.fixed_bytes + chunk_tokens * self.bytes_per_token + self.shared_bytes(kind, degree, chunk_tokens)

    def shared_bytes(self, kind: AttentionKind, degree: int, chunk_tokens: int) -> float:
        """The part of ``chunk_bytes`` that is there because queries move; 0 in groups whose queries stay."""
        return chunk_tokens * degree * self.shared_bytes_per_token if moves_queries(kind, degree) else 0.0


def moves_queries(kind: AttentionKind, degree: int) -> bool:
    """Whether a group of this kind and degree, when it runs in chunks, moves queries to keys that stay in place."""
    return degree > 1 and kind is not AttentionKind.ULYSSES
