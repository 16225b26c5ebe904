"""A rebuilt table: the published figure, ours, the error, and whether the error is within what was stated before.

Tolerances belong to a group of rows (``Rule``), never to one row, and are set where the system is defined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from planner.codec import from_plain
from planner.errors import SpecError
from planner.inputs.yaml_file import read_yaml

REPRODUCE_JSON_SCHEMA = 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a group of rows must meet. Errors are relative to the published figure: ``below`` and ``above`` bound each
    row, ``mean`` the mean of the absolute errors (None: not bounded)."""

    name: str
    below: float
    above: float
    mean: float | None = None

    def __post_init__(self) -> None:
        if min(self.below, self.above, self.mean or 0.0) < 0:
            raise SpecError(f"rule {self.name}: tolerances must be 0 or more")

    def text(self) -> str:
        each = f"+-{self.above:.0%}" if self.below == self.above else f"-{self.below:.0%} to +{self.above:.0%}"
        return f"{self.name}: every row {each}" + (f", mean {self.mean:.0%}" if self.mean is not None else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published figure (not zero) and ours, in the same unit. ``ours`` is NaN where we found no answer."""

    name: str
    paper: float
    ours: float
    rule: Rule

    def __post_init__(self) -> None:
        if not math.isfinite(self.paper) or self.paper == 0:
            raise SpecError(f"row {self.name}: a published figure must be a number other than 0, got {self.paper}")

    @property
    def error(self) -> float:
        """Relative, positive where ours is larger; infinite where we have no answer."""
        return math.inf if math.isnan(self.ours) else self.ours / self.paper - 1

    @property
    def within(self) -> bool:
        return -self.rule.below <= self.error <= self.rule.above


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """All rows of a system. ``assumptions``: everything that the publication does not give."""

    system: str
    title: str
    rows: tuple[Row, ...]
    assumptions: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise SpecError(f"reproduction of {self.system}: no rows")

    @property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(dict.fromkeys(row.rule for row in self.rows))

    @property
    def mean_error(self) -> float:
        return _mean(self.rows)

    @property
    def worst_error(self) -> float:
        return max(abs(row.error) for row in self.rows)

    def rule_lines(self) -> tuple[str, ...]:
        """Each rule with the mean and the worst error of its rows, which the figures over all rows may hide."""
        lines = []
        for rule in self.rules:
            rows = tuple(row for row in self.rows if row.rule == rule)
            worst = max(abs(row.error) for row in rows)
            lines.append(f"{rule.text()} (here: mean {_mean(rows):.1%}, worst {worst:.1%} of {len(rows)} rows)")
        return tuple(lines)

    def misses(self) -> tuple[str, ...]:
        """One line for each row and each mean outside its rule."""
        lines = [f"{row.name}: {row.error:+.1%}" for row in self.rows if not row.within]
        for rule in self.rules:
            mean = _mean(tuple(row for row in self.rows if row.rule == rule))
            if rule.mean is not None and mean > rule.mean:
                lines.append(f"mean of {rule.name}: {mean:.1%}")
        return tuple(lines)

    @property
    def met(self) -> bool:
        return not self.misses()


def as_json(result: Reproduction) -> dict[str, Any]:
    """Schema 1. Figures without an answer, and their errors, are null."""
    return {
        "schema": REPRODUCE_JSON_SCHEMA,
        "system": result.system,
        "rows": [
            {
                "row": row.name, "paper": row.paper, "ours": _finite(row.ours), "error": _finite(row.error),
                "within": row.within,
            }
            for row in result.rows
        ],
        "mean_error": _finite(result.mean_error),
        "worst_error": _finite(result.worst_error),
        "met": result.met,
        "rules": list(result.rule_lines()),
        "assumptions": list(result.assumptions),
        "misses": list(result.misses()),
    }


def load_data(cls: type[T], name: str) -> T:
    """``data/<name>.yaml`` as a dataclass. Raises SpecError where the file and the dataclass differ."""
    path = Path(__file__).parent / "data" / f"{name}.yaml"
    data = read_yaml(path, f"data {name}")
    if not isinstance(data, Mapping):
        raise SpecError(f"data {name}: expected a mapping")
    return from_plain(cls, data, where=f"data {name}")


def _mean(rows: tuple[Row, ...]) -> float:
    return sum(abs(row.error) for row in rows) / len(rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
