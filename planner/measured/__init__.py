"""What a run measured, and how well its cost model predicted it."""
