"""Splits the microbatches of a plan into waves: microbatches that share no rank are replayed together as arrays.

Groups of one shape that share no rank form one array as well. In both cases every rank still runs its microbatches, and
the groups in each, in the plan's order, so grouping them does not change what a rank does or waits for.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from planner.plan import AttentionGroup, AttentionKind, MemoryPolicy, Microbatch
from planner.pricing.lockstep import lockstep_rounds
from planner.replay.groups import GroupStack, stack_groups
from planner.replay.state import DataRanks, GroupRun, Traffic
from planner.replay.work import FloatArray, IntArray, group_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Microbatches that share no rank. ``part``: equal for ranks that groups connect, different otherwise. Fractions
    are of the tokens that a rank holds in this wave. ``chunk_tokens``: how many of these are in one chunk; all of them
    if the rank's microbatch runs whole."""

    ranks: IntArray
    runs: tuple[GroupRun, ...]
    part: IntArray
    rank_tokens: FloatArray
    swap_fraction: FloatArray
    recompute_fraction: FloatArray
    chunk_tokens: FloatArray

    @property
    def num_chunks(self) -> FloatArray:
        """Number of chunks of each rank, at least 1."""
        return np.ceil(self.rank_tokens / np.maximum(self.chunk_tokens, 1.0)).clip(min=1.0)

    @property
    def has_exchanges(self) -> bool:
        return any(run.ranks.shape[1] > 1 for run in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveShape:
    """A wave without seconds: what its groups compute and send."""

    ranks: IntArray
    stacks: tuple[GroupStack, ...]
    part: IntArray
    rank_tokens: FloatArray
    swap_fraction: FloatArray
    recompute_fraction: FloatArray
    chunk_tokens: FloatArray

    def priced(self, data_ranks: DataRanks) -> Wave:
        return Wave(
            ranks=self.ranks, runs=tuple(stack.priced(data_ranks) for stack in self.stacks), part=self.part,
            rank_tokens=self.rank_tokens, swap_fraction=self.swap_fraction,
            recompute_fraction=self.recompute_fraction, chunk_tokens=self.chunk_tokens,
        )


def split_waves(microbatches: SequenceOf[Microbatch]) -> list[list[Microbatch]]:
    """The rounds of ``planner.pricing.lockstep``: each microbatch is in the first round after all earlier ones with
    which it shares a rank. With ``zero3`` the runtime executes these rounds; otherwise they only speed up the
    replay."""
    rounds = lockstep_rounds(microbatch.ranks for microbatch in microbatches)
    return [[microbatches[index] for index in members] for members in rounds]


def wave_shape(microbatches: SequenceOf[Microbatch], lengths: SequenceOf[int], data_ranks: DataRanks) -> WaveShape:
    """Work and traffic of a wave's groups."""
    tokens = np.zeros(data_ranks.num_ranks)
    swap, recompute = np.zeros(data_ranks.num_ranks), np.zeros(data_ranks.num_ranks)
    sizes = np.full(data_ranks.num_ranks, np.inf)
    for microbatch in microbatches:
        policy: MemoryPolicy = microbatch.memory
        for fractions, value in ((swap, policy.swap_fraction), (recompute, policy.recompute_fraction)):
            if value:
                fractions[list(microbatch.ranks)] = value
        for group in microbatch.groups:
            tokens[list(group.ranks)] += group_tokens(group, lengths)
        if policy.chunk_tokens:
            sizes[list(microbatch.ranks)] = policy.chunk_tokens
    chunks = np.minimum(tokens, sizes)
    found = _stacks(group for microbatch in microbatches for group in microbatch.groups)
    stacks = tuple(stack_groups(groups, lengths, data_ranks) for groups in found)
    return WaveShape(
        ranks=np.array(sorted(rank for microbatch in microbatches for rank in microbatch.ranks)), stacks=stacks,
        part=_parts(stacks, data_ranks.num_ranks), rank_tokens=tokens, swap_fraction=swap, recompute_fraction=recompute,
        chunk_tokens=chunks,
    )


def first_pass(
    microbatches: SequenceOf[Microbatch], lengths: SequenceOf[int], data_ranks: DataRanks
) -> WaveShape | None:
    """The wave of microbatches in chunks, which run forward once more before; None if there are none."""
    chunked = [microbatch for microbatch in microbatches if microbatch.memory.chunk_tokens]
    return wave_shape(chunked, lengths, data_ranks) if chunked else None


def _stacks(groups: Iterable[AttentionGroup]) -> list[list[AttentionGroup]]:
    """Stacks of groups of one shape, each group after all earlier groups with which it shares a rank."""
    stacks: list[list[AttentionGroup]] = []
    shape_of: list[tuple[AttentionKind, int, int]] = []
    next_stack: dict[int, int] = {}
    for group in groups:
        shape = (group.kind, group.degree, group.inner_degree)
        place = max(next_stack.get(rank, 0) for rank in group.ranks)
        if group.degree == 1 and place and shape_of[place - 1] == shape:
            place -= 1  # kernels of one rank run one after the other in any case
        while place < len(stacks) and shape_of[place] != shape:
            place += 1
        if place == len(stacks):
            stacks.append([])
            shape_of.append(shape)
        stacks[place].append(group)
        next_stack.update(dict.fromkeys(group.ranks, place + 1))
    return stacks


def _parts(stacks: SequenceOf[GroupStack], num_ranks: int) -> IntArray:
    part = np.arange(num_ranks)
    while True:
        before = part.copy()
        for stack in stacks:
            if stack.ranks.shape[1] > 1:
                part[stack.ranks] = part[stack.ranks].min(axis=1, keepdims=True)
        if (part == before).all():
            return part


def free_links(wave: Wave) -> Wave:
    """The wave with messages that take no time."""
    return replace(wave, runs=tuple(run.freed() for run in wave.runs))


def contended(
    wave: Wave, data_ranks: DataRanks, windows: SequenceOf[tuple[SequenceOf[FloatArray], SequenceOf[FloatArray]]]
) -> Wave:
    """The wave with NICs shared between its groups. ``windows``: start and stop of each group of each run, in the
    forward and in the backward of one layer, as if each had its NICs to itself.

    While two groups overlap, a message of one meets messages of the other with the probability that the other uses the
    NIC, and then shares it. So a group is slowed down by 1 + the sum over the others of (fraction of its own time that
    they overlap) x (fraction of that time in which they use the NIC). k groups that only send slow each other k times.
    """
    factors = []
    for (starts, stops), forward in zip(windows, (True, False), strict=True):
        traffic = [run.forward_traffic if forward else run.backward_traffic for run in wave.runs]
        factors.append(_slowdowns(wave.runs, traffic, starts, stops, data_ranks))
    return replace(
        wave, runs=tuple(run.slowed(*both) for run, both in zip(wave.runs, zip(*factors, strict=True), strict=True))
    )


def _slowdowns(
    runs: SequenceOf[GroupRun], traffic: SequenceOf[Traffic], starts: SequenceOf[FloatArray],
    stops: SequenceOf[FloatArray], data_ranks: DataRanks,
) -> list[FloatArray]:
    """Factor on the seconds per byte through the NIC of each rank of each run."""
    start, stop = np.concatenate(starts), np.concatenate(stops)
    length = np.maximum(stop - start, 1e-12)
    nics = [data_ranks.nic_of(run.ranks) for run in runs]
    num_nics = 1 + max(int(each.max()) for each in nics)
    first = np.cumsum([0, *(len(run.ranks) for run in runs)])
    used = np.zeros((2, len(start), num_nics))
    for index, (nic, flow) in enumerate(zip(nics, traffic, strict=True)):
        group = np.broadcast_to(np.arange(first[index], first[index + 1])[:, None], nic.shape)
        for direction, num_bytes in enumerate((flow.far_sent, flow.far_received)):
            np.add.at(used[direction], (group, nic), data_ranks.flows_per_rank * num_bytes)
    used = np.minimum(1.0, used / data_ranks.machine.nic_bytes_per_s / length[:, None])
    overlap = np.minimum(stop[:, None], stop) - np.maximum(start[:, None], start)
    overlap = np.maximum(0.0, overlap) / length[:, None]
    np.fill_diagonal(overlap, 0.0)
    slow = 1.0 + np.einsum("ab,dbn->dan", overlap, used).max(axis=0)
    return [slow[first[index] : first[index + 1]][np.arange(len(nic))[:, None], nic] for index, nic in enumerate(nics)]
