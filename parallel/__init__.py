"""Ranks working together: meshes, collectives, attention across ranks, kernels. Executes plans, never makes them."""
