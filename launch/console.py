"""The terminal as commands print to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from planner.errors import LonghaulError

if TYPE_CHECKING:
    from rich.console import Console


def output_console() -> Console:
    """Prints text as it is, without colours for numbers or markup. Where the reader has left (head, less) it raises
    BrokenPipeError as print does, for ``launch.cli`` to end with; rich alone would end the process with 1."""
    from rich.console import Console

    class OutputConsole(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError

    return OutputConsole(highlight=False, markup=False)


def error_lines(error: LonghaulError) -> str:
    """What a person reads: each problem on its own line, each marked as ours."""
    return "\n".join(f"longhaul: error: {line}" for line in str(error).splitlines())
