"""All numbers that say how much ``adaptive`` tries."""

from __future__ import annotations

MAX_BUILDS = 12
MIN_BUILDS = 4
ROWS_AND_RANKS = 60_000
CLOSE_ENOUGH = 1e-3
WORK_PER_GAP = 7e6
LEAST_GAP = 3e-3
MOST_GAP = 2e-2
MAX_LOCALS = 2
NUM_VOTERS = 48
NODE_WORK = 20
PACK_SHARES = (1.0, 0.5, 0.25, 0.125)
NUM_PARTNERS = 6
LEAST_GAIN = 1e-4
MOVES_PER_RANK = 2
