"""``longhaul plan``: price steps over given sequence lengths on a cluster, without a device and without torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace

from launch import plan_output
from launch.plan_job import Job, count, read_job
from launch.plan_replay import with_replays
from launch.result_file import check_target, write_result
from planner.errors import EXIT_OK, InfeasibleError, SpecError
from planner.pages.planned_step import Candidate, PlannedStep, best_candidate
from planner.pages.policy_reasons import what_helps
from planner.pricing.problem import StepProblem
from planner.pricing.simulate import simulate
from planner.step_planner import STRATEGIES, check_strategy, plan_step

_ALL = "all"


def run_plan(flags: argparse.Namespace) -> int:
    """Plan, print, return the exit code. Raises SpecError and InfeasibleError with one line for people."""
    _check_strategy(flags)
    for name in ("json", "trace", "html"):
        target = getattr(flags, name)
        check_target(f"--{name}", None if (name, target) == ("json", "-") else target)
    if flags.html is not None:
        from planner.pages.html_parts import require_plotly

        require_plotly()
    job = read_job(flags)
    job, candidates = with_replays(job, _candidates(job, flags), draw=flags.trace is not None)
    best = best_candidate(candidates)
    assert best is not None  # _candidates raises if every strategy refuses
    knobs: tuple[str, ...] = ()
    if flags.json != "-" or flags.html is not None:
        knobs = plan_output.knobs_of(job, best.strategy, count(flags.degree, "--degree"))
    result = plan_output.Result(
        job=job, strategy=flags.strategy, steps=best.steps, candidates=candidates if flags.strategy == _ALL else (),
        knobs=knobs,
    )
    _write_files(result, flags)
    if flags.json != "-":
        plan_output.show(result)
    return EXIT_OK


def _check_strategy(flags: argparse.Namespace) -> None:
    degree = count(flags.degree, "--degree")
    if flags.strategy != _ALL:
        check_strategy(flags.strategy, degree)
    elif degree is not None:
        raise SpecError("--degree belongs to --strategy static; with --strategy all each one chooses its own")


def _candidates(job: Job, flags: argparse.Namespace) -> tuple[Candidate, ...]:
    """One candidate, or one per strategy. Raises SpecError or InfeasibleError if none can plan every batch."""
    from rich.console import Console

    names = tuple(STRATEGIES) if flags.strategy == _ALL else (flags.strategy,)
    degree = count(flags.degree, "--degree")
    found: list[Candidate] = []
    refusals: list[SpecError | InfeasibleError] = []
    with Console(stderr=True).status("planning") as status:  # visible on a terminal only
        for name in names:
            steps: list[PlannedStep] = []
            try:
                for step in _planned(job, name, degree):
                    steps.append(step)
                    status.update(f"planning: {name}, step {len(steps)} of {len(job.batches)} done")
                found.append(Candidate(strategy=name, steps=tuple(steps)))
            except (SpecError, InfeasibleError) as error:
                found.append(Candidate(strategy=name, refusal=f"step {len(steps)}: {error}"))
                refusals.append(error)
    if len(refusals) == len(found):
        raise _refusal(refusals, job, names)
    return tuple(found)


def _planned(job: Job, strategy: str, degree: int | None) -> Iterator[PlannedStep]:
    for index, lengths in enumerate(job.batches):
        problem = StepProblem(lengths=lengths, num_ranks=job.num_ranks, cost=job.cost, limits=job.limits)
        plan = plan_step(problem, step=index, strategy=strategy, degree=degree)
        yield PlannedStep(plan=plan, simulation=simulate(plan, job.cost))


def _refusal(
    refusals: list[SpecError | InfeasibleError], job: Job, strategies: tuple[str, ...]
) -> SpecError | InfeasibleError:
    """The error to raise if no strategy can plan every batch: that it does not fit, if one of them says so."""
    for error in refusals:
        if isinstance(error, InfeasibleError):
            hint = what_helps(strategies, job.cost, job.limits)
            return InfeasibleError(
                f"DOES NOT FIT: {job.model.name} on {job.cluster.name}: {error}{hint}", binding=error.binding,
                needed_bytes=error.needed_bytes, available_bytes=error.available_bytes,
            )
    return refusals[0]


def _write_files(result: plan_output.Result, flags: argparse.Namespace) -> None:
    if flags.trace is not None:
        from planner.pages.chrome_trace import chrome_trace

        job = result.job
        nodes_of_ranks = replace(job.cluster, devices_per_node=job.grid.node_size(job.cluster))
        trace = chrome_trace(result.steps, nodes_of_ranks)
        write_result("--trace", flags.trace, json.dumps(trace, separators=(",", ":"), allow_nan=False))
    if flags.html is not None:
        from planner.pages.plan_html import html_page

        write_result("--html", flags.html, html_page(plan_output.page(result)))
    if flags.json is not None:
        text = json.dumps(plan_output.as_json(result), indent=2, allow_nan=False)
        if flags.json == "-":
            print(text)
        else:
            write_result("--json", flags.json, text + "\n")
