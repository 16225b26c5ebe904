"""``adaptive`` where all ranks move in lockstep (zero3): rounds of microbatches, filled, shortened and mended.

All is counted, nothing depends on the clock but the guard of ``limits.time_limit_s``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf

from planner.strategies.adaptive.build import Draft, Target, build_draft
from planner.strategies.adaptive.pour import WAYS, Pour, Pourer
from planner.strategies.adaptive.rounds import Round, align, in_order, rounds_s, squeeze
from planner.strategies.adaptive.swap import swap_rows
from planner.strategies.adaptive.workshop import Workshop

# In lockstep: (packed, target over the bound, share of the target in which a sequence alone is to run).
ROUND_TARGETS = ((True, 1.06, 0.25), (False, 1.12, 0.25))
NUM_SQUEEZED = 2
NUM_FEW_SQUEEZED = 6
FEW_ROUNDS = 2
MAX_SWAPS = 150
ALIGNED_WITHIN = 1.08  # of the best poured rounds' seconds: those that a squeeze may bring below them


def plan_rounds(shop: Workshop, bound_s: float, max_builds: int, deadline_s: float) -> tuple[Draft, int]:
    """Pour rounds in several ways and, where there are more than a few, align what is built without barriers for
    several targets; squeeze the best of both and let sequences of the very best change places. Returns how often
    rounds were built, too."""
    found, num_poured = _poured(shop, max_builds, deadline_s)
    num_aligned = 0
    if len(found[0]) > FEW_ROUNDS:
        most_s = ALIGNED_WITHIN * rounds_s(found[0])
        aligned = _aligned(shop, bound_s, max_builds, deadline_s)
        num_aligned = len(aligned)
        found += [rounds for rounds in aligned if rounds_s(rounds) <= most_s]
    found = [min(rounds, squeeze(shop, rounds), key=rounds_s) for rounds in found]
    rounds = min(found, key=rounds_s)
    rounds = min(rounds, swap_rows(shop, rounds, MAX_SWAPS), key=rounds_s)
    ordered = in_order(rounds, num_ranks=shop.num_ranks, node_size=shop.node_size)
    return Draft(tuple(ordered), rounds_s(rounds)), num_poured + num_aligned


def _poured(shop: Workshop, max_builds: int, deadline_s: float) -> tuple[list[list[Round]], int]:
    """The quickest pours of all ways, at least one, each once, the quickest first. A way is left where it cannot be
    among them any more."""
    pourer = Pourer(shop)
    found: list[list[Round]] = []
    num_builds = 0
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for level, reach, least_degree in WAYS[:max_builds]:
        if found and time.perf_counter() > deadline_s:
            break
        wanted = _num_wanted(found)
        give_up_s = rounds_s(found[wanted - 1]) if len(found) >= wanted else float("inf")
        rounds = pourer.pour(Pour(level=level, reach=reach, least_degree=least_degree), give_up_s)
        num_builds += 1
        if rounds is None:
            continue
        content = tuple((batch.column, *batch.rows) for each in rounds for batch in each.batches)
        if content not in seen:
            seen.add(content)
            found = sorted([*found, rounds], key=rounds_s)
    return found[: _num_wanted(found)], num_builds


def _num_wanted(found: SequenceOf[SequenceOf[Round]]) -> int:
    """How many pours are worth squeezing: where rounds are few, one is cheap to squeeze, and it matters most."""
    return NUM_FEW_SQUEEZED if not found or len(found[0]) <= FEW_ROUNDS else NUM_SQUEEZED


def _aligned(shop: Workshop, bound_s: float, max_builds: int, deadline_s: float) -> list[list[Round]]:
    """Rounds of a build for each of the targets, the quickest first."""
    found: list[list[Round]] = []
    for packed, factor, share in ROUND_TARGETS[:max_builds]:
        if time.perf_counter() > deadline_s:
            break
        target_s = factor * bound_s
        way = Target(makespan_s=target_s, alone_s=share * target_s, packed=packed)
        found.append(align(build_draft(shop, way).batches, num_ranks=shop.num_ranks, node_size=shop.node_size))
    return sorted(found, key=rounds_s)
