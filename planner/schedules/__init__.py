"""What an attention group sends and computes, as data: rounds of messages and tasks, token layouts, and a checker."""
