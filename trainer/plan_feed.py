"""Plans made ahead of time in a child process, so that a step waits for its plan no longer than a set budget.

A worker thread owns the child process: it sends one request at a time, the earliest step first, and reads the answer.
``take`` waits for an answer up to a budget. If the child is late, dead or hung, the step gets the greedy plan, which is
made here in milliseconds and marked LATE. A child that died or hung is replaced, up to ``max_restarts`` times.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

import planner
from planner.codec import to_plain
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import InfeasibleError, LonghaulError, PlanError, SpecError
from planner.plan import SolveStatus, StepPlan, plan_from_json
from planner.pricing.problem import StepProblem
from planner.service import ServiceHeader, StepRequest, error_from_plain
from planner.step_planner import check_strategy, greedy_step
from planner.units import format_seconds

CLOSE_WAIT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTaken:
    """A step's plan, how long ``take`` waited for it, and whether it is the greedy plan because the child was late."""

    plan: StepPlan
    wait_s: float
    late: bool


class PlanFeed:
    """``submit`` steps as soon as their lengths are known, up to ``ahead`` beyond the current one; ``take`` them in
    order; then ``close``. Use it from one thread only.

    A child that does not answer a request within ``hang_s`` (default: three planner time limits plus ten seconds) is
    killed. At most ``max_restarts`` children replace it in a run; after that every plan is greedy.
    """

    def __init__(
        self, *, num_ranks: int, cost: CostModel, limits: PlanLimits, strategy: str, degree: int | None, ahead: int,
        hang_s: float | None = None, max_restarts: int = 3,
    ) -> None:
        """Start the child. Raises SpecError if the strategy is unknown or ``ahead`` is negative."""
        check_strategy(strategy, degree)
        if ahead < 0:
            raise SpecError(f"the planner cannot work {ahead} steps ahead; use 0 or more")
        self._header = ServiceHeader(num_ranks=num_ranks, cost=cost, limits=limits, strategy=strategy, degree=degree)
        self._ahead = ahead
        self._hang_s = 3 * limits.time_limit_s + 10 if hang_s is None else hang_s
        self._restarts_left = max_restarts
        self._changed = threading.Condition()  # guards everything below
        self._waiting: dict[int, tuple[int, ...]] = {}
        self._asked: tuple[int, float] | None = None  # the step the child is planning, and since when
        self._answers: dict[int, StepPlan | LonghaulError | str] = {}  # a plan, a user error, or why there is no plan
        self._submitted: dict[int, tuple[int, ...]] = {}
        self._gone = ""  # why no more plans will come
        self._closed = False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the children
        self._greeted: bool = False  # whether this child has received its header
        self._child = self._start_child()
        self._worker = threading.Thread(target=self._work, name="plan-feed", daemon=True)
        self._worker.start()

    def __enter__(self) -> PlanFeed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, step: int, lengths: SequenceOf[int]) -> None:
        """Request a step's plan and return at once. Does nothing for a step already requested.

        Raises PlanError if more than ``ahead`` + 1 steps would be open.
        """
        with self._changed:
            if step in self._submitted:
                return
            if len(self._submitted) > self._ahead:
                raise PlanError(f"step {step} submitted with {len(self._submitted)} steps open, ahead is {self._ahead}")
            self._submitted[step] = self._waiting[step] = tuple(lengths)
            self._changed.notify_all()

    def take(self, step: int, lengths: SequenceOf[int], wait_budget_s: float) -> PlanTaken:
        """This step's plan, after waiting at most ``wait_budget_s`` seconds; then the greedy plan.

        Submits the step if that was not done. Raises InfeasibleError and SpecError as ``plan_step`` does, and PlanError
        if the step was submitted with other lengths.
        """
        started_s = time.perf_counter()
        sizes = tuple(lengths)
        with self._changed:
            if step not in self._submitted:
                self._submitted[step] = self._waiting[step] = sizes
                self._changed.notify_all()
            if self._submitted[step] != sizes:
                raise PlanError(f"step {step} was submitted with other lengths than it is taken with")
            self._changed.wait_for(lambda: step in self._answers or self._gone, timeout=max(0.0, wait_budget_s))
            answer = self._answers.pop(step, None) or self._gone or (
                f"no plan within {format_seconds(time.perf_counter() - started_s)}"
            )
            self._forget_until(step)
            self._kill_if_hung()
        if isinstance(answer, StepPlan):
            return PlanTaken(plan=answer, wait_s=time.perf_counter() - started_s, late=False)
        if isinstance(answer, InfeasibleError | SpecError):
            raise answer
        plan = self._late_plan(step, sizes, str(answer))
        return PlanTaken(plan=plan, wait_s=time.perf_counter() - started_s, late=True)

    def close(self) -> None:
        """End the child and the worker. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join(CLOSE_WAIT_S)
        if self._worker.is_alive():  # it waits for a child that is planning or hung
            self._child.kill()
            self._worker.join(CLOSE_WAIT_S)
        self._end_child()
        self._stderr.close()

    def _late_plan(self, step: int, lengths: tuple[int, ...], reason: str) -> StepPlan:
        header = self._header
        problem = StepProblem(
            lengths=lengths, num_ranks=header.num_ranks, cost=header.cost, limits=header.limits
        )
        plan = greedy_step(problem, step=step)
        report = replace(plan.solver, status=SolveStatus.LATE, note=f"greedy plan: {reason}")
        return replace(plan, strategy=header.strategy, solver=report)

    def _forget_until(self, step: int) -> None:
        """Drop steps up to this one: steps are taken in order, so nothing will ask for them again."""
        for table in (self._submitted, self._waiting, self._answers):
            for old in [each for each in table if each <= step]:
                del table[old]

    def _kill_if_hung(self) -> None:
        if self._asked is not None and time.perf_counter() - self._asked[1] > self._hang_s:
            self._child.kill()  # works on a stopped process too; the worker then reads end of file and replaces it

    def _work(self) -> None:
        """The worker thread: one request out, one answer in, until closed or out of restarts."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                step = min(self._waiting)
                lengths = self._waiting.pop(step)
                self._asked = (step, time.perf_counter())
            answer = self._ask(step, lengths)
            with self._changed:
                self._asked = None
                if self._closed:
                    return
                if isinstance(answer, str) and not self._replace_child():
                    self._gone = f"{answer}; no more restarts"
                if step in self._submitted:
                    self._answers[step] = answer
                self._changed.notify_all()
                if self._gone:
                    return

    def _ask(self, step: int, lengths: tuple[int, ...]) -> StepPlan | LonghaulError | str:
        """The child's plan or error; a text with the reason if the child failed."""
        request = to_plain(StepRequest(step=step, lengths=lengths))
        try:
            line = self._exchange(json.dumps(request) + "\n")
            data = json.loads(line)
            if data["step"] != step:
                return f"planner process answered step {data['step']} instead of step {step}"
            return error_from_plain(data["error"]) if "error" in data else plan_from_json(data["plan"])
        except (OSError, json.JSONDecodeError, KeyError, TypeError, PlanError):
            return self._obituary()

    def _exchange(self, line: str) -> str:
        stdin, stdout = self._child.stdin, self._child.stdout
        if stdin is None or stdout is None:
            raise OSError("the planner process has no pipes")
        if not self._greeted:
            stdin.write(json.dumps(to_plain(self._header)) + "\n")
            self._greeted = True
        stdin.write(line)
        stdin.flush()
        return stdout.readline()

    def _obituary(self) -> str:
        """End the child and say how it ended, with the last line it wrote to stderr."""
        self._end_child()
        code = self._child.returncode
        cause = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"planner process {cause}" + (f" ({lines[-1][:200]})" if lines else "")

    def _replace_child(self) -> bool:
        """Start a new child in place of a dead one; False if no restarts are left."""
        if self._restarts_left < 1:
            return False
        self._restarts_left -= 1
        self._stderr.seek(0)
        self._stderr.truncate()
        try:
            self._child = self._start_child()
        except OSError:  # no memory or no processes left: continue without a child
            return False
        return True

    def _start_child(self) -> subprocess.Popen[str]:
        root = Path(planner.__file__).resolve().parent.parent  # -m puts the working directory on the module path
        self._greeted = False
        return subprocess.Popen(
            [sys.executable, "-m", "planner.service"], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._stderr, text=True, encoding="utf-8", start_new_session=True,  # Ctrl-C stays with the parent
        )

    def _end_child(self) -> None:
        """Close the pipes, give an idle child a moment to exit, then kill it."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # a dead child's pipe cannot be flushed
                    continue
        try:
            self._child.wait(CLOSE_WAIT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
