"""Units: the only module with unit constants, and the only one that converts between numbers and human text."""

from __future__ import annotations

import math
import re

from planner.errors import SpecError

KIB = 2**10
MIB = 2**20
GIB = 2**30
TIB = 2**40
MICROSECONDS_PER_S = 10**6

_SCALES = {
    "": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15,
    "KI": KIB, "MI": MIB, "GI": GIB, "TI": TIB,
}
_QUANTITY = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([KMGTP]?i?)\s*([A-Za-z/]*)\s*$", re.IGNORECASE)


def _parse(text: str | int | float, *, suffixes: tuple[str, ...], what: str, example: str) -> float:
    if isinstance(text, bool):
        raise SpecError(f"{what}: expected a quantity such as {example!r}, got {text!r}")
    if isinstance(text, int | float):
        if not math.isfinite(text):
            raise SpecError(f"{what}: expected a quantity such as {example!r}, got {text!r}")
        return float(text)
    match = _QUANTITY.match(text)
    if match is None or match.group(3).lower() not in suffixes:
        raise SpecError(f"{what}: expected a quantity such as {example!r}, got {text!r}")
    number = float(match.group(1)) * _SCALES[match.group(2).upper()]
    if not math.isfinite(number):
        raise SpecError(f"{what}: {text[:40]!r} is too large")
    return number


def parse_bytes(text: str | int | float, *, what: str = "size") -> int:
    """``"80 GiB"``, ``"1.5GB"`` or a plain number of bytes -> bytes. Raises SpecError naming ``what``."""
    return int(_parse(text, suffixes=("", "b"), what=what, example="80 GiB"))


def parse_rate(text: str | int | float, *, what: str = "rate") -> float:
    """``"400 GB/s"``, ``"989 TFLOP/s"`` or a plain number -> units per second. Raises SpecError naming ``what``."""
    return _parse(text, suffixes=("", "b/s", "flop/s", "/s"), what=what, example="400 GB/s")


def parse_tokens(text: str | int, *, what: str = "tokens") -> int:
    """``"384K"`` (= 393,216, because token counts use powers of two), ``"1M"`` or a plain number -> tokens.

    Raises SpecError naming ``what``."""
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KM]?)\s*", text, re.IGNORECASE)
        if match is None:
            raise SpecError(f"{what}: expected a token count such as '384K', got {text!r}")
        number = float(match.group(1)) * {"": 1, "K": KIB, "M": MIB}[match.group(2).upper()]
        if number >= 2**53:
            raise SpecError(f"{what}: {text[:40]!r} is too large")
        return int(number)
    return int(text)


def format_bytes(num_bytes: float) -> str:
    """For example 1.5 GiB: binary units, three digits."""
    for scale, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= scale:
            number = num_bytes / scale
            return f"{number:.3g} {name}" if abs(number) < 1000 else f"{number:.0f} {name}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """For example 12.3 ms, 4.56 s, 3:25 min, 2:03 h."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60}:{minutes % 60:02d} h"
    if seconds >= 100:
        whole = round(seconds)
        return f"{whole // 60}:{whole % 60:02d} min"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.3g} ms"


def format_count(number: float) -> str:
    """For example 950, 12.3K, 4.56M, 7B: decimal units, for tokens and parameters."""
    for scale, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if abs(number) >= scale:
            return f"{number / scale:.3g}{name}"
    return f"{number:.0f}"
