"""Longhaul's own strategy: one search over group size, kind, packing, placement, order and memory."""
