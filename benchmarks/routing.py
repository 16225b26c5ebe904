"""The rate between nodes of one long exchange, plain and routed, in a cluster in a box; and when remapping pays off.

    python -m benchmarks.routing [--nic-mbit 16] [--out benchmarks/results/routing.md]    (as root, iproute2)

One sequence over 2 nodes of 4 ranks runs through the attention engine, forward and backward, with a kernel that does
nothing, so only the exchange takes time. Its rate is the bytes of the plan's messages that leave a node, one way,
divided by the slowest rank's time. It is compared with the rate of one network card: the highest that anything reached
over one card in the same run, a plain send of a ring's block or a whole ring. Plain sends over all cards at once show
the most that the box can do. The remap rows are prices of the planner. Hops inside a node cost processor time, which
all nodes of the box share; at card rates above about 50 Mbit/s on two cores this limits all kinds.
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
from parallel.comm import GroupExchange, Message
from parallel.engine import AttentionEngine
from parallel.kernel import Pairs
from parallel.program import RankMicrobatch, compile_rank_program
from planner.cost.data_sheet import derive_cost
from planner.cost.fits import MemoryFit, Provenance, TimeFit
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.inputs.files import load_cluster, load_model
from planner.plan import AttentionGroup, AttentionKind, SolveStatus, StepPlan
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.pricing.problem import StepProblem
from planner.schedules.exchange import GroupLimits, schedule_of, write_schedule
from planner.step_planner import plan_step

KINDS = (AttentionKind.RING, AttentionKind.DOUBLE_RING, AttentionKind.ROUTED_RING)
NUM_HEADS, HEAD_DIM, ELEMENT_BYTES = 4, 64, 4
KV_BYTES = 2 * NUM_HEADS * HEAD_DIM * ELEMENT_BYTES
"""K/V bytes of one token; its gradients have as many."""
TIMEOUT_S = 300.0
GOAL_CARDS = 3.0
"""The rate that a routed ring over four cards a node must reach, as a multiple of one card's rate."""
ONE_CARD, ALL_CARDS = "one card, plain send", "all cards, plain sends"
WALKS = ("forward", "backward")
WARM_UP_FRACTION = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSetup:
    """The exchange to measure: one sequence of ``num_tokens`` over all ranks of the box."""

    num_nodes: int
    ranks_per_node: int
    num_tokens: int
    num_repeats: int
    kinds: tuple[str, ...] = tuple(kind.value for kind in KINDS)

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A rate measured over the repeats. ``num_bytes``: what leaves the node that sends most, one way. ``seconds``: the
    median."""

    kind: str
    nics_per_node: int
    walk: str
    num_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.seconds


class NoKernel:
    """An attention kernel that takes no time: it returns zeros."""

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


def exchange_plan(kind: AttentionKind, setup: ExchangeSetup) -> StepPlan:
    """A plan of one sequence over all ranks. Its prices do not matter here."""
    degree = setup.num_ranks
    limits = GroupLimits(num_heads=NUM_HEADS, node_size=setup.ranks_per_node)
    fit = TimeFit(
        kind=kind, degree=degree, s_per_token2=0.0, s_per_token=1e-6, s_per_sequence=0.0, fixed_s=0.0,
        inner_degree=schedule_of(kind).inner_degree(degree, limits) or 1,
    )
    cost = CostModel(
        times=(fit,), memory=MemoryFit(fixed_bytes=0, bytes_per_token=1.0), step_fixed_s=0.0, peak_flop_per_s=1.0,
        provenance=Provenance(source="derived", cluster="box", model="exchange only"),
    )
    return assemble_plan(
        step=0, strategy="benchmark", num_ranks=degree, lengths=[setup.num_tokens], cost=cost, bound_s=0.0,
        groups=[GroupChoice(kind, tuple(range(degree)), (0,))], status=SolveStatus.STATIC, wall_s=0.0,
    )


def node_bytes(group: AttentionGroup, setup: ExchangeSetup, walk: str) -> int:
    """Bytes of K/V and gradients that leave the node which sends most, in the forward or the backward (``walk``)."""
    leaving = [0] * setup.num_nodes
    for index, rank in enumerate(group.ranks):
        for step in getattr(write_schedule(group, [setup.num_tokens], index), walk):
            for out in (*step.sends, *step.grad_sends):
                if out.rank // setup.ranks_per_node != rank // setup.ranks_per_node:
                    leaving[rank // setup.ranks_per_node] += sum(span.num_tokens for span in out.spans) * KV_BYTES
    return max(leaving)


def run_rank(setup: ExchangeSetup) -> None:
    """Run as the rank that torchrun's variables name. Rank 0 prints one JSON object: by kind, the seconds of the
    forward and of the backward."""
    rank, device = int(os.environ["RANK"]), torch.device("cpu")
    torch.set_num_threads(1)
    comm.init_process_group(device=device, rank=rank, world_size=setup.num_ranks, timeout_s=TIMEOUT_S)
    group = comm.new_group(range(setup.num_ranks), timeout_s=TIMEOUT_S)
    engine = AttentionEngine(NoKernel(), GroupExchange(group), device)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for name, places in ((ONE_CARD, [setup.ranks_per_node - 1]), (ALL_CARDS, range(setup.ranks_per_node))):
        timed = [_send_s(setup, places, group) for _ in range(setup.num_repeats + 1)]
        seconds[name] = [(each, each) for each in timed[1:]]  # the first one opens the connections
    for name in setup.kinds:
        kind = AttentionKind(name)
        short = replace(setup, num_tokens=setup.num_tokens // WARM_UP_FRACTION)
        warm_up, microbatch = (
            compile_rank_program(exchange_plan(kind, each), rank).microbatches[0] for each in (short, setup)
        )
        _exchange_s(engine, warm_up, group)
        seconds[name] = [_exchange_s(engine, microbatch, group) for _ in range(setup.num_repeats)]
    if rank == 0:
        print(json.dumps(seconds))
    comm.shutdown()


def _send_s(setup: ExchangeSetup, places: SequenceOf[int], group: comm.Group) -> float:
    """Seconds in which, on every node, the ranks at these places each send a block's K and V to the next node."""
    size, num_ranks = setup.ranks_per_node, setup.num_ranks
    rank, block = int(os.environ["RANK"]), torch.zeros(block_bytes(setup), dtype=torch.uint8)
    takes_part = rank % size in places
    sends = [Message((rank + size) % num_ranks, block)] if takes_part else []
    receives = [Message((rank - size) % num_ranks, torch.empty_like(block))] if takes_part else []
    comm.barrier(group)
    start_s = time.perf_counter()
    GroupExchange(group).post(sends, receives, "plain send").wait()
    seconds = torch.tensor([time.perf_counter() - start_s], dtype=torch.float64)
    return comm.all_reduce_max(seconds, group).item()


def block_bytes(setup: ExchangeSetup) -> int:
    """Bytes of K and V of one rank's part of the sequence."""
    return setup.num_tokens // setup.num_ranks * KV_BYTES


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


def measure(setup: ExchangeSetup, nics_per_node: int, nic_bytes_per_s: float) -> list[Rate]:
    """Measure all kinds in one box. Raises BoxError."""
    spec = BoxSpec(
        num_nodes=setup.num_nodes, ranks_per_node=setup.ranks_per_node, nics_per_node=nics_per_node,
        nic_bytes_per_s=nic_bytes_per_s,
    )
    command = [sys.executable, "-m", "benchmarks.routing", "--as-rank", json.dumps(asdict(setup))]
    with Box(spec) as box:
        output = box.run(command, timeout_s=TIMEOUT_S, env={"OMP_NUM_THREADS": "1"})[0]
    seconds = json.loads(output.strip().splitlines()[-1])
    rates = [
        Rate(
            kind=name, nics_per_node=nics_per_node, walk="send", num_bytes=num_flows * block_bytes(setup),
            seconds=statistics.median(each for each, _ in seconds[name]),
        )
        for name, num_flows in ((ONE_CARD, 1), (ALL_CARDS, setup.ranks_per_node))
    ]
    for kind in setup.kinds:
        group = exchange_plan(AttentionKind(kind), setup).microbatches[0].groups[0]
        for place, walk in enumerate(WALKS):
            rates.append(Rate(
                kind=kind, nics_per_node=nics_per_node, walk=walk, num_bytes=node_bytes(group, setup, walk),
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
    """One step in which moving tokens pays off and one in which it does not, as priced by the planner for 64 H200."""
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
            plan_step(StepProblem(lengths=lengths, num_ranks=64, cost=each, limits=limits), step=0, strategy="zeppelin")
            for each in (replace(cost, remap=None), cost)
        )
        rows.append(RemapRow(
            name=name, without_s=plain.predicted_s, with_s=moved.predicted_s, num_tokens=sum(lengths),
            num_moved=sum(tokens for batch in moved.microbatches for _, _, tokens in batch.moves),
        ))
    return rows


def markdown(
    rates: SequenceOf[Rate], remaps: SequenceOf[RemapRow], setup: ExchangeSetup, nic_bytes_per_s: float
) -> str:
    """The report. ``rates`` must hold those of plain rings and of sends over one card, which are the same however many
    cards a node has."""
    card_bytes_per_s = max(
        each.bytes_per_s for each in rates if each.nics_per_node == 1 or each.kind in (ONE_CARD, AttentionKind.RING)
    )
    rings = {each.walk: each for each in rates if each.kind == AttentionKind.RING}
    lines = [
        "# Routing and remapping", "",
        f"One sequence of {setup.num_tokens} tokens ({KV_BYTES} bytes of K and V each) over {setup.num_nodes} "
        f"nodes of {setup.ranks_per_node} ranks in a cluster in a box, cards of "
        f"{nic_bytes_per_s * 8 / 1e6:.0f} Mbit/s; exchange only, no attention; median of {setup.num_repeats}.", "",
        "| cards a node | kind | walk | MB out of a node | seconds | MB/s | times one card | time of ring / time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate in rates:
        ring = f"{rings[rate.walk].seconds / rate.seconds:.2f}" if rate.walk in rings else "-"
        lines.append(
            f"| {rate.nics_per_node} | {rate.kind} | {rate.walk} | {rate.num_bytes / 1e6:.2f} | {rate.seconds:.3f} | "
            f"{rate.bytes_per_s / 1e6:.2f} | {rate.bytes_per_s / card_bytes_per_s:.2f} | {ring} |"
        )
    most = max(rate.nics_per_node for rate in rates)
    routed = [
        rate for rate in rates if (rate.kind, rate.nics_per_node) == (AttentionKind.ROUTED_RING.value, most)
    ]
    reached = min(rate.bytes_per_s for rate in routed) / card_bytes_per_s
    lines += [
        "", f"Goal, a routed ring over {most} cards at {GOAL_CARDS:.1f} times one card's rate or more, forward and "
        f"backward: {'met' if reached >= GOAL_CARDS else 'NOT met'} ({reached:.2f}).",
    ]
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
    parser.add_argument("--nic-mbit", type=float, default=16.0, help="rate of one network card, each way")
    parser.add_argument("--tokens", type=int, default=8192, help="length of the sequence")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the report to this file")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.as_rank is not None:
        run_rank(ExchangeSetup(**json.loads(options.as_rank)))
        return 0
    setup = ExchangeSetup(num_nodes=2, ranks_per_node=4, num_tokens=options.tokens, num_repeats=options.repeats)
    nic_bytes_per_s = options.nic_mbit * 1e6 / 8
    problem = box_problem()
    if problem is not None:
        print(f"benchmarks.routing: error: no cluster in a box here: {problem}", file=sys.stderr)
        return 2
    try:
        rates = measure(setup, setup.ranks_per_node, nic_bytes_per_s)
        shared = replace(setup, kinds=setup.kinds[1:], num_repeats=1)  # a ring is the same over one card
        rates += measure(shared, 1, nic_bytes_per_s)
    except BoxError as error:
        print(f"benchmarks.routing: error: {error}", file=sys.stderr)
        return 1
    report = markdown(rates, remap_rows(), setup, nic_bytes_per_s)
    print(report)
    if options.out is not None:
        options.out.write_text(report, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
