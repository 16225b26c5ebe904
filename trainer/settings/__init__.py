"""The settings of a run: their tree, its checks, and how recipes and flags fill it."""
