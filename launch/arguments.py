"""The argument parser for commands with flags of their own."""

from __future__ import annotations

import argparse
from typing import NoReturn

from planner.errors import SpecError


class CommandParser(argparse.ArgumentParser):
    """``command``: for example ``longhaul plan``. A mistake raises SpecError with one line instead of ending the
    process; ``--help`` only sets a flag, and the command prints the help."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=command, description=description, add_help=False, allow_abbrev=False)
        self.add_argument("-h", "--help", action="store_true", help="show this text")

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{self.prog}: {message}; see {self.prog} --help")
