"""The argument parser of the commands that have flags of their own."""

from __future__ import annotations

import argparse
from typing import NoReturn

from planner.errors import SpecError


class CommandParser(argparse.ArgumentParser):
    """``command``: such as ``longhaul plan``. A mistake raises SpecError, one line, instead of ending the process; help
    is the command's own to print."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=command, description=description, add_help=False, allow_abbrev=False)
        self.add_argument("-h", "--help", action="store_true", help="show this text")

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{self.prog}: {message}; see {self.prog} --help")
