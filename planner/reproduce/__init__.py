"""Published tables, rebuilt from their own inputs: one file per system."""
