"""Replays a planned step operation by operation, with measured curves of the machine."""
