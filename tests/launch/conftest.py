"""What the tests of ``longhaul plan`` share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest


@pytest.fixture
def lengths(tmp_path: Path) -> str:
    rng = random.Random(0)
    path = tmp_path / "lengths.txt"
    path.write_text("".join(f"{int(rng.paretovariate(1.1) * 60) % 4000 + 1}\n" for _ in range(40)))
    return str(path)
