"""Public systems to compare with ours: what each peer is, its adapters, its step and its planner."""
