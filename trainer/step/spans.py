"""How one step's microbatch times get from all ranks to ``RUN_DIR/spans.jsonl``, and how often.

They are part of the one small sum that every step makes anyway. The plan gives every rank the same list of
(microbatch, rank) pairs; each rank fills in its own rows and leaves the others zero. This needs no extra collective and
no file per rank (a shared file system would have to create thousands), and other steps send nothing extra.

Where activations are swapped or recomputed, the times of layers and copies go to ``RUN_DIR/lanes.jsonl``. These are
hundreds per rank and step, so fewer steps are recorded, and they are gathered separately after the step.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from memory.activations import ActivationMemory
from parallel import comm
from parallel.mesh import RankMesh
from planner.measured.copy_times import RankLanes, rank_to_plain
from planner.measured.step_times import MicrobatchTime, RankStep

NUM_TIMES = 5
_RANK_STEPS = 50_000
"""Ranks times recorded steps in a whole run if no interval is set. Each microbatch takes about 50 bytes, so eight
microbatches per rank make a file of about 20 MB."""
_LANE_RANK_STEPS = 400
"""The same for lanes: each may have ``memory.timeline.MAX_INTERVALS`` of about 40 bytes, so at most 65 MB."""
MAX_LANE_RANKS = 64
"""How many data ranks have their lanes recorded, counted from rank 0."""


def spans_interval(spans_every: int | None, *, num_steps: int, num_ranks: int) -> int:
    """Record every how many steps; 0: never. ``spans_every`` None chooses an interval that keeps the file small."""
    if spans_every is not None:
        return spans_every
    return max(1, -(-num_steps * num_ranks // _RANK_STEPS))


def lanes_interval(spans_every: int | None, *, num_steps: int, num_ranks: int) -> int:
    """Record lanes every how many steps: ``spans_every`` if it is set, else a multiple of ``spans_interval``."""
    every = spans_interval(spans_every, num_steps=num_steps, num_ranks=num_ranks)
    if spans_every is not None:
        return every
    num_recorded = -(-num_steps // every)
    return every * max(1, -(-num_recorded * min(num_ranks, MAX_LANE_RANKS) // _LANE_RANK_STEPS))


def is_recorded(step: int, *, every: int, num_steps: int) -> bool:
    """Whether ``step`` is the last of an interval, or of the run."""
    return every > 0 and ((step + 1) % every == 0 or step + 1 == num_steps)


def pack_times(times: SequenceOf[MicrobatchTime], places: SequenceOf[tuple[int, int]], rank: int) -> torch.Tensor:
    """``[len(places), NUM_TIMES]``, seconds, float64: this rank's microbatches in its rows, zeros elsewhere."""
    packed = torch.zeros(len(places), NUM_TIMES, dtype=torch.float64)
    mine = {each.microbatch: each for each in times}
    for row, (microbatch, owner) in enumerate(places):
        if owner == rank:
            each = mine[microbatch]
            packed[row] = torch.tensor(
                (each.start_s, each.middle_s, each.stop_s, each.forward_wait_s, each.backward_wait_s),
                dtype=torch.float64,
            )
    return packed


def unpack_times(
    packed: torch.Tensor, places: SequenceOf[tuple[int, int]], gather_s: SequenceOf[float],
    reduce_s: SequenceOf[float],
) -> tuple[RankStep, ...]:
    """All ranks of the step, from the sum of all ranks' ``pack_times``."""
    by_rank: list[list[MicrobatchTime]] = [[] for _ in gather_s]
    for (microbatch, rank), times in zip(places, packed.tolist(), strict=True):
        start_s, middle_s, stop_s, forward_s, backward_s = times
        by_rank[rank].append(MicrobatchTime(
            microbatch=microbatch, start_s=start_s, middle_s=middle_s, stop_s=stop_s, forward_wait_s=forward_s,
            backward_wait_s=backward_s,
        ))
    return tuple(
        RankStep(gather_s=gathered, reduce_s=reduced, microbatches=tuple(found))
        for gathered, reduced, found in zip(gather_s, reduce_s, by_rank, strict=True)
    )


def gather_lanes(memory: ActivationMemory, mesh: RankMesh) -> list[dict[str, Any]]:
    """On rank 0, the ``rank_to_plain`` of every recorded data rank's timeline; empty on other ranks. Collective; not
    with pipeline stages."""
    recorded = [  # other tensor ranks have the same lanes
        mesh.shape.rank(stage=0, data_rank=rank, tensor_rank=0) for rank in range(min(mesh.data_size, MAX_LANE_RANKS))
    ]
    mine = b""
    if mesh.rank in recorded:
        lanes = RankLanes(
            rank=mesh.data_rank, intervals=memory.timeline.read(), num_left_out=memory.timeline.num_left_out
        )
        mine = zlib.compress(json.dumps(rank_to_plain(lanes)).encode())
    found = comm.collect_bytes(mine, sources=recorded, destination=0, group=mesh.control_group)
    return [json.loads(zlib.decompress(payload)) for payload in found if payload]
