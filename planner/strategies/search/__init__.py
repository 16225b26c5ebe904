"""What several strategies share: shapes of groups, lower bounds, memory policies and moves to search over."""
