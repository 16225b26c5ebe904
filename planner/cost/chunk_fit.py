"""What training chunk by chunk costs (SeCO, arXiv 2505.16710; exact): prices of a cost model, of one stage of ours.

A microbatch runs forward in chunks that leave their K/V, then from the last chunk to the first each again, with its
backward. On top of what the whole microbatch takes come another forward and something for each chunk; of its bytes
only K/V, their gradients and one chunk's activations are there at any time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from planner.cost.fits import TimeFit
from planner.errors import SpecError
from planner.plan import AttentionKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFit:
    """Prices of chunks, all layers together; a token is one that a device holds.

    ``resident_bytes_per_token``: K/V and their gradients, for each token of the microbatch; ``num_kv_heads``: of a
    device, for an exchange of heads over more ranks than that keeps a head on several. ``bytes_per_token``: activations
    and workspace of a token of the chunk at work, beside ``fixed_bytes``; ``shared_bytes_per_token``: for each token of
    the chunk that any rank of its group holds, in groups whose queries move: all but ulysses.

    ``again_attention``, ``again_linear``: the further forward, as a share of a TimeFit's seconds per squared token and
    per token (forward and backward). ``s_per_chunk``: on top for each chunk. No share of a chunk is priced: of T tokens
    on each rank there are at most T / chunk_tokens + 1 chunks. Raises SpecError for a number that is none of these.
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
        """The prices of a whole microbatch with chunks of ``chunk_tokens`` tokens a rank: as linear as before, in the
        same sums of lengths."""
        return replace(
            whole,
            s_per_token2=whole.s_per_token2 * (1 + self.again_attention),
            s_per_token=self.least_s_per_token(whole) + self.s_per_chunk / (chunk_tokens * whole.degree),
            fixed_s=whole.fixed_s + self.s_per_chunk,
        )

    def least_s_per_token(self, whole: TimeFit) -> float:
        """Seconds per token however large the chunks are."""
        return whole.s_per_token * (1 + self.again_linear)

    def kept_bytes_per_token(self, kind: AttentionKind, degree: int) -> float:
        """K/V and their gradients on the device, for a token that it holds in such a group."""
        if kind is not AttentionKind.ULYSSES:
            return self.resident_bytes_per_token
        # a member has so many of the KV heads, of all of the group's tokens; where degree and heads do not divide each
        # other, the fullest one reads into one more
        heads = -(-self.num_kv_heads // degree)
        if max(self.num_kv_heads, degree) % min(self.num_kv_heads, degree):
            heads = min(heads + 1, self.num_kv_heads)
        return self.resident_bytes_per_token * heads * degree / self.num_kv_heads

    def chunk_bytes(self, kind: AttentionKind, degree: int, chunk_tokens: int) -> float:
        """Most bytes of the chunk at work on one device."""
        return self.fixed_bytes + chunk_tokens * self.bytes_per_token + self.shared_bytes(kind, degree, chunk_tokens)

    def shared_bytes(self, kind: AttentionKind, degree: int, chunk_tokens: int) -> float:
        """What of it is there since the group's queries move; none in groups that have no such."""
        return chunk_tokens * degree * self.shared_bytes_per_token if moves_queries(kind, degree) else 0.0


def moves_queries(kind: AttentionKind, degree: int) -> bool:
    """Whether keys stand still and queries move where such a group runs in chunks."""
    return degree > 1 and kind is not AttentionKind.ULYSSES
