"""``longhaul reproduce SYSTEM``: rebuilds a published table row by row; the exit code is the verdict."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from launch.arguments import CommandParser
from launch.console import output_console
from launch.result_file import check_target, write_result
from planner.codec import suggest
from planner.errors import EXIT_OK, SpecError

if TYPE_CHECKING:
    from planner.reproduce.table import Reproduction

EXIT_MISSED = 1


def run(arguments: list[str]) -> int:
    """Rebuild and print; returns 0 if every tolerance is met, else 1. Raises SpecError (2) for wrong input."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if flags.help:
        print(parser.format_help(), end="")
        return EXIT_OK
    rebuild = _system(flags.system)
    if flags.json not in (None, "-"):
        check_target("--json", flags.json)
    result = rebuild()
    _write_json(result, flags.json)
    if flags.json != "-":
        show(result)
    return EXIT_OK if result.met else EXIT_MISSED


def show(result: Reproduction) -> None:
    """Print table, assumptions and verdict."""
    from rich.table import Table

    console = output_console()
    table = Table(title=result.title, title_justify="left")
    table.add_column("row")
    for column in ("paper", "ours", "error"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in result.rows:
        ours = "none" if math.isnan(row.ours) else f"{row.ours:.4g}"
        error = "-" if math.isinf(row.error) else f"{row.error:+.1%}"
        table.add_row(row.name, f"{row.paper:.4g}", ours, error, "met" if row.within else "MISS")
    console.print(table)
    for heading, lines in (("tolerances", result.rule_lines()), ("assumed", result.assumptions)):
        console.print(heading)
        for line in lines:
            console.print(f"  {line}")
    console.print(verdict(result))


def verdict(result: Reproduction) -> str:
    """The last line: met or missed, number of rows, mean and worst error."""
    num_met = sum(row.within for row in result.rows)
    errors = f"mean error {result.mean_error:.1%}, worst {result.worst_error:.1%}"
    if result.met:
        return f"{result.system}: met, {num_met} of {len(result.rows)} rows; {errors}"
    return f"{result.system}: MISSED, {num_met} of {len(result.rows)} rows met; {errors}; " + "; ".join(result.misses())


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "longhaul reproduce",
        "Rebuild a published table from its own inputs. Exit code 1 where it is outside its tolerance.",
    )
    parser.add_argument("system", nargs="?", metavar="SYSTEM", help=f"one of {', '.join(_SYSTEMS)}")
    parser.add_argument("--json", metavar="-|FILE", help="write the result as JSON; - prints it and nothing else")
    return parser


def _system(name: str | None) -> Callable[[], Reproduction]:
    available = ", ".join(_SYSTEMS)
    if name is None:
        raise SpecError(f"longhaul reproduce: name a system; available: {available}")
    if name in _SYSTEMS:
        return _SYSTEMS[name]
    raise SpecError(f"longhaul reproduce: unknown system {name!r}{suggest(name, _SYSTEMS)}; available: {available}")


def _write_json(result: Reproduction, target: str | None) -> None:
    from planner.reproduce.table import as_json

    if target is None:
        return
    text = json.dumps(as_json(result), indent=2, allow_nan=False)
    if target == "-":
        print(text)
        return
    write_result("--json", target, text + "\n")


def _flexsp() -> Reproduction:
    from planner.reproduce.flexsp import reproduce_flexsp

    return reproduce_flexsp()


def _memo() -> Reproduction:
    from planner.reproduce.memo import reproduce_memo

    return reproduce_memo()


def _b200() -> Reproduction:
    from planner.reproduce.b200 import reproduce_b200

    return reproduce_b200()


def _zeppelin() -> Reproduction:
    from planner.reproduce.zeppelin import reproduce_zeppelin

    return reproduce_zeppelin()


def _bytescale() -> Reproduction:
    from planner.reproduce.bytescale import reproduce_bytescale

    return reproduce_bytescale()


_SYSTEMS: dict[str, Callable[[], Reproduction]] = {
    "flexsp": _flexsp, "bytescale": _bytescale, "zeppelin": _zeppelin, "memo": _memo, "b200": _b200,
}
