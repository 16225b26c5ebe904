"""The settings of a run: the tree, its checks, and how recipes and flags fill it."""
