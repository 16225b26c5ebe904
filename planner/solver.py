"""Mixed-integer programs through PuLP and HiGHS, and packing through OR-tools' CP-SAT if it is installed (the extra
``packing``). No other module imports these, and this one only when it solves.

PuLP 3.3 and PuLP 4 both serve; PuLP states the model, and what it lacks for HiGHS is added on top of its own solver
class: an initial solution is handed over, work is counted and limited, and the result is read from HiGHS itself. PuLP
3.3 knows no name for the end at a node limit and calls runs that stopped early ``Optimal``; PuLP 4 names them.

Work is limited by branch-and-bound nodes and by HiGHS's check points, which both depend only on the input; wall time is
only a guard for an overloaded machine. A check point costs about as much as the model is large, so work is counted as
check points times nonzeros.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from planner.errors import LonghaulError

RANDOM_SEED = 20240229


class SolverFailure(LonghaulError):
    """The solver failed or returned nonsense. Callers fall back to the solution they already have."""


class Outcome(StrEnum):
    """OPTIMAL: solved to the requested gap. FEASIBLE: a limit was reached, but values were found and the bound is
    proven. NOTHING_FOUND: a limit was reached without values. INFEASIBLE: proven to have no solution."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    NOTHING_FOUND = "nothing_found"
    INFEASIBLE = "infeasible"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkLimits:
    """``max_nodes``: branch-and-bound nodes. ``max_work``: HiGHS's check points (also inside the root node) times the
    model's nonzeros. ``time_limit_s``: only a guard."""

    max_nodes: int
    max_work: int
    time_limit_s: float
    relative_gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """``values``: by variable (empty if none were found). ``bound``: no solution has a smaller objective.

    ``work``: work spent, in the unit of ``WorkLimits``. ``hit_clock``: wall time, not work, ended the run.
    """

    outcome: Outcome
    objective: float
    bound: float
    values: tuple[float, ...]
    work: int
    hit_clock: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingLimits:
    """``deterministic_s``: CP-SAT's own measure of work, which it calls seconds and which does not depend on the
    machine. ``time_limit_s``: only a guard."""

    deterministic_s: float
    time_limit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """``places``: lower edge of each rectangle (empty if none were found). No packing is lower than ``bound``."""

    places: tuple[float, ...]
    bound: int


@dataclass(slots=True)
class _Variable:
    low: float
    high: float
    integer: bool


@dataclass(slots=True)
class _Row:
    terms: Mapping[int, float]
    low: float
    high: float


@dataclass(slots=True)
class LinearModel:
    """Minimises a linear objective over bounded variables and linear rows. Variables are numbered from 0."""

    _variables: list[_Variable] = field(default_factory=list)
    _rows: list[_Row] = field(default_factory=list)
    _objective: Mapping[int, float] = field(default_factory=dict)

    def variable(self, *, low: float = 0.0, high: float = math.inf, integer: bool = False) -> int:
        """Add a variable, return its number."""
        self._variables.append(_Variable(low, high, integer))
        return len(self._variables) - 1

    def row(self, terms: Mapping[int, float], *, low: float = -math.inf, high: float = math.inf) -> None:
        """Add ``low <= sum of coefficient * variable <= high``; ``low == high`` makes an equation."""
        self._rows.append(_Row(dict(terms), low, high))

    def minimize(self, terms: Mapping[int, float]) -> None:
        """Set the objective."""
        self._objective = dict(terms)

    def solve(self, limits: WorkLimits, start: SequenceOf[float] | None = None) -> Solution:
        """Solve. ``start``: a known solution, one value per variable; the result is not worse than it.

        Raises SolverFailure if PuLP or HiGHS fails.
        """
        import pulp  # takes 0.2 s, so only when a problem is solved

        problem = pulp.LpProblem("longhaul", pulp.LpMinimize)
        columns = [
            problem.add_variable(
                f"x{number:07d}",  # PuLP sorts by name; this keeps our order
                lowBound=None if math.isinf(column.low) else column.low,
                upBound=None if math.isinf(column.high) else column.high,
                cat=pulp.LpInteger if column.integer else pulp.LpContinuous,
            )
            for number, column in enumerate(self._variables)
        ]
        every = dict.fromkeys(range(len(columns)), 0.0)  # PuLP drops variables without any coefficient
        problem.setObjective(_expression(columns, {**every, **self._objective}))
        for row in self._rows:
            expression = _expression(columns, row.terms)
            if row.low == row.high:
                problem.addConstraint(expression == row.low)
                continue
            if not math.isinf(row.low):
                problem.addConstraint(expression >= row.low)
            if not math.isinf(row.high):
                problem.addConstraint(expression <= row.high)
        num_nonzeros = max(1, sum(len(row.terms) for row in self._rows))
        runner = _runner(limits, max(1, limits.max_work // num_nonzeros), start)
        try:
            problem.solve(runner)
        except (pulp.PulpError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise SolverFailure(f"HiGHS failed: {type(error).__name__}: {error}") from error
        has_integers = any(column.integer for column in self._variables)
        return _read(problem.solverModel, has_integers, runner.num_checks * num_nonzeros)


def pack_rectangles(
    *, spans: SequenceOf[tuple[int, int]], heights: SequenceOf[int], low: int, start: SequenceOf[int],
    limits: PackingLimits,
) -> Packing | None:
    """Move rectangles up or down until none overlap and the highest edge is as low as possible. Each keeps its
    half-open horizontal span in ``spans``. ``start``: a packing; ``low``: a known bound. Returns None if OR-tools is
    missing.

    Uses one worker and a fixed seed, so that equal input gives equal results.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        return None
    top = max(place + height for place, height in zip(start, heights, strict=True))
    model = cp_model.CpModel()
    peak = model.new_int_var(low, top, "peak")
    places, sideways, upright = [], [], []
    for (left, right), height, known in zip(spans, heights, start, strict=True):
        place = model.new_int_var(0, top - height, "")
        model.add(place + height <= peak)
        model.add_hint(place, known)
        places.append(place)
        if height:
            sideways.append(model.new_fixed_size_interval_var(left, right - left, ""))
            upright.append(model.new_fixed_size_interval_var(place, height, ""))
    model.add_no_overlap_2d(sideways, upright)
    model.minimize(peak)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = RANDOM_SEED % 2**31
    solver.parameters.max_deterministic_time = limits.deterministic_s
    solver.parameters.max_time_in_seconds = limits.time_limit_s
    status = solver.solve(model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return Packing(
        places=tuple(float(solver.value(place)) for place in places) if found else (),
        bound=max(low, math.ceil(solver.best_objective_bound - 1e-6)) if found else low,
    )


def _expression(columns: list[Any], terms: Mapping[int, float]) -> Any:
    import pulp

    build = getattr(pulp.LpAffineExpression, "from_list", pulp.LpAffineExpression)  # PuLP 3.3 has the constructor only
    return build([(columns[number], value) for number, value in terms.items()])


def _runner(limits: WorkLimits, max_checks: int, start: SequenceOf[float] | None) -> Any:
    """PuLP's HiGHS with a start and a count of check points. PuLP reads no result: ``_read`` does."""
    import highspy
    import pulp

    class Runner(pulp.HiGHS):  # type: ignore[misc]
        num_checks = 0

        def createAndConfigureSolver(self, lp: Any) -> None:
            with _silent_stdout():
                super().createAndConfigureSolver(lp)
            lp.solverModel.setCallback(self.check, None)
            lp.solverModel.startCallback(highspy.cb.HighsCallbackType.kCallbackMipInterrupt)

        def callSolver(self, lp: Any) -> None:
            if start is not None:
                places = list(range(len(start)))
                if lp.solverModel.setSolution(len(places), places, list(start)) == highspy.HighsStatus.kError:
                    raise pulp.PulpError("the initial solution was refused")
            if lp.solverModel.run() == highspy.HighsStatus.kError:
                raise pulp.PulpError("run() returned an error")

        def actualSolve(self, lp: Any) -> None:
            self.createAndConfigureSolver(lp)
            self.buildSolverModel(lp)
            self.callSolver(lp)

        def check(self, kind: int, _message: str, _data: Any, answer: Any, _user: Any) -> None:
            if kind == int(highspy.cb.HighsCallbackType.kCallbackMipInterrupt):
                self.num_checks += 1
                answer.user_interrupt = self.num_checks > max_checks

    return Runner(
        msg=False, threads=1, timeLimit=max(limits.time_limit_s, 1e-3), gapRel=limits.relative_gap,
        random_seed=RANDOM_SEED, mip_max_nodes=limits.max_nodes, parallel="off",
    )


def _read(highs: Any, has_integers: bool, work: int) -> Solution:
    import highspy

    status, info = highs.getModelStatus(), highs.getInfo()
    known = highspy.HighsModelStatus
    hit_clock = status == known.kTimeLimit
    if status in (known.kInfeasible, known.kUnboundedOrInfeasible):
        return Solution(outcome=Outcome.INFEASIBLE, objective=math.inf, bound=math.inf, values=(),
                        work=work, hit_clock=False)
    stopped = (known.kTimeLimit, known.kSolutionLimit, known.kInterrupt, known.kIterationLimit)
    if status != known.kOptimal and status not in stopped:
        raise SolverFailure(f"HiGHS ended with status {highs.modelStatusToString(status)}")
    found = info.primal_solution_status == int(highspy.SolutionStatus.kSolutionStatusFeasible)
    objective = float(info.objective_function_value) if found else math.inf
    bound = float(info.mip_dual_bound) if has_integers else (objective if status == known.kOptimal else -math.inf)
    outcome = Outcome.FEASIBLE if found else Outcome.NOTHING_FOUND
    if status == known.kOptimal:
        outcome = Outcome.OPTIMAL
    values = tuple(float(value) for value in highs.getSolution().col_value) if found else ()
    return Solution(outcome=outcome, objective=objective, bound=bound, values=values,
                    work=work, hit_clock=hit_clock)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS 1.16 prints a banner when it is created, before any option can prevent it, but our stdout may carry JSON.
    So stdout of the whole process is redirected for some microseconds."""
    kept = os.dup(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(sink)
        os.close(kept)
