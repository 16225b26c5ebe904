"""Planning time of each strategy, compared with the greedy plan's (which runs when a planner is late), and start-up.

    OMP_NUM_THREADS=1 python -m benchmarks.planner_speed [--out FILE] [--repeats N] [--quick]

For each case and strategy: milliseconds of CPU time of this process for one step, the least of some repeats, and the
ratio to the greedy plan's time for the same step in the same run. Below them are verification and simulation, which
every plan goes through. Last comes the start-up time of ``longhaul plan --help`` over a bare interpreter's. Ratios
carry over from machine to machine, milliseconds do not. Nothing is asserted: tests count calls (``tests/work.py``).
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from planner.cost.data_sheet import derive_cost
from planner.cost.limits import PlanLimits
from planner.inputs.files import load_cluster, load_model
from planner.inputs.length_generators import generate_lengths
from planner.plan import AttentionKind
from planner.pricing.problem import StepProblem
from planner.pricing.simulate import simulate
from planner.pricing.verify import verify_plan
from planner.step_planner import STRATEGIES, greedy_step, plan_step

LENGTHS, MODEL, LONGEST = "github", "llama-3-8b", 256 * 1024
COLUMNS = ("what", "ms", "times the greedy plan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One step on one cluster."""

    name: str
    problem: StepProblem


def make_case(cluster_name: str, num_sequences: int) -> Case:
    """A step of ``num_sequences`` sequences of at most ``LONGEST`` tokens on this cluster, with its whole budget."""
    cluster, model = load_cluster(cluster_name), load_model(MODEL)
    device = cluster.device
    limits = PlanLimits(
        device_budget_bytes=device.memory_bytes - device.reserved_bytes, max_ulysses_degree=model.num_query_heads,
        kinds=(AttentionKind.ULYSSES, AttentionKind.RING, AttentionKind.USP), devices_per_node=cluster.devices_per_node,
    )
    lengths = tuple(islice((size for size in generate_lengths(LENGTHS) if size <= LONGEST), num_sequences))
    cost = derive_cost(cluster, model, num_ranks=cluster.num_ranks)
    name = f"{cluster_name}, {MODEL}, {cluster.num_ranks} ranks, {num_sequences} sequences of {LENGTHS}"
    problem = StepProblem(lengths=lengths, num_ranks=cluster.num_ranks, cost=cost, limits=limits)
    return Case(name=name, problem=problem)


def cpu_s(action: Callable[[], object], repeats: int) -> float:
    """Least CPU seconds of this process over the repeats, after a first run that warms caches."""
    action()
    seconds = []
    for _ in range(repeats):
        started_s = time.process_time()
        action()
        seconds.append(time.process_time() - started_s)
    return min(seconds)


def measure(case: Case, repeats: int) -> dict[str, float]:
    """CPU seconds by name of what is measured, the greedy plan first."""
    found = {"greedy": cpu_s(lambda: greedy_step(case.problem, step=0), repeats)}
    for name in STRATEGIES:
        found[name] = cpu_s(lambda name=name: plan_step(case.problem, step=0, strategy=name), repeats)
    plan = plan_step(case.problem, step=0, strategy="adaptive")
    found["verify an adaptive plan"] = cpu_s(
        lambda: verify_plan(plan, case.problem), repeats
    )
    found["simulate an adaptive plan"] = cpu_s(lambda: simulate(plan, case.problem.cost), repeats)
    return found


def start_ratio(repeats: int) -> float:
    """Wall seconds of ``longhaul plan --help`` over those of an interpreter that does nothing; least of the repeats."""
    commands = ([sys.executable, "-c", "pass"], [sys.executable, "-m", "launch.cli", "plan", "--help"])
    least = [float("inf")] * 2
    for _ in range(repeats):
        for place, command in enumerate(commands):
            started_s = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
            least[place] = min(least[place], time.perf_counter() - started_s)
    return least[1] / least[0]


def report(cases: Sequence[Case], repeats: int) -> Iterator[str]:
    """The report in Markdown, line by line while it is measured."""
    yield f"{platform.machine()}, Python {platform.python_version()}, one process, least of {repeats}"
    for case in cases:
        yield f"\n{case.name}\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|" + " --- |" * len(COLUMNS)
        found = measure(case, repeats)
        for name, seconds in found.items():
            yield f"| {name} | {1000 * seconds:.1f} | {seconds / found['greedy']:.2f} |"
    yield f"\n`longhaul plan --help` starts in {start_ratio(repeats):.1f} times the time of a bare interpreter"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", help="write the tables here as well")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each measurement (default: 3)")
    parser.add_argument("--quick", action="store_true", help="the small case only")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    cases = [make_case("h200-64", 512)] + ([] if options.quick else [make_case("h100-1024", 2000)])
    lines = []
    for line in report(cases, options.repeats):
        print(line, flush=True)
        lines.append(line)
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
