"""What each kind of attention computes and sends, as arrays: from its schedules, or faster from a closed form.

``group_shape`` accepts any kind. If there is no closed form for it here, the schedules of ``write_schedule`` are read
message by message. Closed forms exist because a group of a thousand ranks has a million rounds; a test compares them
with the schedules.

A *batch* is the messages that a rank posts together and waits for together: posted when round ``posted`` starts, due
when round ``wait_after`` ends. All that one rank sends to another in a batch counts as one message.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from planner.plan import AttentionGroup, AttentionKind
from planner.replay.state import WIDE_BYTES, DataRanks
from planner.replay.work import AttentionWork, Blocks, FloatArray, HeadSplit, IntArray, split_heads, zigzag_blocks
from planner.schedules.exchange import Round, write_schedule
from planner.schedules.layout import head_degree, local_token_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """The messages of one walk, one array element per message. ``source``, ``target``: group indices."""

    posted: IntArray
    wait_after: IntArray
    source: IntArray
    target: IntArray
    num_bytes: FloatArray


@dataclass(frozen=True, slots=True)
class WalkShape:
    """One direction of one group: kernel work ``[round, member]`` and messages."""

    work: AttentionWork
    messages: Messages


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """One group. ``team_size``: consecutive members that exchange heads before and after the rounds. ``rows``: tokens
    of each member outside attention. ``heads``: by place in the team."""

    team_size: int
    rows: tuple[int, ...]
    heads: HeadSplit
    forward: WalkShape
    backward: WalkShape


def group_shape(
    group: AttentionGroup, lengths: SequenceOf[int], data_ranks: DataRanks, *, is_written: bool = False
) -> GroupShape:
    """The work and messages of a group. ``lengths[i]``: tokens of the step's sequence i. ``is_written``: read the
    schedules even if there is a closed form."""
    size = head_degree(group.kind, group.degree, group.inner_degree)
    sizes = [lengths[index] for index in group.sequences]
    heads = split_heads(data_ranks.query_heads, data_ranks.kv_heads, size)
    form = None if is_written else _CLOSED_FORMS.get(group.kind)
    if form is None:
        schedules = [write_schedule(group, lengths, index) for index in range(group.degree)]
        forward = _written(group, [schedule.forward for schedule in schedules], heads, data_ranks)
        backward = _written(group, [schedule.backward for schedule in schedules], heads, data_ranks)
    else:
        blocks = zigzag_blocks(np.array(sizes, dtype=np.int64), group.degree // size)
        kv_heads = np.tile(heads.kv, len(blocks.tokens))
        forward, backward = form(_Form(blocks, size, group.inner_degree, kv_heads, data_ranks))
    return GroupShape(
        team_size=size, heads=heads, forward=forward, backward=backward,
        rows=local_token_counts(group.kind, group.degree, sizes, group.inner_degree),
    )


def has_closed_form(kind: AttentionKind) -> bool:
    """Whether groups of this kind are computed without writing their schedules."""
    return kind in _CLOSED_FORMS


def _token_bytes(data_ranks: DataRanks, kv_heads: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Bytes per token and layer of K and V, and of their gradients, which are sent in fp32 or wider."""
    elements = 2 * data_ranks.model.head_dim * kv_heads
    return elements * data_ranks.element_bytes, elements * max(WIDE_BYTES, data_ranks.element_bytes)


def _written(
    group: AttentionGroup, walks: SequenceOf[SequenceOf[Round]], heads: HeadSplit, data_ranks: DataRanks
) -> WalkShape:
    """Any kind, from the rounds of each member."""
    place_of = {rank: index for index, rank in enumerate(group.ranks)}
    kv_bytes, grad_bytes = _token_bytes(data_ranks, np.tile(heads.kv, group.degree // len(heads.kv)))
    found: dict[tuple[int, int, int, int], float] = {}
    work = np.zeros((5, max(map(len, walks)), group.degree))
    for index, walk in enumerate(walks):
        for number, step in enumerate(walk):
            work[:, number, index] = _round_work(step)
            for into in step.receives:
                key = (number - into.lead, number - 1, place_of[into.rank], index)
                found[key] = found.get(key, 0.0) + kv_bytes[index] * sum(span.num_tokens for span in into.spans)
            for into in step.grad_receives:
                key = (number + 1 - into.lead, number, place_of[into.rank], index)
                found[key] = found.get(key, 0.0) + grad_bytes[index] * sum(span.num_tokens for span in into.spans)
    ends = np.array(list(found), dtype=np.int64).reshape(-1, 4).T
    messages = Messages(
        posted=ends[0], wait_after=ends[1], source=ends[2], target=ends[3], num_bytes=np.array(list(found.values()))
    )
    calls, queries, keys, pairs, merged = work
    return WalkShape(AttentionWork(calls=calls, queries=queries, keys=keys, pairs=pairs, merged=merged), messages)


def _round_work(step: Round) -> tuple[float, float, float, float, float]:
    """Calls, queries, keys, pairs and merged queries of one round of one rank."""
    message_of = {span: number for number, into in enumerate(step.receives) for span in into.spans}
    queries = keys = pairs = own = 0
    calls = set()
    for task in step.tasks:
        size = task.query.num_tokens
        queries += size
        keys += task.key.num_tokens
        pairs += size * (size + 1) // 2 if task.causal else size * task.key.num_tokens
        own += size if task.causal else 0
        calls.add((task.causal, message_of.get(task.key)))
    return len(calls), queries, keys, pairs, queries - own


@dataclass(frozen=True, slots=True)
class _Form:
    """Input of a closed form. ``size``: ranks per team. ``kv_heads``: KV heads of each member."""

    blocks: Blocks
    size: int
    inner_degree: int
    kv_heads: FloatArray
    data_ranks: DataRanks

    @property
    def num_teams(self) -> int:
        return len(self.blocks.tokens)

    def work(self, owners: IntArray) -> AttentionWork:
        """Work ``[round, member]``, where ``owners[round, team]`` is the team whose keys that team reads."""
        team = np.arange(self.num_teams)
        if self.size == 1:
            return self.blocks.work.each(lambda values: values[team, owners])
        return self.blocks.work.each(lambda values: np.repeat(values[team, owners], self.size, axis=1))

    def hops(self) -> _Hops:
        return _Hops(self.size, *_token_bytes(self.data_ranks, self.kv_heads))


@dataclass(slots=True)
class _Hops:
    """Collects messages as permutations of the teams: in each, every team receives one message and sends one, member by
    member at the same place."""

    size: int
    kv_bytes: FloatArray
    grad_bytes: FloatArray
    batches: dict[tuple[int, int], list[tuple[IntArray, FloatArray]]] = field(default_factory=dict)

    def keys(self, posted: int, wait_after: int, source: IntArray, tokens: FloatArray) -> None:
        """``source[t]`` sends ``tokens[t]`` tokens of K and V to team t."""
        self._add(posted, wait_after, source, self.kv_bytes, tokens)

    def grads(self, posted: int, wait_after: int, source: IntArray, tokens: FloatArray) -> None:
        self._add(posted, wait_after, source, self.grad_bytes, tokens)

    def _add(
        self, posted: int, wait_after: int, source: IntArray, token_bytes: FloatArray, tokens: FloatArray
    ) -> None:
        num_bytes = token_bytes * (tokens if self.size == 1 else np.repeat(tokens, self.size))
        batch = self.batches.setdefault((posted, wait_after), [])
        for earlier, total in batch:
            if earlier[0] == source[0]:  # permutations are shifts of the teams, so equal for one means equal for all
                total += num_bytes
                return
        batch.append((source, num_bytes))

    def messages(self) -> Messages:
        hops = [(key, *hop) for key, batch in sorted(self.batches.items()) for hop in batch]
        if not hops:
            nothing = np.zeros(0, dtype=np.int64)
            return Messages(posted=nothing, wait_after=nothing, source=nothing, target=nothing, num_bytes=np.zeros(0))
        num_members = len(self.kv_bytes)
        place = np.tile(np.arange(self.size), num_members // self.size)
        num_bytes = np.concatenate([each for _, _, each in hops])
        kept = num_bytes > 0
        source = np.concatenate([np.repeat(source, self.size) * self.size + place for _, source, _ in hops])
        posted, wait_after = (np.repeat([key[end] for key, _, _ in hops], num_members) for end in (0, 1))
        return Messages(
            posted=posted[kept], wait_after=wait_after[kept], source=source[kept], num_bytes=num_bytes[kept],
            target=np.tile(np.arange(num_members), len(hops))[kept],
        )


def _still(form: _Form) -> tuple[WalkShape, WalkShape]:
    """One round without messages (local, ulysses)."""
    walk = WalkShape(form.work(np.zeros((1, 1), dtype=np.int64)), form.hops().messages())
    return walk, walk


def _ring(form: _Form) -> tuple[WalkShape, WalkShape]:
    """Forward: blocks come from behind. Backward: blocks come from ahead, and their gradients one round later."""
    degree, tokens = form.num_teams, form.blocks.tokens
    if degree == 1:
        return _still(form)
    team, rounds = np.arange(degree), np.arange(degree)[:, None]
    behind, ahead = (team - 1) % degree, (team + 1) % degree
    there, back = form.hops(), form.hops()
    for number in range(degree - 1):
        there.keys(number, number, behind, tokens[(team - number - 1) % degree])
        back.keys(number, number, ahead, tokens[(team + number + 1) % degree])
    for number in range(2, degree + 1):
        back.grads(number, number, ahead, tokens[(team + number) % degree])
    return (
        WalkShape(form.work((team - rounds) % degree), there.messages()),
        WalkShape(_then_home(form.work((team + rounds) % degree)), back.messages()),
    )


def _group_cast(form: _Form) -> tuple[WalkShape, WalkShape]:
    """In round i the rank i places behind sends what is needed; its gradient is sent back a round later."""
    degree, needed = form.num_teams, form.blocks.needed
    team, rounds = np.arange(degree), np.arange(degree)[:, None]
    there, back = form.hops(), form.hops()
    for number in range(degree - 1):
        behind = (team - number - 1) % degree
        for hops in (there, back):
            hops.keys(number, number, behind, needed[team, behind])
    for number in range(2, degree + 1):
        ahead = (team + number - 1) % degree
        back.grads(number, number, ahead, needed[ahead, team])
    work = form.work((team - rounds) % degree)
    return WalkShape(work, there.messages()), WalkShape(_then_home(work), back.messages())


def _all_gather(form: _Form) -> tuple[WalkShape, WalkShape]:
    """All blocks to all ranks, while kernels run on the own block; gradients return directly to the owners at the
    end."""
    degree, needed = form.num_teams, form.blocks.needed
    team = np.arange(degree)
    there, back = form.hops(), form.hops()
    for offset in range(1, degree):
        source = (team - offset) % degree
        for hops in (there, back):
            hops.keys(0, 0, source, form.blocks.tokens[source])
        back.grads(2, 2, source, needed[source, team])

    def rounds(values: FloatArray) -> FloatArray:
        own = np.diag(values)
        return np.stack([own, values.sum(axis=1) - own])

    work = form.blocks.work.each(rounds)
    return WalkShape(work, there.messages()), WalkShape(_then_home(work), back.messages())


def _double_ring(form: _Form) -> tuple[WalkShape, WalkShape]:
    """See ``planner.schedules.kinds.double_ring``: in cycle c, step s a member works on the block c rings and s places
    away."""
    degree, size, tokens = form.num_teams, form.inner_degree, form.blocks.tokens
    num_rings = degree // size
    own_ring, own_place = np.divmod(np.arange(degree), size)

    def at(ring: int, place: int) -> IntArray:
        return np.asarray((own_ring + ring) % num_rings * size + (own_place + place) % size, dtype=np.int64)

    places = [divmod(number, size) for number in range(degree)]
    there, back = form.hops(), form.hops()
    for number, (cycle, step) in enumerate(places):
        lead = size if step == 0 else 1
        for hops, way in ((there, -1), (back, 1)):
            if number:
                source = at(0, way) if step else at(way, 0)
                hops.keys(number - lead, number - 1, source, tokens[at(way * cycle, way * step)])
        if not number:
            continue
        if step < size - 1:  # the part goes on with its block, to the next place of the inner ring
            back.grads(number + 1, number + 1, at(0, 1), tokens[at(cycle, step + 1)])
            continue
        waits = cycle and cycle < num_rings - 1
        back.grads(number + 1, number + (size if waits else 1), at(-cycle, -step), tokens)
    there_owners, back_owners = (
        np.stack([at(way * cycle, way * step) for cycle, step in places]) for way in (-1, 1)
    )
    return (
        WalkShape(form.work(there_owners), there.messages()),
        WalkShape(_then_home(form.work(back_owners)), back.messages()),
    )


def _then_home(work: AttentionWork) -> AttentionWork:
    """One more round, in which the last gradients arrive at their owners."""
    return work.each(lambda values: np.concatenate([values, np.zeros((1, values.shape[1]))]))


_CLOSED_FORMS: dict[AttentionKind, Callable[[_Form], tuple[WalkShape, WalkShape]]] = {
    AttentionKind.LOCAL: _still,
    AttentionKind.ULYSSES: _still,
    AttentionKind.RING: _ring,
    AttentionKind.USP: _ring,
    AttentionKind.DOUBLE_RING: _double_ring,
    AttentionKind.GROUP_CAST: _group_cast,
    AttentionKind.ALL_GATHER: _all_gather,
}
