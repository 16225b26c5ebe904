"""When a static plan is refused, what is one kind of microbatch, and that the step opens and closes each microbatch."""

from __future__ import annotations

import dataclasses

import pytest

from memory.policy import KEEP_ALL, RECOMPUTE_ALL
from parallel.program import compile_rank_program
from planner.errors import SpecError
from planner.plan import AttentionGroup, AttentionKind
from tests.plans import verified_plan
from tests.ranks import RankPool
from tests.trainer.step.test_one_step import SMALL, documents_of, plan_of, reader
from trainer.build import build_runtime
from trainer.rank_env import RankEnv
from trainer.settings.check import check_config
from trainer.settings.tree import MemoryConfig, ParallelConfig, RunConfig, TrainConfig
from trainer.step.chunk_policy import ChunkPolicy
from trainer.step.one_step import accumulate_gradients
from trainer.step.static_plan import make_arena, microbatch_kind

ALONE = RankEnv(rank=0, world_size=1, local_rank=0, local_world_size=1)
WANTED = MemoryConfig(static_plan=True)


def test_refused_where_it_would_do_nothing():
    on_cpu = check_config(TrainConfig(memory=WANTED, run=RunConfig(device="cpu")))
    assert on_cpu == ("memory.static_plan is for run.device cuda: the CPU's allocator cannot be replaced; "
                      "leave it out",)
    staged = check_config(TrainConfig(memory=WANTED, parallel=ParallelConfig(pipeline_parallel=2)))
    assert len(staged) == 1 and "pipeline_parallel" in staged[0]
    assert not check_config(TrainConfig(memory=WANTED))


def test_a_machine_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SpecError, match="--memory.static-plan is for cuda, and this run is on cpu"):
        make_arena(TrainConfig(memory=WANTED), ALONE)
    assert make_arena(TrainConfig(), ALONE) is None


def microbatch(lengths, kind=AttentionKind.LOCAL, degree=1, num_groups=1):
    shares = [tuple(range(len(lengths)))[start::num_groups] for start in range(num_groups)]
    groups = [AttentionGroup(kind=kind, ranks=tuple(range(degree)), sequences=share) for share in shares]
    (found,) = compile_rank_program(verified_plan([groups], list(lengths), degree), 0).microbatches
    return found


def kind_of(*arguments, policy=KEEP_ALL, is_first=False, is_whole=True, mlp_chunk_tokens=0, **options):
    return microbatch_kind(
        microbatch(*arguments, **options), policy, is_first=is_first, loss_chunk_tokens=1024, is_whole=is_whole,
        mlp_chunk_tokens=mlp_chunk_tokens,
    )


def test_kinds():
    assert kind_of((100, 20, 7)) == kind_of((300, 5)), "other rows, same blocks"
    assert kind_of((100,)) != kind_of((1500,)), "the loss has two chunks"
    assert kind_of((100,), mlp_chunk_tokens=64) == kind_of((128,), mlp_chunk_tokens=64)
    assert kind_of((100,), mlp_chunk_tokens=64) != kind_of((129,), mlp_chunk_tokens=64), "the MLP has three pieces"
    assert kind_of((100,)) != kind_of((100,), is_first=True)
    assert kind_of((100,)) != kind_of((100,), policy=RECOMPUTE_ALL)
    assert kind_of((100,)) != kind_of((101,), is_whole=False)
    ring = {"kind": AttentionKind.RING, "degree": 2}
    assert kind_of((100,), **ring) == kind_of((100,), **ring) != kind_of((140,), **ring)
    assert kind_of((10, 20), num_groups=2) == kind_of((10, 20), num_groups=2) != kind_of((11, 20), num_groups=2)


class Log:
    """Stands where the arena does."""

    def __init__(self):
        self.calls = []

    def begin(self, key, num_rows, stream=0):
        hash(key)
        self.calls.append(num_rows)

    def end(self):
        self.calls.append("end")


def opened_and_closed(rank, world_size, init_method):
    """What the arena is told in one step of three microbatches, whole and in chunks."""
    config = TrainConfig(run=RunConfig(world_size=world_size))
    runtime = build_runtime(config, ALONE, SMALL, init_method=init_method)
    lengths, found = [20, 9, 30], []
    groups = [AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(i,)) for i in range(3)]
    plan = plan_of(groups, lengths, num_ranks=1)
    for chunking in (None, ChunkPolicy(chunk_tokens=8)):
        log = Log()
        memory = dataclasses.replace(runtime.memory, arena=log)
        told = dataclasses.replace(runtime, memory=memory, chunking=chunking)
        accumulate_gradients(
            told, compile_rank_program(plan, rank), reader(documents_of(plan)), num_tokens=plan.num_tokens
        )
        runtime.optimizer.zero_grad()
        found.append(log.calls)
    return found


def test_the_step_opens_and_closes_every_microbatch():
    pool = RankPool(1)
    try:
        (found,) = pool.run(opened_and_closed)
    finally:
        pool.close()
    assert found == [[20, "end", 9, "end", 30, "end"]] * 2
