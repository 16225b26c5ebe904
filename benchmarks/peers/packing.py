"""A batch as a peer's users would run it: one sequence-parallel degree, and documents packed to capacity.

Consecutive ranks form sequence-parallel groups of equal size, which are data-parallel replicas. Pure integers.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from parallel.program import RankAction, RankMicrobatch, RankProgram
from planner.cost.model import KEEP
from planner.plan import AttentionGroup, AttentionKind, Span, digest_of
from planner.schedules.layout import shard_spans

Work = Callable[[SequenceOf[int]], float]
"""The work of documents of these lengths (tokens), in seconds, FLOPs or another unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMicrobatch:
    """``documents``: places in the batch. ``lengths``: their tokens with padding. With ulysses ``lengths`` may have one
    entry more: a document that is only padding."""

    documents: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerPlan:
    """One batch on groups of ``degree`` ranks. ``groups[i]``: the microbatches, in order, of the group whose first rank
    is i * degree."""

    kind: AttentionKind
    degree: int
    batch: tuple[int, ...]
    groups: tuple[tuple[PackedMicrobatch, ...], ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.batch)

    @property
    def num_padding_tokens(self) -> int:
        return sum(sum(mb.lengths) for group in self.groups for mb in group) - self.num_tokens

    @property
    def num_microbatches(self) -> int:
        """Microbatches of the group with the most."""
        return max(len(group) for group in self.groups)


def pack_batch(
    lengths: tuple[int, ...], *, kind: AttentionKind, degree: int, num_ranks: int, capacity_tokens: int, work: Work
) -> PeerPlan | None:
    """Pack every document once, with at most ``capacity_tokens`` tokens of a microbatch on every rank. None where a
    document cannot fit.

    There are as few rounds (of a microbatch on every group) as memory allows. Documents, longest first, go to the
    microbatch with the least work that still has room. Where that leaves a document over, all are packed again by best
    fit: to the fullest microbatch that has room. Ring pads every document to a multiple of 2 * degree tokens, ulysses
    the end of a microbatch to a multiple of degree. ``num_ranks`` must be a multiple of ``degree``.
    """
    multiple = 2 * degree if kind is AttentionKind.RING else 1
    sizes = tuple(_round_up(size, multiple) for size in lengths)
    room, num_groups = capacity_tokens * degree, num_ranks // degree
    if max(sizes) > room:
        return None
    rounds = max(1, -(-sum(sizes) // (room * num_groups)))
    while True:
        for by_work in (True, False):
            bins = _fill(sizes, num_groups * rounds, room, work, by_work=by_work)
            if bins is not None:
                groups = _deal([bin_ for bin_ in bins if bin_], sizes, num_groups, work)
                packed = tuple(tuple(_close(bin_, sizes, kind, degree) for bin_ in group) for group in groups)
                return PeerPlan(kind=kind, degree=degree, batch=lengths, groups=packed)
        rounds += 1


def _fill(
    sizes: SequenceOf[int], num_bins: int, room: int, work: Work, *, by_work: bool
) -> list[list[int]] | None:
    """Put documents, longest first, into bins that have room: the one with the least work (``by_work``) or with the
    least room. None where a document fits in no bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    left, load = [room] * num_bins, [0.0] * num_bins
    for document in sorted(range(len(sizes)), key=lambda document: -sizes[document]):
        open_bins = [place for place in range(num_bins) if left[place] >= sizes[document]]
        if not open_bins:
            return None
        chosen = min(open_bins, key=load.__getitem__ if by_work else left.__getitem__)
        bins[chosen].append(document)
        left[chosen] -= sizes[document]
        load[chosen] += work([sizes[document]])
    return bins


def _deal(bins: list[list[int]], sizes: SequenceOf[int], num_groups: int, work: Work) -> list[list[list[int]]]:
    """Deal microbatches, most work first, each to the group with the least work."""
    loads = {place: work([sizes[document] for document in bin_]) for place, bin_ in enumerate(bins)}
    groups: list[list[list[int]]] = [[] for _ in range(num_groups)]
    total = [0.0] * num_groups
    for place in sorted(loads, key=lambda place: -loads[place]):
        chosen = min(range(num_groups), key=lambda group: total[group])
        groups[chosen].append(bins[place])
        total[chosen] += loads[place]
    return groups


def _close(documents: list[int], sizes: SequenceOf[int], kind: AttentionKind, degree: int) -> PackedMicrobatch:
    lengths = [sizes[document] for document in documents]
    if kind is AttentionKind.ULYSSES and sum(lengths) % degree:
        lengths.append(-sum(lengths) % degree)
    return PackedMicrobatch(documents=tuple(documents), lengths=tuple(lengths))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def rank_program(plan: PeerPlan, step: int, rank: int) -> RankProgram:
    """What ``rank`` runs, in the trainer's own form. A span may end behind its document's end, and it may name the
    document after the batch's last one, which is empty; such rows are padding."""
    group, index = divmod(rank, plan.degree)
    microbatches = tuple(
        RankMicrobatch(
            index=place, spans=spans, groups=(), num_rows=sum(span.num_tokens for span in spans), memory=KEEP
        )
        for place, spans in enumerate(_spans(plan, mb)[index] for mb in plan.groups[group])
    )
    actions = tuple(RankAction(place, backward) for place in range(len(microbatches)) for backward in (False, True))
    return RankProgram(
        step=step, digest=digest_of(plan), rank=rank, microbatches=microbatches, actions=actions,
    )


def _spans(plan: PeerPlan, microbatch: PackedMicrobatch) -> tuple[tuple[Span, ...], ...]:
    """The spans of every rank of the group, cut by Longhaul's own rule, which is even for padded lengths."""
    places = tuple(range(len(microbatch.lengths)))
    group = AttentionGroup(kind=plan.kind, ranks=tuple(range(plan.degree)), sequences=places)
    documents = (*microbatch.documents, len(plan.batch))
    return tuple(
        tuple(Span(documents[span.sequence], span.start_token, span.stop_token) for span in spans)
        for spans in shard_spans(group, microbatch.lengths)
    )
