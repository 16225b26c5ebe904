"""Longhaul's memory manager: what keeps long sequences within a device's bytes."""
