"""What the engine adds to the attention kernel's time: rings and zones on one device, compared with one flash call.

    python -m benchmarks.engine_overhead [--tokens 4096 16384 32768] [--out benchmarks/results/engine_overhead.md]

A ring of 8 cuts one causal triangle into the rounds of 8 ranks. Zones give the same 8 ranks a cluster ring, two node
rings and local documents, as Zeppelin does. All ranks run on this one device, one at a time, through the engine's own
walk over rounds, and messages are copied in memory. Together they do exactly the work of one kernel call on the whole
documents, forward and backward. So the ratio of the two times is the cost of cutting, copying, merging and smaller
calls. To tell these apart, the same kernel calls are run once more by themselves, and the copies, which a network would
make, are timed. The overhead falls as sequences grow, so several sizes are shown. On a CPU everything runs on one core
and CPU seconds count, which other programs disturb least; with a CUDA device it runs there, in bf16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks.peers.kernel import packed_pairs
from benchmarks.step_report import conditions_here
from launch import environment
from parallel.comm import Message
from parallel.engine import AttentionEngine, MicrobatchAttention
from parallel.kernel import AttentionKernel, Pairs, choose_kernel
from parallel.program import compile_rank_program
from planner.errors import EXIT_OK, SpecError
from planner.plan import (
    AttentionGroup,
    AttentionKind,
    Microbatch,
    Sequence,
    Sharding,
    SolveReport,
    SolveStatus,
    Span,
    StepPlan,
)

GOAL_OVERHEAD = 0.10
_ZONE_RANKS = 8
_FORWARD_AND_BACKWARD = 3.5
"""Matrix products of forward and backward over those of the forward: 2 in the forward and 5 in the backward, which
recomputes the scores (FlashAttention-2, arXiv 2307.08691, section 4.1)."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """Documents, by their lengths in tokens, and the groups that run them."""

    name: str
    lengths: tuple[int, ...]
    num_ranks: int
    groups: tuple[AttentionGroup, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured: medians over the repeats. ``ratio``: engine / one call. ``pieces_ratio``: the engine's kernel
    calls alone / one call. ``copies_ratio``: copies in place of messages / one call (0 on CUDA, where they are not
    timed). ``difference``: largest relative difference of any result."""

    case: Case
    dtype: torch.dtype
    call_s: float
    engine_s: float
    ratio: float
    pieces_ratio: float
    copies_ratio: float
    flop: float
    difference: float


def ring_case(num_tokens: int, degree: int) -> Case:
    """One document over a ring."""
    group = AttentionGroup(kind=AttentionKind.RING, ranks=tuple(range(degree)), sequences=(0,))
    return Case(f"ring of {degree}", (num_tokens,), degree, (group,))


def zone_case(num_tokens: int) -> Case:
    """Half of the tokens in one document over all ranks, a quarter in two node rings, the rest local."""
    node, rank_tokens = _ZONE_RANKS // 2, num_tokens // (4 * _ZONE_RANKS)
    lengths = (num_tokens // 2, num_tokens // 8, num_tokens // 8, *[rank_tokens] * _ZONE_RANKS)
    ring, ranks = AttentionKind.RING, tuple(range(_ZONE_RANKS))
    groups = [
        AttentionGroup(kind=ring, ranks=ranks, sequences=(0,)),
        AttentionGroup(kind=ring, ranks=ranks[:node], sequences=(1,)),
        AttentionGroup(kind=ring, ranks=ranks[node:], sequences=(2,)),
    ]
    groups += [AttentionGroup(kind=AttentionKind.LOCAL, ranks=(rank,), sequences=(3 + rank,)) for rank in ranks]
    return Case(f"zones on {_ZONE_RANKS}", lengths, _ZONE_RANKS, tuple(groups))


class Turn:
    """The turn to use the device: one rank at a time has it, and passes it on while it waits for a message."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.sent: dict[tuple[int, int], deque[torch.Tensor]] = defaultdict(deque)
        self.errors: list[Exception] = []
        self.copies_s = 0.0


@dataclass(frozen=True, slots=True)
class _PendingCopies:
    turn: Turn
    rank: int
    receives: tuple[Message, ...]

    def wait(self) -> None:
        for message in self.receives:
            sent, edge = self.turn.sent, (message.rank, self.rank)
            while not sent[edge]:
                if self.turn.errors:
                    raise RuntimeError("another rank failed")
                self.turn.changed.wait()
            start_s = time.thread_time()
            message.tensor.copy_(sent[edge].popleft())
            self.turn.copies_s += time.thread_time() - start_s


@dataclass(frozen=True, slots=True)
class LoopbackWire:
    """An exchange between ranks of this process. A message is copied once, into its receiver's buffer."""

    turn: Turn
    rank: int

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> _PendingCopies:
        for message in sends:
            if message.tensor.numel():
                self.turn.sent[(self.rank, message.rank)].append(message.tensor)
        self.turn.changed.notify_all()
        return _PendingCopies(self.turn, self.rank, tuple(m for m in receives if m.tensor.numel()))


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of a case: its attention and the rows of the packed documents that it holds."""

    attention: MicrobatchAttention
    rows: torch.Tensor
    inputs: Tensors = field(repr=False)


class RecordingKernel:
    """Runs a kernel and records its calls, so that they can be run again."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self.name = kernel.name
        self._kernel = kernel
        self._calls: list[Callable[[], object]] = []

    def forward(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, pairs: Pairs, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._calls.append(partial(self._kernel.forward, q_TNH, k_SKH, v_SKH, pairs, scale))
        return self._kernel.forward(q_TNH, k_SKH, v_SKH, pairs, scale)

    def backward(
        self, dout_TNH: torch.Tensor, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor,
        out_TNH: torch.Tensor, lse_TN: torch.Tensor, pairs: Pairs, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        arguments = dout_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, pairs, scale
        self._calls.append(partial(self._kernel.backward, *arguments))
        return self._kernel.backward(*arguments)

    def play(self) -> None:
        for call in self._calls:
            call()


def make_ranks(case: Case, kernel: AttentionKernel, inputs: Tensors, turn: Turn) -> list[Rank]:
    """The ranks of a case. ``inputs``: q, k, v and the output's gradient of all packed documents."""
    device = inputs[0].device
    sequences = tuple(Sequence(number, size) for number, size in enumerate(case.lengths))
    ranks = tuple(range(case.num_ranks))
    plan = StepPlan(
        step=0, strategy=case.name, num_ranks=case.num_ranks, sequences=sequences,
        microbatches=(Microbatch(ranks=ranks, groups=case.groups, predicted_s=0.0, peak_bytes=0),),
        sharding=Sharding.GATHER_ONCE, predicted_s=0.0, peak_bytes=0, cost_digest="",
        solver=SolveReport(status=SolveStatus.STATIC, objective_s=0.0, bound_s=0.0),
    )
    edges = [sum(case.lengths[:number]) for number in range(len(case.lengths))]
    found = []
    for rank in ranks:
        (microbatch,) = compile_rank_program(plan, rank).microbatches
        attention = AttentionEngine(kernel, LoopbackWire(turn, rank), device).bind(
            microbatch, num_query_heads=inputs[0].shape[1], num_kv_heads=inputs[1].shape[1],
            head_dim=inputs[0].shape[2],
        )
        rows = torch.cat([_rows(span, edges) for span in microbatch.spans]).to(device)
        found.append(Rank(attention, rows, tuple(x[rows] for x in inputs)))
    return found


def _rows(span: Span, edges: list[int]) -> torch.Tensor:
    return torch.arange(span.start_token, span.stop_token) + edges[span.sequence]


def run_ranks(ranks: list[Rank], turn: Turn) -> list[Tensors]:
    """Run the ranks in turns. Returns out, dq, dk, dv of each; raises what the first rank to fail raised."""
    results: list[Tensors] = [()] * len(ranks)

    def body(number: int) -> None:
        with turn.changed:
            try:
                results[number] = _attend(ranks[number])
            except Exception as error:  # raised again in the thread that waits for this one
                turn.errors.append(error)
                turn.changed.notify_all()

    threads = [threading.Thread(target=body, args=(number,), daemon=True) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if turn.errors:
        raise turn.errors[0]
    return results


def _attend(rank: Rank) -> Tensors:
    """Forward and backward of all groups, as the engine's autograd function runs them."""
    q, k, v, dout = rank.inputs
    slices = [slice(*runner.group.rows) for runner in rank.attention.runners]
    forward = [
        runner.walker.forward(q[rows], k[rows], v[rows])
        for runner, rows in zip(rank.attention.runners, slices, strict=True)
    ]
    grads: list[Tensors] = []
    for runner, rows, (out, lse) in zip(rank.attention.runners, slices, forward, strict=True):
        grads.append(runner.walker.backward(dout[rows], q[rows], k[rows], v[rows], out, lse))
    parts = [(out, *grad) for (out, _), grad in zip(forward, grads, strict=True)]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def measure(
    case: Case, *, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, repeats: int
) -> Outcome:
    """Time one call, its pieces and the engine in turn. Raises ValueError where their results differ."""
    kernel, turn = choose_kernel(device, dtype), Turn()
    torch.manual_seed(0)
    num_tokens, (num_queries, num_keys) = sum(case.lengths), heads
    q, k, v, dout = (
        torch.randn(num_tokens, count, head_dim, device=device, dtype=dtype)
        for count in (num_queries, num_keys, num_keys, num_queries)
    )
    ranks = make_ranks(case, kernel, (q, k, v, dout), turn)
    pairs, scale = packed_pairs(case.lengths, device), head_dim**-0.5

    def one_call() -> Tensors:
        out, lse = kernel.forward(q, k, v, pairs, scale)
        return (out, *kernel.backward(dout, q, k, v, out, lse, pairs, scale))

    recorder = RecordingKernel(kernel)
    recorded = run_ranks(make_ranks(case, recorder, (q, k, v, dout), turn), turn)
    difference = _difference(one_call(), recorded, ranks)  # also the warm-up
    if not difference <= _TOLERANCE[dtype]:
        raise ValueError(f"{case.name}, {dtype}: results differ by {difference:.1e}")
    times: list[tuple[float, float, float, float]] = []
    for _ in range(repeats):
        call_s, pieces_s = _timed(one_call, device), _timed(recorder.play, device)
        turn.copies_s = 0.0
        times.append((call_s, pieces_s, _timed(lambda: run_ranks(ranks, turn), device), turn.copies_s))
    flop = 2.0 * sum(size * size for size in case.lengths) * num_queries * head_dim * _FORWARD_AND_BACKWARD
    return Outcome(
        case=case, dtype=dtype, call_s=statistics.median(call for call, *_ in times),
        engine_s=statistics.median(engine for *_, engine, _ in times),
        ratio=statistics.median(engine / call for call, _, engine, _ in times),
        pieces_ratio=statistics.median(pieces / call for call, pieces, *_ in times),
        copies_ratio=0.0 if device.type == "cuda" else statistics.median(each[3] / each[0] for each in times),
        flop=flop, difference=difference,
    )


def _difference(whole: Tensors, parts: list[Tensors], ranks: list[Rank]) -> float:
    worst = 0.0
    for number, wanted in enumerate(whole):
        for rank, part in zip(ranks, parts, strict=True):
            gap = (part[number].double() - wanted[rank.rows].double()).abs().max()
            worst = max(worst, float(gap / wanted.double().abs().max()))
    return worst


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``run`` on a CUDA device; on a CPU, CPU seconds of this process, of which one thread runs at a
    time."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start_s = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start_s


def markdown(outcomes: SequenceOf[Outcome], facts: SequenceOf[str]) -> str:
    lines = [
        "# The engine's overhead: rings and zones on one device against one flash call of the same work", "",
        "| work | tokens | dtype | call s | TFLOP/s | engine s | engine/call | smaller calls | copies | rest | goal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in outcomes:
        rest = found.ratio - found.pieces_ratio - found.copies_ratio
        lines.append(
            f"| {found.case.name} | {sum(found.case.lengths):,} | {str(found.dtype).removeprefix('torch.')} | "
            f"{found.call_s:.4f} | {found.flop / found.call_s / 1e12:.3f} | {found.engine_s:.4f} | {found.ratio:.3f} | "
            f"{found.pieces_ratio - 1:+.3f} | {found.copies_ratio:+.3f} | {rest:+.3f} | {_verdict([found])} |"
        )
    sizes = dict.fromkeys(sum(found.case.lengths) for found in outcomes)
    verdicts = [
        f"{size:,} tokens: {_verdict([each for each in outcomes if sum(each.case.lengths) == size])}" for size in sizes
    ]
    goal = f"Goal, at most {1 + GOAL_OVERHEAD:.2f} for all work of a size: {'; '.join(verdicts)}."
    return "\n".join([*lines, "", goal, "", *(f"- {fact}" for fact in facts)]) + "\n"


def _verdict(outcomes: SequenceOf[Outcome]) -> str:
    return "met" if all(found.ratio <= 1 + GOAL_OVERHEAD for found in outcomes) else "NOT met"


def main(arguments: SequenceOf[str] | None = None) -> int:
    """Measure, print the report and write it where asked. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_overhead", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[4096, 16_384, 32_768], help="of all documents (%(default)s)"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=sorted(_DTYPES), help="bf16 on CUDA, else fp32, and bf16 below the largest size"
    )
    parser.add_argument("--heads", type=int, default=2, help="query heads (%(default)s)")
    parser.add_argument("--kv-heads", type=int, default=1, help="KV heads (%(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of all ways in turn (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the report to this file (Markdown)")
    options = parser.parse_args(arguments)
    try:
        _check(options)
    except SpecError as error:
        print(f"benchmarks.engine_overhead: error: {error}", file=sys.stderr)
        return error.exit_code
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # each rank is a thread here, and torch gives every thread its own pool
    outcomes = [
        measure(
            case, device=device, dtype=_DTYPES[dtype], heads=(options.heads, options.kv_heads),
            head_dim=options.head_dim, repeats=options.repeats,
        )
        for dtype, num_tokens in _sizes(options, device)
        for case in (ring_case(num_tokens, _ZONE_RANKS), zone_case(num_tokens))
    ]
    report = markdown(outcomes, _facts(options, device, outcomes, arguments))
    if options.out is not None:
        options.out.write_text(report, encoding="utf-8")
    print(report)
    return EXIT_OK


def _sizes(options: argparse.Namespace, device: torch.device) -> list[tuple[str, int]]:
    """The (dtype, tokens) to measure, in the report's order."""
    if options.dtypes is not None or device.type == "cuda":
        return [(dtype, num_tokens) for dtype in options.dtypes or ("bf16",) for num_tokens in options.tokens]
    smaller = [num_tokens for num_tokens in options.tokens if num_tokens < max(options.tokens)]
    return [*(("fp32", num_tokens) for num_tokens in options.tokens), *(("bf16", each) for each in smaller)]


def _check(options: argparse.Namespace) -> None:
    if min(options.tokens) < 4 * _ZONE_RANKS:
        raise SpecError(f"--tokens {min(options.tokens)}: at least {4 * _ZONE_RANKS}")
    for name, lowest in (("heads", 1), ("kv_heads", 1), ("head_dim", 8), ("repeats", 1)):
        if getattr(options, name) < lowest:
            raise SpecError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {lowest}")
    if options.heads % options.kv_heads:
        raise SpecError(f"--heads {options.heads}: not a multiple of --kv-heads {options.kv_heads}")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise SpecError(f"{options.out}: folder {options.out.parent} does not exist")


def _facts(
    options: argparse.Namespace, device: torch.device, outcomes: SequenceOf[Outcome],
    arguments: SequenceOf[str] | None,
) -> list[str]:
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(("python -m benchmarks.engine_overhead", *words))
    conditions = conditions_here(command, num_cores=environment.num_cores())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{conditions.cpu}, one core"
    return [
        f"`{conditions.command}`, {conditions.day}",
        f"{where}, torch {conditions.torch_version}, kernel {choose_kernel(device, outcomes[0].dtype).name}",
        f"{options.heads} query and {options.kv_heads} KV heads of {options.head_dim}; "
        "forward and backward of one layer's attention",
        f"all ways ran in turn, {options.repeats} times; times are medians, ratios the median of the repeats' own",
        "smaller calls: the engine's kernel calls played alone, over one call; copies: messages copied into their "
        "receivers' buffers; rest: merging, sums of gradients, rows copied to be sent, Python"
        + ("" if device.type == "cuda" else "; all in CPU seconds"),
        f"TFLOP/s count the causal half of the scores, {_FORWARD_AND_BACKWARD} times the forward's products",
        "results of both ways agree to "
        + ", ".join(
            f"{max(found.difference for found in outcomes if found.dtype is dtype):.0e} ({str(dtype)[6:]})"
            for dtype in dict.fromkeys(found.dtype for found in outcomes)
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
