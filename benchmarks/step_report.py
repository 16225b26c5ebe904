"""The step benchmark's result as Markdown, with everything that is needed to judge and repeat it."""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

from benchmarks.box import BoxSpec
from benchmarks.peers.report import goal_lines, peer_facts, peer_findings, peer_head, peer_rows, prediction_finding
from benchmarks.step_results import (
    StepRun,
    best_static,
    loss_spread,
    predicted_speedups,
    repeat_differences,
    speedups,
    summarise,
)
from planner.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConditions:
    """Where, when and with what a run was made."""

    command: str
    day: str
    cpu: str
    num_cores: int
    torch_version: str
    peer_versions: tuple[str, ...] = ()


def conditions_here(command: str, *, num_cores: int, peers: SequenceOf[str] = ()) -> RunConditions:
    """The conditions of a run on this machine, now. ``peers``: names of installed distributions."""
    return RunConditions(
        command=command, day=date.today().isoformat(), cpu=_cpu_name(), num_cores=num_cores,
        torch_version=metadata.version("torch"),
        peer_versions=tuple(f"{name} {metadata.version(name)}" for name in peers),
    )


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(run: StepRun, conditions: RunConditions) -> str:
    """The report: the result, each batch, and how it was made. All ratios are between times of the same run."""
    sections = [
        f"# Training steps: {', '.join(run.settings.strategies)} against one layout for all, in one run on "
        f"{run.settings.num_ranks} ranks",
        _table(_summary_head(), _summary_rows(run)),
        *([_table(peer_head(), peer_rows(run))] if run.settings.peers else []),
        "\n".join(f"- {line}" for line in _findings(run)),
        "## Batch by batch: predicted / measured seconds" + (" (peers: measured)" if run.peers() else ""),
        _table(*_batch_table(run)),
        "## How it was made",
        "\n".join(f"- {line}" for line in _circumstances(run, conditions)),
    ]
    return "\n\n".join(sections) + "\n"


def _summary_head() -> tuple[str, ...]:
    return (
        "strategy", "tokens/s, whole run", "tokens/s, median batch", "against best static", "predicted s/step",
        "measured s/step", "mean abs. error (mean error)", "plan ms", "gap",
    )


def _summary_rows(run: StepRun) -> list[tuple[str, ...]]:
    baseline = summarise(run, best_static(run))
    rows: list[tuple[str, ...]] = []
    for name in run.strategies():
        line = summarise(run, name)
        label = f"{name} (best static)" if name == baseline.strategy else name
        rows.append((
            label, f"{line.tokens_per_s:,.0f}", f"{line.median_tokens_per_s:,.0f}",
            f"{line.tokens_per_s / baseline.tokens_per_s:.2f}x", f"{line.predicted_s:.3f}", f"{line.measured_s:.3f}",
            f"{line.absolute_error:.1%} ({line.signed_error:+.1%})", f"{line.plan_s * 1000:.1f}", f"{line.gap:.1%}",
        ))
    for name, count in run.misfits:
        reason = f"does not fit: the longest sequence of {count} of {len(run.batches)} batches"
        rows.append((name, reason, *[""] * (len(_summary_head()) - 2)))
    return rows


def _findings(run: StepRun) -> list[str]:
    baseline = best_static(run)
    lines = []
    for name in run.strategies():
        if name == baseline:
            continue
        ratios, foreseen = speedups(run, name, baseline), predicted_speedups(run, name, baseline)
        lines.append(
            f"{name} against {baseline}, batch by batch: median {statistics.median(ratios):.2f}x, lowest "
            f"{min(ratios):.2f}x, highest {max(ratios):.2f}x (predicted: median {statistics.median(foreseen):.2f}x)"
        )
    errors = [abs(step.error) for step in run.steps]
    searches = []
    for name in run.settings.strategies:
        found = Counter(f"{step.winner} ({step.status})" for step in run.of(name))
        counts = ", ".join(f"{winner} x {count}" for winner, count in found.items())
        searches.append(f"plans of {name}, by the search that found them: {counts}")
    noise = repeat_differences(run)
    if noise:
        lines.append(
            f"noise: {len(noise)} times two strategies chose the very same plan for a batch; their times then differed "
            f"by {statistics.median(noise):.1%} (median), {max(noise):.1%} at most"
        )
    return [
        *lines,
        *peer_findings(run),
        prediction_finding(run),
        *goal_lines(run),
        f"prediction over all {len(errors)} measured steps: mean absolute error {statistics.fmean(errors):.1%}, "
        f"worst {max(errors):.1%}",
        *searches,
        f"all strategies{' and peers' if run.peers() else ''} reached the same loss on the same batch, to "
        f"{loss_spread(run):.0e} relative",
    ]


def _batch_table(run: StepRun) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = run.strategies()
    rows = []
    for number, lengths in enumerate(run.batches):
        steps = [run.of(name)[number] for name in names]
        times = [f"{step.predicted_s:.3f} / {step.measured_s:.3f}" for step in steps]
        times += [f"{run.of_peer(name)[number].measured_s:.3f}" for name in run.peers()]
        rows.append((str(number), str(len(lengths)), f"{sum(lengths):,}", f"{max(lengths):,}", *times))
    return ("batch", "sequences", "tokens", "longest", *names, *run.peers()), rows


def _circumstances(run: StepRun, conditions: RunConditions) -> list[str]:
    given, origin = run.settings, run.cost_origin
    lengths = [length for batch in run.batches for length in batch]
    shared = "" if conditions.num_cores >= given.num_ranks * run.num_threads else (
        f"; {given.num_ranks} ranks share {conditions.num_cores} cores: a rank that waits lends its core to the "
        "others, so an idle rank costs less than the cost model says"
    )
    return [
        f"`{conditions.command}`, {conditions.day}",
        f"{conditions.cpu}, {conditions.num_cores} cores, {run.num_threads} thread(s) a rank, torch "
        f"{conditions.torch_version}, gloo{shared if given.box is None else ''}",
        *_box_facts(given.box),
        *peer_facts(run, conditions.peer_versions),
        f"machine's load (1 min) before the first measured step {run.load_before:.2f}, after the last "
        f"{run.load_after:.2f}; what exceeds {given.num_ranks} at the end came from elsewhere",
        f"model {given.model}, attention {given.attention}, learning rate 0 (the weights stay as they are), random "
        "tokens",
        f"lengths: log-normal, seed {given.seed}: {len(lengths)} sequences, median "
        f"{statistics.median(lengths):,.0f}, longest {max(lengths):,} (cut off at {given.max_length:,}); up to "
        f"{given.tokens_per_batch:,} tokens a step",
        f"device budget {format_bytes(run.budget_bytes)}: by the measured memory model {given.capacity_tokens:,} "
        f"tokens of a microbatch on one rank; {_degree_needed(run)}",
        f"cost model {origin.source} in the same run: {origin.num_samples} samples, error of the fit: mean "
        f"{origin.mean_relative_error:.1%}, worst {origin.max_relative_error:.1%}",
        f"each strategy{' and peer' if run.peers() else ''} ran every batch once, after one warm-up step, in an order "
        "that turns and reverses from batch to batch; barrier before each step; seconds of the slowest rank; planning "
        "is not in them",
        "mean planning of a step: "
        + ", ".join(f"{name} {format_seconds(summarise(run, name).plan_s)}" for name in given.strategies)
        + ", on rank 0, in training hidden behind the step before",
    ]


def _box_facts(box: BoxSpec | None) -> list[str]:
    if box is None:
        return []
    share = "without a limit" if box.cpu_share is None else f"a fixed {box.cpu_share:.0%} of a core each"
    return [
        f"a cluster in a box: {box.num_nodes} nodes of {box.ranks_per_node} ranks ({share}) and {box.nics_per_node} "
        f"card(s) of {box.nic_bytes_per_s * 8 / 1e6:.0f} Mbit/s each way; inside a node traffic is not shaped"
    ]


def _degree_needed(run: StepRun) -> str:
    """How many sequences fit on one rank, and how many ranks the longest needs (ulysses shares memory evenly)."""
    capacity = run.settings.capacity_tokens
    lengths = [length for batch in run.batches for length in batch]
    alone = sum(length <= capacity for length in lengths)
    return (
        f"{alone} of {len(lengths)} sequences fit on one rank, the longest needs {-(-max(lengths) // capacity)} ranks"
    )


def _table(head: SequenceOf[str], rows: Iterable[SequenceOf[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
