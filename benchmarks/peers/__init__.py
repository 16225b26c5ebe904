"""Public systems beside ours: what each peer is, its adapters, its step and its planner."""
