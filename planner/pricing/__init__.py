"""The price of a microbatch and of a whole plan, and the proof that a plan is legal."""
