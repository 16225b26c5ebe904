"""One training step: every microbatch of a plan, whole or in chunks, on one stage or several."""
