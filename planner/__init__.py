"""Longhaul's planner: this step's sequence lengths in, an immutable, verified StepPlan out. No torch."""
