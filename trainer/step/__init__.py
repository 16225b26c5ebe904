"""One training step: every microbatch of a plan, whole or in chunks, stage by stage."""
