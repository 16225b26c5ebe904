"""One forward and backward of a small decoder, ready to be traced."""

from __future__ import annotations

import torch

from memory.policy import KEEP_ALL, RECOMPUTE_ALL
from memory.token_swap import MicrobatchMemory
from parallel.engine import AttentionEngine
from parallel.kernel import CpuFlashKernel
from parallel.program import compile_rank_program
from planner.plan import AttentionKind
from tests.memory.chunk_cases import CPU, group_of, make_model, random_documents, reader
from tests.plans import verified_plan
from tests.ranks import ThreadFabric

LENGTHS = (40, 7, 90)


class StepCase:
    """``run`` leaves no gradients behind, so that the next one asks for the same blocks."""

    def __init__(self, lengths=LENGTHS, policy=KEEP_ALL):
        self.model = make_model(dtype=torch.float32)
        plan = verified_plan([[group_of(AttentionKind.LOCAL, 1, len(lengths))]], list(lengths), 1)
        (self.microbatch,) = compile_rank_program(plan, 0).microbatches
        self.engine = AttentionEngine(CpuFlashKernel(), ThreadFabric(1).wire(0), CPU)
        self.read = reader(random_documents(lengths))
        self.policy = policy

    def run(self):
        spec = self.model.spec
        rows = self.read(self.microbatch.spans)
        attention = self.engine.bind(
            self.microbatch, num_query_heads=spec.num_query_heads, num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )
        memory = MicrobatchMemory(
            self.policy, None, num_layers=spec.num_layers, num_rows=len(rows.tokens_T), keeps_last=False
        )
        self.model(rows.tokens_T, rows.positions_T, rows.labels_T, attention, None, memory).backward()
        self.model.zero_grad()


POLICIES = {"keep": KEEP_ALL, "recompute": RECOMPUTE_ALL}
