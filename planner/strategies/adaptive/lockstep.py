"""``adaptive`` where ranks move in lockstep (zero3): rounds are packed in several ways (``rounds``), or made of what
is built without barriers; the quickest are shortened, sequences of the very best exchanged (``shorten``). All is
counted, nothing depends on the clock but the guard of ``limits.time_limit_s``.

The numbers below steer it. What each is worth: by how much steps are slower without it, in the mean and in the worst of
153 searches (8 to 128 ranks, with and without memory policies) over batches that none of them was chosen on.
"""

from __future__ import annotations

import time
from itertools import product
from math import inf

from planner.strategies.adaptive.build import Draft, build_draft
from planner.strategies.adaptive.priced_step import Batch, PricedStep
from planner.strategies.adaptive.rounds import Packer, Round, rounds_s
from planner.strategies.adaptive.shorten import Schedule

# Ways to pack rounds, each value with each (what they mean: ``rounds``); those listed first, where fewer are allowed.
SKIPPED = (0, 1)  # 0 only: 0.08 %, 9 % in the worst
STRETCHES = (1.7, 1.0, 3.0, 1.3, 2.2)  # the first only: 8 %, 68 %; the first three only: 0.3 %, 6 %
SLACKS = (1.1, 1.03, 1.2, 1.3)  # the first only: 2 %, 35 %; 1.1 and 1.2 only: 0.9 %, 21 %
WAYS_PER_BUILD = 4  # so 40 ways take as long as the 12 builds that most steps are allowed; large steps get fewer
NUM_SHORTENED = 3  # of the quickest ways. 1: 0.09 %, 4 %
SHARES = (0.7, 0.9, 0.98)  # of a round's time, to which it is shortened. None: 0.15 %, 4 %
ALONE_SHARE = 0.25  # of the best so far: what a sequence takes alone in builds to align. No such builds: 2.6 % in one
MAX_VISITS = 100  # exchanges in a round. None: 0.6 %, 3 %


def plan_rounds(step: PricedStep, max_builds: int, deadline_s: float) -> tuple[Draft, int]:
    """Pack rounds in several ways, shorten the quickest of them, and exchange sequences in the very best. Returns how
    often rounds were packed, too."""
    packer = Packer(step)
    found, num_packed = _packed(packer, max_builds * WAYS_PER_BUILD, deadline_s)
    if len(found[0]) > 1:
        found += _aligned(step, rounds_s(found[0]))
    schedules = [Schedule(step.long, rounds) for rounds in found]
    for schedule in schedules:
        schedule.shorten(SHARES)
    best = min(schedules, key=lambda schedule: schedule.seconds)
    best.exchange(MAX_VISITS)
    return Draft(tuple(in_order(best)), best.seconds), num_packed


def _packed(packer: Packer, max_ways: int, deadline_s: float) -> tuple[list[list[Round]], int]:
    """The quickest rounds of all ways, each once, the quickest first. A way is left where it cannot be among them any
    more."""
    found: dict[tuple[tuple[int, ...], ...], tuple[float, list[Round]]] = {}
    num_packed, give_up_s = 0, inf
    for skipped, stretch, slack in tuple(product(SKIPPED, STRETCHES, SLACKS))[:max_ways]:
        if found and time.perf_counter() > deadline_s:
            break
        rounds = packer.pack(slack, stretch, skipped, give_up_s)
        num_packed += 1
        if rounds is not None:
            content = tuple((batch.column, *batch.rows) for each in rounds for batch in each.batches)
            found[content] = rounds_s(rounds), rounds
            if len(found) >= NUM_SHORTENED:
                give_up_s = sorted(seconds for seconds, _ in found.values())[NUM_SHORTENED - 1]
    quickest = sorted(found.values(), key=lambda each: each[0])
    return [rounds for _, rounds in quickest[:NUM_SHORTENED]], num_packed


def _aligned(step: PricedStep, target_s: float) -> list[list[Round]]:
    """What is built without barriers, put into rounds: the longest microbatch first, each into the first round that has
    ranks for it. Short microbatches are aimed at, so that rounds come out even."""
    found = []
    for packed in (True, False):
        draft = build_draft(step, target_s, packed=packed, alone_s=ALONE_SHARE * target_s)
        rounds: list[Round] = []
        for batch in sorted(draft.batches, key=lambda batch: (-batch.seconds, -batch.degree, batch.rows[0])):
            if not any(each.take(batch) for each in rounds):
                rounds.append(Round(step.num_ranks, step.node_size))
                rounds[-1].take(batch)
        found.append(rounds)
    return found


def in_order(schedule: Schedule) -> list[Batch]:
    """All microbatches with their ranks, the longest round first; rows and columns are those of the schedule's table.

    The runtime starts a microbatch in the first round in which its ranks have nothing else. With the longest round
    first, one that moves up so finds a round at least as long: the step is never slower than planned here.
    """
    batches: dict[int, Batch] = {}
    for row, place in enumerate(schedule.microbatch_of.tolist()):
        if place not in batches:
            column, first_rank = int(schedule.column[place]), int(schedule.first_rank[place])
            fit = schedule.table.shapes[column].fit
            batches[place] = Batch(column, fit.degree, fit.fixed_s, first_rank=first_rank)
        batches[place].rows.append(row)
    number = schedule.round
    places = sorted(batches, key=lambda place: (-schedule.round_s[number[place]], number[place], place))
    return [batches[place] for place in places]
