"""What goes from node to node in one long exchange, plain and routed, in a cluster in a box; and when remapping pays.

    python -m benchmarks.routing [--nic-mbit 100] [--out benchmarks/results/routing.md]    (as root, iproute2)

One sequence over 2 nodes of 4 ranks runs through the attention engine, forward and backward, with a kernel that does
nothing: what is left is the exchange. Its rate is the bytes of the plan's messages that leave a node, one way, by the
time of the slowest rank, and is compared with that of one network card. The remap rows are prices of the planner.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.box import Box, BoxError, BoxSpec, box_problem
from parallel import comm
from parallel.comm import GroupExchange
from parallel.engine import AttentionEngine
from parallel.kernel import Pairs
from parallel.program import RankMicrobatch, compile_rank_program
from planner.analytic import derive_cost
from planner.assemble import GroupChoice, assemble_plan
from planner.cost import CostModel, MemoryFit, PlanLimits, Provenance, TimeFit
from planner.plan import AttentionGroup, AttentionKind, SolveStatus, StepPlan
from planner.schedule import GroupLimits, schedule_of, write_schedule
from planner.specs import load_cluster, load_model
from planner.step_planner import plan_step

KINDS = (AttentionKind.RING, AttentionKind.DOUBLE_RING, AttentionKind.ROUTED_RING)
NUM_HEADS, HEAD_DIM, ELEMENT_BYTES = 4, 64, 4
KV_BYTES = 2 * NUM_HEADS * HEAD_DIM * ELEMENT_BYTES
"""Of one token; gradients travel in as many."""
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    num_nodes: int
    ranks_per_node: int
    num_tokens: int
    num_repeats: int

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Median over the repeats. ``num_bytes`` leave the node that sends most; ``bytes_per_s``: that by the seconds."""

    kind: str
    nics_per_node: int
    walk: str
    num_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.seconds


class NoKernel:
    """Attention that takes no time: zeros."""

    name = "none"

    def forward(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, pairs: Pairs, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = q_TNH[pairs.query_index]
        return torch.zeros_like(rows), rows.new_zeros(rows.shape[:2])

    def backward(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor, pairs: Pairs, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys = torch.zeros_like(k_SKH[pairs.key_index])
        return torch.zeros_like(q_TNH[pairs.query_index]), keys, keys


def exchange_plan(kind: AttentionKind, settings: Settings) -> StepPlan:
    """One sequence over all ranks. The prices do not matter here."""
    degree = settings.num_ranks
    limits = GroupLimits(num_heads=NUM_HEADS, node_size=settings.ranks_per_node)
    fit = TimeFit(
        kind=kind, degree=degree, s_per_token2=0.0, s_per_token=1e-6, s_per_sequence=0.0, fixed_s=0.0,
        inner_degree=schedule_of(kind).inner_degree(degree, limits) or 1,
    )
    cost = CostModel(
        times=(fit,), memory=MemoryFit(fixed_bytes=0, bytes_per_token=1.0), step_fixed_s=0.0, peak_flop_per_s=1.0,
        provenance=Provenance(source="derived", cluster="box", model="exchange only"),
    )
    return assemble_plan(
        step=0, strategy="benchmark", num_ranks=degree, lengths=[settings.num_tokens], cost=cost, bound_s=0.0,
        groups=[GroupChoice(kind, tuple(range(degree)), (0,))], status=SolveStatus.STATIC, wall_s=0.0,
    )


def node_bytes(group: AttentionGroup, settings: Settings, walk: str) -> int:
    """Bytes of K/V and gradients that leave the node that sends most of them, in one walk."""
    leaving = [0] * settings.num_nodes
    for index, rank in enumerate(group.ranks):
        for step in getattr(write_schedule(group, [settings.num_tokens], index), walk):
            for out in (*step.sends, *step.grad_sends):
                if out.rank // settings.ranks_per_node != rank // settings.ranks_per_node:
                    leaving[rank // settings.ranks_per_node] += sum(span.num_tokens for span in out.spans) * KV_BYTES
    return max(leaving)


def run_rank(settings: Settings) -> None:
    """Take part as torchrun's variables say; rank 0 prints one JSON object: seconds by kind, forward and backward."""
    rank, device = int(os.environ["RANK"]), torch.device("cpu")
    torch.set_num_threads(1)
    comm.init_process_group(device=device, rank=rank, world_size=settings.num_ranks, timeout_s=TIMEOUT_S)
    group = comm.new_group(range(settings.num_ranks), timeout_s=TIMEOUT_S)
    engine = AttentionEngine(NoKernel(), GroupExchange(group), device)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for kind in KINDS:
        (microbatch,) = compile_rank_program(exchange_plan(kind, settings), rank).microbatches
        timed = [_exchange_s(engine, microbatch, group) for _ in range(settings.num_repeats + 1)]
        seconds[kind] = timed[1:]  # the first one makes the connections
    if rank == 0:
        print(json.dumps(seconds))
    comm.shutdown()


def _exchange_s(engine: AttentionEngine, microbatch: RankMicrobatch, group: comm.Group) -> tuple[float, float]:
    """Seconds of the slowest rank, forward and backward."""
    attention = engine.bind(microbatch, num_query_heads=NUM_HEADS, num_kv_heads=NUM_HEADS, head_dim=HEAD_DIM)
    q, k, v = (torch.zeros(microbatch.num_rows, NUM_HEADS, HEAD_DIM, requires_grad=True) for _ in range(3))
    comm.barrier(group)
    start_s = time.perf_counter()
    out = attention(q, k, v)
    comm.barrier(group)
    middle_s = time.perf_counter()
    out.sum().backward()
    comm.barrier(group)
    stop_s = time.perf_counter()
    slowest = comm.all_reduce_max(torch.tensor([middle_s - start_s, stop_s - middle_s], dtype=torch.float64), group)
    forward_s, backward_s = slowest.tolist()
    return forward_s, backward_s


def measure(settings: Settings, nics_per_node: int, nic_bytes_per_s: float) -> list[Rate]:
    """All kinds in one box. Raises BoxError."""
    spec = BoxSpec(
        num_nodes=settings.num_nodes, ranks_per_node=settings.ranks_per_node, nics_per_node=nics_per_node,
        nic_bytes_per_s=nic_bytes_per_s,
    )
    command = [sys.executable, "-m", "benchmarks.routing", "--as-rank", json.dumps(asdict(settings))]
    with Box(spec) as box:
        output = box.run(command, timeout_s=TIMEOUT_S, env={"OMP_NUM_THREADS": "1"})[0]
    seconds = json.loads(output.strip().splitlines()[-1])
    rates = []
    for kind in KINDS:
        group = exchange_plan(kind, settings).microbatches[0].groups[0]
        for place, walk in enumerate(("forward", "backward")):
            rates.append(Rate(
                kind=kind.value, nics_per_node=nics_per_node, walk=walk, num_bytes=node_bytes(group, settings, walk),
                seconds=statistics.median(each[place] for each in seconds[kind]),
            ))
    return rates


@dataclass(frozen=True, slots=True, kw_only=True)
class RemapRow:
    """A step planned by ``zeppelin`` with remapping and without: seconds, and the tokens that move."""

    name: str
    without_s: float
    with_s: float
    num_moved: int
    num_tokens: int


def remap_rows() -> list[RemapRow]:
    """One step in which moving tokens pays and one in which it does not, as the planner sees them: 64 H200."""
    cluster, model = load_cluster("h200-64"), load_model("llama-3-8b")
    cost = derive_cost(cluster, model, num_ranks=64)
    limits = PlanLimits(
        device_budget_bytes=cost.device_bytes(65_536), max_ulysses_degree=model.num_query_heads, kinds=KINDS,
        devices_per_node=8,
    )
    steps = {
        "one sequence of 128k, 128 of 8k": [131_072, *[8192] * 128],
        "8 sequences of 64k, 384 of 2k": [*[65_536] * 8, *[2048] * 384],
    }
    rows = []
    for name, lengths in steps.items():
        plain, moved = (
            plan_step(lengths, step=0, num_ranks=64, cost=each, limits=limits, strategy="zeppelin")
            for each in (replace(cost, remap=None), cost)
        )
        rows.append(RemapRow(
            name=name, without_s=plain.predicted_s, with_s=moved.predicted_s, num_tokens=sum(lengths),
            num_moved=sum(tokens for batch in moved.microbatches for _, _, tokens in batch.moves),
        ))
    return rows


def markdown(rates: SequenceOf[Rate], remaps: SequenceOf[RemapRow], settings: Settings, nic_bytes_per_s: float) -> str:
    lines = [
        "# Routing and remapping", "",
        f"One sequence of {settings.num_tokens} tokens ({KV_BYTES} bytes of K and V each) over {settings.num_nodes} "
        f"nodes of {settings.ranks_per_node} ranks in a cluster in a box, cards of "
        f"{nic_bytes_per_s * 8 / 1e6:.0f} Mbit/s; exchange only, no attention; median of {settings.num_repeats}.", "",
        "| cards a node | kind | walk | MB out of a node | seconds | MB/s | times one card | time of ring / time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate in rates:
        ring = next(
            each for each in rates
            if each.kind == "ring" and (each.nics_per_node, each.walk) == (rate.nics_per_node, rate.walk)
        )
        lines.append(
            f"| {rate.nics_per_node} | {rate.kind} | {rate.walk} | {rate.num_bytes / 1e6:.2f} | {rate.seconds:.3f} | "
            f"{rate.bytes_per_s / 1e6:.1f} | {rate.bytes_per_s / nic_bytes_per_s:.2f} | "
            f"{ring.seconds / rate.seconds:.2f} |"
        )
    lines += [
        "", "Remapping, priced by the planner (`zeppelin`, llama-3-8b on h200-64, derived costs):", "",
        "| step | without, s | with, s | tokens moved |", "|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.without_s:.4f} | {row.with_s:.4f} | {row.num_moved} of {row.num_tokens} |"
        for row in remaps
    ]
    return "\n".join(lines) + "\n"


def main(arguments: SequenceOf[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("--nic-mbit", type=float, default=100.0, help="rate of one network card, each way")
    parser.add_argument("--tokens", type=int, default=16_384, help="length of the sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the report to this file")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.as_rank is not None:
        run_rank(Settings(**json.loads(options.as_rank)))
        return 0
    settings = Settings(num_nodes=2, ranks_per_node=4, num_tokens=options.tokens, num_repeats=options.repeats)
    nic_bytes_per_s = options.nic_mbit * 1e6 / 8
    problem = box_problem()
    if problem is not None:
        print(f"benchmarks.routing: error: no cluster in a box here: {problem}", file=sys.stderr)
        return 2
    try:
        rates = [rate for nics in (settings.ranks_per_node, 1) for rate in measure(settings, nics, nic_bytes_per_s)]
    except BoxError as error:
        print(f"benchmarks.routing: error: {error}", file=sys.stderr)
        return 1
    report = markdown(rates, remap_rows(), settings, nic_bytes_per_s)
    print(report)
    if options.out is not None:
        options.out.write_text(report, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
