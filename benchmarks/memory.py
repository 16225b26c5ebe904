"""Activation memory on a CPU-only machine: what each way to keep fewer activations saves and costs, ours and torch's.

One rank runs one local sequence per step. Every figure comes from a process of its own, and what is compared runs in
turn in the same call. Each part has its goals; the exit code says whether all of them were met:

    python -m benchmarks.memory --part ways      peak and step time of ours and of torch's ways
    python -m benchmarks.memory --part predict   calibrated prediction of the peak beside the measured one
    python -m benchmarks.memory --part longest   8 times the longest dense sequence within one limit (RLIMIT_DATA)
    python -m benchmarks.memory --part course --trace FILE --picture FILE
                                                 one step over time: resident memory, layers, copies

``--out FILE`` writes the report beside stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.memory_picture import picture, trace
from benchmarks.memory_run import (
    AMPLE,
    Course,
    Measured,
    MemoryWorkload,
    Predicted,
    course,
    longest_dense,
    measure,
    predict,
)
from planner.measured.copy_times import Interval
from planner.units import MIB, format_bytes, format_seconds

OURS = (
    "keep", "keep + MLP", "recompute", "recompute + MLP", "swap 0", "swap 0.5", "swap 1", "swap measured",
    "swap 1 + MLP", "seco", "seco disk",
)
TORCH = ("checkpoint", "selective", "save_on_cpu", "hooks to disk")
WAYS = (*OURS, *TORCH)
_PREDICTED = ("keep", "recompute", "swap 0.25", "seco", AMPLE)
_LONGEST = ("swap 0", "recompute", "checkpoint")
_COURSE = ("keep", "recompute", "swap 0.25", "seco")
_TIMES_DENSE = 8
_MOST_OVER = 1.05
_MOST_SLOWER = 1.4
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OMP_NUM_THREADS": "1"}
"""The environment that ``longhaul train`` sets for its ranks on Linux (``launch.environment``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A sentence and whether it holds."""

    text: str
    met: bool

    def __str__(self) -> str:
        return f"goal {'met' if self.met else 'NOT met'}: {self.text}"


Report = tuple[list[str], list[Goal]]
"""Markdown lines and goals."""


def part_ways(options: argparse.Namespace, workload: MemoryWorkload) -> Report:
    """Measure every way at one length."""
    rounds: dict[str, list[Measured]] = {}
    for _ in range(options.rounds):
        for way in WAYS if options.ways is None else ("keep", *options.ways.split(",")):
            rounds.setdefault(way, []).append(_measured(options, way=way, length=options.tokens))
    found = {way: best(several) for way, several in rounds.items()}
    losses = [each.loss for each in found.values()]
    return ways_table(found), [
        Goal(text=f"all ways have the same loss (they differ by {max(losses) - min(losses):.1e})",
             met=max(losses) - min(losses) < 1e-4),
    ]


def ways_table(found: dict[str, Measured]) -> list[str]:
    """Markdown: our ways, then torch's, relative to plain autograd (``keep``)."""
    base = found["keep"]
    lines = ["| way | peak | of keep | step | over keep | CPU | over keep | swapped |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for way, each in found.items():
        name = f"torch: {way}" if way in TORCH else way
        lines.append(
            f"| {name} | {format_bytes(each.peak_bytes)} | {each.peak_bytes / base.peak_bytes:.2f} | "
            f"{format_seconds(each.step_s)} | {each.step_s / base.step_s:.2f}x | {format_seconds(each.cpu_s)} | "
            f"{each.cpu_s / base.cpu_s:.2f}x | {format_bytes(each.swapped_bytes)} |"
        )
    return [*lines, "", *sorted({each.note for way, each in found.items() if way == "swap measured"})]


def best(several: SequenceOf[Measured]) -> Measured:
    """The quickest step and the highest peak."""
    return replace(
        several[0], peak_bytes=max(each.peak_bytes for each in several), step_s=min(each.step_s for each in several),
        cpu_s=min(each.cpu_s for each in several),
    )


def part_predict(options: argparse.Namespace, workload: MemoryWorkload) -> Report:
    """Predicted and measured resident sets: one process calibrates, then runs steps of several lengths. All ways but
    the last run as where memory may bind; the last one (``keep ample``) as where memory is ample."""
    lengths = [options.tokens // 2, options.tokens]
    rows = []
    for _ in range(options.rounds):
        for way in _PREDICTED if options.ways is None else options.ways.split(","):
            rows += [Predicted(**row) for row in _worker(options, "predict", way=way, lengths=lengths)]
    return predict_table(rows)


def predict_table(rows: SequenceOf[Predicted]) -> Report:
    """Markdown and the goal: where memory may bind, predictions are never too low and at most 5 % too high."""
    lines = ["| way | tokens | predicted | measured | over | tier predicted | tier measured | over |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]
    ratios = [1.0] if all(row.way == AMPLE for row in rows) else []
    for row in rows:
        if row.way != AMPLE:
            ratios.append(row.predicted_bytes / row.measured_bytes)
        tier = "| | | |"
        if row.tier_measured_bytes:
            ratios.append(row.tier_predicted_bytes / row.tier_measured_bytes)
            tier = (f"| {format_bytes(row.tier_predicted_bytes)} | {format_bytes(row.tier_measured_bytes)} | "
                    f"{ratios[-1] - 1:+.1%} |")
        lines.append(
            f"| {row.way} | {row.length:,} | {format_bytes(row.predicted_bytes)} | {format_bytes(row.measured_bytes)} "
            f"| {row.predicted_bytes / row.measured_bytes - 1:+.1%} {tier}"
        )
    return lines, [Goal(
        text="predicted peaks are 0 to 5 % above measured ones where memory may bind "
             f"(here {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%})",
        met=min(ratios) >= 1.0 and max(ratios) <= _MOST_OVER,
    )]


def part_longest(options: argparse.Namespace, workload: MemoryWorkload) -> Report:
    """Find the longest dense sequence within a limit, then run 8 times as many tokens within the same limit."""
    budget_bytes = int(options.budget_mib * MIB)
    dense = _worker(options, "longest", lengths=[options.tokens], budget_bytes=budget_bytes)
    length, limit_bytes = _TIMES_DENSE * dense["length"], dense["limit_bytes"]
    found = {}
    for _ in range(options.rounds):
        for way in _LONGEST if options.ways is None else options.ways.split(","):
            each = _measured(options, way=way, length=length, limit_bytes=limit_bytes)
            found[way] = best([found[way], each]) if way in found and each.fits else each
        if "checkpoint" in found and not found["checkpoint"].fits:
            found["checkpoint"] = _measured(options, way="checkpoint", length=length)  # for its time, without a limit
    return longest_table(dense["length"], limit_bytes, budget_bytes, found)


def longest_table(dense_tokens: int, limit_bytes: int, budget_bytes: int, found: dict[str, Measured]) -> Report:
    """Markdown and the two goals."""
    lines = [
        f"RLIMIT_DATA {format_bytes(limit_bytes)}: {format_bytes(budget_bytes)} over what a process has after a first "
        f"small step; longest dense sequence: {dense_tokens:,} tokens", "",
        "| way | tokens | fits | peak over start | resident set | step | over torch's checkpointing |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    base = found["checkpoint"]
    for way, each in found.items():
        name = f"torch: {way}" if way in TORCH else way
        lines.append(
            f"| {name} | {each.length:,} | {'yes' if each.fits else 'no'} | {format_bytes(each.peak_bytes)} | "
            f"{format_bytes(each.resident_bytes)} | {format_seconds(each.step_s)} | {each.step_s / base.step_s:.2f}x |"
        )
    swaps = [each for way, each in found.items() if way.startswith("swap")]
    ratio = min((each.step_s / base.step_s for each in swaps if each.fits), default=float("inf"))
    return lines, [
        Goal(text=f"{_TIMES_DENSE} times the longest dense sequence fits the same limit with the disk tier",
             met=any(each.fits for each in swaps)),
        Goal(text=f"its step takes at most {_MOST_SLOWER} times full recomputation's (here {ratio:.2f})",
             met=ratio <= _MOST_SLOWER),
    ]


def part_course(options: argparse.Namespace, workload: MemoryWorkload) -> Report:
    """Record one step over time for each way; write picture and trace where asked for."""
    ways = _COURSE if options.ways is None else options.ways.split(",")
    courses = []
    for way in ways:
        plain = _worker(options, "course", way=way, lengths=[options.tokens])
        intervals = tuple(Interval(**each) for each in plain["intervals"])
        samples = tuple((seconds, num_bytes) for seconds, num_bytes in plain["samples"])
        courses.append(Course(**{**plain, "intervals": intervals, "samples": samples}))
    swapped = [each for each in courses if each.intervals]
    if options.picture:
        Path(options.picture).write_text(picture(courses), encoding="utf-8")
    if options.trace and swapped:
        Path(options.trace).write_text(json.dumps(trace(swapped[0])), encoding="utf-8")
    lines = ["| way | highest | seconds | of the copies' seconds hidden |", "|---|--:|--:|--:|"]
    for each in courses:
        hidden = f"{each.hidden_share:.0%}" if each.intervals else ""
        lines.append(
            f"| {each.way} | {format_bytes(max(size for _, size in each.samples))} | "
            f"{format_seconds(each.samples[-1][0])} | {hidden} |"
        )
    return lines, []


PARTS: dict[str, Callable[[argparse.Namespace, MemoryWorkload], Report]] = {
    "ways": part_ways, "predict": part_predict, "longest": part_longest, "course": part_course,
}
_SHAPES = {"ways": (8, 256, 2048), "predict": (8, 256, 4096), "longest": (64, 128, 1024), "course": (12, 256, 1024)}
"""Layers, hidden size and tokens of each part (of ``longest``: more tokens than fit dense)."""


def _measured(options: argparse.Namespace, **arguments: Any) -> Measured:
    found = Measured(**_worker(options, "measure", **{**arguments, "lengths": [arguments["length"]]}))
    print(f"{found.way:<14} {found.length:>7,} tokens: {found.peak_bytes / MIB:8.1f} MiB {found.step_s:7.2f} s, CPU "
          f"{found.cpu_s:.2f} s{'' if found.fits else ' does not fit'}", file=sys.stderr)
    return found


def _worker(options: argparse.Namespace, job: str, **arguments: Any) -> Any:
    """Take one measurement in a process of its own and return its answer."""
    told = {"job": job, "workload": asdict(_workload(options)), **arguments}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--worker", json.dumps(told)], capture_output=True, text=True,
        check=False, env={**os.environ, **_HUGE_PAGES},
    )
    if done.returncode:
        raise SystemExit(f"{job} {arguments} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _work(told: dict[str, Any]) -> None:
    workload, lengths = MemoryWorkload(**told["workload"]), tuple(told["lengths"])
    if told["job"] == "measure":
        answer: Any = asdict(measure(told["way"], lengths[0], workload, limit_bytes=told.get("limit_bytes", 0)))
    elif told["job"] == "longest":
        answer = longest_dense(workload, told["budget_bytes"], lengths[0])
    elif told["job"] == "predict":
        answer = [asdict(row) for row in predict(told["way"], lengths, workload)]
    else:
        answer = asdict(course(told["way"], lengths[0], workload))
    print(json.dumps(answer))


def _workload(options: argparse.Namespace) -> MemoryWorkload:
    return MemoryWorkload(
        num_layers=options.layers, dim=options.dim, repeats=options.repeats, chunk_tokens=options.chunk_tokens,
        mlp_chunk_tokens=options.mlp_chunk_tokens,
    )


def main(arguments: SequenceOf[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="ways")
    parser.add_argument("--tokens", type=int, help="of the sequence; of longest: more than fits dense")
    parser.add_argument("--ways", help=f"some of: {', '.join(WAYS)}")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dim", type=int, help="hidden size, a multiple of 64")
    default = MemoryWorkload()
    parser.add_argument("--chunk-tokens", type=int, default=default.chunk_tokens, help="of seco")
    parser.add_argument("--mlp-chunk-tokens", type=int, default=default.mlp_chunk_tokens, help="of ways with MLP")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="steps in a process")
    parser.add_argument("--rounds", type=int, default=1, help="processes for each way")
    parser.add_argument("--budget-mib", type=float, default=128, help="of longest")
    parser.add_argument("--out", type=Path, help="file of the report")
    parser.add_argument("--trace", help="of course: Chrome trace of the first way that swaps")
    parser.add_argument("--picture", help="of course: SVG")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        _work(json.loads(options.worker))
        return 0
    layers, dim, tokens = _SHAPES[options.part]
    options.layers, options.dim = options.layers or layers, options.dim or dim
    options.tokens = options.tokens or tokens
    lines, goals = PARTS[options.part](options, _workload(options))
    head = (f"`--part {options.part}`: {options.layers} layers, hidden {options.dim}, {options.tokens:,} tokens, fp32, "
            "one rank, one thread, disk tier; quickest step, highest peak")
    text = "\n".join([head, "", *lines, "", *map(str, goals)]) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0 if all(goal.met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
