"""The groups a strategy may form, and every sequence priced on each of them: arrays, built once per step.

Time and memory of a group add up over its sequences, so all search works on one row per sequence and one column per
*shape*: an attention kind, a degree, and what becomes of activations: the fraction of the tokens that is computed again
(``planner.strategies.search.memory_policy``), or the size of chunks (``planner.strategies.search.chunk_shapes``).
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import numpy.typing as npt

from planner.cost.fits import TimeFit
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import InfeasibleError, SpecError
from planner.plan import AttentionKind
from planner.pricing.microbatch import SequencePrices
from planner.pricing.problem import StepProblem
from planner.schedules.layout import head_degree, peak_team_tokens
from planner.units import format_bytes

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

UNLIMITED_TOKENS = 2**62
ROUNDING = 1e-6
"""Tokens. Loads are rounded up, and one that is above a whole number by less than this is that number: the excess comes
from floating point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldShare:
    """The share of a sequence's activation bytes that stays on the device: ``max(least, at_zero - per_token * s)`` for
    s tokens, between 0 and 1. It falls with s: longer sequences give a copy to the host more time to hide in."""

    at_zero: float = 1.0
    per_token: float = 0.0
    least: float = 1.0

    @property
    def is_all(self) -> bool:
        return self.least >= 1

    def of(self, num_tokens: float) -> float:
        return max(self.least, self.at_zero - self.per_token * num_tokens)


ALL_HELD = HeldShare()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """A group of ``fit.degree`` ranks of one attention kind, which form ``num_teams`` teams (see
    ``planner.schedules.layout``).

    The loads of its sequences may add up to ``capacity_tokens``. A sequence's load is the most tokens that any one team
    gets of it, and the capacity is what one team can hold. Local and ulysses are one team: all tokens of the sequence
    and the capacity of the whole group. A ring has teams of one: the tokens of the fullest rank and the capacity of one
    rank. Of these tokens only the share ``held`` counts, rounded up.

    ``fit`` includes the time to compute ``recompute_fraction`` of the tokens again, or to run in chunks of
    ``chunk_tokens`` a rank (0: whole). The capacity leaves out the bytes of the chunk at work."""

    fit: TimeFit
    capacity_tokens: int
    num_teams: int
    recompute_fraction: float = 0.0
    held: HeldShare = ALL_HELD
    chunk_tokens: int = 0

    @property
    def policy(self) -> tuple[float, int]:
        """What shapes of one kind and degree differ in."""
        return self.recompute_fraction, self.chunk_tokens

    def load_tokens(self, num_tokens: int) -> int:
        """The load of a sequence of so many tokens."""
        tokens = num_tokens if self.num_teams == 1 else peak_team_tokens(num_tokens, self.num_teams)
        return tokens if self.held.is_all else ceil(tokens * self.held.of(num_tokens) - ROUNDING)

    @property
    def kind(self) -> AttentionKind:
        return self.fit.kind

    @property
    def degree(self) -> int:
        return self.fit.degree


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """Row per sequence (``rows[i]``: its index in the step), column per shape, degrees ascending.

    ``marginal_s``: seconds that the sequence adds to a group of the shape; the first one adds ``fixed_s`` as well.
    ``load_tokens``: what it takes of ``capacity_tokens``. ``memory_shares``: the share of a group's memory that it
    takes where its tokens are spread evenly, so never more than it takes. ``fits``: it may run there alone.
    """

    shapes: tuple[GroupShape, ...]
    rows: IntArray
    lengths: IntArray
    marginal_s: FloatArray
    load_tokens: IntArray
    memory_shares: FloatArray
    fits: BoolArray
    degrees: IntArray
    fixed_s: FloatArray
    capacity_tokens: IntArray

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def take_rows(self, rows: SequenceOf[int] | IntArray) -> PriceTable:
        """The table of these rows only (places in this table, not sequence indices)."""
        picked = np.asarray(rows, dtype=np.int64)
        return replace(
            self, rows=self.rows[picked], lengths=self.lengths[picked], marginal_s=self.marginal_s[picked],
            load_tokens=self.load_tokens[picked], memory_shares=self.memory_shares[picked], fits=self.fits[picked],
        )

    def take_shapes(self, columns: SequenceOf[int]) -> PriceTable:
        """The table of these shapes only."""
        picked = np.asarray(columns, dtype=np.int64)
        return replace(
            self, shapes=tuple(self.shapes[column] for column in columns), marginal_s=self.marginal_s[:, picked],
            load_tokens=self.load_tokens[:, picked], memory_shares=self.memory_shares[:, picked],
            fits=self.fits[:, picked], degrees=self.degrees[picked], fixed_s=self.fixed_s[picked],
            capacity_tokens=self.capacity_tokens[picked],
        )


def shape_of(kind: AttentionKind, degree: int, cost: CostModel, limits: PlanLimits) -> GroupShape | None:
    """The shape, or None where the limits forbid it or the cost model does not price it."""
    if degree == 1:
        kind = AttentionKind.LOCAL
    elif kind is AttentionKind.LOCAL or kind not in limits.kinds:
        return None
    fit = cost.find_fit(kind, degree)
    if fit is None:
        return None
    team = head_degree(kind, degree, fit.inner_degree)
    if team > limits.max_ulysses_degree:
        return None
    capacity = min(cost.max_local_tokens(limits.device_budget_bytes) * team, UNLIMITED_TOKENS)
    return GroupShape(fit=fit, capacity_tokens=capacity, num_teams=degree // team)


def shapes_of_degree(degree: int, cost: CostModel, limits: PlanLimits) -> tuple[GroupShape, ...]:
    """The shapes of one degree that are worth trying: local for 1, else of the allowed and priced kinds, in the order
    of ``limits.kinds``, those that no other one beats at everything."""
    kinds = (AttentionKind.LOCAL,) if degree == 1 else tuple(dict.fromkeys(limits.kinds))
    found = (shape_of(kind, degree, cost, limits) for kind in kinds)
    shapes = [shape for shape in found if shape is not None]
    best: list[GroupShape] = []
    for place, shape in enumerate(shapes):
        earlier, later = shapes[:place], shapes[place + 1 :]
        beaten = any(_no_worse(other, shape) for other in earlier) or any(
            _no_worse(other, shape) and not _no_worse(shape, other) for other in later
        )
        if not beaten:
            best.append(shape)
    return tuple(best)


def _no_worse(shape: GroupShape, other: GroupShape) -> bool:
    """Whether, of two shapes of one degree, the first holds whatever the second holds, and never takes more seconds for
    it. It holds as much where each of its teams is made of whole teams of the other: then a team's load grows by no
    more than its capacity."""
    here, there = shape.fit, other.fit
    teams_fit = other.num_teams % shape.num_teams == 0
    return teams_fit and here.adds_at_most(there) and here.fixed_s <= there.fixed_s


def flexsp_degrees(num_ranks: int) -> tuple[int, ...]:
    """The powers of two up to ``num_ranks``, and ``num_ranks`` itself where it is none."""
    powers = tuple(2**power for power in range(num_ranks.bit_length()))
    return powers if powers[-1] == num_ranks else (*powers, num_ranks)


def allowed_shapes(problem: StepProblem) -> tuple[GroupShape, ...]:
    """Every shape of FlexSP's degrees. Raises SpecError where the cost model prices none of them."""
    num_ranks, cost, limits = problem.num_ranks, problem.cost, problem.limits
    shapes = tuple(shape for degree in flexsp_degrees(num_ranks) for shape in shapes_of_degree(degree, cost, limits))
    if not shapes:
        priced = ", ".join(f"{fit.kind} {fit.degree}" for fit in cost.times) or "nothing"
        raise SpecError(
            f"no group can be formed on {num_ranks} ranks: the cost model prices {priced}; the run allows "
            f"local 1 and {', '.join(limits.kinds)}, ulysses up to degree {limits.max_ulysses_degree}: "
            "calibrate again for this number of ranks"
        )
    return shapes


def ring_shapes(
    strategy: str, degrees: Iterable[int], problem: StepProblem
) -> tuple[GroupShape, ...]:
    """Local, and ring of those of ``degrees`` (2 .. num_ranks) that the cost model prices, ascending.

    Raises SpecError naming ``strategy`` where local is not priced, or no ring is and there are several ranks.
    """
    cost, limits = problem.cost, problem.limits
    wanted = set(degrees) if AttentionKind.RING in limits.kinds else set()
    per_rank = min(problem.max_rank_tokens, UNLIMITED_TOKENS)
    fits = [
        fit for fit in cost.times
        if fit.kind is AttentionKind.LOCAL or (fit.kind is AttentionKind.RING and fit.degree in wanted)
    ]
    shapes = sorted(
        (GroupShape(fit=fit, capacity_tokens=per_rank, num_teams=fit.degree) for fit in fits),
        key=lambda shape: shape.degree,
    )
    if not shapes or shapes[0].kind is not AttentionKind.LOCAL:
        raise SpecError(f"strategy {strategy} runs short sequences on single ranks: the cost model prices no local "
                        "group, calibrate again")
    if problem.num_ranks > 1 and len(shapes) == 1:
        fix = (
            "the cost model prices none that it could form: calibrate again for this number of ranks"
            if AttentionKind.RING in limits.kinds
            else f"this run allows only attention {', '.join(limits.kinds)}: use --attention auto or ring"
        )
        raise SpecError(f"strategy {strategy} shares long sequences over rings, and {fix}")
    return tuple(shapes)


def price_table(lengths: SequenceOf[int] | IntArray, shapes: SequenceOf[GroupShape]) -> PriceTable:
    """Price sequences of these lengths (tokens) on every shape."""
    sizes = np.asarray(lengths, dtype=np.int64)
    tokens = sizes.astype(np.float64)
    prices = SequencePrices.of([shape.fit for shape in shapes])
    loads = _load_tokens(sizes, shapes)
    capacities = np.array([shape.capacity_tokens for shape in shapes], dtype=np.int64)
    memory_shares = tokens[:, None] / np.array([max(group_tokens(shape), 1) for shape in shapes], dtype=np.float64)
    if not all(shape.held.is_all for shape in shapes):
        memory_shares *= held_shares(tokens[:, None], shapes)
    return PriceTable(
        shapes=tuple(shapes),
        rows=np.arange(len(sizes), dtype=np.int64),
        lengths=sizes,
        marginal_s=prices.marginal_s(tokens),
        load_tokens=loads,
        memory_shares=memory_shares,
        fits=loads <= capacities,
        degrees=np.array([shape.degree for shape in shapes], dtype=np.int64),
        fixed_s=prices.fixed_s,
        capacity_tokens=capacities,
    )


def _load_tokens(sizes: IntArray, shapes: SequenceOf[GroupShape]) -> IntArray:
    """``GroupShape.load_tokens`` of every length (row) on every shape (column)."""
    loads = np.repeat(sizes[:, None], len(shapes), axis=1)
    cut = np.array([place for place, shape in enumerate(shapes) if shape.num_teams > 1], dtype=np.int64)
    if len(cut):
        teams, which = np.unique(np.array([shapes[place].num_teams for place in cut.tolist()]), return_inverse=True)
        loads[:, cut] = peak_team_tokens(sizes[:, None], teams[None, :])[:, which]
    parted = np.array([place for place, shape in enumerate(shapes) if not shape.held.is_all], dtype=np.int64)
    if len(parted):
        shares = held_shares(sizes[:, None].astype(np.float64), [shapes[place] for place in parted.tolist()])
        loads[:, parted] = np.ceil(loads[:, parted] * shares - ROUNDING).astype(np.int64)
    return loads


def held_shares(tokens: FloatArray, shapes: SequenceOf[GroupShape]) -> FloatArray:
    """``HeldShare.of``: lengths (tokens) as a column, shapes as a row."""
    at_zero, per_token, least = np.array(
        [(shape.held.at_zero, shape.held.per_token, shape.held.least) for shape in shapes], dtype=np.float64
    ).T
    shares: FloatArray = np.maximum(least, at_zero - per_token * tokens)
    return shares


def group_tokens(shape: GroupShape) -> int:
    """Tokens that all ranks of the group hold together at most, were all of their activations held."""
    return shape.capacity_tokens * shape.num_teams


def require_fits(table: PriceTable, problem: StepProblem) -> None:
    """Raises InfeasibleError naming the longest sequence that fits in none of the table's shapes, if there is one."""
    cost, limits = problem.cost, problem.limits
    homeless = np.flatnonzero(~table.fits.any(axis=1))
    if not len(homeless):
        return
    row = homeless[np.argmax(table.lengths[homeless])]
    bytes_of = [
        _needed_bytes(int(load), shape, cost) for load, shape in zip(table.load_tokens[row], table.shapes, strict=True)
    ]
    needed = min(bytes_of)
    shape, budget = table.shapes[bytes_of.index(needed)], limits.device_budget_bytes
    degrees = _ranges(sorted(set(table.degrees.tolist())))
    in_flight = f" with {cost.num_stages} microbatches in flight" if cost.num_stages > 1 else ""
    raise InfeasibleError(
        f"sequence {table.rows[row]} ({table.lengths[row]} tokens) fits in no group: {shape.kind} degree "
        f"{shape.degree} needs {format_bytes(needed)} per device{in_flight}, the budget is {format_bytes(budget)} "
        f"(degrees allowed: {degrees}); lower --max-length, use more ranks or raise the device budget",
        binding="device memory",
        needed_bytes=needed,
        available_bytes=budget,
    )


def _needed_bytes(load: int, shape: GroupShape, cost: CostModel) -> int:
    """Of one device, for a sequence of this load."""
    needed = cost.device_bytes(-(-load * shape.num_teams // shape.degree) * cost.num_stages)
    if shape.chunk_tokens and cost.chunks is not None:
        needed += int(cost.chunks.chunk_bytes(shape.kind, shape.degree, shape.chunk_tokens))
    return needed


def describe_shapes(shapes: Iterable[GroupShape]) -> str:
    """``ulysses 4 x 2, local x 1``: how often each shape occurs, for notes."""
    counts: dict[str, int] = {}
    for shape in shapes:
        name = str(shape.kind) if shape.degree == 1 else f"{shape.kind} {shape.degree}"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} x {count}" for name, count in counts.items())


def _ranges(numbers: SequenceOf[int]) -> str:
    """Ascending numbers, runs of three and more as ``first-last``, and no more than eight of those."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    words = [f"{part[0]}-{part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts]
    return ", ".join(words if len(words) <= 8 else [*words[:6], "...", words[-1]])
