"""How much work a call does, counted: the same on a busy machine as on an idle one, which seconds are not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType


def count_calls(action: Callable[[], object]) -> int:
    """Calls of Python and C functions while ``action`` runs, in this thread. What happens inside one C function (numpy
    over an array) counts once: this catches loops in Python, where planners lose their time."""
    num_calls = 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
    return num_calls
