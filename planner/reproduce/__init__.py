"""Published tables rebuilt from their own inputs: one module per system, numbers with their source in ``data/``."""
