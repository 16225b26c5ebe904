"""A planned step replayed operation by operation on a machine's measured curves."""
