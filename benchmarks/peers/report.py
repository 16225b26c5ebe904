"""The peers' part of the step benchmark's report: their speed, Longhaul's lead, and what was checked."""

from __future__ import annotations

import statistics

from benchmarks.peers.systems import PEERS
from benchmarks.step_results import (
    StepRun,
    best_peer,
    best_static,
    peer_speedups,
    peer_tokens_per_s,
    planned_errors,
    summarise,
)

GOAL_STRATEGY = "adaptive"
GOAL_SPEEDUP = 1.5
GOAL_ERROR = 0.10
GOAL_PLANS = 20


def peer_head() -> tuple[str, ...]:
    return (
        "peer and degree", "tokens/s, whole run", "against best static", "measured s/step", "microbatches/step",
        "padding", "loss error", "gradient error (first batch)",
    )


def peer_rows(run: StepRun) -> list[tuple[str, ...]]:
    """A row for each peer at each degree; the row of one that cannot run says why."""
    static_tokens_per_s = summarise(run, best_static(run)).tokens_per_s
    best = best_peer(run) if run.peers() else ""
    rows: list[tuple[str, ...]] = []
    for check in run.peer_checks:
        steps = run.of_peer(check.name)
        rate = peer_tokens_per_s(run, check.name)
        padding = sum(step.num_padding_tokens for step in steps) / sum(step.num_tokens for step in steps)
        gradient = f"{check.gradient_error:.0e}" if check.gradients_meant_right else "known to be wrong in this dtype"
        rows.append((
            f"{check.name} (best peer)" if check.name == best else check.name, f"{rate:,.0f}",
            f"{rate / static_tokens_per_s:.2f}x", f"{statistics.fmean(step.measured_s for step in steps):.3f}",
            f"{statistics.fmean(step.num_microbatches for step in steps):.1f}", f"{padding:.1%}",
            f"{check.loss_error:.0e}", gradient,
        ))
    blank = ("",) * (len(peer_head()) - 2)
    return rows + [(misfit.name, f"does not fit: {misfit.reason}", *blank) for misfit in run.peer_misfits]


def peer_findings(run: StepRun) -> list[str]:
    """A line for each strategy, compared with the best peer."""
    if not run.peers():
        return []
    best = best_peer(run)
    lines = []
    for name in run.settings.strategies:
        over_run = summarise(run, name).tokens_per_s / peer_tokens_per_s(run, best)
        ratios, fastest = peer_speedups(run, name, best), peer_speedups(run, name)
        lines.append(
            f"{name} against the best peer, {best}: {over_run:.2f}x over the run; batch by batch median "
            f"{statistics.median(ratios):.2f}x, lowest {min(ratios):.2f}x, highest {max(ratios):.2f}x; against the "
            f"fastest peer of each batch median {statistics.median(fastest):.2f}x"
        )
    return lines


def prediction_finding(run: StepRun) -> str:
    """How well the times of the compared strategies' plans were predicted."""
    errors = planned_errors(run)
    return (
        f"prediction of {len(errors)} different plans of {', '.join(run.settings.strategies)}: mean absolute error "
        f"{statistics.fmean(map(abs, errors)):.1%}, mean error {statistics.fmean(errors):+.1%}"
    )


def goal_lines(run: StepRun) -> list[str]:
    """The goals that this run can judge, and whether they are met."""
    lines = []
    if run.peers() and GOAL_STRATEGY in run.settings.strategies:
        best = best_peer(run)
        ratio = summarise(run, GOAL_STRATEGY).tokens_per_s / peer_tokens_per_s(run, best)
        met = _met(ratio >= GOAL_SPEEDUP)
        lines.append(
            f"goal: {GOAL_STRATEGY} at {GOAL_SPEEDUP}x the tokens/s of the best peer: {ratio:.2f}x of {best}: {met}"
        )
    errors = planned_errors(run)
    error, wanted = statistics.fmean(map(abs, errors)), f"goal: step time predicted to {GOAL_ERROR:.0%}"
    if len(errors) < GOAL_PLANS:
        return [*lines, f"{wanted}: {error:.1%} over {len(errors)} plans: not judged, it needs {GOAL_PLANS}"]
    return [*lines, f"{wanted}: {error:.1%} over {len(errors)} plans: {_met(error <= GOAL_ERROR)}"]


def peer_facts(run: StepRun, versions: tuple[str, ...]) -> list[str]:
    """Which peers ran, what they had in common with Longhaul, and their limits."""
    if not run.settings.peers:
        return []
    names = [PEERS[name].what for name in run.settings.peers]
    return [
        f"peers: {', '.join(names)} ({', '.join(versions)}), each at every degree that divides the ranks, runs this "
        "model and fits the batches, as groups of neighbours side by side; Longhaul's model, kernel, sharding, "
        "optimizer and clock; documents packed to the same tokens a rank, the work spread evenly, before the clock "
        "starts",
        "fewer KV heads than ranks are repeated for the Ulysses peers before the exchange; a ring pads every document "
        "to a multiple of twice its degree, Ulysses the end of a microbatch; tokens/s count real tokens only",
    ]


def _met(is_met: bool) -> str:
    return "met" if is_met else "NOT met"
