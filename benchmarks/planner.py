"""How good and how fast step plans are: every strategy on the same lengths under the same cost models.

    python -m benchmarks.planner [--out FILE] [--lengths FILE] [--batches N] [--quick]

For each setting (cluster, model, ranks, sequences a step) and each set of lengths it plans the same batches with every
strategy and prints, in markdown: the best single published strategy and its mean step time over adaptive's, the least
of these ratios in one batch against whichever published strategy was best there, adaptive's mean and worst gap to the
proven bound, and its mean planning time, verification included. Step times are predicted, from cost models derived
from data sheets (``planner.analytic``); planning times are this machine's. Nothing is asserted.

``flexsp`` falls back on our greedy list schedule where that is better, so it is stronger than what was published. On
12,288 ranks only adaptive is planned, for its planning time: one long sequence sets the step time there, so a gap of 0
says little about balance.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from planner.analytic import derive_cost
from planner.cost import CostModel, PlanLimits
from planner.errors import InfeasibleError, SpecError
from planner.length_generators import generate_lengths
from planner.lengths_file import read_lengths
from planner.plan import AttentionKind, Sharding, StepPlan
from planner.specs import load_cluster, load_model
from planner.step_planner import STRATEGIES, plan_step

CORPORA = ("wikipedia", "prolong", "github", "byted")
OURS = ("adaptive", "hdp-floor")  # the second is HDP with our fix
COLUMNS = (
    "setting", "lengths", "tokens a step", "longest", "best published", "its time / adaptive", "least in a batch",
    "mean gap", "worst gap", "plan ms", "every strategy / adaptive",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A machine, a model and a step. ``batch_tokens``: a step ends with the sequence that reaches it; else it has
    ``batch_sequences``. ``max_tokens``: longer sequences are dropped."""

    cluster: str
    model: str
    num_ranks: int
    batch_sequences: int = 0
    batch_tokens: int = 0
    max_tokens: int
    sharding: Sharding = Sharding.GATHER_ONCE
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    num_batches: int

    @property
    def name(self) -> str:
        size = f"{self.batch_sequences} seqs" if self.batch_sequences else f"{self.batch_tokens / 2**20:.0f}M tokens"
        return f"{self.cluster}, {self.model}, {self.sharding}, {self.num_ranks} ranks, {size}"


SETTINGS = (
    Setting(
        cluster="h200-64", model="llama-3-8b", num_ranks=64, batch_sequences=512, max_tokens=2**19, num_batches=5
    ),
    Setting(
        cluster="a100-40g-64", model="gpt-7b", num_ranks=64, batch_sequences=512, max_tokens=192 * 2**10,
        sharding=Sharding.ZERO3, num_batches=3,
    ),
    Setting(
        cluster="h100-1024", model="llama-3-8b", num_ranks=1024, batch_tokens=2**23, max_tokens=2**20,
        num_batches=2,
    ),
    Setting(
        cluster="h100-12288", model="llama-3-8b", num_ranks=12288, batch_tokens=2**25, max_tokens=2**21,
        strategies=("adaptive",), num_batches=1,
    ),
)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", help="write the table here as well")
    parser.add_argument("--lengths", metavar="FILE", help="one length a line, instead of the named corpora")
    parser.add_argument("--batches", type=int, metavar="N", help="steps of each kind (default: 1 to 5 by setting)")
    parser.add_argument("--quick", action="store_true", help="the first setting only")
    options = parser.parse_args(arguments)
    lines = [
        f"`python -m benchmarks.planner {' '.join(arguments)}`".replace(" `", "`"),
        "",
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, one process",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    print("\n".join(lines), flush=True)
    for setting in SETTINGS[:1] if options.quick else SETTINGS:
        for name in (options.lengths,) if options.lengths else CORPORA:
            lines.append(measure(setting, name, options.batches or setting.num_batches))
            print(lines[-1], flush=True)
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(setting: Setting, name: str, num_batches: int) -> str:
    """One row of the table."""
    cost, limits = _model(setting)
    steps = list(islice(_batches(setting, name), num_batches))
    plans, plan_s = _plans(setting, steps, cost, limits)
    ours = [plan.predicted_s for plan in plans["adaptive"]]
    ratios = {
        name: sum(plan.predicted_s for plan in found) / sum(ours) for name, found in plans.items() if name != "adaptive"
    }
    published = {name: ratio for name, ratio in ratios.items() if name not in OURS}
    least = [
        min(plans[name][place].predicted_s for name in published) / ours[place] for place in range(len(ours))
    ] if published else []
    best = min(published, key=lambda name: published[name], default="-")
    gaps = [plan.solver.gap for plan in plans["adaptive"]]
    cells = (
        setting.name,
        Path(name).name,
        f"{sum(map(sum, steps)) / len(steps) / 1000:,.0f}K",
        f"{max(map(max, steps)) / 1000:,.0f}K",
        best,
        f"{published[best]:.3f}" if published else "-",
        f"{min(least):.3f}" if least else "-",
        f"{sum(gaps) / len(gaps):.2%}",
        f"{max(gaps):.2%}",
        f"{1000 * plan_s / len(steps):.0f}",
        ", ".join(f"{name} {ratio:.3f}" for name, ratio in sorted(ratios.items(), key=lambda item: item[1])) or "-",
    )
    return "| " + " | ".join(cells) + " |"


def _model(setting: Setting) -> tuple[CostModel, PlanLimits]:
    cluster, model = load_cluster(setting.cluster), load_model(setting.model)
    cost = derive_cost(cluster, model, num_ranks=setting.num_ranks, sharding=setting.sharding)
    limits = PlanLimits(
        device_budget_bytes=cluster.device.memory_bytes - cluster.device.reserved_bytes,
        max_ulysses_degree=model.num_query_heads, kinds=(AttentionKind.ULYSSES, AttentionKind.RING),
        devices_per_node=cluster.devices_per_node,
    )
    return cost, limits


def _batches(setting: Setting, name: str) -> Iterator[list[int]]:
    drawn = iter(read_lengths(name)) if name not in CORPORA else generate_lengths(name)
    step: list[int] = []
    for length in drawn:
        if length > setting.max_tokens:
            continue
        step.append(length)
        if len(step) == setting.batch_sequences or 0 < setting.batch_tokens <= sum(step):
            yield step
            step = []


def _plans(
    setting: Setting, steps: list[list[int]], cost: CostModel, limits: PlanLimits
) -> tuple[dict[str, list[StepPlan]], float]:
    """Plans by strategy, of those that can plan every step, and the seconds adaptive took for all of them."""
    plans: dict[str, list[StepPlan]] = {}
    adaptive_s = 0.0
    for strategy in setting.strategies:
        found = []
        for number, lengths in enumerate(steps):
            started_s = time.perf_counter()
            try:
                plan = plan_step(
                    lengths, step=number, num_ranks=setting.num_ranks, cost=cost, limits=limits, strategy=strategy
                )
            except (SpecError, InfeasibleError):
                if strategy == "adaptive":
                    raise
                break
            if strategy == "adaptive":
                adaptive_s += time.perf_counter() - started_s
            found.append(plan)
        if len(found) == len(steps):
            plans[strategy] = found
    return plans, adaptive_s


if __name__ == "__main__":
    main(sys.argv[1:])
