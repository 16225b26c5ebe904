"""The prices that a run's plans use: calibration, and measurements of memory, tiers and chunks."""
