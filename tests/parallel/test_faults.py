"""A rank that dies or stalls in the middle of an exchange stops the others, who say in what and with whom.

Real processes and gloo. The faulty rank strikes itself between two rounds, so the place is the same in every run.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import pytest
import torch

from parallel import comm
from parallel.agree import compare_digests
from parallel.comm import Exchange, ExchangeError, GroupExchange, Message, Pending
from parallel.engine import AttentionEngine
from parallel.kernel import CpuFlashKernel
from parallel.program import compile_rank_program
from planner.plan import AttentionGroup, AttentionKind, StepPlan
from tests.plans import verified_plan
from tests.ranks import RankPool

CPU = torch.device("cpu")
NUM_RANKS, VICTIM = 4, 1
TIMEOUT_S = 4.0
SLACK_S = 15.0  # for a loaded machine: the point is that nobody waits for ever


@dataclass
class StrikingWire:
    """Sends itself ``signal_number`` in place of its post number ``fatal_post`` (from 0)."""

    wire: Exchange
    signal_number: int
    fatal_post: int

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> Pending:
        if self.fatal_post == 0:
            os.kill(os.getpid(), self.signal_number)
        self.fatal_post -= 1
        return self.wire.post(sends, receives, what)


def shared_by_all(kind: AttentionKind) -> StepPlan:
    group = AttentionGroup(kind=kind, ranks=tuple(range(NUM_RANKS)), sequences=(0, 1))
    return verified_plan([[group]], (90, 37), NUM_RANKS)


def run_attention(
    rank: int, world_size: int, init_method: str, kind: AttentionKind, signal_number: int, fatal_post: int
) -> tuple[str, float]:
    """Forward and backward until something goes wrong: (what the ExchangeError says, seconds it took to come)."""
    comm.init_process_group(device=CPU, rank=rank, world_size=world_size, timeout_s=60, init_method=init_method)
    wire: Exchange = GroupExchange(comm.new_group(range(world_size), timeout_s=TIMEOUT_S))
    if rank == VICTIM:
        wire = StrikingWire(wire, signal_number, fatal_post)
    engine = AttentionEngine(CpuFlashKernel(), wire, CPU)
    (microbatch,) = compile_rank_program(shared_by_all(kind), rank).microbatches
    attention = engine.bind(microbatch, num_query_heads=4, num_kv_heads=4, head_dim=8)
    start_s = time.perf_counter()
    try:
        while True:
            start_s = time.perf_counter()
            q, k, v = (torch.randn(microbatch.num_rows, 4, 8, requires_grad=True) for _ in range(3))
            attention(q, k, v).sum().backward()
    except ExchangeError as error:
        return str(error), time.perf_counter() - start_s


@pytest.fixture
def pool() -> Iterator[RankPool]:
    pool = RankPool(NUM_RANKS)  # a fresh one for every fault: its ranks do not survive
    yield pool
    pool.close()


def survivors_say(pool: RankPool, kind: AttentionKind, signal_number: int, fatal_post: int) -> dict[int, str]:
    others = [rank for rank in range(NUM_RANKS) if rank != VICTIM]
    pool.start(run_attention, kind, signal_number, fatal_post, world_size=NUM_RANKS)
    answers = pool.collect(others, timeout_s=120)
    assert all(seconds < TIMEOUT_S + SLACK_S for _, seconds in answers), answers
    assert all("\n" not in text for text, _ in answers)
    return {rank: text for rank, (text, _) in zip(others, answers, strict=True)}


FORWARD_POSTS = NUM_RANKS - 1  # of one ring; then come the backward's
KILLED, STOPPED = signal.SIGKILL, signal.SIGSTOP


@pytest.mark.parametrize(
    ("signal_number", "fatal_post", "neighbour"),
    [
        pytest.param(KILLED, 1, VICTIM + 1, id="killed in the forward"),
        pytest.param(STOPPED, 1, VICTIM + 1, id="stopped in the forward"),
        pytest.param(KILLED, FORWARD_POSTS + 2, VICTIM - 1, id="killed in the backward"),
        pytest.param(STOPPED, FORWARD_POSTS + 2, VICTIM - 1, id="stopped in the backward", marks=pytest.mark.nightly),
    ],
)
def test_a_lost_rank_in_a_ring_stops_the_others(
    pool: RankPool, signal_number: int, fatal_post: int, neighbour: int
) -> None:
    said = survivors_say(pool, AttentionKind.RING, signal_number, fatal_post)
    pattern = r"ring attention of group \(0, 1, 2, 3\), round \d: (receive from|send to) rank \d failed: \w"
    assert all(re.match(pattern, text) for text in said.values()), said
    assert f": receive from rank {VICTIM} failed: " in said[neighbour], said
    if signal_number == STOPPED:
        assert "Timed out" in said[neighbour]


@pytest.mark.parametrize("signal_number", [
    pytest.param(KILLED, id="killed"), pytest.param(STOPPED, id="stopped", marks=pytest.mark.nightly)
])
def test_a_lost_rank_in_a_head_exchange_stops_the_others(pool: RankPool, signal_number: int) -> None:
    said = survivors_say(pool, AttentionKind.ULYSSES, signal_number, 2)
    assert all(text.startswith("head exchange of ") and " rank " in text for text in said.values()), said
    assert any(f" rank {VICTIM} failed: " in text for text in said.values()), said


def agree_on_digests(rank: int, world_size: int, init_method: str) -> str:
    """What every step begins and ends with, until a rank is gone: what the error says."""
    comm.init_process_group(device=CPU, rank=rank, world_size=world_size, timeout_s=60, init_method=init_method)
    group = comm.new_group(range(world_size), timeout_s=TIMEOUT_S)
    for step in range(4):
        if (rank, step) == (VICTIM, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            compare_digests("a" * 64, group)
            comm.all_reduce_sum(torch.ones(3), group)
        except ExchangeError as error:
            return str(error)
    return "nothing happened"


def test_a_lost_rank_in_a_collective_stops_the_others(pool: RankPool) -> None:
    pool.start(agree_on_digests, world_size=NUM_RANKS)
    said = pool.collect([rank for rank in range(NUM_RANKS) if rank != VICTIM], timeout_s=120)
    assert all(text.startswith("gather of ranks [0, 1, 2, 3] failed: ") and "\n" not in text for text in said), said
