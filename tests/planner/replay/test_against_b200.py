"""The replay against whole steps measured on 8 B200 (the published table that ``planner.reproduce.b200`` uses).

No coefficient is fitted to the steps: the machine is the table's single-operation measurements, the curves are the
H100's. But the steps were at hand while the replay was written (passes over memory were added after a look at them),
so this guards what was reached; it is no independent proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from planner.cost.data_sheet import derive_cost
from planner.inputs.cluster import ClusterSpec, DeviceSpec, HostSpec, LinkSpec
from planner.inputs.model import ModelSpec
from planner.plan import AttentionKind, SolveStatus
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.replay.operations import load_curves
from planner.replay.step import Replay, replay_step
from planner.reproduce.b200 import B200Data
from planner.reproduce.table import load_data
from planner.units import GIB, MICROSECONDS_PER_S, parse_rate

CURVES = load_curves()


@dataclass(frozen=True)
class Case:
    tensor: int
    measured_s: float
    predicted_s: float
    replay: Replay

    @property
    def error(self) -> float:
        return self.replay.step_s / self.measured_s - 1


def b200_node(data: B200Data) -> ClusterSpec:
    """One node, from the table's measurements of single operations. Attention is that of the longest measured length.
    Its shares of peak count the masked half as well; forward and backward have 2 and 5 products, of which 2 and 4 are
    model FLOPs."""
    longest = max(data.attentions, key=lambda each: each.tokens)
    attention = 3 / (1 / (longest.forward / 2) + 2.5 / (longest.backward / 2))
    gather, steps = data.collectives["all_gather"], CURVES.collective_steps + 4 * CURVES.collective_steps_per_rank
    gather_latency_s = (3 * gather.latency_us + gather.call_us["0"]) / MICROSECONDS_PER_S  # on 4 ranks
    link = LinkSpec(
        bytes_per_s=gather.efficiency * data.link_gib_per_s * GIB, latency_s=gather_latency_s / steps, source="table"
    )
    device = DeviceSpec(
        name="B200", memory_bytes=178 * GIB, reserved_bytes=GIB, source="table",
        memory_bytes_per_s=data.memory_efficiency * data.memory_gib_per_s * GIB,
        peak_flop_per_s=parse_rate(data.peak_flop_per_s), linear_efficiency=data.default_matmul,
        attention_efficiency=attention,
    )
    host = HostSpec(memory_bytes=1024 * GIB, copy_bytes_per_s=27e9, source="unused")
    return ClusterSpec(
        name="b200", num_nodes=1, devices_per_node=8, nics_per_node=8, device=device, host=host, intra_node=link,
        inter_node=link,
    )


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """All measured steps without pipeline parallelism."""
    data = load_data(B200Data, "b200")
    shape = data.model
    model = ModelSpec(
        name="llama3-70b", num_layers=shape.num_layers, hidden_dim=shape.hidden_dim, ffn_dim=shape.ffn_dim,
        num_query_heads=shape.num_query_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
    )
    cluster = b200_node(data)
    return [replayed(step, cluster, model) for step in data.steps if step.pipeline == 1]


def replayed(step: Any, cluster: ClusterSpec, model: ModelSpec) -> Case:
    num_ranks = 8 // step.tensor
    cost = derive_cost(cluster, model, num_ranks=num_ranks, tensor_parallel=step.tensor)
    kind = AttentionKind.ULYSSES if step.context > 1 else AttentionKind.LOCAL
    groups = [
        GroupChoice(kind, tuple(range(place * step.context, (place + 1) * step.context)), (turn * step.data + place,))
        for turn in range(step.microbatches) for place in range(step.data)
    ]
    plan = assemble_plan(
        step=0, strategy="table", num_ranks=num_ranks, lengths=[step.sequence_tokens] * len(groups), groups=groups,
        cost=cost, status=SolveStatus.STATIC, bound_s=0.0, wall_s=0.0,
    )
    replay = replay_step(plan, cluster, model, cost.memory, tensor_parallel=step.tensor, curves=CURVES)
    return Case(step.tensor, step.step_ms / 1000, plan.predicted_s, replay)


def test_measured_steps_are_met(cases: list[Case]) -> None:
    """8 % off in the mean. Eight-way tensor parallelism comes out up to 18 % too fast: Megatron's sequence parallelism
    gathers once more in the backward, and its narrow products are slower than the table's typical ones."""
    errors = [abs(case.error) for case in cases]
    assert len(cases) == 11 and sum(errors) / len(errors) < 0.09
    assert max(abs(case.error) for case in cases if case.tensor < 8) < 0.09
    assert all(-0.19 < case.error < 0 for case in cases if case.tensor == 8)


def test_the_band_holds_most_of_them(cases: list[Case]) -> None:
    inside = [case for case in cases if case.replay.low_s <= case.measured_s <= case.replay.high_s]
    assert len(inside) >= 8 and {case.tensor for case in cases if case not in inside} <= {8}


def test_the_replay_is_nearer_than_the_prediction(cases: list[Case]) -> None:
    predicted = [abs(case.predicted_s / case.measured_s - 1) for case in cases]
    replayed_ = [abs(case.error) for case in cases]
    assert sum(replayed_) < 0.5 * sum(predicted)
