"""What a run measured, and what that says about its cost model."""
