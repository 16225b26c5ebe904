"""How commands print to the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from planner.errors import LonghaulError

if TYPE_CHECKING:
    from rich.console import Console


def output_console() -> Console:
    """A console that prints text unchanged, without markup or colours for numbers. If the reader (head, less) closes
    the pipe, it raises BrokenPipeError, as print does, which ``launch.cli`` handles; rich alone would exit with code
    1."""
    from rich.console import Console

    class OutputConsole(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError

    return OutputConsole(highlight=False, markup=False)


def error_lines(error: LonghaulError) -> str:
    """The lines a user sees: each problem on its own line, marked as an error of longhaul."""
    return "\n".join(f"longhaul: error: {line}" for line in str(error).splitlines())
