"""``longhaul plan``: price training steps over given sequence lengths on a cluster, without a device or torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace

from launch import plan_output
from launch.arguments import CommandParser
from launch.plan_job import Job, count, read_job
from launch.plan_replay import with_replays
from launch.result_file import check_target, write_result
from planner.codec import suggest
from planner.errors import EXIT_OK, InfeasibleError, SpecError
from planner.inputs.files import cluster_names, model_names
from planner.inputs.length_generators import length_names
from planner.pages.planned_step import Candidate, PlannedStep, best_candidate
from planner.pages.policy_reasons import what_helps
from planner.pricing.simulate import simulate
from planner.schedules.exchange import attention_names

_ALL = "all"


def run(arguments: list[str]) -> int:
    """Plan, print, and return the exit code. Raises SpecError (2) and InfeasibleError (94), each with one line."""
    parser = _parser()
    flags, unknown = parser.parse_known_args(arguments)
    if flags.help:
        print(parser.format_help(), end="")
        return EXIT_OK
    if unknown:
        flag = unknown[0].split("=")[0]
        hint = suggest(flag, parser._option_string_actions) if flag.startswith("--") else ""
        raise SpecError(f"longhaul plan: unknown argument {unknown[0]!r}{hint}; see longhaul plan --help")
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


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "longhaul plan",
        "Plan training steps over sequences of these lengths and say whether they fit and what they cost.",
    )
    add = parser.add_argument
    add("--lengths", metavar="FILE|NAME",
        help=f"file with one sequence length (tokens) per line, taken in order; or {', '.join(length_names())}")
    add("--model", default="tiny", metavar="NAME|FILE", help=f"{', '.join(model_names())} or a .yaml file")
    add("--cluster", default="laptop-cpu", metavar="NAME|FILE", help=f"{', '.join(cluster_names())} or a .yaml file")
    add("--cost", metavar="FILE", help="times measured by longhaul calibrate, instead of the cluster's data sheet")
    add("--strategy", default="adaptive", metavar="NAME",
        help="a strategy, or all to compare every one on the same batches (default adaptive)")
    add("--degree", metavar="D", help="ranks per group, for static (default: the best one)")
    add("--attention", default="auto", metavar="KIND", help=f"{', '.join(attention_names())} (default auto)")
    add("--tensor-parallel", metavar="N", help="devices that share every layer of a data rank (default 1)")
    add("--pipeline-parallel", metavar="N", help="pipeline stages of every data rank (default 1)")
    add("--memory", default="keep", metavar="POLICY",
        help="keep (default), swap, recompute, chunk (SeCO, exact), or auto (the best one for each microbatch); "
        "adaptive can use all of them, hdp and hdp-floor only swap")
    add("--batch-sequences", metavar="N", help="sequences per step (default 512)")
    add("--batch-tokens", metavar="N", help="instead: at most this many tokens per step, e.g. 512K")
    add("--max-length", metavar="N", help="drop longer sequences, e.g. 192K (= 196,608 tokens)")
    add("--steps", default="3", metavar="N", help="plan the first N batches (default 3)")
    add("--seed", metavar="N", help="seed for named lengths (default 0)")
    add("--device-budget", metavar="BYTES",
        help='bytes a device may use, e.g. "30 GiB" (default: memory minus reserve)')
    add("--json", metavar="-|FILE", help="write the result as JSON; - prints it and nothing else")
    add("--trace", metavar="FILE", help="write the simulated steps as a trace for ui.perfetto.dev")
    add("--html", metavar="FILE", help="write one page with timeline, lengths, memory and comparison (needs plotly)")
    return parser


def _check_strategy(flags: argparse.Namespace) -> None:
    from planner.step_planner import check_strategy

    degree = count(flags.degree, "--degree")
    if flags.strategy != _ALL:
        check_strategy(flags.strategy, degree)
    elif degree is not None:
        raise SpecError("--degree belongs to --strategy static; with --strategy all each one chooses its own")


def _candidates(job: Job, flags: argparse.Namespace) -> tuple[Candidate, ...]:
    """One candidate, or one per strategy. Raises SpecError or InfeasibleError if none can plan every batch."""
    from rich.console import Console

    from planner.step_planner import STRATEGIES

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
    from planner.step_planner import plan_step

    for index, lengths in enumerate(job.batches):
        plan = plan_step(
            lengths, step=index, num_ranks=job.num_ranks, cost=job.cost, limits=job.limits, strategy=strategy,
            degree=degree,
        )
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
